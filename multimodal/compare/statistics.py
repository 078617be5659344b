"""Honest figures of a comparison: intervals that know that questions share pictures, paired tests, and their limits.

Plain arrays in, small frozen results out; nothing here knows what a pipeline is. What always holds: a seed decides
every random draw, so that the same rows give the same figures on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

from multimodal.data.scoring import wilson_interval

LEVEL = 0.95
DRAWS = 10_000
BINS = 10
SAME = 1e-9  # a standard error that is only rounding


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        value: The mean.
        low: Lower end.
        high: Upper end.
        count: How many values it is the mean of.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """How much better one pipeline is than another, on the same questions.

    Attributes:
        value: Mean of the first less that of the second.
        low: Lower end of its 95 % interval (paired bootstrap over pictures).
        high: Upper end.
        count: Questions that both answered.
        only_first: Questions that only the first got right; None where answers are not simply right or wrong.
        only_second: The other way round.
        p: Of no difference: McNemar's exact test where answers are right or wrong, else from the bootstrap.
        adjusted_p: The same after Holm's correction over all pairs of a task; equal to ``p`` before it.
        detectable: The smallest true difference that this many questions would have found in four of five runs.
    """

    value: float
    low: float
    high: float
    count: int
    only_first: int | None
    only_second: int | None
    p: float
    adjusted_p: float
    detectable: float


@dataclass(frozen=True)
class Bin:
    """Answers of like confidence.

    Attributes:
        confidence: Their mean confidence.
        accuracy: The share of them that is right.
        count: How many.
    """

    confidence: float
    accuracy: float
    count: int


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0) -> Interval:
    """Mean with an interval from a bootstrap over clusters (pictures), not over questions.

    B. Efron, "Better Bootstrap Confidence Intervals", 1987, section 1 (percentiles); resampling whole clusters follows
    A. Davison and D. Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8. Where all values are the
    same, or belong to one cluster, the bootstrap has no width: for shares Wilson's interval over the clusters takes its
    place.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    sums, counts = _by_cluster(values, clusters)
    value = float(sums.sum() / counts.sum())
    if bool(np.isin(values, (0, 1)).all()) and (len(sums) == 1 or value in (0.0, 1.0)):
        return Interval(value, *wilson_interval(value * len(sums), len(sums)), len(values))
    low, high = np.quantile(_resampled(sums, counts, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), len(values))


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0
) -> Difference:
    """Compare two pipelines on the same questions.

    McNemar's exact test: Q. McNemar, "Note on the sampling error of the difference between correlated proportions",
    1947. The detectable difference is ``(z(0.975) + z(0.8))`` standard errors of the paired difference (J. Cohen,
    "Statistical Power Analysis", 1988, section 2.4). Where all pictures show the same difference the bootstrap has no
    width, and would claim that nothing could be missed: another difference may then be in as many pictures as Wilson's
    interval of a share of 0 leaves room for.

    Args:
        first: A score for each question.
        second: The other's, in the same order.
        clusters: The picture of each question.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there are no questions, or the three differ in length.
    """
    if not len(first) == len(second) == len(clusters):
        raise ValueError(f"{len(first)}, {len(second)} and {len(clusters)} values do not belong together")
    if not len(first):
        raise ValueError("the two have no question in common")
    one, other = np.asarray(first, float), np.asarray(second, float)
    sums, counts = _by_cluster(one - other, clusters)
    value = float(sums.sum() / counts.sum())
    drawn = _resampled(sums, counts, seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    right_or_wrong = bool(np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all())
    only_first = only_second = None
    if right_or_wrong:
        only_first, only_second = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
        discordant = only_first + only_second
        p = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    else:
        beyond = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
        p = min(1.0, 2 * max(beyond, 1 / len(drawn)))
    error = float(drawn.std())
    if right_or_wrong and error < SAME:
        _, unseen = wilson_interval(0, len(sums))
        low, high, error = max(value - unseen, -1.0), min(value + unseen, 1.0), math.sqrt(unseen / len(sums))
    detectable = min(float(norm.ppf(0.975) + norm.ppf(0.8)) * error, 1.0)
    return Difference(value, float(low), float(high), len(one), only_first, only_second, p, p, detectable)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: S. Holm, "A simple sequentially rejective multiple test procedure", 1979."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def reliability(confidences: Sequence[float], correct: Sequence[float]) -> list[Bin]:
    """Answers in ten bins of equal width by confidence; empty bins are left out."""
    sure, right = np.asarray(confidences, float), np.asarray(correct, float)
    places = np.clip((sure * BINS).astype(int), 0, BINS - 1)
    return [
        Bin(float(sure[places == place].mean()), float(right[places == place].mean()), int((places == place).sum()))
        for place in range(BINS)
        if (places == place).any()
    ]


def calibration_error(confidences: Sequence[float], correct: Sequence[float]) -> float:
    """Expected calibration error, 0 to 1: C. Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.

    Raises:
        ValueError: If there are no answers.
    """
    if not len(confidences):
        raise ValueError("there are no answers with a confidence")
    bins = reliability(confidences, correct)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / len(confidences)


def percentiles(values: Sequence[float], shares: Sequence[float] = (0.5, 0.95, 0.99)) -> tuple[float, ...]:
    """Nearest-rank percentiles: each is a value that was seen.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("there are no values")
    ordered = sorted(values)
    return tuple(ordered[max(math.ceil(share * len(ordered)) - 1, 0)] for share in shares)


def _by_cluster(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, in the order in which clusters first come."""
    known = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([known[cluster] for cluster in clusters])
    return np.bincount(places, np.asarray(values, float), len(known)), np.bincount(places, minlength=len(known))


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Means ``(DRAWS,)`` over clusters that are drawn with replacement."""
    chance = np.random.default_rng(seed)
    means = np.empty(DRAWS)
    step = max(1, 2_000_000 // len(sums))  # rows at a time: bounded memory
    for start in range(0, DRAWS, step):
        drawn = chance.integers(len(sums), size=(min(step, DRAWS - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
