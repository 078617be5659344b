"""One-click adaptation: from about a hundred examples to an adapter of a few megabytes, in minutes, on a CPU.

LoRA on the cross-attention blocks and the resampler learns the task; encoder and decoder stay frozen, so several views
of each picture go through the encoder once and what stands before a picture through the decoder once (``features.py``,
``prefix.py``). Where there is an answer to be chosen, what is learnt is what a linear probe says about mixtures of two
pictures (``mixing.py``). A fifth of the examples is held out, whole pictures, and answered before and after: the report
says what that shows, and what it does not.

What always holds: how long a run lasts is decided once, from a measured step, and written down, so a run that is
interrupted goes on with the same call and ends with the adapter of an uninterrupted one, unless the clock stops it; and
the model's own weights never change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.adapters import attach, detach, digest_of, save_adapter, train_adapter
from multimodal.data import Sample, normalise_answer
from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.low_rank import WEIGHTS
from multimodal.model import MultiModalModel
from multimodal.training.checkpoints import (
    CheckpointOnInterrupt,
    last_checkpoint,
    load_trained,
    remove_incomplete,
    write_text,
)
from multimodal.training.collator import FusionCollator, Source, TrainingSet
from multimodal.training.evaluation import predict
from multimodal.training.features import CachedPictures, FeatureCache
from multimodal.training.few import Paired, split_by_answer
from multimodal.training.lora import BLOCKS, RESAMPLER, SCALE, linear_layers
from multimodal.training.mixing import MixedSet
from multimodal.training.prefix import PrefixCache, can_keep_prefixes
from multimodal.training.trainer import FusionTrainer

LEAST_EXAMPLES = 10
MOST_HELD_OUT = 200  # more would take time from training, and narrow the interval little
MOST_VIEWS, VIEWS_TIME = 12, 0.25  # of a picture; the share of the time that the encoder may take
BATCH_SIZE, PASSES, LEAST_STEPS, SAVE_STEPS = 16, 140, 100, 50
RANK, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 8, 2e-3, 0.01, 0.1
SPARE_TIME = 0.9  # steps are planned for this share of what is left: a machine does not always go at one pace
TIMED_STEPS = 3
RUN, REPORT = "run.json", "report.json"
WORK, PLAN, CHECKPOINTS = "work", "plan.json", "checkpoints"


@dataclass(frozen=True)
class AdaptSettings:
    """What a run is told; the rest it decides itself.

    Attributes:
        output: Folder for the adapter, which is called like it.
        minutes: How long it may take, all in all.
        augment: Kind of augmentation: "medical" never mirrors a picture, "shop" does, and crops more of it.
        held_out: Share of the examples to measure with, 0 for none.
        seed: Of everything random.
    """

    output: Path
    minutes: float = 10.0
    augment: str = "medical"
    held_out: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run decided.

    Attributes:
        views: Of each picture.
        steps: How many.
        step_seconds: How long one took when it was measured.
        batch_size: Examples in a step.
        rank: Of LoRA.
        learning_rate: Peak, reached after a tenth of the steps, then a cosine to zero.
        weight_decay: Of all that is trained.
        label_smoothing: Of the answers' tokens.
    """

    views: int
    steps: int
    step_seconds: float
    batch_size: int
    rank: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float


