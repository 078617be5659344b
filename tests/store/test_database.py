from pathlib import Path

import pytest
from sqlalchemy import text

from multimodal.store import StoreError, open_database


def test_sqlite_is_opened_for_readers_beside_a_writer_and_syncs_every_commit(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "new folder" / "store.sqlite")
    with engine.connect() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match=r"store\.sqlite: cannot be opened: file is not a database"):
        open_database(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file: cannot be made"):
        open_database(tmp_path / "file" / "store.sqlite")


def test_a_database_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(StoreError, match=r"unheard\+of://.*postgresql\+psycopg://"):
        open_database("unheard+of://me:secret@host/none")


def test_a_password_is_not_repeated() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as caught:
        open_database("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value) and "127.0.0.1:1" in str(caught.value)
