"""How much sooner does a second question about a picture begin, asked through HTTP?

A server in a process of its own, and a client that streams, as people's do. The first question about a picture pays for
decoding, encoding and reading it; the second one, of the same session or of another one, should pay for its own words
alone. Every round draws a picture that the server has not seen; what counts is the ratio of medians, so that a slow or
busy machine does not change the verdict. The server makes its code warm with a question about another picture.

    python -m benchmarks.service [--rounds 7] [--model embedded]
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.table import Table

from multimodal.images import load_image
from multimodal.samples import sample_images

LIMIT = 5.0  # a second question about the same picture is to start so many times sooner
FIRST, SECOND = "What is in the picture?", "Is anything unusual about it?"
SIZES = {"screen, 1 megapixel": (1152, 864), "phone, 12 megapixels": (4032, 3024)}


@contextmanager
def server(*words: str, threads: int | None = None) -> Iterator[str]:
    """A server's base URL, for as long as the block lasts; one on Ray uses this machine alone."""
    command = [sys.executable, "-m", "multimodal.cli", "serve", "--port", "0", "--no-demo", *words]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+/v1", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"the server did not start; run it by hand to see why: {' '.join(command)}")
        try:
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)


def picture(size: tuple[int, int], seed: int) -> str:
    """A photograph of a size that nobody has seen before, as a data-URI."""
    path = next(its.path for its in sample_images() if its.path.suffix == ".jpg")
    pixels = np.asarray(load_image(path).resize(size), dtype=np.int16)
    noise = np.random.default_rng(seed).integers(-3, 4, pixels.shape, dtype=np.int16)
    file = BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def first_token(client: OpenAI, model: str, question: str, shown: str | None, session: str | None = None) -> float:
    """Seconds until a question's first word is there."""
    parts: list[dict[str, object]] = [{"type": "text", "text": question}]
    if shown is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": shown}})
    began = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        max_tokens=4,
        stream=True,
        metadata={} if session is None else {"session_id": session},
    )
    seconds = 0.0
    for chunk in stream:
        if not seconds and chunk.choices and chunk.choices[0].delta.content:
            seconds = time.perf_counter() - began
    return seconds


def measure(client: OpenAI, model: str, size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Medians of seconds until the first word."""
    times: dict[str, list[float]] = {"first question": [], "the same session": [], "another session": []}
    for number in range(rounds + 1):
        shown = picture(size, number)
        session, other = f"{size[0]}-{number}", f"{size[0]}-{number}-other"
        found = {
            "first question": first_token(client, model, FIRST, shown, session),
            "the same session": first_token(client, model, SECOND, None, session),
            "another session": first_token(client, model, SECOND, shown, other),
        }
        for name, seconds in found.items():
            if number:  # the first round makes everything warm
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> int:
    """Measure, print the table and return 1 where a second question is not soon enough."""
    parser = argparse.ArgumentParser(description="Time to the first token through HTTP, of first and second questions.")
    parser.add_argument("--rounds", type=int, default=7, help="pictures of each size (default: 7)")
    parser.add_argument("--model", default="embedded", help="what is served (default: embedded)")
    options = parser.parse_args()
    table = Table("picture", "question", "median ms", "sooner", title="Time to first token through HTTP")
    ratios = []
    with (
        tempfile.TemporaryDirectory() as folder,
        server("--model", options.model, "--store", str(Path(folder) / "store.sqlite")) as url,
        OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        model = client.models.list().data[0].id
        for name, size in SIZES.items():
            found = measure(client, model, size, options.rounds)
            first = found.pop("first question")
            table.add_row(name, "first", f"{1e3 * first:.0f}", "")
            for question, seconds in found.items():
                ratios.append(first / seconds)
                table.add_row("", f"second, {question}", f"{1e3 * seconds:.0f}", f"{first / seconds:.1f}")
    console = Console()
    console.print(table)
    console.print(f"least {min(ratios):.1f} (at least {LIMIT})")
    return int(min(ratios) < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
