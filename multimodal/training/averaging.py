"""An exponential moving average of what is trained: steadier than the last step's weights, for the price of a copy.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992. The first steps, which know
little, are forgotten faster: the decay of step n is at most (1 + n) / (10 + n), as TensorFlow's
``ExponentialMovingAverage`` has it. What always holds: the average follows from the weights alone, and a checkpoint has
it, so a run that goes on has the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from multimodal.training.checkpoints import save_tensors, trained_tensors

FILE = "ema.safetensors"


class MovingAverage(TrainerCallback):
    """The average of what is trained of a model, renewed after every step.

    Args:
        model: The model; not a wrapper around it.
        decay: How much of the average stays in a step, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self, checkpoint: Path | None) -> None:
        """Begin with the weights as they are, or with what a checkpoint has.

        Raises:
            OSError: If the checkpoint has no average.
        """
        stored = None if checkpoint is None else load_file(checkpoint / FILE)
        self.tensors = {
            name: (tensor.clone() if stored is None else stored[name].to(tensor.device))
            for name, tensor in trained_tensors(self.model).items()
        }

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Renew it; ``state`` has the number of steps before this one."""
        steps = state.global_step + 1
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for name, tensor in trained_tensors(self.model).items():
            self.tensors[name].lerp_(tensor, 1 - decay)

    def save(self, checkpoint: Path) -> None:
        """Put it into a checkpoint's folder."""
        save_tensors(self.tensors, checkpoint / FILE)


@contextmanager
def filled_in(model: nn.Module, tensors: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Use other weights for what is trained, and then put its own back. None changes nothing."""
    if tensors is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    _fill(model, tensors)
    try:
        yield
    finally:
        _fill(model, own)


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in trained_tensors(model).items():
        tensor.copy_(tensors[name])
