"""What the training tests share: the tiny bases and the drawn task, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from tests.training.tiny import save_bases, tiny_model, write_task


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), train=16, validate=12)


@pytest.fixture
def fused(bases: tuple[str, str]) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """A freshly fused tiny model, gates shut, and its processor."""
    return tiny_model(*bases)
