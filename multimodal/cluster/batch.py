"""Answers about many pictures, on Ray Data: shards in, a Parquet file for each of them out.

What always holds: a shard's file is there as a whole or not at all, so that a job that was killed goes on with the
shards that are missing; and what goes wrong with a row is told in that row.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from multimodal.answer import Answer, AnswerStream
from multimodal.cluster.shards import BatchError, Row, Shard, rows_of, shards_of
from multimodal.model import MultiModalModel

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("question", pyarrow.string()),
        ("answer", pyarrow.string()),
        ("confidence", pyarrow.float64()),
        ("prompt_tokens", pyarrow.int64()),
        ("completion_tokens", pyarrow.int64()),
        ("error", pyarrow.string()),
    ]
)
RECORD = "_batch.json"  # readers of Parquet folders leave out what begins with an underscore
AHEAD = 4  # times the engine's slots: requests that are prepared while others are answered


@dataclass(frozen=True)
class BatchSettings:
    """What is asked, of which model.

    Attributes:
        source: What :func:`~multimodal.cluster.shards.shards_of` takes.
        prompt: Asked about each picture that has no question of its own.
        model: ``"embedded"``, or a folder or hub id, the same on every machine.
        precision: As :class:`~multimodal.model.MultiModalModel` takes it.
        max_new_tokens: Length limit of an answer.
        rows: In a shard, at most.
    """

    source: str
    prompt: str | None = None
    model: str = "embedded"
    precision: str = "auto"
    max_new_tokens: int = 128
    rows: int = 256


@dataclass(frozen=True)
class Done:
    """A job that ended.

    Attributes:
        shards: How many were answered now.
        skipped: How many an earlier run had answered.
        rows: In the shards that were answered now.
        errors: How many of these rows have an error in the place of an answer.
    """

    shards: int
    skipped: int
    rows: int
    errors: int


class Answerer:
    """Answers shards; Ray Data keeps one of these in each replica.

    Args:
        settings: What is asked.
        output: The folder for the files.
    """

    def __init__(self, settings: BatchSettings, output: str) -> None:
        self._settings, self._output = settings, Path(output)
        self._model = MultiModalModel.from_pretrained(settings.model, precision=settings.precision)

    def __call__(self, shard: dict[str, Any]) -> dict[str, int]:
        """Answer a shard and write its file; returns its number, and how many rows and errors it has."""
        wanted = Shard(**{**shard, "files": tuple(shard["files"])})
        records = list(self.answer(rows_of(wanted)))
        path = self._output / file_of(wanted)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # a shard may be tried twice at the same time
        parquet.write_table(pyarrow.Table.from_pylist(records, SCHEMA), part)
        os.replace(part, path)
        errors = sum(record["error"] is not None for record in records)
        return {"number": wanted.number, "rows": len(records), "errors": errors}

    def answer(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        """Records as :data:`SCHEMA` has them, in the order of the rows; many are answered at the same time."""
        asked: deque[tuple[Row, AnswerStream | Exception]] = deque()
        for row in rows:
            asked.append((row, self._ask(row)))
            if len(asked) >= AHEAD * len(self._model.engine.slots):
                yield self._record(*asked.popleft())
        while asked:
            yield self._record(*asked.popleft())

    def _ask(self, row: Row) -> AnswerStream | Exception:
        question = row.question or self._settings.prompt
        try:
            if row.problem is not None:
                raise BatchError(row.problem)
            if question is None:
                raise BatchError("there is no question: give the row one, or all of them a --prompt")
            return self._model.stream(question, row.picture, max_new_tokens=self._settings.max_new_tokens)
        except Exception as error:  # whatever it is, the other rows are answered
            return error

    def _record(self, row: Row, asked: AnswerStream | Exception) -> dict[str, Any]:
        answer: Answer | None = None
        error = asked if isinstance(asked, Exception) else None
        if isinstance(asked, AnswerStream):
            try:
                for _ in asked:
                    pass
                answer = asked.answer
            except Exception as raised:
                error = raised
        known = {"id": row.id, "question": row.question or self._settings.prompt}
        if answer is None:
            return {**known, "error": " ".join(str(error).split()) or type(error).__name__}
        usage = {name: getattr(answer.usage, name) for name in ("prompt_tokens", "completion_tokens")}
        return {**known, "answer": answer.text, "confidence": answer.confidence, **usage, "error": None}


def run_batch(
    settings: BatchSettings,
    output: Path,
    *,
    replicas: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    say: Callable[[str], None] = print,
) -> Done:
    """Answer all that is not answered yet, on the cluster that ``RAY_ADDRESS`` names or on this machine.

    Args:
        settings: What is asked.
        output: The folder for the files, which all machines of the cluster have to reach.
        replicas: How many models answer, at most.
        num_cpus: Cores of each, which are also its threads.
        num_gpus: GPUs of each, or a share of one.
        say: Told of every shard that is done.

    Raises:
        BatchError: If there is nothing to read, or the folder holds answers to something else.
    """
    shards = shards_of(Path(settings.source), rows=settings.rows)
    _keep_record(settings, shards, output)
    missing = [shard for shard in shards if not (output / file_of(shard)).exists()]
    rows = errors = 0
    if missing:
        say(f"{len(missing)} of {len(shards)} shards to answer")
        for count, done in enumerate(_answered(missing, settings, output, replicas, num_cpus, num_gpus), start=1):
            rows, errors = rows + done["rows"], errors + done["errors"]
            told = f", {done['errors']} with an error" if done["errors"] else ""
            say(f"{count} of {len(missing)}: shard {done['number']}, {done['rows']} rows{told}")
    return Done(len(missing), len(shards) - len(missing), rows, errors)


def file_of(shard: Shard) -> str:
    """The name of the file with a shard's answers."""
    return f"shard-{shard.number:06}.parquet"


def _answered(
    shards: list[Shard], settings: BatchSettings, output: Path, replicas: int, num_cpus: float, num_gpus: float
) -> Iterator[dict[str, int]]:
    from multimodal.cluster.connection import connected

    with connected():
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # a line for each shard says as much, and can be kept
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        answered = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards)).map(
            Answerer,
            fn_constructor_args=(settings, str(output.resolve())),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=replicas),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        yield from answered.iter_rows()


def _keep_record(settings: BatchSettings, shards: list[Shard], output: Path) -> None:
    """Write down what the folder is for, and remove what a killed job left half written."""
    said = json.loads(json.dumps({"settings": asdict(settings), "shards": [asdict(shard) for shard in shards]}))
    output.mkdir(parents=True, exist_ok=True)
    record = output / RECORD
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != said:
            raise BatchError(f"{output} holds answers to other pictures or questions: give another folder, or move it")
    else:
        record.write_text(json.dumps(said), encoding="utf-8")
    for part in output.glob(".shard-*"):
        part.unlink()
