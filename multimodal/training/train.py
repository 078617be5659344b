"""Training a fused model on transformers' ``Trainer``.

A frozen encoder's features are computed once (see ``features.py``); frozen weights keep their dtype, trained ones are
float32 under autocast. What always holds: a run that is stopped, by Ctrl-C or by a crash, goes on from its last
complete checkpoint with the same command, and ends with the weights of an uninterrupted run. For that nothing may hang
on the state of a random number generator: ``Trainer`` restores it only after it has drawn the next batch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from multimodal.data import Sample, read
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.fusion.bases import read_tensors
from multimodal.training.collator import IGNORED, EpochOrder, FusionCollator, Source, TrainingSet
from multimodal.training.features import FeatureCache
from multimodal.training.pictures import LivePictures, Pictures

# Kind of augmentation and number of views for each data set. A user's own pictures may be medical: no mirroring.
VIEWS = {"slake": ("medical", 10), "grocery": ("shop", 4), "grocery-descriptions": ("shop", 16)}
OWN_DATA = ("medical", 4)

# Times the others' learning rate. A gate must travel far before its block counts. As long as it is nearly shut, the
# resampler gets faint gradients, which Adam scales up: at a fifth of the rate its region tokens were seen to become
# nearly the same for every picture within 50 steps.
GATE_LEARNING_RATE = 5
RESAMPLER_LEARNING_RATE = 0.05

# What a run may change when it goes on: how long it lasts, and what has no part in the result.
CHANGEABLE = ("output", "cache", "epochs", "save_steps", "max_steps", "tensorboard")


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
        seed: Of the order of the samples and the views of their pictures.
        save_steps: Steps between checkpoints.
        max_steps: Stop earlier, -1 for never.
        tensorboard: Also write the curves for TensorBoard.
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
    tensorboard: bool = False


class FusionTrainer(Trainer):
    """``Trainer`` with logits only where an answer stands, an order by seed and epoch, and learning rates by part."""

    def get_train_dataloader(self) -> DataLoader:
        """Batches in an order that follows from seed and epoch."""
        order = EpochOrder(self.train_dataset, self._train_batch_size, seed=self.args.seed)
        loader = DataLoader(
            self.train_dataset, batch_size=self._train_batch_size, sampler=order, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)

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
            # The number is that of all processes together, and the gradients of the processes will be averaged.
            loss = loss * self.accelerator.num_processes / num_items_in_batch
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint))


class CheckpointOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends training behind the current step, with a checkpoint; a second one ends it at once.

    Use as a context manager around ``Trainer.train``, in the main thread (elsewhere Python allows no handler).
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> CheckpointOnInterrupt:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.__exit__(None, None, None)
        os.write(2, b"\nstopping: a checkpoint comes first (once more, and it ends without one)\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save and stop, if asked to."""
        if self.asked:
            control.should_save = control.should_training_stop = True


def _kind(name: str, parameter: nn.Parameter) -> str:
    """Which group of the optimizer a parameter belongs to."""
    if name.endswith("gate.alpha"):
        return "gates"
    if ".resampler." in name:
        return "resampler"
    return "matrices" if parameter.ndim > 1 else "vectors"


def pictures_of(
    name: str, samples: Sequence[Sample], model: FusionForConditionalGeneration, processor: FusionProcessor, cache: Path
) -> Pictures:
    """A data set's pictures, in the views that their kind gets: kept features, or pixels for a trained encoder.

    Raises:
        DataError: If a picture cannot be used.
    """
    augmentation, views = VIEWS.get(name.partition(":")[0], OWN_DATA)
    paths = [path for sample in samples for path in sample.images]
    encoder = model.model.vision_encoder
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        return LivePictures(paths, image_processor=processor.image_processor, augmentation=augmentation)
    return FeatureCache(
        cache,
        paths,
        encoder=encoder,
        image_processor=processor.image_processor,
        augmentation=augmentation,
        views=views,
    )


