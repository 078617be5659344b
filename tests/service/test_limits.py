"""What is refused, what waits, and what becomes of answers when time is up or the server stops."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from multimodal.model import MultiModalModel
from multimodal.service import ServiceSettings, serving
from tests.service.conftest import NAME, QUESTION, Slow, asking, client_of, wait_for
from tests.test_decoding import endless
from tests.training.tiny import draw

SETTINGS = ServiceSettings(grace_seconds=0)


def ask(url: str, messages: Any = None, **options: Any) -> Any:
    with client_of(url) as client:
        options = {"model": NAME, "messages": messages or asking(QUESTION), "max_tokens": 5, **options}
        said = client.chat.completions.create(**options)
        return list(said) if options.get("stream") else said


@pytest.mark.parametrize(
    ("limit", "messages", "status", "says"),
    [
        ({"body_bytes": 500}, asking("x" * 500), 413, "more than 500 bytes"),
        ({"held_bytes": 500}, asking("x" * 500), 429, "holds as many pictures as it can"),
        ({"pictures": 1}, asking(QUESTION, draw("red", 0), draw("red", 1)), 400, "2 pictures exceed the server's 1"),
        ({"pixels": 1000}, asking(QUESTION, draw("red", 0)), 400, "picture 1 is 40 x 36 pixels; all in all 1,000 are"),
        ({"characters": 10}, asking(QUESTION), 400, "20 characters exceed the server's 10: shorten the prompt"),
        ({"answer_tokens": 4}, asking(QUESTION), 400, "5 tokens exceed the server's 4: lower max_tokens"),
    ],
)
def test_each_limit_is_told(
    model: MultiModalModel, limit: dict[str, int], messages: Any, status: int, says: str
) -> None:
    with serving(model, name=NAME, settings=replace(SETTINGS, **limit)) as url:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(url, messages)
        assert caught.value.status_code == status and says in caught.value.message
        for _ in range(3):  # what was refused holds nothing back
            with pytest.raises(openai.APIStatusError):
                ask(url, messages)


def test_a_small_file_of_many_pixels_is_not_decoded(client: openai.OpenAI) -> None:
    file = BytesIO()
    Image.new("1", (8000, 7000)).save(file, "PNG")
    bomb = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert len(file.getvalue()) < 100_000
    with pytest.raises(openai.BadRequestError, match="8,000 x 7,000 pixels; all in all 50,000,000 are read"):
        client.chat.completions.create(model=NAME, messages=asking(QUESTION, bomb))


def test_a_picture_that_takes_too_long_is_refused_and_others_are_answered(model: MultiModalModel) -> None:
    slow = f"data:image/jpeg;base64,{base64.b64encode(endless()).decode()}"
    with serving(model, name=NAME, settings=replace(SETTINGS, decode_seconds=1)) as url:
        with pytest.raises(openai.BadRequestError, match="picture 2 takes longer than 1 seconds to decode") as caught:
            ask(url, asking(QUESTION, draw("red", 0), slow))
        assert caught.value.code == "invalid_image"
        assert ask(url, asking(QUESTION, draw("red", 0))).choices


class TestBackPressure:
    def test_who_finds_no_place_to_wait_is_told_when_to_come_back(self, model: MultiModalModel) -> None:
        with serving(model, name=NAME, settings=replace(SETTINGS, waiting=4)) as url, Slow(model, pause=0.05):

            def status(_: int) -> int:
                body = {"model": NAME, "messages": asking(QUESTION), "max_tokens": 10}
                said = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
                assert said.status_code == 200 or int(said.headers["Retry-After"]) >= 1
                return said.status_code

            with ThreadPoolExecutor(24) as pool:
                found = list(pool.map(status, range(24)))
        assert found.count(429) >= 4 and found.count(200) == 24 - found.count(429) >= 12

    def test_who_leaves_while_waiting_is_not_answered(self, model: MultiModalModel) -> None:
        with serving(model, name=NAME, settings=SETTINGS) as url, Slow(model, pause=0.05):
            threads = [threading.Thread(target=ask, args=(url,), kwargs={"max_tokens": 20}) for _ in range(8)]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(model.engine._jobs()) == 8)
            with pytest.raises(openai.APITimeoutError), client_of(url).with_options(timeout=0.2) as client:
                client.chat.completions.create(model=NAME, messages=asking("Is it red?"), max_tokens=200)
            for thread in threads:
                thread.join()
            wait_for(lambda: not model.engine._jobs())

    def test_who_waits_too_long_is_told(self, model: MultiModalModel) -> None:
        settings = replace(SETTINGS, queue_seconds=0.1)
        with (
            serving(model, name=NAME, settings=settings) as url,
            Slow(model, pause=0.05),
            ThreadPoolExecutor(8) as pool,
        ):
            busy = [pool.submit(ask, url, max_tokens=20) for _ in range(8)]
            wait_for(lambda: len(model.engine._jobs()) == 8)
            with pytest.raises(openai.InternalServerError, match=r"no turn came within 0\.1 seconds") as caught:
                ask(url)
            assert caught.value.status_code == 503 and int(caught.value.response.headers["Retry-After"]) >= 1
            assert all(its.result().choices for its in busy)

    @pytest.mark.parametrize("stream", [True, False])
    def test_an_answer_that_takes_too_long_ends(self, model: MultiModalModel, stream: bool) -> None:
        settings = replace(SETTINGS, answer_seconds=0.5)
        with serving(model, name=NAME, settings=settings) as url, Slow(model, pause=0.05):
            with pytest.raises(openai.APIError, match=r"longer than 0\.5 seconds: ask for fewer tokens"):
                ask(url, max_tokens=200, stream=stream)
            wait_for(lambda: not model.engine._jobs())


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_stops_finishes_what_it_has_begun(model: MultiModalModel, stream: bool) -> None:
    expected = ask_text(model)
    with Slow(model, pause=0.05), ThreadPoolExecutor(1) as pool:
        with serving(model, name=NAME, settings=ServiceSettings(grace_seconds=30)) as url:
            begun = pool.submit(ask, url, max_tokens=20, stream=stream)
            wait_for(lambda: any(job.generation.tokens for job in model.engine._jobs()))
        said = begun.result()
    text = "".join(c.choices[0].delta.content or "" for c in said) if stream else said.choices[0].message.content
    assert text == expected


def ask_text(model: MultiModalModel) -> str:
    return model(QUESTION, max_new_tokens=20).text


class TestPicturesByAddress:
    def test_an_allowed_host_that_leads_home_is_refused(self, model: MultiModalModel) -> None:
        settings = replace(SETTINGS, allowed_hosts=frozenset({"localhost", "127.0.0.1"}))
        with serving(model, name=NAME, settings=settings) as url:
            for address in ("http://localhost/a.png", "http://127.0.0.1/a.png"):
                with pytest.raises(openai.BadRequestError, match="picture 1 leads into a private network"):
                    ask(url, asking(QUESTION, address))
            for address in ("http://2130706433/a.png", "http://[::1]/a.png", "https://example.org/a.png"):
                with pytest.raises(openai.BadRequestError, match="picture 1 is of a host that is not allowed"):
                    ask(url, asking(QUESTION, address))

    @pytest.mark.parametrize("path", ["/etc/hostname", "file:///etc/hostname", "~/picture.png"])
    def test_no_path_is_read(self, model: MultiModalModel, path: str, tmp_path: Path) -> None:
        draw("red", 0).save(tmp_path / "here.png")
        settings = replace(SETTINGS, allowed_hosts=frozenset({"localhost"}))
        with serving(model, name=NAME, settings=settings) as url:
            for address in (path, str(tmp_path / "here.png"), f"file://localhost{tmp_path}/here.png"):
                with pytest.raises(openai.BadRequestError, match="picture 1 is not a data-URI"):
                    ask(url, asking(QUESTION, address))


@pytest.mark.parametrize("path", ["/health", "/docs", "/v1/models", "/v1/nothing", "/v1/chat/completions"])
def test_browsers_are_told_to_run_nothing(url: str, path: str) -> None:
    said = httpx.get(url.removesuffix("/v1") + path)
    assert said.headers["X-Content-Type-Options"] == "nosniff"
    assert said.headers["Content-Security-Policy"].startswith("default-src 'none'; frame-ancestors 'none'")
    assert len(said.headers["X-Request-Id"]) == 32
