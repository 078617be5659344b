"""Training a fused model on transformers' ``Trainer``.

A frozen encoder's features and a frozen decoder's prefixes are computed once (see ``features.py`` and ``prefix.py``),
so that a step runs only over what changes; frozen weights keep their dtype, trained ones are
float32 under autocast. What always holds: a run that is stopped, by Ctrl-C or by a crash, goes on from its last
complete checkpoint with the same command, and ends with the weights of an uninterrupted run. For that nothing may hang
on the state of a random number generator: ``Trainer`` restores it only after it has drawn the next batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.adapters import save_adapter
from multimodal.data import DataError, Sample, read, report_bad, splits_of
from multimodal.data.held_out import split_held_out
from multimodal.data.refusals import plain_refusals, refusals
from multimodal.data.sources import WHOLE
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.training.averaging import FILE as AVERAGE
from multimodal.training.checkpoints import (
    LOGGING_STEPS,
    STATE,
    CheckpointOnInterrupt,
    last_checkpoint,
    load_trained,
    remove_incomplete,
    write_text,
)
from multimodal.training.collator import FusionCollator, Source, TrainingSet
from multimodal.training.evaluation import readable
from multimodal.training.features import CachedPictures, FeatureCache
from multimodal.training.lora import DECODER_NAME, add_to_decoder, make_part_of_decoder
from multimodal.training.pictures import LivePictures, Pictures, StreamedPictures
from multimodal.training.prefix import PrefixCache, can_keep_prefixes, can_keep_states
from multimodal.training.processes import device, is_main, rows_of_a_process, say, wait_for_all
from multimodal.training.sharding import shard_decoder
from multimodal.training.stream import TrainingStream
from multimodal.training.text_side import as_text
from multimodal.training.trainer import FusionTrainer
from multimodal.training.validation import (
    BEST,
    Validation,
    choose_questions,
    has_stalled,
    read_validation,
    split_own,
)
from multimodal.training.vision_side import VisionSettings, train_vision

# Kind of augmentation of each publisher's pictures. A user's own may be medical: no mirroring.
SHOPS = ("grocery", "clothing")
VIEWS = {"medical": 4, "shop": 4}

# What a run may change when it goes on: how long it lasts, and what has no part in the result.
CHANGEABLE = (
    *("output", "cache", "epochs", "save_steps", "max_steps", "tensorboard", "skip_bad"),
    *("validate_steps", "patience", "validate_limit", "shard_decoder"),
)


@dataclass(frozen=True)
class TrainingSettings:
    """What a run needs to know.

    Attributes:
        data: Data sets, as ``multimodal.data.read`` takes them, and how often a sample of each comes in an epoch.
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
        vision: Train the vision side first, in this way; then it is frozen. None trains all in one go.
        views: Kept views of each picture, by kind of augmentation.
        held_out: Share of the pictures that is left out, to calibrate confidence on.
        refusals: How many questions that cannot be answered are added, as a share of the number of pictures.
        label_smoothing: Of the answers' tokens.
        box_weight: Of the loss that draws attention to where a sample says one should look.
        skip_bad: Leave out rows that cannot be read, and list them, instead of stopping.
        validate_steps: Steps between two scores of generated answers (see ``validation.py``), 0 for none. The best
            weights are taken at the end, and a tenth of the pictures of a user's own file is not trained on.
        patience: Stop after so many scores without a gain, 0 for never.
        validate_limit: How many questions a score is made of.
        ema: Decay of an exponential moving average of the weights, which is then what is scored and saved; 0 for none.
        lora_rank: Of LoRA on the decoder's layers from the first with a block on; 0 is none. With it, only what is
            below these layers is computed once, and every step runs over whole rows (see ``prefix.py``).
        pipeline: Train nothing but that LoRA, on what ``"text_only"`` or ``"blind"`` would send to the decoder (see
            ``text_side.py``); what is saved is an adapter. Empty trains the fused model.
        streaming: Read data as steps need it (see ``stream.py``), for sets that memory does not hold. It wants
            ``max_steps``, and nothing that looks at a whole data set first.
        shard_decoder: Share a frozen decoder's layers out between the processes (see ``sharding.py``). No prefix is
            kept then, and nothing is scored on the way, since one process does that alone.
    """

    data: Mapping[str, float]
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
    vision: VisionSettings | None = None
    views: Mapping[str, int] = field(default_factory=lambda: dict(VIEWS))
    held_out: float = 0.0
    refusals: float = 0.0
    label_smoothing: float = 0.0
    box_weight: float = 0.0
    skip_bad: bool = False
    validate_steps: int = 0
    patience: int = 0
    validate_limit: int = 200
    ema: float = 0.0
    lora_rank: int = 0
    pipeline: str = ""
    streaming: bool = False
    shard_decoder: bool = False


def kind_of(name: str) -> str:
    """The kind of augmentation that fits a data set's pictures."""
    return "shop" if name.startswith(SHOPS) else "medical"


