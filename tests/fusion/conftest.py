"""What the tests of the fused model share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from multimodal.fusion import FusionForConditionalGeneration
from tests.fusion.tiny import tiny_model


@pytest.fixture(autouse=True)
def inference_only(request: pytest.FixtureRequest) -> Iterator[None]:
    """No gradients, unless a test asks for them by the mark of its module: ``NEEDS_GRADIENT = True``."""
    with torch.set_grad_enabled(getattr(request.module, "NEEDS_GRADIENT", False)):
        yield


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.fixture(params=["tanh", "dynamic"])
def gate(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["all_previous", "latest"])
def visibility(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(gate: str, visibility: str) -> FusionForConditionalGeneration:
    """One model for each kind of gate and of visibility, gates open."""
    return tiny_model(gate=gate, visibility=visibility)
