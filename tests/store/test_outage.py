"""The database goes away while a service answers: callers are told, nobody hangs, and it recovers by itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from sqlmodel import SQLModel

from multimodal.model import MultiModalModel, conversation
from multimodal.service import serving
from multimodal.store import StoreError, database, open_database
from tests.service.conftest import NAME, QUESTION, Slow, asking, client_of
from tests.service.test_sessions import ask, listed
from tests.store.conftest import Postgres
from tests.training.tiny import draw, save_checkpoint

AWAY = 10  # seconds, in the long form
LATE = 3 * database.PATIENCE  # seconds: to be reached for a connection, and a little more on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiModalModel:
    """Random weights, open gates; it says nonsense and never ends by itself."""
    model = MultiModalModel.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("outage")), dtype=torch.float32)
    model.model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def server(postgres_server: Postgres) -> Iterator[Postgres]:
    """A server whose database is left empty."""
    yield postgres_server
    engine = open_database(postgres_server.url)
    SQLModel.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def url(model: MultiModalModel, server: Postgres) -> Iterator[str]:
    engine = open_database(server.url)
    with serving(model, name=NAME, database=engine) as url:
        yield url
    engine.dispose()


def expected(model: MultiModalModel, first: str) -> str:
    """What is said to a second question about a green picture, by who remembers the first."""
    chat = [*conversation(QUESTION, [draw("green", 2)]), {"role": "assistant", "content": first}]
    return "".join(model.reply([*chat, *conversation("Is it red?")], max_new_tokens=8))


def is_told(error: openai.APIError) -> bool:
    return error.code == "store_unavailable" and "does not answer: ask again in a moment" in error.message


def test_it_is_told_and_history_goes_on(model: MultiModalModel, server: Postgres, url: str) -> None:
    first = ask(url, asking(QUESTION, draw("green", 2)))
    place = url.removesuffix("/v1")
    server.stop()
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(url, asking("Is it red?"))
        assert is_told(caught.value) and caught.value.status_code == 503
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        for address in ("/v1/models", "/v1/sessions", "/ready"):  # without a session, too: nobody knows the keys
            said = httpx.get(place + address)
            assert said.status_code == 503 and said.json()["error"]["code"] == "store_unavailable"
        assert httpx.get(f"{place}/health").status_code == 200
    finally:
        server.start()
    assert httpx.get(f"{place}/ready").status_code == 200
    assert ask(url, asking("Is it red?")) == expected(model, first)
    assert listed(url) == {"mine": 4}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_cannot_be_kept_is_no_answer(
    model: MultiModalModel, server: Postgres, url: str, stream: bool
) -> None:
    """The question is asked while the database is there, and answered when it is gone."""
    ask(url, asking(QUESTION))
    pieces: list[str] = []
    with client_of(url) as client, Slow(model, pause=0.05), ThreadPoolExecutor(1) as pool:

        def complete() -> None:
            said: Any = client.chat.completions.create(
                model=NAME,
                messages=asking("Is it red?"),
                stream=stream,
                max_tokens=20,
                metadata={"session_id": "mine"},
            )
            if stream:
                pieces.extend(chunk.choices[0].delta.content or "" for chunk in said)

        asked = pool.submit(complete)
        while not model.engine._jobs():
            time.sleep(0.01)
        server.stop()
        try:
            with pytest.raises(openai.APIError) as caught:
                asked.result(timeout=LATE)
        finally:
            server.start()
    assert is_told(caught.value)
    assert isinstance(caught.value, openai.APIStatusError) is not stream  # an event of the stream, or a status
    assert listed(url) == {"mine": 2}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_for_ten_seconds_under_load(model: MultiModalModel, server: Postgres, url: str, how: str) -> None:
    """Every request is answered or told, within seconds; once the database is back, all are answered."""
    first = ask(url, asking(QUESTION, draw("green", 2)))
    over = threading.Event()

    def load(number: int) -> list[tuple[float, float, bool]]:
        """When requests began and ended, and whether they were answered; anything but a 503 is raised."""
        said: list[tuple[float, float, bool]] = []
        while not over.is_set():
            began, answered = time.monotonic(), True
            try:
                ask(url, asking("Is it red?"), session=f"load-{number}-{len(said)}")
            except openai.InternalServerError as error:
                assert is_told(error)
                answered = False
                time.sleep(0.2)
            said.append((began, time.monotonic(), answered))
        return said

    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load, number) for number in range(8)]
        try:
            time.sleep(1)
            gone = time.monotonic()
            server.stop() if how == "stopped" else server.freeze()
            try:
                time.sleep(AWAY)
            finally:
                server.start() if how == "stopped" else server.thaw()
            back = time.monotonic()
            time.sleep(2)
        finally:
            over.set()
        said = [request for one in loads for request in one.result(timeout=2 * LATE)]
    assert all(answered for began, ended, answered in said if ended < gone or began > back)
    assert any(ended < gone for _, ended, _ in said) and any(began > back for began, _, _ in said)
    assert how == "frozen" or any(not answered for _, _, answered in said)
    assert max(ended - began for began, ended, _ in said) < (LATE if how == "stopped" else AWAY + LATE)
    assert ask(url, asking("Is it red?")) == expected(model, first)


@pytest.mark.slow
def test_a_server_that_says_nothing_is_given_up(server: Postgres) -> None:
    server.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(StoreError, match="cannot be opened: connection timeout expired"):
            open_database(server.url)
        assert time.monotonic() - began < LATE
    finally:
        server.thaw()


def test_what_the_url_says_of_timeouts_holds(server: Postgres) -> None:
    for given, most in (("", "10s"), ("?options=-c%20statement_timeout%3D7000", "7s")):
        engine = open_database(server.url + given)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == most
        engine.dispose()


WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
input()
connection.execute("ROLLBACK")
"""


def test_a_file_that_another_process_locks(
    model: MultiModalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    path = tmp_path / "store.sqlite"
    with serving(model, name=NAME, database=open_database(path)) as url, client_of(url) as client:
        first = ask(url, asking(QUESTION, draw("green", 2)))
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "locked\n"
            with pytest.raises(openai.InternalServerError) as caught:
                ask(url, asking("Is it red?"))
            assert is_told(caught.value) and caught.value.status_code == 503
            said = client.chat.completions.create(model=NAME, messages=asking(QUESTION), max_tokens=2)
            assert said.choices[0].message.content is not None  # nobody reads in vain: SQLite is in WAL mode
        finally:
            writer.communicate("\n")
        assert ask(url, asking("Is it red?")) == expected(model, first)
        assert listed(url) == {"mine": 4}
