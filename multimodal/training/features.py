"""Grid features of a frozen encoder, computed once and kept on disk.

A frozen encoder gives the same features in every epoch, so they are computed before training: one row for each view of
each picture, view 0 the picture as it is, the others augmented. What always holds: the file's name is a digest of all
that decides its content (bytes of the pictures, weights of the encoder, preparation), so a change of any makes another
file; a finished file is complete; a process that is stopped goes on where it was, and one that comes second waits.

Axes: V views, R grid cells, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from multimodal.fusion import VisionEncoder
from multimodal.images import load_image
from multimodal.training.augmentation import augment
from multimodal.training.pictures import check_pictures

ENCODE_BATCH = 4  # pictures at a time: the activations of four fit the processor's caches, sixteen take twice as long


class FeatureCache:
    """Features of a set of pictures; a draw takes those of a random view.

    Args:
        folder: Where the cache files live.
        paths: The pictures.
        encoder: A frozen encoder.
        image_processor: What prepares pictures for it.
        augmentation: A kind of :mod:`multimodal.training.augmentation`.
        views: Views of each picture, at least 1.

    Raises:
        DataError: If a picture cannot be used.
    """

    key = "image_features"

    def __init__(
        self,
        folder: Path,
        paths: Iterable[Path],
        *,
        encoder: VisionEncoder,
        image_processor: Any,
        augmentation: str,
        views: int,
    ) -> None:
        self.views = views
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(set(paths))}
        pictures = {digest: path for path, digest in digests.items()}  # the same picture under two names is one
        order = sorted(pictures)
        rank = {digest: row for row, digest in enumerate(order)}
        self._rows = {path: rank[digest] for path, digest in digests.items()}
        rows, columns = encoder.config.grid_size
        shape = (len(pictures) * views, rows * columns, encoder.config.hidden_size)

        file = folder / f"{_key(order, encoder, image_processor, augmentation, views)}.float16"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                jobs = [(pictures[digest], digest, view) for digest in order for view in range(views)]
                _compute(file, jobs, encoder=encoder, image_processor=image_processor, augmentation=augmentation)
        self._features = np.memmap(file, np.float16, mode="r", shape=shape) if pictures else np.empty(shape, np.float16)

    def draw(self, path: Path, seed: str) -> torch.Tensor:
        """Features ``(R, D)`` of the view that the seed picks."""
        return self.view(path, random.Random(seed).randrange(self.views))

    def view(self, path: Path, view: int) -> torch.Tensor:
        """Features ``(R, D)`` of one view; 0 is the picture as it is."""
        return torch.from_numpy(np.array(self._features[self._rows[path] * self.views + view]))


def _key(order: list[str], encoder: VisionEncoder, image_processor: Any, augmentation: str, views: int) -> str:
    settings = {
        "pictures": order,
        "encoder": encoder.config.to_dict(),
        "processor": image_processor.to_dict(),
        "augmentation": augmentation,
        "views": views,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


@torch.inference_mode()
def _compute(
    file: Path,
    jobs: list[tuple[Path, str, int]],
    *,
    encoder: VisionEncoder,
    image_processor: Any,
    augmentation: str,
) -> None:
    """Append batch after batch to a file beside ``file``, and rename it when complete. Its length is the state."""
    rows, columns = encoder.config.grid_size
    row_bytes = rows * columns * encoder.config.hidden_size * 2
    encoder = encoder.eval()
    with file.with_suffix(".unfinished").open("ab") as stream:
        done = stream.tell() // (row_bytes * ENCODE_BATCH) * ENCODE_BATCH  # a batch that was cut short is made again
        stream.truncate(done * row_bytes)
        if not done:
            check_pictures(path for path, _, _ in jobs)
        for start in tqdm(range(0, len(jobs), ENCODE_BATCH), desc="picture features"):
            if start < done:
                continue
            views = [
                augment(load_image(path), augmentation if view else "none", seed=f"{digest}/{view}")
                for path, digest, view in jobs[start : start + ENCODE_BATCH]
            ]
            pixels = image_processor(views, return_tensors="pt")["pixel_values"].to(encoder.device)
            features = encoder(pixels).features  # (N, R, D)
            stream.write(features.to(torch.float16).cpu().numpy().tobytes())
    os.replace(stream.name, file)
