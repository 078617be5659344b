"""How figures are said to people: units, rounding, names. One place, so that HTML, Markdown and plots say the same."""

from __future__ import annotations

import math

from multimodal.compare.statistics import Interval

NOTHING = "\u2013"  # a dash: was not measured
MINUS = "\u2212"
_NAMES = {
    "exact": "Exact match",
    "contains": "Holds the right answer",
    "f1": "F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "attribute_recall": "Attribute recall",
    "judged": "Right, as a model judges",
    "refused": "Refused to answer",
}
_SHARES = (
    "exact",
    "contains",
    "refused",
    "judged",
)  # said in percent; the others are similarities, which are not a share of anything


def score_name(metric: str) -> str:
    """What the score is called in the field."""
    return _NAMES.get(metric, metric)


def is_share(metric: str) -> bool:
    """Whether the mean of the score is the share of questions for which something holds."""
    return metric in _SHARES


def score(value: float | None, metric: str) -> str:
    """``74.2 %``, or ``0.412`` of a similarity."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"


def interval(value: Interval | None, metric: str) -> str:
    """The mean and its 95 % interval: ``74.2 % (71.5 to 76.9)``."""
    if value is None:
        return NOTHING
    return f"{score(value.value, metric)} ({ends(value.low, value.high, metric)})"


def ends(low: float, high: float, metric: str) -> str:
    """The two ends of an interval, without the unit."""
    scale, digits = (100, 1) if is_share(metric) else (1, 3)
    return f"{_signed(scale * low, digits)} to {_signed(scale * high, digits)}"


def gap(value: float, metric: str, *, sign: bool = False) -> str:
    """A difference of two scores: ``8.3 points`` of a hundred, or ``0.031``."""
    text = _signed(100 * value if is_share(metric) else value, 1 if is_share(metric) else 3)
    text = f"+{text}" if sign and not text.startswith(MINUS) and float(text) else text
    return f"{text} points" if is_share(metric) else text


def p_value(p: float) -> str:
    """``< 0.001`` or ``0.034``."""
    return "< 0.001" if p < 0.001 else "1" if p > 0.9995 else f"{p:.3f}"


def seconds(value: float | None) -> str:
    """``840 ms`` or ``1.24 s``."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value >= 1:
        return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 or not value else f"{1000 * value:.1f} ms"


def dollars(value: float | None) -> str:
    """US dollars: ``$0.42``; small amounts keep two digits that say something."""
    if value is None or not math.isfinite(value):
        return "unknown"
    return f"${value:,.2f}" if value >= 0.1 or not value else f"${value:.2g}"


def memory(value: float | None) -> str:
    """Bytes: ``1.24 GiB`` or ``812 MiB``."""
    if value is None:
        return NOTHING
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    """A number with thousands separated, and its unit."""
    return NOTHING if value is None else f"{value:,.{digits}f}{unit and ' '}{unit}"


def significant(value: float) -> str:
    """Three digits that say something: ``0.042``, ``3.5``, ``1,230``."""
    if not value or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plural(count: int, noun: str) -> str:
    """``1 question``, ``1,053 questions``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1] if names else "") if part)


def short(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _signed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    if not float(text):
        return text.lstrip("-")  # no "-0.0"
    return text.replace("-", MINUS)
