"""Asking: one model for everybody who has the page open, and for each of them at most one answer being written.

What it does: loads the model in the background, streams an answer, and ends it when its asker stops it, asks something
else or goes away.

What it does not know: the page. It is told a session (any string) and a picture, and gives steps and an answer.

What always holds: a question that is no longer wanted generates nothing and says nothing. Each one gets a number; only
the newest number of a session is wanted, so a question that still waits for its turn can be withdrawn, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from multimodal.model import Answer, AnswerStream, MultiModalModel


@dataclass(frozen=True)
class Step:
    """How far an answer is.

    Attributes:
        doing: What is going on, for the asker to read.
        text: The answer so far.
        answer: The whole of it; None until it is finished.
    """

    doing: str
    text: str = ""
    answer: Answer | None = None


class Asking:
    """The model and the answers that are being written.

    Args:
        load: Gives the model; called once, in a thread of its own.
    """

    def __init__(self, load: Callable[[], MultiModalModel]) -> None:
        self._load = load
        self._model: Future[MultiModalModel] = Future()
        self._numbers = count(1)
        self._wanted: dict[str, int] = {}
        self._streams: dict[str, AnswerStream] = {}

    def start(self) -> None:
        """Begin to load the model."""
        threading.Thread(target=self._fill, daemon=True).start()

    def wait(self) -> None:
        """Wait until the model is loaded; an error of loading it is raised here."""
        self._model.result()

    def model_within(self, *, seconds: float) -> MultiModalModel | None:
        """The model, or None if it is still loading after so many seconds; an error of loading it is raised here."""
        if not self._model.done():
            self._loaded_within(seconds=seconds)
        return self._model.result() if self._model.done() else None

    def new_question(self, session: str) -> int:
        """End what the session is being told, and give the number of its next question."""
        self.stop(session)
        self._wanted[session] = number = next(self._numbers)
        return number

    def ask(
        self,
        session: str,
        number: int,
        prompt: str,
        picture: Image.Image,
        *,
        max_new_tokens: int,
        min_confidence: float = 0.0,
        adapter: str | None = None,
    ) -> Generator[Step]:
        """Answer a question step by step; closing the iterator ends the generation.

        Args:
            session: Who asks.
            number: From :meth:`new_question`. Nothing comes of a question that is no longer the session's newest.
            prompt: What to ask.
            picture: What it is about.
            max_new_tokens: At most so many tokens.
            min_confidence: Below this, 0 to 1, the answer is marked as unsure.
            adapter: Which adapter answers; None for the model as it came.

        Raises:
            ModelError: If the prompt is empty or too long, or there is no model.
        """
        while not self._model.done():
            if self._wanted.get(session) != number:
                return
            yield Step("The model is still loading \N{HORIZONTAL ELLIPSIS}")
            self._loaded_within(seconds=1)
        if self._wanted.get(session) != number:
            return
        model = self._model.result()
        yield Step("Looking at the picture \N{HORIZONTAL ELLIPSIS}")
        stream = model.stream(
            prompt,
            picture,
            max_new_tokens=max_new_tokens,
            trace=True,
            min_confidence=min_confidence,
            adapter=adapter,
        )
        self._streams[session] = stream
        try:
            text = ""
            for piece in stream:
                if self._wanted.get(session) != number:
                    return
                text += piece
                yield Step("Writing \N{HORIZONTAL ELLIPSIS}", text)
            if self._wanted.get(session) == number:
                yield Step("Done", text, stream.answer)
        finally:
            stream.stop()
            if self._streams.get(session) is stream:
                del self._streams[session]

    def stop(self, session: str) -> Answer | None:
        """Withdraw the session's question, wait until generation has ended, and give what was written by then."""
        self._wanted.pop(session, None)
        stream = self._streams.pop(session, None)
        if stream is None:
            return None
        stream.stop()
        return stream.answer

    def _fill(self) -> None:
        try:
            self._model.set_result(self._load())
        except BaseException as error:  # handed to everybody who waits for the model
            self._model.set_exception(error)

    def _loaded_within(self, *, seconds: float) -> bool:
        try:
            return self._model.exception(timeout=seconds) is None
        except NotYet:
            return False
