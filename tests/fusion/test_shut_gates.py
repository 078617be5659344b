"""With shut gates the fused model is the bare decoder, bit for bit."""

from __future__ import annotations

import pytest
import torch

from multimodal.fusion import DynamicGate, TanhGate
from tests.fusion.tiny import (
    assert_differs,
    assert_same,
    bare_decoder,
    batch,
    mixed_batch,
    open_gates,
    text_config,
    text_only,
    tiny_model,
    words,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shut_gates_give_the_bare_decoders_logits(gate: str, visibility: str, tied: bool, dtype: torch.dtype) -> None:
    text = text_config(tie_word_embeddings=tied)
    model = tiny_model(shut=True, text=text, gate=gate, visibility=visibility).to(dtype)
    bare = bare_decoder(model).to(dtype)
    inputs = mixed_batch()
    assert_same(model(**inputs).logits, bare(**text_only(inputs)).logits, "with pictures")
    inputs = batch([words(7), words(4)])
    assert_same(model(**inputs).logits, bare(**inputs).logits, "without pictures")


def test_shut_gates_give_the_bare_decoders_words(gate: str) -> None:
    model = tiny_model(shut=True, gate=gate)
    inputs = mixed_batch()
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": None}
    assert_same(model.generate(**inputs, **options), bare_decoder(model).generate(**text_only(inputs), **options))


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_freshly_built_model_has_shut_gates(gate: str, per_channel: bool) -> None:
    model = tiny_model(shut=True, gate=gate, gate_per_channel=per_channel)
    gates = [module for module in model.modules() if isinstance(module, TanhGate)]
    assert len(gates) == 2 * len(model.config.cross_attention_layers)
    for module in gates:
        assert module.alpha.numel() == (model.config.text_config.hidden_size if per_channel else 1)
        assert not module.alpha.any()
        assert isinstance(module, DynamicGate) == (gate == "dynamic")
        if isinstance(module, DynamicGate):
            assert not module.token_weight.weight.any()
            assert not module.token_weight.bias.any()


def test_open_gates_let_the_picture_in(gate: str) -> None:
    model = tiny_model(shut=True, gate=gate)
    inputs = mixed_batch()
    shut = model(**inputs).logits
    open_gates(model)
    assert_differs(model(**inputs).logits[1:], shut[1:])


def test_a_dynamic_gate_weighs_each_token_by_itself() -> None:
    module = DynamicGate(8)
    open_gates(module)
    branch, states = torch.ones(1, 5, 8), torch.randn(1, 5, 8)
    scaled, openness = module(branch, states)
    weight = torch.sigmoid(states @ module.token_weight.weight[0] + module.token_weight.bias)  # (1, 5)
    assert_same(scaled, weight[..., None] * torch.tanh(module.alpha).expand(1, 5, 8))
    assert_same(openness, torch.tanh(module.alpha).abs().mean() * weight)
    assert openness.std() > 0.01
