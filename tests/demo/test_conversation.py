"""Conversations: what the model is told of them, and which message belongs to which turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from PIL import Image

from demo.conversation import Turns, about, asked, at, messages, settled

FILM, SHELF, LABEL = (Image.new("L", (8, 8), shade) for shade in (0, 100, 200))


class Said:
    """As much of an answer as a conversation looks at."""

    def __init__(self, text: str) -> None:
        self.text = text


def answered(turns: Turns, text: str) -> Turns:
    return settled(turns, Said(text))


def ask(turns: Turns, question: str, *pictures: Image.Image, whole: bool = False) -> Turns:
    return asked(turns, question, pictures, model="tiny", whole=whole)


def told(turns: Turns) -> list[tuple[str, Any]]:
    """A chat in short: who says what, pictures as themselves."""
    return [
        (message["role"], message["content"])
        if isinstance(message["content"], str)
        else (message["role"], [part.get("image", part.get("text")) for part in message["content"]])
        for message in messages(turns)
    ]


def test_a_question_without_a_picture_is_about_the_last_ones() -> None:
    turns = answered(ask((), "What is this?", FILM), "A film.")
    turns = answered(ask(turns, "And these?", SHELF, LABEL), "A shelf.")
    turns = ask(turns, "Which is red?")
    assert about(turns) == turns[-1].seen == (SHELF, LABEL)
    assert told(turns) == [("user", [SHELF, LABEL, "Which is red?"])] and not turns[-1].follows


def test_the_whole_conversation_is_told_where_it_is_asked_for() -> None:
    turns = answered(ask((), "What is this?", FILM, whole=True), "A film.")
    assert not turns[0].follows, "nothing came before"
    turns = ask(ask(turns, "Stopped?", LABEL, whole=True), "And this?", SHELF, whole=True)
    assert told(turns) == [
        ("user", [FILM, "What is this?"]),
        ("assistant", "A film."),
        ("user", [LABEL, "Stopped?"]),
        ("user", [SHELF, "And this?"]),
    ]
    assert turns[-1].seen == (FILM, LABEL, SHELF) and turns[-1].follows


def test_messages_belong_to_turns() -> None:
    turns = answered(ask((), "One?", FILM, SHELF), "1")
    turns = answered(ask(turns, "Two?"), "2")
    turns = answered(ask(turns, "Three?", LABEL), "3")
    assert [at(turns, message) for message in range(10)] == [0, 0, 0, 0, 1, 1, 2, 2, 2, -1]
    assert at(turns, [5, 0]) == 1


def test_what_was_written_when_it_was_stopped_is_kept() -> None:
    turns = ask((), "One?", FILM)
    assert settled(turns, None) == turns
    stopped = answered(turns, "half")
    assert stopped[0].text == "half" and answered(stopped, "more") == stopped
    assert replace(stopped[0], text="", answer=None) == turns[0], "turns are replaced, not changed"


def test_fifteen_turns_over_several_pictures() -> None:
    turns: Turns = ()
    for number in range(15):
        pictures = [] if number % 4 else [(FILM, SHELF, LABEL)[number % 3]]
        turns = answered(ask(turns, f"{number}?", *pictures), "ok")
    assert len(turns) == 15 and at(turns, 15 * 2 + 4 - 1) == 14
    assert turns[-1].seen == turns[12].pictures, "shown last"
