"""What commands of the line share: kinds of values, and words of help."""

from __future__ import annotations

import argparse

PRECISIONS = ["auto", "float32", "bfloat16", "int8", "int4"]
PRECISION_HELP = "what answers are computed in (default: int8 where its step is compiled, else the model's own)"


def count(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not 0 to 1")
    return number


def names(text: str) -> list[str]:
    """Words with commas between."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(number) for number in text.split(",")]


def quiet() -> None:
    """No progress bars of the loading of weights, which takes a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()
