"""Several answers to one question, what else the model might have said, and what pictures count."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from multimodal.model import MultiModalModel
from tests.service.conftest import QUESTION, asking
from tests.service.test_chat import ask, streamed
from tests.training.tiny import draw

SAMPLED: dict[str, Any] = {"temperature": 3.0, "seed": 7}


def test_every_choice_has_the_next_seed(client: OpenAI) -> None:
    said = ask(client, asking(QUESTION, draw("red", 0)), n=3, **SAMPLED)
    alone = [ask(client, asking(QUESTION, draw("red", 0)), temperature=3.0, seed=7 + number) for number in range(3)]
    assert [choice.index for choice in said.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in said.choices]
    assert texts == [its.choices[0].message.content for its in alone] and len(set(texts)) > 1
    assert said.usage.completion_tokens == 36 and said.usage.prompt_tokens == alone[0].usage.prompt_tokens


def test_choices_are_equal_streamed_and_not(client: OpenAI) -> None:
    options = {**SAMPLED, "n": 3, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, asking(QUESTION, draw("red", 0)), **options)
    chunks = streamed(client, asking(QUESTION, draw("red", 0)), stream_options={"include_usage": True}, **options)
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine if piece.finish_reason] == [choice.finish_reason]
        tokens = [entry.token for piece in mine if piece.logprobs for entry in piece.logprobs.content]
        assert tokens == [entry.token for entry in choice.logprobs.content]


def test_top_logprobs_are_the_likeliest(client: OpenAI) -> None:
    said = ask(client, asking(QUESTION, draw("red", 0)), logprobs=True, top_logprobs=5).choices[0]
    for entry in said.logprobs.content:
        top = [other.logprob for other in entry.top_logprobs]
        assert len(top) == 5 and top == sorted(top, reverse=True) and all(value <= 0 for value in top)
        assert top[0] == pytest.approx(entry.logprob, abs=1e-5)  # greedy takes the likeliest
        assert all(bytes(other.bytes) == other.token.encode() for other in entry.top_logprobs)
    shown = "".join(entry.top_logprobs[0].token for entry in said.logprobs.content)
    assert shown.strip().startswith(said.message.content[:2])


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_usage_counts_pictures(client: OpenAI, model: MultiModalModel, pictures: int) -> None:
    shown = [draw("red", seed) for seed in range(pictures)]
    usage = ask(client, asking(QUESTION, *shown)).usage
    assert usage.prompt_tokens_details.model_dump()["image_tokens"] == pictures
    assert usage.prompt_tokens == model(QUESTION, shown, max_new_tokens=1).usage.prompt_tokens
