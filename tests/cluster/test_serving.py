"""A replica without Ray around it, and what the router reads of a request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

pytest.importorskip("ray")

from multimodal.cli import main
from multimodal.cluster.serving import Replica, ServingSettings, routing_key
from multimodal.model import MultiModalModel
from multimodal.store import KeyStore, open_database
from tests.cluster.conftest import NAME
from tests.service.conftest import QUESTION, Slow, asking
from tests.training.tiny import draw

LONG = 180  # tokens of an answer that takes a while


@pytest.fixture(scope="module")
def replica(endless: Path) -> Replica:
    return Replica(ServingSettings(model=str(endless), precision="float32"))


class TestReplica:
    @staticmethod
    def scope(method: str, path: str) -> dict[str, Any]:
        return {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 5000),
            "server": ("127.0.0.1", 8000),
        }

    def post(self, replica: Replica, **options: Any) -> list[dict[str, Any]]:
        body = json.dumps({"model": NAME, "messages": asking(QUESTION, draw("red", 0)), "max_tokens": 8, **options})

        async def collected() -> list[dict[str, Any]]:
            messages: list[dict[str, Any]] = []
            async for together in replica(self.scope("POST", "/v1/chat/completions"), body.encode()):
                assert together[-1]["type"] == "http.response.body"  # what says something: headers alone do not
                messages += together
            return messages

        return asyncio.run(collected())

    def test_says_what_the_model_says(self, replica: Replica, endless_model: MultiModalModel) -> None:
        start, *rest = self.post(replica)
        assert start["type"] == "http.response.start" and start["status"] == 200
        said = json.loads(b"".join(message.get("body", b"") for message in rest))
        assert (
            said["choices"][0]["message"]["content"] == endless_model(QUESTION, draw("red", 0), max_new_tokens=8).text
        )

    def test_streams(self, replica: Replica) -> None:
        start, *rest = self.post(replica, stream=True)
        pieces = [message["body"] for message in rest if message.get("body")]
        assert start["status"] == 200 and len(pieces) > 3 and pieces[-1] == b"data: [DONE]\n\n"

    def test_errors_are_the_applications(self, replica: Replica) -> None:
        start, *_ = self.post(replica, model="nonsense")
        assert start["status"] == 404

    def test_an_application_that_fails_has_told_the_caller(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def fail() -> None:
            raise LookupError("out of steam")

        monkeypatch.setattr(replica, "_app", app)
        start, body = self.post(replica)
        assert start["status"] == 500 and body["body"] == b"Internal Server Error"
        assert "the application failed" in caplog.text and "out of steam" in caplog.text

    def test_who_leaves_ends_it(self, replica: Replica) -> None:
        body = json.dumps({"model": NAME, "messages": asking(QUESTION), "max_tokens": LONG, "stream": True})

        async def leave() -> None:
            messages = replica(self.scope("POST", "/v1/chat/completions"), body.encode())
            await anext(messages)
            await anext(messages)
            await messages.aclose()
            while replica._ending:
                await asyncio.sleep(0.01)

        with Slow(replica._app.state.answering.model, pause=0.1):  # LONG tokens would take 18 seconds
            asyncio.run(asyncio.wait_for(leave(), 8))

    def test_keys_and_limits_reach_it(self, endless: Path, tmp_path: Path) -> None:
        store = str(tmp_path / "store.sqlite")
        KeyStore(open_database(store)).create("me")
        settings = ServingSettings(model=str(endless), precision="float32", store=store, limits={"pictures": 1})
        guarded = Replica(settings)
        start, *_ = self.post(guarded)
        assert start["status"] == 401
        assert guarded._app.state.answering.settings.pictures == 1


class TestRoutingKey:
    def body(self, *pictures: Any) -> bytes:
        return json.dumps({"model": NAME, "messages": asking(QUESTION, *pictures)}).encode()

    def test_is_the_pictures(self) -> None:
        red, blue = draw("red", 0), draw("blue", 0)
        assert routing_key(self.body(red)) == routing_key(self.body(red, blue)) != routing_key(self.body(blue))
        later = {"messages": [*asking(QUESTION, red), {"role": "assistant", "content": "a"}, *asking("Why?")]}
        assert routing_key(json.dumps(later).encode()) == routing_key(self.body(red))

    def test_is_the_session_s_where_there_is_one(self) -> None:
        def key(session: str, *pictures: Any) -> str:
            said = {"messages": asking(QUESTION, *pictures), "metadata": {"session_id": session}}
            return routing_key(json.dumps(said).encode())

        assert key("a", draw("red", 0)) == key("a") != key("b") and key("a")

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b'{"messages": 3}', b'{"messages": [{"content": [3]}]}', b'{"messages": [{}]}']
    )
    def test_is_none_of_what_is_no_chat(self, body: bytes) -> None:
        assert routing_key(body) == ""

    def test_is_none_without_a_picture(self) -> None:
        assert routing_key(self.body()) == ""


def test_an_update_that_cannot_be_is_told_before_anything_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ray", "--update", "--model", "nonsense"]) == 1
    assert "no trained model 'nonsense': the service goes on as it was" in capsys.readouterr().err
    assert main(["serve", "--update"]) == 1
    assert "--update is for a service on a cluster: give --ray, too" in capsys.readouterr().err


def test_a_name_is_the_folder_s_unless_it_is_given() -> None:
    assert ServingSettings(model="runs/mine").called == "mine"
    assert ServingSettings(model="runs/mine", name="ours").called == "ours"


def test_a_number_of_replicas_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, why in (("two", "'two' is neither a number of replicas nor auto"), ("0", "0 is not 1 or more")):
        with pytest.raises(SystemExit):
            main(["serve", "--ray", "--replicas", wrong])
        assert why in capsys.readouterr().err


def test_addresses_that_others_reach_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ray", "--model", "nonsense", "--host", "0.0.0.0"]) == 1
    assert "asks nobody for a key" in capsys.readouterr().err
