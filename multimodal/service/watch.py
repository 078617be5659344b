"""Around every request: a place for its facts, headers that keep browsers safe, its line in the log, its count.

The facts are ``request.state.facts``; whoever learns something of a request adds it there. ASGI, and no Starlette
middleware class, since those would buffer streams.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multimodal.service.logs import RequestLog
from multimodal.service.metrics import Metrics

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Watch:
    """Watches an application.

    Args:
        app: The application.
        metrics: Its figures.
        log: Where its requests are written down, if anywhere.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, log: RequestLog | None) -> None:
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # nobody was told anything
        facts: dict[str, Any] = {"id": uuid.uuid4().hex, "arrived": began}
        scope.setdefault("state", {})["facts"] = facts

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = facts["id"]
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, told)
        finally:
            # The route's own pattern: what callers made up would be a name of its own in every metric and log.
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requested(endpoint, status)
            if self.log is not None:
                del facts["arrived"]
                seconds = round(time.perf_counter() - began, 4)
                self.log.write({"method": scope["method"], "endpoint": endpoint, "status": status,
                                "seconds": seconds, **facts})  # fmt: skip
