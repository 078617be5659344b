"""What the plots of a report show. How lines and text are drawn is ``svg.py``'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from multimodal.compare.report import svg, words
from multimodal.compare.results import Results
from multimodal.compare.statistics import percentiles, reliability
from multimodal.compare.summary import Figures

_BAND = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_GRADED = "Answers are not simply right or wrong here."


@dataclass(frozen=True)
class Plot:
    """A plot, or why there is none.

    Attributes:
        title: What it shows.
        drawing: The SVG; empty if there is nothing to draw.
        note: What to know when reading it, or why there is nothing.
    """

    title: str
    drawing: Markup
    note: str = ""


def plots(results: Results, task: str, figures: Sequence[Figures]) -> list[Plot]:
    """All plots of a task."""
    return [
        _against(results, figures, "Score against time", "median time to answer, seconds", _seconds, _latency),
        _against(results, figures, "Score against cost", "US dollars per 1,000 answers", _dollars, _cost),
        _latencies(results, task, figures),
        _reliabilities(results, task, figures),
    ]


def _against(
    results: Results, figures: Sequence[Figures], title: str, label: str, say: Callable[[float], str],
    value_of: Callable[[Figures], float | None],
) -> Plot:  # fmt: skip
    known = [(each, value) for each in figures if each.score and _is_finite(value := value_of(each))]
    names = [each.pipeline for each in figures if each.score and not _is_finite(value_of(each))]
    missing = f"Not known, so not shown: {words.listed(names)}." if names else ""
    if not known:
        return Plot(title, Markup(""), missing or "No pipeline answered.")
    metric = figures[0].metric
    up = svg.axis(
        _label(metric), [end for each, _ in known if each.score for end in (each.score.low, each.score.high)],
        lambda value: f"{100 * value:.0f}" if words.is_share(metric) else f"{value:.2f}", most=1.0,
    )  # fmt: skip
    values = [value for _, value in known if value is not None]
    across = svg.axis(label, values, say, zero=True, log=True)
    parts, said = [svg.grid(across, up)], []
    places = _apart([svg.x(across.place(value)) for value in values])
    for (each, value), at in zip(known, places, strict=True):
        if each.score is None:
            continue
        number = results.pipelines.index(each.pipeline)
        low, middle, high = (svg.y(up.place(end)) for end in (each.score.low, each.score.value, each.score.high))
        sentence = f"{each.pipeline}: {words.interval(each.score, metric)} at {say(value or 0)}"
        parts += [svg.line(number, [(at, low), (at, high)]), svg.marker(number, (at, middle), sentence)]
        said.append(sentence)
    moved = any(abs(svg.x(across.place(value)) - at) > 1 for value, at in zip(values, places, strict=True))
    note = "Bars are 95 % intervals." + (" Marks that would cover each other stand side by side." if moved else "")
    return Plot(title, svg.drawing(parts, f"{title}. {'; '.join(said)}."), " ".join((note, missing)).strip())


def _latencies(results: Results, task: str, figures: Sequence[Figures]) -> Plot:
    """Where the middle half, and nine of ten, of a pipeline's answers lie."""
    title = "How long answers take"
    found = []
    for each in figures:
        rows = results.select(task=task, pipeline=each.pipeline)
        taken = [row.answer.total for row in rows if row.answer is not None and math.isfinite(row.answer.total)]
        if taken:
            found.append((each.pipeline, percentiles(taken, _BAND)))
    if not found:
        return Plot(title, Markup(""), "No pipeline answered.")
    height = svg.TOP + svg.BOTTOM + 40 * len(found)
    across = svg.axis(
        "time to answer, seconds", [end for _, band in found for end in band], _seconds, zero=True, log=True
    )
    parts, said = [svg.grid(across, None, height)], []
    for place, (pipeline, band) in enumerate(found):
        number = results.pipelines.index(pipeline)
        p5, p25, p50, p75, p95, p99 = (svg.x(across.place(value)) for value in band)
        row, wide = svg.TOP + 40 * place + 26, max(p75 - p25, 1)
        colour = f"p{number % svg.COLOURS}"
        parts += [
            svg.text(words.short(pipeline, 44), (svg.LEFT, row - 11), anchor="start", kind="label"),
            svg.line(number, [(p5, row), (p95, row)]),
            Markup(f'<rect class="box {colour}" x="{p25:.1f}" y="{row - 6}" width="{wide:.1f}" height="12"/>'),
            svg.line(number, [(p50, row - 6), (p50, row + 6)], 3),
            svg.line(number, [(p99, row - 5), (p99, row + 5)]),
        ]
        median, late, latest = (words.seconds(value) for value in (band[2], band[4], band[5]))
        said.append(f"{pipeline}: median {median}, 95 of 100 below {late}, 99 of 100 below {latest}")
    return Plot(
        title, svg.drawing(parts, f"{title}. {'; '.join(said)}.", height),
        "Box: the middle half, with the median. Line: from the fastest 5 to 95 of 100. Tick: 99 of 100.",
    )  # fmt: skip


