"""Requests a second and p99 of the service in one process and on Ray with 1 and 2 replicas, and how long each starts.

Nothing else should run meanwhile. Each service is started anew, is asked the same questions by as many callers at a
time, and ends. What counts is the ratio to the single process with as many cores as a replica has: with one replica,
time to the first token at most 15 ms more, and throughput at least 90 %. Where a replica has all cores of the machine,
what Ray does itself is taken from them.

    python -m benchmarks.cluster [--model embedded] [--questions 200] [--callers 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.service import server
from multimodal.samples import sample_images

SERVICES = (  # cores of a model, and how many replicas of it are on Ray: none is one process without Ray
    (1, 0),
    (1, 1),
    (1, 2),
    (2, 0),
    (2, 1),
)
NEW_TOKENS = 16
ALONE = 20  # questions that are asked one after another, for the time to the first token


@dataclass
class Line:
    """What was measured of a service.

    Attributes:
        cores: Of each model.
        replicas: On Ray; none is one process without it.
        start: Seconds from the command to the first answer.
        first_token: Median seconds to the first token, asked one after another about pictures that were seen.
        rate: Answers a second with all callers.
        p99: Seconds, with all callers.
    """

    cores: int
    replicas: int
    start: float
    first_token: float
    rate: float
    p99: float


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    parser.add_argument("--questions", type=int, default=200, help="of all callers together (default: 200)")
    parser.add_argument("--callers", type=int, default=8, help="at a time (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures into a file, too")
    options = parser.parse_args()
    lines = [measure(cores, replicas, options) for cores, replicas in SERVICES]
    table = Table("service", "ready after", "first token", "answers/s", "p99", "throughput", "first token, more")
    for line in lines:
        alone = next(other for other in lines if other.cores == line.cores)
        table.add_row(
            f"{f'Ray, {line.replicas} replica(s)' if line.replicas else 'one process'}, {line.cores} core(s)",
            f"{line.start:.1f} s",
            f"{1000 * line.first_token:.0f} ms",
            f"{line.rate:.1f}",
            f"{line.p99:.2f} s",
            f"{100 * line.rate / alone.rate:.0f} %",
            f"{1000 * (line.first_token - alone.first_token):+.0f} ms",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")
    return 0


def measure(cores: int, replicas: int, options: argparse.Namespace) -> Line:
    """Start a service, ask it, and end it."""
    more = ["--ray", "--replicas", str(replicas), "--num-cpus", str(cores)] if replicas else []
    began = time.perf_counter()
    with server(*more, "--model", options.model, threads=cores) as url, httpx.Client(timeout=600) as client:
        model = client.get(f"{url}/models").json()["data"][0]["id"]
        bodies = [body_of(model, number) for number in range(options.questions)]
        client.post(f"{url}/chat/completions", json=bodies[0]).raise_for_status()
        start = time.perf_counter() - began
        for body in bodies[: len(sample_images())]:  # every picture once
            client.post(f"{url}/chat/completions", json=body).raise_for_status()
        first = statistics.median(first_token(client, url, body) for body in bodies[:ALONE])

        def ask(body: dict[str, Any]) -> float:
            asked = time.perf_counter()
            client.post(f"{url}/chat/completions", json=body).raise_for_status()
            return time.perf_counter() - asked

        began = time.perf_counter()
        with ThreadPoolExecutor(options.callers) as pool:
            times = list(pool.map(ask, bodies))
        rate = len(times) / (time.perf_counter() - began)
    return Line(cores, replicas, start, first, rate, float(np.quantile(times, 0.99)))


def body_of(model: str, number: int) -> dict[str, Any]:
    """A question about one of the sample pictures, with a number in it, so that its prompt is not known."""
    samples = [sample for sample in sample_images() if sample.path.suffix != ".dcm"]
    picture = base64.b64encode(samples[number % len(samples)].path.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": f"Question {number}: what is in the picture?"},
    ]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}


def first_token(client: httpx.Client, url: str, body: dict[str, Any]) -> float:
    """Seconds until something is said."""
    asked = time.perf_counter()
    with client.stream("POST", f"{url}/chat/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - asked
    raise RuntimeError("an answer was empty: take a model that says something")


if __name__ == "__main__":
    sys.exit(main())
