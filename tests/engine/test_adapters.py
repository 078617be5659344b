"""An adapter in the flat weights is what it is in the model's modules, and others are not touched by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multimodal.adapters import AdapterSwitch, attach, weights_of
from multimodal.engine import Engine, Request
from multimodal.engine.graphs import GraphRunner
from multimodal.engine.native import NativeRunner
from multimodal.engine.native import obstacle as native_obstacle
from multimodal.engine.runner import Runner, TorchRunner
from multimodal.fusion import FusionForConditionalGeneration
from tests.engine.conftest import expected, mixed_requests
from tests.fusion.tiny import tiny_model, tiny_tokenizer

SIZES = {"slots": 4, "positions": 96, "pictures": 3}


@pytest.fixture
def adapted() -> tuple[FusionForConditionalGeneration, AdapterSwitch]:
    """A model with an adapter on blocks and resampler, and one on the decoder as well."""
    pytest.importorskip("peft")
    model = tiny_model()
    model.generation_config.eos_token_id = None
    switch = AdapterSwitch(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    seeing = [name for name in linear if "cross_attention_blocks" in name or "resampler" in name]
    with switch.alone():
        for name, layers in (("seeing", seeing), ("all", [*seeing, *(n for n in linear if "language_model" in n)])):
            attach(model, layers, name=name, rank=2, scale=1.0, seed=1)
            for _, b in weights_of(model, name).pairs.values():
                nn.init.normal_(b, std=0.3, generator=torch.Generator().manual_seed(len(name)))
            switch.names[name] = name
    return model, switch


@pytest.mark.parametrize("kind", [TorchRunner, GraphRunner])
def test_answers_are_those_of_the_modules(
    adapted: tuple[FusionForConditionalGeneration, AdapterSwitch], kind: type[TorchRunner]
) -> None:
    model, switch = adapted
    asked = [(name, its) for its in mixed_requests() for name in (None, "seeing", "all")]
    said = []
    for name, its in asked:
        with switch.use(name):
            said.append(expected(model, its))
    assert len({tuple(its) for its in said}) > 10
    runner = kind(model, torch.float32, **SIZES)
    engine = Engine(model, tiny_tokenizer(), runner=runner, adapters=switch, linger=0.01)
    with_adapters = [Request(its.tokens, its.pictures, its.max_new_tokens, adapter=name) for name, its in asked]
    generations = engine.generate(with_adapters)
    assert [[token.id for token in generation.tokens] for generation in generations] == said
    engine.close()


@torch.inference_mode()
def test_compiled_steps_take_adapters(adapted: tuple[FusionForConditionalGeneration, AdapterSwitch]) -> None:
    model, _ = adapted
    if (reason := native_obstacle(model)) is not None:
        pytest.skip(reason)
    exact = TorchRunner(model, torch.float32, **SIZES)
    ours = NativeRunner(model, "bfloat16", dtype=torch.float32, **SIZES)
    found: dict[Any, Any] = {}
    for name in (None, "seeing", "all"):
        logits = [read(runner, name) for runner in (exact, ours)]
        assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05
        found[name] = logits[0]
    assert (found[None] - found["all"]).norm() / found[None].norm() > 0.2


def read(runner: Runner, adapter: str | None) -> torch.Tensor:
    tokens = list(mixed_requests()[0].tokens)
    return runner.read(0, tokens, 0, [0] * len(tokens), adapter)
