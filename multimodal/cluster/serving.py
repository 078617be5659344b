"""The service on Ray Serve: the same application and the same engine, in as many replicas as are asked for.

A router takes each request and hands it to the replica that its picture belongs to, by consistent hashing of the
picture's digest, and to the next one where that is busy. ``multimodal serve --ray`` runs it in its own process; with
``serve deploy`` it is a deployment behind Ray's proxies. A replica runs the application itself, untouched: what it
says is what one process says. What always holds: a request whose replica dies before it said anything is given to
another one; a stream that had begun ends with an event that says so; and a caller who leaves ends what was asked.
An update replaces replica by replica: those that go finish what they have begun, and nobody is refused meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pydantic_core
import uvicorn
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from sqlalchemy import Engine
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from multimodal.cluster.connection import connected  # first: it says how Ray is to be imported
from multimodal.model import MultiModalModel, is_fused
from multimodal.service import ServiceSettings, check_address, create_app
from multimodal.service.app import GONE
from multimodal.service.bodies import read_body, unless_gone
from multimodal.service.errors import ApiError
from multimodal.service.events import event
from multimodal.service.server import LOOPBACK, listening, server_config, url_of
from multimodal.store import open_database

# isort: split
import ray
from ray import exceptions, serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import list_named_actors

NAME = "multimodal"  # of the application
TRIES = 3  # of a request whose replica dies
SLOTS = 8  # answers that a replica writes at once
ONGOING = 2 * SLOTS  # requests of a replica; with so many it is busy
MOST_REPLICAS = 1000
MOST_BODY = 128 * 2**20  # bytes: the application has a limit of its own, below this one
MOST_SENT = 3 * 2**20  # bytes of a body that goes to a replica by itself, in gRPC; a longer one in Ray's shared memory
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
CONTROLLER = "SERVE_CONTROLLER_ACTOR"  # Ray's name for it
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")

Message = dict[str, Any]  # of ASGI
log = logging.getLogger("multimodal.cluster")


class ServingSettings(BaseModel, extra="forbid"):
    """What is served, and on what; as ``args`` of an application in a file for ``serve deploy``, too.

    Attributes:
        model: ``"embedded"``, or a folder or hub id, the same on every machine.
        name: What callers call it, however its folder is called: they notice no update; None for that of its folder.
        adapters: Folders of adapters, likewise.
        precision: As :class:`~multimodal.model.MultiModalModel` takes it.
        replicas: How many models answer; ``"auto"`` for as many as the waiting requests need.
        num_cpus: Cores of a replica, which are also its threads.
        num_gpus: GPUs of a replica, or a share of one.
        store: Database of keys and sessions, which every replica reaches; None for neither.
        limits: Fields of :class:`~multimodal.service.ServiceSettings`; they hold for each replica, but for ``waiting``,
            which is what the router keeps, and ``grace_seconds``, for which Ray lets a replica finish.
    """

    model: str = "embedded"
    name: str | None = None
    adapters: list[str] = []
    precision: str = "auto"
    replicas: int | Literal["auto"] = 1
    num_cpus: float = 1
    num_gpus: float = 0
    store: str | None = None
    limits: dict[str, Any] = {}

    @property
    def called(self) -> str:
        """What callers call the model."""
        return self.name or Path(self.model).name

    def database(self) -> Engine | None:
        """The store, opened."""
        return None if self.store is None else open_database(self.store)


class Replica:
    """A model behind its application, for requests that a :class:`Router` hands on."""

    def __init__(self, settings: ServingSettings) -> None:
        model = MultiModalModel.from_pretrained(settings.model, precision=settings.precision)
        for folder in settings.adapters:
            model.load_adapter(folder)
        model.engine.prepare()  # with the loading, not with somebody's first question
        limits = ServiceSettings(**settings.limits)
        self._app = create_app(model, name=settings.called, settings=limits, database=settings.database())
        self._ending: set[asyncio.Future[None]] = set()  # tasks that nobody waits for: they have to be held

    async def __call__(self, scope: Message, body: bytes) -> AsyncGenerator[list[Message]]:
        """Run the application; yields the messages of its response, those that are ready together at once."""
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        unread = [body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            await said.put(dict(message))

        task = asyncio.create_task(self._app(scope, receive, send))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.add_done_callback(lambda _: said.put_nowait(None))
        try:
            ready: list[Message] = []
            while (message := await said.get()) is not None:
                ready.append(message)
                if said.empty() and message["type"] != "http.response.start":  # headers go with what they head
                    yield ready
                    ready = []
            if ready:
                yield ready
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the application failed", exc_info=error)  # it has told the caller by itself
        finally:
            gone.set()


class Router:
    """The entrance: hands requests to replicas, and answers to callers."""

    def __init__(self, replica: DeploymentHandle) -> None:
        self._replica = replica.options(stream=True)

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The entrance as an application of ASGI."""
        response = await self(Request(scope, receive))
        await response(scope, receive, send)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            body = await read_body(request, MOST_BODY, lambda count: None)  # a replica says what is too much
            return await unless_gone(request, self._response(request.scope, body))
        except ClientDisconnect:
            return Response(status_code=GONE)
        except ApiError as error:
            return error.response()

    async def _response(self, scope: Scope, body: bytes) -> Response:
        """What a replica says to a request, as far as it is known when it begins to say something.

        Raises:
            ApiError: As :meth:`_answered` says, or 500 if a replica says nothing.
        """
        messages = self._answered({key: scope.get(key) for key in SCOPE}, body)
        try:
            start = await anext(messages)
            first = await anext(messages)
        except StopAsyncIteration:
            raise ApiError(500, "a replica said nothing: its log says more", code="internal_error") from None
        headers = [(bytes(key), bytes(value)) for key, value in start.get("headers", [])]
        streams = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
        response = StreamingResponse(_pieces(first, messages, streams=streams), start["status"])
        response.raw_headers = headers
        return response

    async def _answered(self, scope: Message, body: bytes) -> AsyncGenerator[Message]:
        """The messages of a replica's response.

        Raises:
            ApiError: 429 if too many wait; 503 if no replica starts, or replicas died: after the first message the one
                that answered, before it as many as were tried.
        """
        replica = self._replica.options(session_id=routing_key(body), _by_reference=len(body) > MOST_SENT)
        for tried in range(1, TRIES + 1):
            begun = False
            stream = replica.remote(scope, body)
            try:
                async for messages in stream:
                    begun = True
                    for message in messages:
                        yield message
                return
            except BackPressureError:
                headers = {"Retry-After": "1"}
                message = "as many requests as may wait do so already: ask again in a moment"
                raise ApiError(429, message, code="rate_limit_exceeded", headers=headers) from None
            except DeploymentUnavailableError:
                message = "no replica is there, and none starts: ask again when the service is mended"
                raise ApiError(503, message, code="no_replica") from None
            except exceptions.RayActorError as error:
                log.warning("a replica died while it answered (try %d): %s", tried, type(error).__name__)
                if begun or tried == TRIES:
                    message = "the replica that answered is gone: ask again"
                    raise ApiError(503, message, code="replica_lost", headers={"Retry-After": "1"}) from None
            finally:
                stream.cancel()


