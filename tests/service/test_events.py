"""Streams of events, and callers who do not read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from multimodal.service.events import EventStream


def test_a_caller_who_does_not_read_holds_nothing_for_ever() -> None:
    happened: list[str] = []

    @contextmanager
    def slot() -> Iterator[None]:
        try:
            yield
        finally:
            happened.append("given back")

    async def chunks() -> AsyncGenerator[dict[str, Any]]:
        try:
            while True:
                yield {}
        finally:
            happened.append("ended")

    async def receive() -> Any:
        await asyncio.Event().wait()  # the caller stays

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            happened.append("full")
            await asyncio.Event().wait()  # as a server's does while the connection takes no more

    async def answer() -> None:
        stream = EventStream(chunks(), while_open=slot(), seconds=0.1)
        scope = {"type": "http", "method": "POST", "headers": [], "asgi": {"version": "3.0", "spec_version": "2.4"}}
        await asyncio.wait_for(stream(scope, receive, send), 30)

    asyncio.run(answer())
    assert happened == ["full", "ended", "given back"]