@dataclass(frozen=True)
class AdaptReport:
    """What came of it.

    Attributes:
        folder: The adapter's.
        base: The model's name.
        examples: How many were learnt from.
        answers: How many different answers they have.
        score: Exact match of greedy answers on what was held out, before and after.
        plan: What was decided.
        steps: How many were made: fewer than planned if the clock stopped it.
        seconds: How long this call took.
        megabytes: Size of the adapter.
    """

    folder: Path
    base: str
    examples: int
    answers: int
    score: Paired
    plan: Plan
    steps: int
    seconds: float
    megabytes: float

    def __str__(self) -> str:
        """For a person."""
        stopped = "" if self.steps == self.plan.steps else f", stopped by the clock before {self.plan.steps}"
        passes = self.steps * self.plan.batch_size / self.examples
        return "\n".join(
            [
                f"learnt from {self.examples} examples with {self.answers} different answers: {self.steps} steps of "
                f"{self.plan.batch_size} ({passes:.0f} passes{stopped}), {self.plan.views} views of each picture, LoRA "
                f"of rank {self.plan.rank}; {self.seconds / 60:.1f} minutes",
                *self.score.lines(),
                f"adapter: {self.folder} ({self.megabytes:.1f} MB, for the model {self.base!r})",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        score = {**asdict(self.score), "p": self.score.chance, "verdict": self.score.verdict}
        return {**asdict(self), "folder": str(self.folder), "score": score}

    @classmethod
    def read(cls, folder: Path) -> AdaptReport:
        """The report that lies in an adapter's folder."""
        said = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        score = {key: said["score"][key] for key in ("total", "before", "after", "gained", "lost")}
        given = {key: said[key] for key in ("base", "examples", "answers", "steps", "seconds", "megabytes")}
        return cls(folder=folder, score=Paired(**score), plan=Plan(**said["plan"]), **given)


class AdaptTrainer(FusionTrainer):
    """``FusionTrainer`` for LoRA alone: one rate, and no decay of what starts at zero anyhow."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.args.learning_rate, weight_decay=self.args.weight_decay, betas=(0.9, 0.98)
        )
        return self.optimizer


class Clock(TrainerCallback):
    """Ends training when its time is over.

    Args:
        end: In seconds of ``time.monotonic``.
    """

    def __init__(self, end: float) -> None:
        self.end = end

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, if it is late."""
        if time.monotonic() > self.end:
            control.should_training_stop = True


def adapt(model: MultiModalModel, samples: Sequence[Sample], settings: AdaptSettings) -> AdaptReport:
    """Adapt a model to examples, or go on with what ``settings.output`` holds. The adapter is the chosen one then.

    Other threads' answers wait until it has ended.

    Args:
        model: The model; an adapter is loaded into it, its weights stay.
        samples: About a hundred, with their answers; one without an answer or a picture is left out, and that is said.
        settings: The run.

    Returns:
        The report, which also lies in the adapter's folder.

    Raises:
        ValueError: If there are too few examples, too little time, or the folder holds another run.
        DataError: If a picture cannot be used.
        AdapterError: If PEFT is missing, or an adapter of this name is loaded.
        KeyboardInterrupt: If it was stopped; it says at which step.
    """
    began = time.monotonic()
    name = settings.output.resolve().name
    inner = model.switch.new_name(name)
    kept, held_out = _split(samples, settings)
    _note_run(model, [*kept, *held_out], settings)
    if (settings.output / REPORT).exists():
        print(f"{settings.output} holds this adapter already")
        model.set_adapter(model.load_adapter(settings.output))
        return AdaptReport.read(settings.output)

    work = settings.output / WORK
    with model.switch.alone(), _as_before(model):
        before, answering = _before(model, held_out, work)
        end = began + 60 * settings.minutes - answering
        plan = Plan(**json.loads((work / PLAN).read_text())) if (work / PLAN).exists() else None
        dataset = _dataset(model, kept, settings, views=None if plan is None else plan.views)
        attach(model.model, adapted_layers(model.model), name=inner, rank=RANK, scale=SCALE, seed=settings.seed)
        try:
            train_adapter(model.model, inner)
            plan = plan or _plan(model, dataset, settings, end)
            steps = _train(model, dataset, plan, settings, end)
            after = _right(model, held_out)
            save_adapter(model.model, inner, settings.output, base=model.name)
        except BaseException:
            detach(model.model, inner)
            raise
        model.switch.names[name] = inner
    model.set_adapter(name)
    report = AdaptReport(
        folder=settings.output,
        base=model.name,
        examples=len(kept),
        answers=len({normalise_answer(sample.answer) for sample in kept}),
        score=Paired.of(before, after),
        plan=plan,
        steps=steps,
        seconds=time.monotonic() - began,
        megabytes=(settings.output / WEIGHTS).stat().st_size / 1e6,
    )
    write_text(settings.output / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")
    shutil.rmtree(work)
    return report


def adapted_layers(model: FusionForConditionalGeneration) -> list[str]:
    """Full names of the layers that learn: the projections of the cross-attention blocks and of the resampler."""
    return [*linear_layers(model, BLOCKS), *linear_layers(model, RESAMPLER)]


def _split(samples: Sequence[Sample], settings: AdaptSettings) -> tuple[list[Sample], list[Sample]]:
    useful = [sample for sample in samples if sample.answer and sample.images]
    if len(useful) < len(samples):
        print(f"{len(samples) - len(useful)} examples left out: they have no answer or no picture")
    if len(useful) < LEAST_EXAMPLES:
        raise ValueError(f"{len(useful)} examples are too few: give {LEAST_EXAMPLES} or more, better 10 of each answer")
    return split_by_answer(useful, min(settings.held_out, MOST_HELD_OUT / len(useful)), seed=settings.seed)


def _note_run(model: MultiModalModel, samples: Sequence[Sample], settings: AdaptSettings) -> None:
    """Write down what the run is, or compare.

    Raises:
        ValueError: If the folder holds another one.
    """
    asked = repr([(sample.question, sample.answer, len(sample.images)) for sample in samples])
    now = {
        "model": digest_of(model.model),
        "examples": f"{len(samples)}, {hashlib.sha256(asked.encode()).hexdigest()[:16]}",
        **{key: getattr(settings, key) for key in ("augment", "held_out", "seed")},
    }
    file = settings.output / RUN
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = [key.replace("_", " ") for key in now if before.get(key) != now[key]]
        if differing:
            raise ValueError(
                f"{settings.output} holds an adaptation that differs ({', '.join(differing)}): give another folder"
            )
    elif settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"{settings.output} holds something else: give another output folder")
    (settings.output / WORK).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(now, indent=2) + "\n")


@contextmanager
def _as_before(model: MultiModalModel) -> Iterator[None]:
    """Afterwards the model trains nothing that it did not, and answers as a model does that is not trained."""
    fused = model.model
    trained = [parameter for parameter in fused.parameters() if parameter.requires_grad]
    fused.requires_grad_(False)
    try:
        yield
    finally:
        fused.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        fused.config.use_cache = fused.config.text_config.use_cache  # Trainer turns it off
        fused.eval()


def _before(model: MultiModalModel, held_out: Sequence[Sample], work: Path) -> tuple[list[bool], float]:
    """What was right before, and how many seconds it took to answer; a run that goes on knows it already."""
    file = work / "before.json"
    if not file.exists():
        began = time.monotonic()
        right = _right(model, held_out)
        write_text(file, json.dumps([right, time.monotonic() - began]))
    right, seconds = json.loads(file.read_text())
    return right, seconds


def _right(model: MultiModalModel, samples: Sequence[Sample]) -> list[bool]:
    return [prediction.correct for prediction in predict(model, samples)] if samples else []


def _dataset(
    model: MultiModalModel, samples: Sequence[Sample], settings: AdaptSettings, *, views: int | None
) -> TrainingSet:
    """The examples with all that is constant computed: features of as many views as there is time for, and prefixes."""
    fused, processor = model.model, model.processor
    cache = FeatureCache(
        settings.output / WORK, encoder=fused.model.vision_encoder, image_processor=processor.image_processor
    )
    kinds = {path: settings.augment for sample in samples for path in sample.images}
    if views is None:
        began = time.monotonic()
        cache.add(kinds, augmentation=settings.augment, views=1)
        took = max(time.monotonic() - began, 1e-3)
        views = max(2, min(MOST_VIEWS, int(VIEWS_TIME * settings.minutes * 60 / took)))
    pictures = CachedPictures(cache, kinds, views={settings.augment: views})
    frozen = can_keep_prefixes(fused)
    dataset = MixedSet([Source(samples, pictures)], processor, seed=settings.seed, frozen_decoder=frozen)
    if frozen:
        dataset.prefixes = PrefixCache(settings.output / WORK, fused, [row.input_ids for row in dataset.rows])
    return dataset


def _plan(model: MultiModalModel, dataset: TrainingSet, settings: AdaptSettings, end: float) -> Plan:
    """Decide how long to train, from a measured step.

    Raises:
        ValueError: If there is no time for a single pass.
    """
    pictures = dataset.rows[0].pictures
    assert isinstance(pictures, CachedPictures)
    views = pictures.views[settings.augment]
    plan = Plan(
        views=views,
        steps=1,
        step_seconds=0.0,
        batch_size=min(BATCH_SIZE, len(dataset)),
        rank=RANK,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        label_smoothing=LABEL_SMOOTHING,
    )
    trainer = _trainer(model, dataset, plan, settings)
    batches = itertools.cycle(trainer.get_train_dataloader())
    seconds = []
    for batch in itertools.islice(batches, TIMED_STEPS):
        began = time.monotonic()
        trainer.compute_loss(model.model.train(), trainer._prepare_inputs(batch)).backward()
        seconds.append(time.monotonic() - began)
    model.model.zero_grad()
    step = sorted(seconds)[len(seconds) // 2]
    a_pass = math.ceil(len(dataset) / plan.batch_size)
    affordable = int(SPARE_TIME * (end - time.monotonic()) / step)
    if affordable < a_pass:
        raise ValueError(
            f"{settings.minutes:g} minutes are too few: a pass over {len(dataset)} examples takes "
            f"{a_pass * step / 60:.1f}, beside what is to be done before and after. Give more, or fewer examples"
        )
    plan = replace(plan, steps=min(max(LEAST_STEPS, PASSES * a_pass), affordable), step_seconds=round(step, 4))
    write_text(settings.output / WORK / PLAN, json.dumps(asdict(plan)))
    return plan


def _trainer(
    model: MultiModalModel, dataset: TrainingSet, plan: Plan, settings: AdaptSettings, *callbacks: TrainerCallback
) -> AdaptTrainer:
    arguments = TrainingArguments(
        output_dir=str(settings.output / WORK / CHECKPOINTS),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        weight_decay=plan.weight_decay,
        label_smoothing_factor=plan.label_smoothing,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=model.model.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=20,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    collator = FusionCollator(model.processor.tokenizer.pad_token_id)
    return AdaptTrainer(
        model=model.model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks)
    )


def _train(model: MultiModalModel, dataset: TrainingSet, plan: Plan, settings: AdaptSettings, end: float) -> int:
    """Train, or go on; returns how many steps were made in all."""
    stop = CheckpointOnInterrupt()
    trainer = _trainer(model, dataset, plan, settings, stop, Clock(end))
    checkpoints = settings.output / WORK / CHECKPOINTS
    last = last_checkpoint(checkpoints)
    if last is not None and trainer.steps_left(last) <= 0:
        load_trained(model.model, last / SAFE_WEIGHTS_NAME)
        step = plan.steps
    else:
        remove_incomplete(checkpoints)
        with stop:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        step = trainer.state.global_step
        if stop.asked and step < plan.steps:
            raise KeyboardInterrupt(f"stopped after step {step} of {plan.steps}: the same command goes on from there")
    model.model.eval()
    return step
