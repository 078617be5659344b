"""What a pipeline costs over three years at a daily volume, how many machines it takes, and what that depends on.

Measured loads and checked assumptions in, US dollars out. What always holds: cost is a fixed part, a part for each
machine and a part for each call, so it never falls with volume, and where two pipelines cost the same is solved
exactly, piece by piece between the volumes at which a machine is added. It knows nothing of scores or of what a person
allows.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from multimodal.compare.assumptions import Assumptions, changed, named

YEARS, DAYS, HOURS, MONTHS = 3, 365, 8760, 12  # the span of every cost; a year's days, hours and months
MOST_VOLUME, MOST_PIECES = 10_000_000, 100_000  # calls a day up to which a break-even is looked for; its pieces
# Okabe and Ito, "Color Universal Design", 2008: told apart by people who see colours differently. Lines differ in
# dashes too, for print.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Load:
    """What one call to a pipeline takes, and what the pipeline has to keep to.

    Attributes:
        name: Of the pipeline.
        remote: Whether an endpoint elsewhere answers: decides which hours of labour are paid.
        hardware: The kind of machine that it needs here, None where it needs none of its own.
        throughput: Answers a second of ONE such machine.
        p99: Seconds that 99 of 100 answers take at most, without a queue.
        prompt_tokens: Mean number read in a call.
        completion_tokens: Mean number written.
        price: Its name in the price list; None where nobody is paid by the token.
        dollars_per_call: US dollars for a call where a run knows them and no price list does.
        limit: Seconds in which 99 of 100 answers must be there, waiting included; None for no limit.
        concurrency: How many ask at the same moment.
    """

    name: str
    remote: bool = False
    hardware: str | None = None
    throughput: float | None = None
    p99: float | None = None
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    price: str | None = None
    dollars_per_call: float = 0.0
    limit: float | None = None
    concurrency: int = 1


@dataclass(frozen=True)
class Ownership:
    """Cost over three years, in US dollars but for the first.

    Attributes:
        machines: How many are bought at a time.
        hardware: Their price, replaced at the end of each lifetime; nothing is sold.
        hosting: Their place and network.
        energy: What they use, idle and at work.
        labour: To set up and to keep running.
        calls: What an endpoint is paid.
    """

    machines: int
    hardware: float
    hosting: float
    energy: float
    labour: float
    calls: float

    @property
    def total(self) -> float:
        """All of it, US dollars."""
        return self.hardware + self.hosting + self.energy + self.labour + self.calls


@dataclass(frozen=True)
class Crossing:
    """A daily volume at which the cheaper of two pipelines changes.

    Attributes:
        volume: Calls a day.
        cheaper: Name of the pipeline that is cheaper just above it.
        equal: Whether both cost the same there; else one of them needs one more machine just above it.
    """

    volume: float
    cheaper: str
    equal: bool


@dataclass(frozen=True)
class Swing:
    """What one assumption does to the difference in cost between two pipelines (first less second), US dollars.

    Attributes:
        name: Of the assumption, such as ``"labour.rate"``.
        base: The difference as assumed.
        low: With half the value.
        high: With half as much again.
    """

    name: str
    base: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """From the least to the greatest of the three, US dollars."""
        return max(self.base, self.low, self.high) - min(self.base, self.low, self.high)


@dataclass(frozen=True)
class _Curve:
    """Cost as ``fixed + machine * machines + call * volume``; ``capacity`` in calls a day of one machine."""

    fixed: float
    machine: float
    call: float
    least: int
    capacity: float


def waiting_p99(throughput: float, utilisation: float) -> float:
    """Seconds that 99 of 100 calls wait at most before a machine turns to them.

    One queue, random arrivals, exponential service (M/M/1): ``P(wait > t) = u exp(-m (1 - u) t)`` with utilisation
    ``u`` and ``m`` answers a second; D. Gross et al., "Fundamentals of Queueing Theory", 4th edition, 2008, section
    2.2. Service times of a model vary less than that, so this is on the careful side.
    """
    if utilisation >= 1:
        return math.inf
    return max(0.0, math.log(100 * utilisation) / (throughput * (1 - utilisation))) if utilisation > 0 else 0.0


def planned_utilisation(load: Load, most: float) -> float:
    """The largest share of a machine's throughput, up to ``most``, at which answer and wait together keep the limit.

    Raises:
        ValueError: If the answer alone takes longer: no number of machines helps.
    """
    if load.limit is None or load.p99 is None or load.throughput is None:
        return most
    spare = load.limit - load.p99
    if spare < 0:
        raise ValueError(
            f"{load.name} takes {load.p99:g} s (p99) without a queue, more than the limit of {load.limit:g} s: no "
            "number of machines helps; allow more time or choose another pipeline"
        )
    if waiting_p99(load.throughput, most) <= spare:
        return most
    low, high = min(0.01, most), most  # at one in a hundred, 99 of 100 do not wait at all
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if waiting_p99(load.throughput, middle) <= spare else (low, middle)
    return low


def machines_needed(load: Load, daily_volume: float, assumptions: Assumptions) -> int:
    """How many machines carry a day's calls within its busy hours, and those who ask at once within the limit.

    Raises:
        ValueError: As :func:`ownership`.
    """
    if daily_volume < 0:
        raise ValueError(f"a daily volume of {daily_volume:g} calls is less than nothing; give 0 or more")
    curve = _curve(load, assumptions)
    return 0 if load.hardware is None else max(curve.least, _steps(daily_volume, curve.capacity))


def ownership(load: Load, daily_volume: float, assumptions: Assumptions) -> Ownership:
    """Cost of a pipeline over three years.

    Args:
        load: The pipeline.
        daily_volume: Calls a day, every day of the year.
        assumptions: All that was not measured.

    Raises:
        ValueError: If the volume is negative, a machine or price is not known, a machine has no throughput, or the
            limit cannot be kept.
    """
    machines = machines_needed(load, daily_volume, assumptions)
    hardware, hosting, idle = _of_a_machine(load, assumptions)
    energy, price = _of_a_call(load, assumptions)
    calls = daily_volume * DAYS * YEARS
    return Ownership(
        machines, machines * hardware, machines * hosting, machines * idle + calls * energy, _labour(load, assumptions),
        calls * price,
    )  # fmt: skip


def crossings(first: Load, second: Load, assumptions: Assumptions) -> list[Crossing]:
    """All daily volumes, up to ten million, at which the cheaper of the two changes: several where machines are added.

    Raises:
        ValueError: As :func:`ownership`.
    """
    one, other = _curve(first, assumptions), _curve(second, assumptions)
    most = min(MOST_VOLUME, MOST_PIECES * min(one.capacity, other.capacity))
    edges = np.unique(np.concatenate([[0.0, most], _edges(one, most), _edges(other, most)]))
    low, high = edges[:-1], edges[1:]  # (pieces,)
    middles = (low + high) / 2
    constant = one.fixed - other.fixed + _machine_cost(one, middles) - _machine_cost(other, middles)
    at_low, at_high = constant + (one.call - other.call) * low, constant + (one.call - other.call) * high
    found = []
    for place in np.flatnonzero(np.sign(at_low) * np.sign(at_high) < 0):
        share = at_low[place] / (at_low[place] - at_high[place])
        volume = float(low[place] + share * (high[place] - low[place]))
        found.append(Crossing(volume, first.name if at_high[place] < 0 else second.name, True))
    # An end of a piece that is exactly zero belongs to its edge, so that it is counted once.
    before, after = at_high[:-1], at_low[1:]
    sides = (np.where(before == 0, at_low[:-1], before), np.where(after == 0, at_high[1:], after))
    for place in np.flatnonzero(np.sign(sides[0]) * np.sign(sides[1]) < 0):
        cheaper = first.name if sides[1][place] < 0 else second.name
        found.append(Crossing(float(edges[place + 1]), cheaper, bool(before[place] == 0)))
    return sorted(found, key=lambda crossing: crossing.volume)


def break_even(first: Load, second: Load, assumptions: Assumptions) -> float | None:
    """The smallest daily volume at which the cheaper of the two changes; None if it never does.

    Raises:
        ValueError: As :func:`ownership`.
    """
    found = crossings(first, second, assumptions)
    return found[0].volume if found else None


def sensitivity(first: Load, second: Load, daily_volume: float, assumptions: Assumptions) -> list[Swing]:
    """Each assumption halved and raised by half, one at a time; those that move the difference most come first.

    Values stay within what they can be: a share of at most 1. Assumptions that move nothing are left out.

    Raises:
        ValueError: As :func:`ownership`.
    """

    def difference(now: Assumptions, factor: float = 1.0) -> float:
        one, other = (replace(load, dollars_per_call=load.dollars_per_call * factor) for load in (first, second))
        return ownership(one, daily_volume, now).total - ownership(other, daily_volume, now).total

    base, found = difference(assumptions), []
    for name, number in named(assumptions).items():
        low, high = (difference(changed(assumptions, name, number.value * factor)) for factor in (0.5, 1.5))
        found.append(Swing(name, base, low, high))
    found.append(
        Swing("price of a call, as the run says", base, difference(assumptions, 0.5), difference(assumptions, 1.5))
    )
    return sorted((swing for swing in found if swing.width > 0), key=lambda swing: -swing.width)


def cost_plot(first: Load, second: Load, daily_volume: float, assumptions: Assumptions) -> str:
    """Cost over three years against daily volume, as SVG text, with the break-even and the volume in question marked.

    Raises:
        ValueError: As :func:`ownership`.
    """
    even = break_even(first, second, assumptions)
    end = 10 * max(even or 0, daily_volume, 100)
    volumes = np.geomspace(1, end, 400)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for load, colour, dashes in ((first, BLUE, "-"), (second, ORANGE, "--")):
        costs = [ownership(load, volume, assumptions).total for volume in volumes]
        axes.plot(volumes, costs, dashes, color=colour, label=load.name)
    axes.axvline(daily_volume or 1, color=GREY, linestyle=":", label=f"your volume: {daily_volume:,.0f} a day")
    if even is not None:
        cost = ownership(second, even, assumptions).total
        axes.plot([even], [cost], "o", color="black", label=f"break-even: {even:,.0f} a day")
    axes.set(xscale="log", xlabel="daily volume (calls a day)", ylabel=f"cost over {YEARS} years (US dollars)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return _svg(figure, f"Cost of {first.name} and {second.name} against daily volume")


def tornado(swings: Sequence[Swing], first: str, second: str, *, most: int = 8) -> str:
    """How far each assumption moves the difference in cost, widest first, as SVG text.

    Args:
        swings: As :func:`sensitivity` has them.
        first: Name of the pipeline that ...
        second: ... this one's cost is taken from.
        most: How many are drawn.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not swings:
        raise ValueError("no assumption moves the difference, so there is nothing to draw; compare two other pipelines")
    shown, base = list(swings[:most]), swings[0].base
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for values, colour, hatch, label in (
        ([swing.low for swing in shown], ORANGE, "//", "50 % less"),
        ([swing.high for swing in shown], BLUE, "", "50 % more"),
    ):
        widths = [value - base for value in values]
        axes.barh(range(len(shown)), widths, left=base, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_yticks(range(len(shown)), [swing.name for swing in shown])
    axes.invert_yaxis()
    axes.axvline(base, color="black", linewidth=1)
    axes.set_xlabel(f"cost of {first} less cost of {second} over {YEARS} years (US dollars)")
    axes.legend()
    return _svg(figure, f"What moves the difference in cost between {first} and {second}")


def _curve(load: Load, assumptions: Assumptions) -> _Curve:
    fixed, machine = _labour(load, assumptions), sum(_of_a_machine(load, assumptions))
    call = DAYS * YEARS * sum(_of_a_call(load, assumptions))
    if load.hardware is None:
        return _Curve(fixed, 0.0, call, 0, math.inf)
    throughput = _throughput(load)
    share = planned_utilisation(load, assumptions.traffic.utilisation.value)
    capacity = throughput * share * assumptions.traffic.busy_hours.value * 3600
    at_once = 1 if load.limit is None else _steps(load.concurrency, throughput * load.limit)
    return _Curve(fixed, machine, call, max(1, at_once), capacity)


def _steps(volume: float, capacity: float) -> int:
    """Whole machines for a volume; a rounding error does not buy one."""
    return math.ceil(round(volume / capacity, 9))


def _edges(curve: _Curve, most: float) -> np.ndarray:
    """Daily volumes at which a machine is added."""
    if math.isinf(curve.capacity):
        return np.empty(0)
    edges = curve.capacity * np.arange(curve.least, math.ceil(most / curve.capacity) + 1)
    return edges[edges < most]


def _machine_cost(curve: _Curve, volumes: np.ndarray) -> np.ndarray:
    return curve.machine * np.maximum(curve.least, np.ceil(volumes / curve.capacity))


def _throughput(load: Load) -> float:
    if load.throughput is None or load.throughput <= 0:
        raise ValueError(
            f"{load.name} runs on {load.hardware}, but its throughput is {load.throughput}: measure the answers a "
            "second that one machine gives"
        )
    return load.throughput


def _of_a_machine(load: Load, assumptions: Assumptions) -> tuple[float, float, float]:
    """US dollars over the years for one machine: its price, its place, its energy when idle."""
    if load.hardware is None:
        return 0.0, 0.0, 0.0
    if load.hardware not in assumptions.hardware:
        known = ", ".join(assumptions.hardware)
        raise ValueError(
            f"there is no machine {load.hardware!r} (known: {known}); add it under 'hardware:' in your file"
        )
    machine = assumptions.hardware[load.hardware]
    bought = math.ceil(round(YEARS / machine.lifetime.value, 9))
    watts = machine.idle_power.value * assumptions.energy.overhead.value
    idle = watts * HOURS * YEARS / 1000 * assumptions.energy.electricity.value
    return bought * machine.price.value, assumptions.hosting.machine.value * MONTHS * YEARS, idle


def _of_a_call(load: Load, assumptions: Assumptions) -> tuple[float, float]:
    """US dollars for one call: energy beyond idle, and what an endpoint is paid."""
    energy = 0.0
    if load.hardware is not None:
        machine = assumptions.hardware[load.hardware]
        watts = max(0.0, machine.power.value - machine.idle_power.value) * assumptions.energy.overhead.value
        energy = watts / _throughput(load) / 3_600_000 * assumptions.energy.electricity.value
    if load.price is None:
        return energy, load.dollars_per_call
    if load.price not in assumptions.prices:
        known = ", ".join(assumptions.prices)
        raise ValueError(f"there is no price {load.price!r} (known: {known}); add it under 'prices:' in your file")
    price, cached = assumptions.prices[load.price], assumptions.traffic.cached_share.value
    read = price.input * (1 - cached) + price.cached_input * cached
    return energy, (load.prompt_tokens * read + load.completion_tokens * price.output) / 1e6


def _labour(load: Load, assumptions: Assumptions) -> float:
    labour = assumptions.labour
    setup, running = (
        (labour.api_setup, labour.api_running) if load.remote else (labour.local_setup, labour.local_running)
    )
    return (setup.value + running.value * MONTHS * YEARS) * labour.rate.value


def _svg(figure: Figure, says: str) -> str:
    """SVG text to stand inside a page: no prologue, no date, and nothing in it that reaches the rest of the page."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": says, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=nothing)
    written = re.sub(r'<g id="[^"]*"', "<g", text.getvalue())  # the same in every plot, and a page has an id once
    written = re.sub(r"<style.*?</style>", "", written, flags=re.DOTALL)
    label = html.escape(says, quote=True)
    return written[written.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
