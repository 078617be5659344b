"""What stands before the API at ``/``: a page for people, an application of its own behind the same doors.

It answers what the API has no address for, but nothing below ``/v1``, where programs are told what there is. When the
server stops, what the page holds open is cut, since a page holds a connection for as long as somebody looks at it.
"""

from __future__ import annotations

import anyio
from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from multimodal.service.doors import Doors


class Front:
    """A page behind doors.

    Args:
        page: The application.
        doors: Who is let in.
        otherwise: Answers what is not the page's either.
    """

    def __init__(self, page: ASGIApp, doors: Doors, *, otherwise: ASGIApp) -> None:
        self._page, self._doors, self._otherwise = page, doors, otherwise
        self._open: set[anyio.CancelScope] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http" or scope["path"] == "/v1" or scope["path"].startswith("/v1/"):
            await self._otherwise(scope, receive, send)
            return
        await self._doors.visitor(Request(scope))
        with anyio.CancelScope() as held:
            self._open.add(held)
            try:
                await self._page(dict(scope), receive, send)  # a copy: its routes would be names in metrics and logs
            finally:
                self._open.discard(held)
        if held.cancelled_caught:
            await send({"type": "http.response.body"})

    def end_all(self) -> None:
        """The server stops."""
        for held in list(self._open):
            held.cancel()
