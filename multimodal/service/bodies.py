"""What comes from a caller before there is a request: its body, and the news that it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from multimodal.service.errors import ApiError

DRAINED = 4  # times the limit: thrown away, since most clients read no answer before they have sent everything

Result = TypeVar("Result")


async def read_body(request: Request, most: int) -> bytes:
    """A request's body, if it is not too large.

    Args:
        request: The request.
        most: Bytes.

    Raises:
        ApiError: 413, if it is.
        ClientDisconnect: If the caller left.
    """
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size > DRAINED * most:
            break
        if size <= most:
            body += piece
        else:
            body.clear()
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
