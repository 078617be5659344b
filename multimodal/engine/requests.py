"""What an engine is asked, and what comes back: a request, and its generation as it is being made."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import torch


class EngineError(RuntimeError):
    """A request that an engine does not take; the message says why and what to do."""


class EngineFull(EngineError):
    """Too many requests wait already."""


class EngineClosed(EngineError):
    """The engine takes no request any more."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a request.

    Attributes:
        pixel_values: ``(3, height, width)``, prepared by the model's image processor.
        digest: Names its content; see :func:`~multimodal.engine.pictures.digest_of`.
    """

    pixel_values: torch.Tensor
    digest: str

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.pixel_values.nbytes


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on from it.

    Attributes:
        tokens: Token ids, one placeholder for each picture.
        pictures: The pictures, in the placeholders' order.
        max_new_tokens: At most so many tokens.
        temperature: 0 takes the likeliest token always.
        top_p: With a temperature, sample from the likeliest tokens of this total probability, above 0 to 1.
        seed: Of sampling; the same seed gives the same answer, whatever else the engine does.
        stop: Strings that end the answer; they are not part of it.
        adapter: Which adapter answers, None for none.
        top_logprobs: With each token, so many of the likeliest that could have stood in its place.
        repetition_penalty: What has been read or said becomes less likely by so much (Keskar et al., "CTRL", 2019,
            section 4.1), more likely below 1; None for what the model's generation configuration says.
    """

    tokens: Sequence[int]
    pictures: Sequence[Picture] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    adapter: str | None = None
    top_logprobs: int = 0
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        id: Its id.
        logprob: The log-probability that the model gave to it, whatever the temperature and the penalty.
        text: What it adds to the text; what may be the beginning of a stop string comes with a later token.
        time: When it was there, in seconds of ``time.perf_counter``.
        top_logprobs: The likeliest tokens of its step and their log-probabilities, the likeliest first; as many as
            the request asks for.
    """

    id: int
    logprob: float
    text: str
    time: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Generation:
    """An answer in the making. Iterate over it, in a thread or in an event loop, as often as you like.

    Attributes:
        request: What was asked.
        tokens: What there is of it.
        reason: Why it ended: ``"end"`` (the model's own end), ``"length"``, ``"stop"`` or ``"cancelled"``; else None.
        error: What went wrong, if something did.
        reused: How many tokens of the prompt the engine knew already.
    """

    request: Request
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    error: BaseException | None = None
    reused: int = 0
    cancelled: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.reason is not None or self.error is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens)

    def cancel(self) -> None:
        """Have it end within one step; :meth:`wait` waits for that."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over; tells whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.over, timeout)

    def __iter__(self) -> Iterator[Token]:
        """Tokens as they come; an error of the model is raised here."""
        place = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda place=place: len(self.tokens) > place or self.over)  # type: ignore[misc]
                found = self.tokens[place:]
            yield from found
            place += len(found)
            if not found:
                break
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The same in an event loop."""
        waker = (asyncio.get_running_loop(), asyncio.Event())
        with self._changed:
            self._loops.append(waker)
        place = 0
        try:
            while True:
                waker[1].clear()
                found, over = self.tokens[place:], self.over
                for token in found:
                    yield token
                place += len(found)
                if over and place == len(self.tokens):
                    break
                if not found:
                    await waker[1].wait()
        finally:
            with self._changed:
                self._loops.remove(waker)
        if self.error is not None:
            raise self.error

    def add(self, token: Token) -> None:
        """The engine says: one more token."""
        self._change(token=token)

    def end(self, reason: str | None = None, error: BaseException | None = None) -> None:
        """The engine says: that was all."""
        self._change(reason=reason, error=error)

    def _change(
        self, token: Token | None = None, reason: str | None = None, error: BaseException | None = None
    ) -> None:
        with self._changed:
            if token is not None:
                self.tokens.append(token)
            self.reason, self.error = reason, error
            self._changed.notify_all()
            for loop, event in self._loops:
                loop.call_soon_threadsafe(event.set)
