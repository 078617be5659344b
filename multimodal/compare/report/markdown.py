"""The report as Markdown: verdicts, the main and the paired tables, each with the command that made it.

What always holds: names and errors cannot break out of their cell, and cannot become HTML where it is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from multimodal.compare.report import words
from multimodal.compare.report.redaction import without_secrets
from multimodal.compare.report.tables import Table, cost, errors_table, main_table, paired_table
from multimodal.compare.report.verdicts import BRACKETS, verdicts
from multimodal.compare.results import Results
from multimodal.compare.summary import Figures, Pair, pairs_by_kind, summarise

NOT_MEDICAL = "Not a medical device: nothing here may be used to diagnose or treat anybody."
EMPTY = "This run holds no answers yet. Start or resume it with the command above, then write the report again."


def markdown(results: Results, figures: Sequence[Figures], pairs: Sequence[Pair]) -> str:
    """The whole report but plots and single questions, which only HTML shows."""
    parts = ["# Comparison", NOT_MEDICAL, command_block(results)]
    if not results.rows:
        return "\n\n".join([*parts, EMPTY]) + "\n"
    kinds = pairs_by_kind(results)
    for verdict in verdicts(results, figures, pairs):
        mine = [each for each in figures if each.task == verdict.task]
        two = [pair for pair in pairs if pair.task == verdict.task]
        parts += [f"## {cell(verdict.task)}", f"**{cell(verdict.headline)}**"]
        parts += ["\n".join(f"- {cell(point)}" for point in verdict.points)] * bool(verdict.points)
        parts += [BRACKETS]
        parts += [table(main_table(verdict.task, mine))] * bool(mine)
        parts += [table(paired_table(verdict.task, mine[0].metric, two))] * bool(two)
        by_kind = [pair for pair in kinds if pair.task == verdict.task]
        parts += ["By kind of question:", table(paired_table(verdict.task, mine[0].metric, by_kind))] * bool(by_kind)
        parts += [command_block(results)]
    errors = errors_table(results)
    parts += ["## Errors", table(errors)] * bool(errors.lines)
    return "\n\n".join(parts) + "\n"


def readme_table(results: Results) -> str:
    """One small table for each task, for a README: pipeline, score, median latency, cost."""
    figures = summarise(results)
    parts = []
    for task in results.tasks:
        mine = [each for each in figures if each.task == task]
        lines = [
            ["Pipeline", f"{words.score_name(results.metric[task])} (95 % interval)", "Median time", "$ per 1,000"]
        ]
        for each in mine:
            latency = words.seconds(each.latency.p50 if each.latency else None)
            lines.append([each.pipeline, words.interval(each.score, each.metric), latency, cost(each)])
        count = max((each.score.count for each in mine if each.score), default=0)
        parts += [f"**{cell(task)}**, {words.plural(count, 'question')}", _lines(lines)]
    return (
        "\n\n".join([*parts, command_block(results)]) + "\n"
        if parts
        else EMPTY.replace("above", "below") + (f"\n\n{command_block(results)}\n")
    )


def table(what: Table) -> str:
    """A table as Markdown."""
    return _lines([[what.corner, *what.columns], *([line.name, *line.cells] for line in what.lines)])


def command_block(results: Results) -> str:
    """The command in a block that it cannot end."""
    command = without_secrets(results.command).strip() or "(the command was not noted)"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return f"{fence}sh\n{command}\n{fence}"


def cell(text: str) -> str:
    """Text that stays within its cell and is nothing but text."""
    text = " ".join(text.split())
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)  # what could start a tag; "p < 0.001" may stay
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", text)  # text_only is no emphasis


def _lines(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ([cell(text) for text in line] for line in lines)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rest))
