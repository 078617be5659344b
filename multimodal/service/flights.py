"""A request that is being answered: its generations end with it, however it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from multimodal.engine import Generation
from multimodal.service.errors import ApiError


def stopping() -> ApiError:
    """What is told to those whom a server that stops does not answer."""
    return ApiError(503, "the server is shutting down: ask again when it is back", code="shutting_down")


class Flight:
    """The generations of one request.

    They are made in a thread that nobody can interrupt. What always holds: when the flight is over, none goes on,
    even one that is made later.

    Attributes:
        generations: In the order of the choices.
        error: Why it was ended from outside.
    """

    def __init__(self) -> None:
        self.generations: list[Generation] = []
        self.error: ApiError | None = None
        self._over = False
        self._lock = threading.Lock()

    def add(self, generation: Generation) -> None:
        """One more generation."""
        with self._lock:
            self.generations.append(generation)
            if self._over:
                generation.cancel()

    def end(self, error: ApiError | None = None) -> None:
        """End all generations within one token; who waits for them is told the error."""
        with self._lock:
            self._over, self.error = True, self.error or error
            for generation in self.generations:
                generation.cancel()


class Flights:
    """All that is being answered.

    Args:
        seconds: That an answer may take.
    """

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds
        self.stopping = False
        self._flights: set[Flight] = set()

    def __len__(self) -> int:
        """How many requests are being answered."""
        return len(self._flights)

    @contextmanager
    def flight(self) -> Iterator[Flight]:
        """A flight that lasts as long as the block.

        Raises:
            ApiError: 503, if the server is about to stop.
        """
        if self.stopping:
            raise stopping()
        flight = Flight()
        message = f"the answer took longer than {self.seconds:g} seconds: ask for fewer tokens"
        late = ApiError(503, message, code="timeout")
        timer = asyncio.get_running_loop().call_later(self.seconds, flight.end, late)
        self._flights.add(flight)
        try:
            yield flight
        finally:
            timer.cancel()
            flight.end()
            self._flights.discard(flight)

    def end_all(self) -> None:
        """The server stops: whoever still waits is told."""
        for flight in list(self._flights):
            flight.end(stopping())
