"""What the README says is executed: its Python runs as it stands, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from multimodal.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"^multimodal (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_runs_and_prints(
    snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 0


def test_snippet_prints_what_the_readme_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words, not figures: another processor computes other last digits."""
    monkeypatch.chdir(ROOT)
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    said = README.split(SNIPPETS[0])[1].split("```\n")[2]

    def words(text: str) -> list[str]:
        return re.findall(r"[A-Za-z]+", text)

    assert words(capsys.readouterr().out) == words(said)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options are known; it is not run."""
    words = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert all(word in usage for word in words if word.startswith("--"))


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).exists()
