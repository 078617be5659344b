"""Training pictures that no training sees: confidence is calibrated on them.

Which they are follows from each picture's bytes alone, so every run and every data set leaves out the same ones.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from multimodal.data.sample import Sample

HELD_OUT_SHARE = 0.05


@lru_cache(maxsize=100_000)
def is_held_out(path: Path, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a picture is one of the share that is held out."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_held_out(samples: Iterable[Sample], share: float = HELD_OUT_SHARE) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into those to train on, and those of which any picture is held out."""
    kept: list[Sample] = []
    held_out: list[Sample] = []
    for sample in samples:
        (held_out if any(is_held_out(path, share) for path in sample.images) else kept).append(sample)
    return kept, held_out
