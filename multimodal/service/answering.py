"""How a request becomes an answer: read, checked, given its turn, begun, and told whole or in pieces."""

from __future__ import annotations

from contextlib import ExitStack

import anyio
from anyio import CapacityLimiter
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from multimodal.engine import EngineClosed
from multimodal.model import MultiModalModel
from multimodal.service import limits
from multimodal.service.bodies import read_body, unless_gone
from multimodal.service.chat import chat_of
from multimodal.service.completion import Completion
from multimodal.service.errors import ApiError
from multimodal.service.events import EventStream
from multimodal.service.flights import Flight, Flights, stopping
from multimodal.service.schema import ChatRequest, read_request
from multimodal.service.settings import ServiceSettings
from multimodal.service.turns import Turns

READERS = 2  # requests whose pictures are decoded at once: each may need 150 MB for a moment


class Answering:
    """All that is being answered.

    Args:
        model: What answers.
        name: What callers call it.
        settings: The limits.

    Attributes:
        flights: What is being answered.
        turns: Who waits.
    """

    def __init__(self, model: MultiModalModel, *, name: str, settings: ServiceSettings) -> None:
        self.model, self.name, self.settings = model, name, settings
        self.flights = Flights(seconds=settings.answer_seconds)
        self.turns = Turns(places=len(model.engine.slots), waiting=settings.waiting, seconds=settings.queue_seconds)
        self._readers = CapacityLimiter(READERS)

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
        body = await read_body(request, self.settings.body_bytes)
        asked = await anyio.to_thread.run_sync(self._read, body)
        with ExitStack() as held:  # given back when the answer has been told, or nobody waits for it any more
            flight = held.enter_context(self.flights.flight())
            completion = await unless_gone(request, self._begin(asked, flight, held))
            if asked.stream:
                return EventStream(completion.chunks(), while_open=held.pop_all())
            return JSONResponse(await unless_gone(request, completion.whole()))

    def _read(self, body: bytes) -> ChatRequest:
        asked = read_request(body)
        self.adapter_of(asked.model)
        limits.check(asked, self.settings)
        return asked

    async def _begin(self, asked: ChatRequest, flight: Flight, held: ExitStack) -> Completion:
        held.enter_context(await self.turns.take("local"))
        await anyio.to_thread.run_sync(self._submit, asked, flight, limiter=self._readers)
        return Completion(self.model, flight, asked)

    def _submit(self, asked: ChatRequest, flight: Flight) -> None:
        """Have the engine begin."""
        chat = chat_of(asked.messages)
        for number in range(asked.n):
            stream = self.model.reply(
                chat,
                max_new_tokens=asked.most_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=None if asked.seed is None else (asked.seed + number) % 2**63,
                stop=asked.stop,
                adapter=self.adapter_of(asked.model),
                top_logprobs=asked.top_logprobs,
                max_pixels=self.settings.pixels,
            )
            flight.add(stream.generation)
