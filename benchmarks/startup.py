"""How long from the start of a process to the first word about a picture?

Measures two processes in turns, each to the line that it prints: one that only imports torch and transformers' Llama
(nothing that answers with them can be faster), and one that answers about a sample picture. What counts is the ratio
of their medians, so that a slow or busy machine does not change the verdict.

    python -m benchmarks.startup [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

LIMIT = 1.5  # issue 2: from process start to first token, against importing torch and transformers' Llama alone

IMPORTS = """
import torch
from transformers import LlamaForCausalLM
print("ready", flush=True)
"""

FIRST_TOKEN = """
from multimodal import MultiModalModel, load_image
from multimodal.samples import sample_images
sample = sample_images()[0]
model = MultiModalModel.from_pretrained("embedded")
print(next(iter(model.stream(sample.prompt, load_image(sample.path)))), flush=True)
"""


def seconds_to_first_line(code: str) -> float:
    """Run `code` in a fresh process and return the seconds until it prints its first line.

    Raises:
        RuntimeError: the process ended without printing one.
    """
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
    if not line:
        raise RuntimeError(f"the process printed nothing; run it by hand to see why:\n{code}")
    return seconds


def main() -> int:
    """Measure, print the table and return 1 when the limit is passed."""
    parser = argparse.ArgumentParser(description="Time from process start to the first token, against bare imports.")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each process (default: 5)")
    runs = parser.parse_args().runs
    programs = {"import torch and transformers' Llama": IMPORTS, "first token about a picture": FIRST_TOKEN}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for code in programs.values():  # not counted: fills the page cache and, the first time, converts the weights
        seconds_to_first_line(code)
    for _ in range(runs):
        for name, code in programs.items():
            seconds[name].append(seconds_to_first_line(code))

    table = Table("process", "median s", "least s", "most s", title=f"Start-up, {runs} runs each, in turns")
    for name, values in seconds.items():
        table.add_row(name, *(f"{figure(values):.2f}" for figure in (statistics.median, min, max)))
    imports, first_token = (statistics.median(values) for values in seconds.values())
    console = Console()
    console.print(table)
    console.print(f"ratio {first_token / imports:.2f} (at most {LIMIT})")
    return int(first_token / imports > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
