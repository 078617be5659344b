"""Server-sent events, as OpenAI's endpoint streams them: ``data: {json}`` for each chunk, at the end ``data: [DONE]``.

An error in the middle comes as one more event, in the form that errors have elsewhere, and is the last.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing
from typing import Any

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from multimodal.service.errors import as_api_error


class EventStream(StreamingResponse):
    """A response of several events.

    Args:
        chunks: What they say.
        while_open: Entered while the response is sent; left when that has ended, for whatever reason.
        seconds: After which it ends in any case: a caller that does not read would hold what is open for ever.
    """

    def __init__(
        self, chunks: AsyncGenerator[dict[str, Any]], *, while_open: AbstractContextManager[Any], seconds: float
    ) -> None:
        self._events, self._while_open, self._seconds = _events(chunks), while_open, seconds
        super().__init__(self._events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        with self._while_open:
            async with aclosing(self._events):  # it may wait for a chunk, in a loop that is about to end
                with anyio.move_on_after(self._seconds):
                    await super().__call__(scope, receive, send)


async def _events(chunks: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[str]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield event(chunk)
        except Exception as error:
            yield event(as_api_error(error).body())
            return
    yield "data: [DONE]\n\n"


def event(said: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"
