"""The application: a model behind OpenAI's chat completions.

Reading a request, its pictures included, happens in a thread, and answering in the engine's own; the event loop only
waits and writes. What always holds: a generation ends when its caller has gone, and every error has OpenAI's form.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from multimodal.engine import Generation
from multimodal.model import MultiModalModel
from multimodal.service.chat import chat_of
from multimodal.service.completion import Completion
from multimodal.service.errors import ApiError, as_api_error
from multimodal.service.events import EventStream
from multimodal.service.schema import ChatRequest, read_request

MAX_BODY = 32 * 2**20  # bytes: a picture of 24 MB, or many small ones
MAX_DRAINED = 4 * MAX_BODY  # thrown away, since most clients read no answer before they have sent everything
GONE = 499  # nginx's status for a caller who left; nobody reads it


def create_app(model: MultiModalModel, *, name: str) -> FastAPI:
    """The endpoint of a model.

    Args:
        model: What answers.
        name: What callers call it. That is the model as it came, whatever adapter is chosen in it; with an adapter it
            is called ``name:adapter``.

    Returns:
        The application. Its ``state.generations`` holds what is being answered.
    """
    app = FastAPI(title="multimodal", docs_url=None, redoc_url=None, openapi_url=None)
    generations: set[Generation] = set()
    app.state.generations = generations
    created = int(time.time())

    @contextmanager
    def listed(generation: Generation) -> Iterator[None]:
        """While somebody waits for it; then it ends."""
        generations.add(generation)
        try:
            yield
        finally:
            generation.cancel()
            generations.discard(generation)

    def names() -> dict[str, str | None]:
        """What callers may ask for, and the adapter that each means."""
        return {name: None, **{f"{name}:{adapter}": adapter for adapter in model.adapters}}

    def adapter_of(called: str) -> str | None:
        known = names()
        if called not in known:
            message = f"there is no model {called!r:.80}: use {' or '.join(known)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return known[called]

    def begin(body: bytes) -> tuple[ChatRequest, Generation]:
        asked = read_request(body)
        adapter = adapter_of(asked.model)
        stream = model.reply(
            chat_of(asked.messages),
            max_new_tokens=asked.most_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=asked.stop,
            adapter=adapter,
        )
        return asked, stream.generation

    async def answer(request: Request) -> Response:
        asked, generation = await run_in_threadpool(begin, await _body_of(request))
        completion = Completion(
            model,
            generation,
            name=asked.model,
            logprobs=asked.logprobs,
            include_usage=asked.stream_options.include_usage,
        )
        if asked.stream:
            return EventStream(completion.chunks(), while_open=listed(generation))
        with listed(generation):
            watcher = asyncio.create_task(_cancel_when_gone(request, generation))
            try:
                return JSONResponse(await completion.whole())
            finally:
                watcher.cancel()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            return await answer(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as error:
            return as_api_error(error).response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(called) for called in names()]}

    @app.get("/v1/models/{called:path}")
    async def one_model(called: str) -> dict[str, Any]:
        adapter_of(called)
        return described(called)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name}

    def described(called: str) -> dict[str, Any]:
        return {"id": called, "object": "model", "created": created, "owned_by": "multimodal"}

    async def tell(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, HTTPException):
        app.add_exception_handler(kind, tell)
    return app


async def _body_of(request: Request) -> bytes:
    """A request's body, if it is not too large.

    Raises:
        ApiError: 413, if it is.
        ClientDisconnect: If the caller left.
    """
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_DRAINED:
            break
        if size <= MAX_BODY:
            body += piece
        else:
            body.clear()
    if size > MAX_BODY:
        message = f"the body has more than {MAX_BODY // 2**20} MiB: send smaller pictures, or fewer at a time"
        raise ApiError(413, message, code="request_too_large")
    return bytes(body)


async def _cancel_when_gone(request: Request, generation: Generation) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.cancel()
