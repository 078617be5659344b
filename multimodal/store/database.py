"""One way to open the database.

What always holds: who asks a database that is gone is told within seconds, and the first one who asks it after it came
back is answered.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import SQLModel

BUSY_SECONDS = 10.0  # how long a writer waits for another one
PATIENCE = 5  # seconds for a server to be reached, or for a connection that others use to become free
# What is raised while the database is gone, or busy for too long. All of it may be over in a moment.
UNAVAILABLE = (OperationalError, InterfaceError, TimeoutError)
# Of libpq, which by default waits for minutes for a machine that is gone, and for ever for a lock.
LIBPQ = {
    "connect_timeout": PATIENCE,
    "tcp_user_timeout": PATIENCE * 1000,  # milliseconds until a connection that nobody acknowledges is closed
    "keepalives_idle": PATIENCE,
    "options": f"-c statement_timeout={BUSY_SECONDS * 1000:.0f}",
}


class StoreError(RuntimeError):
    """The database cannot be opened or used: which one, and why."""


def open_database(place: str | Path) -> Engine:
    """Open a database and make the tables that it lacks.

    SQLite is opened in WAL mode, so that readers do not wait for a writer, with a sync at every commit: what was
    acknowledged survives a killed process and a power cut. Connections to a server are tried before they are used, so
    that those which died with it do no harm once it is back.

    Args:
        place: A file for SQLite, which is made together with its folder, or a database URL (``postgresql+psycopg://...``).
            What a URL says of timeouts (``?connect_timeout=60``) holds.

    Returns:
        An engine that threads may share.

    Raises:
        StoreError: If it cannot be opened. Passwords in a URL are not repeated.
    """
    if "://" in str(place):
        try:
            url = make_url(str(place))
            engine = create_engine(url, pool_pre_ping=True, **_patience(url))
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


def _patience(url: URL) -> dict[str, Any]:
    """What keeps callers from waiting for a server that is gone."""
    if url.drivername != "postgresql+psycopg":
        return {}
    connect_args = {name: value for name, value in LIBPQ.items() if name not in url.query}
    return {"pool_timeout": PATIENCE, "connect_args": connect_args}


def _set_up(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
