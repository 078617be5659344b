"""Several processes that train one model together, as ``torchrun`` starts them: which one this is, and what they share.

Every process reads the same data and opens the same caches (one fills them while the others wait for its lock); what
differs is only which rows of a step it takes. Before there is a process group the environment says all that is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")

MOST_LOADING = 15
GPU_TIMES = 16


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", 0))


def device() -> torch.device:
    """Where this process computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def at_a_time(count: int) -> int:
    """How much to compute at a time, where a CPU does best with ``count``: a GPU is idle with so little."""
    return count if device().type == "cpu" else GPU_TIMES * count


def loading_processes() -> int:
    """How many processes get rows and pictures ready beside this one: on a CPU none, since a step needs every core."""
    return 0 if device().type == "cpu" else min((os.cpu_count() or 1) // world_size(), MOST_LOADING)


def is_main() -> bool:
    """Whether this process writes and prints: one must."""
    return rank() == 0


def say(text: str) -> None:
    """Print, once for all processes."""
    if is_main():
        print(text, flush=True)


def rows_of_a_process(batch_size: int) -> int:
    """How many rows of a step each process takes.

    Raises:
        ValueError: If a step cannot be dealt out evenly.
    """
    each, left = divmod(batch_size, world_size())
    if left or not each:
        raise ValueError(
            f"a step of {batch_size} rows cannot be dealt out to {world_size()} processes: "
            f"give a batch size that {world_size()} divides"
        )
    return each


def own_share(step: Sequence[Item], idle: Callable[[Item], Item]) -> Sequence[Item]:
    """This process's rows of a step. Rows that lie side by side, and so are of like length, go to different ones.

    Args:
        step: All its rows; empty for no step.
        idle: Makes of a row one that does not count. Every process has to take part in every step, so one for which no
            row of an epoch's short last step is left takes such a row.
    """
    return step[rank() :: world_size()] or [idle(row) for row in step[:1]]


def totals(numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Sums over all processes; all of them have to ask."""
    if world_size() == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(found)
    return found.tolist()


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if world_size() > 1:
        distributed.barrier()
