"""``Trainer`` for a fused model: the loss of a step, how fast each part learns, what a checkpoint has beside weights.

Losses are means over all answers of a step, on whichever process they are: several processes give the curve of one.

Axes: B batch, T text tokens, L region tokens, R grid cells.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.fusion import FusionTrace
from multimodal.training.averaging import MovingAverage
from multimodal.training.checkpoints import ResumableTrainer, save_trained
from multimodal.training.collator import IGNORED, EpochOrder
from multimodal.training.processes import totals, world_size
from multimodal.training.stream import TrainingStream
from multimodal.training.validation import Validation

# Times the others' learning rate. A gate must travel far before its block counts. As long as it is nearly shut, the
# resampler gets faint gradients, which Adam scales up: at a fifth of the rate its region tokens were seen to become
# nearly the same for every picture within 50 steps.
GATE_LEARNING_RATE = 5
RESAMPLER_LEARNING_RATE = 0.05
SHORT = 128  # tokens of a row: products of matrices are faster up to about 150 (32 rows of 9 heads in bfloat16)


class FusionTrainer(ResumableTrainer):
    """``Trainer`` with logits only where an answer stands, an order by seed and epoch, and learning rates by part.

    Args:
        box_weight: See :class:`TrainingSettings`.
        ema: Likewise.
        **options: Of ``Trainer``.

    Attributes:
        average: The moving average, if there is one.
        validation: What scores it, if set.
    """

    def __init__(self, *, box_weight: float = 0.0, ema: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.box_weight = box_weight
        self.average = MovingAverage(self.model, ema) if ema else None
        self.validation: Validation | None = None
        if self.average is not None:
            self.add_callback(self.average)

    def validate(self, validation: Validation) -> None:
        """Score with this from time to time."""
        self.validation = validation
        self.add_callback(validation)

    def go_on(self, checkpoint: Path | None) -> None:
        """Take over, beside the loss so far, the average and what was best."""
        super().go_on(checkpoint)
        if self.average is not None:
            self.average.begin(checkpoint)
        if self.validation is not None:
            self.validation.begin(checkpoint)

    def save_beside(self, checkpoint: Path, loss_so_far: float) -> None:
        """Write what :meth:`go_on` reads."""
        super().save_beside(checkpoint, loss_so_far)
        if self.average is not None:
            self.average.save(checkpoint)
        if self.validation is not None:
            self.validation.save(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        """Batches in an order that follows from seed and epoch."""
        if isinstance(self.train_dataset, TrainingStream):
            return self.loader_of(None)
        batch_size = self._train_batch_size * world_size()
        return self.loader_of(EpochOrder(self.train_dataset, batch_size, seed=self.args.seed))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of the answers' tokens (the vocabulary is large, and questions need no logits) and box loss."""
        labels = inputs["labels"]
        wanted = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(-1)  # positions that predict an answer's token
        others = {key: value for key, value in inputs.items() if key not in ("labels", "targets")}
        boxed = self.box_weight > 0 and "targets" in inputs
        with attention_kernels(labels):
            outputs = model(**others, use_cache=False, logits_to_keep=wanted, output_trace=boxed)
        targets = labels[:, wanted + 1]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction=reduction,
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
        )
        if num_items_in_batch is not None:
            # The number is that of all processes together, and the gradients of the processes will be averaged.
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        if self.box_weight > 0:
            missed = box_losses(outputs.trace, labels, inputs["targets"]) if boxed else loss.new_zeros(0)
            (count,) = totals([len(missed)], self.args.device)
            loss = loss + self.box_weight * missed.sum() * self.accelerator.num_processes / max(count, 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; weight decay for matrices only, gates learn faster and the resampler slower."""
        rate, decay = self.args.learning_rate, self.args.weight_decay
        groups: dict[str, dict[str, Any]] = {
            "matrices": {"params": [], "lr": rate, "weight_decay": decay},
            "vectors": {"params": [], "lr": rate, "weight_decay": 0.0},
            "gates": {"params": [], "lr": rate * GATE_LEARNING_RATE, "weight_decay": 0.0},
            "resampler": {"params": [], "lr": rate * RESAMPLER_LEARNING_RATE, "weight_decay": 0.0},
        }
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[_kind(name, parameter)]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), eps=1e-8)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not getattr(self.model, "_hf_peft_config_loaded", False):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # transformers would keep the adapter, and not what is trained beside it
            save_trained(self.model, Path(output_dir or self.args.output_dir) / SAFE_WEIGHTS_NAME)


def attention_kernels(tokens: torch.Tensor) -> AbstractContextManager[None]:
    """Which kernels attention may take for ``(B, T)`` tokens: for short rows on a CPU plain products of matrices.

    There PyTorch's flash kernel takes up to three times as long, forward and backward, and a quarter of a step.
    """
    short = tokens.device.type == "cpu" and tokens.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()


def _kind(name: str, parameter: nn.Parameter) -> str:
    """Which group of the optimizer a parameter belongs to."""
    if name.endswith("gate.alpha"):
        return "gates"
    if ".resampler." in name:
        return "resampler"
    return "matrices" if parameter.ndim > 1 else "vectors"


def box_losses(trace: FusionTrace, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How much of the attention misses the boxes: ``-log`` of its share inside, one number for each token.

    Attention is the mean over the blocks, folded back onto the grid, of the tokens that choose the answer's.

    Args:
        trace: Of rows with one picture.
        labels: ``(B, T)``.
        targets: ``(B, R)``, above 0 in the boxes; rows of zeros do not count.

    Returns:
        ``(N,)``, for the tokens of the answers of the rows that count.
    """
    rows = targets.sum(-1) > 0
    regions = trace.attention[rows, :, :-1, 0].mean(1)  # (B, T - 1, L)
    looked = regions @ trace.resampler_maps[rows, 0]  # (B, T - 1, R)
    inside = (looked * (targets[rows, None] > 0)).sum(-1)
    chosen = labels[rows, 1:] != IGNORED
    return -inside[chosen].clamp_min(1e-6).log()
