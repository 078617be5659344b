"""Sessions: what was said goes on after a restart, belongs to its owner alone, and goes when told to or too old."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import Engine

from multimodal.model import MultiModalModel, conversation
from multimodal.service import ServiceSettings, serving
from multimodal.store import KeyStore, open_database
from tests.service.conftest import NAME, QUESTION, Slow, asking, client_of, wait_for
from tests.training.tiny import draw

SETTINGS = ServiceSettings(grace_seconds=0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def database(place: Path) -> Engine:
    return open_database(place)


def ask(url: str, messages: Any, session: str = "mine", key: str = "none", **options: Any) -> str:
    with client_of(url).with_options(api_key=key) as client:
        said: Any = client.chat.completions.create(
            **{"model": NAME, "messages": messages, "max_tokens": 8, "metadata": {"session_id": session}, **options}
        )
        if options.get("stream"):
            return "".join(chunk.choices[0].delta.content or "" for chunk in said)
        return said.choices[0].message.content


def listed(url: str, key: str = "none") -> dict[str, int]:
    said = httpx.get(f"{url}/sessions", headers={"Authorization": f"Bearer {key}"})
    return {session["id"]: session["messages"] for session in said.json()["data"]}


@pytest.mark.parametrize("stream", [True, False])
def test_a_session_goes_on_after_a_restart(model: MultiModalModel, place: Path, stream: bool) -> None:
    image = draw("green", 2)
    with serving(model, name=NAME, database=open_database(place)) as url:
        first = ask(url, asking(QUESTION, image), stream=stream)
    chat = [*conversation(QUESTION, [image]), {"role": "assistant", "content": first}]
    expected = "".join(model.reply([*chat, *conversation("Is it red?")], max_new_tokens=8))
    with serving(model, name=NAME, database=open_database(place)) as url:
        assert ask(url, asking("Is it red?"), stream=stream) == expected
        assert ask(url, asking("Is it red?"), session="another") != expected
        assert listed(url) == {"another": 2, "mine": 4}


def test_owners_know_nothing_of_each_other(model: MultiModalModel, database: Engine) -> None:
    keys = KeyStore(database)
    mine, yours = keys.create("me")[0], keys.create("you")[0]
    with serving(model, name=NAME, database=database) as url:
        ask(url, asking(QUESTION, draw("red", 0)), key=mine)
        alone = ask(url, asking("Is it red?"), session="fresh", key=yours)
        assert ask(url, asking("Is it red?"), key=yours) == alone  # the same name is another session
        assert listed(url, mine) == {"mine": 2} and listed(url, yours) == {"mine": 2, "fresh": 2}
        delete = {"headers": {"Authorization": f"Bearer {yours}"}}
        assert httpx.delete(f"{url}/sessions/mine", **delete).json()["deleted"] is True
        assert httpx.delete(f"{url}/sessions/mine", **delete).status_code == 404
        assert listed(url, mine) == {"mine": 2} and listed(url, yours) == {"fresh": 2}


def test_what_was_not_answered_is_not_remembered(model: MultiModalModel, database: Engine) -> None:
    with serving(model, name=NAME, database=database, settings=SETTINGS) as url:
        with Slow(model, fail_at=3), pytest.raises(openai.InternalServerError):
            ask(url, asking(QUESTION))
        with Slow(model, pause=0.05):
            with client_of(url) as client:
                stream: Any = client.chat.completions.create(
                    model=NAME,
                    messages=asking(QUESTION),
                    stream=True,
                    max_tokens=100,
                    metadata={"session_id": "mine"},
                )
                next(iter(stream))
                stream.close()
            wait_for(lambda: not model.engine._jobs())
        assert listed(url) == {}


def test_one_question_at_a_time(model: MultiModalModel, database: Engine) -> None:
    with serving(model, name=NAME, database=database, settings=SETTINGS) as url, ThreadPoolExecutor(1) as pool:
        with Slow(model, pause=0.1):
            first = pool.submit(ask, url, asking(QUESTION))
            wait_for(model.engine._jobs)
            with pytest.raises(openai.ConflictError, match="a question of this session is being answered"):
                ask(url, asking(QUESTION))
            first.result()
        assert ask(url, asking(QUESTION)) and listed(url) == {"mine": 4}


def test_pictures_of_a_session_count(model: MultiModalModel, database: Engine) -> None:
    settings = replace(SETTINGS, pictures=2)
    with serving(model, name=NAME, database=database, settings=settings) as url:
        ask(url, asking(QUESTION, draw("red", 0), draw("red", 1)))
        with pytest.raises(openai.BadRequestError, match="3 pictures with those of the session exceed"):
            ask(url, asking(QUESTION, draw("red", 2)))


def test_a_picture_that_is_gone_is_told(model: MultiModalModel, database: Engine) -> None:
    settings = replace(SETTINGS, kept_picture_bytes=10)
    with serving(model, name=NAME, database=database, settings=settings) as url:
        ask(url, asking(QUESTION, draw("red", 0)))
        with pytest.raises(openai.BadRequestError, match="1 of the session's 1 pictures are not kept") as caught:
            ask(url, asking("Is it red?"))
        assert caught.value.code == "picture_gone"


def test_without_a_store_there_are_none(url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no sessions: leave session_id out, or start it with --st"):
        ask(url, asking(QUESTION))
    assert httpx.get(f"{url}/sessions").status_code == 404


def test_several_choices_are_no_session(model: MultiModalModel, database: Engine) -> None:
    match = "a session goes on with one answer"
    with serving(model, name=NAME, database=database) as url, pytest.raises(openai.BadRequestError, match=match):
        ask(url, asking(QUESTION), n=2)
