"""An endpoint that answers, and every way in which one may fail: each is told in a sentence, and no key ever is."""

from __future__ import annotations

import base64
import json
import socket
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.pipelines.chats import Said
from multimodal.pipelines.endpoint import LONGEST_SIDE, PROVIDERS, Endpoint, Price
from multimodal.pipelines.protocol import PipelineError, Usage
from tests.pipelines.endpoints import Reply, Scripted, refusing, saying

SECRET = "sk-very-secret-0123456789"
CHAT = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]


def ask(endpoint: Scripted, chat: Any = CHAT, **options: Any) -> Said:
    return Endpoint(endpoint.url, model="m", **options).ask(chat, max_new_tokens=8)


def failure(endpoint: Scripted, *replies: Reply | str, **options: Any) -> PipelineError:
    endpoint.script(*replies)
    with pytest.raises(PipelineError) as caught:
        ask(endpoint, **options)
    assert endpoint.url in str(caught.value)
    return caught.value


def test_an_answer(endpoint: Scripted) -> None:
    endpoint.script(Reply(saying(" An ", "apple. ", usage=(30, 4))))
    said = ask(endpoint, price=Price(2.0, 10.0))
    assert (said.text, said.usage, said.finished) == ("An apple.", Usage(30, 4, 0), True)
    assert said.cost == pytest.approx((30 * 2 + 4 * 10) / 1e6)
    assert 0 < said.first_token <= said.total
    (sent,) = endpoint.chats
    assert sent["messages"] == [{"role": "user", "content": "What is it?"}]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["stream"]) == ("m", 8, 0, True)


def test_the_first_token_comes_before_the_last(endpoint: Scripted) -> None:
    endpoint.script(Reply(saying("a"), pause=0.2))
    said = ask(endpoint)
    assert 0.2 <= said.first_token <= said.total


def test_without_usage_the_cost_is_not_known(endpoint: Scripted) -> None:
    endpoint.script(Reply(saying("a", usage=None)))
    said = ask(endpoint, price=Price(2.0, 10.0))
    assert (said.text, said.usage, said.cost) == ("a", Usage(), None)


def test_without_a_price_the_cost_is_not_known(endpoint: Scripted) -> None:
    assert ask(endpoint).cost is None
    assert ask(endpoint, price=Price(0, 0)).cost == 0


def test_an_answer_that_ran_into_its_limit_is_not_finished(endpoint: Scripted) -> None:
    endpoint.script(Reply(saying("a b c", reason="length")))
    assert not ask(endpoint).finished


def test_an_empty_answer_is_one(endpoint: Scripted) -> None:
    endpoint.script(Reply(saying()))
    said = ask(endpoint)
    assert said.text == "" and said.finished and said.first_token == said.total


def test_history_is_sent_in_order(endpoint: Scripted) -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": "Three?"},
    ]
    ask(endpoint, chat)
    assert [(each["role"], each["content"]) for each in endpoint.chats[0]["messages"]] == [
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Three?"),
    ]


def test_pictures_are_sent_as_text_and_no_larger_than_models_look_at(endpoint: Scripted, tmp_path: Path) -> None:
    Image.new("RGB", (2 * LONGEST_SIDE, 400), (10, 200, 30)).save(tmp_path / "wide.png")
    small = Image.new("RGB", (5, 4), (200, 10, 30))
    shown = [{"type": "image", "image": tmp_path / "wide.png"}, {"type": "image", "image": small}]
    said = ask(endpoint, [{"role": "user", "content": [*shown, {"type": "text", "text": "Which?"}]}])
    first, second, text = endpoint.chats[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "Which?"} and said.usage.images == 2
    for part, size, pixel in ((first, (LONGEST_SIDE, 200), (10, 200, 30)), (second, (5, 4), (200, 10, 30))):
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        sent = Image.open(BytesIO(base64.b64decode(data)))
        assert (sent.size, sent.getpixel((1, 1))) == (size, pixel)
    assert small.size == (5, 4)  # not made smaller in place


def test_nobody_answers_at_a_dead_port() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        PipelineError, match=f"{url} does not answer .*check the address, and that the endpoint runs"
    ) as caught:
        Endpoint(url, model="m").ask(CHAT, max_new_tokens=8)
    assert caught.value.passing


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "/v1"])
def test_no_address(url: str) -> None:
    with pytest.raises(PipelineError, match="not the address of an endpoint"):
        Endpoint(url)


