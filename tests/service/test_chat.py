"""Answers through OpenAI's own client: equal to the model's, equal streamed and not, with all that they say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from multimodal.adapters import digest_of
from multimodal.model import MultiModalModel, conversation
from tests.service.conftest import NAME, QUESTION, asking, uri
from tests.training.tiny import draw

COLOURS = ("red", "green", "blue", "white")


def ask(client: OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(messages=messages, **{"model": NAME, "max_tokens": 12, **options})


def streamed(client: OpenAI, messages: Any, **options: Any) -> list[Any]:
    return list(ask(client, messages, stream=True, **options))


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def same(entries: list[Any], others: list[Any]) -> bool:
    """The same logprobs; the last digits hang on what the engine knew of the prompt already."""
    return [entry.token for entry in entries] == [other.token for other in others] and (
        [entry.logprob for entry in entries] == pytest.approx([other.logprob for other in others], abs=1e-5)
    )


class TestAnswer:
    def test_is_the_models(self, client: OpenAI, model: MultiModalModel) -> None:
        said = ask(client, asking(QUESTION, draw("red", 0)))
        answer = model(QUESTION, draw("red", 0), max_new_tokens=12)
        (choice,) = said.choices
        assert choice.message.content == answer.text != "" and choice.message.role == "assistant"
        assert choice.finish_reason == "length" and choice.logprobs is None and choice.index == 0
        assert said.object == "chat.completion" and said.model == NAME and said.id.startswith("chatcmpl-")
        assert said.usage.prompt_tokens == answer.usage.prompt_tokens
        assert said.usage.completion_tokens == 12
        assert said.system_fingerprint == f"fp_{digest_of(model.model)[:12]}"
        assert said.usage.total_tokens == answer.usage.prompt_tokens + 12

    def test_text_alone_in_both_forms(self, client: OpenAI, model: MultiModalModel) -> None:
        expected = model(QUESTION, max_new_tokens=12).text
        for content in (QUESTION, [{"type": "text", "text": QUESTION}], f" {QUESTION}\n"):
            assert ask(client, [{"role": "user", "content": content}]).choices[0].message.content == expected

    def test_its_own_end(self, client: OpenAI, model: MultiModalModel, monkeypatch: pytest.MonkeyPatch) -> None:
        long = ask(client, asking(QUESTION), logprobs=True)
        ids = model.stream(QUESTION, max_new_tokens=12)
        list(ids)
        end = ids.generation.tokens[5].id
        first = [token.id for token in ids.generation.tokens].index(end)
        monkeypatch.setattr(model.model.generation_config, "eos_token_id", end)
        said = ask(client, asking(QUESTION), logprobs=True)
        assert said.choices[0].finish_reason == "stop" and said.usage.completion_tokens == first + 1
        assert same(said.choices[0].logprobs.content, long.choices[0].logprobs.content[:first])
        assert streamed(client, asking(QUESTION))[-1].choices[0].finish_reason == "stop"

    def test_only_the_picture_counts(self, client: OpenAI, model: MultiModalModel) -> None:
        def about(colour: str, max_tokens: int = 12) -> Any:
            return ask(client, asking(QUESTION, draw(colour, 0)), max_tokens=max_tokens)

        said = {colour: about(colour) for colour in COLOURS}
        assert len({its.choices[0].message.content for its in said.values()}) > 1
        assert len({its.usage.prompt_tokens for its in said.values()}) == 1
        for colour in COLOURS:
            assert said[colour].choices[0].message.content == model(QUESTION, draw(colour, 0), max_new_tokens=12).text

    def test_two_pictures_and_their_order(self, client: OpenAI, model: MultiModalModel) -> None:
        red, blue = draw("red", 0), draw("blue", 1)
        alone = ask(client, asking(QUESTION)).usage.prompt_tokens
        for pictures in ([red, blue], [blue, red]):
            said = ask(client, asking(QUESTION, *pictures))
            assert said.choices[0].message.content == model(QUESTION, pictures, max_new_tokens=12).text
            assert said.usage.prompt_tokens == alone + 2

    def test_a_whole_chat(self, client: OpenAI, model: MultiModalModel) -> None:
        image = draw("green", 2)
        first = ask(client, asking(QUESTION, image)).choices[0].message
        chat = [*conversation(QUESTION, [image]), {"role": "assistant", "content": first.content}]
        expected = "".join(model.reply([*chat, *conversation("Is it red?")], max_new_tokens=12))
        # the client's own message object goes back as it came
        said = ask(client, [*asking(QUESTION, image), first, {"role": "user", "content": "Is it red?"}])
        assert said.choices[0].message.content == expected != first.content

    def test_system_and_developer_are_one(self, client: OpenAI) -> None:
        said = [ask(client, [{"role": role, "content": "red"}, *asking(QUESTION)]) for role in ("system", "developer")]
        assert said[0].choices == said[1].choices and said[0].usage == said[1].usage
        assert said[0].usage.prompt_tokens > ask(client, asking(QUESTION)).usage.prompt_tokens


class TestStream:
    @pytest.mark.parametrize("options", [{}, {"logprobs": True}, {"temperature": 3.0, "seed": 4, "top_p": 0.9}])
    def test_equals_the_whole(self, client: OpenAI, options: dict[str, Any]) -> None:
        messages = asking(QUESTION, draw("red", 0))
        whole = ask(client, messages, **options)
        chunks = streamed(client, messages, stream_options={"include_usage": True}, **options)
        assert text_of(chunks) == whole.choices[0].message.content
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        entries = [
            entry
            for chunk in chunks[:-1]
            for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
        ]
        assert same(entries, whole.choices[0].logprobs.content if options.get("logprobs") else [])

    def test_has_openais_shape(self, client: OpenAI) -> None:
        first, *pieces, last = streamed(client, asking(QUESTION))
        assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
        assert pieces and all(piece.choices[0].delta.content for piece in pieces)
        assert {piece.choices[0].finish_reason for piece in [first, *pieces]} == {None}
        assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
        assert len({chunk.id for chunk in [first, *pieces, last]}) == 1
        assert {chunk.object for chunk in [first, *pieces, last]} == {"chat.completion.chunk"}
        assert last.usage is None
        assert first.system_fingerprint and {chunk.system_fingerprint for chunk in [first, *pieces, last]} == {
            first.system_fingerprint
        }

    def test_lines(self, client: OpenAI) -> None:
        with client.chat.completions.with_streaming_response.create(
            model=NAME, max_tokens=3, stream=True, messages=asking(QUESTION)
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"


class TestOptions:
    def test_stop(self, client: OpenAI) -> None:
        text = ask(client, asking(QUESTION), max_tokens=30).choices[0].message.content
        for stop in (text[6:8], ["never said", text[6:8]]):
            said = ask(client, asking(QUESTION), max_tokens=30, stop=stop)
            assert said.choices[0].message.content == text[: text.index(text[6:8])].strip()
            assert said.choices[0].finish_reason == "stop" and said.usage.completion_tokens < 30
            assert text_of(streamed(client, asking(QUESTION), max_tokens=30, stop=stop)) == (
                said.choices[0].message.content
            )

    def test_seed(self, client: OpenAI) -> None:
        def sampled(seed: int | None) -> str:
            return ask(client, asking(QUESTION), temperature=3.0, seed=seed).choices[0].message.content

        assert sampled(5) == sampled(5)
        assert len({sampled(seed) for seed in range(4)}) > 1 and len({sampled(None) for _ in range(4)}) > 1

    def test_logprobs(self, client: OpenAI, model: MultiModalModel) -> None:
        said = ask(client, asking(QUESTION, draw("red", 0)), logprobs=True, top_logprobs=0).choices[0]
        stream = model.stream(QUESTION, draw("red", 0), max_new_tokens=12)
        list(stream)
        assert [entry.logprob for entry in said.logprobs.content] == pytest.approx(
            [token.logprob for token in stream.generation.tokens], abs=1e-5
        )
        joined = "".join(entry.token for entry in said.logprobs.content).strip()
        cut = "\N{REPLACEMENT CHARACTER}"  # the length limit may come within a character
        assert joined.rstrip(cut) == said.message.content.rstrip(cut)
        assert all(bytes(entry.bytes) == entry.token.encode() for entry in said.logprobs.content)
        assert all(entry.top_logprobs == [] for entry in said.logprobs.content)

    def test_length_limits(self, client: OpenAI) -> None:
        assert ask(client, asking(QUESTION), max_tokens=3).usage.completion_tokens == 3
        assert ask(client, asking(QUESTION), max_completion_tokens=4).usage.completion_tokens == 4

    def test_what_changes_nothing_is_taken(self, client: OpenAI) -> None:
        said = ask(
            client,
            asking(QUESTION),
            n=1,
            user="me",
            metadata={"a": "b"},
            frequency_penalty=0,
            response_format={"type": "text"},
            tools=[],
            temperature=None,
        )
        assert said.choices == ask(client, asking(QUESTION)).choices

    def test_detail_of_a_picture_is_ignored(self, client: OpenAI) -> None:
        messages = asking(QUESTION, draw("red", 0))
        before = ask(client, messages).choices
        messages[0]["content"][0]["image_url"]["detail"] = "low"
        assert ask(client, messages).choices == before


def test_many_at_once_answer_as_alone(client: OpenAI) -> None:
    asked = [asking(question, draw(colour, 0)) for question in (QUESTION, "Is it red?") for colour in COLOURS]
    alone = [ask(client, messages).choices for messages in asked]
    with ThreadPoolExecutor(8) as pool:
        whole = pool.map(lambda messages: ask(client, messages).choices, asked)
        pieces = pool.map(lambda messages: text_of(streamed(client, messages)), asked)
        assert list(whole) == alone
        assert list(pieces) == [choices[0].message.content for choices in alone]


def test_a_picture_may_be_in_any_case_of_letters(client: OpenAI) -> None:
    shouted = uri(draw("red", 0)).replace("data:", "DATA:")
    assert ask(client, asking(QUESTION, shouted)).choices == ask(client, asking(QUESTION, draw("red", 0))).choices
