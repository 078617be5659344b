"""Keys: made on the command line, stored as digests, asked of everybody once there is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine

from multimodal.cli import main
from multimodal.model import MultiModalModel
from multimodal.service import RequestLog, check_address, serving
from multimodal.store import KeyStore, StoreError, open_database
from tests.service.conftest import NAME, QUESTION, asking


@pytest.fixture
def database(tmp_path: Path) -> Engine:
    return open_database(tmp_path / "store.sqlite")


@pytest.fixture
def keys(database: Engine) -> KeyStore:
    return KeyStore(database)


@pytest.fixture
def log() -> StringIO:
    return StringIO()


@pytest.fixture
def guarded(model: MultiModalModel, database: Engine, log: StringIO) -> Iterator[str]:
    """A server with the keys; its fixture comes before a test makes one."""
    with serving(model, name=NAME, database=database, log=RequestLog(log)) as url:
        yield url


def ask(url: str, key: str, **options: Any) -> Any:
    with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        return client.chat.completions.create(model=NAME, messages=asking(QUESTION), max_tokens=2, **options)


class TestStore:
    def test_a_key_is_found_until_it_is_revoked(self, keys: KeyStore) -> None:
        assert not keys.exist()
        secret, made = keys.create("me", per_minute=3)
        other, _ = keys.create("you")
        found = keys.find(secret)
        assert found is not None and (found.id, found.name, found.per_minute) == (made.id, "me", 3)
        assert keys.find(secret[:-1]) is None and keys.find(f"mm-{made.id}-{other[12:]}") is None
        keys.revoke(made.id)
        assert keys.find(secret) is None and keys.find(other) is not None
        assert keys.exist() and len(keys.list()) == 2

    @pytest.mark.parametrize("wrong", ["", "mm-", "mm-00000000-x", "sk-123", "\ud800", "mm-00000000-" + "x" * 10_000])
    def test_nonsense_is_no_key(self, keys: KeyStore, wrong: str) -> None:
        keys.create("me")
        assert keys.find(wrong) is None

    def test_no_key_lies_in_the_file(self, keys: KeyStore, tmp_path: Path) -> None:
        secret, made = keys.create("me")
        stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert made.digest.encode() in stored and secret.encode() not in stored and secret[12:].encode() not in stored

    def test_unknown_names_are_told(self, keys: KeyStore) -> None:
        with pytest.raises(StoreError, match="no scope 'root': use chat, sessions, metrics, demo"):
            keys.create("me", scopes=["root"])
        with pytest.raises(StoreError, match="no key 'abc': `multimodal keys list` shows them"):
            keys.revoke("abc")


class TestServer:
    def test_asks_for_a_key_once_there_is_one(self, guarded: str, keys: KeyStore) -> None:
        assert ask(guarded, "none").choices
        secret, made = keys.create("me")
        assert ask(guarded, secret).choices
        for wrong in ("none", secret[:-1] + "?", f"mm-{made.id}-"):
            with pytest.raises(openai.AuthenticationError, match=r"send one as Authorization: Bearer mm-") as caught:
                ask(guarded, wrong)
            assert caught.value.code == "invalid_api_key" and secret not in caught.value.message
        assert httpx.get(f"{guarded}/models").status_code == 401
        keys.revoke(made.id)
        for key in (secret, "none"):  # a key that ended opens the door to nobody
            with pytest.raises(openai.AuthenticationError):
                ask(guarded, key)

    def test_scopes(self, guarded: str, keys: KeyStore) -> None:
        place = guarded.removesuffix("/v1")
        for scope, address in (("chat", "/v1/models"), ("metrics", "/metrics"), ("sessions", "/v1/sessions")):
            secret, _ = keys.create("one", scopes=[scope])
            other, _ = keys.create("others", scopes={"chat", "metrics", "sessions"} - {scope})
            got = [
                httpx.get(place + address, headers={"Authorization": f"Bearer {key}"}).status_code
                for key in (secret, other)
            ]
            assert got == [200, 403]
        assert httpx.get(f"{place}/health").status_code == httpx.get(f"{place}/ready").status_code == 200

    def test_a_keys_rate(self, guarded: str, keys: KeyStore) -> None:
        secret, _ = keys.create("slow", per_minute=2)
        free, _ = keys.create("free")
        assert len(ask(guarded, secret, n=2).choices) == 2
        with pytest.raises(openai.RateLimitError, match="allows 2 answers a minute: ask again in") as caught:
            ask(guarded, secret)
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 30
        assert ask(guarded, free).choices

    def test_keys_are_in_no_log(self, guarded: str, keys: KeyStore, log: StringIO, caplog: Any) -> None:
        secret, made = keys.create("me")
        ask(guarded, secret)
        with pytest.raises(openai.AuthenticationError):
            ask(guarded, secret + "x")
        written = log.getvalue() + caplog.text
        assert f'"key": "{made.id}"' in written and secret[12:] not in written

    def test_may_bind_elsewhere_with_keys_alone(self, database: Engine, keys: KeyStore) -> None:
        with pytest.raises(ValueError, match="make a key with `multimodal keys create`"):
            check_address("0.0.0.0", 8000, database=database)
        _, made = keys.create("me")
        check_address("0.0.0.0", 8000, database=database)
        keys.revoke(made.id)
        check_address("0.0.0.0", 8000, database=database)  # and then serves nobody

    @pytest.mark.parametrize("header", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Host": ""}])
    def test_web_pages_are_not_served_behind_their_readers_back(self, url: str, header: dict[str, str]) -> None:
        body = {"model": NAME, "messages": asking(QUESTION)}
        said = httpx.post(f"{url}/chat/completions", json=body, headers=header)
        assert said.status_code == 403 and said.json()["error"]["code"] == "not_local"
        own = httpx.get(f"{url}/models", headers={"Host": "localhost:1", "Origin": "http://127.0.0.1:7860"})
        assert own.status_code == 200


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "store.sqlite")]
    assert main(["keys", "create", "ward 3", "--scope", "chat", "--per-minute", "30", *store]) == 0
    secret, told = capsys.readouterr()
    found = re.fullmatch(r"mm-([0-9a-f]{8})-[\w-]{43}\n", secret)
    assert found and f"the key {found[1]} is for chat; keep it now" in told
    assert main(["keys", "list", *store]) == 0
    listed = capsys.readouterr().out
    assert re.fullmatch(rf"{found[1]}  ward 3  chat  30 a minute  \d{{4}}-\d\d-\d\d  holds\n", listed)
    assert main(["keys", "revoke", found[1], *store]) == 0
    assert main(["keys", "list", *store]) == 0
    assert "revoked 20" in capsys.readouterr().out
    assert main(["keys", "revoke", "nobody", *store]) == 1
    assert "no key 'nobody'" in capsys.readouterr().err
