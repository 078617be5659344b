"""A tiny model behind a real endpoint, the real client, and pictures as data-URIs."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image
from torch import nn

from multimodal.adapters import attach, save_adapter, weights_of
from multimodal.model import MultiModalModel
from multimodal.service import serving
from tests.training.tiny import save_checkpoint

NAME = "tiny"
QUESTION = "What colour is this?"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> MultiModalModel:
    """Random weights, open gates; it says nonsense and never ends by itself."""
    model = MultiModalModel.from_pretrained(checkpoint, dtype=torch.float32)
    model.model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
def url(model: MultiModalModel) -> Iterator[str]:
    with serving(model, name=NAME) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as client:
        yield client


@pytest.fixture(scope="session")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that changes what the model says."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    model = MultiModalModel.from_pretrained(checkpoint, dtype=torch.float32).model
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "cross_attention_blocks" in name
    ]
    attach(model, layers, name="mine", rank=2, scale=1.0)
    for _, b in weights_of(model, "mine").pairs.values():
        nn.init.normal_(b, std=0.5, generator=torch.Generator().manual_seed(0))
    save_adapter(model, "mine", folder, base=NAME)
    return folder


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def asking(text: str, *pictures: Image.Image | str) -> list[dict[str, Any]]:
    """The messages of one question."""
    urls = [picture if isinstance(picture, str) else uri(picture) for picture in pictures]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


class Slow:
    """Every step of a model's engine takes a moment, and is counted; one of them may fail."""

    def __init__(self, model: MultiModalModel, *, pause: float = 0.02, fail_at: int = 0) -> None:
        self.done, self.pause, self.fail_at = 0, pause, fail_at
        self.runner = model.engine.runner

    def __enter__(self) -> Slow:
        for name in ("read", "step"):
            setattr(self.runner, name, partial(self._step, getattr(self.runner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        del self.runner.read, self.runner.step

    def _step(self, run: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
        self.done += 1
        if self.done == self.fail_at:
            raise RuntimeError("the machine is out of steam")
        time.sleep(self.pause)
        return run(*arguments, **options)


def wait_for(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
