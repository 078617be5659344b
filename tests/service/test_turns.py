"""Whose turn it is: order, fairness, bounds, and what becomes of turns that nobody takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from multimodal.service.errors import ApiError
from multimodal.service.turns import Turns


class Room:
    """One place, and those who wait for it."""

    def __init__(self, *, waiting: int = 100, seconds: float = 30) -> None:
        self.turns = Turns(places=1, waiting=waiting, seconds=seconds)
        self.order: list[str] = []
        self.end = asyncio.Event()

    async def ask(self, name: str) -> None:
        with await self.turns.take(name[0]):
            self.order.append(name)
            await self.end.wait()

    async def asking(self, *names: str) -> list[asyncio.Task[None]]:
        tasks = []
        for name in names:
            tasks.append(asyncio.ensure_future(self.ask(name)))
            await asyncio.sleep(0)
        return tasks


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(10):
            await work()

    asyncio.run(within())


def test_callers_take_turns() -> None:
    async def work() -> None:
        room = Room()
        tasks = await room.asking("a1", "a2", "a3", "a4", "b1", "c1", "b2")
        assert (room.turns.running, room.turns.waiting) == (1, 6)
        room.end.set()
        await asyncio.gather(*tasks)
        assert room.order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
        assert (room.turns.running, room.turns.waiting) == (0, 0)

    run(work)


def test_a_full_room_refuses_the_newest_of_the_longest_line() -> None:
    async def work() -> None:
        room = Room(waiting=3)
        tasks = await room.asking("a0", "a1", "a2", "a3", "b1", "a4")
        room.end.set()
        said = await asyncio.gather(*tasks, return_exceptions=True)
        refused = {name for name, its in zip(("a0", "a1", "a2", "a3", "b1", "a4"), said, strict=True) if its}
        assert refused == {"a3", "a4"} and room.order == ["a0", "a1", "b1", "a2"]
        for error in said:
            if isinstance(error, ApiError):
                assert error.status == 429 and int((error.headers or {})["Retry-After"]) >= 1

    run(work)


def test_who_waits_too_long_is_told() -> None:
    async def work() -> None:
        room = Room(seconds=0.05)
        first, second = await room.asking("a1", "b1")
        with pytest.raises(ApiError, match=r"no turn came within 0\.05 seconds") as caught:
            await second
        assert caught.value.status == 503 and room.turns.waiting == 0
        room.end.set()
        await first
        assert room.turns.running == 0

    run(work)


@pytest.mark.parametrize("when", ["while waiting", "when its turn comes"])
def test_who_leaves_costs_nobody_a_turn(when: str) -> None:
    async def work() -> None:
        room = Room()
        room.end.set()
        with await room.turns.take("a"):
            leaving, last = await room.asking("b1", "c1")
            if when == "while waiting":
                leaving.cancel()
        leaving.cancel()  # the turn is its own by now, and it has not run yet
        await last
        assert room.order == ["c1"] and (room.turns.running, room.turns.waiting) == (0, 0)

    run(work)


def test_all_who_wait_can_be_refused() -> None:
    async def work() -> None:
        room = Room()
        first, *others = await room.asking("a1", "a2", "b1")
        room.turns.refuse_all(lambda: ApiError(503, "no more"))
        said = await asyncio.gather(*others, return_exceptions=True)
        assert [str(its) for its in said] == ["no more"] * 2
        room.end.set()
        await first
        assert (room.turns.running, room.turns.waiting) == (0, 0)

    run(work)
