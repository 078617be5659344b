"""Pictures of sessions: each stored once, by the digest of its file, within a limit of bytes and of age.

They lie in the database, so that a picture is there exactly if the turn that shows it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from sqlalchemy import delete, func, update
from sqlmodel import Field, Session, SQLModel, col, select

from multimodal.store.keys import now


class StoredPicture(SQLModel, table=True):
    """A picture's file.

    Attributes:
        digest: SHA-256 of the file, in hexadecimal.
        size: In bytes.
        used: When it was last asked about.
        data: The file.
    """

    __tablename__ = "picture"

    digest: str = Field(primary_key=True)
    size: int
    used: datetime = Field(default_factory=now, index=True)
    data: bytes


def put(session: Session, pictures: Iterable[bytes]) -> list[str]:
    """Store pictures that are not there yet, in a transaction of the caller's; returns their digests."""
    files = {hashlib.sha256(data).hexdigest(): data for data in pictures}
    there = set(session.exec(select(StoredPicture.digest).where(col(StoredPicture.digest).in_(files))))
    for digest, data in files.items():
        if digest not in there:
            session.add(StoredPicture(digest=digest, size=len(data), data=data))
    return list(files)


def touch(session: Session, digests: Collection[str]) -> None:
    """Say that pictures were asked about now."""
    session.execute(update(StoredPicture).where(col(StoredPicture.digest).in_(digests)).values(used=now()))


def files(session: Session, digests: Collection[str]) -> dict[str, bytes]:
    """The files of those pictures that are there."""
    if not digests:  # no question to the database, which a session's first answer would wait for
        return {}
    found = session.exec(select(StoredPicture).where(col(StoredPicture.digest).in_(digests)))
    return {picture.digest: picture.data for picture in found}


def trim(session: Session, *, most_bytes: int, days: float) -> None:
    """Delete pictures that nobody asked about for so many days, then, of the others, the oldest that are too many."""
    session.execute(delete(StoredPicture).where(col(StoredPicture.used) < now() - timedelta(days=days)))
    left = session.execute(select(func.sum(StoredPicture.size))).scalar() or 0
    if left <= most_bytes:
        return
    gone = []
    for digest, size in session.execute(
        select(StoredPicture.digest, StoredPicture.size).order_by(col(StoredPicture.used))
    ):
        if left <= most_bytes:
            break
        gone.append(digest)
        left -= size
    session.execute(delete(StoredPicture).where(col(StoredPicture.digest).in_(gone)))
