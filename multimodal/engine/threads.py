"""OpenMP's threads, of which every thread that computes has a team of its own."""

from __future__ import annotations

import ctypes
import os
from functools import cache


@cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP, if torch has loaded it."""
    try:
        found = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return found if hasattr(found, "omp_pause_resource_all") else None
    except (AttributeError, OSError):  # another system, or another OpenMP
        return None


def release_threads() -> None:
    """Let go of the calling thread's OpenMP team; its next operator makes another.

    Each thread that has run an operator keeps a team for ever. With more threads than cores among all teams, OpenMP's
    threads sleep between operators instead of waiting for the next: the engine's would read a prompt half as fast.
    """
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft
