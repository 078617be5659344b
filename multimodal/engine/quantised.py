"""Matrices kept in int8 or 4 bits, and read by torch's operators: what there is where no compiled code runs, on a GPU.

A matrix is unpacked whenever it is multiplied. That saves memory, half of a bfloat16 runner's weights in int8, and
costs some time; codes are found as for ``native.cpp`` (steps and minima of int4 with less search), and activations are
not rounded.

Axes: T tokens, N outputs and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

Kind = Literal["int8", "int4"]
GROUP = 32  # inputs that share a step and a minimum in int4
LEVELS = 15  # of a code in int4, beside 0
SMALLEST = 6.2e-5  # the smallest normal number of float16, above 0


@dataclass(frozen=True)
class Int8:
    """A linear map in int8, with a scale for each output.

    Attributes:
        codes: ``(N, I)``.
        scales: ``(N,)``, in float32.
        norm: A norm's weight ``(I,)`` that is multiplied into the states, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    norm: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return _size(self.codes, self.scales, self.norm)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States ``(T, I)`` to ``(T, N)``."""
        return functional.linear(_scaled(states, self.norm), self.codes.to(states.dtype)) * self.scales.to(states.dtype)


@dataclass(frozen=True)
class Int4:
    """A linear map in 4 bits; of each group of 32 inputs a number is its code times a step, plus a minimum.

    Attributes:
        codes: ``(N, I / 2)``, inputs padded to whole groups; two in a byte, the first in the lower half.
        steps: ``(N, I / 32, 1)``, in float16.
        minima: Likewise.
        norm: A norm's weight ``(I,)`` that is multiplied into the states, or None.
        inputs: ``I``, not padded.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    minima: torch.Tensor
    norm: torch.Tensor | None
    inputs: int

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return _size(self.codes, self.steps, self.minima, self.norm)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix ``(N, I)``."""
        codes = torch.stack([self.codes & LEVELS, self.codes >> 4], -1).view(*self.steps.shape[:2], GROUP)
        matrix = torch.addcmul(self.minima.float(), codes.float(), self.steps.float())
        return matrix.flatten(1)[:, : self.inputs].to(dtype)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States ``(T, I)`` to ``(T, N)``."""
        return functional.linear(_scaled(states, self.norm), self.matrix(states.dtype))


def int8_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from -127 to 127 and scales ``(N,)`` of a matrix ``(N, I)``."""
    scales = weight.abs().amax(1).clamp_min(1e-8) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def int4_codes(groups: torch.Tensor, steps: torch.Tensor, minima: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes ``(G, 32)`` in bytes, and steps and minima ``(G,)`` as float16 holds them."""
    steps, minima = steps.clamp_min(SMALLEST).half(), minima.half()
    minima[minima.abs() < SMALLEST] = 0
    codes = (groups - minima.float()[:, None]).div_(steps.float()[:, None]).round_().clamp_(0, LEVELS)
    return codes.to(torch.uint8), steps, minima


def quantise(weight: torch.Tensor, kind: Kind, norm: torch.Tensor | None = None) -> Int8 | Int4:
    """Quantise a matrix.

    Args:
        weight: ``(N, I)``, in float32.
        kind: In what.
        norm: A norm's weight ``(I,)`` that belongs before it, or None. It stays outside: the values of a decoder that
            was in 4 bits once, in groups of 32, are found again almost without a loss.
    """
    if kind == "int8":
        return Int8(*int8_codes(weight), norm)
    outputs, inputs = weight.shape
    groups = functional.pad(weight, (0, -inputs % GROUP)).view(-1, GROUP)
    codes, steps, minima = int4_codes(groups, *_fit(groups))
    first, second = codes.view(outputs, -1, 2).unbind(-1)
    shape = outputs, -1, 1
    return Int4(first | second << 4, steps.view(shape), minima.view(shape), norm, inputs)


def _fit(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and minima ``(G,)``: the line through the codes that the least and the largest number give, least squares.

    ``native.cpp`` tries several; on what came from 4 bits, where codes 0 and 15 occur, the first is the best.
    """
    low, high = groups.aminmax(dim=1, keepdim=True)
    step = (high - low) / LEVELS
    codes = ((groups - low) / step.clamp_min(1e-12)).round_()
    mean, total = codes.mean(1, keepdim=True), groups.mean(1, keepdim=True)
    spread = (codes - mean).square().sum(1, keepdim=True)
    slope = ((codes - mean) * (groups - total)).sum(1, keepdim=True) / spread.clamp_min(1e-12)
    fits = (slope > 0) & (step > 1e-12)
    step, low = torch.where(fits, slope, step), torch.where(fits, total - slope * mean, low)
    return step[:, 0], low[:, 0]


def _scaled(states: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    return states if norm is None else states * norm.to(states.dtype)


def _size(*parts: torch.Tensor | None) -> int:
    return sum(part.nbytes for part in parts if part is not None)
