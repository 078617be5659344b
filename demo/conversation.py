"""A conversation: its turns, what the model is told of them, and what people see of them.

What it does not know: Gradio, events, the model.

What always holds: turns are never changed, only replaced, since several events may hold the same ones; every turn but
one that is being answered has an answer, or says that it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from multimodal.answer import Answer

MOST_PICTURES = 16  # that one conversation keeps


@dataclass(frozen=True)
class Turn:
    """A question and what came of it.

    Attributes:
        question: What was asked.
        pictures: What was shown with it.
        seen: What the model saw when it answered, those of earlier turns included, in order.
        model: Who answers, for people to read.
        follows: Whether earlier turns were read, too.
        text: The answer so far.
        answer: The whole of it; None while it is written, or where it was stopped before the first word.
        verdict: What the asker thinks of it, as `multimodal.store.feedback.Verdict` has it.
    """

    question: str
    pictures: tuple[Image.Image, ...] = ()
    seen: tuple[Image.Image, ...] = ()
    model: str = ""
    follows: bool = False
    text: str = ""
    answer: Answer | None = None
    verdict: str = ""


Turns = tuple[Turn, ...]


def asked(turns: Turns, question: str, pictures: Sequence[Image.Image], *, model: str, whole: bool) -> Turns:
    """The turns with a new question at their end.

    Args:
        turns: Those before it.
        question: What is asked.
        pictures: What is shown with it; without any, it is about those of the last turn that had some.
        model: Who answers, for people to read.
        whole: Whether the model reads all turns, and not this question and its pictures alone.
    """
    turn = Turn(question, tuple(pictures), model=model, follows=whole and bool(turns))
    seen = [picture for before in (*turns, turn) for picture in before.pictures] if whole else about((*turns, turn))
    return *turns, replace(turn, seen=tuple(seen))


def about(turns: Turns) -> tuple[Image.Image, ...]:
    """The pictures that the last question is about: its own, or else those shown last."""
    return next((turn.pictures for turn in reversed(turns) if turn.pictures), ())


def messages(turns: Turns) -> list[dict[str, Any]]:
    """The chat that asks the last question, as the model takes it."""
    *before, last = turns
    if not last.follows:
        return [_user(last.question, last.seen)]
    chat: list[dict[str, Any]] = []
    for turn in before:
        if turn.answer is not None:  # what was not answered is not told
            chat += [_user(turn.question, turn.pictures), {"role": "assistant", "content": turn.answer.text}]
        elif turn.pictures:
            chat.append(_user(turn.question, turn.pictures))
    return [*chat, _user(last.question, last.pictures)]


def settled(turns: Turns, written: Answer | None) -> Turns:
    """The turns after the last question was stopped, with what was written by then."""
    if not turns or turns[-1].answer is not None or written is None:
        return turns
    return *turns[:-1], replace(turns[-1], text=written.text, answer=written)


def at(turns: Turns, message: Any) -> int:
    """Which turn a message that people see belongs to; -1 where there is none.

    Args:
        turns: Each is seen as a message for every picture, one for the question, and one for the answer.
        message: Its number, or that and the number of a part of it.
    """
    left = message[0] if isinstance(message, list | tuple) else int(message)
    for place, turn in enumerate(turns):
        left -= len(turn.pictures) + 2
        if left < 0:
            return place
    return -1


def _user(text: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    return {"role": "user", "content": content}
