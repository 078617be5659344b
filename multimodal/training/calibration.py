"""Calibrated confidence: how sure the model says it is, set right on questions whose answers are known.

The log-odds of the probability that the model gives to its whole answer, times a scale, plus a bias, through a sigmoid:
Platt scaling (J. Platt, "Probabilistic Outputs for Support Vector Machines", 1999). Two numbers, fitted by maximum
likelihood on questions that no training saw, kept in the model's ``config.json``. Before that, scale 1 and bias 0 give
that probability itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from multimodal.answer import chance_of_right, log_odds
from multimodal.model import ModelError

BINS = 15  # C. Guo et al., "On Calibration of Modern Neural Networks", 2017, section 5
STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """The two numbers of a model's configuration, ``confidence_scale`` and ``confidence_bias``."""

    scale: float = 1.0
    bias: float = 0.0

    def confidences(self, logprobs: Sequence[float]) -> list[float]:
        """The chances that answers of these log-probabilities are right."""
        return [chance_of_right(logprob, scale=self.scale, bias=self.bias) for logprob in logprobs]


def fit(logprobs: Sequence[float], correct: Sequence[bool]) -> Calibration:
    """Fit scale and bias by maximum likelihood.

    The targets are not quite 0 and 1 but Platt's (section 2.2), what one would expect of one more right and one more
    wrong answer: so there is a best scale even where a threshold parts right and wrong answers, or all are right.

    Args:
        logprobs: Log-probability of each answer.
        correct: Whether it is right.

    Raises:
        ValueError: If there are no answers.
    """
    if not correct:
        raise ValueError("there are no answers to calibrate with: give data with questions")
    odds = torch.tensor([log_odds(logprob) for logprob in logprobs], dtype=torch.float64)
    right = sum(correct)
    high, low = (right + 1) / (right + 2), 1 / (len(correct) - right + 2)
    targets = torch.tensor([high if one else low for one in correct], dtype=torch.float64)
    numbers = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = functional.binary_cross_entropy_with_logits(numbers[0] * odds + numbers[1], targets)
        found.backward()
        return found

    optimizer.step(loss)
    scale, bias = numbers.detach().tolist()
    return Calibration(scale, bias)


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[bool], bins: int = BINS) -> float:
    """How far confidence is from the share of right answers, averaged over answers; 0 to 1.

    Answers are put into bins of equal width by their confidence; a bin counts with its number of answers (Guo et al.,
    2017, equation 3).

    Raises:
        ValueError: If there are no answers.
    """
    if not correct:
        raise ValueError("there are no answers to measure calibration on")
    gaps = [0.0] * bins
    for confidence, one in zip(confidences, correct, strict=True):
        gaps[min(int(confidence * bins), bins - 1)] += confidence - one
    return sum(abs(gap) for gap in gaps) / len(correct)


def write(folder: Path, calibration: Calibration) -> Path:
    """Write the numbers into a model's configuration, and return its file.

    Raises:
        ModelError: If the folder holds no model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} is no folder with a model: calibration is written into its config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"confidence_scale": calibration.scale, "confidence_bias": calibration.bias}
    new = file.with_name("config.json.new")
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, file)
    return file


def summary(confidences: Sequence[float], correct: Sequence[bool], threshold: float = 0.5) -> str:
    """One line: the calibration error, and how right the answers are below a confidence and above it."""
    error = 100 * expected_calibration_error(confidences, correct)
    unsure = [one for confidence, one in zip(confidences, correct, strict=True) if confidence < threshold]
    right, sure = sum(unsure), len(correct) - len(unsure)
    line = f"confidence: expected calibration error {error:.1f} %"
    if unsure:
        line += f"; {len(unsure)} answers are less sure than {100 * threshold:.0f} %"
        line += f", {100 * right / len(unsure):.1f} % of them right"
        line += f" ({100 * (sum(correct) - right) / sure:.1f} % of the others)" if sure else ""
    return line
