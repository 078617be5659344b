"""The demo within another server: its page as an application that asks a model which that server has loaded.

What it does: makes the page and what it needs, and tells browsers what the page may do: nothing with another host.

What it does not know: the server, and whom it lets in.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.ask_tab import Choice
from demo.asking import Asking
from demo.choosing import Choosing
from demo.comparing import Comparing
from demo.page import MOST_VISITORS, build, looks
from multimodal.store.feedback import Feedback

if TYPE_CHECKING:
    from multimodal.model import MultiModalModel

# Gradio's page has scripts and styles within it, and makes functions of strings (`js_on_load`); pictures and what a
# camera sees come as blobs. So this is little against a script in the page, and keeps it from every other host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


@contextmanager
def mounted(model: MultiModalModel, *, name: str, anywhere: bool) -> Iterator[FastAPI]:
    """The page as an application at ``/``, for as long as the block lasts.

    Args:
        model: Answers; its adapters can be chosen on the page.
        name: What it was loaded as: ``"embedded"``, a folder or a hub id.
        anywhere: Whether visitors may name any folder of this machine, to read a comparison in it.

    Yields:
        The application, which sets its own Content-Security-Policy.

    Raises:
        StoreError: If feedback can't be kept.
    """
    called = Path(name).name
    with tempfile.TemporaryDirectory(prefix="multimodal-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        feedback, asking = Feedback(), Asking(lambda: model)
        asking.start()
        comparing = Comparing(asking, model_name=name, feedback=feedback)
        page = build(
            asking,
            feedback,
            comparing=comparing,
            choosing=Choosing(Path(), anywhere=anywhere),
            choices=[Choice(called), *(Choice(f"{called} + {its}", adapter=its) for its in model.adapters)],
        )
        page.state_session_capacity = MOST_VISITORS
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(_WithPolicy)
        try:
            yield gr.mount_gradio_app(app, page, "/", **looks())
        finally:
            comparing.close()


class _WithPolicy:
    """Sends the policy with every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, told)
