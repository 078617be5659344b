"""Figures and answers as CSV, for notebooks and spreadsheets.

What always holds: no cell that a model, a data set or a server wrote is a formula. Excel, LibreOffice and Google Sheets
run a cell that starts with one of ``= + - @`` (OWASP, "CSV Injection"); such text gets an apostrophe in front, which
they do not show. Numbers of ours stay numbers. Control rows are not in the answers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from multimodal.compare.report.redaction import without_secrets
from multimodal.compare.results import Results, Row
from multimodal.compare.statistics import Interval
from multimodal.compare.summary import Figures, Percentiles

_RISKY = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # wide ones are taken, too


def write_figures(path: Path, figures: Sequence[Figures]) -> None:
    """One line for each task and pipeline. Columns within others have dots: ``by.closed.low``, ``latency.p95``."""
    _write(path, [_flat(each) for each in figures], [field.name for field in fields(Figures)])


def write_answers(path: Path, results: Results) -> None:
    """One line for each question and pipeline."""
    rows = [_answer(row, results.metric.get(row.task, "")) for row in results.rows if not row.control]
    _write(path, rows, ["task", "id", "pipeline", "question", "target", "answer", "score", "error"])


def neutral(value: Any) -> Any:
    """Text that a spreadsheet does not run."""
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.startswith(_RISKY) or value.lstrip().startswith(_RISKY) else value


def _answer(row: Row, metric: str) -> dict[str, Any]:
    said = row.answer
    found: dict[str, Any] = {
        "task": row.task, "id": row.id, "pipeline": row.pipeline, "question": row.question, "target": row.target,
        "answer": said.text if said else "", "score": row.scores.get(metric, "") if said else "",
        "error": without_secrets(row.error), "images": "|".join(map(str, row.images)),
    }  # fmt: skip
    if said:
        found |= {
            "confidence": said.confidence, "first_token": said.first_token, "total": said.total, "cost": said.cost,
            "prompt_tokens": said.usage.prompt_tokens, "completion_tokens": said.usage.completion_tokens,
            "finished": said.finished,
        }  # fmt: skip
    found |= {f"scores.{name}": value for name, value in row.scores.items()}
    return found | {f"meta.{name}": value for name, value in row.meta.items()}


def _flat(figures: Figures) -> dict[str, Any]:
    """The figures with one value in a column."""
    found: dict[str, Any] = {}
    for field in fields(figures):
        found |= _spread(field.name, getattr(figures, field.name))
    return found


def _spread(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, (Interval, Percentiles)):
        return {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: cell for part, one in value.items() for key, cell in _spread(f"{name}.{part}", one).items()}
    return {} if value is None else {name: value}


def _write(path: Path, rows: Sequence[Mapping[str, Any]], first: Iterable[str]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row)) if rows else list(first)
    order = {name: place for place, name in enumerate(first)}
    names.sort(key=lambda name: order.get(name.split(".")[0], len(order)))  # stable: parts of a figure stay together
    # Neither a lone half of a surrogate pair nor a NUL, which models do write, may keep the others from being read.
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(neutral, names))
        writer.writerows([_clean(neutral(row.get(name, ""))) for name in names] for row in rows)


def _clean(value: Any) -> Any:
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value
