"""Exact match after lower-casing and stripping punctuation."""

import pytest

from multimodal.data import exact_match, normalise_answer


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
