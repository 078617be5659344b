"""A small plot as inline SVG: axes, marks, text. Colours are CSS variables: a page can be light, dark or printed.

What it does not know: what is plotted. What always holds: a pipeline has a colour AND a shape; both axes are named with
their unit; the text reads at 350 pixels, a phone's width, and at 600.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 300  # units of the view box: text of 12 is 9.5 pixels high on a phone and 16 on a desktop
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 48
COLOURS = 8  # p0 .. p7 in style.css
# Around the origin, about 10 across.
_SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
    "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "M0 -6L5.5 4.5H-5.5Z",
    "M0 -6.5L5.5 0L0 6.5L-5.5 0Z",
    "M0 6L5.5 -4.5H-5.5Z",
    "M-1.8 -5.5H1.8V-1.8H5.5V1.8H1.8V5.5H-1.8V1.8H-5.5V-1.8H-1.8Z",
    "M-5.5 -3L-3 -5.5L0 -2.5L3 -5.5L5.5 -3L2.5 0L5.5 3L3 5.5L0 2.5L-3 5.5L-5.5 3L-2.5 0Z",
    "M-5.5 -2L0 -6L5.5 -2L3.5 5H-3.5Z",
)


@dataclass(frozen=True)
class Axis:
    """From values to places along an axis, 0 to 1.

    Attributes:
        label: Its name and unit.
        low: Value at 0.
        high: Value at 1.
        log: Whether equal steps are equal factors.
        ticks: Values that are marked.
        say: Writes a value.
    """

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    say: Callable[[float], str]

    def place(self, value: float) -> float:
        """Where a value lies; beyond the ends, at the end."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return min(max((value - low) / ((high - low) or 1), 0), 1)


def axis(
    label: str, values: Sequence[float], say: Callable[[float], str], *, zero: bool = False, log: bool = False,
    most: float = math.inf,
) -> Axis:  # fmt: skip
    """An axis that holds all values.

    Args:
        label: Its name and unit.
        values: What it must hold, at least one.
        say: Writes a tick's value.
        zero: Whether it starts at 0.
        log: Whether it may be logarithmic, which it is where values are all above 0 and far apart.
        most: It never reaches beyond.
    """
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 5:
        low, high = low / 1.3, high * 1.3
        steps = [
            f * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for f in (1, 2, 5)
        ]
        ticks = [tick for tick in steps if low <= tick <= high]
        if len(ticks) > 9:
            ticks = [tick for tick in ticks if f"{tick:e}".startswith("1.0")] or ticks[::3]
        return Axis(label, low, high, True, tuple(ticks), say)
    low = 0.0 if zero else max(low - 0.08 * (high - low or 1), 0.0)
    high = high + 0.08 * ((high - low) or abs(high) or 1)
    step = _step((high - low) / 5)
    low = math.floor(low / step) * step
    high = min(math.ceil(high / step) * step, max(most, low + step))
    ticks = [low + step * number for number in range(round((high - low) / step) + 1)]
    return Axis(label, low, high, False, tuple(ticks), say)


def x(place: float) -> float:
    """Pixels from the left."""
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def y(place: float, height: int = HEIGHT) -> float:
    """Pixels from the top; places count from the bottom."""
    return TOP + (1 - place) * (height - TOP - BOTTOM)


def marker(number: int, at: tuple[float, float], title: str = "", scale: float = 1.0) -> Markup:
    """The mark of the pipeline with this number."""
    return Markup('<path class="mark p{}" d="{}" transform="translate({:.1f} {:.1f}) scale({:.2f})">{}</path>').format(
        number % COLOURS, Markup(_SHAPES[number % len(_SHAPES)]), *at, scale,
        Markup("<title>{}</title>").format(title) if title else "",
    )  # fmt: skip


def line(number: int, points: Sequence[tuple[float, float]], width: float = 1.8) -> Markup:
    """A line in the colour of the pipeline with this number."""
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return Markup(f'<polyline class="line p{number % COLOURS}" stroke-width="{width}" points="{path}"/>')


def text(words: str, at: tuple[float, float], *, anchor: str = "middle", kind: str = "tick") -> Markup:
    """A word or two."""
    start = Markup(f'<text class="{kind}" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">')
    return start + escape(words) + Markup("</text>")


def grid(across: Axis, up: Axis | None, height: int = HEIGHT) -> Markup:
    """Both axes with ticks and names; without an upward one, only the one across."""
    parts = []
    bottom = y(0, height)
    last = -math.inf
    for tick in across.ticks:
        at = x(across.place(tick))
        parts.append(Markup(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>'))
        if at - last >= 44:  # so that neighbours do not run into each other
            parts.append(text(across.say(tick), (at, bottom + 16)))
            last = at
    for tick in up.ticks if up else ():
        at = y(up.place(tick) if up else 0, height)
        parts.append(Markup(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'))
        parts.append(text(up.say(tick) if up else "", (LEFT - 6, at + 4), anchor="end"))
    parts.append(Markup(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'))
    parts.append(text(across.label, (x(0.5), height - 8), kind="label"))
    if up:
        middle = y(0.5, height)
        turned = Markup(f'<text class="label" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">')
        parts.append(turned + escape(up.label) + Markup("</text>"))
    return Markup("").join(parts)


def drawing(parts: Sequence[Markup], says: str, height: int = HEIGHT) -> Markup:
    """The picture, with what it shows for those who do not see it."""
    start = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, says)
    return start + Markup("").join(parts) + Markup("</svg>")


def key(number: int) -> Markup:
    """The mark of a pipeline, to stand before its name in running text."""
    return (
        Markup('<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">') + marker(number, (0, 0)) + Markup("</svg>")
    )


def _step(least: float) -> float:
    """The next of 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)
