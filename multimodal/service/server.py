"""Serving a model, in the foreground or beside a program.

What always holds: nothing but this machine can connect where nobody is asked for a key; and at the end no generation
goes on.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.types import ASGIApp

from multimodal.model import MultiModalModel
from multimodal.service.answering import Answering
from multimodal.service.app import create_app
from multimodal.service.doors import Doors, is_loopback
from multimodal.service.front import Front
from multimodal.service.logs import AuditLog, RequestLog
from multimodal.service.settings import ServiceSettings

LOOPBACK = "127.0.0.1"
PATIENCE = 5  # seconds that a caller has to read the end of its answer when the server shuts down
BACKLOG = 1024  # connections that wait to be accepted
KEEP_ALIVE = 75  # seconds, nginx's: a client gives up an idle connection first, so none is cut while it sends on it


def serve(
    model: MultiModalModel,
    *,
    name: str,
    host: str = LOOPBACK,
    port: int = 8000,
    settings: ServiceSettings | None = None,
    database: Engine | None = None,
    log: RequestLog | None = None,
    audit: AuditLog | None = None,
    front: Starlette | None = None,
) -> None:
    """Serve a model until Ctrl-C; says its URL when it is ready.

    Args:
        model: What answers.
        name: What callers call it.
        host: An address of this machine; without keys one that no other machine reaches.
        port: Of TCP; 0 takes one that is free.
        settings: Its limits.
        database: As for :func:`create_app`.
        log: Likewise.
        audit: Likewise.
        front: Likewise.

    Raises:
        ValueError: As :func:`check_address` says.
        OSError: If the port is taken.
    """
    check_address(host, port, database=database)
    with listening(host, port) as listener:
        app = create_app(model, name=name, settings=settings, database=database, log=log, audit=audit, front=front)
        server = _Server(app)
        model.engine.prepare()  # with the loading, not with somebody's first question
        guarded = app.state.answering.doors.guarded()
        whom = "to whom has a key" if guarded else "to this machine only: there are no keys"
        print(f"{name} answers at {url_of(listener)}, {whom} (Ctrl-C ends it)", flush=True)
        if front is not None:
            login = "; its password is a key of the scope demo" if guarded else ""
            print(f"the demo is at {url_of(listener).removesuffix('v1')}{login}", flush=True)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


@contextmanager
def serving(
    model: MultiModalModel,
    *,
    name: str,
    settings: ServiceSettings | None = None,
    database: Engine | None = None,
    log: RequestLog | None = None,
    audit: AuditLog | None = None,
    front: Starlette | None = None,
) -> Iterator[str]:
    """Serve a model in a thread, at a port that is free, for as long as the block lasts.

    Args:
        model: What answers.
        name: What callers call it.
        settings: Its limits. By default as for :func:`serve`, but that the end of the block does not wait for answers.
        database: As for :func:`create_app`.
        log: Likewise.
        audit: Likewise.
        front: Likewise.

    Yields:
        The base URL, ``http://127.0.0.1:PORT/v1``; the endpoint is ready then.
    """
    with listening(LOOPBACK, 0) as listener:
        url = url_of(listener)
        settings = settings or ServiceSettings(grace_seconds=0)
        app = create_app(model, name=name, settings=settings, database=database, log=log, audit=audit, front=front)
        server = _Server(app)
        thread = threading.Thread(target=server.run, args=([listener],), name="service", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the endpoint did not start: its log says why")
                time.sleep(0.005)
            yield url
        finally:
            server.should_exit = True
            thread.join()


def check_address(host: str, port: int, *, database: Engine | None = None) -> None:
    """Make sure that nobody is served whom nobody has asked for a key.

    Args:
        host: Of the server.
        port: Likewise.
        database: With the keys, if there are any.

    Raises:
        ValueError: If other machines reach the host, or there is no such port.
    """
    if not is_loopback(host) and not Doors(database).guarded():
        raise ValueError(
            f"other machines may reach the host {host!r}, and the service asks nobody for a key: use {LOOPBACK}, or "
            "make a key with `multimodal keys create` and name its --store"
        )
    if not 0 <= port <= 65535:
        raise ValueError(f"there is no port {port}: give one of 1 to 65535, or 0 for any that is free")


class _Server(uvicorn.Server):
    """Finishes what is being answered, or ends it, before it waits for its callers to leave."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(server_config(app, timeout_graceful_shutdown=PATIENCE))
        self._answering: Answering = app.state.answering
        self._front: Front | None = app.state.front

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:  # nobody new, while those who are here are answered
            server.close()
        flights = self._answering.flights
        flights.stopping = True
        until = time.monotonic() + self._answering.settings.grace_seconds
        while flights and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self._answering.end_all()
        if self._front is not None:
            self._front.end_all()
        await super().shutdown(sockets)


def server_config(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """How every server of the service treats connections.

    Args:
        app: What is served.
        **more: What differs, as uvicorn takes it.
    """
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        backlog=BACKLOG,
        **more,
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine.

    Raises:
        OSError: If the port is taken.
    """
    host = LOOPBACK if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"nothing can be served at port {port} of {host} ({reason}): give another port") from error


def url_of(listener: socket.socket) -> str:
    """The base URL of what is served there."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
