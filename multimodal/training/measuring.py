"""What ``multimodal evaluate`` and ``multimodal calibrate`` do: read, answer, measure, and tell it in lines and tables.

It prints nothing: what it has to say comes piece by piece, as soon as it is known. Data that cannot be read is told
before the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from multimodal.data import DataError, Sample, read, report_bad
from multimodal.data.compose import Language
from multimodal.data.controls import shuffle_images, without_images
from multimodal.data.held_out import split_held_out
from multimodal.data.report_score import ReportScore
from multimodal.model import DEFAULT_MODEL, MultiModalModel, folder_of
from multimodal.training import calibration, form, pointing, reports
from multimodal.training.answering import PictureFeatures
from multimodal.training.evaluation import (
    Prediction,
    predict,
    readable,
    table_of,
)


class Table(NamedTuple):
    """Head and rows, to be printed."""

    head: list[str]
    rows: list[list[str]]


Told = Iterator[str | Table]


@dataclass(frozen=True, kw_only=True)
class AnsweringSettings:
    """What every run over a whole data set needs to know.

    Attributes:
        data: Data sets, as ``multimodal.data.read`` takes them.
        split: Which split of them.
        model: As ``MultiModalModel.from_pretrained`` takes it.
        limit: Only the first so many questions of each.
        batch_size: Questions at a time.
        max_new_tokens: At most so many tokens of an answer; None takes what a data set's longest needs.
        skip_bad: Leave out broken rows and pictures, and list them.
    """

    data: Sequence[str] = ()
    split: str = "validation"
    model: str = DEFAULT_MODEL
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(AnsweringSettings):
    """What ``evaluate`` measures.

    Attributes:
        adapter: Folder of an adapter of the model, to answer with.
        reports: Data sets on whose pictures descriptions are scored.
        language: Of these descriptions.
        pointing: Data sets on which the pointing game is played.
        form: Whether the forty prompts are asked.
        held_out: Only questions about pictures that training leaves out.
        by: Entries of ``meta`` that figures are also given by.
        shuffle_images: Give every question another one's pictures.
        blind: Give no pictures.
        floors: Show figures with pictures shuffled and without any beside those with them.
        output: Write every answer into this file, JSONL.
    """

    adapter: Path | None = None
    reports: Sequence[str] = ()
    language: Language = "en"
    pointing: Sequence[str] = ()
    form: bool = False
    held_out: bool = False
    by: Sequence[str] = field(default_factory=list)
    shuffle_images: bool = False
    blind: bool = False
    floors: bool = False
    output: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(AnsweringSettings):
    """What ``calibrate`` fits on.

    Attributes:
        split: Which split.
        held_out: Only questions about pictures that training leaves out; None: if the split is ``"train"``.
    """

    split: str = "train"
    held_out: bool | None = None


def evaluate(settings: EvaluationSettings) -> Told:
    """Measure, and tell.

    Raises:
        ValueError: If there is nothing to measure.
        DataError: If data cannot be read.
        ModelError: If the model cannot be loaded.
        AdapterError: If the adapter cannot be loaded.
        ImageError: If a picture cannot be used.
    """
    if not (settings.data or settings.reports or settings.pointing or settings.form):
        raise ValueError("nothing to evaluate: give --data, --reports, --pointing or --form")
    bad: list[DataError] | None = [] if settings.skip_bad else None
    splits = [(name, _read(name, settings, bad, held_out=settings.held_out)) for name in settings.data]
    described = [(name, reports.read_pictures(name, settings.split, skip_bad=bad)) for name in settings.reports]
    boxed = [(name, _read(name, settings, bad, held_out=settings.held_out)) for name in settings.pointing]
    if bad:
        yield report_bad(bad)
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text("")
    model = MultiModalModel.from_pretrained(settings.model, adapter=settings.adapter)
    features = PictureFeatures(model)
    for name, samples in splits:
        yield from _accuracy(name, samples, model, features, settings)
    for name, by_picture in described:
        yield from _reports(name, by_picture, model, features, settings)
    for name, samples in boxed:
        yield from _pointing(name, samples, model, features, settings)
    if settings.form:
        limit = settings.max_new_tokens or form.MAX_NEW_TOKENS
        answers = form.check_prompts(model, batch_size=settings.batch_size, max_new_tokens=limit)
        yield Table(*form.table_of(answers))
        yield f"{sum(bool(answer.problems) for answer in answers)} of {len(answers)} answers are badly formed"


def calibrate(settings: CalibrationSettings) -> Told:
    """Fit the model's confidence, write the numbers into its folder, and tell.

    Raises:
        ValueError: If there are no questions.
        DataError: If data cannot be read.
        ModelError: If the model cannot be loaded, or is no folder.
        ImageError: If a picture cannot be used.
    """
    held_out = settings.split == "train" if settings.held_out is None else settings.held_out
    bad: list[DataError] | None = [] if settings.skip_bad else None
    splits = [_read(name, settings, bad, held_out=held_out)[: settings.limit] for name in settings.data]
    if bad:
        yield report_bad(bad)
    if not any(splits):
        of = "no question is about a held-out picture (--no-held-out takes all)" if held_out else "the split is empty"
        raise ValueError(f"there is nothing to calibrate with: {of}")
    model = MultiModalModel.from_pretrained(settings.model)
    features = PictureFeatures(model)
    predictions = [one for samples in splits for one in predict(model, samples, **_how(settings, features))]
    logprobs, correct = [one.logprob for one in predictions], [one.correct for one in predictions]
    config = model.model.config
    before = calibration.Calibration(config.confidence_scale, config.confidence_bias)
    after = calibration.fit(logprobs, correct)
    yield f"{len(correct)} questions, {100 * sum(correct) / len(correct):.1f} % of the answers right"
    rows = []
    for name, numbers in (("before", before), ("after", after)):
        confidences = numbers.confidences(logprobs)
        error = calibration.expected_calibration_error(confidences, correct)
        mean = sum(confidences) / len(confidences)
        figures = [f"{numbers.scale:.3f}", f"{numbers.bias:.3f}", f"{100 * mean:.1f} %", f"{100 * error:.1f} %"]
        rows.append([name, *figures])
    yield Table(["calibration", "scale", "bias", "mean confidence", "expected calibration error"], rows)
    yield f"written into {calibration.write(folder_of(settings.model), after)}"


def _read(name: str, settings: AnsweringSettings, bad: list[DataError] | None, *, held_out: bool) -> list[Sample]:
    samples = read(name, settings.split, skip_bad=bad)
    if bad is not None:
        samples = readable(samples, bad)
    return split_held_out(samples)[1] if held_out else samples


def _how(settings: AnsweringSettings, features: PictureFeatures) -> dict[str, Any]:
    return {
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "pictures": features,
    }


def _accuracy(
    name: str,
    samples: Sequence[Sample],
    model: MultiModalModel,
    features: PictureFeatures,
    settings: EvaluationSettings,
) -> Told:
    limit = settings.limit
    asked, said = samples[:limit], ""
    if settings.shuffle_images:
        asked, said = shuffle_images(samples)[:limit], ", pictures shuffled"
    elif settings.blind:
        asked, said = without_images(samples)[:limit], ", no pictures"
    keys = {key for sample in asked for key in sample.meta}
    if unknown := [key for key in settings.by if key not in keys]:
        raise ValueError(f"{name} says nothing of {', '.join(unknown)}, but of {', '.join(sorted(keys)) or 'nothing'}")
    how = _how(settings, features)
    predictions = predict(model, asked, **how)
    beside = {}
    if settings.floors:
        beside["shuffled"] = predict(model, shuffle_images(samples)[:limit], **how)
        beside["blind"] = predict(model, without_images(samples)[:limit], **how)
    tables = [Table(*table_of(predictions, key, beside=beside)) for key in _keys("answer_type", settings)]
    yield f"{name}, {settings.split}{said}"
    yield from tables
    yield calibration.summary([one.confidence for one in predictions], [one.correct for one in predictions])
    _write(settings.output, [_as_dict(prediction) for prediction in predictions])


def _reports(
    name: str,
    by_picture: Sequence[Sequence[Sample]],
    model: MultiModalModel,
    features: PictureFeatures,
    settings: EvaluationSettings,
) -> Told:
    how = _how(settings, features)
    found = reports.write_reports(model, by_picture[: settings.limit], settings.language, **how)
    table = Table(*reports.table_of(found))
    yield f"{name}, {settings.split}: {len(found)} descriptions, {settings.language}"
    yield table
    _write(settings.output, [_as_dict(report.prediction) | _facts(report.score) for report in found])


def _pointing(
    name: str,
    samples: Sequence[Sample],
    model: MultiModalModel,
    features: PictureFeatures,
    settings: EvaluationSettings,
) -> Told:
    boxed = [sample for sample in samples if sample.boxes][: settings.limit]
    looks = pointing.look(model, boxed, **_how(settings, features))
    tables = [Table(*pointing.table_of(looks, key)) for key in _keys("content_type", settings)]
    yield f"{name}, {settings.split}: pointing game"
    yield from tables
    _write(settings.output, [_as_dict(one.prediction) | {"peak": one.peak} for one in looks])


def _facts(score: ReportScore) -> dict[str, list[str]]:
    kinds = {"right": score.right, "wrong": score.wrong, "found": score.found, "missed": score.missed}
    return {
        kind: sorted(f"{fact.kind} {fact.subject}: {fact.value}" for fact in facts) for kind, facts in kinds.items()
    }


def _keys(first: str, settings: EvaluationSettings) -> list[str]:
    return list(dict.fromkeys([first, *settings.by]))


def _write(file: Path | None, lines: Sequence[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    sample = prediction.sample
    return {
        "id": sample.id,
        "question": sample.question,
        "images": [str(path) for path in sample.images],
        "answer": sample.answer,
        "said": prediction.text,
        "correct": prediction.correct,
        "confidence": round(prediction.confidence, 4),
    }
