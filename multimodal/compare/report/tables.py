"""The tables of a report as text: written out as HTML by the template, and as Markdown.

Pipelines are columns: there are few of them and many figures, so a table fits a screen and a phone scrolls it sideways
under a name that stays. A line that no pipeline has a figure for is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from multimodal.compare.report import words
from multimodal.compare.report.redaction import without_secrets
from multimodal.compare.results import Results, Row
from multimodal.compare.summary import Figures, Pair, Percentiles

MOST_ERRORS = 100  # different ones that are listed


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: What stands in the first column.
        cells: The others.
        group: The heading under which it stands; empty for none.
        shares: How long a bar behind each cell is, 0 to 1; empty for no bars.
    """

    name: str
    cells: tuple[str, ...]
    group: str = ""
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of text, with what it shows and the name of its first column."""

    title: str
    corner: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def main_table(task: str, figures: Sequence[Figures]) -> Table:
    """Every figure of every pipeline on one task."""
    columns = tuple(each.pipeline for each in figures)
    lines = [Line(name, cells, group) for group, name, cells in _figures(figures) if set(cells) != {words.NOTHING}]
    return Table(f"{task}: every figure", "", columns, tuple(lines))


def _figures(figures: Sequence[Figures]) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    metric = figures[0].metric
    name = f"{words.score_name(metric)}, 95 % interval"

    def each(show: Callable[[Figures], str]) -> tuple[str, ...]:
        return tuple(show(figure) for figure in figures)

    yield "Quality", "Questions answered", each(lambda f: f"{f.score.count if f.score else 0:,}")
    yield "Quality", "Errors", each(lambda f: f"{f.errors:,}")
    yield "Quality", name, each(lambda f: words.interval(f.score, metric))
    for kind in dict.fromkeys(kind for figure in figures for kind in figure.by):
        yield (
            "Quality", f"… {kind} ({_count(figures, kind)})",
            each(lambda f, kind=kind: words.interval(f.by.get(kind), metric)),  # type: ignore[misc]
        )  # fmt: skip
    for other in dict.fromkeys(other for figure in figures for other in figure.scores if other != metric):
        yield (
            "Quality", words.score_name(other),
            each(lambda f, other=other: words.score(f.scores.get(other), other)),  # type: ignore[misc]
        )  # fmt: skip
    yield "Quality", "Calibration error", each(lambda f: words.score(f.calibration_error, "exact"))
    yield "Controls", "With pictures of other questions", each(lambda f: words.interval(f.shuffled, metric))
    yield "Controls", "Without any picture (blind)", each(lambda f: words.interval(f.blind, metric))
    yield "Speed", "Time to answer, median (p50)", each(lambda f: _time(f.latency, "p50"))
    yield "Speed", "… 95 of 100 take less (p95)", each(lambda f: _time(f.latency, "p95"))
    yield "Speed", "… 99 of 100 take less (p99)", each(lambda f: _time(f.latency, "p99"))
    yield "Speed", "Time to first token, median", each(lambda f: _time(f.first_token, "p50"))
    yield "Speed", "First question about a picture, median", each(lambda f: words.seconds(f.fresh_latency))
    yield "Speed", "Throughput", each(lambda f: _rate(f.throughput))
    yield "Cost", "Tokens read, mean", each(lambda f: words.number(f.prompt_tokens if f.score else None))
    yield "Cost", "Tokens written, mean", each(lambda f: words.number(f.completion_tokens if f.score else None, 1))
    yield "Cost", "US dollars per 1,000 answers", each(lambda f: cost(f))
    yield "Cost", "Peak memory", each(lambda f: words.memory(f.peak_memory))
    yield "Cost", "Energy per 1,000 answers", each(lambda f: words.number(f.energy_per_1000, 1, "Wh"))


def paired_table(task: str, metric: str, pairs: Sequence[Pair]) -> Table:
    """How two pipelines differ on one task, or on a kind of its questions."""
    columns = (
        "Difference", "95 % interval", "Only first right", "Only second right", "Questions", "p", "Adjusted p (Holm)",
        "Smallest difference it could find",
    )  # fmt: skip
    lines = []
    for pair in pairs:
        found = pair.difference
        lines.append(
            Line(
                f"{pair.first} {words.MINUS} {pair.second}{f', {pair.kind}' if pair.kind else ''}",
                (
                    words.gap(found.value, metric, sign=True),
                    words.ends(found.low, found.high, metric),
                    words.number(found.only_first),
                    words.number(found.only_second),
                    f"{found.count:,}",
                    words.p_value(found.p),
                    words.p_value(found.adjusted_p),
                    words.gap(found.detectable, metric),
                ),
            )
        )
    return Table(f"{task}: pipelines two by two", f"First {words.MINUS} second", columns, tuple(lines))


def steps_table(task: str, figures: Sequence[Figures]) -> Table:
    """Median seconds of each step of each pipeline, and of the whole answer."""
    some = [each for each in figures if each.latency]
    longest = max((value for each in some for value in each.steps.values()), default=0.0) or 1.0
    lines = [
        Line(
            step,
            tuple(words.seconds(each.steps.get(step)) for each in some),
            shares=tuple(round(each.steps.get(step, 0.0) / longest, 3) for each in some),
        )
        for step in dict.fromkeys(step for each in some for step in each.steps)
    ]
    if lines:
        lines.append(Line("whole answer", tuple(_time(each.latency, "p50") for each in some)))
    return Table(f"{task}: where time goes", "Step, median", tuple(each.pipeline for each in some), tuple(lines))


def errors_table(results: Results) -> Table:
    """What went wrong, and how often, the most frequent first."""
    found = Counter(
        (
            row.task,
            f"{row.pipeline} ({row.control})" if row.control else row.pipeline,
            _message(row),
        )
        for row in results.rows
        if row.answer is None
    )
    lines = [
        Line(words.short(error, 500), (f"{count:,}", task, pipeline))
        for (task, pipeline, error), count in found.most_common(MOST_ERRORS)
    ]
    if len(found) > MOST_ERRORS:
        rest = sum(found.values()) - sum(count for _, count in found.most_common(MOST_ERRORS))
        lines.append(Line(f"… and {len(found) - MOST_ERRORS:,} other messages", (f"{rest:,}", "", "")))
    return Table("Errors", "What went wrong", ("Times", "Task", "Pipeline"), tuple(lines))


def cost(figures: Figures) -> str:
    """US dollars for a thousand answers, ``unknown`` where no price is."""
    return words.dollars(figures.cost_per_1000) if figures.score else words.NOTHING


def _message(row: Row) -> str:
    return without_secrets(row.error) or "no answer"


def _count(figures: Sequence[Figures], kind: str) -> str:
    return f"{max(figure.by[kind].count for figure in figures if kind in figure.by):,}"


def _time(value: Percentiles | None, which: str) -> str:
    return words.seconds(getattr(value, which) if value else None)


def _rate(value: float | None) -> str:
    return words.NOTHING if value is None else f"{words.significant(value)} a second"
