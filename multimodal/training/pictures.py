"""Pictures on their way into a batch: opened, augmented and prepared each time they are drawn.

This is for an encoder that is trained; the features of a frozen one are kept (see ``features.py``). Both draw by a
seed: the same seed gives the same numbers, in this run or in one that goes on after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from multimodal.data import DataError
from multimodal.images import ImageError, load_image
from multimodal.training.augmentation import View, draw_view

NAMED = 5  # broken pictures that an error names; more would hide what it says


class Pictures(Protocol):
    """What pictures become in a batch.

    Attributes:
        key: The model's argument that takes it.
    """

    key: str

    def draw(self, path: Path, seed: str) -> tuple[torch.Tensor, View]:
        """One view of a picture, without the axes of rows and pictures, and what that view is."""


class LivePictures:
    """Pixel values ``(3, height, width)``, augmented anew in every draw.

    Args:
        kinds: The pictures, and for each its kind of :mod:`multimodal.training.augmentation`. Each is opened once, so
            that a broken one is told before training.
        image_processor: What prepares pictures for the encoder.

    Raises:
        DataError: If a picture cannot be used.
    """

    key = "pixel_values"

    def __init__(self, kinds: Mapping[Path, str], *, image_processor: Any) -> None:
        self.image_processor, self.kinds = image_processor, dict(kinds)
        check_pictures(self.kinds)

    def draw(self, path: Path, seed: str) -> tuple[torch.Tensor, View]:
        """One augmented view, prepared for the encoder, and what that view is."""
        return _drawn(path, self.kinds[path], seed, self.image_processor)


class StreamedPictures:
    """The same for pictures of one kind that are not known beforehand: a broken one is told when its turn comes.

    Args:
        kind: Of :mod:`multimodal.training.augmentation`.
        image_processor: What prepares pictures for the encoder.
    """

    key = "pixel_values"

    def __init__(self, kind: str, *, image_processor: Any) -> None:
        self.kind, self.image_processor = kind, image_processor

    def draw(self, path: Path, seed: str) -> tuple[torch.Tensor, View]:
        """One augmented view, prepared for the encoder, and what that view is.

        Raises:
            DataError: If the picture cannot be used.
        """
        try:
            return _drawn(path, self.kind, seed, self.image_processor)
        except ImageError as error:
            raise DataError(f"this picture {error.problem}", file=path, remedy=error.remedy) from error


def _drawn(path: Path, kind: str, seed: str, image_processor: Any) -> tuple[torch.Tensor, View]:
    view = draw_view(kind, seed)
    return image_processor(view.of(load_image(path)), return_tensors="pt")["pixel_values"][0], view


def check_pictures(paths: Iterable[Path]) -> None:
    """Open every picture once: minutes before hours of work, not after them.

    Raises:
        DataError: If any cannot be used; it names them and says what is wrong with the first.
    """
    broken: list[tuple[Path, ImageError]] = []
    for path in tqdm(sorted(set(paths)), desc="checking pictures"):
        try:
            load_image(path)
        except ImageError as error:
            broken.append((path, error))
    if not broken:
        return
    path, first = broken[0]
    others = ", ".join(str(path) for path, _ in broken[1:NAMED]) + (", ..." if len(broken) > NAMED else "")
    also = f" (and {len(broken) - 1} more that cannot be used: {others})" if others else ""
    raise DataError(f"this picture {first.problem}{also}", file=path, remedy=first.remedy)
