"""Does `multimodal plan` foresee what a service does? The simulation beside 1 and 2 replicas on Ray, with a core each.

Service times are measured in one process with one thread, as `python -m benchmarks.service_times` does; for two
replicas in two such processes at once, which share the machine's memory. What an answer spends before its replica is
measured by asking now and then, when nobody else asks: HTTP, the router, waking up. Then each service is asked by eight
callers, each of whom asks again as soon as it has its answer, for the answers a second, and by callers that come at
random (Poisson), for the median and p99; how long the answers are is noted of both. What a replica is busy for beside
its engine keeps it from others; router, Ray and callers share this machine's cores with the replicas: what all these
take of a processor is measured with one replica, and foreseen for two. What counts is the ratio of what was foreseen
to what was measured: within 20 %. Nothing else should run meanwhile.

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
from contextlib import suppress
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
    traffic = Traffic(options.rate, questions=1e6, pause=PICTURES / options.rate)  # nobody shows a new picture
    table = Table("replicas", "what", "foreseen", "measured", "ratio")
    handling = router = callers = 0.0
    for replicas in (1, 2):
        kind = one_core(options.model, replicas)
        found = ask(replicas, options)
        on_top = (seconds - kind.later - (tokens - 1) * kind.step[1] for tokens, seconds in found.alone)
        if replicas == 1:
            handling, router, callers = found.handling, found.router, found.callers
            handled, routed, called = (f"{1000 * seconds:.1f} ms" for seconds in (handling, router, callers))
            print(
                f"of a processor, on top of an answer: {handled} in the replica, {routed} outside of it, and {called}"
            )
            print(f"of the callers' own; while nobody asks: {found.idle:.2f} cores")
        entrance = max(statistics.median(on_top) - handling, 0.0)
        print(f"before the replica, with {replicas}: {1000 * entrance:.1f} ms")
        kind = replace(kind, entrance=entrance, handling=handling, around=router)
        full = simulate(of_lengths(kind, found.in_turn), traffic, replicas, callers=CALLERS)
        work = full.utilisation * replicas / full.rate
        most = (len(os.sched_getaffinity(0)) - found.idle) / (work + router + callers)  # which the cores allow
        outcome = simulate(of_lengths(kind, found.at_random), traffic, replicas)
        waits = [seconds for _, seconds in found.at_random]
        for what, foreseen, measured in (
            ("answers a second", min(full.rate, most), found.rate),
            ("p50, seconds", outcome.p50, float(np.quantile(waits, 0.5))),
            ("p99, seconds", outcome.p99, float(np.quantile(waits, 0.99))),
        ):
            table.add_row(str(replicas), what, f"{foreseen:.3g}", f"{measured:.3g}", f"{foreseen / measured:.2f}")
    Console().print(table)
    return 0


def one_core(model: str, replicas: int) -> Measurements:
    """The service times of a replica with one core, while as many as there will be compute: they share one memory."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(replicas)]
        command = [sys.executable, "-m", "benchmarks.service_times", "--kind", "1 core", "--model", model]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen([*command, "--output", str(file)], stdout=subprocess.DEVNULL, env=environment)
            for file in files
        ]
        if any([process.wait() for process in running]):
            raise RuntimeError(f"service times were not measured; to see why: {' '.join(command)} --output kind.json")
        found = [read_measurements(file) for file in files]
    return replace(
        found[0],
        first=statistics.fmean(its.first for its in found),
        later=statistics.fmean(its.later for its in found),
        step={rows: statistics.fmean(its.step[rows] for its in found) for rows in found[0].step},
    )


Answer = tuple[int, float]  # tokens, and seconds from when the question came


def of_lengths(kind: Measurements, answers: list[Answer]) -> Measurements:
    """A replica whose answers are as long as these."""
    return replace(kind, answer_tokens=[tokens for tokens, _ in answers])


@dataclass(frozen=True)
class Found:
    """What was measured of a service.

    Attributes:
        alone: Answers to one who asks now and then.
        idle: Cores that are busy while nobody asks.
        in_turn: Answers to eight callers.
        rate: Answers a second that they get.
        handling: Seconds of a processor that one of these takes in its replica, but for the engine's thread.
        router: Seconds of a processor that one of these takes outside of replicas and callers: what all processes of
            the machine take, less what they take while nobody asks.
        callers: Likewise, of the callers.
        at_random: Answers to who came at random.
    """

    alone: list[Answer]
    idle: float
    in_turn: list[Answer]
    rate: float
    handling: float
    router: float
    callers: float
    at_random: list[Answer]


def busy() -> float:
    """Seconds for which the machine's cores were at work until now, all together, as Linux counts them."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def replicas_busy() -> tuple[float, float]:
    """Seconds for which replicas on Ray were at work, all together; and their busiest threads, which are the engines'.

    An engine's thread begins with its first question after a pause, and counts from there.
    """
    processes = threads = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if (process / "cmdline").read_text().startswith("ray::ServeReplica"):
                processes += _spent(process)
                threads += max(map(_spent, (process / "task").iterdir()))
    return processes, threads


def _spent(folder: Path) -> float:
    """Seconds of a process or thread, by its folder in ``/proc``."""
    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


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
            process, _ = replicas_busy()
            began, before, own = time.perf_counter(), busy(), time.process_time()
            in_turn = list(pool.map(answer, range(1000, 1000 + options.questions)))
            seconds, router, own = time.perf_counter() - began, busy() - before, time.process_time() - own
            ended, engines = replicas_busy()
            process = ended - process
            router -= own + process + idle * seconds
        chance = random.Random(0)
        with ThreadPoolExecutor(MOST_CALLERS) as pool:
            asked, at = [], time.perf_counter()
            for number in range(2000, 2000 + options.questions):
                at += chance.expovariate(options.rate)
                time.sleep(max(0, at - time.perf_counter()))
                asked.append(pool.submit(answer, number, at))
            at_random = [future.result() for future in asked]
    count = options.questions
    handling = (process - engines) / count
    return Found(alone, idle, in_turn, count / seconds, handling, max(router, 0.0) / count, own / count, at_random)


if __name__ == "__main__":
    sys.exit(main())
