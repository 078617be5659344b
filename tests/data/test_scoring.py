"""Exact match after lower-casing and stripping punctuation."""

import pytest

from multimodal.data import exact_match, normalise_answer
from multimodal.data.scoring import rouge_l, wilson_interval, words_of


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes.", "yes"),
        ("  Left   Lung, Lower Right\n", "left lung lower right"),
        ("X-Ray", "xray"),
        ("Crohn's", "crohns"),
        ("Arlagårdar!", "arlagårdar"),
        ("左肺\N{FULLWIDTH COMMA}右下\N{IDEOGRAPHIC FULL STOP}", "左肺右下"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER T}2", "t2"),
        ("...", ""),
    ],
)
def test_normalise_answer(answer: str, normalised: str) -> None:
    assert normalise_answer(answer) == normalised


def test_exact_match() -> None:
    assert exact_match("transverse plane.", "Transverse Plane")
    assert not exact_match("the transverse plane", "Transverse Plane")
    assert not exact_match("No", "Yes")


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        # Lin, 2004, section 3.1: recall and precision are 3/4 and 2/4.
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Sweet, RED apples!", "sweet red apples", 1.0),
        ("sweet", "sweet red apples", 0.5),
        ("", "sweet", 0.0),
        ("...", "", 1.0),
        ("肝脏异常。", "肝异常", 6 / 7),
        ("a b c d", "d c b a", 0.25),
    ],
)
def test_rouge_l(said: str, answer: str, score: float) -> None:
    assert rouge_l(said, answer) == pytest.approx(score) == pytest.approx(rouge_l(answer, said))


def test_words() -> None:
    assert words_of("An X-ray: T2加权, 肝脏!") == ["an", "xray", "t2", "加", "权", "肝", "脏"]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055), (0, 0, 0, 1)],
)
def test_wilson_interval(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)
