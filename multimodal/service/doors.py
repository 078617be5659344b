"""Who asks, and whether they may: keys where there are any, else this machine only.

What always holds: once a key was ever made, nobody is served without one. Where nobody is asked for a key, a web page
in a browser on this machine can't use the service behind its user's back: such a request names another host or origin.
"""

from __future__ import annotations

import base64
import ipaddress
import math
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
from fastapi import Request
from sqlalchemy import Engine

from multimodal.images import printable
from multimodal.service.errors import ApiError
from multimodal.store.keys import SCOPES, ApiKey, KeyStore


@dataclass(frozen=True)
class Caller:
    """Who asks: the public part of a key, and what it is for."""

    id: str
    scopes: frozenset[str]
    per_minute: int | None = None


# By how a key is shown: what is told to who shows none that holds, and how a browser is told to ask for one.
REMEDIES = {
    "Bearer": "send one as Authorization: Bearer mm-...",
    "Basic": "give any name, and a key of the scope demo as the password",
}
CHALLENGES = {"Bearer": "Bearer", "Basic": 'Basic realm="demo", charset="UTF-8"'}

LOCAL = Caller("local", frozenset(SCOPES))


class Doors:
    """Lets callers in.

    Args:
        database: With the keys; None where there are none.
    """

    def __init__(self, database: Engine | None) -> None:
        self._keys = None if database is None else KeyStore(database)
        self._buckets: dict[str, tuple[float, float]] = {}  # of each caller: answers left, and when that was so

    def guarded(self) -> bool:
        """Whether callers need a key."""
        return self._keys is not None and self._keys.exist()

    async def caller(self, request: Request, scope: str) -> Caller:
        """Who asks.

        Raises:
            ApiError: 401 without a key that holds, 403 if it is not for this, or, where nobody needs one, if the
                request did not come from a program on this machine.
        """
        return await self._let_in(request, scope, "Bearer")

    async def visitor(self, request: Request) -> Caller:
        """Who looks at the demo in a browser, which asks for a name, any, and for a key as the password.

        That is HTTP's Basic authentication: the browser shows the key with every request, so that one that is revoked
        ends a visit at once. It does so for other pages' requests, too, which is why those are refused.

        Raises:
            ApiError: As for :meth:`caller`, but 401 for a key that is not for this, too, since a browser asks for
                another one only then; 403 if a page of another origin asks.
        """
        visitor = await self._let_in(request, "demo", "Basic")
        origin = request.headers.get("origin")
        if visitor is not LOCAL and origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            message = "only its own page may use the demo: have a proxy before it pass on the Host that browsers name"
            raise ApiError(403, message, code="other_origin")
        return visitor

    async def _let_in(self, request: Request, scope: str, scheme: str) -> Caller:
        key = await anyio.to_thread.run_sync(self._find, _shown(request, scheme), scheme)
        if key is None:
            _check_local(request)
            return LOCAL
        caller = Caller(key.id, frozenset(key.scopes.split()), key.per_minute)
        request.state.facts["key"] = caller.id
        if scope not in caller.scopes:
            message = f"this key is not for the scope {scope!r}: make one with --scope {scope}"
            status = 403 if scheme == "Bearer" else 401
            raise ApiError(status, message, code="insufficient_scope", headers={"WWW-Authenticate": CHALLENGES[scheme]})
        return caller

    def _find(self, secret: str, scheme: str) -> ApiKey | None:
        """The caller's key; None where nobody needs one."""
        if self._keys is None or not self._keys.exist():
            return None
        key = self._keys.find(secret)
        if key is None:
            message = f"no key, or none that holds: {REMEDIES[scheme]}"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": CHALLENGES[scheme]})
        return key

    def charge(self, caller: Caller, answers: int) -> None:
        """Count answers that a caller asks for against what its key allows: a token bucket of one minute.

        Raises:
            ApiError: 429, if it is used up; says when to ask again.
        """
        if caller.per_minute is None:
            return
        most, moment = float(caller.per_minute), time.monotonic()
        left, then = self._buckets.get(caller.id, (most, moment))
        left = min(most, left + (moment - then) * most / 60)
        cost = min(answers, most)  # one request may ask for more than a minute's: it takes all
        if cost > left:
            self._buckets[caller.id] = left, moment
            wait = math.ceil((cost - left) * 60 / most)
            message = f"this key allows {caller.per_minute} answers a minute: ask again in {wait} seconds"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})
        self._buckets[caller.id] = left - cost, moment


def _shown(request: Request, scheme: str) -> str:
    """The key that a request shows in this way; empty if none."""
    said, _, shown = request.headers.get("authorization", "").partition(" ")
    if said.lower() != scheme.lower():
        return ""
    if scheme == "Bearer":
        return shown.strip()
    try:
        return base64.b64decode(shown, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host's name or address leads to this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: who knows where it leads
        return False


def _check_local(request: Request) -> None:
    for header, url in (("host", f"//{request.headers.get('host', '')}"), ("origin", request.headers.get("origin"))):
        if url is None:
            continue
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        if not is_loopback(host):
            message = f"the {header} {printable(host)!r} is not this machine, and nobody is served from elsewhere: "
            raise ApiError(403, message + "make a key with `multimodal keys create`", code="not_local")
