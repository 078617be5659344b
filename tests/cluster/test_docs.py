"""What the page of scale says is so: its commands and files are there, and its first example comes out."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from multimodal.cli import main

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\bmultimodal ([a-z]+)", PAGE))))
def test_commands_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for line in re.findall(rf"multimodal {command} (.*)", PAGE):
        assert set(re.findall(r"--[a-z0-9-]+", line)) <= set(re.findall(r"--[a-z0-9-]+", said)), line


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`?((?:tests|docs|deploy)/[\w/]+(?:\.\w+)?)", PAGE))))
def test_files_are_there(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", PAGE))))
def test_benchmarks_are_there(module: str) -> None:
    assert find_spec(module) is not None


def test_the_first_example_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("simpy")
    assert main(["plan", "--rate", "10", "--json"]) == 0
    for made in json.loads(capsys.readouterr().out):
        outcome = made["outcome"]
        row = f"| 10 | {made['routing']} | {made['replicas']} | {made['cells']} | {outcome['p50']:.2f} s |"
        assert f"{row} {outcome['p99']:.2f} s |" in PAGE
