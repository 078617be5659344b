"""How many replicas of which kind a traffic takes: a simulation of queues, fed with measured service times.

A replica is simulated as the engine works: requests wait for a slot; in each turn the prompts of those that have got
one are read, which takes longer where a picture is not cached, and then every answer in a slot gets a token, in a step
whose time hangs on their number. Arrivals are Poisson. What always holds: with the same seed the same figures come out,
on any machine.

What is not simulated: the network, and failures.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from multimodal.cluster import INSTALL

try:
    import simpy
except ImportError as error:
    raise ImportError(f"planning needs SimPy: {INSTALL}") from error

Routing = Literal["picture", "load"]
ROUTINGS: tuple[Routing, ...] = ("picture", "load")

QUESTIONS = 20_000  # that are simulated: 200 of them take longer than p99
WARM_UP = 0.2  # share of them that is not counted, while caches fill
CELL = 32  # replicas, about, that are simulated together; more traffic is several such cells
BUSY = 2  # times its slots: with so many questions a replica is passed over
BASE64 = 4 / 3


class PlanError(ValueError):
    """A plan that cannot be made: why, and what to change."""


@dataclass(frozen=True)
class Measurements:
    """One kind of replica, as ``python -m benchmarks.service_times`` measures it; times are seconds.

    Attributes:
        kind: Its name.
        source: Where the figures come from.
        first: To take a question about a picture that the replica has not seen, and read it.
        later: Likewise, about a picture that it holds.
        step: By number of answers that are written at once, how long a step takes that gives each of them a token.
        answer_tokens: How long answers are: one number of tokens for each answer that was looked at.
        slots: Answers that are written at once, at most.
        cached_pictures: How many pictures it holds.
        picture_bytes: Of a picture file, before it is sent as base64.
        price: US dollars an hour, all included; None if unknown.
        entrance: On top of every answer, without keeping the replica from others: HTTP, the router, waking up after a
            pause.
        handling: On top of every answer, keeping the replica from others: what its process does for Ray. 0 if unknown.
        around: Of a processor, for every answer, outside of the replica: the router, Ray, HTTP. 0 if unknown.
    """

    kind: str
    source: str
    first: float
    later: float
    step: dict[int, float]
    answer_tokens: Sequence[int]
    slots: int
    cached_pictures: int
    picture_bytes: int
    price: float | None = None
    entrance: float = 0.0
    handling: float = 0.0
    around: float = 0.0

    def __post_init__(self) -> None:
        lengths = list(self.answer_tokens)
        times = (self.first, self.later, self.entrance, self.handling, self.around, *self.step.values())
        if not lengths or min(lengths) < 1 or not self.step or min(times) < 0:
            raise PlanError(f"{self.kind}: times are 0 or more, and answers have 1 token or more: measure again")
        if self.slots < 1 or self.cached_pictures < 0:
            raise PlanError(f"{self.kind}: a replica has 1 slot or more, and no negative cache: measure again")

    def steps(self) -> list[float]:
        """Seconds of a step with 0, 1, ..., ``slots`` answers in it, between those that were measured a line."""
        counts = sorted(self.step)
        return [float(np.interp(count, counts, [self.step[at] for at in counts])) for count in range(self.slots + 1)]

    def work(self, cached: float) -> float:
        """Seconds that a question takes of a replica that is full, on average.

        Args:
            cached: Share of questions whose picture the replica holds.
        """
        read = cached * self.later + (1 - cached) * self.first
        return self.handling + read + (float(np.mean(self.answer_tokens)) - 1) * self.steps()[-1] / self.slots

    def alone(self) -> float:
        """Seconds in which 99 of 100 answers about pictures that are held are whole, while nobody else asks."""
        longest = float(np.quantile(self.answer_tokens, 0.99, method="inverted_cdf"))
        return self.entrance + self.handling + self.later + (longest - 1) * self.steps()[1]


def read_measurements(path: Path | None = None) -> Measurements:
    """Read what was measured of a kind of replica.

    Args:
        path: JSON with the fields of :class:`Measurements`; None for the embedded model on two cores.

    Raises:
        PlanError: If the file is not such a one.
    """
    name = "the package's own measurements" if path is None else str(path)
    text = (files("multimodal.cluster") / "measured.json" if path is None else path).read_text(encoding="utf-8")
    try:
        said = json.loads(text)
        said["step"] = {int(rows): float(seconds) for rows, seconds in said["step"].items()}
        return Measurements(**said)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        wanted = ", ".join(entry.name for entry in fields(Measurements))
        raise PlanError(
            f"{name}: not measurements of a replica ({error}): a JSON object with {wanted}, as "
            "`python -m benchmarks.service_times` writes it"
        ) from None


@dataclass(frozen=True)
class Traffic:
    """What comes in.

    Attributes:
        rate: Questions a second, on average.
        questions: Questions about one picture, on average.
        pause: Seconds between two questions about the same picture, on average.
    """

    rate: float
    questions: float = 3.0
    pause: float = 20.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.questions >= 1 and self.pause > 0):
            raise PlanError("traffic is more than 0 questions a second, 1 or more about each picture, with a pause")


@dataclass(frozen=True)
class Outcome:
    """What became of the questions that were simulated. Times are seconds.

    Attributes:
        replicas: How many answered.
        p50: Half of the answers were whole after so long, counted from the arrival of the question.
        p99: 99 of 100 were.
        first_token_p99: 99 of 100 had begun.
        mean: On average they were whole.
        utilisation: Share of the time that a replica was at work.
        cached: Share of the questions whose picture was in the cache of their replica.
        rate: Answers a second.
    """

    replicas: int
    p50: float
    p99: float
    first_token_p99: float
    mean: float
    utilisation: float
    cached: float
    rate: float


@dataclass(frozen=True)
class Plan:
    """Replicas for a traffic.

    Attributes:
        measured: Their kind.
        routing: How a question finds its replica.
        cells: How many like the one that was simulated there are, each with its share of the pictures.
        outcome: Of one cell.
        traffic: All of it.
    """

    measured: Measurements
    routing: Routing
    cells: int
    outcome: Outcome
    traffic: Traffic

    @property
    def replicas(self) -> int:
        """In all cells together."""
        return self.cells * self.outcome.replicas

    @property
    def price(self) -> float | None:
        """US dollars an hour, if the kind has a price."""
        return None if self.measured.price is None else self.replicas * self.measured.price

    @property
    def network(self) -> float:
        """Bytes of pictures that come in each second; every question brings its picture, as base64."""
        return self.traffic.rate * self.measured.picture_bytes * BASE64

    @property
    def entrance_cores(self) -> float:
        """Cores that are busy outside of the replicas: routers, proxies, Ray."""
        return self.traffic.rate * self.measured.around

    @property
    def storage(self) -> float:
        """Bytes of different pictures in a day, for who keeps them."""
        return 86_400 * self.traffic.rate / self.traffic.questions * self.measured.picture_bytes


@dataclass(eq=False)
class _Question:
    picture: int
    tokens: int
    came: float
    counts: bool
    whole: simpy.Event


@dataclass
class _Tally:
    """What is noted of questions that count."""

    whole: list[float] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    hits: int = 0


class _Replica:
    """An engine: slots, a queue before them, a cache of pictures, and one thread that reads prompts and makes steps."""

    def __init__(self, environment: simpy.Environment, measured: Measurements, tally: _Tally) -> None:
        self._now, self._measured, self._tally = environment, measured, tally
        self._steps = measured.steps()
        self._waiting: deque[_Question] = deque()
        self._unread: deque[_Question] = deque()
        self._written: list[tuple[_Question, int]] = []  # with the tokens that are missing
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._work = environment.event()
        self.busy = 0.0
        environment.process(self._run())

    def __len__(self) -> int:
        return len(self._waiting) + len(self._unread) + len(self._written)

    def take(self, question: _Question) -> None:
        self._waiting.append(question)
        if not self._work.triggered:
            self._work.succeed()

    def _run(self) -> Generator[simpy.Event]:
        while True:
            if not len(self):
                self._work = self._now.event()
                yield self._work
            while self._waiting and len(self._unread) + len(self._written) < self._measured.slots:
                self._unread.append(self._waiting.popleft())
            while self._unread:
                question = self._unread.popleft()
                yield self._spend(self._reading(question))
                if question.counts:
                    self._tally.begun.append(self._now.now - question.came)
                self._written.append((question, question.tokens - 1))  # reading gives the first token
                self._leave()
            if self._written:
                yield self._spend(self._steps[len(self._written)])
                self._written = [(question, missing - 1) for question, missing in self._written]
                self._leave()

    def hold(self, picture: int) -> bool:
        """Have a picture in the cache; whether it was there."""
        held = picture in self._cache
        self._cache[picture] = None
        self._cache.move_to_end(picture)
        if len(self._cache) > self._measured.cached_pictures:
            self._cache.popitem(last=False)
        return held

    def _spend(self, seconds: float) -> simpy.Event:
        self.busy += seconds
        return self._now.timeout(seconds)

    def _reading(self, question: _Question) -> float:
        held = self.hold(question.picture)
        self._tally.hits += held and question.counts
        return self._measured.handling + (self._measured.later if held else self._measured.first)

    def _leave(self) -> None:
        for question, missing in self._written:
            if missing <= 0:
                question.whole.succeed()
                if question.counts:
                    self._tally.whole.append(self._now.now - question.came)
        self._written = [entry for entry in self._written if entry[1] > 0]


def simulate(
    measured: Measurements,
    traffic: Traffic,
    replicas: int,
    *,
    routing: Routing = "picture",
    callers: int | None = None,
    questions: int = QUESTIONS,
    seed: int = 0,
) -> Outcome:
    """Send questions to replicas, and see how long answers take.

    Args:
        measured: The kind of replica.
        traffic: What comes in.
        replicas: How many share it.
        routing: ``"picture"`` sends a question to the replica that its picture belongs to, and past one that is busy;
            ``"load"`` to the less busy one of two that are drawn, which is what Ray Serve does unless told otherwise.
        callers: So many ask at a time, each as soon as it has its answer; then the traffic's rate says no more than how
            many pictures there are. None for questions that come at random.
        questions: How many are sent, those that warm up included.
        seed: Of everything random.
    """
    chance = random.Random(seed)
    environment = simpy.Environment()
    tally = _Tally()
    crew = [_Replica(environment, measured, tally) for _ in range(replicas)]
    alive = max(1, round(traffic.rate * traffic.pause))  # pictures that are being asked about
    shown = list(range(alive))
    warm = round(WARM_UP * questions)
    fullest = BUSY * measured.slots

    def two() -> _Replica:
        return min(chance.choices(crew, k=2), key=len)

    def route(picture: int) -> _Replica:
        if routing == "load":
            return two()
        digest = blake2b(str(picture).encode(), digest_size=8).digest()
        own = crew[int.from_bytes(digest, "big") % replicas]
        return own if len(own) < fullest else min(own, two(), key=len)

    for picture in shown:  # they were asked about before: once at least, and on average as often as they will be
        for _ in range(8 * replicas if routing == "load" else 1):  # with so many, almost every replica has it
            route(picture).hold(picture)
            if chance.random() * traffic.questions < 1:
                break

    numbers, fresh, began = iter(range(questions)), itertools.count(alive), 0.0

    def ask(number: int) -> simpy.Event:
        """Send a question; what is returned happens when its answer is whole."""
        nonlocal began
        if number == warm:
            began = environment.now
        place = chance.randrange(alive)
        if chance.random() * traffic.questions < 1:
            shown[place] = next(fresh)
        picture, tokens = shown[place], chance.choice(measured.answer_tokens)
        question = _Question(picture, tokens, environment.now, number >= warm, environment.event())
        route(picture).take(question)
        return question.whole

    def at_random() -> Generator[simpy.Event]:
        for number in numbers:
            yield environment.timeout(chance.expovariate(traffic.rate))
            ask(number)

    def caller() -> Generator[simpy.Event]:
        for number in numbers:
            yield environment.timeout(measured.entrance)
            yield ask(number)

    for process in [at_random()] if callers is None else [caller() for _ in range(callers)]:
        environment.process(process)
    environment.run()
    times = np.asarray(tally.whole) + measured.entrance
    p50, p99 = (float(np.quantile(times, share)) for share in (0.5, 0.99))
    return Outcome(
        replicas=replicas,
        p50=p50,
        p99=p99,
        first_token_p99=float(np.quantile(tally.begun, 0.99)) + measured.entrance,
        mean=float(times.mean()),
        utilisation=sum(replica.busy for replica in crew) / (replicas * environment.now),
        cached=tally.hits / (questions - warm),
        rate=(questions - warm) / (environment.now - began),
    )


def plan(
    measured: Measurements,
    traffic: Traffic,
    *,
    p99: float,
    routing: Routing = "picture",
    questions: int = QUESTIONS,
    seed: int = 0,
) -> Plan:
    """The fewest replicas with which 99 of 100 answers are whole in time.

    Traffic that takes more than about ``CELL`` replicas is cut into cells by the pictures' digests. One cell is
    simulated, with its share of the traffic: parts of a Poisson stream are Poisson, and cells share nothing, so that
    the others fare alike. (A cluster that is not cut fares a little better, since its replicas can help each other.)

    Args:
        measured: The kind of replica.
        traffic: What comes in.
        p99: Seconds from a question's arrival until its answer is whole.
        routing: As :func:`simulate` takes it.
        questions: How many are simulated for each number of replicas that is tried.
        seed: Of everything random.

    Raises:
        PlanError: If an answer takes longer than that even while nobody else asks.
    """
    if measured.alone() > p99:
        raise PlanError(
            f"{measured.kind}: with nobody else asking, 1 of 100 answers takes more than {measured.alone():.2f} s, so "
            f"no number of replicas keeps p99 at {p99:g} s: allow more, limit answers, or take a faster kind"
        )
    cells = max(1, math.ceil(traffic.rate * measured.work(1 - 1 / traffic.questions) / CELL))
    share = replace(traffic, rate=traffic.rate / cells)

    def with_replicas(count: int) -> Outcome:
        return simulate(measured, share, count, routing=routing, questions=questions, seed=seed)

    least = max(1, math.ceil(share.rate * measured.work(1 - 1 / traffic.questions)))
    outcome = _fewest(with_replicas, lambda outcome: outcome.p99 <= p99, least)
    if outcome is None:
        raise PlanError(f"{measured.kind}: p99 stays above {p99:g} s with many times the replicas: allow more")
    return Plan(measured, routing, cells, outcome, traffic)


def _fewest(run: Callable[[int], Outcome], holds: Callable[[Outcome], bool], least: int) -> Outcome | None:
    """The fewest replicas with which something holds, from ``least``; None if it does not with 64 times as many."""
    fails, works = least - 1, least
    while not holds(found := run(works)):
        if works > 64 * least:
            return None
        fails, works = works, works + max(1, works // 4)
    while works - fails > 1:
        middle = (fails + works) // 2
        outcome = run(middle)
        if holds(outcome):
            works, found = middle, outcome
        else:
            fails = middle
    return found


def as_dict(made: Plan) -> dict[str, Any]:
    """A plan as JSON takes it."""
    sums = {name: getattr(made, name) for name in ("replicas", "price", "network", "entrance_cores", "storage")}
    return {**sums, "kind": made.measured.kind, **{k: v for k, v in asdict(made).items() if k != "measured"}}


def table(plans: Sequence[Plan]) -> Any:
    """A table of plans, to be printed by rich; the cheapest first, and those without a price last."""
    from rich.table import Table

    shown = Table("kind", "routing")
    figures = ("replicas", "cells", "p50", "p99", "first token p99", "at work", "cached")
    for name in (*figures, "network", "cores before", "USD an hour"):
        shown.add_column(name, justify="right")
    for made in sorted(plans, key=lambda made: (made.price is None, made.price, made.replicas)):
        outcome = made.outcome
        shown.add_row(
            made.measured.kind,
            made.routing,
            f"{made.replicas:,}",
            f"{made.cells:,}",
            *(f"{seconds:.2f} s" for seconds in (outcome.p50, outcome.p99, outcome.first_token_p99)),
            *(f"{100 * share:.0f} %" for share in (outcome.utilisation, outcome.cached)),
            f"{made.network / 1e6:,.0f} MB/s",
            f"{made.entrance_cores:,.1f}" if made.measured.around else "",
            "" if made.price is None else f"{made.price:,.2f}",
        )
    return shown
