"""The figures of a comparison, by task and pipeline, and how pipelines differ: what tables, plots and advice are of."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from multimodal.compare.results import SHUFFLED, Results, Row, paired
from multimodal.compare.statistics import (
    Difference,
    Interval,
    calibration_error,
    holm,
    mean_interval,
    paired_difference,
    percentiles,
)

BLIND = "blind"  # the pipeline that sees no picture: the other control


@dataclass(frozen=True)
class Percentiles:
    """Seconds: half of the answers took less than ``p50``, and so on."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """One pipeline on one task.

    Attributes:
        task: Its name.
        pipeline: Its name.
        metric: Which score decides.
        score: Its mean, with an interval clustered by picture; None where nothing was answered.
        by: The same for each kind of question (``answer_type`` and the subsets of the task), by kind.
        scores: The mean of every score, by name.
        shuffled: The deciding score with the pictures of other questions; None where it was not measured.
        blind: The deciding score of the pipeline that sees no picture, on the same task; None where it did not run.
        errors: Questions without an answer; they are in no other figure.
        calibration_error: 0 to 1; None where the pipeline has no confidence.
        first_token: Seconds to the first token.
        latency: Seconds to the last one.
        fresh_latency: Median seconds to the last one of each picture's first question; None without pictures.
        steps: Median seconds of each step of the pipeline, by name.
        throughput: Answers per second at the run's concurrency; None where it was not measured.
        prompt_tokens: Mean number read.
        completion_tokens: Mean number written.
        cost_per_1000: US dollars for a thousand calls; None where no price is known.
        peak_memory: Bytes; None where it was not measured.
        energy_per_1000: Watt-hours for a thousand answers; None where it could not be measured.
    """

    task: str
    pipeline: str
    metric: str
    score: Interval | None
    by: Mapping[str, Interval] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    shuffled: Interval | None = None
    blind: Interval | None = None
    errors: int = 0
    calibration_error: float | None = None
    first_token: Percentiles | None = None
    latency: Percentiles | None = None
    fresh_latency: float | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    throughput: float | None = None
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    cost_per_1000: float | None = None
    peak_memory: int | None = None
    energy_per_1000: float | None = None


@dataclass(frozen=True)
class Pair:
    """How two pipelines differ on one task, or on the questions of one ``kind`` of it."""

    task: str
    first: str
    second: str
    difference: Difference
    kind: str = ""


def figures_of(results: Results, task: str, pipeline: str) -> Figures:
    """The figures of one pipeline on one task."""
    metric = results.metric[task]
    rows = results.select(task=task, pipeline=pipeline)
    answered = [row for row in rows if row.answer is not None]
    found = Figures(
        task, pipeline, metric, score=_interval(answered, metric), errors=len(rows) - len(answered),
        peak_memory=results.peak_memory.get(pipeline), throughput=results.throughput.get((task, pipeline)),
        shuffled=_interval(_answered(results, task, pipeline, SHUFFLED), metric),
        blind=_interval(_answered(results, task, BLIND), metric),
    )  # fmt: skip
    if not answered:
        return found
    answers = [row.answer for row in answered if row.answer is not None]
    sure = [(answer.confidence, row.scores[metric]) for answer, row in zip(answers, answered, strict=True)
            if answer.confidence is not None]  # fmt: skip
    costs = [answer.cost for answer in answers]
    energy = results.energy.get((task, pipeline))
    return replace(
        found,
        by={kind: _mean(some, metric) for kind, some in kinds_of(answered).items()},
        scores={
            name: statistics.fmean(row.scores[name] for row in answered if name in row.scores)
            for name in dict.fromkeys(name for row in answered for name in row.scores)
        },
        calibration_error=calibration_error(*zip(*sure, strict=True)) if sure and metric == "exact" else None,
        first_token=Percentiles(*percentiles([answer.first_token for answer in answers])),
        latency=Percentiles(*percentiles([answer.total for answer in answers])),
        fresh_latency=_fresh(answered),
        steps={
            name: statistics.median(step.seconds for answer in answers for step in answer.steps if step.name == name)
            for name in dict.fromkeys(step.name for answer in answers for step in answer.steps)
        },
        prompt_tokens=statistics.fmean(answer.usage.prompt_tokens for answer in answers),
        completion_tokens=statistics.fmean(answer.usage.completion_tokens for answer in answers),
        cost_per_1000=None if None in costs else 1000 * statistics.fmean(cost for cost in costs if cost is not None),
        energy_per_1000=None if energy is None else 1000 * energy / len(answered),
    )


def summarise(results: Results) -> list[Figures]:
    """The figures of every pipeline on every task, in the run's order."""
    return [
        figures_of(results, task, pipeline)
        for task, pipeline in itertools.product(results.tasks, results.pipelines)
        if results.select(task=task, pipeline=pipeline)
    ]


def pairs_of(results: Results) -> list[Pair]:
    """Every two pipelines on every task, with Holm's correction over all pairs of the task."""
    return [pair for task in results.tasks for pair in _pairs_of(results, task)]


def pairs_by_kind(results: Results) -> list[Pair]:
    """How the first pipeline differs from each other one on each kind of question, with Holm's correction by task.

    Only where a task has several kinds.
    """
    found = []
    for task in results.tasks:
        by_kind: dict[str, dict[str, list[Row]]] = {}
        for pipeline in results.pipelines:
            for kind, rows in kinds_of(results.select(task=task, pipeline=pipeline)).items():
                by_kind.setdefault(kind, {})[pipeline] = rows
        pairs = [
            Pair(task, first, second, difference, kind)
            for kind, rows in by_kind.items()
            for first in results.pipelines[:1]
            for second in results.pipelines[1:]
            if (difference := _difference(rows.get(first, []), rows.get(second, []), results.metric[task])) is not None
        ]
        found += _corrected(pairs) if len(by_kind) > 1 else []
    return found


def _pairs_of(results: Results, task: str) -> list[Pair]:
    rows = {pipeline: results.select(task=task, pipeline=pipeline) for pipeline in results.pipelines}
    return _corrected(
        [
            Pair(task, first, second, difference)
            for first, second in itertools.combinations(results.pipelines, 2)
            if (difference := _difference(rows[first], rows[second], results.metric[task])) is not None
        ]
    )


def _difference(one: Sequence[Row], other: Sequence[Row], metric: str) -> Difference | None:
    both = list(paired(one, other))
    if not both:
        return None
    first, second = ([pair[side].scores[metric] for pair in both] for side in (0, 1))
    return paired_difference(first, second, [row.cluster for row, _ in both])


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    adjusted = holm([pair.difference.p for pair in pairs])
    return [
        replace(pair, difference=replace(pair.difference, adjusted_p=p))
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def kinds_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by kind of question: closed and open, and the subsets that a task names."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for kind in (row.meta.get("answer_type", ""), *row.meta.get("subsets", "").split()):
            if kind:
                found.setdefault(kind.lower(), []).append(row)
    return found


def _answered(results: Results, task: str, pipeline: str, control: str = "") -> list[Row]:
    return [row for row in results.select(task=task, pipeline=pipeline, control=control) if row.answer is not None]


def _interval(rows: Sequence[Row], metric: str) -> Interval | None:
    return _mean(rows, metric) if rows else None


def _mean(rows: Sequence[Row], metric: str) -> Interval:
    return mean_interval([row.scores[metric] for row in rows], [row.cluster for row in rows])


def _fresh(rows: Sequence[Row]) -> float | None:
    first: dict[str, float] = {}
    for row in rows:
        if row.images and row.answer is not None:
            first.setdefault(row.cluster, row.answer.total)
    return statistics.median(first.values()) if first else None