def routing_key(body: bytes) -> str:
    """What says which replica a chat belongs to: its session, or else its first picture, as a digest of how it came.

    Returns:
        Nothing without either, or if it is not a chat: then any replica answers.
    """
    try:
        said = pydantic_core.from_json(body)
        session = (said.get("metadata") or {}).get("session_id")
        if session is not None:  # a later question of it brings no picture
            return hashlib.sha256(f"session {session}".encode()).hexdigest()
        urls = (
            part["image_url"]["url"]
            for message in said["messages"]
            if isinstance(message["content"], list)
            for part in message["content"]
            if part.get("type") == "image_url"
        )
        url = next(urls, None)
        return "" if url is None else hashlib.sha256(url.encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):  # the application says what is wrong with it
        return ""


async def _pieces(first: Message, rest: AsyncGenerator[Message], *, streams: bool) -> AsyncGenerator[bytes]:
    try:
        yield first.get("body", b"")
        async for message in rest:
            yield message.get("body", b"")
    except ApiError as error:
        if not streams:  # headers promised something else: better cut short than wrong
            raise
        yield event(error.body()).encode()
    finally:
        await rest.aclose()


def build(args: ServingSettings | dict[str, Any]) -> serve.Application:
    """The application for ``serve deploy`` and ``serve run``: ``multimodal.cluster.serving:build``.

    Args:
        args: What is served, and on what: :class:`ServingSettings`, or their fields as a file has them.
    """
    settings = ServingSettings.model_validate(args)
    limits = ServiceSettings(**settings.limits)
    router = serve.deployment(
        Router,
        name="Router",
        max_ongoing_requests=ONGOING * MOST_REPLICAS,
        ray_actor_options={"num_cpus": 0},
        # An update stops it when the next one is there, and lets it wait for its last answer: it takes no core.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=limits.queue_seconds + limits.answer_seconds,
    )
    return router.bind(_replicas(settings))


