"""Does `multimodal plan` foresee what a service does? The simulation beside 1 and 2 replicas on Ray, with a core each.

Service times are measured in one process with one thread, as `python -m benchmarks.service_times` does, and what a
question spends on top by asking one replica now and then, when nobody else asks: HTTP, the router, waking up. Then each
service is asked by eight callers at a time, for what it answers in a second at most, and by callers that come at random
(Poisson), for the median and p99. What counts is the ratio of what was foreseen to what was measured: within 20 %.
Nothing else should run meanwhile; and where router, Ray and callers have no core of their own, fewer answers come than
are foreseen.

    python -m benchmarks.planned [--rate 10] [--questions 400] [--model embedded]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cluster import NEW_TOKENS
from benchmarks.service import picture, server
from multimodal.cluster.planning import Measurements, Traffic, read_measurements, simulate

PICTURES = 40  # that are asked about: enough for each replica to have its share
SIZE = (320, 240)
CALLERS = 8  # at a time, for the throughput
MOST_CALLERS = 64  # that come at random may be there together


def main() -> int:
    """Measure, simulate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    parser.add_argument("--rate", type=float, default=10, help="questions a second, at random (default: 10)")
    parser.add_argument("--questions", type=int, default=400, help="in each of the two ways (default: 400)")
    options = parser.parse_args()
    kind = one_core(options.model)
    table = Table("replicas", "what", "foreseen", "measured", "ratio")
    for replicas in (1, 2):
        alone, lengths, rate, times = ask(replicas, options)
        if replicas == 1:
            spent = (seconds - kind.later - (tokens - 1) * kind.step[1] for tokens, seconds in alone)
            kind = replace(kind, entrance=statistics.median(spent))
            print(f"on top of an answer: {1000 * kind.entrance:.0f} ms")
        told = replace(kind, answer_tokens=lengths)
        traffic = Traffic(options.rate, questions=1e6, pause=PICTURES / options.rate)  # nobody shows a new picture
        outcome = simulate(told, traffic, replicas)
        for what, foreseen, measured in (
            ("answers a second", replicas / told.work(cached=1), rate),
            ("p50, seconds", outcome.p50, float(np.quantile(times, 0.5))),
            ("p99, seconds", outcome.p99, float(np.quantile(times, 0.99))),
        ):
            table.add_row(str(replicas), what, f"{foreseen:.3g}", f"{measured:.3g}", f"{foreseen / measured:.2f}")
    Console().print(table)
    return 0


def one_core(model: str) -> Measurements:
    """The service times of a replica with one core."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kind.json"
        command = [sys.executable, "-m", "benchmarks.service_times", "--kind", "1 core", "--model", model]
        subprocess.run(
            [*command, "--output", str(file)], check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return read_measurements(file)


Answer = tuple[int, float]  # tokens, and seconds from when the question came


def ask(replicas: int, options: argparse.Namespace) -> tuple[list[Answer], list[int], float, list[float]]:
    """Ask a service in all ways.

    Returns:
        Answers to one who asks alone, now and then; with eight callers, the lengths of answers in tokens, and answers
        a second; and seconds of each answer to who came at random.
    """
    words = ["--ray", "--replicas", str(replicas), "--model", options.model]
    with server(*words, threads=1) as url, httpx.Client(timeout=600) as client:
        model = client.get(f"{url}/models").json()["data"][0]["id"]
        shown = [{"type": "image_url", "image_url": {"url": picture(SIZE, seed)}} for seed in range(PICTURES)]

        def answer(number: int, come: float = 0) -> Answer:
            come = come or time.perf_counter()
            text = {"type": "text", "text": f"Question {number}: what is in the picture?"}
            asked = [{"role": "user", "content": [shown[number % PICTURES], text]}]
            body = {"model": model, "messages": asked, "max_tokens": NEW_TOKENS}
            said = client.post(f"{url}/chat/completions", json=body).raise_for_status().json()
            return said["usage"]["completion_tokens"], time.perf_counter() - come

        for number in range(2 * PICTURES):  # every picture is seen
            answer(number)
        alone = []
        for number in range(3000, 3000 + PICTURES):
            time.sleep(1 / options.rate)
            alone.append(answer(number))
        with ThreadPoolExecutor(CALLERS) as pool:
            began = time.perf_counter()
            lengths = [tokens for tokens, _ in pool.map(answer, range(1000, 1000 + options.questions))]
            rate = options.questions / (time.perf_counter() - began)
        chance = random.Random(0)
        with ThreadPoolExecutor(MOST_CALLERS) as pool:
            asked, at = [], time.perf_counter()
            for number in range(2000, 2000 + options.questions):
                at += chance.expovariate(options.rate)
                time.sleep(max(0, at - time.perf_counter()))
                asked.append(pool.submit(answer, number, at))
            times = [future.result()[1] for future in asked]
    return alone, lengths, rate, times


if __name__ == "__main__":
    sys.exit(main())
