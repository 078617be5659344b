"""How long does a compiled step take on processors with fewer instructions than this one?

The engine's C++ is compiled for the instructions of this processor, for those of AVX2 (x86-64-v3), and without any
kernels of its own, where a compiler turns plain loops into what the processor has. The three are measured in turns. A
row is one token of one request. Prompts of so many tokens are read as the engine reads them, and through matrices that
are unpacked for torch (on AMX: multiplied as they are packed).

    python -m benchmarks.instructions [--rounds 10]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine import in_turns, seconds
from multimodal import MultiModalModel
from multimodal.engine import build
from multimodal.engine.native import NativeRunner, Precision
from multimodal.engine.runner import Row, TorchRunner

PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "bfloat16")


def read(runner: NativeRunner, count: int) -> torch.Tensor:
    """Read a prompt."""
    return runner.read(0, range(100, 100 + count), 0, [0] * count)


def read_through_matrices(runner: NativeRunner, count: int) -> torch.Tensor:
    """Read a prompt as what the runner extends does."""
    return TorchRunner.read(runner, 0, range(100, 100 + count), 0, [0] * count)


STEPS: dict[str, Callable[[NativeRunner], torch.Tensor]] = {
    "1 row": lambda runner: runner.step([Row(0, 100, 20, 0)]),
    "8 rows": lambda runner: runner.step([Row(slot, 100 + slot, 20, 0) for slot in range(8)]),
    "16 tokens": partial(read, count=16),
    "128 tokens": partial(read, count=128),
    "as matrices": partial(read_through_matrices, count=128),
    "512 tokens": partial(read, count=512),
    "as matrices ": partial(read_through_matrices, count=512),
}


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Compiled steps with the instructions of other processors.")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each measurement (default: 10)")
    options = parser.parse_args()
    model = MultiModalModel.from_pretrained("embedded").model
    table = Table("precision", "instructions", *STEPS, title="Milliseconds a step, medians")
    with torch.inference_mode():
        for precision in PRECISIONS:
            runners = {}
            for level in build.FLAGS:
                try:
                    path = build.build(instructions=level)
                except build.BuildError:  # this is another kind of processor
                    continue
                runners[level] = NativeRunner(
                    model, precision, dtype=torch.bfloat16, slots=8, positions=512, pictures=1, path=path
                )
            found = {
                name: in_turns(
                    {level: partial(seconds, partial(step, runner)) for level, runner in runners.items()},
                    options.rounds,
                )
                for name, step in STEPS.items()
            }
            for level in runners:
                table.add_row(precision, level, *(f"{1e3 * times[level]:.1f}" for times in found.values()))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
