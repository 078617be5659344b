"""Augmented views of a picture, made before the encoder sees it.

Medical pictures are never mirrored: left and right are answers. Shop pictures may be.
A view is fixed by the seed: the same picture and view number give the same pixels in every run.
"""

from __future__ import annotations

import random

from PIL import Image, ImageEnhance

AUGMENTATIONS = ("medical", "shop", "none")


def augment(image: Image.Image, kind: str, seed: str) -> Image.Image:
    """One augmented view.

    Args:
        image: RGB picture.
        kind: ``"medical"`` (small turns, shifts and zooms, brightness and contrast), ``"shop"`` (crops, mirroring,
            colour) or ``"none"``.
        seed: Fixes the view.

    Returns:
        The view; its size may differ.
    """
    if kind == "none":
        return image
    chance = random.Random(seed)
    width, height = image.size
    zoom = chance.uniform(0.85, 1.0) if kind == "medical" else chance.uniform(0.6, 1.0)
    crop_width, crop_height = round(width * zoom), round(height * zoom)
    left, top = chance.randint(0, width - crop_width), chance.randint(0, height - crop_height)
    image = image.rotate(chance.uniform(-8, 8), resample=Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + crop_width, top + crop_height))
    if kind == "shop":
        if chance.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Color(image).enhance(chance.uniform(0.7, 1.3))
    image = ImageEnhance.Brightness(image).enhance(chance.uniform(0.8, 1.2))
    return ImageEnhance.Contrast(image).enhance(chance.uniform(0.8, 1.2))
