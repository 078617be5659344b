"""A scripted endpoint, a tiny fused model, and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.endpoints import Scripted, scripted
from tests.training.tiny import save_checkpoint


@pytest.fixture
def endpoint() -> Iterator[Scripted]:
    with scripted() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no ``.env`` file of this machine."""
    for name in ("OPENAI_API_KEY", "DEEPSEEK_API_KEY", "MOONSHOT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
