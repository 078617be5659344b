"""A Ray cluster for as long as a command runs: the one that ``RAY_ADDRESS`` names, or one of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from multimodal.cluster import INSTALL

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: nobody is told of a run

try:
    import ray
except ImportError as error:
    raise ImportError(f"a cluster needs Ray: {INSTALL}") from error

LOCAL_OBJECTS = 256 * 2**20  # bytes of shared memory: pictures and answers go through it, no weights


@contextmanager
def connected(default: Literal["local", "auto"] = "local") -> Iterator[None]:
    """Be connected to the cluster that ``RAY_ADDRESS`` names.

    Args:
        default: Where it names none. ``"local"`` starts one of this machine alone, which takes only who has Ray's
            token, and ends with the block; ``"auto"`` finds the one that runs on this machine.

    Raises:
        RuntimeError: If there is no cluster at the address, or none starts here.
    """
    address = os.environ.get("RAY_ADDRESS") or default
    alone = {"include_dashboard": False, "object_store_memory": LOCAL_OBJECTS} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **alone)
    except Exception as error:  # Ray has no class of its own for this
        if not alone:
            raise RuntimeError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
        raise RuntimeError(f"Ray does not start here; on a busy machine, try again later: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
