"""The application: a model behind OpenAI's chat completions.

Reading a request, its pictures included, happens in a thread, and answering in the engine's own; the event loop only
waits and writes. What always holds: a generation ends when its caller has gone, and every error has OpenAI's form.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from multimodal.engine import EngineError
from multimodal.model import MultiModalModel
from multimodal.service.answering import Answering
from multimodal.service.errors import ApiError, as_api_error
from multimodal.service.page import CHAT, describe, page_of
from multimodal.service.settings import ServiceSettings

GONE = 499  # nginx's status for a caller who left; nobody reads it


def create_app(model: MultiModalModel, *, name: str, settings: ServiceSettings | None = None) -> FastAPI:
    """The endpoint of a model.

    Args:
        model: What answers.
        name: What callers call it. That is the model as it came, whatever adapter is chosen in it; with an adapter it
            is called ``name:adapter``.
        settings: Its limits.

    Returns:
        The application. Its ``state.answering`` holds what is being answered.
    """
    settings = settings or ServiceSettings()
    app = FastAPI(title="multimodal", version="1", docs_url=None, redoc_url=None)
    answering = app.state.answering = Answering(model, name=name, settings=settings)
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
    async def models() -> dict[str, Any]:
        """The model, and the model with each of its adapters."""
        return {"object": "list", "data": [described(called) for called in answering.names()]}

    @app.get("/v1/models/{called:path}")
    async def one_model(called: str) -> dict[str, Any]:
        """One of them."""
        answering.adapter_of(called)
        return described(called)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The process lives."""
        return {"status": "ok", "model": name}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """A question would be answered: 503 while the server stops, or once the engine is closed."""
        answering.check_ready()
        return {"status": "ready", "model": name}

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(page_of(app.openapi()))

    describe(app)

    async def tell(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, HTTPException, EngineError, Exception):
        app.add_exception_handler(kind, tell)
    return app
