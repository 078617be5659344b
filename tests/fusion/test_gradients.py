"""Training reaches the gates although they are shut, and reaches only what was said to be trained."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from multimodal.fusion import DynamicGate, FusionForConditionalGeneration, TanhGate
from tests.fusion.tiny import IMAGE, assert_close, assert_same, batch, mixed_batch, pictures, tiny_model, words

NEEDS_GRADIENT = True


def step(model: FusionForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_a_shut_gate_receives_gradient(gate: str, visibility: str) -> None:
    model = tiny_model(shut=True, gate=gate, visibility=visibility).train()
    step(model, mixed_batch())
    gates = [module for module in model.modules() if isinstance(module, TanhGate)]
    assert gates
    for module in gates:
        assert module.alpha.grad is not None
        assert module.alpha.grad.abs().max() > 1e-6
        assert not module.alpha.any()
        if isinstance(module, DynamicGate):  # moves once alpha has moved
            token_weight = module.token_weight.weight.grad
            assert token_weight is not None
            assert not token_weight.any()


def test_open_gates_pass_gradient_to_everything_before_them(gate: str) -> None:
    model = tiny_model(gate=gate).train()
    step(model, mixed_batch())
    fusion = [*model.model.cross_attention_blocks.named_parameters(), *model.model.resampler.named_parameters()]
    without = [name for name, parameter in fusion if parameter.grad is None or not parameter.grad.any()]
    assert not without


def test_text_alone_gives_the_fusion_no_gradient() -> None:
    model = tiny_model().train()
    assert not step(model, batch([words(6)])).requires_grad
    assert not gradients(model)


def group_of(name: str) -> str:
    if name.startswith("model.vision_encoder."):
        return "vision"
    if name.startswith(("model.resampler.", "model.cross_attention_blocks.")):
        return "fusion"
    return "decoder"


@pytest.mark.parametrize(("stages", "fusion", "decoder"), list(product([0, 1, 2], [False, True], [False, True])))
def test_only_what_is_trained_receives_gradient(stages: int, fusion: bool, decoder: bool) -> None:
    model = tiny_model().train()
    model.set_trainable(vision_stages=stages, fusion=fusion, decoder=decoder)
    step(model, mixed_batch())
    received = gradients(model)
    assert {group_of(name) for name in received} == {
        name for name, wanted in (("vision", stages), ("fusion", fusion), ("decoder", decoder)) if wanted
    }
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in received if group_of(name) == "vision"}
    assert layers == set(range(3 - stages, 3)), "the encoder's last layers"
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_the_table_of_parts_says_what_is_trained() -> None:
    model = tiny_model()
    model.set_trainable(vision_stages=1)
    parts = {part.name: part for part in model.trainable_parts()}
    assert list(parts) == ["vision encoder", "resampler", "cross-attention", "decoder"]
    assert sum(part.parameters for part in parts.values()) == model.num_parameters()
    assert sum(part.trainable for part in parts.values()) == model.num_parameters(only_trainable=True)
    assert 0 < parts["vision encoder"].trainable < parts["vision encoder"].parameters
    assert parts["resampler"].trainable == parts["resampler"].parameters
    assert parts["decoder"].trainable == 0


def test_more_stages_than_there_are() -> None:
    with pytest.raises(ValueError, match="vision_stages=4: this encoder has 3 stages"):
        tiny_model().set_trainable(vision_stages=4)


def test_a_fresh_model_trains_the_fusion_only() -> None:
    assert {group_of(name) for name, p in tiny_model().named_parameters() if p.requires_grad} == {"fusion"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(gate: str, reentrant: bool) -> None:
    model, inputs = tiny_model(gate=gate).train(), mixed_batch()
    model.set_trainable(vision_stages=3, decoder=True)
    expected_loss = step(model, inputs)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(step(model, inputs), expected_loss)
    received = gradients(model)
    assert set(received) == set(expected)
    for name, gradient in expected.items():
        assert_close(received[name], gradient, name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_with_a_frozen_decoder() -> None:
    model, inputs = tiny_model().train(), mixed_batch()
    expected_loss = step(model, inputs)
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    assert_same(step(model, inputs), expected_loss)
    received = gradients(model)
    assert set(received) == set(expected)
    for name, gradient in expected.items():
        assert_close(received[name], gradient, name)


def test_accumulated_steps_are_one_step() -> None:
    """``num_items_in_batch``, as the Trainer gives it, makes the sum of parts the whole."""
    model, inputs = tiny_model().train(), mixed_batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    items = (labels[:, 1:] != -100).sum()
    whole = model(**inputs, labels=labels).loss
    halves = []
    for rows in (slice(0, 2), slice(2, 3)):
        part: dict[str, Any] = {key: value[rows] for key, value in inputs.items()}
        part["pixel_values"] = part["pixel_values"][:, : int((part["input_ids"] == IMAGE).sum(-1).max())]
        halves.append(model(**part, labels=labels[rows], num_items_in_batch=items).loss)
    assert_close(sum(halves), whole)


def test_training_overfits_and_then_needs_the_picture(gate: str) -> None:
    """Four pictures, one question, four answers: only the picture can tell which."""
    model = tiny_model(shut=True, gate=gate).train()
    question = [*words(2), IMAGE, *words(2, seed=1)]
    inputs = batch([[*question, answer] for answer in words(4, seed=2)])
    inputs["pixel_values"] = pictures(4, 1, seed=8)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::10]

    def answers(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(**{**inputs, "pixel_values": pixel_values}).logits[:, -2].argmax(-1)

    pixel_values, expected = inputs["pixel_values"], inputs["input_ids"][:, -1]
    assert_same(answers(pixel_values), expected)
    assert_same(answers(pixel_values.roll(1, dims=0)), expected.roll(1), "the answer goes with its picture")


def test_batch_norm_keeps_its_statistics_in_training() -> None:
    from multimodal.fusion import VisionEncoder

    encoder = VisionEncoder.create(backend="torchvision", name="mobilenet_v3_small", image_size=32)
    model = tiny_model(vision_config=encoder.config).train()
    model.set_trainable(vision_stages=1)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    assert before
    step(model, mixed_batch())
    assert any(group_of(name) == "vision" for name in gradients(model))
    for name, value in model.named_buffers():
        if name in before:
            assert_same(value, before[name], name)
