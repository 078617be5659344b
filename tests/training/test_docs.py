"""What the page on training says: its commands are known, its recipe can be read, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from multimodal import cli, cli_feedback
from multimodal.training.recipes import read_recipe
from multimodal.training.train import TrainingSettings

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:torchrun .* -m multimodal\.cli|multimodal) (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_known(command: str) -> None:
    options = cli._parser().parse_args(shlex.split(command, comments=True))
    assert options.run in (cli._train, cli._label, cli._adapt, cli_feedback._export)


def test_there_are_commands_for_many_gpus_and_machines() -> None:
    assert len(COMMANDS) >= 10
    assert "torchrun --nproc_per_node 8 -m multimodal.cli train" in PAGE and "torchrun --nnodes 2" in PAGE


def test_the_recipe_can_be_read(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "own.toml").write_text(recipe)
    found = read_recipe(tmp_path / "own.toml", tmp_path)
    settings = TrainingSettings(output=tmp_path, cache=tmp_path, **found.settings)
    assert (settings.validate_steps, settings.patience, settings.ema) == (200, 5, 0.999)


@pytest.mark.parametrize("name", re.findall(r"`((?:tests|docs)/[\w/]+\.\w+)`", PAGE))
def test_files_are_there(name: str) -> None:
    assert (ROOT / name).exists()
