"""Augmented views of a picture, made before the encoder sees it, and where its boxes lie in them.

Medical pictures are never mirrored: left and right are answers. Shop pictures may be.
A view is fixed by the seed: the same seed gives the same view of a picture in every run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageEnhance

from multimodal.data import Box

AUGMENTATIONS = ("medical", "shop", "none")


@dataclass(frozen=True)
class View:
    """How a picture is looked at: turned about its centre, cropped, perhaps mirrored, and its colours changed.

    Attributes:
        angle: Degrees, counter-clockwise.
        left: Where the crop begins, as a share of the picture's width.
        top: Likewise of its height.
        width: How much of the picture's width the crop takes, up to 1.
        height: Likewise of its height.
        mirrored: Left and right are exchanged, after the crop.
        colour: Saturation, 1 as it is.
        brightness: 1 as it is.
        contrast: 1 as it is.
    """

    angle: float = 0.0
    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0
    mirrored: bool = False
    colour: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0

    def of(self, image: Image.Image) -> Image.Image:
        """This view of an RGB picture; its size may differ."""
        if self.angle:
            image = image.rotate(self.angle, resample=Image.Resampling.BILINEAR)
        if self.width < 1 or self.height < 1:
            left, top = round(image.width * self.left), round(image.height * self.top)
            right = left + max(round(image.width * self.width), 1)
            bottom = top + max(round(image.height * self.height), 1)
            image = image.crop((left, top, right, bottom))
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhancer, factor in (
            (ImageEnhance.Color, self.colour),
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
        ):
            if factor != 1:
                image = enhancer(image).enhance(factor)
        return image

    def box(self, box: Box, aspect: float = 1.0) -> Box | None:
        """Where a box of the picture lies in this view: the smallest upright box around it.

        Args:
            box: In fractions of the whole picture.
            aspect: The picture's width divided by its height.

        Returns:
            The box in fractions of the view, or None where the view does not show it.
        """
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn), math.sin(turn)
        xs, ys = [], []
        for x in (box.left, box.left + box.width):
            for y in (box.top, box.top + box.height):
                across, down = (x - 0.5) * aspect, y - 0.5  # in heights of the picture, from its centre
                turned_x, turned_y = cos * across + sin * down, -sin * across + cos * down
                xs.append((turned_x / aspect + 0.5 - self.left) / self.width)
                ys.append((turned_y + 0.5 - self.top) / self.height)
        if self.mirrored:
            xs = [1 - x for x in xs]
        left, right = max(min(xs), 0.0), min(max(xs), 1.0)
        top, bottom = max(min(ys), 0.0), min(max(ys), 1.0)
        if left >= right or top >= bottom:
            return None
        return replace(box, left=left, top=top, width=right - left, height=bottom - top)


def draw_view(kind: str, seed: str) -> View:
    """Draw a view.

    Args:
        kind: ``"medical"`` (small turns, shifts and zooms, brightness and contrast), ``"shop"`` (crops, turns,
            mirroring, colour) or ``"none"``.
        seed: Fixes the view.
    """
    if kind == "none":
        return View()
    chance = random.Random(seed)
    if kind == "medical":
        width = height = chance.uniform(0.8, 1.0)
        angle = chance.uniform(-10, 10)
    else:  # random resized crop: Szegedy et al., "Going deeper with convolutions", 2015, section 6
        area, stretch = chance.uniform(0.35, 1.0), math.exp(chance.uniform(-0.2, 0.2))
        width, height = min(math.sqrt(area * stretch), 1.0), min(math.sqrt(area / stretch), 1.0)
        angle = chance.uniform(-15, 15)
    return View(
        angle=angle,
        left=chance.uniform(0, 1 - width),
        top=chance.uniform(0, 1 - height),
        width=width,
        height=height,
        mirrored=kind == "shop" and chance.random() < 0.5,
        colour=chance.uniform(0.7, 1.3) if kind == "shop" else 1.0,
        brightness=chance.uniform(0.75, 1.25),
        contrast=chance.uniform(0.75, 1.25),
    )


def box_target(boxes: Sequence[Box], view: View, grid: tuple[int, int]) -> torch.Tensor:
    """The share of each grid cell in the boxes as a view shows them: ``(R,)``, sums to 1, or 0 where there are none."""
    covered = covered_cells(boxes, view, grid)
    total = covered.sum()
    return covered / total if total > 0 else covered


def covered_cells(boxes: Sequence[Box], view: View, grid: tuple[int, int]) -> torch.Tensor:
    """How much of each grid cell the boxes cover as a view shows them: ``(R,)``, from 0 to 1."""
    rows, columns = grid
    covered = torch.zeros(rows, columns)
    for box in boxes:
        seen = view.box(box)
        if seen is not None:
            down = _overlap(seen.top, seen.height, rows)
            across = _overlap(seen.left, seen.width, columns)
            covered = torch.maximum(covered, down[:, None] * across)
    return covered.flatten()


def _overlap(start: float, length: float, count: int) -> torch.Tensor:
    edges = torch.arange(count + 1) / count
    low, high = edges[:-1].clamp_min(start), edges[1:].clamp_max(start + length)
    return ((high - low) * count).clamp_min(0)