def _reliabilities(results: Results, task: str, figures: Sequence[Figures]) -> Plot:
    """Whether answers that a pipeline is sure of are right."""
    title = "Can its confidence be trusted?"
    metric = results.metric[task]
    across, up = (svg.Axis(label, 0, 1, False, _FIFTHS, _percent) for label in ("confidence, %", "right, %"))
    parts = [svg.grid(across, up)]
    parts.append(Markup(f'<line class="ideal" x1="{svg.x(0)}" y1="{svg.y(0)}" x2="{svg.x(1)}" y2="{svg.y(1)}"/>'))
    said = []
    for each in figures if words.is_share(metric) else ():
        rows = results.select(task=task, pipeline=each.pipeline)
        sure = [(row.answer.confidence, row.scores[metric]) for row in rows if row.answer is not None
                and row.answer.confidence is not None]  # fmt: skip
        if not sure:
            continue
        bins = reliability(*zip(*sure, strict=True))
        number = results.pipelines.index(each.pipeline)
        points = [(svg.x(one.confidence), svg.y(one.accuracy)) for one in bins]
        parts.append(svg.line(number, points))
        for one, at in zip(bins, points, strict=True):
            scale = 0.5 + 0.9 * math.sqrt(one.count / len(sure))
            title_of = (
                f"{each.pipeline}: {words.plural(one.count, 'answer')}, confidence {_percent(one.confidence)} %, "
            )
            parts.append(svg.marker(number, at, f"{title_of}right {_percent(one.accuracy)} %", scale))
        said.append(f"{each.pipeline}: calibration error {words.score(each.calibration_error, metric)}")
    if not said:
        return Plot(title, Markup(""), "No pipeline says how sure it is." if words.is_share(metric) else _GRADED)
    note = (
        "On the dashed line, confidence is the share that is right; below it, a pipeline is too sure. "
        "Larger marks: more answers."
    )
    return Plot(title, svg.drawing(parts, f"{title} {'; '.join(said)}."), note)


def _apart(places: list[float], least: float = 11) -> list[float]:
    """The same places, in the same order, with neighbours at least so far apart."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = list(places)
    group: list[int] = []
    for index in [*order, -1]:
        if group and (index < 0 or places[index] - places[group[-1]] >= least):
            centre = sum(places[one] for one in group) / len(group)
            start = max(centre - least * (len(group) - 1) / 2, svg.LEFT + 6)
            for rank, one in enumerate(group if len(group) > 1 else ()):
                found[one] = start + least * rank
            group = []
        group.append(index)
    return found


def _latency(figures: Figures) -> float | None:
    return figures.latency.p50 if figures.latency else None


def _cost(figures: Figures) -> float | None:
    return figures.cost_per_1000


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _label(metric: str) -> str:
    return f"{words.score_name(metric)}, {'%' if words.is_share(metric) else '0 to 1'}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _seconds(value: float) -> str:
    return words.significant(value)


def _dollars(value: float) -> str:
    return words.significant(value)
