"""What is stored of sessions: together or not at all, pictures once, and nothing that was acknowledged is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, update
from sqlmodel import Session, select

from multimodal.store import PictureGone, SessionStore, open_database
from multimodal.store.keys import now
from multimodal.store.pictures import StoredPicture
from multimodal.store.sessions import StoredSession

SAID = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}


def shown(*pictures: bytes, text: str = "?") -> dict[str, object]:
    parts = [{"type": "image", "data": data} for data in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(tmp_path / "store.sqlite")
    yield engine
    engine.dispose()


def store(database: Engine, *, picture_bytes: int = 1000, days: float = 1) -> SessionStore:
    return SessionStore(database, picture_bytes=picture_bytes, days=days)


def kept(database: Engine) -> set[bytes]:
    with Session(database) as session:
        return set(session.exec(select(StoredPicture.data)))


def test_what_is_read_is_what_was_said(database: Engine) -> None:
    sessions = store(database)
    sessions.append("me", "a", [shown(b"one", b"two"), SAID])
    sessions.append("me", "a", [shown(b"one"), SAID])
    assert sessions.read("me", "a") == [shown(b"one", b"two"), SAID, shown(b"one"), SAID]
    assert sessions.read("me", "b") == sessions.read("you", "a") == []
    assert kept(database) == {b"one", b"two"}


def test_a_picture_goes_with_the_last_session_that_shows_it(database: Engine) -> None:
    sessions = store(database)
    sessions.append("me", "a", [shown(b"one", b"two"), SAID])
    sessions.append("you", "a", [shown(b"one"), SAID])
    assert not sessions.delete("me", "b")
    assert sessions.delete("me", "a") and kept(database) == {b"one"}
    assert sessions.delete("you", "a") and kept(database) == set()


def test_the_oldest_pictures_make_room(database: Engine) -> None:
    sessions = store(database, picture_bytes=8)
    for name in "abc":
        sessions.append("me", name, [shown(f"pic{name}".encode()), SAID])
        time.sleep(0.002)
    assert kept(database) == {b"picb", b"picc"}
    sessions.append("me", "b", [SAID])  # asked about again
    sessions.append("me", "d", [shown(b"picd"), SAID])
    assert kept(database) == {b"picb", b"picd"}
    with pytest.raises(PictureGone, match="1 of the session's 1 pictures are not kept any more: begin another"):
        sessions.read("me", "a")


def test_what_is_too_old_goes(database: Engine) -> None:
    sessions = store(database, days=2)
    sessions.append("me", "old", [shown(b"old"), SAID])
    with Session(database) as session:
        for table in (StoredSession, StoredPicture):
            session.execute(update(table).values(used=now() - timedelta(days=3)))
        session.commit()
    sessions.append("me", "new", [shown(b"new"), SAID])
    assert [its["id"] for its in sessions.list("me")] == ["new"] and kept(database) == {b"new"}


WRITER = """
import sys
from multimodal.store import SessionStore, open_database

sessions = SessionStore(open_database(sys.argv[1]), picture_bytes=10**9, days=1)
for number in range(10**6):
    picture = {"type": "image", "data": b"%08d" % number * 500}
    user = {"role": "user", "content": [picture, {"type": "text", "text": str(number)}]}
    sessions.append("me", f"s{number % 7}", [user, {"role": "assistant", "content": []}])
    print(number, flush=True)
"""


@pytest.mark.parametrize("seconds", [0.3, 0.7])
def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "store.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    first = writer.stdout.readline()
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    acknowledged = [int(line) for line in [first, *writer.stdout] if line.endswith("\n")]
    assert writer.wait() == -signal.SIGKILL and len(acknowledged) > 5
    database = open_database(path)
    sessions = store(database, picture_bytes=10**9)
    found = []
    for name in range(7):
        messages = sessions.read("me", f"s{name}")
        assert len(messages) % 2 == 0  # a question and its answer, or neither
        for message in messages[::2]:
            picture, text = message["content"]
            assert picture["data"] == b"%08d" % int(text["text"]) * 500
            found.append(int(text["text"]))
    assert set(acknowledged) <= set(found) and len(found) - len(acknowledged) <= 1
    database.dispose()
