"""Memory that packing leaves behind goes back to the system: what was read from a file, and what was freed."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch

_PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4: pages lose nothing, and are read again when they are asked for


def give_back(tensors: Iterable[torch.Tensor] = ()) -> None:
    """Have the C library give back what was freed, and take no memory for tensors that were mapped from a file.

    Does nothing elsewhere than on Linux.

    Args:
        tensors: What will not be read soon. It may be read at any time.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.device.type == "cpu" and tensor.is_contiguous() and start < end:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
