"""Grid features of a frozen encoder, computed once and kept on disk.

A frozen encoder gives the same features in every epoch, so they are computed before training: one row for each view of
each picture, view 0 the picture as it is, the others augmented. The file is keyed by content (pictures, encoder,
preparation), memory-mapped, and filled in order, so that an interrupted run goes on where it stopped.

Axes: V views, R grid cells, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import BaseImageProcessor

from multimodal.fusion import VisionEncoder
from multimodal.images import load_image
from multimodal.training.augmentation import augment

ENCODE_BATCH = 4  # pictures at a time: the activations of four fit the processor's caches, sixteen take twice as long


class FeatureCache:
    """Features of a set of pictures.

    Args:
        folder: Where the cache files live.
        paths: The pictures.
        encoder: A frozen encoder.
        image_processor: What prepares pictures for it.
        augmentation: A kind of :mod:`multimodal.training.augmentation`.
        views: Views of each picture, at least 1.
    """

    def __init__(
        self,
        folder: Path,
        paths: Iterable[Path],
        *,
        encoder: VisionEncoder,
        image_processor: BaseImageProcessor,
        augmentation: str,
        views: int,
    ) -> None:
        self.views = views
        self._index = {path: row for row, path in enumerate(sorted(set(paths)))}
        rows, columns = encoder.config.grid_size
        shape = (len(self._index) * views, rows * columns, encoder.config.hidden_size)
        file = folder / f"{self._key(encoder, image_processor, augmentation)}.npy"
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape).flush()
        self._features = np.load(file, mmap_mode="r+")
        self._fill(file.with_suffix(".done"), encoder, image_processor, augmentation)

    def __getitem__(self, item: tuple[Path, int]) -> torch.Tensor:
        """Features ``(R, D)`` of a picture's view."""
        path, view = item
        return torch.from_numpy(np.array(self._features[self._index[path] * self.views + view]))

    def _key(self, encoder: VisionEncoder, image_processor: BaseImageProcessor, augmentation: str) -> str:
        digest = hashlib.sha256()
        for path in self._index:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        for name, tensor in encoder.state_dict().items():
            digest.update(f"{name}{tensor.double().sum().item()!r}".encode())
        settings = {"processor": image_processor.to_dict(), "augmentation": augmentation, "views": self.views}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:24]

    @torch.inference_mode()
    def _fill(
        self, marker: Path, encoder: VisionEncoder, image_processor: BaseImageProcessor, augmentation: str
    ) -> None:
        paths, total = list(self._index), len(self._features)
        done = int(marker.read_text()) if marker.exists() else 0
        encoder = encoder.eval()
        for start in tqdm(range(done, total, ENCODE_BATCH), desc="picture features", disable=done >= total):
            numbers = range(start, min(start + ENCODE_BATCH, total))
            pictures = []
            for number in numbers:
                picture, view = divmod(number, self.views)
                image = load_image(paths[picture])
                kind = augmentation if view else "none"
                pictures.append(augment(image, kind, seed=f"{paths[picture].name}/{picture}/{view}"))
            pixels = image_processor(pictures, return_tensors="pt")["pixel_values"].to(encoder.device)
            features = encoder(pixels).features  # (N, R, D)
            self._features[start : start + len(numbers)] = features.to(torch.float16).cpu().numpy()
            if start % 512 == 0:
                self._features.flush()
                marker.write_text(str(start + len(numbers)))
        self._features.flush()
        marker.write_text(str(total))
