"""Figures against numbers worked out by hand, closed forms, and repeated draws from a population that is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm

from multimodal.compare.statistics import (
    Bin,
    calibration_error,
    holm,
    mean_interval,
    paired_difference,
    percentiles,
    reliability,
)

ALONE = list(range(1000))  # every question has a picture of its own


def counts(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    """Scores of two pipelines, by how many questions which of them got right."""
    one = [1.0] * both + [1.0] * first + [0.0] * second + [0.0] * neither
    other = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    return one, other


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * (1/2)
        (5, 0, 2 / 2**5),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (3, 3, 1.0),
        (0, 10, 2 / 2**10),
    ],
)
def test_mcnemars_exact_test_by_hand(first: int, second: int, p: float) -> None:
    one, other = counts(20, first, second, 7)
    found = paired_difference(one, other, ALONE[: len(one)])
    assert found.p == found.adjusted_p == pytest.approx(p)
    assert (found.only_first, found.only_second, found.count) == (first, second, 27 + first + second)
    assert found.value == pytest.approx((first - second) / found.count)


def test_the_other_way_round_is_the_same_with_another_sign() -> None:
    one, other = counts(20, 9, 3, 8)
    there, back = paired_difference(one, other, ALONE[:40]), paired_difference(other, one, ALONE[:40])
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))
    assert (back.p, back.detectable) == pytest.approx((there.p, there.detectable))


def test_the_difference_has_the_width_of_the_closed_form() -> None:
    one, other = counts(60, 20, 10, 110)
    found = paired_difference(one, other, ALONE[:200])
    error = math.sqrt((30 / 200 - (10 / 200) ** 2) / 200)  # of a mean of +1, 0 and -1
    assert found.high - found.low == pytest.approx(2 * norm.ppf(0.975) * error, rel=0.05)
    assert found.detectable == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * error, rel=0.03)


def test_a_difference_of_the_detectable_size_is_found_in_four_of_five_runs() -> None:
    chance = np.random.default_rng(0)
    disagreeing, size, runs = 0.3, 80, 100
    error = math.sqrt(disagreeing / size)
    true = (norm.ppf(0.975) + norm.ppf(0.8)) * error
    found = 0
    for _ in range(runs):
        drawn = chance.choice([1.0, -1.0, 0.0], size, p=[(disagreeing + true) / 2, (disagreeing - true) / 2, 0.7])
        difference = paired_difference(np.maximum(drawn, 0).tolist(), np.maximum(-drawn, 0).tolist(), ALONE[:size])
        found += difference.p < 0.05
    assert 0.6 < found / runs < 0.9


def test_a_mean_of_scores_that_are_not_shares() -> None:
    chance = np.random.default_rng(1)
    one = chance.uniform(0, 1, 80)
    noise = chance.normal(0, 0.1, 80)
    alike = paired_difference(one.tolist(), (one + noise - noise.mean()).tolist(), ALONE[:80])
    assert alike.only_first is None and alike.only_second is None and alike.p > 0.9
    better = paired_difference((one + 0.5).tolist(), (one + noise).tolist(), ALONE[:80])
    assert better.p == pytest.approx(2 / 10_000) and better.low > 0.4


def test_where_both_are_always_right_something_may_still_be_missed() -> None:
    found = paired_difference([1.0] * 20, [1.0] * 20, ALONE[:20])
    z = norm.ppf(0.975)
    unseen = z * z / 20 / (1 + z * z / 20)  # Wilson's upper end of 0 of 20
    assert (found.value, found.p) == (0.0, 1.0)
    assert (found.low, found.high) == pytest.approx((-unseen, unseen))
    assert found.detectable == pytest.approx((z + norm.ppf(0.8)) * math.sqrt(unseen / 20))
    more = paired_difference([1.0] * 200, [1.0] * 200, ALONE[:200])
    assert 0 < more.detectable < found.detectable / 5


@pytest.mark.parametrize("flip", [False, True])
def test_one_always_right_and_the_other_always_wrong(flip: bool) -> None:
    right, wrong = [1.0] * 8, [0.0] * 8
    found = paired_difference(*((wrong, right) if flip else (right, wrong)), ALONE[:8])
    ends = sorted(abs(end) for end in (found.low, found.high))
    assert abs(found.value) == ends[1] == 1 and 0.5 < ends[0] < 0.9
    assert found.p == pytest.approx(2 / 2**8)


def test_one_picture_shows_next_to_nothing() -> None:
    found = paired_difference([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], ["a"] * 4)
    assert found.high - found.low > 1 and found.detectable == 1.0
    interval = mean_interval([1.0, 1.0, 0.0, 0.0], ["a"] * 4)
    assert interval.value == 0.5 and interval.high - interval.low > 0.7


def test_questions_about_one_picture_are_not_independent() -> None:
    scores = [float(place % 2) for place in range(40) for _ in range(5)]  # all five questions alike
    clusters = [place for place in range(40) for _ in range(5)]
    clustered, naive = mean_interval(scores, clusters), mean_interval(scores, ALONE[:200])
    assert clustered.value == naive.value == 0.5 and clustered.count == 200
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(5), rel=0.1)
    other = [0.0] * 200
    wide, narrow = paired_difference(scores, other, clusters), paired_difference(scores, other, ALONE[:200])
    assert wide.detectable == pytest.approx(math.sqrt(5) * narrow.detectable, rel=0.1)


def test_the_mean_is_of_questions_and_not_of_pictures() -> None:
    assert mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.75


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    chance = np.random.default_rng(2)
    held, naive, runs = 0, 0, 100
    clusters = [place for place in range(40) for _ in range(4)]
    for _ in range(runs):
        shares = chance.beta(1, 1, 40)  # each picture has its own difficulty; the true mean is a half
        scores = (chance.random((40, 4)) < shares[:, None]).astype(float).ravel()
        found = mean_interval(scores.tolist(), clusters)
        held += found.low <= 0.5 <= found.high
        naive += abs(scores.mean() - 0.5) <= norm.ppf(0.975) * scores.std() / math.sqrt(len(scores))
    assert 0.88 <= held / runs <= 1
    assert naive < held - 0.05 * runs  # as if no two questions shared a picture


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.7225, 1.0), (0.0, 0.0, 0.2775)])
def test_all_right_and_all_wrong_have_wilsons_interval(score: float, low: float, high: float) -> None:
    found = mean_interval([score] * 20, [place // 2 for place in range(20)])  # ten pictures
    assert (found.value, found.count) == (score, 20)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(3).random(50).tolist()
    one, same, other = (mean_interval(scores, ALONE[:50], seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert other.low == pytest.approx(one.low, abs=0.01)


def test_the_order_of_questions_does_not_matter_to_the_mean() -> None:
    one, other = counts(5, 9, 3, 8)
    there = paired_difference(one, other, ALONE[:25])
    back = paired_difference(one[::-1], other[::-1], ALONE[:25][::-1])
    assert (back.value, back.p) == (there.value, there.p) and back.low == pytest.approx(there.low, abs=0.05)


def test_nothing_has_no_figure() -> None:
    for empty in (
        lambda: mean_interval([], []),
        lambda: paired_difference([], [], []),
        lambda: calibration_error([], []),
        lambda: percentiles([]),
    ):
        with pytest.raises(ValueError, match=r"nothing|no question|no answers|no values"):
            empty()
    assert holm([]) == [] and reliability([], []) == []


def test_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="2, 1 and 2 values do not belong together"):
        paired_difference([1.0, 0.0], [1.0], ["a", "b"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 * .005, 3 * .01, 2 * .03, then no smaller
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holms_correction_by_hand(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected)


def test_holms_correction_keeps_the_order_and_lowers_nothing() -> None:
    given = np.random.default_rng(4).random(30).tolist()
    adjusted = holm(given)
    assert all(after >= before for before, after in zip(given, adjusted, strict=True))
    by_size = [after for _, after in sorted(zip(given, adjusted, strict=True))]
    assert all(one <= other for one, other in pairwise(by_size))


def test_calibration_error_by_hand() -> None:
    sure, right = [0.95, 0.9, 0.25, 0.22, 0.0, 1.0], [1, 0, 0, 1, 0, 1]
    assert reliability(sure, right) == [
        Bin(0.0, 0.0, 1),
        Bin(pytest.approx(0.235), 0.5, 2),
        Bin(pytest.approx(0.95), pytest.approx(2 / 3), 3),
    ]
    expected = (2 * abs(0.5 - 0.235) + 3 * abs(2 / 3 - 0.95)) / 6
    assert calibration_error(sure, right) == pytest.approx(expected)


def test_perfect_and_worst_calibration() -> None:
    assert calibration_error([1.0, 1.0, 0.0], [1, 1, 0]) == 0
    assert calibration_error([1.0, 1.0], [0, 0]) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([float(number) for number in range(1, 101)], (50.0, 95.0, 99.0)),
        ([2.0, 1.0], (1.0, 2.0, 2.0)),
        ([float(number) for number in range(20, 0, -1)], (10.0, 19.0, 20.0)),
    ],
)
def test_percentiles_are_values_that_were_seen(values: list[float], expected: tuple[float, ...]) -> None:
    assert percentiles(values) == expected
