"""What the page's script shows of single questions, as one JSON value, in which a text or a picture stands once.

Layout, kept in step with ``report.js``:

    pipelines, tasks, kinds   names, which the others give by number
    metrics                   of each task: [name, whether it is a share]
    pictures                  [data-URI, problem]
    texts, boxes              what steps say; the same OCR text is in the answers to every question about a picture
    questions                 [task, id, question, target, kinds, pictures, disagree, any error, answers]
    an answer                 [pipeline, text, score, confidence, seconds, notes, error, steps]
    a step                    [name, seconds, cached, text or -1, boxes or -1, picture or -1]

What always holds: control rows are not in it; nothing in it can end the ``<script>`` that carries it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

from multimodal.compare.report import words
from multimodal.compare.report.pictures import Album
from multimodal.compare.report.redaction import without_secrets
from multimodal.compare.results import Results, Row
from multimodal.compare.summary import kinds_of
from multimodal.pipelines.protocol import Answer, Step

DISAGREE = 0.5  # two answers to a question differ if their scores do by this much: right and wrong always do
MOST_BOXES = 500


class Numbers:
    """Gives the same number to the same thing."""

    def __init__(self) -> None:
        self.known: dict[Hashable, int] = {}

    def of(self, thing: Hashable) -> int:
        """The number of a thing."""
        return self.known.setdefault(thing, len(self.known))

    def things(self) -> list[Any]:
        """All of them, in the order of their numbers."""
        return list(self.known)


class Book:
    """Gathers the questions of a run for the page.

    Args:
        results: The run.
        album: Takes the pictures.
    """

    def __init__(self, results: Results, album: Album) -> None:
        self.results, self.album = results, album
        self._tasks, self._pipelines, self._kinds, self._texts, self._boxes = (Numbers() for _ in range(5))

    def value(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        by_question: dict[tuple[str, str], list[Row]] = {}
        for row in self.results.rows:
            if not row.control:
                by_question.setdefault((row.task, row.id), []).append(row)
        questions = [self._question(rows) for rows in by_question.values()]
        metrics = [self.results.metric.get(task, "") for task in self._tasks.things()]
        return {
            "pipelines": self._pipelines.things(),
            "tasks": self._tasks.things(),
            "kinds": self._kinds.things(),
            "metrics": [[words.score_name(metric), int(words.is_share(metric))] for metric in metrics],
            "pictures": [[each.uri, each.problem] for each in self.album.thumbnails],
            "texts": self._texts.things(),
            "boxes": self._boxes.things(),
            "questions": questions,
        }

    def _question(self, rows: Sequence[Row]) -> list[Any]:
        first = rows[0]
        metric = self.results.metric.get(first.task, "")
        pictures = [self.album.number(path) for path in first.images]
        scores = [row.scores[metric] for row in rows if row.answer is not None and metric in row.scores]
        return [
            self._tasks.of(first.task), first.id, first.question, first.target,
            [self._kinds.of(kind) for kind in kinds_of([first])], pictures,
            int(bool(scores) and max(scores) - min(scores) >= DISAGREE), int(any(row.answer is None for row in rows)),
            [self._answer(row, metric, pictures) for row in rows],
        ]  # fmt: skip

    def _answer(self, row: Row, metric: str, pictures: Sequence[int]) -> list[Any]:
        pipeline = self._pipelines.of(row.pipeline)
        if row.answer is None:
            return [pipeline, "", None, None, None, "", without_secrets(row.error) or "no answer", []]
        said = row.answer
        return [
            pipeline, said.text, _finite(row.scores.get(metric)), _finite(said.confidence), _finite(said.total, 4),
            _notes(said), "", self._steps(said.steps, pictures),
        ]  # fmt: skip

    def _steps(self, steps: Sequence[Step], pictures: Sequence[int]) -> list[list[Any]]:
        found = []
        read: dict[str, int] = {}  # how many pictures each kind of step has read: its n-th step reads the n-th picture
        for step in steps:
            boxes, picture = boxes_of(step), -1
            if boxes and pictures:
                picture = pictures[min(read.get(step.name, 0), len(pictures) - 1)]
            read[step.name] = read.get(step.name, 0) + 1
            text = self._texts.of(without_secrets(step.output)) if step.output else -1
            number = self._boxes.of(boxes) if boxes else -1
            found.append([step.name, _finite(step.seconds, 4), int(step.cached), text, number, picture])
        return found


def boxes_of(step: Step) -> tuple[tuple[float, ...], ...]:
    """The boxes of a step, as shares of the picture; what is no box is left out."""
    found = []
    boxes = step.details.get("boxes") if step.details else None
    for box in boxes[:MOST_BOXES] if isinstance(boxes, (list, tuple)) else ():
        if isinstance(box, (list, tuple)) and len(box) == 4:
            numbers = [_finite(value, 4) if isinstance(value, (int, float)) else None for value in box]
            if all(number is not None and -1 <= number <= 2 for number in numbers):
                found.append(tuple(number for number in numbers if number is not None))
    return tuple(found)


def embedded(value: Any) -> str:
    """JSON that can stand in a ``<script>``: it holds no ``<``, ``>`` or ``&`` and no line ends of JavaScript's own."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _notes(answer: Answer) -> str:
    notes = ["cut short"] * (not answer.finished)
    if answer.usage.prompt_tokens or answer.usage.completion_tokens:
        notes.append(f"{answer.usage.prompt_tokens:,} tokens in, {answer.usage.completion_tokens:,} out")
    if answer.cost:
        notes.append(words.dollars(answer.cost))
    return " · ".join(notes)


def _finite(value: float | None, digits: int = 3) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None
