"""Executes notebooks in place, and tells whether outputs still belong to their sources.

What it does: runs each notebook from its first cell to its last in a fresh kernel of this environment, with the network
shut; then strips what changes from run to run (times, widget state, paths of this machine) and writes a digest of every
code cell's source beside its outputs.

What always holds: a notebook that fails, or that reaches for the network, is not saved; neither is a quick run.

    python -m notebooks.execute [NAME ...] [--check]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from multimodal.notebook import COMMITTED, LIMITS, is_quick
from notebooks.offline_kernel import REFUSED

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
MOST_LINES = 30  # of a cell
TIMEOUT = 1800  # seconds that a cell may take: many, since machines are busy, and a kernel that hangs must end
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_LINE = "*Here is a widget: it appears when you run this cell.*"
NEXT = "## What to try next"
PROMISES = ("You will learn", "Takes", "Needs")
# Folders that are one machine's, and not in the notebook's own words; written so that they do not match themselves.
MACHINE = re.compile(r"/(?:[w]ork|[r]oot|[h]ome|[U]sers|[t]mp|[f]arm)/|site-packages|[A-Z]:\\Users")
EMBEDDED = re.compile(r"base64,[A-Za-z0-9+/=]+")
NO_ALT = re.compile(r"<img (?![^>]*alt=.[^>])")
COLOUR_CODES, MOST_TOLD = re.compile(r"\x1b\[[\d;]*m"), 4000
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")

Notebook = Any  # nbformat's, a dictionary with attributes


class NotebookError(RuntimeError):
    """A notebook that does not run, or whose outputs cannot be shown to others."""


class OwnKernel(AsyncKernelManager):
    """The kernel of this environment, whatever others are installed for the user, without a network."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How to start it."""
        argv = [sys.executable, str(FOLDER / "offline_kernel.py"), "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def all_notebooks() -> list[Path]:
    """The notebooks, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))


def run(path: Path, *, quick: bool = False) -> tuple[Notebook, float]:
    """Execute a notebook; the file stays as it is.

    Args:
        path: The notebook.
        quick: Use the smaller limits.

    Returns:
        The notebook as executed and cleaned, and how many seconds it took.

    Raises:
        NotebookError: If a cell fails, or something reached for the network.
    """
    notebook = nbformat.read(path, as_version=4)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        refused = Path(folder) / "refused"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "IPYTHONDIR": folder,  # neither the user's start-up files nor their history
            LIMITS: "quick" if quick else "",
            COMMITTED: "" if quick else "1",
            REFUSED: str(refused),
        }
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_manager_class=OwnKernel,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            told = COLOUR_CODES.sub("", error.traceback)[-MOST_TOLD:]
            raise NotebookError(f"{path.name} does not run: {error.ename}: {error.evalue}\n{told}") from None
        except CellTimeoutError as error:
            raise NotebookError(f"{path.name} does not end within {TIMEOUT} seconds: {error}") from None
        if refused.exists():
            raise NotebookError(f"{path.name} reaches for the network: {refused.read_text(encoding='utf-8')}")
    seconds = time.monotonic() - began
    clean(notebook)
    return notebook, seconds


def clean(notebook: Notebook) -> None:
    """Strip what is not the notebook's own, widgets' state among it, and write the digests."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in code_cells(notebook):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.metadata["executed"] = digest(cell.source)
        cell.outputs = [_clean_output(output) for output in cell.outputs]
    notebook.metadata["executed"] = digest_of_all(notebook)


def _clean_output(output: Any) -> Any:
    if WIDGET in output.get("data", {}):
        output = nbformat.v4.new_output("display_data", data={"text/markdown": WIDGET_LINE})
    for holder, key in _texts(output):
        holder[key] = holder[key].replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".").rstrip(" ")
    return output


def _texts(output: Any) -> Iterator[tuple[Any, str]]:
    """Where an output holds text that a person reads."""
    if "text" in output:
        yield output, "text"
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and not kind.startswith("image/"):
            yield output["data"], kind


def code_cells(notebook: Notebook) -> list[Any]:
    """Those of its cells that are code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(source: str) -> str:
    """Of a cell's source."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def digest_of_all(notebook: Notebook) -> str:
    """Of all sources in their order: a cell that is taken away changes what those behind it give."""
    return digest("\n".join(digest(cell.source) for cell in code_cells(notebook)))


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook as it lies here, in words: stale outputs, and what breaks the conventions."""
    return _faults_of(nbformat.read(path, as_version=4))


def _faults_of(notebook: Notebook) -> list[str]:
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        if len(cell.source.splitlines()) > MOST_LINES:
            found.append(f"cell {number} has more than {MOST_LINES} lines")
        if cell.cell_type == "code":
            if cell.metadata.get("executed") != digest(cell.source):
                found.append(f"cell {number} was changed and not executed since")
            found += [f"cell {number}: {fault}" for output in cell.outputs for fault in _output_faults(output)]
    if notebook.metadata.get("executed") != digest_of_all(notebook):
        found.append("cells were added, moved or taken away, and the notebook not executed since")
    first, last = (notebook.cells[place].source if notebook.cells else "" for place in (0, -1))
    if missing := [words for words in PROMISES if f"**{words}**" not in first]:
        found.append(f"the first cell does not say: {', '.join(missing)}")
    if not last.startswith(NEXT):
        found.append(f"the last cell does not begin with {NEXT!r}")
    return found


def _output_faults(output: Any) -> Iterator[str]:
    if output.output_type == "error":
        yield f"the output is an error, {output.ename}"
    if output.get("name") == "stderr":
        yield f"something is on stderr: {output.text.strip()[:80]!r}"
    if WIDGET in output.get("data", {}):
        yield "a widget was saved"
    for holder, key in _texts(output):
        text = EMBEDDED.sub("", holder[key])
        for pattern, what in ((MACHINE, "a path of a machine"), (ADDRESS, "an object's address")):
            if match := pattern.search(text):
                yield f"{what} is in the output: {text[max(0, match.start() - 20) : match.end() + 30]!r}"
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data) or NO_ALT.search(data.get("text/html", "")):
        yield "a picture has no alt text: use multimodal.notebook.show"


def _chosen(names: Sequence[str]) -> list[Path]:
    paths = {path.stem: path for path in all_notebooks()}
    chosen = [Path(name).stem for name in names] or list(paths)
    if unknown := [name for name in chosen if name not in paths]:
        raise SystemExit(f"no notebook is called {', '.join(unknown)}: use {', '.join(paths)}")
    return [paths[name] for name in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.execute", description="Execute notebooks in place.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 02-inside-the-gates; all if none is given")
    parser.add_argument("--check", action="store_true", help="execute nothing: do outputs belong to their sources?")
    options = parser.parse_args(arguments)
    wrong, chosen = 0, _chosen(options.names)
    if len(chosen) > 1 and not options.check:  # one after another in one process, a client was seen to wait for ever
        codes = [subprocess.call([sys.executable, "-m", "notebooks.execute", path.stem], cwd=ROOT) for path in chosen]
        return int(any(codes))
    for path in chosen:
        if not options.check:
            try:
                notebook, seconds = run(path, quick=is_quick())
            except NotebookError as error:
                print(error, file=sys.stderr)
                wrong += 1
                continue
            print(f"{path.stem}: {seconds:.0f} s" + (" (quick: not saved)" if is_quick() else ""), flush=True)
            if not is_quick():
                nbformat.write(notebook, path)
        found = faults(path) if options.check else _faults_of(notebook)
        wrong += bool(found)
        for fault in found:
            print(f"{path.name}: {fault}", file=sys.stderr)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
