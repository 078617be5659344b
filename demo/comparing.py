"""Comparing: the same question to several pipelines that are made of the demo's own model, and votes for answers.

What it does: makes the pipelines when the first question comes, asks them one after another, so that the seconds of
each are its own, and hands votes to `Feedback`.

What it does not know: the page. As in `Asking`, only the newest comparison of a session is wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from demo.asking import Asking
from demo.shared import reason
from multimodal.store.feedback import Feedback, Vote

if TYPE_CHECKING:
    from multimodal.model import MultiModalModel
    from multimodal.pipelines import Answer, Parts, Pipeline

NAMES = ("native", "text_only", "hybrid", "blind")


@dataclass(frozen=True)
class Reply:
    """What came of the question to one pipeline.

    Attributes:
        pipeline: Its name.
        answer: None if it could not answer.
        error: Why not.
    """

    pipeline: str
    answer: Answer | None = None
    error: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        doing: What is going on: ``"loading"``, ``"asking"``, ``"preparing"`` where a pipeline's parts are loaded first,
            or ``"done"``.
        running: The pipeline that is being asked.
        reply: What has just come.
    """

    doing: str
    running: str = ""
    reply: Reply | None = None


@dataclass(frozen=True)
class Compared:
    """A finished comparison, to be voted on."""

    question: str
    picture: Image.Image
    replies: tuple[Reply, ...]


class Comparing:
    """The pipelines.

    Args:
        asking: Has the model.
        model_name: What the model was loaded as.
        feedback: Keeps votes.
    """

    def __init__(self, asking: Asking, *, model_name: str, feedback: Feedback) -> None:
        self._asking, self._name, self._feedback = asking, model_name, feedback
        self._parts: Parts | None = None
        self._made: dict[str, Pipeline] = {}
        self._turn = threading.Lock()
        self._running: dict[str, str] = {}

    def new_question(self, session: str) -> int:
        """Withdraw the session's comparison, and give the number of its next one."""
        return self._asking.new_question(_own(session))

    def stop(self, session: str) -> str:
        """Withdraw the session's comparison: the pipeline that is being asked, whose name is given, is the last one."""
        self._asking.stop(_own(session))
        return self._running.pop(session, "")

    def ask(
        self, session: str, number: int, text: str, picture: Image.Image, *, max_new_tokens: int
    ) -> Iterator[Progress]:
        """Ask all pipelines; nothing comes of a question that is no longer the session's newest.

        A pipeline that cannot answer says why in its reply, and the others are asked all the same.

        Raises:
            ModelError: If there is no model.
        """
        while (model := self._asking.model_within(seconds=1)) is None:
            if not self._asking.wants(_own(session), number):
                return
            yield Progress("loading")
        for name in NAMES:
            doing = "asking" if name in self._made else "preparing"
            self._running[session] = name
            yield Progress(doing, running=name)
            with self._turn:  # not held while the page is told
                if not self._asking.wants(_own(session), number):
                    return
                reply = self._ask(name, model, text, picture, max_new_tokens)
            if not self._asking.wants(_own(session), number):
                return
            yield Progress(doing, reply=reply)
        self._running.pop(session, None)
        yield Progress("done")

    def vote(self, compared: Compared, better: str) -> None:
        """Keep a vote: for a pipeline, or ``EQUAL`` of `multimodal.store.feedback`.

        Raises:
            StoreError: If it cannot be written.
        """
        answers = {reply.pipeline: reply.answer.text for reply in compared.replies if reply.answer is not None}
        vote = Vote(question=compared.question, answers=answers, model=Path(self._name).name, better=better)
        self._feedback.vote(vote, [compared.picture])

    def close(self) -> None:
        """End what the pipelines opened."""
        with self._turn:
            self._made.clear()
            if self._parts is not None:
                self._parts.__exit__(None, None, None)
                self._parts = None

    def _ask(self, name: str, model: MultiModalModel, text: str, picture: Image.Image, tokens: int) -> Reply:
        try:
            from multimodal.pipelines import PipelineError, Question
            from multimodal.pipelines import make_pipelines as make
        except ModuleNotFoundError as error:
            return Reply(name, error=reason(error))
        try:
            if self._parts is None:
                self._parts = parts_of(model, self._name)
            if name not in self._made:
                (pipeline,) = make([name], self._parts)
                prepare = getattr(pipeline, "prepare", None)  # so that no answer's seconds are those of loading
                if prepare is not None:
                    prepare()
                self._made[name] = pipeline
            pipeline = self._made[name]
            answer = pipeline.answer(Question(text, (picture,), max_new_tokens=tokens))
            return Reply(name, answer)
        except PipelineError as error:
            return Reply(name, error=str(error))
        except Exception as error:
            return Reply(name, error=reason(error))


def _own(session: str) -> str:
    """A session's name for its comparisons: it may have another question in the chat."""
    return f"{session} compare"


def parts_of(model: MultiModalModel, name: str) -> Parts:
    """What the pipelines are made of: the model that is loaded already, and the rest by default."""
    from multimodal.pipelines import Parts, PipelineSettings

    parts = Parts(PipelineSettings(model=name))
    parts.model = model  # instead of loading its own
    return parts
