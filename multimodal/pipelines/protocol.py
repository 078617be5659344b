"""What every way of answering takes and gives: a question goes in, an answer comes out, with all that was done for it.

All that the demo, the notebooks and the comparison show comes from these classes, so a pipeline that a person adds
shows up everywhere. They hold plain values only, and survive JSON (:meth:`Answer.to_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Turn:
    """An earlier question of a conversation and its answer."""

    question: str
    answer: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: The question, in plain words.
        images: The pictures that it is about: anything that ``load_image`` takes.
        history: What was said before, oldest first.
        max_new_tokens: At most so many tokens in the answer.
    """

    text: str
    images: tuple[Any, ...] = ()
    history: tuple[Turn, ...] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Step:
    """One thing that a pipeline did on its way.

    Attributes:
        name: ``"picture"``, ``"ocr"``, ``"tags"``, ``"prompt"``, ``"llm"``, ``"model"``, ...
        seconds: How long it took when it was done.
        output: What came of it, for people to read: the text that was found, the labels, the exact prompt.
        cached: Whether it was kept from an earlier question about the same picture: it took no time now.
        details: More, as JSON has it: boxes of the text that was found, probabilities of labels.
    """

    name: str
    seconds: float = 0.0
    output: str = ""
    cached: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """Tokens read and written, pictures sent. Of an endpoint that does not say, tokens are 0."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        text: What was said.
        steps: What the pipeline did, in order.
        usage: What it took.
        first_token: Seconds from the question to the first token.
        total: Seconds from the question to the last token.
        cost: US dollars, as the endpoint's price list says; 0 where nobody is paid for a call; None where no price is
            known.
        confidence: The chance that the answer is right, 0 to 1; None where the pipeline does not know.
        finished: Whether the answer came to its own end within ``max_new_tokens``.
        cached: Whether it was kept from an earlier run: seconds and cost are those of the first call.
    """

    text: str
    steps: tuple[Step, ...] = ()
    usage: Usage = field(default_factory=Usage)
    first_token: float = 0.0
    total: float = 0.0
    cost: float | None = 0.0
    confidence: float | None = None
    finished: bool = True
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Answer:
        """The answer that :meth:`to_dict` wrote."""
        steps = tuple(Step(**step) for step in said["steps"])
        return replace(cls(**{**said, "steps": steps}), usage=Usage(**said["usage"]))


class PipelineError(RuntimeError):
    """A question that a pipeline could not answer, or a pipeline that cannot be used: what, and the remedy.

    Attributes:
        passing: Whether the same question may be answered a moment later (a busy endpoint, a broken connection).
        retry_after: Seconds that an endpoint asked to wait, None where it did not say.
    """

    def __init__(self, message: str, *, passing: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.passing, self.retry_after = passing, retry_after


@runtime_checkable
class Pipeline(Protocol):
    """A way of answering. It may be asked from several threads at once.

    Who measures it also looks for five things that it may have, or not: ``prepare()`` loads what answering needs,
    ``forget()`` keeps nothing of earlier questions, so that the next one takes what a first one does; ``remote`` tells
    whether what is asked leaves this machine (else it does not), ``uses_pictures`` whether they have a part in its
    answers (else they have), ``elsewhere`` which machines of one's own compute them (else this one).

    Attributes:
        name: Stands in tables and file names.
        digest: Changes when its answers may change (weights, prompt, endpoint): kept answers of another digest are not
            used.
    """

    @property
    def name(self) -> str:
        """Short."""
        ...

    @property
    def digest(self) -> str:
        """Of all that decides the answers."""
        ...

    def answer(self, question: Question) -> Answer:
        """Answer a question.

        Raises:
            PipelineError: If it cannot.
            ImageError: If a picture cannot be used.
        """
        ...
