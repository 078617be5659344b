"""Comparing: the same question to several pipelines that are made of the demo's own model, and votes for answers.

What it does: makes the pipelines when the first question comes, asks them one after another, so that the seconds of
each are its own, and writes votes down.

What it does not know: the page. As in `Asking`, only the newest comparison of a session is wanted.

What always holds: a vote holds texts, figures and a digest of the picture, never the picture.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from demo.asking import Asking
from demo.shared import reason
from multimodal.journal import Journal

if TYPE_CHECKING:
    from multimodal.model import MultiModalModel
    from multimodal.pipelines import Answer, Parts, Pipeline

NAMES = ("native", "text_only", "hybrid", "blind")
EQUAL = "equal"  # a vote: no answer is better than the others
VOTES = "votes.jsonl"


@dataclass(frozen=True)
class Reply:
    """What came of the question to one pipeline.

    Attributes:
        pipeline: Its name.
        answer: None if it could not answer.
        error: Why not.
        digest: Of all that decides its answers.
    """

    pipeline: str
    answer: Answer | None = None
    error: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        doing: What is going on, for the asker to read; empty when all have answered.
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
    picture: str  # its digest
    replies: tuple[Reply, ...]


class Comparing:
    """The pipelines.

    Args:
        asking: Has the model.
        model_name: What the model was loaded as.
        votes: Folder for votes; None for the user's data folder.
    """

    def __init__(self, asking: Asking, *, model_name: str, votes: Path | None = None) -> None:
        self._asking, self._name = asking, model_name
        self._votes = Journal((votes or data_folder()) / VOTES)
        self._parts: Parts | None = None
        self._made: dict[str, Pipeline] = {}
        self._turn = threading.Lock()
        self._numbers = count(1)
        self._wanted: dict[str, int] = {}
        self._running: dict[str, str] = {}

    @property
    def votes(self) -> Path:
        """The file that votes go to."""
        return self._votes.path

    def new_question(self, session: str) -> int:
        """Withdraw the session's comparison, and give the number of its next one."""
        self._wanted[session] = number = next(self._numbers)
        return number

    def stop(self, session: str) -> str:
        """Withdraw the session's comparison: the pipeline that is being asked, whose name is given, is the last one."""
        self._wanted.pop(session, None)
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
            if self._wanted.get(session) != number:
                return
            yield Progress("The model is still loading \N{HORIZONTAL ELLIPSIS}")
        for name in NAMES:
            doing = f"{name} is being asked \N{HORIZONTAL ELLIPSIS}"
            if name not in self._made:
                doing += " Its parts are loaded first."
            self._running[session] = name
            yield Progress(doing, running=name)
            with self._turn:  # not held while the page is told
                if self._wanted.get(session) != number:
                    return
                reply = self._ask(name, model, text, picture, max_new_tokens)
            if self._wanted.get(session) != number:
                return
            yield Progress(doing, reply=reply)
        self._running.pop(session, None)
        yield Progress("")

    def vote(self, compared: Compared, better: str) -> None:
        """Write a vote down: for a pipeline, or ``EQUAL``.

        Raises:
            JournalError: If it cannot be written.
        """
        self._votes.append(
            {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "vote": better,
                "question": compared.question,
                "picture": compared.picture,
                "model": Path(self._name).name,
                "replies": [
                    {
                        "pipeline": reply.pipeline,
                        "digest": reply.digest,
                        "text": None if reply.answer is None else reply.answer.text,
                        "confidence": None if reply.answer is None else reply.answer.confidence,
                        "first_token": None if reply.answer is None else round(reply.answer.first_token, 3),
                        "total": None if reply.answer is None else round(reply.answer.total, 3),
                        "error": reply.error,
                    }
                    for reply in compared.replies
                ],
            }
        )

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
            return Reply(name, answer, digest=pipeline.digest)
        except PipelineError as error:
            return Reply(name, error=str(error))
        except Exception as error:
            return Reply(name, error=reason(error))


def parts_of(model: MultiModalModel, name: str) -> Parts:
    """What the pipelines are made of: the model that is loaded already, and the rest by default."""
    from multimodal.pipelines import Parts, PipelineSettings

    parts = Parts(PipelineSettings(model=name))
    parts.model = model  # instead of loading its own
    return parts


def digest(picture: Image.Image) -> str:
    """What tells pictures apart, and nothing of what they show."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()[:32]


def data_folder() -> Path:
    """Where this user's programs keep what they are told."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "multimodal"
