"""Reports scored: the model is asked to describe pictures of SLAKE, and what it says is compared with what is known.

What is known of a picture are the facts that its own questions and boxes state, in both languages. The floor is the
same with reports exchanged between pictures: what a report gets right that is true of most pictures.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from multimodal.data import DataError, Sample, read
from multimodal.data.compose import CALLED_ANYTHING, REPORT_PROMPTS, Language, check_language, compose_report
from multimodal.data.compose import pictures as group_by_picture
from multimodal.data.facts import Fact, picture_facts
from multimodal.data.report_score import ReportScore, ReportTotals, score_report, total
from multimodal.model import MultiModalModel
from multimodal.training.answering import PictureFeatures
from multimodal.training.evaluation import Prediction, predict

EXCHANGES = 10  # other pictures' reports that each picture is compared with


@dataclass(frozen=True)
class Report:
    """What the model wrote about a picture.

    Attributes:
        prediction: The prompt, and the report; ``sample.answer`` is the one composed of what is known.
        facts: What is known.
        score: What is right of it, and what is missing.
    """

    prediction: Prediction
    facts: Collection[Fact]
    score: ReportScore


def read_pictures(
    name: str, split: str = "validation", *, skip_bad: list[DataError] | None = None
) -> list[list[Sample]]:
    """Read a split of SLAKE as one list of questions, in both languages, for each picture.

    Args:
        name: ``slake:FOLDER``.
        split: As in ``read``.
        skip_bad: As in ``read``.

    Raises:
        ValueError: If it is another data set: only of SLAKE is it known what a picture shows.
        DataError: If the data cannot be read.
    """
    kind, _, folder = name.partition(":")
    if kind not in ("slake", "slake-zh") or not folder:
        raise ValueError(f"{name}: reports are scored on slake:FOLDER only, whose questions say what a picture shows")
    bad: list[DataError] | None = None if skip_bad is None else []
    samples = [sample for kind in ("slake", "slake-zh") for sample in read(f"{kind}:{folder}", split, skip_bad=bad)]
    if skip_bad is not None and bad is not None:
        skip_bad.extend({str(error): error for error in bad}.values())  # both readings go over the same rows
    return list(group_by_picture(samples).values())


def write_reports(
    model: MultiModalModel,
    by_picture: Sequence[Sequence[Sample]],
    language: Language = "en",
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    pictures: PictureFeatures | None = None,
    progress: bool = True,
) -> list[Report]:
    """Ask the model to describe each picture, and score what it says.

    Args:
        model: A trained model.
        by_picture: From :func:`read_pictures`.
        language: Of prompt and report.
        batch_size: Pictures at a time.
        max_new_tokens: At most so many tokens; None takes what the longest composed report needs.
        pictures: Features of pictures, for several calls to share.
        progress: Show a bar.

    Raises:
        ValueError: If no reports are written in this language.
        ImageError: If a picture cannot be used.
    """
    check_language(language)
    prompt = REPORT_PROMPTS[language][0].format(picture=CALLED_ANYTHING[language][0])
    known = [picture_facts(samples) for samples in by_picture]
    asked = [
        replace(
            samples[0],
            question=prompt,
            answer=compose_report(facts, language),
            id=f"report/{language}/{samples[0].id}",
            boxes=(),
        )
        for samples, facts in zip(by_picture, known, strict=True)
    ]
    predictions = predict(
        model, asked, batch_size=batch_size, max_new_tokens=max_new_tokens, pictures=pictures, progress=progress
    )
    return [
        Report(prediction, facts, score_report(prediction.text, facts))
        for prediction, facts in zip(predictions, known, strict=True)
    ]


def floor(reports: Sequence[Report], seed: int = 0) -> ReportTotals:
    """What the same reports score on other pictures than theirs."""
    order = list(range(len(reports)))
    random.Random(seed).shuffle(order)
    scores = [
        score_report(reports[order[place - step]].prediction.text, reports[order[place]].facts)
        for step in range(1, min(EXCHANGES + 1, len(order)))
        for place in range(len(order))
    ]
    return total(scores)


def table_of(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: all facts, those of each kind, and the floor.

    Raises:
        ValueError: If there are no reports.
    """
    if not reports:
        raise ValueError("there are no pictures to report on: the split is empty")
    totals = total([report.score for report in reports])
    said = sum(judged for _, _, judged, _ in totals.by_kind.values())
    due = sum(expected for _, _, _, expected in totals.by_kind.values())
    others = floor(reports)
    rows = [
        ["all", *_figures(totals.precision, totals.recall, said, due)],
        *([kind, *_figures(*figures)] for kind, figures in totals.by_kind.items()),
        ["another picture's report", f"{100 * others.precision:.1f} %", f"{100 * others.recall:.1f} %", "", ""],
    ]
    return ["facts", "precision", "recall", "said and judged", "to be said"], rows


def _figures(precision: float, recall: float, said: int, due: int) -> list[str]:
    return [f"{100 * precision:.1f} %", f"{100 * recall:.1f} %", f"{said}", f"{due}"]
