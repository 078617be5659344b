"""What a comparison found: one row for each question, pipeline and control. Everything that is shown comes from these.

What it does not know: how a row was made (``run.py``) or is shown (``report.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from multimodal.pipelines.protocol import Answer

SHUFFLED = "shuffled"  # a control: the same questions, each with the pictures of another one


@dataclass(frozen=True)
class Row:
    """One question, answered by one pipeline.

    Attributes:
        task: Name of the task, such as ``"slake"``.
        pipeline: Name of the pipeline.
        id: Names the question within its task; the same for every pipeline.
        question: What was asked.
        target: The right answer.
        images: The pictures' files.
        answer: What the pipeline said; None after an error.
        error: What went wrong; empty if nothing did. Such a row counts neither as right nor as wrong.
        scores: By the scorer's name, each 0 to 1, such as ``{"exact": 1.0, "f1": 1.0}``.
        meta: What the data set says beside the question (kind of answer, modality, ...).
        control: ``""``, or ``"shuffled"``.
    """

    task: str
    pipeline: str
    id: str
    question: str
    target: str
    images: tuple[Path, ...] = ()
    answer: Answer | None = None
    error: str = ""
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    control: str = ""

    @property
    def cluster(self) -> str:
        """Questions about the same picture are not independent: they share this."""
        return "|".join(map(str, self.images)) or self.id


@dataclass(frozen=True)
class Results:
    """A finished or unfinished run.

    Attributes:
        folder: Where it lies.
        command: The command line that made it, and that makes it again.
        rows: Everything that was asked, tasks and pipelines in the order in which they were named.
        metric: For each task, the name of the score that decides: ``"exact"`` or ``"rouge_l"``.
        machine: What it ran on, such as ``{"cpu": "...", "cores": "2", "torch": "2.14.1"}``.
        settings: The run's settings, by name.
        peak_memory: Bytes that the process took at most while each pipeline ran alone, by pipeline; may lack some.
        throughput: For each ``(task, pipeline)``, answers per second at the run's concurrency.
        remote: Whether what a pipeline is asked leaves this machine, by pipeline.
        energy: Watt-hours for each ``(task, pipeline)``, where they could be measured.
    """

    folder: Path
    command: str
    rows: tuple[Row, ...]
    metric: Mapping[str, str]
    machine: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    peak_memory: Mapping[str, int] = field(default_factory=dict)
    throughput: Mapping[tuple[str, str], float] = field(default_factory=dict)
    remote: Mapping[str, bool] = field(default_factory=dict)
    energy: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def pipelines(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(row.pipeline for row in self.rows))

    def select(self, *, task: str, pipeline: str, control: str = "") -> list[Row]:
        """The rows of one pipeline on one task, errors included."""
        return [row for row in self.rows if (row.task, row.pipeline, row.control) == (task, pipeline, control)]


def paired(one: Sequence[Row], other: Sequence[Row]) -> Iterable[tuple[Row, Row]]:
    """The questions that both answered without an error, in the order of the first."""
    there = {row.id: row for row in other if row.answer is not None}
    return ((row, there[row.id]) for row in one if row.answer is not None and row.id in there)
