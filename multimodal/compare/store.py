"""A comparison's folder: what was asked and answered, one record a line, so that nothing finished is asked twice.

    RUN/run.json          the settings, the command, the machine
    RUN/answers.jsonl     an answer or an error of each question, pipeline and control; the last record counts
    RUN/groups.jsonl      how long each pipeline took for each task, what it took of memory and energy
    RUN/readings/         what was read off pictures
    RUN/logs/             inspect-ai's logs, for its viewer

What always holds: an answer is on disk before the next question is asked, and a run uses a folder alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from multimodal.compare.results import Results, Row
from multimodal.compare.scores import scores_of
from multimodal.data.scoring import words_of
from multimodal.journal import Journal
from multimodal.pipelines.protocol import Answer

PRINTED = "printed"  # subset: the right answer, or a word of it, was found in print
SHORTEST_WORD = 3  # letters of a word that counts as found
NOTED = ("command", "settings", "machine", "controls", "pipelines", "remote", "tasks")  # what run.json says
NOT_ONE = "is not the folder of a comparison"


@dataclass(frozen=True)
class Key:
    """One question to one pipeline."""

    task: str
    pipeline: str
    control: str
    id: str


@dataclass(frozen=True)
class Record:
    """What came of it.

    Attributes:
        digest: Of the pipeline and the question.
        answer: The answer; None after an error.
        error: What went wrong; beside an answer, what went wrong with the judge.
        judged: What the judge said; None where none was asked.
        judge_cost: What the judge charged, in US dollars.
        images: The pictures that were shown where they are not the question's own.
    """

    digest: str
    answer: Answer | None = None
    error: str = ""
    judged: float | None = None
    judge_cost: float = 0.0
    images: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        """What answer and judge charged, as far as that is known."""
        return (0.0 if self.answer is None else self.answer.cost or 0.0) + self.judge_cost


class Store:
    """The folder.

    Args:
        folder: It is made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers, self._groups = Journal(folder / "answers.jsonl"), Journal(folder / "groups.jsonl")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the folder alone.

        Raises:
            ValueError: If another process uses it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise ValueError(
                f"another process runs a comparison in {self.folder}: wait for it, or give another folder"
            ) from None

    def records(self) -> dict[Key, Record]:
        """All answers and errors."""
        found = {}
        for line in self._answers.read():
            answer = None if line["answer"] is None else Answer.from_dict(line["answer"])
            key = Key(line["task"], line["pipeline"], line["control"], line["id"])
            found[key] = Record(
                digest=line["digest"],
                answer=answer,
                error=line["error"],
                judged=line["judged"],
                judge_cost=line.get("judge_cost", 0.0),
                images=tuple(line.get("images", ())),
            )
        return found

    def add(self, key: Key, record: Record) -> None:
        """Write an answer or an error down.

        Raises:
            OSError: If the disk is full.
        """
        answer = None if record.answer is None else record.answer.to_dict()
        self._answers.append({**vars(key), **vars(record), "answer": answer})

    def add_group(self, **figures: Any) -> None:
        """Write down what was measured of a pipeline on a task."""
        self._groups.append(figures)

    def groups(self) -> list[dict[str, Any]]:
        """All that was measured so."""
        return self._groups.read()

    def note(self, said: Mapping[str, Any]) -> None:
        """Write down what the run is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / ".run.json"
        unfinished.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "run.json")

    def noted(self) -> dict[str, Any] | None:
        """What the run is; None before it began.

        Raises:
            ValueError: If the file cannot be read.
        """
        try:
            said = dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{self.folder} {NOT_ONE} (run.json: {error}): give another folder") from None
        if lacking := [name for name in NOTED if name not in said]:
            raise ValueError(f"{self.folder} {NOT_ONE} (run.json lacks {', '.join(lacking)}): give another folder")
        return said


def read_results(folder: str | Path) -> Results:
    """What a comparison found so far.

    Args:
        folder: Its folder.

    Raises:
        ValueError: If it is none.
    """
    store = Store(Path(folder).expanduser())
    noted = store.noted()
    if noted is None:
        raise ValueError(f"{folder} {NOT_ONE} (it has no run.json): `multimodal compare --output {folder}` makes one")
    records = store.records()
    rows = []
    for task in noted["tasks"]:
        name, metric, printed = task["name"], task["metric"], _printed(task, records)
        for pipeline in noted["pipelines"]:
            for control in noted["controls"]:
                for question in task["questions"]:
                    record = records.get(Key(name, pipeline, control, question["id"]))
                    if record is not None:
                        subset = [PRINTED] if question["id"] in printed else []
                        rows.append(_row(name, pipeline, control, question, record, metric, subset, store.folder))
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    answers: dict[tuple[str, str], int] = defaultdict(int)
    energy: dict[tuple[str, str], float] = {}
    memory: dict[str, int] = {}
    for group in store.groups():
        if "peak_memory" in group:
            memory[group["pipeline"]] = group["peak_memory"]
        elif not group["control"]:
            place = group["task"], group["pipeline"]
            seconds[place] += group["seconds"]
            answers[place] += group["answers"]
            if group["watt_hours"] is not None:
                energy[place] = energy.get(place, 0.0) + group["watt_hours"]
    return Results(
        folder=store.folder,
        command=noted["command"],
        rows=tuple(rows),
        metric={task["name"]: task["metric"] for task in noted["tasks"]},
        machine=noted["machine"],
        settings=noted["settings"],
        peak_memory=memory,
        throughput={place: answers[place] / seconds[place] for place in seconds if seconds[place] > 0},
        remote=noted["remote"],
        energy=energy,
    )


def _row(
    task: str, pipeline: str, control: str, question: Mapping[str, Any], record: Record, metric: str,
    subsets: Sequence[str], folder: Path,
) -> Row:  # fmt: skip
    scores = {} if record.answer is None else scores_of(record.answer.text, question["target"], metric=metric)
    if record.judged is not None:
        scores["judged"] = record.judged
    meta = dict(question["meta"])
    if subsets:
        meta["subsets"] = " ".join([*meta.get("subsets", "").split(), *subsets])
    return Row(
        task=task,
        pipeline=pipeline,
        id=question["id"],
        question=question["question"],
        target=question["target"],
        images=tuple(Path(image) for image in record.images or question["images"]),
        answer=record.answer,
        error=record.error if record.answer is None else "",
        scores=scores,
        meta=meta,
        control=control,
    )


def _printed(task: Mapping[str, Any], records: Mapping[Key, Record]) -> set[str]:
    """Questions whose right answer, or a word of it, OCR found in the picture: where reading should help."""
    read: dict[str, set[str]] = defaultdict(set)
    for key, record in records.items():
        if key.task == task["name"] and not key.control and record.answer is not None:
            for step in record.answer.steps:
                if step.name == "ocr":
                    read[key.id].update(words_of(step.output))
    return {
        question["id"]
        for question in task["questions"]
        if read[question["id"]] & {word for word in words_of(question["target"]) if len(word) >= SHORTEST_WORD}
    }
