"""How many pictures a second do the encoder's open stages learn from, as they are and as training runs them?

Forward and backward of the embedded encoder's last stages on random states, in turns. Measured is the processors' time
for this process (shared out over its threads), so that other work on the machine does not change the verdict.

    python -m benchmarks.stages [--rounds 5] [--batch-size 16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from multimodal.presets import build
from multimodal.training.folding import folded

LIMIT = 1.5  # with three stages, in the fastest way: what makes it worth its code


def main() -> int:
    """Measure, print the table and return 1 when the limit is missed."""
    parser = argparse.ArgumentParser(description="Pictures per second of the encoder's open stages in training.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each measurement (default: 5)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures in a step (default: 16)")
    options = parser.parse_args()
    model, _ = build("embedded", dtype=torch.float32)
    encoder = model.model.vision_encoder.train().requires_grad_(True)
    count, size = len(encoder.stages()), encoder.config.image_size
    table = Table("open stages", "as they are", "norms folded in", "and bfloat16", "times")
    ratios = {}
    for stages in (2, 3, count):
        opened = [module for stage in encoder.stages()[-stages:] for module in stage]
        with torch.no_grad():
            states = encoder.run_stages(torch.randn(options.batch_size, 3, size, size), 0, count - stages)
        seconds: list[list[float]] = [[], [], []]
        for turn in range(options.rounds + 1):
            for way, noted in enumerate(seconds):
                with _as(way, opened):
                    start = time.process_time()
                    encoder.run_stages(states, count - stages).float().square().mean().backward()
                    if turn:  # the first warms up
                        noted.append((time.process_time() - start) / torch.get_num_threads())
        rates = [options.batch_size / statistics.median(noted) for noted in seconds]
        ratios[stages] = max(rates) / rates[0]
        table.add_row(str(stages), *(f"{rate:.1f} pictures/s" for rate in rates), f"{ratios[stages]:.2f}")
    Console().print(table)
    return int(ratios[3] < LIMIT)


@contextmanager
def _as(way: int, opened: list[nn.Module]) -> Iterator[None]:
    if way == 0:
        yield
        return
    with folded(opened), torch.autocast("cpu", torch.bfloat16, enabled=way == 2):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
