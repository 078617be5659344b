"""An endpoint on a real socket that behaves as it is told, badly on purpose too; what it was sent is kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any


@dataclass
class Reply:
    """What is sent back.

    ``cut`` bytes of the body are sent, and then the connection is dropped; ``pause`` seconds pass before anything is.
    """

    body: str = ""
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    cut: int | None = None


def saying(*pieces: str, reason: str | None = "stop", usage: tuple[int, int] | None = (10, 2), end: bool = True) -> str:
    """An answer as a stream of events."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    if reason is not None:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage is not None:
        read, written = usage
        counted = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        chunks.append({"choices": [], "usage": counted})
    common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    lines = [f"data: {json.dumps({**common, **chunk})}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if end else ""])


def refusing(status: int, message: str, *, error: Mapping[str, str] = MappingProxyType({}), **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "error", **error}})
    return Reply(body, status, "application/json", {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Scripted:
    """The endpoint: it answers chats by ``answer``, of the chat that was sent and its number from 0."""

    url: str = ""
    answer: Callable[[dict[str, Any], int], Reply | str] = lambda chat, number: "ok"
    models: tuple[str, ...] = ("the-model",)
    chats: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def script(self, *replies: Reply | str) -> None:
        """Give these replies, one after another, and the last one from then on."""
        begun = len(self.chats)
        self.answer = lambda chat, number: replies[min(number - begun, len(replies) - 1)]


@contextmanager
def scripted() -> Iterator[Scripted]:
    """Serve such an endpoint on a free port of this machine."""
    endpoint, lock = Scripted(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in endpoint.models]
            self.send(Reply(json.dumps({"object": "list", "data": models}), kind="application/json"))

        def do_POST(self) -> None:
            chat = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(endpoint.chats)
                endpoint.chats.append(chat)
                endpoint.keys.append(self.headers.get("authorization"))
            reply = endpoint.answer(chat, number)
            self.send(Reply(saying(reply)) if isinstance(reply, str) else reply)

        def send(self, reply: Reply) -> None:
            time.sleep(reply.pause)
            body = reply.body.encode()
            self.send_response(reply.status)
            headers = {"content-type": reply.kind, "content-length": str(len(body)), **reply.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: reply.cut])
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
