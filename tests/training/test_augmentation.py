"""Augmented views: fixed by their seed, never a mirrored X-ray, and boxes that stay around what they stood around."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageStat

from multimodal.data import Box
from multimodal.training.augmentation import AUGMENTATIONS, View, box_target, draw_view


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
    assert draw_view(kind, "a") == draw_view(kind, "a")
    assert (draw_view(kind, "a") == draw_view(kind, "b")) is (kind == "none")
    seen = draw_view(kind, "a").of(image)
    assert seen.tobytes() == draw_view(kind, "a").of(image).tobytes()
    assert (seen.tobytes() == before) is (kind == "none")
    assert image.tobytes() == before


def test_left_stays_left_where_it_is_an_answer(image: Image.Image) -> None:
    views = {kind: [draw_view(kind, str(seed)) for seed in range(60)] for kind in AUGMENTATIONS}
    assert not any(view.mirrored or is_mirrored(view.of(image)) for view in views["medical"])
    assert any(view.mirrored and is_mirrored(view.of(image)) for view in views["shop"])
    assert {view.colour for view in views["medical"]} == {1.0}  # a scan has no colours to change


def test_a_picture_of_one_pixel_has_views() -> None:
    for kind in AUGMENTATIONS:
        for seed in range(20):
            assert min(draw_view(kind, str(seed)).of(Image.new("RGB", (1, 1))).size) >= 1


# ---- boxes

SIZES = [(400, 400), (500, 320), (300, 480)]
TURNED = View(angle=8, left=0.05, top=0.15, width=0.8, height=0.8)


def bounds(image: Image.Image) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom of what is bright, in shares of the picture."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) > 127)
    if not len(rows):
        return None
    width, height = image.size
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


@pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "tall"])
@pytest.mark.parametrize(
    "view",
    [View(), View(mirrored=True), View(angle=10), View(angle=-15, mirrored=True), TURNED]
    + [draw_view(kind, str(seed)) for kind in ("medical", "shop") for seed in range(6)],
)
def test_a_box_stays_around_what_was_drawn(view: View, size: tuple[int, int]) -> None:
    """A rectangle is drawn, the picture really transformed, and what is left of the rectangle measured."""
    box = Box("drawn", left=0.3, top=0.45, width=0.2, height=0.25)
    image = Image.new("RGB", size)
    corners = [box.left * size[0], box.top * size[1]]
    corners += [corners[0] + box.width * size[0] - 1, corners[1] + box.height * size[1] - 1]
    ImageDraw.Draw(image).rectangle(corners, fill=(255, 255, 255))
    plain = View(view.angle, view.left, view.top, view.width, view.height, view.mirrored)  # as bright as it was
    drawn, expected = bounds(plain.of(image)), view.box(box, aspect=size[0] / size[1])
    assert drawn is not None and expected is not None
    edges = (expected.left, expected.top, expected.left + expected.width, expected.top + expected.height)
    assert np.abs(np.subtract(edges, drawn)).max() < 0.02, f"{edges} computed, {drawn} drawn"
    assert expected.label == "drawn"


def test_a_box_that_a_view_does_not_show() -> None:
    box = Box("corner", left=0.0, top=0.0, width=0.1, height=0.1)
    assert View(left=0.2, top=0.2, width=0.8, height=0.8).box(box) is None
    cut = View(left=0.05, width=0.5).box(box)
    assert cut is not None
    assert (cut.left, cut.width) == pytest.approx((0.0, 0.1)) and (cut.top, cut.height) == pytest.approx((0.0, 0.1))


def test_targets_are_shares_of_the_grids_cells() -> None:
    upper_left = box_target([Box("a", 0.0, 0.0, 0.5, 0.5)], View(), (2, 2))
    assert upper_left.tolist() == [1, 0, 0, 0]
    mirrored = box_target([Box("a", 0.0, 0.0, 0.5, 0.5)], View(mirrored=True), (2, 2))
    assert mirrored.tolist() == [0, 1, 0, 0]
    part = box_target([Box("a", 0.0, 0.0, 0.75, 1.0)], View(), (2, 2))
    torch.testing.assert_close(part, torch.tensor([1.0, 0.5, 1.0, 0.5]) / 3)
    both = box_target([Box("a", 0.0, 0.0, 0.5, 0.5), Box("b", 0.5, 0.5, 0.5, 0.5)], View(), (2, 2))
    torch.testing.assert_close(both, torch.tensor([0.5, 0, 0, 0.5]))
    assert not box_target([], View(), (2, 2)).any()
    assert not box_target([Box("a", 0.0, 0.0, 0.1, 0.1)], View(left=0.5, width=0.5), (2, 2)).any()