def pictures_of(
    kinds: Mapping[Path, str],
    model: FusionForConditionalGeneration,
    processor: FusionProcessor,
    settings: TrainingSettings,
) -> Pictures:
    """Pictures in the views that their kind gets: kept features, or pixels for a trained encoder.

    Raises:
        DataError: If a picture cannot be used.
    """
    encoder = model.model.vision_encoder
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        return LivePictures(kinds, image_processor=processor.image_processor)
    below = None if settings.vision is None else stem_cache(model, processor, settings)
    if below is not None:
        for kind in set(kinds.values()):
            paths = [path for path, its in kinds.items() if its == kind]
            below.add(paths, augmentation=kind, views=settings.views[kind])
    cache = FeatureCache(settings.cache, encoder=encoder, image_processor=processor.image_processor, below=below)
    return CachedPictures(cache, kinds, views=settings.views)


def stem_cache(
    model: FusionForConditionalGeneration, processor: FusionProcessor, settings: TrainingSettings
) -> FeatureCache | None:
    """The cache of what is below the stages that the vision side's training opens; None where it opens all."""
    assert settings.vision is not None
    if settings.vision.stages >= len(model.model.vision_encoder.stages()):
        return None
    return FeatureCache(
        settings.cache,
        encoder=model.model.vision_encoder,
        image_processor=processor.image_processor,
        open_stages=settings.vision.stages,
    )


@dataclass(frozen=True)
class _Data:
    """What a run reads: samples by data set, the kind of each picture, and samples to validate on."""

    samples: Mapping[str, Sequence[Sample]]
    kinds: Mapping[Path, str]
    validation: Mapping[str, Sequence[Sample]]


def _read(settings: TrainingSettings, *, decoder_is_trained: bool) -> _Data:
    samples: dict[str, Sequence[Sample]] = {}
    validation: dict[str, Sequence[Sample]] = {}
    kinds: dict[Path, str] = {}
    bad: list[DataError] = []
    skip_bad = bad if settings.skip_bad else None
    for name in settings.data:
        found = read(name, "train", skip_bad=skip_bad)
        found = _usable(name, found, decoder_is_trained)
        if settings.skip_bad:
            found = readable(found, bad)
        if settings.held_out:
            found, _ = split_held_out(found, settings.held_out)
        if settings.validate_steps and WHOLE in splits_of(name):
            found, validation[name] = split_own(found, settings.held_out)
        samples[name] = found
        kinds |= {path: kind_of(name) for sample in found for path in sample.images}
    if settings.validate_steps or settings.vision is not None:
        found_there = read_validation(settings.data, skip_bad=skip_bad)
        validation |= {name: readable(v, bad) if settings.skip_bad else v for name, v in found_there.items()}
    if bad:
        say(report_bad(bad))
    if settings.pipeline:
        for each in (samples, validation):
            each.update({name: as_text(found, settings.pipeline, settings.cache) for name, found in each.items()})
        kinds = {}
    if not any(samples.values()):
        raise ValueError(f"{', '.join(settings.data)}: no sample to train on")
    if settings.refusals:
        known = [sample for found in samples.values() for sample in found]
        plain = plain_refusals(settings.cache / "plain", seed=settings.seed)
        samples["refusals"] = [*refusals(known, seed=settings.seed, share=settings.refusals), *plain]
        kinds |= {path: "shop" for sample in plain for path in sample.images}
    return _Data(samples, kinds, validation)


