"""How does the engine's cost grow: with pictures, length of the prompt, requests at once, length of the answer?

One of them grows and the others stay; the points of all lines are measured in turns, and what counts is the median.
Through the points goes a straight line by least squares, whose slope the table gives. Memory is what a process of its
own takes on for the requests of a point, beyond the model.

    python -m benchmarks.growth [--rounds 5] [--plot docs/growth.svg] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.engine import Prompts, a_token, times_of
from multimodal import MultiModalModel

WARM_UP = 3  # answers after which a process has what it keeps


@dataclass(frozen=True)
class Point:
    """What is asked.

    Attributes:
        pictures: In each prompt.
        prompt: Its tokens, beside the pictures' placeholders.
        batch: Requests at once.
        answer: Tokens of each answer.
    """

    pictures: int = 1
    prompt: int = 64
    batch: int = 1
    answer: int = 32


@dataclass(frozen=True)
class Cost:
    """What it took.

    Attributes:
        first: Milliseconds to the first token, mean of the requests.
        token: Milliseconds for each further token, likewise.
        memory: Megabytes.
    """

    first: float
    token: float
    memory: float


@dataclass(frozen=True)
class Fit:
    """A straight line through points, and the share of their variance that it explains."""

    slope: float
    start: float
    explained: float


AXES: dict[str, tuple[int, ...]] = {
    "pictures": (1, 2, 4, 8, 16),
    "prompt": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8),
    "answer": (16, 32, 64, 128, 256),
}
SMALL: dict[str, tuple[int, ...]] = {"pictures": (1, 2), "prompt": (16, 32), "batch": (1, 2), "answer": (4, 8)}
MEASURES = {"first": "ms to the first token", "token": "ms a token", "memory": "MB"}
UNITS = {"pictures": "a picture", "prompt": "a prompt token", "batch": "a request", "answer": "an answer token"}


def fitted(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """The line of least squares."""
    slope, start = np.polyfit(xs, ys, 1)
    rest, spread = np.subtract(ys, np.polyval([slope, start], xs)), np.subtract(ys, np.mean(ys))
    explained = 1 - float(rest @ rest) / float(spread @ spread) if spread.any() else 1.0
    return Fit(float(slope), float(start), explained)


class Growth:
    """The model, and what a point costs.

    Args:
        precision: The engine's.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision
        model = MultiModalModel.from_pretrained("embedded", precision=precision)
        model.model.generation_config.eos_token_id = None  # answers of a fixed length
        self.prompts, self.engine = Prompts(model), model.engine
        for _ in range(WARM_UP):
            self.times(Point(answer=2))

    def times(self, point: Point) -> tuple[float, float]:
        """Milliseconds to the first token, and for each further one."""
        asked = [
            self.prompts.request(pictures=point.pictures, length=point.prompt + point.pictures, new=point.answer)
            for _ in range(point.batch)
        ]
        began = time.perf_counter()
        found = [times_of(generation) for generation in [self.engine.submit(its) for its in asked]]
        first, token = statistics.mean(its[0] - began for its in found), statistics.mean(map(a_token, found))
        return 1e3 * first, 1e3 * token

    def memory(self, point: Point) -> float:
        """Megabytes that this process takes on for a point."""
        before = resident()
        self.times(point)
        return resident() - before

    def measure(self, points: Sequence[Point], rounds: int) -> dict[Point, Cost]:
        """Costs of points, in turns, after one turn that does not count."""
        found: dict[Point, list[tuple[float, float]]] = {point: [] for point in points}
        for turn in range(rounds + 1):
            for point in found:
                times = self.times(point)
                found[point] += [times] if turn else []
        costs = {}
        for point, turns in found.items():
            first, token = (statistics.median(column) for column in zip(*turns, strict=True))
            costs[point] = Cost(first, token, self._apart(point))
        return costs

    def _apart(self, point: Point) -> float:
        """The memory of a point, in a process that has not answered others."""
        command = [sys.executable, "-m", "benchmarks.growth", "--precision", self.precision]
        found = subprocess.run(
            [*command, "--memory-of", json.dumps(asdict(point))], stdout=subprocess.PIPE, text=True, check=True
        )
        return float(found.stdout.split()[-1])


def resident() -> float:
    """Megabytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def points_of(axes: dict[str, tuple[int, ...]]) -> dict[str, list[Point]]:
    """The points of each axis, the others as they are in :class:`Point`."""
    return {axis: [replace(Point(), **{axis: value}) for value in values] for axis, values in axes.items()}


def table(points: dict[str, list[Point]], costs: dict[Point, Cost]) -> str:
    """In Markdown: a line for each axis and measure."""
    head = ("grows", "from", "to", "what", "at first", "at last", "slope", "R\N{SUPERSCRIPT TWO}")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for axis, its in points.items():
        xs = [getattr(point, axis) for point in its]
        for measure, unit in MEASURES.items():
            ys = [getattr(costs[point], measure) for point in its]
            fit = fitted(xs, ys)
            slope = f"{fit.slope:.3g} {unit.split()[0]} {UNITS[axis]}"
            lines.append(
                f"| {axis} | {xs[0]} | {xs[-1]} | {unit} | {ys[0]:.1f} | {ys[-1]:.1f} | {slope} | {fit.explained:.2f} |"
            )
    return "\n".join(lines)


def plot(points: dict[str, list[Point]], costs: dict[Point, Cost], file: Path) -> None:
    """A panel for each axis and measure: the points, and the line through them."""
    figure = Figure(figsize=(3 * len(points), 2.4 * len(MEASURES)), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(points), squeeze=False)
    for column, (axis, its) in enumerate(points.items()):
        xs = [getattr(point, axis) for point in its]
        for row, (measure, unit) in enumerate(MEASURES.items()):
            ys, panel = [getattr(costs[point], measure) for point in its], panels[row][column]
            fit = fitted(xs, ys)
            panel.plot(xs, [fit.start + fit.slope * x for x in xs], linewidth=1, color="0.6")
            panel.plot(xs, ys, "o", markersize=4)
            panel.set_ylim(0, 1.15 * max(*ys, 1e-9))
            panel.set_title(f"{fit.slope:.3g} {UNITS[axis]}", fontsize=8)
            panel.set_xlabel(f"{axis}, tokens" if axis in ("prompt", "answer") else axis, fontsize=8)
            panel.set_ylabel(unit if column == 0 else "", fontsize=8)
            panel.tick_params(labelsize=7)
    with matplotlib.rc_context({"svg.hashsalt": "growth"}):  # the same figures give the same file
        figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> int:
    """Measure, print the table, draw."""
    parser = argparse.ArgumentParser(description="How the engine's cost grows, on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each measurement (default: 5)")
    parser.add_argument("--precision", default="auto", help="the engine's (default: auto)")
    parser.add_argument("--small", action="store_true", help="small sizes: only to see that it runs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it into this SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    growth = Growth(options.precision)
    if options.memory_of:
        print(growth.memory(Point(**json.loads(options.memory_of))))
        return 0
    points = points_of(SMALL if options.small else AXES)
    costs = growth.measure(list(dict.fromkeys(point for its in points.values() for point in its)), options.rounds)
    print(table(points, costs))
    if options.plot:
        plot(points, costs, options.plot)
    if options.json:
        lines = [{**asdict(point), **asdict(cost)} for point, cost in costs.items()]
        options.json.write_text(json.dumps(lines, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
