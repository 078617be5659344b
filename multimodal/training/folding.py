"""Open stages of a convolutional encoder as they are trained soonest: the same outputs, fewer passes over them.

Batch normalisation keeps its statistics (``VisionEncoder.train``), so it is a scale and a shift, which are taken into
the convolution in front of it. Depthwise kernels and their norms stay as they are: they are 5 % of EfficientNet-Lite2's
weights, and their gradients take a large part of a step on a CPU. What always holds: names and values of parameters
are the module's own, so a checkpoint does not know of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@contextmanager
def folded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run convolutions with the norm that follows them folded in, for as long as this lasts.

    A norm follows a convolution if it is registered right behind it.

    Args:
        modules: Parts of the encoder, in the order in which they are called.
    """
    pairs = [
        (conv, norm)
        for parent in nn.ModuleList(modules).modules()
        for conv, norm in pairwise(parent.children())
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]
    depthwise = [p for conv, norm in pairs if conv.groups > 1 for p in (*conv.parameters(), *norm.parameters())]
    fixed = [parameter for parameter in depthwise if parameter.requires_grad]
    activations = [m for module in modules for m in module.modules() if isinstance(m, nn.ReLU6) and not m.inplace]
    try:
        for conv, norm in pairs:
            conv.__dict__["forward"] = partial(_convolve, conv, norm)
            norm.__dict__["forward"] = _as_it_is
        for activation in activations:
            activation.inplace = True
        for parameter in fixed:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in (module for pair in pairs for module in pair):
            module.__dict__.pop("forward", None)
        for activation in activations:
            activation.inplace = False
        for parameter in fixed:
            parameter.requires_grad_(True)


def _convolve(conv: nn.Conv2d, norm: nn.BatchNorm2d, states: torch.Tensor) -> torch.Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    padding = conv.padding
    if isinstance(margin := getattr(conv, "static_padding", None), nn.ZeroPad2d):  # EfficientNet-Lite's own
        if len({*margin.padding}) == 1:
            padding = margin.padding[:2]
        else:
            states = margin(states)
    how: dict[str, Any] = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}
    if conv.groups > 1 and max(conv.stride) > 1 and states.device.type == "cpu":
        # In bfloat16, oneDNN takes seven times as long for the gradient of these.
        with torch.autocast("cpu", enabled=False):
            return functional.conv2d(states.float(), weight, bias, **how).to(states.dtype)
    return functional.conv2d(states, weight, bias, **how)


def _as_it_is(states: torch.Tensor) -> torch.Tensor:
    return states
