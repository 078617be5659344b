"""One way to open the database."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import SQLModel

BUSY_SECONDS = 10.0  # how long a writer waits for another one


class StoreError(RuntimeError):
    """The database cannot be opened or used: which one, and why."""


def open_database(place: str | Path) -> Engine:
    """Open a database and make the tables that it lacks.

    SQLite is opened in WAL mode, so that readers do not wait for a writer, with a sync at every commit: what was
    acknowledged survives a killed process and a power cut.

    Args:
        place: A file for SQLite, which is made together with its folder, or a database URL (``postgresql+psycopg://...``).

    Returns:
        An engine that threads may share.

    Raises:
        StoreError: If it cannot be opened. Passwords in a URL are not repeated.
    """
    if "://" in str(place):
        try:
            engine = create_engine(str(place), pool_pre_ping=True)
        except (ImportError, SQLAlchemyError) as error:  # no driver; no such kind of database; no URL
            name = str(place).split("://")[0]
            raise StoreError(
                f"{name}://...: {error}. PostgreSQL is postgresql+psycopg:// (pip install psycopg)"
            ) from error
    else:
        path = Path(place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{path.parent}: cannot be made: {error.strerror}. Choose another folder") from error
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _set_up)
    try:
        SQLModel.metadata.create_all(engine)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise StoreError(
            f"{engine.url.render_as_string(hide_password=True)}: cannot be opened: {reason}. "
            "Name another file or mend this one"
        ) from error
    return engine


def _set_up(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
