"""Random joins, cancels and errors, by hypothesis: whatever happens, answers are right and nothing is left behind."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import lru_cache

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from multimodal.engine import Engine, EngineFull, Generation, Picture, Request
from multimodal.fusion import FusionForConditionalGeneration
from tests.engine.conftest import expected, mixed_requests, request
from tests.fusion.tiny import IMAGE, tiny_model, tiny_tokenizer, words

KINDS = 6


@lru_cache
def tiny() -> FusionForConditionalGeneration:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@lru_cache
def said(kind: int) -> list[int]:
    return expected(tiny(), mixed_requests(max_new_tokens=12)[kind])


class EngineStates(RuleBasedStateMachine):
    """An engine of three slots and a short queue."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"slots": 3, "queue": 4, "read_at_once": 4, "picture_bytes": 5000}
        self.engine = Engine(tiny(), tiny_tokenizer(), linger=0.001, **sizes)
        self.generations: list[tuple[int | None, Generation]] = []

    def submit(self, kind: int | None, asked: Request) -> None:
        with suppress(EngineFull):  # refused, and nothing else happened
            self.generations.append((kind, self.engine.submit(asked)))

    @rule(kind=st.integers(0, KINDS - 1))
    def join(self, kind: int) -> None:
        self.submit(kind, mixed_requests(max_new_tokens=12)[kind])

    @rule(seed=st.integers(0, 3))
    def join_with_a_picture_of_nothing(self, seed: int) -> None:
        pixels = request([IMAGE]).pictures[0].pixel_values.clone()
        pixels[0, 0, 0] = torch.nan
        self.submit(None, Request([*words(3), IMAGE, *words(2)], [Picture(pixels, f"broken {seed}")], 12))

    @rule(place=st.integers(0, 50))
    def cancel(self, place: int) -> None:
        if self.generations:
            self.generations[place % len(self.generations)][1].cancel()

    @rule(place=st.integers(0, 50))
    def wait(self, place: int) -> None:
        if self.generations:
            assert self.generations[place % len(self.generations)][1].wait(20)

    @rule()
    def pause(self) -> None:
        time.sleep(0.002)

    @invariant()
    def the_picture_cache_is_bounded(self) -> None:
        assert 0 <= self.engine.pictures.nbytes <= 5000

    def teardown(self) -> None:
        for kind, generation in self.generations:
            assert generation.wait(20)
            ids = [token.id for token in generation.tokens]
            if kind is None:
                assert not ids and (generation.error is not None or generation.reason == "cancelled")
            elif generation.reason == "cancelled":
                assert ids == said(kind)[: len(ids)]
            else:
                assert generation.reason == "length" and ids == said(kind)
        deadline = time.monotonic() + 10
        while self.engine._thread is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert self.engine._thread is None and not self.engine._waiting
        assert all(slot.job is None for slot in self.engine.slots)


TestEngineStates = EngineStates.TestCase
TestEngineStates.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
