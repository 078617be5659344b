"""What is said to a person who chooses: what they allow, one line for each pipeline, and how it is shown.

Every number carries a mark: measured, a published price, or assumed. What always holds: what is shown, as Markdown or
as HTML, comes from these classes alone, and the HTML needs nothing from elsewhere. How a decision is made is in
``advise.py``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from multimodal.compare.assumptions import Assumptions
from multimodal.compare.ownership import YEARS, Crossing, Load, Ownership, Swing, cost_plot, tornado

Origin = Literal["measured", "published price", "assumed"]
MEASURED: Final = "measured"
PUBLISHED: Final = "published price"
ASSUMED: Final = "assumed"
MARKS: Mapping[Origin, str] = {MEASURED: "m", PUBLISHED: "p", ASSUMED: "a"}
GIB = 2**30
COLUMNS = ("rank", "pipeline", "fits", "score", "latency p99", "memory", "machines", f"cost over {YEARS} years", "why")


@dataclass(frozen=True)
class Constraints:
    """What a person allows and needs.

    Attributes:
        memory: Bytes that a pipeline may take at most; None for any.
        latency: Seconds that 99 of 100 answers may take at most, waiting included; None for any.
        concurrency: How many ask at the same moment; with a limit on latency, it decides on machines.
        data_stays_here: Whether nothing may be sent to an endpoint elsewhere.
        audit: Whether an answer must be reproducible later. An endpoint elsewhere may change its model at any time.
        labelled_examples: How many examples with right answers there are.
        daily_volume: Calls a day.
        min_accuracy: The score must be at least so much, 0 to 1; None for any.

    Raises:
        ValueError: If one of them makes no sense.
    """

    memory: int | None = None
    latency: float | None = None
    concurrency: int = 1
    data_stays_here: bool = False
    audit: bool = False
    labelled_examples: int = 0
    daily_volume: int = 1000
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name, least in (("memory", 1), ("concurrency", 1), ("labelled_examples", 0), ("daily_volume", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give {least} or more")
        if self.latency is not None and not 0 < self.latency < math.inf:
            raise ValueError(f"latency is {self.latency}; give seconds, more than 0")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise ValueError(f"min_accuracy is {self.min_accuracy}; give a share, 0 to 1")


@dataclass(frozen=True)
class Deployment:
    """Where a pipeline would run.

    Attributes:
        remote: Whether it sends what it is asked to an endpoint elsewhere.
        price: The endpoint's name in the price list. None: what the run says a call cost, for an endpoint elsewhere.
        hardware: The kind of machine for all that is done here.
    """

    remote: bool = False
    price: str | None = None
    hardware: str = "cpu_server"


@dataclass(frozen=True)
class Fact:
    """A number of a line, and whether it was measured, is a published price or is assumed.

    Attributes:
        value: In ``unit``.
        unit: ``"s"``, ``"bytes"``, ``"answers/s"``, ``"USD"``, ``"machines"``, or ``""`` for a share.
        origins: One or more: a cost mixes them.
    """

    value: float
    unit: str
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class Line:
    """What is said of one pipeline.

    Attributes:
        rank: 1 for the best. All that do not fit share the last one.
        pipeline: Its name.
        fits: Whether it breaks no constraint, and is no control.
        reasons: Why it stands where it stands, in words.
        notes: What else a person should know before choosing it.
        facts: Its numbers, by name: ``"score"``, ``"latency"``, ``"memory"``, ``"throughput"``, ``"price of a call"``,
            ``"machines"``, ``"cost"``; those that are not known are missing.
        cost: Over three years; None where it cannot be known.
        remote: Whether it sends what it is asked elsewhere.
    """

    rank: int
    pipeline: str
    fits: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    facts: Mapping[str, Fact]
    cost: Ownership | None
    remote: bool


@dataclass(frozen=True)
class Advice:
    """A decision, and what it rests on.

    Attributes:
        task: What was asked.
        constraints: What was allowed.
        assumptions: What was assumed.
        lines: One for each pipeline, best first.
        suggestions: What else to try.
        local: The best pipeline that stays here, as the plots have it; None where there is none with a known cost.
        remote: The best that uses an endpoint elsewhere.
        crossings: Where the cheaper of these two changes.
        swings: What each assumption does to the difference in cost between them, widest first.
    """

    task: str
    constraints: Constraints
    assumptions: Assumptions
    lines: tuple[Line, ...]
    suggestions: tuple[str, ...] = ()
    local: Load | None = None
    remote: Load | None = None
    crossings: tuple[Crossing, ...] = ()
    swings: tuple[Swing, ...] = ()

    @property
    def recommended(self) -> str | None:
        """The best pipeline that fits; None if none does."""
        return self.lines[0].pipeline if self.lines and self.lines[0].fits else None

    def table(self) -> str:
        """The lines as a Markdown table."""
        rows = [COLUMNS, ["---"] * len(COLUMNS), *([cell.replace("|", "\\|") for cell in row] for row in self._cells())]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def to_markdown(self) -> str:
        """All of it, for a terminal or a file."""
        parts = [f"## {self.task}: {self._headline()}", self.table(), self._legend(), *self._ownership()]
        parts += [f"- {suggestion}" for suggestion in self.suggestions]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """All of it with both plots, as a fragment that needs nothing from elsewhere."""
        said = html.escape
        head = "".join(f"<th>{said(name)}</th>" for name in COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{said(cell)}</td>" for cell in row) + "</tr>" for row in self._cells())
        parts = [f"<h3>{said(self.task)}: {said(self._headline())}</h3>"]
        parts += [  # the table may be scrolled, by the keyboard, too
            f'<table tabindex="0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
            f"<p>{said(self._legend())}</p>",
        ]
        parts += [f"<p>{said(paragraph)}</p>" for paragraph in self._ownership()]
        if self.local is not None and self.remote is not None:
            parts.append(cost_plot(self.local, self.remote, self.constraints.daily_volume, self.assumptions))
            if self.swings:
                parts.append(tornado(self.swings, self.local.name, self.remote.name))
        if self.suggestions:
            parts.append("<ul>" + "".join(f"<li>{said(each)}</li>" for each in self.suggestions) + "</ul>")
        return f'<section class="advice">{"".join(parts)}</section>'

    def _headline(self) -> str:
        return f"use {self.recommended}" if self.recommended else "no pipeline fits; allow more, or measure others"

    def _cells(self) -> list[list[str]]:
        names = ("score", "latency", "memory", "machines", "cost")
        return [
            [str(line.rank) if line.fits else "-", line.pipeline, "yes" if line.fits else "no",
             *(_shown(line.facts.get(name)) for name in names), "; ".join((*line.reasons, *line.notes))]
            for line in self.lines
        ]  # fmt: skip

    def _legend(self) -> str:
        volume = f"{self.constraints.daily_volume:,} calls a day"
        return f"m: measured in this run; p: rests on a published price; a: rests on assumptions. Cost at {volume}."

    def _ownership(self) -> list[str]:
        if self.local is None or self.remote is None:
            return [
                "Break-even: nothing to compare, as no two pipelines, one here and one elsewhere, have a known cost."
            ]
        here, there, found = self.local.name, self.remote.name, self.crossings
        if found:
            kind = "" if found[0].equal else ", where a machine is added"
            text = f"Break-even: above {found[0].volume:,.0f} calls a day {found[0].cheaper} is cheaper{kind}."
            if len(found) > 1:
                text += f" It changes {len(found) - 1} more times above that, as machines are added."
        else:
            text = f"Break-even: none; at any volume the cheaper of {here} and {there} is the same."
        if not self.swings:
            return [text]
        base = self.swings[0].base
        moved = "; ".join(f"{swing.name} ({money(swing.low)} to {money(swing.high)})" for swing in self.swings[:3])
        text += f" {here} less {there}: {money(base)} over {YEARS} years."
        return [text, f"What moves that most, from 50 % less to 50 % more: {moved}."]


def _shown(fact: Fact | None) -> str:
    if fact is None:
        return "not known"
    shown = {
        "": lambda value: f"{value:.3f}", "s": lambda value: f"{value:.2f} s", "bytes": gibibytes,
        "USD": money, "machines": lambda value: f"{value:.0f}",
    }  # fmt: skip
    return f"{shown[fact.unit](fact.value)} ({', '.join(MARKS[origin] for origin in fact.origins)})"


def money(dollars: float) -> str:
    """Whole US dollars."""
    return f"{'-' if dollars < 0 else ''}${abs(dollars):,.0f}"


def gibibytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB"
