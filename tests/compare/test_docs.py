"""The page on comparing: its example runs and prints what it says, its commands are known, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from multimodal import cli, cli_compare
from multimodal.compare import CompareSettings
from multimodal.pipelines.endpoint import PROVIDERS
from multimodal.pipelines.registry import PIPELINES

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^multimodal (.*)$", PAGE, flags=re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_example_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (questions,) = blocks("json")
    Path("shelf.jsonl").write_text(questions)
    scripts = {script.partition("\n")[0].removeprefix("# "): script for script in blocks("python")}
    assert list(scripts) == ["pictures.py", "own.py", "compare.py"]
    for name, script in scripts.items():
        Path(name).write_text(script)
    runpy.run_path("pictures.py")
    capsys.readouterr()
    runpy.run_path("compare.py")
    assert [capsys.readouterr().out] == blocks("text")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_known(command: str) -> None:
    options = cli._parser().parse_args(shlex.split(command))
    assert options.run in (cli_compare._compare, cli_compare._report, cli_compare._advise)


def test_the_first_command_does_what_is_said_of_it() -> None:
    options = cli._parser().parse_args(shlex.split(COMMANDS[0]))
    assert (options.tasks, options.root, options.limit) == (["slake", "grocery"], Path("DATA"), 200)
    assert (options.split, options.pipelines) == ("validation", ["native", "text_only", "blind"])
    assert CompareSettings(Path("first"), ["slake"]).tries == 4


def test_every_pipeline_and_every_key_is_named() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == list(PIPELINES)
    assert all(f"`{name}`" in PAGE for name in PROVIDERS)
    assert {provider.key for provider in PROVIDERS.values() if provider.key} == set(
        re.findall(r"^(\w+_KEY)=", PAGE, flags=re.MULTILINE)
    )


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((\w+\.md)\)", PAGE))))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / "docs" / name).exists()
