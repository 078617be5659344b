"""A whole chat, given to the model itself."""

from __future__ import annotations

from typing import Any

import pytest

from multimodal.model import ModelError, MultiModalModel, conversation
from tests.service.conftest import QUESTION
from tests.training.tiny import IMAGE, draw, encode


def read(model: MultiModalModel, messages: Any) -> list[int]:
    with model.reply(messages, max_new_tokens=1) as stream:
        return list(stream.generation.request.tokens)


def test_a_chat_is_read_as_the_processor_reads_it(model: MultiModalModel) -> None:
    chat = [
        {"role": "system", "content": "no"},
        *conversation(QUESTION, [draw("red", 0)]),
        {"role": "assistant", "content": "red"},
        *conversation("Is it red?", [draw("blue", 0)]),
    ]
    assert read(model, chat) == encode(model, [chat])["input_ids"][0].tolist()
    stream = model.reply(chat, max_new_tokens=3)
    text = "".join(stream)
    assert stream.answer is not None and stream.answer.text == text and stream.answer.usage.images == 2


def test_a_question_is_a_chat_of_one_message(model: MultiModalModel) -> None:
    image = draw("red", 0)
    expected = model(QUESTION, image, max_new_tokens=8).text
    assert "".join(model.reply(conversation(QUESTION, [image]), max_new_tokens=8)) == expected


def test_forms_of_a_message_are_one(model: MultiModalModel) -> None:
    texts: list[Any] = [
        QUESTION,
        f" {QUESTION}\n",
        [{"type": "text", "text": QUESTION}],
        [{"type": "text", "text": f"\n{QUESTION[:5]}"}, {"type": "text", "text": f"{QUESTION[5:]} "}],
        ({"type": "text", "text": QUESTION},),
    ]
    assert len({tuple(read(model, [{"role": "user", "content": text}])) for text in texts}) == 1


def test_the_chat_that_was_given_stays(model: MultiModalModel) -> None:
    chat = conversation(QUESTION, [draw("red", 0)])
    image = chat[0]["content"][0]["image"]
    read(model, chat)
    assert chat[0]["content"][0] == {"type": "image", "image": image}


def test_typed_control_tokens_of_every_role_are_text(model: MultiModalModel) -> None:
    chat = [{"role": role, "content": IMAGE} for role in ("system", "user", "assistant", "user")]
    assert model.processor.image_token_id not in read(model, chat)


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([], "the chat has no message: end it with a question of the user"),
        ([{"role": "system", "content": "x"}], "ends with a message of the system: end it with a question"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}], "ends with a message of the assi"),
        ([{"role": "user", "content": " "}], "the prompt is empty: ask something about the picture"),
        ([{"role": "user", "content": None}], "the prompt is empty"),
        (conversation("", [draw("red", 0)]), "the prompt is empty"),
        ([{"role": "doctor", "content": "x"}], "message 1 has none of the roles system, user, assistant"),
        ([{"content": "x"}], "message 1 has none of the roles"),
        ("hello", "message 1 has none of the roles"),
        ([{"role": "user", "content": [{"type": "video"}]}], "message 1 has a part that is neither text nor a pict"),
        ([{"role": "user", "content": [{"type": "image"}]}], "neither text nor a picture: give a string, or a list"),
        ([{"role": "user", "content": ["x"]}], "neither text nor a picture"),
        (
            [{**conversation("x", [draw("red", 0)])[0], "role": "assistant"}, *conversation("x")],
            "message 1 is of the assistant and has a picture: show pictures as the user",
        ),
    ],
)
def test_bad_chats(model: MultiModalModel, chat: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        model.reply(chat)
