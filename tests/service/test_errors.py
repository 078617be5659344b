"""Every refusal in OpenAI's form, with the remedy, as its client raises it."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from multimodal.model import MultiModalModel
from tests.service.conftest import NAME, QUESTION, Slow, asking, client_of, wait_for
from tests.training.tiny import draw


def refused(client: OpenAI, messages: Any = None, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": messages or asking(QUESTION), **options})
    body: Any = caught.value.response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]
    return caught.value


class TestBadRequest:
    @pytest.mark.parametrize(
        ("options", "param", "says"),
        [
            ({"n": 0}, "n", "greater than or equal to 1"),
            ({"n": 9}, "n", "9 choices exceed the server's 8: lower n"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
            ({"top_logprobs": 3}, "body", "top_logprobs needs logprobs: true"),
            ({"max_tokens": 3000}, "max_tokens", "3,000 tokens exceed the server's 2,048: lower max_tokens"),
            ({"metadata": {"session_id": "a b"}}, "metadata.session_id", "should match pattern"),
            ({"temperature": -1}, "temperature", "greater than or equal to 0"),
            ({"temperature": "hot"}, "temperature", "valid number"),
            ({"top_p": 0}, "top_p", "greater than 0"),
            ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
            ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
            ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
            ({"seed": 2**63}, "seed", "less than"),
            ({"stop": [1]}, "stop[0]", "valid string"),
            ({"stream": "yes"}, "stream", "valid boolean"),
            ({"frequency_penalty": 0.5}, "frequency_penalty", "can only be 0 here"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "can only be"),
            ({"response_format": {"type": "json_object"}}, "response_format", "can only be"),
            ({"extra_body": {"top_k": 4}}, "top_k", "unknown here: leave it out"),
        ],
    )
    def test_parameters(self, client: OpenAI, options: dict[str, Any], param: str, says: str) -> None:
        error = refused(client, **options)
        assert isinstance(error, openai.BadRequestError) and error.type == "invalid_request_error"
        assert error.param == param and says in error.message

    @pytest.mark.parametrize(
        ("messages", "says"),
        [
            ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].role"),
            ([{"role": "user"}], "messages[0].content: Field required"),
            ([{"role": "user", "content": 3}], "messages[0].content: Input should be a valid list"),
            ([{"role": "user", "content": [{"type": "text"}]}], "a part of type text needs 'text'"),
            ([{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}], "messages[0].content[0].type"),
            ([{"role": "user", "content": " \n"}], "the prompt is empty: ask something"),
            ([{"role": "user", "content": []}], "the prompt is empty: ask something"),
            (asking("", draw("red", 0)), "the prompt is empty: ask something"),
            ([*asking(QUESTION), {"role": "assistant", "content": "red"}], "end it with a question of the user"),
            ([{**asking(QUESTION, draw("red", 0))[0], "role": "system"}, *asking(QUESTION)], "show pictures as the"),
            (asking("Is it red? " * 50), "shorten it, or lower max_tokens"),
            (asking(QUESTION, *[draw("red", 0)] * 33), "33 pictures exceed the server's 32: send fewer"),
            (asking("x" * 200_001), "200,001 characters exceed the server's 200,000: shorten the prompt"),
        ],
    )
    def test_messages(self, client: OpenAI, messages: Any, says: str) -> None:
        error = refused(client, messages)
        assert error.status_code == 400 and says in error.message

    def test_no_message(self, url: str) -> None:
        said = httpx.post(f"{url}/chat/completions", json={"model": NAME, "messages": []})
        assert said.status_code == 400 and said.json()["error"]["param"] == "messages"

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[1]", b"\xff", b'{"model": NaN}', b'{"model": "\\ud800"}', b"[" * 5000]
    )
    def test_no_json(self, url: str, body: bytes) -> None:
        said = httpx.post(f"{url}/chat/completions", content=body)
        assert said.status_code == 400 and said.json()["error"]["code"] == "invalid_json"


class TestPictures:
    @pytest.mark.parametrize("address", ["http://127.0.0.1:1/secret.png", "HTTPS://example.org/secret.png"])
    def test_nothing_is_fetched(self, client: OpenAI, address: str) -> None:
        error = refused(client, asking(QUESTION, address))
        assert error.status_code == 400 and error.param == "messages[0].content[0].image_url.url"
        assert "nothing is fetched from there: send the picture itself, as a data-URI" in error.message
        assert "secret" not in error.message

    @pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "picture.png", ""])
    def test_no_file_is_opened(self, client: OpenAI, path: str) -> None:
        error = refused(client, asking(QUESTION, path))
        assert error.status_code == 400 and "picture 1 is not a data-URI: send the picture itself" in error.message

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ("data:image/png;base64,????", "can't be decoded"),
            ("data:image/png;base64,", "is empty"),
            ("data:image/png;base64,aGVsbG8=", "is text, not a picture"),
        ],
    )
    def test_it_is_named(self, client: OpenAI, data: str, says: str) -> None:
        error = refused(client, asking(QUESTION, draw("red", 0), data))
        assert error.status_code == 400 and error.code == "invalid_image"
        assert error.message.count(f"picture 2 {says}") and error.param == "messages"


class TestOthers:
    def test_an_unknown_model(self, client: OpenAI) -> None:
        for name in ("gpt-4o", f"{NAME}:nobodys", ""):
            error = refused(client, model=name)
            assert isinstance(error, openai.NotFoundError) and error.code == "model_not_found"
            assert f"use {NAME}" in error.message and error.param == "model"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")

    def test_an_unknown_address_or_method(self, url: str) -> None:
        for method, path, status in (("GET", "/embeddings", 404), ("GET", "/chat/completions", 405)):
            said = httpx.request(method, url + path)
            assert said.status_code == status and "POST /v1/chat/completions" in said.json()["error"]["message"]

    def test_a_body_that_is_too_large(self, client: OpenAI, url: str) -> None:
        error = refused(client, asking("x" * (32 * 2**20)))
        assert error.status_code == 413 and "more than 32 MiB: send smaller pictures" in error.message

        def unannounced() -> Any:
            yield from [b" " * 2**20] * 33

        assert httpx.post(f"{url}/chat/completions", content=unannounced()).status_code == 413

    def test_a_full_engine(self, client: OpenAI, model: MultiModalModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model.engine, "queue", 0)
        for stream in (False, True):
            error = refused(client, stream=stream)
            assert isinstance(error, openai.RateLimitError) and error.type == "rate_limit_error"
            assert int(error.response.headers["Retry-After"]) >= 1 and "ask again in a moment" in error.message

    def test_the_client_asks_a_full_engine_again(
        self, url: str, model: MultiModalModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit = model.engine.submit
        refusals: list[Any] = []

        def once(request: Any) -> Any:
            if not refusals:
                refusals.append(request)
                monkeypatch.setattr(model.engine, "queue", 0)
            else:
                monkeypatch.setattr(model.engine, "queue", 256)
            return submit(request)

        monkeypatch.setattr(model.engine, "queue", 256)
        monkeypatch.setattr(model.engine, "submit", once)
        with client_of(url).with_options(max_retries=1) as patient:
            said = patient.chat.completions.create(model=NAME, messages=asking(QUESTION), max_tokens=2)
        assert refusals and said.choices[0].message.content is not None

    def test_an_error_of_the_model(
        self, client: OpenAI, model: MultiModalModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Slow(model, fail_at=3):
            error = refused(client)
        assert isinstance(error, openai.InternalServerError) and error.type == "server_error"
        assert "RuntimeError" in error.message and "steam" not in error.message
        assert "out of steam" in caplog.text
        assert client.chat.completions.create(model=NAME, messages=asking(QUESTION), max_tokens=2).choices

    def test_an_error_in_the_middle_of_a_stream(self, client: OpenAI, model: MultiModalModel) -> None:
        with Slow(model, fail_at=4):
            stream = client.chat.completions.create(model=NAME, messages=asking(QUESTION), stream=True)
            with pytest.raises(openai.APIError, match="the server failed while it answered"):
                list(stream)
        wait_for(lambda: not model.engine._jobs())
