"""Sessions: chats that a service remembers, each its owner's alone.

What always holds: a question and its answer are stored together or not at all, and before anybody is told so. A
session's name belongs to its owner: two owners may use the same one, and neither learns of the other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import JSON, Engine, delete, exists, func
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, Session, SQLModel, col, select

from multimodal.store import pictures
from multimodal.store.database import StoreError
from multimodal.store.keys import now
from multimodal.store.pictures import StoredPicture


class PictureGone(StoreError):
    """A session shows a picture that is not kept any more."""


class StoredSession(SQLModel, table=True):
    """A session, but for what was said.

    Attributes:
        owner: The public part of the owner's key.
        name: As its owner calls it.
        created: When.
        used: When something was said last.
    """

    __tablename__ = "session"

    owner: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    created: datetime = Field(default_factory=now)
    used: datetime = Field(default_factory=now, index=True)


class StoredMessage(SQLModel, table=True):
    """A message of a session.

    Attributes:
        number: In the order in which they were said.
        owner: Of the session.
        session: Its name.
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: Parts: ``{"type": "text", "text": ...}`` or ``{"type": "image", "digest": ...}``.
    """

    __tablename__ = "session_message"

    number: int | None = Field(default=None, primary_key=True)
    owner: str = Field(index=True)
    session: str = Field(index=True)
    role: str
    content: list[dict[str, Any]] = Field(sa_type=JSON)


class ShownPicture(SQLModel, table=True):
    """That a session shows a picture."""

    __tablename__ = "session_picture"

    owner: str = Field(primary_key=True)
    session: str = Field(primary_key=True)
    digest: str = Field(primary_key=True, index=True)


class SessionStore:
    """The sessions of a database.

    Args:
        database: As :func:`~multimodal.store.open_database` opens it.
        picture_bytes: Of all pictures together; those go first that nobody asked about for longest.
        days: After which sessions and pictures go that nobody asked about.
    """

    def __init__(self, database: Engine, *, picture_bytes: int, days: float) -> None:
        self._database, self._picture_bytes, self._days = database, picture_bytes, days

    def read(self, owner: str, name: str) -> list[dict[str, Any]]:
        """What was said in a session so far; nothing, if there is none.

        Returns:
            Messages with a ``role`` and a ``content`` of parts, ``{"type": "text", "text": ...}`` or
            ``{"type": "image", "data": ...}`` with a file's bytes.

        Raises:
            PictureGone: If one of its pictures is not kept any more.
        """
        with Session(self._database) as session:
            found = session.exec(
                select(StoredMessage)
                .where(StoredMessage.owner == owner, StoredMessage.session == name)
                .order_by(col(StoredMessage.number))
            ).all()
            shown = {part["digest"] for message in found for part in message.content if part["type"] == "image"}
            data = pictures.files(session, shown)
        if gone := shown - data.keys():
            raise PictureGone(
                f"{len(gone)} of the session's {len(shown)} pictures are not kept any more: begin another session"
            )
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "image", "data": data[part["digest"]]} if part["type"] == "image" else part
                    for part in message.content
                ],
            }
            for message in found
        ]

    def append(self, owner: str, name: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """Go on with a session, or begin it; when this returns, the messages outlive the process.

        Args:
            owner: Whose session.
            name: Of the session.
            messages: As :meth:`read` gives them.
        """
        try:
            self._append(owner, name, messages)
        except IntegrityError:  # another process stored the same picture, or began the session, in the same moment
            self._append(owner, name, messages)

    def _append(self, owner: str, name: str, messages: Sequence[Mapping[str, Any]]) -> None:
        with Session(self._database) as session:
            stored = session.get(StoredSession, (owner, name)) or StoredSession(owner=owner, name=name)
            stored.used = now()
            session.add(stored)
            for message in messages:
                content = [self._stored(session, owner, name, part) for part in message["content"]]
                session.add(StoredMessage(owner=owner, session=name, role=message["role"], content=content))
            session.flush()
            shown = session.exec(
                select(ShownPicture.digest).where(ShownPicture.owner == owner, ShownPicture.session == name)
            ).all()
            pictures.touch(session, shown)
            self._trim(session)
            session.commit()

    def _stored(self, session: Session, owner: str, name: str, part: Mapping[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return dict(part)
        (digest,) = pictures.put(session, [part["data"]])
        session.merge(ShownPicture(owner=owner, session=name, digest=digest))
        return {"type": "image", "digest": digest}

    def _trim(self, session: Session) -> None:
        old = session.execute(
            select(StoredSession.owner, StoredSession.name).where(
                col(StoredSession.used) < now() - timedelta(days=self._days)
            )
        ).all()
        for owner, name in old:
            _delete(session, owner, name)
        pictures.trim(session, most_bytes=self._picture_bytes, days=self._days)

    def list(self, owner: str) -> list[dict[str, Any]]:
        """An owner's sessions, the last used first: ``id``, ``created``, ``used`` and how many ``messages``."""
        with Session(self._database) as session:
            counts = dict(
                session.execute(
                    select(StoredMessage.session, func.count())
                    .where(StoredMessage.owner == owner)
                    .group_by(StoredMessage.session)
                ).all()
            )
            found = session.exec(
                select(StoredSession).where(StoredSession.owner == owner).order_by(col(StoredSession.used).desc())
            )
            return [
                {
                    "id": one.name,
                    "created": one.created.isoformat(),
                    "used": one.used.isoformat(),
                    "messages": counts.get(one.name, 0),
                }
                for one in found
            ]

    def delete(self, owner: str, name: str) -> bool:
        """Delete a session, and the pictures that no other one shows; tells whether there was one."""
        with Session(self._database) as session:
            there = _delete(session, owner, name)
            session.commit()
        return there


def _delete(session: Session, owner: str, name: str) -> bool:
    gone = session.execute(delete(StoredSession).where(_is(StoredSession, owner), col(StoredSession.name) == name))
    for table in (StoredMessage, ShownPicture):
        session.execute(delete(table).where(_is(table, owner), col(table.session) == name))
    session.execute(delete(StoredPicture).where(~exists().where(col(ShownPicture.digest) == StoredPicture.digest)))
    return bool(gone.rowcount)  # type: ignore[attr-defined]


def _is(table: Any, owner: str) -> Any:
    return col(table.owner) == owner
