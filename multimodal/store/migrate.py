"""Bringing the tables of an older version to what this one needs, with Alembic.

:func:`~multimodal.store.open_database` makes tables that are missing, and never changes one that is there. A change is
a revision in ``migrations/versions``. Who changes a table writes one with

    python -m multimodal.store.migrate --write "what changes" sqlite:///FILE

where FILE is a database that was migrated to the revisions so far, or a new one; and reads it before it is committed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import SQLModel

from multimodal.store import StoreError  # and with it every module that has tables

try:
    from alembic import command
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
except ImportError as error:
    raise ImportError("migrating a database needs Alembic: pip install 'multimodal[cluster]'") from error

FOLDER = Path(__file__).parent / "migrations"


def migrate(place: str | Path) -> str | None:
    """Bring the tables of a database to what this version needs.

    Tables that are there without a revision were made by ``open_database``; they are taken as they are if they are
    those of this version.

    Args:
        place: A file for SQLite, or a database URL, as ``open_database`` takes it.

    Returns:
        The revision that it has then; None as long as there are no revisions.

    Raises:
        StoreError: If it cannot be opened, or a newer version of this package has changed the tables already, or an
            older one made them without a revision.
    """
    url = str(place) if "://" in str(place) else f"sqlite:///{place}"
    try:
        with _begun(url) as connection:
            return _upgraded(connection)
    except (ImportError, SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        kind = url.split("://")[0]
        raise StoreError(f"the {kind} database cannot be migrated: {reason}. Name another, or mend this one") from error


def _upgraded(connection: Connection) -> str | None:
    config = _config(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is not None and revision not in known:
        raise StoreError(f"the database has revision {revision}, which is newer than this program: update it")
    there = set(inspect(connection).get_table_names())
    if revision is None and there & set(SQLModel.metadata.tables):
        if compare_metadata(MigrationContext.configure(connection), SQLModel.metadata):
            raise StoreError("the tables are another version's, which has not migrated them: do so with that one first")
        command.stamp(config, "head")
    else:
        command.upgrade(config, "head")
    return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def _begun(url: str) -> Iterator[Connection]:
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["connection"] = connection
    return config


def main() -> None:
    """Write a revision: what the tables of a database lack."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", metavar="MESSAGE", required=True, help="what changes")
    parser.add_argument("url", help="a database that was migrated to the revisions so far, or a new one")
    options = parser.parse_args()
    with _begun(options.url) as connection:
        config = _config(connection)
        command.upgrade(config, "head")
        command.revision(config, options.write, autogenerate=True)


if __name__ == "__main__":
    main()
