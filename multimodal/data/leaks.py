"""Pictures that stand in two splits: the same bytes, or nearly the same picture.

Whatever a model is measured on must not be among what it learned from. The same bytes are found by their digest. A copy
that was made smaller or saved again is found by a difference hash: the picture in grey at 17 x 16 pixels, and for each
pixel whether its right neighbour is brighter by more than 4 of 255 (N. Krawetz, "Kind of Like That", 2013, has 64 bits
and no margin). Two pictures are nearly the same if at most one in eight of the bits set in either differ. A picture
with hardly any contrast has too few bits and is compared by its bytes only.

Why 256 bits, a margin, and a share, measured on the training and validation splits of SLAKE, VQA-RAD, Grocery Store
and Clothing:

- Copies (100 pictures of each set, saved at JPEG quality 50, at half the size and quality 70, or as squares of 224
  pixels) are found in 99 of 100 cases. Cropped or much brighter copies are not promised.
- Pictures with nothing in common differ in at least 20 % of the bits (Clothing 34 %, VQA-RAD 34 %, Grocery Store 20 %).
- SLAKE's splits share neighbouring slices of the same scan. 28 pairs are within the limit, on 16 of the 96 validation
  pictures; looked at, all are such neighbours and hard to tell apart.
- With the 64 bits of the source no limit does: the 3 bits that find all copies also pair black T-shirts with each other
  and 133 pairs of SLAKE, other levels of the body among them. Without the margin, noise in black background turns
  bits; without the share, a small head on black is like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from multimodal.data.sample import DataError
from multimodal.data.sources import WHOLE
from multimodal.images import ImageError, load_image

SIDE = 16  # pixels: SIDE * SIDE bits
MARGIN = 4  # of 255 grey values
FEWEST = 16  # bits that must be set
NEAR = 1 / 8  # share of the bits set in either that may differ; see above
BLOCK = 4_000_000  # pairs at a time: 32 MB

Place = tuple[str, str]  # data set and split


@dataclass(frozen=True)
class Leak:
    """Two files that show the same picture, in places that should have none in common.

    Attributes:
        first: A picture's file.
        second: Another one's, or the same file.
        first_in: Data sets and splits that hold the first.
        second_in: Data sets and splits that hold the second.
        exact: Whether the two are the same, byte for byte.
        difference: Share of their bits that differ, 0 to 1/8.
    """

    first: Path
    second: Path
    first_in: tuple[Place, ...]
    second_in: tuple[Place, ...]
    exact: bool
    difference: float = 0.0


@dataclass(frozen=True)
class Fingerprint:
    """What a picture is known by: the digest of its file, and its 256 bits (none where it has little contrast)."""

    digest: str
    bits: bytes | None


def fingerprints(paths: Iterable[Path], *, progress: bool = False, broken: list[DataError]) -> dict[Path, Fingerprint]:
    """Reads pictures.

    Args:
        paths: Their files, each once.
        progress: Show a bar.
        broken: Pictures that can't be read are put here, as errors; they have no entry in the result.

    Returns:
        The fingerprint of each picture by its file.
    """
    found = {}
    for path in tqdm(list(paths), desc="pictures", disable=not progress):
        try:
            found[path] = Fingerprint(sha256(path.read_bytes()).hexdigest(), difference_hash(load_image(path)))
        except ImageError as error:
            broken.append(DataError(error.problem, file=path, remedy=error.remedy))
        except OSError as error:
            broken.append(DataError(error.strerror or str(error), file=path, remedy="Put the picture there"))
    return found


def difference_hash(image: Image.Image) -> bytes | None:
    """Returns 256 bits of a picture, one for each pixel whose right neighbour is brighter; `None` if few are."""
    small = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS)
    grey = np.asarray(small, dtype=np.int16)
    bits = grey[:, 1:] - grey[:, :-1] > MARGIN
    return np.packbits(bits).tobytes() if bits.sum() >= FEWEST else None


def find_leaks(pictures: Mapping[Path, Sequence[Place]], prints: Mapping[Path, Fingerprint]) -> list[Leak]:
    """Compares all pictures of all splits.

    Args:
        pictures: For each picture's file the data sets and splits that hold it.
        prints: The pictures' fingerprints. One without is not compared.

    Returns:
        The pairs, same bytes first, then the most alike. Pictures of the same split, or of training splits of two data
        sets, are no leak.
    """
    files: dict[str, list[Path]] = {}
    for path in pictures:
        if path in prints:
            files.setdefault(prints[path].digest, []).append(path)
    leaks = [leak for same in files.values() for leak in same_bytes(same, pictures)]
    firsts = [same[0] for same in files.values() if prints[same[0]].bits]
    places = {
        path: sorted({place for file in files[prints[path].digest] for place in pictures[file]}) for path in firsts
    }
    hashes = np.frombuffer(b"".join(prints[path].bits or b"" for path in firsts), dtype=np.uint64)
    for one, other, difference in near_pairs(hashes.reshape(-1, SIDE * SIDE // 64)):
        first, second = firsts[one], firsts[other]
        if apart(places[first], places[second]):
            leaks.append(Leak(first, second, tuple(places[first]), tuple(places[second]), False, difference))
    return sorted(leaks, key=lambda leak: (not leak.exact, leak.difference))


def same_bytes(files: Sequence[Path], pictures: Mapping[Path, Sequence[Place]]) -> Iterator[Leak]:
    """Yields a leak for files with the same bytes: one file that stands in two places, or the first with each other."""
    first = files[0]
    for file in files:
        if apart(pictures[first], pictures[file]):
            yield Leak(first, file, tuple(pictures[first]), tuple(pictures[file]), True)


def apart(first: Sequence[Place], second: Sequence[Place]) -> bool:
    """Tells whether some two of these places should have no picture in common.

    These are two splits of different names, or two files of a user's own, whose names say nothing.
    """
    return any(split != other or (split == WHOLE and data != name) for data, split in first for name, other in second)


def near_pairs(hashes: NDArray[np.uint64]) -> Iterator[tuple[int, int, float]]:
    """Yields the pairs of rows that are nearly the same, with the share of their bits that differ; all with all.

    Args:
        hashes: (N, words of 64 bits), some set in each row.
    """
    step = max(1, BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), step):
        block, rest = hashes[start : start + step, None], hashes[None, start:]
        differing, either = np.zeros((2, block.shape[0], rest.shape[1]), dtype=np.uint16)
        for word in range(hashes.shape[1]):
            differing += np.bitwise_count(block[..., word] ^ rest[..., word])
            either += np.bitwise_count(block[..., word] | rest[..., word])
        for one, other in zip(*np.nonzero(differing <= NEAR * either), strict=True):
            if one < other:
                yield start + int(one), start + int(other), float(differing[one, other] / either[one, other])
