"""Whose turn it is: so many requests are worked on at once, the others wait in one line for each caller.

Lines are served in turns, so that who asks a thousand questions does not keep out who asks one. The room to wait in is
bounded; when it is full, the newest request of the longest line is refused (McKenney, "Stochastic fairness queueing",
1990, section 3). Knows no model, and runs in one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from multimodal.service.errors import ApiError

LONGEST_RETRY = 60  # seconds that a caller is told to stay away, at most


class Turns:
    """Gives turns.

    Args:
        places: How many requests have their turn at once.
        waiting: How many may wait.
        seconds: For which one waits, at most.

    Attributes:
        running: How many have their turn.
    """

    def __init__(self, *, places: int, waiting: int, seconds: float) -> None:
        self.places, self.most, self.seconds = places, waiting, seconds
        self.running = 0
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the first is served next
        self._took = 1.0  # seconds of a turn, averaged over the last ones

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._lines.values()))

    async def take(self, caller: str) -> AbstractContextManager[None]:
        """Wait for a turn of a caller; it lasts while the context manager is open, which must be opened at once.

        Raises:
            ApiError: 429, if too many wait; 503, if it took too long. Both say when to ask again.
        """
        if self.running < self.places:
            self.running += 1
            return self._turn()
        self._make_room(caller)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(caller, deque()).append(place)
        try:
            async with asyncio.timeout(self.seconds):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._pass_on()  # the turn came in the moment in which nobody waited for it any more
            else:
                self._leave_line(caller, place)
            if isinstance(error, TimeoutError):
                message = f"no turn came within {self.seconds:g} seconds: ask again later"
                raise self._refusal(503, message, "timeout") from None
            raise
        return self._turn()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._took += 0.1 * (time.monotonic() - began - self._took)
            self._pass_on()

    def _pass_on(self) -> None:
        """Give a turn that ended to the line that was not served for longest."""
        while self._lines:
            caller, line = self._lines.popitem(last=False)
            place = line.popleft()
            if line:
                self._lines[caller] = line
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1

    def refuse_all(self, refusal: Callable[[], ApiError]) -> None:
        """Refuse all who wait."""
        for line in self._lines.values():
            for place in line:
                if not place.done():
                    place.set_exception(refusal())
        self._lines.clear()

    def _leave_line(self, caller: str, place: asyncio.Future[None]) -> None:
        line = self._lines.get(caller)
        if line is not None and place in line:
            line.remove(place)
            if not line:
                del self._lines[caller]

    def _make_room(self, caller: str) -> None:
        if self.waiting < self.most:
            return
        message = f"{self.waiting} requests wait already: ask again in a moment"
        refusal = self._refusal(429, message, "rate_limit_exceeded")
        longest = max(self._lines, key=lambda name: len(self._lines[name]), default=caller)
        if len(self._lines.get(longest, ())) <= len(self._lines.get(caller, ())) + 1:
            raise refusal
        newest = self._lines[longest][-1]
        self._leave_line(longest, newest)
        if not newest.done():
            newest.set_exception(refusal)

    def _refusal(self, status: int, message: str, code: str) -> ApiError:
        soon = math.ceil(self._took * (self.waiting + 1) / self.places)
        return ApiError(status, message, code=code, headers={"Retry-After": str(min(max(soon, 1), LONGEST_RETRY))})
