"""Asking: models for everybody who has the page open, and for each of them at most one answer being written.

What it does: loads a model in the background, streams an answer, and ends it when its asker stops it, asks something
else or goes away.

What it does not know: the page. It is told a session (any string) and a chat, and gives steps and an answer.

What always holds: a question that is no longer wanted generates nothing and says nothing. Each one gets a number; only
the newest number of a session is wanted, so a question that still waits for its turn can be withdrawn, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.answer import Answer, AnswerStream
    from multimodal.model import MultiModalModel


@dataclass(frozen=True)
class Step:
    """How far an answer is.

    Attributes:
        doing: What is going on: ``"loading"``, ``"looking"``, ``"writing"`` or ``"done"``.
        text: The answer so far.
        answer: The whole of it; None until it is finished.
    """

    doing: str
    text: str = ""
    answer: Answer | None = None


class Asking:
    """The models and the answers that are being written.

    Args:
        loads: Each gives a model; called once, in a thread of its own.
    """

    def __init__(self, *loads: Callable[[], MultiModalModel]) -> None:
        self._loads = loads
        self._models: list[Future[MultiModalModel]] = [Future() for _ in loads]
        self._begun: set[int] = set()
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._wanted: dict[str, int] = {}
        self._streams: dict[str, AnswerStream] = {}

    def start(self, model: int = 0) -> None:
        """Begin to load a model, unless that was begun before."""
        with self._lock:
            if model not in self._begun:
                self._begun.add(model)
                threading.Thread(target=self._fill, args=(model,), daemon=True).start()

    def wait(self) -> None:
        """Wait until the first model is loaded; an error of loading it is raised here."""
        self._models[0].result()

    def model_within(self, *, seconds: float) -> MultiModalModel | None:
        """The first model, or None if it is still loading after so many seconds; an error of loading is raised here."""
        self._loaded_within(0, seconds=seconds)
        return self._models[0].result() if self._models[0].done() else None

    def new_question(self, session: str) -> int:
        """End what the session is being told, and give the number of its next question."""
        self.stop(session)
        self._wanted[session] = number = next(self._numbers)
        return number

    def wants(self, session: str, number: int) -> bool:
        """Whether a question is still the session's newest, and was not stopped."""
        return self._wanted.get(session) == number

    def has_another(self, session: str, number: int) -> bool:
        """Whether the session has asked something else since; not if the question was only stopped."""
        return self._wanted.get(session, number) != number

    def ask(
        self,
        session: str,
        number: int,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int,
        min_confidence: float = 0.0,
        model: int = 0,
        adapter: str | None = None,
        trace: bool = True,
    ) -> Generator[Step]:
        """Answer a question step by step; closing the iterator ends the generation.

        Args:
            session: Who asks.
            number: From :meth:`new_question`. Nothing comes of a question that is no longer the session's newest.
            messages: The chat whose last message is answered, as ``MultiModalModel.reply`` takes it.
            max_new_tokens: At most so many tokens.
            min_confidence: Below this, 0 to 1, the answer is marked as unsure.
            model: Which of the models answers; one that nobody asked before is loaded first.
            adapter: Which of its adapters answers; None for the model as it came.
            trace: Whether the answer comes with its attention and gates.

        Raises:
            ModelError: If the prompt is empty or too long, or there is no model.
        """
        if model:
            self.start(model)
        while not self._models[model].done():
            if not self.wants(session, number):
                return
            yield Step("loading")
            self._loaded_within(model, seconds=1)
        if not self.wants(session, number):
            return
        loaded = self._models[model].result()
        yield Step("looking")
        stream = loaded.reply(
            messages, max_new_tokens=max_new_tokens, trace=trace, min_confidence=min_confidence, adapter=adapter
        )
        self._streams[session] = stream
        try:
            text = ""
            for piece in stream:
                if not self.wants(session, number):
                    return
                text += piece
                yield Step("writing", text)
            if self.wants(session, number):
                yield Step("done", text, stream.answer)
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

    def _fill(self, model: int) -> None:
        try:
            self._models[model].set_result(self._loads[model]())
        except BaseException as error:  # handed to everybody who waits for the model
            self._models[model].set_exception(error)

    def _loaded_within(self, model: int, *, seconds: float) -> None:
        with suppress(NotYet):
            self._models[model].exception(timeout=seconds)
