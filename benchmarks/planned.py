"""Does `multimodal plan` foresee what a service does? The simulation beside 1 and 2 replicas on Ray, with a core each.

Service times are measured in one process with one thread, as `python -m benchmarks.service_times` does, and what a
question spends on top by asking one replica now and then, when nobody else asks: HTTP, the router, waking up. Then each
service is asked by eight callers at a time, for what it answers in a second at most, and by callers that come at random
(Poisson), for the median and p99. Router, Ray and callers share this machine's cores with the replicas: what they take
of a processor is measured with one replica, and foreseen for two. What counts is the ratio of what was foreseen to what
was measured: within 20 %. Nothing else should run meanwhile.

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
from dataclasses import dataclass, replace
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
IDLE = 5.0  # seconds for which nobody asks
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
    callers = 0.0
    for replicas in (1, 2):
        found = ask(replicas, options)
        kind = replace(kind, answer_tokens=found.lengths)
        if replicas == 1:
            spent = (seconds - kind.later - (tokens - 1) * kind.step[1] for tokens, seconds in found.alone)
            around = found.processor - found.callers - kind.work(cached=1)
            kind, callers = replace(kind, entrance=statistics.median(spent), around=around), found.callers
            print(f"on top of an answer: {1000 * kind.entrance:.0f} ms; of a processor, {1000 * around:.0f} ms, and")
            print(f"{1000 * callers:.0f} ms of the callers' own; Ray, while nobody asks: {found.idle:.2f} cores")
        traffic = Traffic(options.rate, questions=1e6, pause=PICTURES / options.rate)  # nobody shows a new picture
        outcome = simulate(kind, traffic, replicas)
        work = kind.work(cached=1)
        most = (len(os.sched_getaffinity(0)) - found.idle) / (work + kind.around + callers)  # which the cores allow
        for what, foreseen, measured in (
            ("answers a second", min(replicas / work, most), found.rate),
            ("p50, seconds", outcome.p50, float(np.quantile(found.times, 0.5))),
            ("p99, seconds", outcome.p99, float(np.quantile(found.times, 0.99))),
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


@dataclass(frozen=True)
class Found:
    """What was measured of a service.

    Attributes:
        alone: Answers to one who asks now and then.
        idle: Cores that are busy while nobody asks.
        lengths: Of the answers to eight callers, in tokens.
        rate: Answers a second that they get.
        processor: Seconds of a processor that one of these takes, of all processes of the machine together, but for
            what they take while nobody asks.
        callers: Of these, those of the callers.
        times: Seconds of each answer to who came at random.
    """

    alone: list[Answer]
    idle: float
    lengths: list[int]
    rate: float
    processor: float
    callers: float
    times: list[float]


def busy() -> float:
    """Seconds for which the machine's cores were at work until now, all together, as Linux counts them."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def ask(replicas: int, options: argparse.Namespace) -> Found:
    """Ask a service in all ways."""
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
        before = busy()
        time.sleep(IDLE)
        idle = (busy() - before) / IDLE
        with ThreadPoolExecutor(CALLERS) as pool:
            began, before, own = time.perf_counter(), busy(), time.process_time()
            lengths = [tokens for tokens, _ in pool.map(answer, range(1000, 1000 + options.questions))]
            seconds, processor, own = time.perf_counter() - began, busy() - before, time.process_time() - own
        chance = random.Random(0)
        with ThreadPoolExecutor(MOST_CALLERS) as pool:
            asked, at = [], time.perf_counter()
            for number in range(2000, 2000 + options.questions):
                at += chance.expovariate(options.rate)
                time.sleep(max(0, at - time.perf_counter()))
                asked.append(pool.submit(answer, number, at))
            times = [future.result()[1] for future in asked]
    count = options.questions
    return Found(alone, idle, lengths, count / seconds, (processor - idle * seconds) / count, own / count, times)


if __name__ == "__main__":
    sys.exit(main())
