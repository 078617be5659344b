"""A comparison whose questions are answered on Ray: each replica has all pipelines, and one model that they share.

The run itself stays in the process that was started, in :func:`multimodal.compare.compare`: tasks, inspect-ai's logs,
scores, kept answers and the report know nothing of Ray. What always holds: a question that a replica took with it when
it died is asked of another one, and what is an error of a pipeline comes back as one.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any

from multimodal.compare import CompareSettings, Results, compare
from multimodal.compare.run import message_of
from multimodal.pipelines import Answer, Parts, Pipeline, PipelineError, PipelineSettings, Question, make_pipelines

TRIES = 3  # replicas that may die while they answer a question, before it counts as an error of that question
SLOW_START = 60.0  # seconds after which a person is told what is waited for


@dataclass(frozen=True)
class Face:
    """What a comparison wants to know of a pipeline, beside its answers; as ``Pipeline`` has it."""

    name: str
    digest: str
    remote: bool
    uses_pictures: bool


@dataclass(frozen=True)
class Failure:
    """An error on its way back: exceptions of a person's own pipeline need not survive the way."""

    message: str
    passing: bool = False
    retry_after: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What there is to say of an exception."""
        if isinstance(error, PipelineError):
            return cls(message_of(error), error.passing, error.retry_after)
        return cls(message_of(error))

    def error(self) -> PipelineError:
        """The same as an exception."""
        return PipelineError(self.message, passing=self.passing, retry_after=self.retry_after)


class Replica:
    """All pipelines, in a process that Ray starts, and starts again when it dies.

    Args:
        names: As :func:`~multimodal.pipelines.make_pipelines` takes them.
        made_of: What they are made of.
        folder: Where relative paths begin.
    """

    def __init__(self, names: Sequence[str], made_of: PipelineSettings, folder: str) -> None:
        try:
            if not os.path.isdir(folder):
                raise PipelineError(
                    f"{platform.node()} has no folder {folder}: all machines of a cluster need the pictures, the model "
                    "and the folder of the command at the same paths"
                )
            os.chdir(folder)
            self._parts = Parts(made_of)  # their endpoint ends with them
            self._pipelines = {each.name: each for each in make_pipelines(names, self._parts)}
            for pipeline in self._pipelines.values():
                getattr(pipeline, "prepare", lambda: None)()
            self._opened: list[Face] | Failure = [_face_of(each) for each in self._pipelines.values()]
        except Exception as error:  # raised here, Ray would tell it with its own traceback only
            self._opened = Failure.of(error)

    def open(self) -> list[Face] | Failure:
        """The pipelines, in order, or why there are none."""
        return self._opened

    def answer(self, name: str, question: Question) -> dict[str, Any] | Failure:
        """Have a pipeline answer a question; the answer as ``Answer.to_dict`` has it."""
        try:
            return self._pipelines[name].answer(question).to_dict()
        except Exception as error:
            return Failure.of(error)

    def forget(self, name: str) -> None:
        """Have a pipeline forget earlier questions."""
        getattr(self._pipelines[name], "forget", lambda: None)()


def _face_of(pipeline: Pipeline) -> Face:
    return Face(
        pipeline.name,
        pipeline.digest,
        bool(getattr(pipeline, "remote", False)),
        bool(getattr(pipeline, "uses_pictures", True)),
    )


class Replicas:
    """Replicas on the cluster that this process is connected to; questions go to the one that is free the longest.

    Args:
        names: Of the pipelines, as :func:`~multimodal.pipelines.make_pipelines` takes them.
        made_of: What they are made of.
        count: How many replicas.
        concurrency: Questions at a time of each.
        num_cpus: Cores of each, which are also its threads.
        num_gpus: GPUs of each, or a share of one.
        say: Told what is waited for, if it takes long.

    Attributes:
        faces: Of the pipelines, in order.

    Raises:
        PipelineError: If a pipeline cannot be made, or replicas would not all answer the same.
    """

    def __init__(
        self,
        names: Sequence[str],
        made_of: PipelineSettings,
        *,
        count: int,
        concurrency: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        import ray

        actor = ray.remote(Replica).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_concurrency=concurrency,
            max_restarts=-1,
            scheduling_strategy="SPREAD",  # over the machines; Ray would fill one after another
        )
        # Several processes must not write into one file of readings.
        made_of = replace(made_of, readings=None)
        self._all = [actor.remote(list(names), made_of, os.getcwd()) for _ in range(count)]
        opened = [each.open.remote() for each in self._all]
        _, missing = ray.wait(opened, num_returns=count, timeout=SLOW_START)
        if missing:
            say(
                f"{count - len(missing)} of {count} replicas are ready; the others load, or wait until the cluster has "
                f"{num_cpus:g} cores and {num_gpus:g} GPUs to spare for each"
            )
        try:
            first, *others = ray.get(opened)
        except ray.exceptions.RayError as error:
            raise PipelineError(f"a replica died while it loaded; Ray's logs say why: {message_of(error)}") from error
        for each in (first, *others):
            if isinstance(each, Failure):
                raise each.error()
            if each != first:
                raise PipelineError(
                    "replicas would answer differently, with other weights or in another precision: give --precision, "
                    "and the same files to all machines"
                )
        self.faces: list[Face] = first
        self._free: SimpleQueue[Any] = SimpleQueue()  # each as often as it takes a question; None where none is left
        for _ in range(concurrency):
            for replica in self._all:
                self._free.put(replica)
        self._places, self._lock = count * concurrency, Lock()

    def ask(self, name: str, question: Question) -> Answer:
        """Have a pipeline answer a question, on any replica.

        Raises:
            PipelineError: If it cannot, or the replicas that tried have died.
        """
        import ray

        for _ in range(TRIES):
            replica = self._free.get()
            if replica is None:
                self._free.put(None)
                raise PipelineError("no replica is left; Ray's logs say why: start the command again")
            try:
                said = ray.get(replica.answer.remote(name, question))
            except ray.exceptions.RayTaskError:  # it lives, but its answer does not survive the way
                self._free.put(replica)
                raise
            except ray.exceptions.RayError:
                back = replica.open.options(max_task_retries=-1).remote()
                back.future().add_done_callback(partial(self._come_back, replica))
                continue
            self._free.put(replica)
            if isinstance(said, Failure):
                raise said.error()
            return Answer.from_dict(said)
        raise PipelineError(f"{TRIES} replicas died while they answered this; Ray's logs say why")

    def _come_back(self, replica: Any, opened: Future[list[Face] | Failure]) -> None:
        """Take a replica that was started again, perhaps on another machine, unless it would answer differently."""
        if opened.exception() is None and opened.result() == self.faces:
            self._free.put(replica)
            return
        with self._lock:
            self._places -= 1
            if not self._places:
                self._free.put(None)

    def forget(self, name: str) -> None:
        """Have all replicas of a pipeline forget earlier questions."""
        import ray

        told = [replica.forget.remote(name) for replica in self._all]
        for each in told:
            with suppress(ray.exceptions.RayError):  # it comes back with nothing to forget
                ray.get(each)


class PipelineOnReplicas:
    """A pipeline whose questions are answered by replicas; it has the face of the one that they have.

    Args:
        face: What it looks like.
        replicas: Who answers.
        elsewhere: Where, for the report.
    """

    def __init__(self, face: Face, replicas: Replicas, elsewhere: str) -> None:
        self.name, self.digest = face.name, face.digest
        self.remote, self.uses_pictures, self.elsewhere = face.remote, face.uses_pictures, elsewhere
        self._replicas = replicas

    def answer(self, question: Question) -> Answer:
        """Answer a question.

        Raises:
            PipelineError: If it cannot; other errors of the pipeline become this one.
        """
        return self._replicas.ask(self.name, question)

    def forget(self) -> None:
        """Keep nothing of earlier questions."""
        self._replicas.forget(self.name)


def compare_on_ray(
    settings: CompareSettings, *, replicas: int = 1, num_cpus: float = 1, num_gpus: float = 0, progress: bool = True
) -> Results:
    """Run a comparison on the cluster that ``RAY_ADDRESS`` names or on this machine, or go on with one.

    Its folder is that of a comparison without Ray: either may go on with what the other has begun.

    Args:
        settings: The comparison; its ``concurrency`` is that of each replica.
        replicas: How many processes answer, each with a model.
        num_cpus: Cores of each, which are also its threads.
        num_gpus: GPUs of each, or a share of one.
        progress: Show a bar for each pipeline and task.

    Raises:
        ImportError: If Ray is not installed.
        RuntimeError: If there is no cluster.
        DataError: And all that :func:`~multimodal.compare.compare` raises.
    """
    from multimodal.cluster.connection import connected

    def make(names: Sequence[str], parts: Parts) -> list[Pipeline]:
        pool = Replicas(
            names,
            parts.settings,
            count=replicas,
            concurrency=settings.concurrency,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        elsewhere = f"{replicas} replicas on Ray, {num_cpus:g} cores and {num_gpus:g} GPUs each"
        return [PipelineOnReplicas(face, pool, elsewhere) for face in pool.faces]

    with connected():
        return compare(replace(settings, concurrency=replicas * settings.concurrency), progress=progress, make=make)
