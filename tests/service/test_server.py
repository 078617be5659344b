"""What is served, to whom, for how long: models, health, callers who leave, shutting down, and the command."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from multimodal.cli import main
from multimodal.model import MultiModalModel
from multimodal.service import serve, serving
from tests.service.conftest import NAME, QUESTION, Slow, asking, client_of, wait_for
from tests.training.tiny import draw


def test_models_and_health(client: OpenAI, url: str) -> None:
    (model,) = client.models.list()
    assert model.id == NAME and model.object == "model" and client.models.retrieve(NAME) == model
    said = httpx.get(url.removesuffix("/v1") + "/health")
    assert said.status_code == 200 and said.json() == {"status": "ok", "model": NAME}


def test_adapters_are_models(checkpoint: Path, adapter: Path) -> None:
    model = MultiModalModel.from_pretrained(checkpoint, adapter=adapter, dtype=torch.float32)
    image = draw("red", 0)
    expected = {None: model(QUESTION, image, adapter=None).text, "mine": model(QUESTION, image).text}
    assert len(set(expected.values())) == 2
    with serving(model, name=NAME) as url, client_of(url) as client:
        assert [its.id for its in client.models.list()] == [NAME, f"{NAME}:mine"]
        assert client.models.retrieve(f"{NAME}:mine").id == f"{NAME}:mine"
        for name, text in ((NAME, expected[None]), (f"{NAME}:mine", expected["mine"])):
            said = client.chat.completions.create(model=name, messages=asking(QUESTION, image))
            assert said.choices[0].message.content == text and said.model == name


class TestCallersWhoLeave:
    def test_in_the_middle_of_a_stream(self, client: OpenAI, model: MultiModalModel) -> None:
        with Slow(model, pause=0.05) as slow:
            stream: Any = client.chat.completions.create(
                model=NAME, messages=asking(QUESTION), stream=True, max_tokens=200
            )
            for _ in range(3):
                next(iter(stream))
            stream.close()
            wait_for(lambda: not model.engine._jobs())
            assert slow.done < 100

    def test_while_they_wait_for_the_whole(self, client: OpenAI, model: MultiModalModel) -> None:
        with Slow(model, pause=0.05) as slow:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).chat.completions.create(
                    model=NAME, messages=asking(QUESTION), max_tokens=200
                )
            wait_for(lambda: not model.engine._jobs())
            assert slow.done < 100

    @pytest.mark.parametrize("stream", [True, False])
    def test_the_model_is_free_within_one_token(self, url: str, model: MultiModalModel, stream: bool) -> None:
        body = json.dumps({"model": NAME, "messages": asking(QUESTION), "max_tokens": 200, "stream": stream}).encode()
        address = httpx.URL(url)
        with Slow(model, pause=0.3) as slow:
            with socket.create_connection((address.host, address.port)) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                wait_for(lambda: slow.done >= 3)
            done = slow.done
            wait_for(lambda: not model.engine._jobs())
            assert slow.done <= done + 1  # the step that was being computed, and perhaps the next

    def test_before_they_have_sent_everything(self, client: OpenAI, url: str) -> None:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            connection.sendall(head.encode())
            time.sleep(0.1)
        assert client.models.list()

    def test_others_are_left_alone(self, client: OpenAI, model: MultiModalModel) -> None:
        expected = model(QUESTION, max_new_tokens=30).text
        with Slow(model):
            leaving: Any = client.chat.completions.create(
                model=NAME, messages=asking("Is it red?"), stream=True, max_tokens=200
            )
            staying: Any = client.chat.completions.create(
                model=NAME, messages=asking(QUESTION), stream=True, max_tokens=30
            )
            next(iter(leaving))
            leaving.close()
            assert "".join(chunk.choices[0].delta.content or "" for chunk in staying) == expected


def test_others_are_heard_while_an_answer_is_written(url: str, client: OpenAI, model: MultiModalModel) -> None:
    with Slow(model, pause=0.2):
        thread = threading.Thread(
            target=lambda: client.chat.completions.create(model=NAME, messages=asking(QUESTION), max_tokens=10)
        )
        thread.start()
        wait_for(model.engine._jobs)
        before = time.monotonic()
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
        assert model.engine._jobs() and time.monotonic() - before < 1
        thread.join()


def test_the_asynchronous_client(url: str) -> None:
    async def talk() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            options: dict[str, Any] = {"model": NAME, "messages": asking(QUESTION), "max_tokens": 8}
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(**options, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(pieces)

    whole, pieces = asyncio.run(talk())
    assert whole == pieces != ""


class TestServing:
    def test_ends_with_the_block(self, model: MultiModalModel) -> None:
        threads = threading.active_count()
        for _ in range(2):
            with serving(model, name="again") as url:
                assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
                assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "again"
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/models")
        wait_for(lambda: threading.active_count() <= threads)

    @pytest.mark.parametrize("stream", [True, False])
    def test_ends_what_is_being_answered(self, model: MultiModalModel, stream: bool) -> None:
        told: list[openai.APIError] = []

        def ask(url: str) -> None:
            try:
                with client_of(url) as client:
                    said: Any = client.chat.completions.create(
                        model=NAME, messages=asking(QUESTION), max_tokens=200, stream=stream
                    )
                    list(said)
            except openai.APIError as error:
                told.append(error)

        with Slow(model, pause=0.05):
            before = time.monotonic()
            with serving(model, name=NAME) as url:
                thread = threading.Thread(target=ask, args=(url,))
                thread.start()
                wait_for(lambda: any(job.generation.tokens for job in model.engine._jobs()))
            assert time.monotonic() - before < 5
            thread.join()
            wait_for(lambda: not model.engine._jobs())
        (error,) = told
        assert "the server is shutting down: ask again" in error.message

    def test_an_error_in_the_block_ends_it_too(self, model: MultiModalModel) -> None:
        with pytest.raises(LookupError), serving(model, name=NAME) as url:
            raise LookupError
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")


class TestServe:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
    def test_only_this_machine(self, host: str, model: MultiModalModel) -> None:
        with pytest.raises(ValueError, match=r"asks nobody for a key: use 127\.0\.0\.1"):
            serve(model, name=NAME, host=host)

    def test_ports(self, model: MultiModalModel) -> None:
        with pytest.raises(ValueError, match="there is no port 70000: give one of 1 to 65535"):
            serve(model, name=NAME, port=70000)
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="give another port"):
            serve(model, name=NAME, port=taken.getsockname()[1])


class TestCommand:
    def test_serves_until_it_is_interrupted(self, checkpoint: Path, adapter: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "multimodal.cli",
            "serve",
            "--model",
            str(checkpoint),
            "--port",
            "0",
            "--no-demo",
        ]
        process = subprocess.Popen(
            [*command, "--adapter", str(adapter)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(
                r"fused answers at (http://127\.0\.0\.1:\d+/v1), "
                r"to this machine only: there are no keys \(Ctrl-C ends it\)\n",
                line,
            )
            assert found, line
            with client_of(found[1]) as client:
                assert [model.id for model in client.models.list()] == ["fused", "fused:mine"]
                said = client.chat.completions.create(
                    model="fused:mine", messages=asking(QUESTION, draw("red", 0)), max_tokens=3
                )
                assert said.usage is not None and said.usage.completion_tokens <= 3
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, *rest) == (0, "", "")

    def test_refuses_before_it_loads(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["serve", "--model", "nonsense", "--host", "0.0.0.0"]) == 1
        assert "asks nobody for a key" in capsys.readouterr().err
