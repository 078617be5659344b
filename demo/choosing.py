"""Choosing: the comparisons that are here, the report of one, and advice from it.

What it does not know: the page, how a comparison is run.

What always holds: nothing is written; where the page is open to other machines (``anywhere`` is False), only
comparisons in the one folder are read, whatever path is given.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.compare import Results

PATTERN = "comparison*"
NOTED = "run.json"  # what makes a folder one of a comparison
FILES = (NOTED, "answers.jsonl", "groups.jsonl")  # what its results are read from
COMMAND = "multimodal compare --tasks slake --root DATA --output comparison"
LARGEST = 12_000_000  # characters of a report that are shown in the page
GIB = 2**30


class ChoosingError(ValueError):
    """A comparison that cannot be shown: why, and the remedy."""


@dataclass(frozen=True)
class Wishes:
    """What a person allows, as sliders have it: 0 is any."""

    daily_volume: float = 1000
    latency: float = 0
    memory: float = 0  # GiB
    data_stays_here: bool = False
    labelled_examples: float = 0


class Choosing:
    """Comparisons.

    Args:
        folder: Those named ``comparison*`` in it are found.
        anywhere: Whether another path may be given, too.

    Raises:
        ModuleNotFoundError: From any method, if what comparisons need is not installed.
    """

    def __init__(self, folder: Path, *, anywhere: bool) -> None:
        self._folder, self.anywhere = folder, anywhere
        self._lock = threading.Lock()
        self._read: tuple[tuple[Any, ...], Results] | None = None

    def found(self) -> list[str]:
        """Their folders, the latest first, as paths in the folder."""
        folders = [path.parent for path in self._folder.glob(f"{PATTERN}/{NOTED}")]
        return [path.name for path in sorted(folders, key=lambda path: _stamp(path)[1:], reverse=True)]

    def report(self, said: str) -> str:
        """The report of a comparison as an HTML page.

        Raises:
            ChoosingError: If there is no comparison, or its report is too large to show in a page.
        """
        folder = self._open(said)
        written = folder / "report.html"
        try:
            if written.is_file() and written.stat().st_mtime >= _stamp(folder)[-1]:
                return self._limited(written.read_text(encoding="utf-8"), folder)
        except (OSError, UnicodeDecodeError):
            pass  # it is made anew
        results = self._results(folder)
        from multimodal.compare import pairs_of, summarise
        from multimodal.compare.report.write import html

        return self._limited(html(results, summarise(results), pairs_of(results)), folder)

    def advice(self, said: str, wishes: Wishes) -> str:
        """What to choose, as an HTML fragment.

        Raises:
            ChoosingError: If there is no comparison, or nothing can be said.
        """
        results = self._results(self._open(said))
        from multimodal.compare.advice import Constraints
        from multimodal.compare.advise_command import deployments_of, render

        try:
            constraints = Constraints(
                daily_volume=int(wishes.daily_volume),
                latency=wishes.latency or None,
                memory=int(wishes.memory * GIB) or None,
                data_stays_here=wishes.data_stays_here,
                labelled_examples=int(wishes.labelled_examples),
            )
            return render(results, constraints, deployments=deployments_of(results), form="html")
        except ValueError as error:
            raise ChoosingError(str(error)) from None

    def _open(self, said: str) -> Path:
        found = self.found()
        if not said.strip():
            raise ChoosingError(f"There is no comparison here yet. This makes one: {COMMAND}")
        if said not in found and not self.anywhere:
            raise ChoosingError("Choose one of the comparisons in the list.")
        folder = self._folder / Path(said.strip()).expanduser()
        if not (folder / NOTED).is_file():
            raise ChoosingError(f"{said} is not the folder of a comparison. This makes one: {COMMAND}")
        return folder

    def _results(self, folder: Path) -> Results:
        from multimodal.compare import read_results

        with self._lock:
            stamp = _stamp(folder)
            if self._read is None or self._read[0] != stamp:
                try:
                    self._read = stamp, read_results(folder)
                except (ValueError, KeyError, TypeError, OSError) as error:
                    raise ChoosingError(f"{folder.name} can't be read: {error}") from None
            return self._read[1]

    def _limited(self, page: str, folder: Path) -> str:
        if len(page) > LARGEST:
            raise ChoosingError(
                f"The report is too large to show here ({len(page) / 1e6:.0f} MB): "
                f"`multimodal compare report {folder.name}` writes it to report.html; open that in a browser."
            )
        return page


def framed(page: str) -> str:
    """A whole page inside of another one, from which nothing in it can reach out, as HTML."""
    return (
        '<iframe class="report" title="Report of the comparison" sandbox="allow-scripts" '
        f'srcdoc="{escape(page)}"></iframe>'
    )


def told(message: str) -> str:
    """Why nothing is shown, as HTML."""
    return f'<p class="notice" role="status">{escape(message)}</p>'


def _stamp(folder: Path) -> tuple[Any, ...]:
    """Changes when there is something new to read; the time of the latest change comes last."""
    times = [file.stat().st_mtime for name in FILES if (file := folder / name).is_file()]
    return str(folder.resolve()), max(times, default=0.0)