def _train_vision(
    model: FusionForConditionalGeneration, processor: FusionProcessor, settings: TrainingSettings, data: _Data
) -> None:
    """First phase: the vision side; afterwards only the cross-attention blocks are trained."""
    assert settings.vision is not None
    validation = data.validation if is_main() else {}
    whole = {path: "none" for found in validation.values() for sample in found for path in sample.images}
    stem = stem_cache(model, processor, settings)

    def seen(kinds: Mapping[Path, str], views: Mapping[str, int]) -> Pictures:
        if stem is None:  # nothing can be kept, so every draw is a view of its own
            return LivePictures(kinds, image_processor=processor.image_processor)
        return CachedPictures(stem, kinds, views=views)

    scores = train_vision(
        model,
        [
            sample
            for name, found in data.samples.items()
            for sample in list(found) * max(round(settings.data.get(name, 1.0)), 1)
        ],
        seen(data.kinds, settings.views),
        settings.vision,
        output=settings.output / "vision",
        validation=validation,
        validation_pictures=seen(whole, {"none": 1}),
    )
    for name, (count, share) in scores.items():
        say(f"{name}: the head alone answers {share:.1%} of {count} validation questions with a short answer")
    model.model.cross_attention_blocks.requires_grad_(True)


def train(
    model: FusionForConditionalGeneration,
    processor: FusionProcessor,
    settings: TrainingSettings,
    *,
    frozen_prefix: bool = True,
) -> FusionForConditionalGeneration:
    """Train, or go on with what ``settings.output`` holds, and save model and processor there.

    Args:
        model: In bfloat16 or float32; what is trained is what ``model.trainable_parts()`` says.
        processor: Its processor.
        settings: The run.
        frozen_prefix: Compute the constants of a frozen decoder once, not in every step; losses are the same. False is
            for measuring what it saves.

    Returns:
        The trained model, in evaluation mode. A decoder that was shared out stays so: load what was saved.

    Raises:
        DataError: If a data set or one of its pictures cannot be used.
        ValueError: If nothing is there to be trained, or the folder holds a run with other settings.
        KeyboardInterrupt: If it was stopped; it says at which step.
    """
    dtype, decoder_is_trained = model.lm_head.weight.dtype, model.lm_head.weight.requires_grad
    if settings.pipeline:
        if not settings.lora_rank:
            raise ValueError("pipeline trains nothing but LoRA: give it a lora_rank")
        model.requires_grad_(False)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing is trained: choose parts with model.set_trainable(...)")
    rows_of_a_process(settings.batch_size)  # told before anything is computed
    if settings.streaming:
        _check_streaming(settings)
    if settings.shard_decoder:
        _check_sharding(settings)
        shard_decoder(model)
    model.to(device())  # features and prefixes are computed before Trainer moves it there
    decoder_is_trained = decoder_is_trained or settings.lora_rank > 0
    data = _Data({}, {}, {}) if settings.streaming else _read(settings, decoder_is_trained=decoder_is_trained)
    questions: dict[str, list[Sample]] = {}
    if settings.validate_steps:
        questions = choose_questions(
            data.validation, processor.tokenizer, limit=settings.validate_limit, seed=settings.seed
        )
    if settings.vision is not None:
        _train_vision(model, processor, settings, data)
    if settings.lora_rank:
        layers = add_to_decoder(model, settings.lora_rank, seed=settings.seed)
        say(f"LoRA of rank {settings.lora_rank} on {len(layers)} projections of the decoder")
    checkpoints = settings.output / "checkpoints"
    last = last_checkpoint(checkpoints)
    grid = tuple(model.config.vision_config.grid_size) if settings.box_weight else None
    has_prefixes = can_keep_prefixes(model)
    dataset: TrainingSet | TrainingStream
    if settings.streaming:
        dataset = TrainingStream(
            {
                name: StreamedPictures(kind_of(name), image_processor=processor.image_processor)
                for name in settings.data
            },
            processor,
            batch_size=settings.batch_size,
            seed=settings.seed,
            grid=grid,
            needs_picture=not decoder_is_trained,
            start=0 if last is None else _steps_until(last) * settings.batch_size,
        )
    else:
        pictures = pictures_of(data.kinds, model, processor, settings)
        sources = [Source(found, pictures, settings.data.get(name, 1.0)) for name, found in data.samples.items()]
        dataset = TrainingSet(sources, processor, seed=settings.seed, grid=grid, frozen_decoder=has_prefixes)
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.float()

    _note_run(model, dataset, settings, going_on=last is not None)
    stop = CheckpointOnInterrupt()
    trainer = FusionTrainer(
        model=model,
        args=_arguments(settings, checkpoints, bf16=dtype == torch.bfloat16),
        train_dataset=dataset,
        data_collator=FusionCollator(processor.tokenizer.pad_token_id),
        callbacks=[stop],
        box_weight=settings.box_weight,
        ema=settings.ema,
    )
    if questions:
        trainer.validate(
            Validation(
                trainer,
                processor,
                questions,
                every=settings.validate_steps,
                patience=settings.patience,
                output=settings.output,
                average=trainer.average,
            )
        )
    if last is not None and _is_over(trainer, last, settings):
        say(f"{last} is at the end of this training: nothing is left to do")
    else:
        if (
            isinstance(dataset, TrainingSet)
            and frozen_prefix
            and not settings.shard_decoder
            and can_keep_states(model)
            and not (has_prefixes and any(row.start is None for row in dataset.rows))
        ):
            dataset.prefixes = PrefixCache(settings.cache, model, [row.input_ids for row in dataset.rows])
        if is_main():
            remove_incomplete(checkpoints)
        with stop:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        wait_for_all()
        last = last_checkpoint(checkpoints)
        assert last is not None  # the last step is followed by one
        if not _is_over(trainer, last, settings):
            step, steps = trainer.state.global_step, trainer.state.max_steps
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}: the same command goes on from there")
    load_trained(model, _result_in(last, settings))
    if settings.pipeline:
        if is_main():
            save_adapter(model, DECODER_NAME, settings.output, base=Path(model.name_or_path).name)
        wait_for_all()
        return model.eval()
    if settings.lora_rank:
        make_part_of_decoder(model)
    model.to(dtype).eval()
    model.config.use_cache = model.config.text_config.use_cache  # Trainer turned it off
    if is_main():
        model.save_pretrained(settings.output)
        processor.save_pretrained(settings.output)
    wait_for_all()
    return model


