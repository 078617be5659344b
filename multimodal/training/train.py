"""Training a fused model on transformers' ``Trainer``.

The frozen encoder's features are computed once (see ``features.py``); frozen weights stay in bfloat16, trained ones are
float32 under autocast. A run that is stopped goes on from its last checkpoint with the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from multimodal.data import Sample, read
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.training.collator import IGNORED, FusionCollator, Source, TrainingSet
from multimodal.training.features import FeatureCache

# Kind of augmentation and number of views for each data set. A user's own pictures may be medical: no mirroring.
VIEWS = {"slake": ("medical", 10), "grocery": ("shop", 4), "grocery-descriptions": ("shop", 16)}
OWN_DATA = ("medical", 4)

GATE_LEARNING_RATE = 5  # times the others': a gate must travel from 0 to about 1 before its block counts


@dataclass(frozen=True)
class TrainingSettings:
    """What a run needs to know.

    Attributes:
        data: Data sets, as ``multimodal.data.read`` takes them.
        output: Folder for checkpoints and the result.
        cache: Folder for features.
        epochs: Passes over the data.
        batch_size: Questions in a step.
        learning_rate: Peak, reached after ``warmup`` steps, then a cosine to zero.
        warmup: Steps, or a share of all steps if below 1.
        weight_decay: For matrices only.
        seed: Of everything random.
        save_steps: Steps between checkpoints.
        max_steps: Stop earlier, -1 for never.
    """

    data: Sequence[str]
    output: Path
    cache: Path
    epochs: float = 6
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.05
    seed: int = 0
    save_steps: int = 200
    max_steps: int = -1


class FusionTrainer(Trainer):
    """``Trainer`` with a loss that computes logits only where an answer stands, and a faster step for gates."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of the answers' tokens: the vocabulary is large, and questions need no logits."""
        labels = inputs["labels"]
        wanted = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(-1)  # positions that predict an answer's token
        others = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**others, use_cache=False, logits_to_keep=wanted)
        targets = labels[:, wanted + 1]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
        )
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; weight decay for matrices only, and gates learn faster."""
        rate, decay = self.args.learning_rate, self.args.weight_decay
        groups: dict[str, dict[str, Any]] = {
            "matrices": {"params": [], "lr": rate, "weight_decay": decay},
            "vectors": {"params": [], "lr": rate, "weight_decay": 0.0},
            "gates": {"params": [], "lr": rate * GATE_LEARNING_RATE, "weight_decay": 0.0},
        }
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                kind = "gates" if name.endswith("gate.alpha") else "matrices" if parameter.ndim > 1 else "vectors"
                groups[kind]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), eps=1e-8)
        return self.optimizer


def cached_features(
    name: str, samples: Sequence[Sample], model: FusionForConditionalGeneration, processor: FusionProcessor, cache: Path
) -> FeatureCache:
    """Features of a data set's pictures in all the views that its kind of picture gets."""
    augmentation, views = VIEWS.get(name.partition(":")[0], OWN_DATA)
    return FeatureCache(
        cache,
        (path for sample in samples for path in sample.images),
        encoder=model.model.vision_encoder,
        image_processor=processor.image_processor,
        augmentation=augmentation,
        views=views,
    )


def train(
    model: FusionForConditionalGeneration, processor: FusionProcessor, settings: TrainingSettings
) -> FusionForConditionalGeneration:
    """Train, and save model and processor in ``settings.output``.

    Args:
        model: In bfloat16 or float32; what is trained is what ``model.trainable_parts()`` says.
        processor: Its processor.
        settings: The run.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        DataError: If a data set cannot be read.
    """
    sources = []
    for name in settings.data:
        samples = read(name, "train")
        if unanswered := [sample.id for sample in samples if not sample.answer]:
            print(f"{name}: left out, since they have no answer: {', '.join(unanswered)}")
        samples = [sample for sample in samples if sample.answer]
        sources.append(Source(samples, cached_features(name, samples, model, processor, settings.cache)))
    dataset = TrainingSet(sources, processor)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    arguments = TrainingArguments(
        output_dir=str(settings.output / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=20,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        dataloader_num_workers=0,
    )
    trainer = FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=FusionCollator(processor.tokenizer.pad_token_id),
    )
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.to(torch.bfloat16).eval()
    model.save_pretrained(settings.output)
    processor.save_pretrained(settings.output)
    return model
