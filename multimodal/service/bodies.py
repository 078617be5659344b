"""What comes from a caller before there is a request: its body, and the news that it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from multimodal.service.errors import ApiError

PATIENCE = 60  # seconds for a body to come
DRAINED = 4  # times the limit: thrown away, since most clients read no answer before they have sent everything

Result = TypeVar("Result")


class Room:
    """Memory for the bodies of all requests together.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextmanager
    def taken(self) -> Iterator[Callable[[int], None]]:
        """Room for one request, given back at the end of the block.

        Yields:
            What takes so many bytes more; it raises an ApiError, 429, where there is no room.
        """
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self.held + count > self.most:
                message = "the server holds as many pictures as it can: ask again in a moment"
                raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
            mine += count
            self.held += count

        try:
            yield take
        finally:
            self.held -= mine


async def read_body(request: Request, most: int, take: Callable[[int], None]) -> bytes:
    """A request's body, if it is not too large.

    Args:
        request: The request.
        most: Bytes.
        take: Takes room for what has come.

    Raises:
        ApiError: 413, if it is; 408, if it does not come; 429, where there is no room.
        ClientDisconnect: If the caller left.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for piece in request.stream():
                size += len(piece)
                if size > DRAINED * most:
                    break
                if size <= most:
                    take(len(piece))
                    body += piece
                else:
                    body.clear()
    except TimeoutError:
        message = f"the body did not come within {PATIENCE} seconds: send smaller pictures"
        raise ApiError(408, message, code="timeout") from None
    if size > most:
        limit = f"{most // 2**20} MiB" if most >= 2**20 else f"{most} bytes"
        message = f"the body has more than {limit}: send smaller pictures, or fewer at a time"
        raise ApiError(413, message, code="request_too_large")
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What some work comes to; it is cancelled once the caller has left.

    Raises:
        ClientDisconnect: If the caller left.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watcher.cancel()
        if task.cancel():
            await asyncio.wait({task})  # what it holds is given back when this returns


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
