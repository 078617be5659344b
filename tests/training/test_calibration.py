"""Calibration: the error on counted answers, a fit that finds what made them, numbers that stay in the folder."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from multimodal.answer import chance_of_right, log_odds
from multimodal.fusion import FusionConfig
from multimodal.model import ModelError, MultiModalModel
from multimodal.training.calibration import Calibration, expected_calibration_error, fit, summary, write
from tests.training.tiny import draw, save_checkpoint


def test_expected_calibration_error() -> None:
    assert expected_calibration_error([1, 1, 0], [True, True, False]) == 0
    assert expected_calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]) == pytest.approx(0.15)
    # Two bins, three answers in one and one in the other.
    assert expected_calibration_error([0.62, 0.64, 0.66, 0.2], [True, True, False, True]) == pytest.approx(
        (abs(1.92 - 2) + abs(0.2 - 1)) / 4
    )
    # In one bin, too sure here and not sure enough there is even.
    assert expected_calibration_error([0.61, 0.65], [True, False], bins=2) == pytest.approx(0.13)
    with pytest.raises(ValueError, match="no answers"):
        expected_calibration_error([], [])


def test_chance_of_right() -> None:
    for probability in (0.001, 0.3, 0.5, 0.97):
        logprob = math.log(probability)
        assert chance_of_right(logprob) == pytest.approx(probability)
        assert log_odds(logprob) == pytest.approx(math.log(probability / (1 - probability)))
        assert chance_of_right(logprob, scale=0, bias=0) == 0.5
    assert 0 <= chance_of_right(-1e6) < 1e-9 and chance_of_right(0.0) == pytest.approx(1)
    assert 0 <= chance_of_right(-math.inf) < 1e-9
    chances = [chance_of_right(logprob, scale=0.7, bias=-0.4) for logprob in (-30, -3, -0.3, -0.003, 0)]
    assert chances == sorted(chances) and len(set(chances)) == 5


def made(scale: float, bias: float, count: int) -> tuple[list[float], list[bool]]:
    """Answers that are right as often as a model with these numbers says."""
    chance = random.Random(0)
    logprobs = [math.log(chance.betavariate(3, 1)) for _ in range(count)]
    return logprobs, [chance.random() < chance_of_right(logprob, scale=scale, bias=bias) for logprob in logprobs]


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (0.5, -0.7), (1.8, 1.0)])
def test_the_fit_finds_what_made_the_answers(scale: float, bias: float) -> None:
    logprobs, correct = made(scale, bias, 20_000)
    found = fit(logprobs, correct)
    assert (found.scale, found.bias) == pytest.approx((scale, bias), abs=0.1)
    assert expected_calibration_error(found.confidences(logprobs), correct) < 0.015
    if scale != 1:
        assert expected_calibration_error(Calibration().confidences(logprobs), correct) > 0.05


def test_the_fit_is_sane_where_there_is_little_to_learn_from() -> None:
    assert all(chance > 0.9 for chance in fit([-0.01] * 20, [True] * 20).confidences([-0.01]))
    assert all(chance < 0.1 for chance in fit([-0.01] * 20, [False] * 20).confidences([-0.01]))
    parted = fit([-0.1] * 5 + [-4.0] * 5, [True] * 5 + [False] * 5)  # a threshold parts right from wrong
    assert 0 < parted.scale < 3 and parted.confidences([-0.1])[0] > 0.8 > 0.2 > parted.confidences([-4.0])[0]
    assert math.isfinite(fit([-0.5], [True]).scale)
    with pytest.raises(ValueError, match="no answers to calibrate with"):
        fit([], [])


def test_summary() -> None:
    line = summary([0.9, 0.9, 0.2, 0.2], [True, False, True, False])
    assert line.endswith("2 answers are less sure than 50 %, 50.0 % of them right (50.0 % of the others)")
    assert "calibration error 35.0 %" in line
    assert summary([0.9], [True]) == "confidence: expected calibration error 10.0 %"
    assert summary([0.1], [False]).endswith("0.0 % of them right")


def test_the_numbers_stay_in_the_folder(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    before = json.loads((folder / "config.json").read_text())
    files = {file.name for file in folder.iterdir()}
    plain = MultiModalModel.from_pretrained(folder)("Is it red?", draw("red", 0), max_new_tokens=2)
    assert write(folder, Calibration(0.5, -1.0)) == folder / "config.json"
    after = json.loads((folder / "config.json").read_text())
    assert after == before | {"confidence_scale": 0.5, "confidence_bias": -1.0}
    assert {file.name for file in folder.iterdir()} == files

    model = MultiModalModel.from_pretrained(folder)
    answer = model("Is it red?", draw("red", 0), max_new_tokens=2)
    assert answer.text == plain.text
    assert answer.confidence == pytest.approx(chance_of_right(math.log(plain.confidence), scale=0.5, bias=-1.0))
    model.model.save_pretrained(tmp_path / "again")
    again = FusionConfig.from_pretrained(tmp_path / "again")
    assert (again.confidence_scale, again.confidence_bias) == (0.5, -1.0)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder with a model"):
        write(tmp_path / "someone", Calibration())