def _check_sharding(settings: TrainingSettings) -> None:
    """Refuse what needs a whole decoder in one process.

    Raises:
        ValueError: It says what.
    """
    whole = {"validate_steps": settings.validate_steps > 0, "lora_rank": settings.lora_rank > 0}
    if asked := [name for name, is_asked in whole.items() if is_asked]:
        raise ValueError(f"{', '.join(asked)}: not with shard_decoder, where no process has the whole decoder")


def _check_streaming(settings: TrainingSettings) -> None:
    """Refuse what looks at a whole data set before it trains.

    Raises:
        ValueError: It says what.
    """
    whole = {
        "vision": settings.vision is not None,
        "held_out": settings.held_out > 0,
        "refusals": settings.refusals > 0,
        "skip_bad": settings.skip_bad,
        "validate_steps": settings.validate_steps > 0,
        "pipeline": bool(settings.pipeline),
        "passes": any(passes != 1 for passes in settings.data.values()),
    }
    if asked := [name for name, is_asked in whole.items() if is_asked]:
        raise ValueError(f"{', '.join(asked)}: not with streaming, which sees a sample only when its turn comes")
    if settings.max_steps <= 0:
        raise ValueError("a stream has no end: give max_steps")


def _steps_until(checkpoint: Path) -> int:
    return TrainerState.load_from_json(str(checkpoint / STATE)).global_step


