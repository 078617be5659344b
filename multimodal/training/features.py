"""What the frozen part of an encoder makes of pictures, computed once and kept on disk.

A frozen encoder gives the same features in every epoch, so each view of each picture goes through it once. Where the
encoder's last stages are trained, what is kept is what comes out of the stage below them. What always holds: the file's
name is a digest of all that decides its content but the pictures (weights, preparation, open stages), and a row's name
tells picture (by content), kind of augmentation and view; rows are only ever appended, so a process that is stopped
goes on where it was, one that comes second waits, and new pictures or more views cost only themselves.

Axes: V views, R grid cells, D width.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from multimodal.fusion import VisionEncoder
from multimodal.fusion.vision import as_grid
from multimodal.images import load_image
from multimodal.training.augmentation import View, draw_view
from multimodal.training.pictures import check_pictures
from multimodal.training.processes import at_a_time, loading_processes

ENCODE_BATCH = 4  # pictures at a time: the activations of four fit the processor's caches, sixteen take twice as long


class FeatureCache:
    """A file of features, one row for each view of each picture; a reader asks by picture and view.

    Args:
        folder: Where the cache files live.
        encoder: The encoder; what is below its open stages does not change while the cache is used.
        image_processor: What prepares pictures for it.
        open_stages: How many of the encoder's last stages are left out. Rows are ``(R, D)`` for 0, else
            ``(D, rows, columns)``, the input of the first open stage.
        below: A cache of the same encoder with open stages: what it holds is taken from there and run on.

    Raises:
        ValueError: If stages are open in a backbone that cannot be cut (transformers).
    """

    def __init__(
        self,
        folder: Path,
        *,
        encoder: VisionEncoder,
        image_processor: Any,
        open_stages: int = 0,
        below: FeatureCache | None = None,
    ) -> None:
        if open_stages and not encoder.is_sequential:
            raise ValueError(f"{encoder.config.name}: a transformers backbone cannot be cut between its stages")
        self.encoder, self.image_processor, self.open_stages, self.below = encoder, image_processor, open_stages, below
        key = _key(encoder, image_processor, open_stages)
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._names = folder / f"{key}.float16", folder / f"{key}.names"
        self._lock = FileLock(folder / f"{key}.lock")
        self._digests: dict[Path, str] = {}
        self._rows: dict[str, int] = {}
        self._features: np.ndarray | None = None
        self.shape = self._shape()

    def _shape(self) -> tuple[int, ...]:
        if not self.open_stages:
            rows, columns = self.encoder.config.grid_size
            return rows * columns, self.encoder.config.hidden_size
        size = self.encoder.config.image_size
        with torch.inference_mode():
            blank = torch.zeros(1, 3, size, size, dtype=self.encoder.dtype, device=self.encoder.device)
            return tuple(self.encoder.run_stages(blank, 0, self._cut).shape[1:])

    @property
    def _cut(self) -> int:
        return len(self.encoder.stages()) - self.open_stages

    @property
    def _row_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def add(self, paths: Iterable[Path], *, augmentation: str, views: int) -> None:
        """Make sure that views 0 to ``views - 1`` of all pictures are there; view 0 is the picture as it is.

        Raises:
            DataError: If a picture cannot be used.
        """
        paths = sorted(set(paths))
        for path in paths:
            if path not in self._digests:
                self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        jobs = {
            _name(self._digests[path], augmentation, view): (path, augmentation, view)
            for path in paths
            for view in range(views)
        }
        with self._lock:
            self._read_names()
            missing = [(name, job) for name, job in jobs.items() if name not in self._rows]
            if missing:
                check_pictures({path for _, (path, _, _) in missing})
                self._append(missing)
                self._read_names()
        if self._rows:
            self._features = np.memmap(self._file, np.float16, mode="r", shape=(len(self._rows), *self.shape))

    def view(self, path: Path, augmentation: str, view: int) -> tuple[torch.Tensor, View]:
        """Features of one view, and what the view is.

        Raises:
            KeyError: If it was not added.
        """
        digest = self._digests[path]
        row = self._rows[_name(digest, augmentation, view)]
        assert self._features is not None
        return torch.from_numpy(np.array(self._features[row])), view_of(digest, augmentation, view)

    def _read_names(self) -> None:
        """Whole rows that both files know; what a killed process left half-written is cut off. Needs the lock."""
        names = self._names.read_bytes().split(b"\n")[:-1] if self._names.exists() else []
        stored = self._file.stat().st_size // self._row_bytes if self._file.exists() else 0
        if (whole := min(stored, len(names))) < max(stored, len(names)) or whole == 0:
            self._names.write_bytes(b"".join(name + b"\n" for name in names[:whole]))
            with self._file.open("ab") as stream:
                stream.truncate(whole * self._row_bytes)
        self._rows = {name.decode(): row for row, name in enumerate(names[:whole])}

    @torch.inference_mode()
    def _append(self, missing: Sequence[tuple[str, tuple[Path, str, int]]]) -> None:
        with self._file.open("ab") as features, self._names.open("ab") as names:
            features.truncate(len(self._rows) * self._row_bytes)
            size = at_a_time(ENCODE_BATCH)
            batches = [missing[start : start + size] for start in range(0, len(missing), size)]
            # A loader may open pictures in other processes; its rows are these batches, as they are.
            rows: Any = batches
            loader: DataLoader = DataLoader(
                rows, batch_size=None, collate_fn=self._prepare, num_workers=loading_processes()
            )
            for batch, states in zip(batches, tqdm(loader, desc="picture features"), strict=True):
                _write(features, self._encode(states))
                names.write("".join(f"{name}\n" for name, _ in batch).encode())
                names.flush()

    def _prepare(self, batch: Sequence[tuple[str, tuple[Path, str, int]]]) -> torch.Tensor:
        """What the encoder is to begin with: the states of the cache below, or pixel values."""
        jobs = [job for _, job in batch]
        if self.below is not None:
            return torch.stack([self.below.view(*job)[0] for job in jobs])
        digests = [self._digests[path] for path, *_ in jobs]
        views = [view_of(d, *job[1:]).of(_opened(job[0], d)) for d, job in zip(digests, jobs, strict=True)]
        return self.image_processor(views, return_tensors="pt")["pixel_values"]

    def _encode(self, states: torch.Tensor) -> torch.Tensor:
        encoder, start = self.encoder.eval(), 0 if self.below is None else self.below._cut
        states = states.to(encoder.device, encoder.dtype)
        if self.open_stages:
            return encoder.run_stages(states, start, self._cut)
        if start:
            return as_grid(encoder.run_stages(states, start), encoder.config.name).features
        return encoder(states).features  # (N, R, D)


@lru_cache(maxsize=8)
def _opened(path: Path, digest: str) -> Any:
    """A picture of this content: another one may lie there a moment later."""
    return load_image(path)


def _write(stream: BinaryIO, features: torch.Tensor) -> None:
    stream.write(features.to(torch.float16).cpu().contiguous().numpy().tobytes())
    stream.flush()


def _name(digest: str, augmentation: str, view: int) -> str:
    return f"{digest} {augmentation if view else 'none'} {view}"


def view_of(digest: str, augmentation: str, view: int) -> View:
    """What view number ``view`` of a picture is: for the same content always the same. 0 is the picture as it is."""
    return draw_view(augmentation, f"{digest}/{view}") if view else View()


class CachedPictures:
    """Pictures as kept features: a draw takes those of a random view.

    Features of a shop picture are also mirrored, as they lie: nearly what the mirrored picture would give, for nothing.

    Args:
        cache: Where the features are; missing ones are computed now.
        kinds: The pictures, and for each its kind of :mod:`multimodal.training.augmentation`.
        views: Views of a picture of each kind, at least 1.

    Raises:
        DataError: If a picture cannot be used.
    """

    key = "image_features"

    def __init__(self, cache: FeatureCache, kinds: Mapping[Path, str], *, views: Mapping[str, int]) -> None:
        self.cache, self.kinds, self.views = cache, dict(kinds), dict(views)
        for kind in sorted(set(self.kinds.values())):
            paths = [path for path, its in self.kinds.items() if its == kind]
            cache.add(paths, augmentation=kind, views=self.views[kind])

    def draw(self, path: Path, seed: str) -> tuple[torch.Tensor, View]:
        """Features of the view that the seed picks, and that view."""
        kind, chance = self.kinds[path], random.Random(seed)
        features, view = self.cache.view(path, kind, chance.randrange(self.views[kind]))
        if kind == "shop" and chance.random() < 0.5:
            return self._mirrored(features), replace(view, mirrored=not view.mirrored)
        return features, view

    def views_of(self, path: Path) -> torch.Tensor:
        """Features of all views of a picture, none of them mirrored: ``(V, R, D)``."""
        kind = self.kinds[path]
        return torch.stack([self.cache.view(path, kind, view)[0] for view in range(self.views[kind])])

    def _mirrored(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 3:  # (D, rows, columns)
            return features.flip(-1)
        return features.unflatten(0, tuple(self.cache.encoder.config.grid_size)).flip(1).flatten(0, 1)  # (R, D)


def _key(encoder: VisionEncoder, image_processor: Any, open_stages: int) -> str:
    config = encoder.config
    settings = {
        "encoder": [config.backend, config.name, config.image_size, config.backbone_config],
        "processor": image_processor.to_dict(),
        "open stages": open_stages,
        "views": "2",  # counted up when draw_view changes what it draws
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    frozen: list[nn.Module] = [encoder]
    if open_stages:
        frozen = [module for stage in encoder.stages()[:-open_stages] for module in stage]
    for module in frozen:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
