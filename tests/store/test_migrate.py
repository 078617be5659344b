"""Migrated databases have the tables that the program wants, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlmodel import Field, Session, SQLModel, select

pytest.importorskip("alembic")

from alembic import autogenerate
from alembic.runtime.migration import MigrationContext

from multimodal.cli import main
from multimodal.store import StoreError, open_database
from multimodal.store import migrate as migrations
from multimodal.store.migrate import migrate

REVISION = '''"""A first one."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{revision}", {before}, None, None


def upgrade():
    {upgrade}
'''


def migrated(engine: sqlalchemy.Engine) -> str | None:
    return migrate(engine.url.render_as_string(hide_password=False))


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    if request.param == "sqlite":
        yield sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'store.sqlite'}")
        return
    engine = sqlalchemy.create_engine(request.getfixturevalue("postgres"))
    yield engine
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    engine.dispose()


def test_migrated_is_what_the_program_wants(engine: sqlalchemy.Engine) -> None:
    """If this fails after a change of a table: write a revision, as the docstring of multimodal.store.migrate says."""
    migrated(engine)
    ours = sqlalchemy.MetaData()
    for table in SQLModel.metadata.tables.values():
        if table.name != "a_note":  # this module's own
            table.to_metadata(ours)
    with engine.connect() as connection:
        assert autogenerate.compare_metadata(MigrationContext.configure(connection), ours) == []


class Note(SQLModel, table=True):
    """A table of the tests."""

    __tablename__ = "a_note"
    id: int | None = Field(default=None, primary_key=True)
    text: str


class TestRevisions:
    @pytest.fixture
    def versions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder of revisions of the tests, in the place of the package's."""
        folder = tmp_path / "migrations"
        (folder / "versions").mkdir(parents=True)
        for name in ("env.py", "script.py.mako"):
            (folder / name).write_text((migrations.FOLDER / name).read_text())
        monkeypatch.setattr(migrations, "FOLDER", folder)
        create = "op.create_table('a_note', sa.Column('id', sa.Integer, primary_key=True))"
        (folder / "versions" / "one.py").write_text(REVISION.format(revision="one", before=None, upgrade=create))
        add = "op.add_column('a_note', sa.Column('text', sa.String, nullable=False, server_default='?'))"
        (folder / "versions" / "two.py").write_text(REVISION.format(revision="two", before="'one'", upgrade=add))
        return folder / "versions"

    def test_one_after_another_and_only_once(self, engine: sqlalchemy.Engine, versions: Path) -> None:
        for _ in range(2):
            assert migrated(engine) == "two"
        with Session(engine) as session:
            session.add(Note(text="a"))
            session.commit()
            assert session.exec(select(Note)).one().text == "a"

    def test_rows_outlive_a_change(self, engine: sqlalchemy.Engine, versions: Path) -> None:
        second = (versions / "two.py").rename(versions.parent / "later")
        assert migrated(engine) == "one"
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("INSERT INTO a_note (id) VALUES (7)"))
        second.rename(versions / "two.py")
        assert migrated(engine) == "two"
        with Session(engine) as session:
            assert session.exec(select(Note)).one() == Note(id=7, text="?")

    def test_tables_that_are_there_are_taken_as_they_are(self, engine: sqlalchemy.Engine, versions: Path) -> None:
        SQLModel.metadata.create_all(engine)
        assert migrated(engine) == "two"

    def test_tables_of_an_older_version_are_not_taken_for_this_one_s(
        self, engine: sqlalchemy.Engine, versions: Path
    ) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE a_note (id INTEGER PRIMARY KEY)"))
        with pytest.raises(StoreError, match="another version's, which has not migrated them"):
            migrated(engine)

    def test_a_newer_database_is_left_alone(self, engine: sqlalchemy.Engine, versions: Path) -> None:
        assert migrated(engine) == "two"
        (versions / "two.py").unlink()
        with pytest.raises(StoreError, match="revision two, which is newer than this program"):
            migrated(engine)


def test_postgresql_is_opened_as_sqlite_is(postgres: str) -> None:
    engine = open_database(postgres)
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT 1")).scalar() == 1
    engine.dispose()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(tmp_path / "store.sqlite")]) == 0
    assert capsys.readouterr().out.startswith("migrated: ")
    (tmp_path / "text").write_text("no database" * 1000)
    assert main(["migrate", str(tmp_path / "text")]) == 1
    assert "the sqlite database cannot be migrated: file is not a database" in capsys.readouterr().err
    assert main(["migrate", "unheard+of://x"]) == 1
    assert "the unheard+of database cannot be migrated" in capsys.readouterr().err
