"""API keys: who may ask a service what, and how often. A key itself is told once and stored nowhere.

What is stored is a SHA-256 digest. A key has 256 random bits, so nobody can find it by trying, and a slow hash, which
passwords need, would only slow down every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from sqlalchemy import Engine
from sqlmodel import Field, Session, SQLModel, select

from multimodal.store.database import StoreError

SCOPES = {
    "chat": "ask questions",
    "sessions": "list and delete own sessions",
    "metrics": "read the metrics",
    "demo": "use the demo, where rates are not counted",
}
NOBODY = hashlib.sha256(b"").hexdigest()


def now() -> datetime:
    """The time, as it is stored: UTC."""
    return datetime.now(UTC)


class ApiKey(SQLModel, table=True):
    """A key, but for itself.

    Attributes:
        id: Its public part; it names the owner of sessions, in logs, too.
        name: For people.
        digest: SHA-256 of the whole key.
        scopes: What it is for, words with spaces between.
        per_minute: How many answers it may ask for in a minute; None for as many as it likes.
        created: When.
        revoked: When it ended, if it has.
    """

    __tablename__ = "api_key"

    id: str = Field(primary_key=True)
    name: str
    digest: str
    scopes: str
    per_minute: int | None = None
    created: datetime = Field(default_factory=now)
    revoked: datetime | None = None


class KeyStore:
    """The keys of a database.

    Args:
        database: As :func:`~multimodal.store.open_database` opens it.
    """

    def __init__(self, database: Engine) -> None:
        self._database = database

    def create(
        self, name: str, *, scopes: Iterable[str] = ("chat", "sessions"), per_minute: int | None = None
    ) -> tuple[str, ApiKey]:
        """Make a key.

        Args:
            name: For people.
            scopes: What it is for; see ``SCOPES``.
            per_minute: How many answers it may ask for in a minute.

        Returns:
            The key, which nobody can tell again, and what is stored of it.

        Raises:
            StoreError: If there is no such scope.
        """
        scopes = sorted(set(scopes))
        if unknown := [scope for scope in scopes if scope not in SCOPES]:
            raise StoreError(f"there is no scope {unknown[0]!r}: use {', '.join(SCOPES)}")
        public = secrets.token_hex(4)
        secret = f"mm-{public}-{secrets.token_urlsafe(32)}"
        key = ApiKey(id=public, name=name, digest=_digest(secret), scopes=" ".join(scopes), per_minute=per_minute)
        with Session(self._database, expire_on_commit=False) as session:
            session.add(key)
            session.commit()
        return secret, key

    def list(self) -> Sequence[ApiKey]:
        """All keys, the revoked ones, too."""
        with Session(self._database) as session:
            return session.exec(select(ApiKey).order_by(ApiKey.created)).all()  # type: ignore[arg-type]

    def revoke(self, public: str) -> ApiKey:
        """End a key, at once and for good.

        Raises:
            StoreError: If there is none of this id.
        """
        with Session(self._database, expire_on_commit=False) as session:
            key = session.get(ApiKey, public)
            if key is None:
                raise StoreError(f"there is no key {public!r:.40}: `multimodal keys list` shows them")
            key.revoked = key.revoked or now()
            session.add(key)
            session.commit()
        return key

    def exist(self) -> bool:
        """Whether any key was ever made: then nobody is served without one, even when all are revoked."""
        with Session(self._database) as session:
            return session.exec(select(ApiKey.id).limit(1)).first() is not None

    def find(self, secret: str) -> ApiKey | None:
        """The key that somebody shows, if it is one and holds; the time that this takes tells nothing of it."""
        public = re.match(r"mm-([0-9a-f]{8})-", secret)
        with Session(self._database) as session:
            key = session.get(ApiKey, public[1]) if public else None
        known = hmac.compare_digest(_digest(secret), NOBODY if key is None else key.digest)
        return key if known and key is not None and key.revoked is None else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