def test_one_that_is_too_slow(endpoint: Scripted) -> None:
    error = failure(endpoint, Reply(saying("a"), pause=0.5), timeout=0.1)
    assert "took more than" in str(error) and error.passing


def test_the_key_is_read_from_the_environment(endpoint: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MY_KEY=another\n")
    monkeypatch.setenv("MY_KEY", SECRET)
    ask(endpoint, key="MY_KEY")
    assert endpoint.keys == [f"Bearer {SECRET}"]


def test_the_key_is_read_from_a_file(endpoint: Scripted) -> None:
    Path(".env").write_text(f"# keys\nMY_KEY='{SECRET}'\nOTHER=x\n")
    ask(endpoint, key="MY_KEY")
    assert endpoint.keys == [f"Bearer {SECRET}"]


def test_another_endpoints_key_is_not_sent(endpoint: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    ask(endpoint)
    assert endpoint.keys == [None]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_named(endpoint: Scripted, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(PipelineError, match=r"needs a key: set MY_KEY in the environment or in a \.env file"):
        ask(endpoint, key="MY_KEY")
    assert endpoint.chats == []


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key(endpoint: Scripted, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    error = failure(endpoint, refusing(code, f"Incorrect API key: {SECRET[:9]}..."), key="MY_KEY")
    assert "set MY_KEY to a key that it knows" in str(error) and not error.passing
    assert SECRET[:9] not in str(error)


@pytest.mark.parametrize(
    "reply",
    [
        refusing(400, f"you sent Bearer {SECRET}"),
        refusing(404, f"no model for {SECRET}"),
        refusing(500, f"{SECRET} broke us"),
        Reply(f'data: {{"error": {{"message": "{SECRET}"}}}}\n\n'),
        Reply(f"data: {SECRET}\n\n"),
        Reply(f"<html>{SECRET}</html>", kind="text/html"),
    ],
)
def test_no_message_has_the_key(endpoint: Scripted, monkeypatch: pytest.MonkeyPatch, reply: Reply) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    error = failure(endpoint, reply, key="MY_KEY")
    assert SECRET not in str(error)
    assert error.__cause__ is None and error.__suppress_context__  # nor what a traceback shows


def test_a_key_with_a_line_end_is_neither_refused_nor_shown(
    endpoint: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    ask(endpoint, key="MY_KEY")
    assert endpoint.keys == [f"Bearer {SECRET}"]
    monkeypatch.setenv("MY_KEY", f"{SECRET}\nx")
    with pytest.raises(PipelineError, match="MY_KEY holds a space, a line end") as caught:
        ask(endpoint, key="MY_KEY")
    assert SECRET not in str(caught.value)


def test_a_model_that_is_not_there(endpoint: Scripted) -> None:
    error = failure(endpoint, refusing(404, "The model `m` does not exist"))
    assert "404: " in str(error) and "does not exist" in str(error) and "the model's name" in str(error)
    assert not error.passing


def test_models_that_take_neither_the_old_length_nor_a_temperature(endpoint: Scripted) -> None:
    """As OpenAI's newer models refuse them."""
    length = {"param": "max_tokens", "code": "unsupported_parameter"}
    greedy = {"param": "temperature", "code": "unsupported_value"}
    refusals = [refusing(400, "Use 'max_completion_tokens' instead.", error=length)]
    refusals += [refusing(400, "'temperature' does not support 0 with this model.", error=greedy)]
    endpoint.script(*refusals, "yes")
    asked = Endpoint(endpoint.url, model="m")
    chat = [{"role": "user", "content": "?"}]
    assert [asked.ask(chat, max_new_tokens=5).text for _ in range(2)] == ["yes", "yes"]
    told = [{key: each[key] for key in ("max_tokens", "max_completion_tokens", "temperature") if key in each}
            for each in endpoint.chats]  # fmt: skip
    assert told == [
        {"max_tokens": 5, "temperature": 0},
        {"max_completion_tokens": 5, "temperature": 0},
        {"max_completion_tokens": 5},
        {"max_completion_tokens": 5},  # once learned, it is kept
    ]


def test_what_else_a_model_refuses_is_told(endpoint: Scripted) -> None:
    error = failure(endpoint, refusing(400, "no streams", error={"param": "stream", "code": "unsupported_value"}))
    assert "no streams" in str(error) and len(endpoint.chats) == 1


@pytest.mark.parametrize("code", [400, 422])
def test_what_asking_again_does_not_mend(endpoint: Scripted, code: int) -> None:
    error = failure(endpoint, refusing(code, "context of 4096 tokens exceeded"))
    assert "context of 4096 tokens exceeded" in str(error) and not error.passing


@pytest.mark.parametrize(
    ("reply", "wait"),
    [
        (refusing(429, "slow down", retry_after="7"), 7.0),
        (refusing(429, "slow down", retry_after="1.5"), 1.5),
        (refusing(503, "later", retry_after="Wed, 21 Oct 2026 07:28:00 GMT"), None),
        (refusing(500, "oops"), None),
        (refusing(408, "oops"), None),
    ],
)
def test_what_asking_again_may_mend_and_then_does(endpoint: Scripted, reply: Reply, wait: float | None) -> None:
    error = failure(endpoint, reply, "yes")
    assert error.passing and error.retry_after == wait
    assert len(endpoint.chats) == 1  # whoever runs the questions decides about asking again
    assert ask(endpoint).text == "yes"


@pytest.mark.parametrize(
    "reply",
    [
        Reply("<html><body>Welcome</body></html>", kind="text/html; charset=utf-8"),
        Reply('{"broken": ', kind="application/json"),
        Reply(json.dumps({"hello": "world"}), kind="application/json"),
        Reply("data: {broken\n\n"),
        Reply("data: [1, 2]\n\n"),
        Reply('data: {"choices": [{"index": 0}]}\n\n'),
        Reply("", kind="text/plain"),
    ],
)
def test_something_else_answers(endpoint: Scripted, reply: Reply) -> None:
    error = failure(endpoint, reply)
    assert "not as an OpenAI-compatible endpoint does" in str(error) and "/v1" in str(error)
    assert not error.passing and len(str(error)) < 500


def test_an_error_in_the_middle_of_a_stream(endpoint: Scripted) -> None:
    begun = saying("half", reason=None, usage=None, end=False)
    error = failure(endpoint, Reply(f'{begun}data: {{"error": {{"message": "out of memory"}}}}\n\n'))
    assert "out of memory" in str(error)


def test_a_connection_that_is_cut_in_the_middle(endpoint: Scripted) -> None:
    body = saying("half", " of it")
    error = failure(endpoint, Reply(body, cut=len(body) // 3), "whole")
    assert error.passing
    assert ask(endpoint).text == "whole"


def test_a_stream_that_ends_too_early(endpoint: Scripted) -> None:
    error = failure(endpoint, Reply(saying("half", reason=None, end=False)), "whole")
    assert "broke off in the middle of an answer" in str(error) and error.passing


def test_the_only_model_is_found(endpoint: Scripted) -> None:
    endpoint.models = ("only",)
    Endpoint(endpoint.url).ask(CHAT, max_new_tokens=8)
    assert endpoint.chats[0]["model"] == "only"


@pytest.mark.parametrize(("models", "said"), [(("a", "b"), "has a, b: name the model"), ((), "has no model")])
def test_which_model_is_meant_must_be_told(endpoint: Scripted, models: tuple[str, ...], said: str) -> None:
    endpoint.models = models
    with pytest.raises(PipelineError, match=said):
        Endpoint(endpoint.url).ask(CHAT, max_new_tokens=8)
    assert endpoint.chats == []


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("http://localhost:8000/v1", False),
        ("http://127.0.0.1/v1", False),
        ("http://[::1]:8/v1", False),
        ("http://192.168.0.7:8000/v1", True),
        ("https://api.openai.com/v1", True),
    ],
)
def test_what_leaves_this_machine(url: str, remote: bool) -> None:
    assert Endpoint(url).remote is remote


def test_a_price_is_by_the_million() -> None:
    assert Price(3.0, 15.0).of(Usage(1_000_000, 0)) == 3
    assert Price(3.0, 15.0).of(Usage(1000, 200)) == pytest.approx(0.003 + 0.003)


def test_what_is_paid_for_needs_a_key_and_what_is_not_is_here() -> None:
    for provider in PROVIDERS.values():
        assert Endpoint(provider.url).remote == bool(provider.key)


def test_another_model_or_address_is_another_digest() -> None:
    digests = [
        Endpoint("http://h/v1", model="a").digest,
        Endpoint("http://h/v1", model="b").digest,
        Endpoint("http://g/v1", model="a").digest,
    ]
    assert len(set(digests)) == 3
    assert Endpoint("http://h/v1/", model="a").digest == digests[0]
