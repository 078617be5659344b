"""Augmented views: fixed by their seed, and never a mirrored X-ray."""

from __future__ import annotations

import pytest
from PIL import Image, ImageStat

from multimodal.training.augmentation import AUGMENTATIONS, augment


@pytest.fixture
def image() -> Image.Image:
    """White on the left, black on the right."""
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (0, 0, 30, 40))
    return image


def is_mirrored(image: Image.Image) -> bool:
    width, height = image.size
    left, right = (
        ImageStat.Stat(image.crop(box)).mean[0] for box in ((0, 0, 5, height), (width - 5, 0, width, height))
    )
    return right > left


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_a_seed_fixes_a_view(image: Image.Image, kind: str) -> None:
    before = image.tobytes()
    assert augment(image, kind, "a").tobytes() == augment(image, kind, "a").tobytes()
    assert (augment(image, kind, "a").tobytes() == augment(image, kind, "b").tobytes()) is (kind == "none")
    assert image.tobytes() == before


def test_left_stays_left_where_it_is_an_answer(image: Image.Image) -> None:
    assert not any(is_mirrored(augment(image, "medical", str(seed))) for seed in range(60))
    assert any(is_mirrored(augment(image, "shop", str(seed))) for seed in range(60))


def test_a_picture_of_one_pixel_has_views() -> None:
    for kind in AUGMENTATIONS:
        assert min(augment(Image.new("RGB", (1, 1)), kind, "a").size) >= 1
