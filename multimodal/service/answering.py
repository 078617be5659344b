"""How a request becomes an answer: let in, read, checked, given its turn, begun, and told whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import Engine

from multimodal.adapters import digest_of
from multimodal.engine import EngineClosed
from multimodal.model import MultiModalModel
from multimodal.service import limits
from multimodal.service.answers import AnswerCache
from multimodal.service.bodies import Room, read_body, unless_gone
from multimodal.service.chat import chat_of, stored, unstored
from multimodal.service.completion import Completion
from multimodal.service.doors import Caller, Doors
from multimodal.service.errors import ApiError
from multimodal.service.events import EventStream
from multimodal.service.flights import Flight, Flights, stopping
from multimodal.service.logs import AuditLog, RequestLog
from multimodal.service.metrics import Metrics
from multimodal.service.schema import ChatRequest, read_request
from multimodal.service.settings import ServiceSettings
from multimodal.service.turns import Turns
from multimodal.store import SessionStore

PATIENCE = 30  # seconds that a caller has to read the end of an answer whose time is up
READERS = 2  # requests whose pictures are decoded at once: each may need 150 MB for a moment


@dataclass
class _Question:
    """A request, and what is needed to answer it.

    Attributes:
        asked: What was asked.
        caller: By whom.
        facts: For the log.
        new: The chat's messages that came with the request.
        chat: With those of its session before.
        key: Of the answer cache.
    """

    asked: ChatRequest
    caller: Caller
    facts: dict[str, Any]
    new: list[dict[str, Any]]
    chat: list[dict[str, Any]]
    key: str | None = None

    @property
    def session(self) -> str | None:
        return self.asked.metadata.session_id


class Answering:
    """All that is being answered.

    Args:
        model: What answers.
        name: What callers call it.
        settings: The limits.
        database: With keys and sessions, if there are any.
        log: Of requests.
        audit: Of answers.

    Attributes:
        fingerprint: Tells weights apart that are called the same.
        doors: Who is let in.
        flights: What is being answered.
        turns: Who waits.
        cache: Answers that are kept.
        sessions: Chats that are kept; None without a database.
        metrics: The figures of all this.
    """

    def __init__(
        self,
        model: MultiModalModel,
        *,
        name: str,
        settings: ServiceSettings,
        database: Engine | None = None,
        log: RequestLog | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self.model, self.name, self.settings = model, name, settings
        self.fingerprint = f"fp_{digest_of(model.model)[:12]}"
        self.doors = Doors(database)
        self.flights = Flights(seconds=settings.answer_seconds)
        self.turns = Turns(places=len(model.engine.slots), waiting=settings.waiting, seconds=settings.queue_seconds)
        self.cache = AnswerCache(settings.cached_answers)
        self.sessions = (
            None
            if database is None
            else SessionStore(database, picture_bytes=settings.kept_picture_bytes, days=settings.keep_days)
        )
        self.metrics = Metrics(self)
        self.log, self.audit = log, audit
        self._room = Room(settings.held_bytes)
        self._readers = CapacityLimiter(READERS)
        self._open_sessions: set[tuple[str, str]] = set()

    def names(self) -> dict[str, str | None]:
        """What callers may ask for, and the adapter that each means."""
        return {self.name: None, **{f"{self.name}:{adapter}": adapter for adapter in self.model.adapters}}

    def adapter_of(self, called: str) -> str | None:
        """The adapter that a model's name means.

        Raises:
            ApiError: 404, if there is no such model.
        """
        known = self.names()
        if called not in known:
            message = f"there is no model {called!r:.80}: use {' or '.join(known)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return known[called]

    def check_ready(self) -> None:
        """Make sure that a question would be answered.

        Raises:
            ApiError: 503, while the server stops.
            EngineClosed: If the engine is closed.
        """
        if self.flights.stopping:
            raise stopping()
        if self.model.engine.closed:
            raise EngineClosed("the engine is closed: make another one")

    def end_all(self) -> None:
        """The server stops: who waits is told, and what is being written ends."""
        self.turns.refuse_all(stopping)
        self.flights.end_all()

    async def answer(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            ApiError: If it is refused.
            ClientDisconnect: If the caller left.
        """
        caller = await self.doors.caller(request, "chat")
        with ExitStack() as held:  # given back when the answer has been told, or nobody waits for it any more
            flight = held.enter_context(self.flights.flight())
            room = held.enter_context(self._room.taken())
            body = await read_body(request, self.settings.body_bytes, room)
            asked = await run_sync(self._read, body)
            del body
            self.doors.charge(caller, asked.n)
            question = _Question(asked, caller, request.state.facts, [], [])
            completion = await unless_gone(request, self._begin(question, flight, held))
            if asked.stream:
                seconds = self.settings.answer_seconds + PATIENCE
                return EventStream(completion.chunks(), while_open=held.pop_all(), seconds=seconds)
            return JSONResponse(await unless_gone(request, completion.whole()))

    def _read(self, body: bytes) -> ChatRequest:
        asked = read_request(body)
        self.adapter_of(asked.model)
        limits.check(asked, self.settings)
        return asked

    async def _begin(self, question: _Question, flight: Flight, held: ExitStack) -> Completion:
        """From a request to generations that have begun."""
        if question.session is not None:
            held.enter_context(self._session(question, question.session))
        await run_sync(self._gather, question)
        question.key = self.cache.key(question.asked, question.chat)
        known = None if question.key is None else self.cache.get(question.key)
        if known is not None:
            flight.generations = known
        else:
            held.enter_context(await self.turns.take(question.caller.id))
            held.callback(lambda: self.metrics.answered(flight.generations, question.facts["arrived"]))
            await run_sync(self._submit, question, flight, limiter=self._readers)
        end = partial(run_sync, self._keep, question, flight, known is None)
        return Completion(self.model, flight, question.asked, fingerprint=self.fingerprint, on_end=end)

    @contextmanager
    def _session(self, question: _Question, name: str) -> Iterator[None]:
        """A session that nobody else goes on with meanwhile."""
        if self.sessions is None:
            message = "this server keeps no sessions: leave session_id out, or start it with --store"
            raise ApiError(400, message, param="metadata.session_id", code="no_sessions")
        if question.asked.n > 1:
            raise ApiError(400, "a session goes on with one answer: leave n out", param="n", code="invalid_value")
        place = (question.caller.id, name)
        if place in self._open_sessions:
            message = "a question of this session is being answered: wait for it, or use another session"
            raise ApiError(409, message, param="metadata.session_id", code="session_busy")
        self._open_sessions.add(place)
        try:
            yield
        finally:
            self._open_sessions.discard(place)

    def _gather(self, question: _Question) -> None:
        """The chat with its pictures, and what its session remembers before it."""
        question.new = chat_of(question.asked.messages, hosts=self.settings.allowed_hosts)
        question.chat = question.new
        if question.session is not None and self.sessions is not None:
            question.chat = unstored(self.sessions.read(question.caller.id, question.session)) + question.new
        pictures = sum(part["type"] == "image" for message in question.chat for part in message["content"])
        if pictures > self.settings.pictures:
            message = f"{pictures} pictures with those of the session exceed the server's {self.settings.pictures}: "
            raise ApiError(400, message + "begin another session", code="limit_exceeded")
        question.facts.update(model=question.asked.model, pictures=pictures)

    def _submit(self, question: _Question, flight: Flight) -> None:
        """Have the engine begin."""
        asked = question.asked
        for number in range(asked.n):
            stream = self.model.reply(
                question.chat,
                max_new_tokens=asked.most_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=None if asked.seed is None else asked.seed + number,
                stop=asked.stop,
                adapter=self.adapter_of(asked.model),
                top_logprobs=asked.top_logprobs,
                max_pixels=self.settings.pixels,
                max_seconds=self.settings.decode_seconds,
            )
            flight.add(stream.generation)

    def _keep(self, question: _Question, flight: Flight, computed: bool) -> None:
        """Everything was said: keep what is to be kept, before the caller is told that this was all."""
        answers = [generation.text.strip() for generation in flight.generations]
        if question.session is not None and self.sessions is not None:
            answer = {"role": "assistant", "content": [{"type": "text", "text": answers[0]}]}
            self.sessions.append(question.caller.id, question.session, [*stored(question.new), answer])
        if question.key is not None and computed:
            self.cache.put(question.key, flight.generations)
        if self.audit is not None:
            shown = [p["image"].data for message in question.chat for p in message["content"] if p["type"] == "image"]
            self.audit.write(
                self.model,
                request=question.facts["id"],
                key=question.caller.id,
                name=question.asked.model,
                adapter=self.adapter_of(question.asked.model),
                pictures=shown,
                answers=answers,
            )
        written = sum(len(generation.tokens) for generation in flight.generations)
        question.facts.update(
            prompt_tokens=len(flight.generations[0].request.tokens), completion_tokens=written, cached=not computed
        )
        if self.log is not None and self.log.said:
            said = [[part["text"] for part in message["content"] if part["type"] == "text"] for message in question.new]
            question.facts.update(said=said, answers=answers)
