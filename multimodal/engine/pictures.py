"""What was made of a picture, kept by its content: it is made once for all that is asked about it."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch


def digest_of(pixel_values: torch.Tensor) -> str:
    """Names a prepared picture ``(3, height, width)`` by its content: shape, dtype and numbers."""
    numbers = pixel_values.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(numbers.shape)} {numbers.dtype}".encode())
    digest.update(numbers.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Kept = TypeVar("Kept", bound=_Sized)


class LeastRecentlyUsed(Generic[Kept]):
    """Things by what names their content. When it is full, what was not asked for the longest goes.

    Args:
        room: Bytes.

    Attributes:
        hits: How often a thing was there.
        misses: How often it was not.
    """

    def __init__(self, room: int) -> None:
        self.room, self.hits, self.misses = room, 0, 0
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """How much is kept, in bytes."""
        return self._bytes

    def __len__(self) -> int:
        """How many things are kept."""
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What is kept under a name, or what ``make`` makes now."""
        with self._lock:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
            self.misses += 1
        made = make()
        with self._lock:
            if key not in self._kept and made.nbytes <= self.room:
                self._kept[key] = made
                self._bytes += made.nbytes
            while self._bytes > self.room:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= gone.nbytes
        return made

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0