def _is_over(trainer: FusionTrainer, checkpoint: Path, settings: TrainingSettings) -> bool:
    """Whether training goes no further than this checkpoint."""
    log = TrainerState.load_from_json(str(checkpoint / STATE)).log_history
    stalled = settings.validate_steps > 0 and has_stalled(log, settings.patience)
    return stalled or trainer.steps_left(checkpoint) <= 0


def _result_in(checkpoint: Path, settings: TrainingSettings) -> Path:
    """Which weights of the last checkpoint are those to keep: the best, the averaged or the last."""
    names = [BEST] if settings.validate_steps else []
    names += [AVERAGE] if settings.ema else []
    return next((checkpoint / name for name in names if (checkpoint / name).exists()), checkpoint / SAFE_WEIGHTS_NAME)


def _usable(name: str, samples: list[Sample], decoder_is_trained: bool) -> list[Sample]:
    """Leave out what teaches nothing, and say so."""
    answered = [sample for sample in samples if sample.answer]
    if len(answered) < len(samples):
        ids = ", ".join(sample.id for sample in samples if not sample.answer)
        say(f"{name}: left out, since they have no answer: {ids}")
    if decoder_is_trained:
        return answered
    seeing = [sample for sample in answered if sample.images]
    if len(seeing) < len(answered):
        count = len(answered) - len(seeing)
        say(f"{name}: {count} samples without a picture left out: only a trained decoder learns from text")
    return seeing


def _arguments(settings: TrainingSettings, output: Path, *, bf16: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=rows_of_a_process(settings.batch_size),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        label_smoothing_factor=settings.label_smoothing,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=LOGGING_STEPS,
        save_steps=settings.save_steps,
        save_total_limit=2,
        ignore_data_skip=settings.streaming,  # the stream begins where it has to
        report_to=["tensorboard"] if settings.tensorboard else [],
        remove_unused_columns=False,
    )
    # Several GPUs want a process each (torchrun): one process would cut the batch up in ways that a fused model's
    # inputs do not survive.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _note_run(
    model: FusionForConditionalGeneration,
    dataset: TrainingSet | TrainingStream,
    settings: TrainingSettings,
    *,
    going_on: bool,
) -> None:
    """Write down what the run is, or compare: going on with other settings would mix two runs.

    Raises:
        ValueError: If the folder holds checkpoints of a run that differs.
    """
    file = settings.output / "training.json"
    now: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    number = "streamed" if isinstance(dataset, TrainingStream) else f"{len(dataset)} samples"
    now["samples"] = f"{number}, {dataset.digest}"
    now["trained parameters"] = sum(part.trainable for part in model.trainable_parts())
    if going_on and file.exists():
        before = json.loads(file.read_text())
        # Folders may have moved: the samples say whether it is the same data.
        # A run of an older version did without what it did not know.
        before = {option.name: option.default for option in fields(settings)} | before
        differing = [key for key in now if key not in (*CHANGEABLE, "data") and before.get(key) != now[key]]
        if _passes(before["data"]) != _passes(now["data"]):
            differing.append("data")
        if differing:
            changes = "; ".join(f"{key.replace('_', ' ')} was {before.get(key)}, is {now[key]}" for key in differing)
            raise ValueError(f"{settings.output} holds a run that differs ({changes}): give another output folder")
    if is_main():
        write_text(file, json.dumps(now, indent=2) + "\n")


def _passes(data: Mapping[str, float] | Sequence[str]) -> list[float]:
    """How often the samples of each data set come; a run of an older version has a list of data sets, once each."""
    return list(data.values()) if isinstance(data, Mapping) else [1.0] * len(data)
