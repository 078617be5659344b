"""An answer: its pieces as they come, what it took, and how sure the model was of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from multimodal.engine import Generation
from multimodal.fusion import FusionTrace

if TYPE_CHECKING:
    from multimodal.model import MultiModalModel


@dataclass(frozen=True)
class Usage:
    """What an answer took: tokens read, tokens written, pictures."""

    prompt_tokens: int
    completion_tokens: int
    images: int


@dataclass(frozen=True)
class Timings:
    """Seconds.

    Attributes:
        prepare: Loading and preparing pictures and prompt.
        first_token: From the call to the first token.
        total: From the call to the last token.
    """

    prepare: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """An answer and what is known of it.

    Attributes:
        text: What the model says.
        confidence: The chance that the whole answer is right, 0 to 1: the probability that the model gave to it,
            end of answer included, as ``multimodal calibrate`` corrected it on questions whose answers are known (see
            :func:`chance_of_right`). It holds for questions and pictures like those; where nobody calibrated the
            model, it is that probability itself. Of a report of many words it is the chance that all of them are right.
        timings: How long it took.
        usage: What it took.
        tokens: What each of the answer's tokens adds to the text, in order, the end-of-answer token included. Where
            several tokens make one character, the last of them has it and the others are empty.
        finished: False if the answer was stopped or ran into ``max_new_tokens``.
        trace: Gates and attention, one row for each of ``tokens``; None without a picture or if not asked for.
        unsure: Whether the confidence is below the ``min_confidence`` that was asked for.
    """

    text: str
    confidence: float
    timings: Timings
    usage: Usage
    tokens: tuple[str, ...]
    finished: bool
    trace: FusionTrace | None = None
    unsure: bool = False


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are generated; they join to its text, and ``answer`` is there at their end.

    Leaving the loop early is not enough to stop the model: call :meth:`stop`, or use the stream as a context manager.

    Attributes:
        generation: The engine's own account of it, token by token, for those who wait in an event loop.
    """

    def __init__(
        self,
        model: MultiModalModel,
        generation: Generation,
        *,
        started: float,
        prepared: float,
        trace: bool,
        min_confidence: float,
    ) -> None:
        self.answer: Answer | None = None
        self._model, self.generation = model, generation
        self._started, self._prepared = started, prepared
        self._trace, self._min_confidence = trace, min_confidence
        self._pieces = _stripped(token.text for token in generation)
        self._lock = threading.Lock()

    def __next__(self) -> str:
        """The next piece; an error of the model is raised here."""
        for piece in self._pieces:
            return piece
        if self.generation.error is not None:
            raise self.generation.error
        self._finish()
        raise StopIteration

    def __enter__(self) -> AnswerStream:
        """Use as a context manager: generation has ended when the block is left."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """End generation, within one token, and wait for it; ``answer`` then holds what there is, or None."""
        self.generation.cancel()
        self.generation.wait()
        self._finish()

    def _finish(self) -> None:
        with self._lock:
            if self.answer is None and self.generation.error is None and self.generation.tokens:
                self.answer = self._answer()

    def _answer(self) -> Answer:
        model, generation, request = self._model, self.generation, self.generation.request
        ids = [token.id for token in generation.tokens]
        confidence = model.confidence_of(sum(token.logprob for token in generation.tokens))
        return Answer(
            text=generation.text.strip(),
            confidence=confidence,
            timings=Timings(
                prepare=self._prepared - self._started,
                first_token=generation.tokens[0].time - self._started,
                total=generation.tokens[-1].time - self._started,
            ),
            usage=Usage(prompt_tokens=len(request.tokens), completion_tokens=len(ids), images=len(request.pictures)),
            tokens=_token_texts(model.processor.tokenizer, ids),
            finished=generation.reason == "end",
            unsure=confidence < self._min_confidence,
            trace=model.trace(request, ids) if self._trace else None,
        )


def chance_of_right(logprob: float, *, scale: float = 1.0, bias: float = 0.0) -> float:
    """How likely an answer is right: ``sigmoid(scale * log-odds + bias)`` of the probability that the model gave to it.

    J. Platt, "Probabilistic Outputs for Support Vector Machines", 1999. With the defaults it is that probability.

    Args:
        logprob: Log-probability of the whole answer, the sum over its tokens.
        scale: ``FusionConfig.confidence_scale``.
        bias: ``FusionConfig.confidence_bias``.
    """
    score = scale * log_odds(logprob) + bias
    return 1 / (1 + math.exp(-score)) if score > 0 else math.exp(score) / (1 + math.exp(score))


def log_odds(logprob: float) -> float:
    """``log(p / (1 - p))`` of a probability given as its logarithm; that of certainty is finite, too."""
    logprob = min(logprob, -1e-6)
    return logprob - math.log(-math.expm1(logprob))


class Strip:
    """Takes text piece by piece and gives it without white space at its two ends."""

    def __init__(self) -> None:
        self._held, self._begun = "", False

    def add(self, piece: str) -> str:
        """What can be shown now; white space waits for what follows it."""
        text = self._held + piece if self._begun else piece.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that are not empty, without white space at its two ends."""
    strip = Strip()
    return filter(None, map(strip.add, pieces))


def _token_texts(tokenizer: Any, tokens: list[int]) -> tuple[str, ...]:
    stream = DecodeStream(skip_special_tokens=False)
    return tuple(stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens)
