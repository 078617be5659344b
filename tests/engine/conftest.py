"""A tiny model, its engine, and what ``generate`` says: the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from multimodal.engine import Engine, Picture, Request, digest_of
from multimodal.fusion import FusionForConditionalGeneration
from tests.fusion.tiny import IMAGE, pictures, tiny_model, tiny_tokenizer, words

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def model() -> FusionForConditionalGeneration:
    """Random weights, open gates; its answers never end by themselves."""
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def make(model: FusionForConditionalGeneration) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(model: FusionForConditionalGeneration = model, **options: Any) -> Engine:
        engines.append(Engine(model, tiny_tokenizer(), **{"slots": 4, "linger": 0.01, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def request(tokens: list[int], *, seed: int = 0, **options: Any) -> Request:
    """A request about random pictures, one for each placeholder."""
    count = tokens.count(IMAGE)
    shown = [Picture(pixels, digest_of(pixels)) for pixels in pictures(count, seed=seed)]
    return Request(tokens, shown, **{"max_new_tokens": 10, **options})


def mixed_requests(**options: Any) -> list[Request]:
    """Requests with 0, 1 and 2 pictures and of different lengths."""
    return [
        request(words(6, seed=1), **options),
        request([*words(2, seed=2), IMAGE, *words(6, seed=3)], seed=1, **options),
        request([IMAGE, *words(3, seed=4), IMAGE, *words(2, seed=5)], seed=2, **options),
        request([*words(30, seed=6), IMAGE, *words(2, seed=7)], seed=3, **options),
        request([IMAGE, *words(20, seed=8)], seed=4, **options),
        request([*words(1, seed=9)], **options),
    ]


def expected(model: FusionForConditionalGeneration, asked: Request) -> list[int]:
    """What ``generate`` says, greedily."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(asked.tokens)])}
    if asked.pictures:
        inputs["pixel_values"] = torch.stack([picture.pixel_values for picture in asked.pictures])[None]
    said = model.generate(**inputs, max_new_tokens=asked.max_new_tokens, do_sample=False)
    return said[0, len(asked.tokens) :].tolist()
