"""Controls of a measurement: the same questions about other pictures, or about none. A model that sees does worse."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from multimodal.data.sample import Sample


def shuffle_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Give every question the pictures of a random other one, never its own unless all have the same.

    Questions without a picture stay as they are.
    """
    chance = random.Random(seed)
    pool = [sample.images for sample in samples if sample.images]

    def others(images: tuple[Path, ...]) -> tuple[Path, ...]:
        while (drawn := chance.choice(pool)) == images:
            pass
        return drawn

    if len(set(pool)) < 2:
        return list(samples)
    return [replace(sample, images=others(sample.images)) if sample.images else sample for sample in samples]


def without_images(samples: Sequence[Sample]) -> list[Sample]:
    """The questions alone."""
    return [replace(sample, images=()) for sample in samples]