def _replicas(settings: ServingSettings) -> serve.Application:
    """The replicas alone, for a router that is no deployment."""
    limits = ServiceSettings(**settings.limits)
    many: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.replicas == "auto":
        many = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=1, max_replicas=MOST_REPLICAS, target_ongoing_requests=SLOTS
            )
        }
    replica = serve.deployment(
        Replica,
        name="Replica",
        **many,
        max_ongoing_requests=ONGOING,
        max_queued_requests=limits.waiting,
        graceful_shutdown_timeout_s=limits.grace_seconds,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        ),
        health_check_period_s=2,
    )
    return replica.bind(settings)


def serve_on_ray(settings: ServingSettings, *, host: str = LOOPBACK, port: int = 8000) -> None:
    """Serve on the cluster that ``RAY_ADDRESS`` names, or on this machine, until Ctrl-C; says the URL when it is ready.

    The router runs in this process: no proxy of Ray's stands before it.

    Args:
        settings: What is served, and on what.
        host: An address of this machine; one that others reach needs keys in the store.
        port: Of TCP; 0 takes one that is free.

    Raises:
        ValueError: As :func:`~multimodal.service.check_address` says.
        OSError: If the port is taken.
        RuntimeError: If there is no such cluster, it serves something already, or the replicas do not start.
    """
    check_address(host, port, database=settings.database())
    with listening(host, port) as listener, connected():
        if _controller() is not None:
            raise RuntimeError("the cluster serves something already: --update it, or end it with `serve shutdown`")
        # Ray starts nothing there: an update asks for the address, to know who reaches the service.
        address = HTTPOptions(host=host, port=listener.getsockname()[1])
        serve.start(proxy_location="Disabled", http_options=address, logging_config=LOGGING)
        try:
            router = Router(_deploy(settings, routed=False))
            print(f"{settings.called} answers at {url_of(listener)} (Ctrl-C ends it)", flush=True)
            grace = ServiceSettings(**settings.limits).grace_seconds
            config = server_config(
                router.asgi, interface="asgi3", lifespan="off", timeout_graceful_shutdown=math.ceil(grace)
            )
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            serve.shutdown()


def update_on_ray(settings: ServingSettings) -> None:
    """Replace what the service of a cluster serves, replica by replica, while it answers; says so at the end.

    The cluster is the one that ``RAY_ADDRESS`` names, or the one that runs on this machine. The address stays.

    Args:
        settings: All that is served from now on, and on what.

    Raises:
        ValueError: As :func:`~multimodal.service.check_address` says, or if there is no such model.
        RuntimeError: If there is no such cluster, it does not serve this service, or the new replicas do not start.
    """
    if not is_fused(settings.model):  # a replica would stop for one that never starts
        raise ValueError(f"there is no trained model {settings.model!r}: the service goes on as it was")
    with connected("auto"):
        controller = _controller()
        if controller is None or NAME not in serve.status().applications:
            raise RuntimeError("the cluster does not serve this yet: start it without --update")
        entrance: HTTPOptions = ray.get(controller.get_http_config.remote())
        check_address(entrance.host or "", entrance.port, database=settings.database())
        before = _answering(controller)
        _deploy(settings, routed=entrance.location != ProxyLocation.Disabled)
        while before & _answering(controller):  # Serve can call itself running before it has begun
            status = serve.status().applications[NAME]
            if status.status == "DEPLOY_FAILED":
                raise RuntimeError(f"the new replicas do not start: {status.message}")
            time.sleep(0.2)
        print(f"{settings.called} is updated on all replicas", flush=True)


def _deploy(settings: ServingSettings, *, routed: bool) -> DeploymentHandle:
    """Have the cluster serve it: with a router of its own at the path ``/``, or the replicas alone at none."""
    application, path = (build(settings), "/") if routed else (_replicas(settings), None)
    return serve.run(application, name=NAME, route_prefix=path, logging_config=LOGGING)


def _answering(controller: Any) -> set[str]:
    """The replicas that run, by their numbers."""
    deployments = ray.get(controller.get_serve_instance_details.remote())["applications"][NAME]["deployments"]
    replicas = [replica for each in deployments.values() for replica in each["replicas"]]
    return {replica["replica_id"] for replica in replicas if replica["state"] == "RUNNING"}


def _controller() -> Any:
    """Ray Serve's own actor; None where nothing is served."""
    named = (actor for actor in list_named_actors(all_namespaces=True) if actor["name"] == CONTROLLER)
    return next((ray.get_actor(**actor) for actor in named), None)
