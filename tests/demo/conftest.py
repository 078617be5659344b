"""What the tests of the demo share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo.tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused model of a few thousand parameters."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))
