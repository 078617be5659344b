"""Folding norms into convolutions changes no output and no gradient, keeps depthwise kernels, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multimodal.fusion import VisionEncoder
from multimodal.training.folding import folded


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    """EfficientNet-Lite0 with weights and statistics of no particular kind, in the mode of training."""
    torch.manual_seed(0)
    encoder = VisionEncoder.create(backend="efficientnet_lite", name="efficientnet-lite0", image_size=64)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.7, 1.3),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
    return encoder.train().requires_grad_(True)


def opened(encoder: VisionEncoder, stages: int) -> list[nn.Module]:
    return [module for stage in encoder.stages()[-stages:] for module in stage]


def run(encoder: VisionEncoder, states: torch.Tensor, start: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    encoder.zero_grad()
    outputs = encoder.run_stages(states, start)
    outputs.float().pow(2).mean().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return outputs.detach(), gradients


@pytest.mark.parametrize("stages", [2, 5])
def test_outputs_and_gradients_are_those_of_the_module(encoder: VisionEncoder, stages: int) -> None:
    start = 5 - stages
    with torch.no_grad():
        states = encoder.run_stages(torch.randn(2, 3, 64, 64), 0, start)
    outputs, gradients = run(encoder, states, start)
    with folded(opened(encoder, stages)):
        now, learned = run(encoder, states, start)
    torch.testing.assert_close(now, outputs, rtol=1e-3, atol=1e-5)
    depthwise = {
        f"{name}.{kind}.{parameter}"
        for name, block in encoder.named_modules()
        if hasattr(block, "_depthwise_conv")
        for kind, parameter in (("_depthwise_conv", "weight"), ("_bn1", "weight"), ("_bn1", "bias"))
    }
    assert set(gradients) - set(learned) == depthwise & set(gradients)
    assert len(learned) > len(gradients) / 2
    for name, gradient in learned.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-2, atol=1e-4 * float(gradients[name].abs().max()))


def test_nothing_is_left_behind(encoder: VisionEncoder) -> None:
    modules = opened(encoder, 5)
    before = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    names = list(encoder.state_dict())
    with pytest.raises(RuntimeError, match="stop"), folded(modules):
        assert list(encoder.state_dict()) == names
        assert sum(p.requires_grad for p in encoder.parameters()) < len(before)
        raise RuntimeError("stop")
    assert {name: parameter.requires_grad for name, parameter in encoder.named_parameters()} == before
    assert not any("forward" in vars(module) for module in encoder.modules())
    assert not any(module.inplace for module in encoder.modules() if isinstance(module, nn.ReLU6))


def test_what_was_frozen_stays_frozen(encoder: VisionEncoder) -> None:
    block: Any = encoder.stages()[1][0]
    conv = block._depthwise_conv
    conv.requires_grad_(False)
    with folded(opened(encoder, 5)):
        pass
    assert not conv.weight.requires_grad
    conv.requires_grad_(True)


def test_mixed_precision_is_close(encoder: VisionEncoder) -> None:
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = encoder.run_stages(pictures, 0)
        with folded(opened(encoder, 5)), torch.autocast("cpu", torch.bfloat16):
            now = encoder.run_stages(pictures, 0)
    assert now.dtype == torch.bfloat16
    assert cosine(now.float(), outputs) > 0.995


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))
