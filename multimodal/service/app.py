"""The application: a model behind OpenAI's chat completions.

Reading a request, its pictures included, happens in a thread, and answering in the engine's own; the event loop only
waits and writes. What always holds: a generation ends when its caller has gone, and every error has OpenAI's form.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from multimodal.engine import EngineError
from multimodal.model import MultiModalModel
from multimodal.service.answering import Answering
from multimodal.service.errors import ApiError, as_api_error
from multimodal.service.front import Front
from multimodal.service.logs import AuditLog, RequestLog
from multimodal.service.page import CHAT, describe, page_of
from multimodal.service.sessions import add_sessions
from multimodal.service.settings import ServiceSettings
from multimodal.service.watch import Watch
from multimodal.store.database import UNAVAILABLE

GONE = 499  # nginx's status for a caller who left; nobody reads it


def create_app(
    model: MultiModalModel,
    *,
    name: str,
    settings: ServiceSettings | None = None,
    database: Engine | None = None,
    log: RequestLog | None = None,
    audit: AuditLog | None = None,
    front: Starlette | None = None,
) -> FastAPI:
    """The endpoint of a model.

    Args:
        model: What answers.
        name: What callers call it. That is the model as it came, whatever adapter is chosen in it; with an adapter it
            is called ``name:adapter``.
        settings: Its limits.
        database: With keys and sessions, as :func:`~multimodal.store.open_database` opens it. Without one, and as long
            as nobody made a key in it, callers need none, and must be programs on this machine.
        log: Where requests are written down.
        audit: Where answers are accounted for.
        front: A page for people at ``/``, an application of its own that starts and ends with this one. The API's
            addresses come before its own. Where callers need a key, its visitors need one for the scope ``demo``.

    Returns:
        The application. Its ``state.answering`` holds what is being answered, its ``state.front`` the page, if any.
    """
    settings = settings or ServiceSettings()
    lifespan = None if front is None else _lifespan_of(front)
    app = FastAPI(title="multimodal", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    answering = app.state.answering = Answering(
        model, name=name, settings=settings, database=database, log=log, audit=audit
    )
    app.add_middleware(Watch, metrics=answering.metrics, log=log)
    created = int(time.time())

    def described(called: str) -> dict[str, Any]:
        return {"id": called, "object": "model", "created": created, "owned_by": "multimodal"}

    @app.post("/v1/chat/completions", openapi_extra=CHAT)
    async def complete(request: Request) -> Response:
        """Answer the last message of a chat, about the pictures in it."""
        try:
            return await answering.answer(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as error:  # here, since Starlette raises again what it does not expect
            return as_api_error(error).response()

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The model, and the model with each of its adapters."""
        await answering.doors.caller(request, "chat")
        return {"object": "list", "data": [described(called) for called in answering.names()]}

    @app.get("/v1/models/{called:path}")
    async def one_model(request: Request, called: str) -> dict[str, Any]:
        """One of them."""
        await answering.doors.caller(request, "chat")
        answering.adapter_of(called)
        return described(called)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The process lives."""
        return {"status": "ok", "model": name}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """A question would be answered: 503 while the server stops, the engine is closed, or the database is away."""
        answering.check_ready()
        await run_sync(answering.doors.guarded)  # no question gets past the doors without the database
        return {"status": "ready", "model": name}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        await answering.doors.caller(request, "metrics")
        return Response(answering.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(page_of(app.openapi()))

    if answering.sessions is not None:
        add_sessions(app, answering.sessions, answering.doors)
    describe(app)
    app.state.front = None
    if front is not None:  # where no route matches, so that the API's errors stay its own
        app.state.front = app.router.default = Front(front, answering.doors, otherwise=app.router.default)

    async def tell(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, HTTPException, EngineError, *UNAVAILABLE, Exception):
        app.add_exception_handler(kind, tell)
    return app


def _lifespan_of(front: Starlette) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with front.router.lifespan_context(front):
            yield

    return lifespan
