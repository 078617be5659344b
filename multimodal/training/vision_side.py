"""The vision side learns first: encoder and resampler, from questions, with a light head in the decoder's place.

Through the decoder a question costs tens of milliseconds; through this head (``question_head.py``) it costs a fraction
of one, so pictures are seen many times in minutes, each with several of its questions at once (``picture_set.py``).
Where a sample says where to look (``Sample.boxes``), the head's attention is drawn there. Where all that a picture
shows has a box (``detection.json`` beside it), a linear map from the encoder's features also says for each grid cell
what lies there. Afterwards head and map are thrown away and the vision side is frozen: the cross-attention blocks then
learn to read region tokens that already tell pictures apart. It knows nothing of the decoder. What always holds: a run
that goes on after an interruption, or on several processes, gives the same curve.

Axes: N pictures, Q questions about them, T words of a question, R grid cells, L region tokens, D width, A answers,
B labels of boxes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.data import Sample
from multimodal.fusion import FusionForConditionalGeneration, RegionResampler, VisionEncoder
from multimodal.fusion.vision import as_grid
from multimodal.training.checkpoints import (
    LOGGING_STEPS,
    CheckpointOnInterrupt,
    ResumableTrainer,
    last_checkpoint,
    load_trained,
    remove_incomplete,
    save_trained,
    write_text,
)
from multimodal.training.folding import folded
from multimodal.training.picture_set import UNKNOWN, PictureOrder, PictureSet, collate, known_layouts
from multimodal.training.pictures import Pictures
from multimodal.training.processes import is_main, rows_of_a_process, totals, wait_for_all, world_size
from multimodal.training.question_head import QuestionHead

SAVE_STEPS = 250
QUESTIONS = 8  # of a picture, in one step
BOX_WEIGHT = 0.2  # of the loss that draws the head's attention into the box
LAYOUT_WEIGHT = 0.2  # of the loss of what lies in each grid cell


@dataclass(frozen=True)
class VisionSettings:
    """How the vision side is trained.

    Attributes:
        stages: Last stages of the encoder that learn. Below them, kept views are all that is seen; with all stages open
            each draw of a picture is a new view, which wants a GPU.
        epochs: Passes over the pictures (one with many questions comes several times in each).
        batch_size: Pictures in a step.
        learning_rate: Of resampler and head: a peak, reached after 5 % of the steps, then a cosine to zero.
        encoder_learning_rate: Of the encoder, likewise.
        label_smoothing: Of the answers.
        seed: Of everything random.
    """

    stages: int = 1
    epochs: float = 4
    batch_size: int = 16
    learning_rate: float = 6e-4
    encoder_learning_rate: float = 3e-4
    label_smoothing: float = 0.05
    seed: int = 0


class VisionSide(nn.Module):
    """Open stages of the encoder, resampler, head, and the map of what lies where, as one model.

    Args:
        encoder: The encoder.
        resampler: The resampler.
        head: The head.
        settings: How they are trained.
        num_labels: ``B``, how many things have boxes.
        mixed: Run the encoder's stages in bfloat16, on weights in float32.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        resampler: RegionResampler,
        head: QuestionHead,
        settings: VisionSettings,
        *,
        num_labels: int = 0,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.resampler, self.head, self.settings = encoder, resampler, head, settings
        self.layout = nn.Linear(encoder.config.hidden_size, num_labels) if num_labels else None
        if self.layout is not None:
            nn.init.zeros_(self.layout.weight)
            nn.init.constant_(self.layout.bias, -4.0)  # most cells hold few of the things: start from a share of 2 %
        self.start, self.mixed = len(encoder.stages()) - settings.stages, mixed

    def forward(
        self,
        states: torch.Tensor,
        questions: torch.Tensor,
        of_picture: torch.Tensor,
        answers: torch.Tensor,
        targets: torch.Tensor,
        rows: torch.Tensor | None = None,
        layouts: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses, each summed over its questions or pictures, the weight of the answers, and logits.

        Args:
            states: ``(N, D, rows, columns)``, the input of the first open stage.
            questions: As for the head.
            of_picture: Likewise.
            answers: ``(Q,)``.
            targets: ``(Q, R)``, where to look: sums to 1, or 0 where nobody knows.
            rows: As for the head.
            layouts: ``(N, R, B)``, the share of each cell that a thing's boxes cover; below 0 where nobody knows.
        """
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.mixed):
            features, grid = as_grid(self.encoder.run_stages(states, self.start), self.encoder.config.name)
        features = features.float()
        regions, maps = self.resampler(features, grid, output_attentions=True)  # (N, L, D), (N, L, R)
        logits, attention = self.head(regions, questions, of_picture, rows)
        losses = functional.cross_entropy(
            logits,
            answers,
            ignore_index=UNKNOWN,
            label_smoothing=self.settings.label_smoothing if self.training else 0.0,
            reduction="none",
        )
        # One picture with eight questions must not count as much as eight pictures with one.
        weights = of_picture.bincount()[of_picture].float().rsqrt() * (answers != UNKNOWN)
        boxed = targets.sum(-1) > 0
        looked = (attention[boxed, None] @ maps[of_picture[boxed]]).squeeze(1)  # (Q_boxed, R)
        inside = (looked * (targets[boxed] > 0)).sum(-1)
        missed = features.new_zeros(())
        if self.layout is not None and layouts is not None:
            known = known_layouts(layouts)
            missed = functional.binary_cross_entropy_with_logits(
                self.layout(features[known]), layouts[known], reduction="none"
            )
            missed = missed.mean(1).sum()
        return {
            "answer_loss": (losses * weights).sum(),
            "weight": weights.sum(),
            "box_loss": -inside.clamp_min(1e-6).log().sum(),
            "layout_loss": missed,
            "logits": logits,
        }


class VisionTrainer(ResumableTrainer):
    """``Trainer`` with an order by seed and epoch, and a rate for each of the two parts."""

    def get_train_dataloader(self) -> DataLoader:
        """Batches in an order that follows from seed and epoch."""
        batch_size = self.model.settings.batch_size
        return self.loader_of(PictureOrder(self.train_dataset, batch_size, seed=self.args.seed))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The mean over all questions of a step, on whichever process they are, and over what has boxes."""
        outputs = model(**inputs)
        boxed, known = inputs["targets"].sum(-1) > 0, known_layouts(inputs["layouts"])
        counts = totals([outputs["weight"].item(), boxed.sum().item(), known.sum().item()], self.args.device)
        loss = outputs["answer_loss"] / max(counts[0], 1e-6)
        loss = loss + BOX_WEIGHT * outputs["box_loss"] / max(counts[1], 1)
        loss = loss + LAYOUT_WEIGHT * outputs["layout_loss"] / max(counts[2], 1)
        loss = loss * world_size()  # the gradients of the processes will be averaged
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; the encoder at its own rate."""
        settings = self.model.settings
        encoder = {*self.model.encoder.parameters()}
        others = [p for p in self.model.parameters() if p not in encoder]
        groups = [
            {"params": others, "lr": settings.learning_rate},
            {
                "params": [p for p in self.model.encoder.parameters() if p.requires_grad],
                "lr": settings.encoder_learning_rate,
            },
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.02, fused=True)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_trained(self.model, Path(output_dir or self.args.output_dir) / SAFE_WEIGHTS_NAME)


def train_vision(
    model: FusionForConditionalGeneration,
    samples: Sequence[Sample],
    pictures: Pictures,
    settings: VisionSettings,
    *,
    output: Path,
    validation: Mapping[str, Sequence[Sample]] | None = None,
    validation_pictures: Pictures | None = None,
) -> dict[str, tuple[int, float]]:
    """Train the vision side of a fused model, in place, or take what ``output`` holds of an earlier run.

    Args:
        model: Its encoder and resampler are in float32 afterwards, and frozen.
        samples: Questions, answers, pictures.
        pictures: The pictures as features below the open stages.
        settings: How.
        output: Folder for checkpoints and ``vision.safetensors``, what was trained.
        validation: What the head is measured on at the end, by name.
        validation_pictures: Its pictures.

    Returns:
        For each validation set the number of its questions with a short answer, and the head's accuracy on them: what
        is to be expected of the fused model, not its own figure.

    Raises:
        ValueError: If ``output`` holds a run that differs.
        KeyboardInterrupt: If it was stopped; the same call goes on.
    """
    encoder, resampler = model.model.vision_encoder.float(), model.model.resampler.float()
    model.requires_grad_(False)
    opened = [module for stage in encoder.stages()[-settings.stages :] for module in stage]
    for module in [*opened, resampler]:
        module.requires_grad_(True)
    model.config.trainable_vision_stages = max(model.config.trainable_vision_stages, settings.stages)
    finished = output / "vision.safetensors"
    grid = tuple(encoder.config.grid_size)
    dataset = PictureSet(samples, pictures, grid=grid, questions=QUESTIONS, seed=settings.seed)
    checkpoints = output / "checkpoints"
    last = last_checkpoint(checkpoints)
    _note_run(output / "vision.json", dataset, settings, going_on=finished.exists() or last is not None)
    torch.manual_seed(settings.seed)
    head = QuestionHead(
        num_words=len(dataset.words) + 2,
        hidden_size=model.config.resampler_hidden_size,
        num_answers=len(dataset.answers),
    )
    mixed = model.lm_head.weight.dtype == torch.bfloat16
    side = VisionSide(encoder, resampler, head, settings, num_labels=len(dataset.labels), mixed=mixed)
    stop = CheckpointOnInterrupt()
    trainer = VisionTrainer(
        model=side,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=rows_of_a_process(settings.batch_size),
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            logging_steps=LOGGING_STEPS,
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[stop],
    )
    with folded(opened):
        if finished.exists():
            load_trained(side, finished)
        else:
            if last is not None and trainer.steps_left(last) <= 0:
                load_trained(side, last / SAFE_WEIGHTS_NAME)
            else:
                if is_main():
                    remove_incomplete(checkpoints)
                with stop:
                    trainer.train(resume_from_checkpoint=None if last is None else str(last))
                if stop.asked and trainer.state.global_step < trainer.state.max_steps:
                    step = trainer.state.global_step
                    raise KeyboardInterrupt(
                        f"the vision side stopped after step {step}: the same command goes on from there"
                    )
            if is_main():
                save_trained(side, finished)
            wait_for_all()
        scores: dict[str, tuple[int, float]] = {}
        for name, held_out in (validation or {}).items():
            assert validation_pictures is not None
            questions = PictureSet(held_out, validation_pictures, like=dataset, grid=grid, questions=None, seed=0)
            scores[name] = _accuracy(side, questions)
    model.requires_grad_(False)
    return scores


def _note_run(file: Path, dataset: PictureSet, settings: VisionSettings, *, going_on: bool) -> None:
    """Write down what the run is, or compare: going on with other settings would mix two runs."""
    now = {**asdict(settings), "questions": f"about {len(dataset)} pictures, {dataset.digest}"}
    if going_on and file.exists():
        before = json.loads(file.read_text())
        changes = [
            f"{key.replace('_', ' ')} was {before.get(key)}, is {now[key]}"
            for key in now
            if before.get(key) != now[key]
        ]
        if changes:
            raise ValueError(
                f"{file.parent} holds a run of the vision side that differs ({'; '.join(changes)}): "
                "give another output folder"
            )
    elif is_main():
        write_text(file, json.dumps(now, indent=2) + "\n")


@torch.inference_mode()
def _accuracy(model: VisionSide, dataset: PictureSet) -> tuple[int, float]:
    model.eval()
    right = total = 0
    for start in range(0, len(dataset), 8):
        batch = collate([dataset[0, index, 0] for index in range(start, min(start + 8, len(dataset)))])
        device = next(model.parameters()).device
        said = model(**{key: value.to(device) for key, value in batch.items()})["logits"].argmax(-1).cpu()
        right += int((said == batch["answers"]).sum())
        total += len(said)
    return total, right / max(total, 1)