def train(
    model: FusionForConditionalGeneration, processor: FusionProcessor, settings: TrainingSettings
) -> FusionForConditionalGeneration:
    """Train, or go on with what ``settings.output`` holds, and save model and processor there.

    Args:
        model: In bfloat16 or float32; what is trained is what ``model.trainable_parts()`` says.
        processor: Its processor.
        settings: The run.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        DataError: If a data set or one of its pictures cannot be used.
        ValueError: If nothing is there to be trained, or the folder holds a run with other settings.
        KeyboardInterrupt: If it was stopped; it says at which step.
    """
    dtype, decoder_is_trained = model.dtype, model.lm_head.weight.requires_grad
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing is trained: choose parts with model.set_trainable(...)")
    read_samples = [(name, _usable(name, read(name, "train"), decoder_is_trained)) for name in settings.data]
    if not any(samples for _, samples in read_samples):
        raise ValueError(f"{', '.join(settings.data)}: no sample to train on")
    sources = [
        Source(samples, pictures_of(name, samples, model, processor, settings.cache)) for name, samples in read_samples
    ]
    dataset = TrainingSet(sources, processor, seed=settings.seed)
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.float()

    checkpoints = settings.output / "checkpoints"
    last = last_checkpoint(checkpoints)
    _note_run(model, dataset, settings, going_on=last is not None)
    stop = CheckpointOnInterrupt()
    trainer = FusionTrainer(
        model=model,
        args=_arguments(settings, checkpoints, bf16=dtype == torch.bfloat16),
        train_dataset=dataset,
        data_collator=FusionCollator(processor.tokenizer.pad_token_id),
        callbacks=[stop],
    )
    if last is not None and _steps_left(trainer, last) <= 0:
        print(f"{last} is at the end of this training: nothing is left to do")
        load_trained(model, last)
    else:
        with stop:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.state.global_step < trainer.state.max_steps:
            step, steps = trainer.state.global_step, trainer.state.max_steps
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}: the same command goes on from there")
    model.to(dtype).eval()
    model.config.use_cache = model.config.text_config.use_cache  # Trainer turned it off
    model.save_pretrained(settings.output)
    processor.save_pretrained(settings.output)
    return model


def load_trained(model: FusionForConditionalGeneration, checkpoint: Path) -> None:
    """Fill in what is trained from a checkpoint.

    ``Trainer`` would load it too, but take the frozen parts, which a checkpoint leaves out, for lost ones and warn of
    them, and do no more than warn where a trained part is missing.

    Raises:
        KeyError: If a trained part is not in it.
    """
    stored = read_tensors(str(checkpoint))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. ``Trainer`` writes its state last: one that was cut short has none."""

    def complete(checkpoint: Path) -> bool:
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        except (OSError, ValueError):
            return False
        return True

    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if complete(path)), None)


def _usable(name: str, samples: list[Sample], decoder_is_trained: bool) -> list[Sample]:
    """Leave out what teaches nothing, and say so."""
    answered = [sample for sample in samples if sample.answer]
    if len(answered) < len(samples):
        ids = ", ".join(sample.id for sample in samples if not sample.answer)
        print(f"{name}: left out, since they have no answer: {ids}")
    if decoder_is_trained:
        return answered
    seeing = [sample for sample in answered if sample.images]
    if len(seeing) < len(answered):
        count = len(answered) - len(seeing)
        print(f"{name}: {count} samples without a picture left out: only a trained decoder learns from text")
    return seeing


def _arguments(settings: TrainingSettings, output: Path, *, bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=20,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=["tensorboard"] if settings.tensorboard else [],
        remove_unused_columns=False,
    )


def _note_run(
    model: FusionForConditionalGeneration, dataset: TrainingSet, settings: TrainingSettings, *, going_on: bool
) -> None:
    """Write down what the run is, or compare: going on with other settings would mix two runs.

    Raises:
        ValueError: If the folder holds checkpoints of a run that differs.
    """
    file = settings.output / "training.json"
    now: dict[str, Any] = json.loads(json.dumps(asdict(settings) | {"data": list(settings.data)}, default=str))
    now["samples"] = f"{len(dataset)} samples, {dataset.digest}"
    now["trained parameters"] = sum(part.trainable for part in model.trainable_parts())
    if going_on and file.exists():
        before = json.loads(file.read_text())
        # Folders may have moved: the samples say whether it is the same data.
        differing = [key for key in now if key not in (*CHANGEABLE, "data") and before.get(key) != now[key]]
        if differing:
            changes = "; ".join(f"{key.replace('_', ' ')} was {before.get(key)}, is {now[key]}" for key in differing)
            raise ValueError(f"{settings.output} holds a run that differs ({changes}): give another output folder")
    settings.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n")


def _steps_left(trainer: FusionTrainer, checkpoint: Path) -> int:
    """How many steps are left behind a checkpoint: where none is, ``Trainer`` would make one too many."""
    arguments = trainer.args
    total = arguments.max_steps
    if total <= 0:
        total = math.ceil(arguments.num_train_epochs * len(trainer.get_train_dataloader()))
    return total - TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
