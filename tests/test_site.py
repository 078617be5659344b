"""The documentation: its pages exist, what the first ones say is executed, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.pipelines import Pipeline
from multimodal.presets import trained_folder

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
OURS = ("index", "asking", "adapting", "pipelines")
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in OURS}
COMMANDS = sorted(
    {line for text in PAGES.values() for line in re.findall(r"^    multimodal (.*?)(?:\s+#.*)?$", text, re.M)}
)
needs_weights = pytest.mark.skipif(trained_folder("embedded") is None, reason="no trained weights in assets/embedded")
FOREIGN = re.compile(
    r"""(?:\ssrc=|<link[^>]*\shref=|url\(|@import\s+|\bfrom\s*|import\()["']?(?:https?:)?//[^\s"')]+"""
)


def pages(nav: Any) -> Iterator[str]:
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages(target)


def scripts(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[name], flags=re.DOTALL)


@pytest.mark.parametrize("page", list(pages(SITE["nav"])))
def test_every_page_of_the_navigation_is_there(page: str) -> None:
    assert (DOCS / page).is_file() or (ROOT / page).is_file()


def test_every_page_and_notebook_is_in_the_navigation() -> None:
    there = {path.name for path in DOCS.glob("*.md")}
    there |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/[0-9]*.ipynb")}
    assert there <= set(pages(SITE["nav"]))


@needs_weights
@pytest.mark.parametrize("name", ["index", "asking"])  # serving.md has a test of its own, with a server
def test_python_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile("\n".join(scripts(name)), f"{name}.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_pipeline_on_its_page_is_one() -> None:
    names: dict[str, Any] = {}
    exec(compile(scripts("pipelines")[0], "my_file.py", "exec"), names)
    assert isinstance(names["AlwaysYes"](), Pipeline)


def test_the_script_that_adapts_is_python() -> None:
    (script,) = scripts("adapting")
    compile(script, "adapting.md", "exec")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options are known; it is not run."""
    words = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert all(word in usage for word in words if word.startswith("--"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs what `make setup` installs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    for page in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not FOREIGN.findall(page.read_text(encoding="utf-8")), page.name
