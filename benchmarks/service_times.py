"""How long a replica takes for what: the figures that ``multimodal plan`` simulates queues with.

Questions go through the service's application, in this process and without a network: taking a request apart and
looking at its picture keeps a replica from the others as reading does. Nobody else may ask while this runs, and nothing
else should.

    python -m benchmarks.service_times --kind "2 cores, int8" --output mine.json [--price 0.10] [--model embedded]
    multimodal plan --rate 100 --p99 2 --kind mine.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import mimetypes
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from multimodal import MultiModalModel
from multimodal.engine import Generation, Picture, Request, digest_of
from multimodal.images import load_image
from multimodal.samples import SamplePicture, sample_images
from multimodal.service import create_app

ROUNDS = 5
NEW_TOKENS = 32

Answer = tuple[int, float]  # tokens, and seconds from the question to the whole answer


def main() -> int:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, help="what to call this kind of replica")
    parser.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    parser.add_argument("--precision", default="auto", help="as `multimodal serve` takes it (default: auto)")
    parser.add_argument("--price", type=float, help="US dollars an hour")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    options = parser.parse_args()
    model = MultiModalModel.from_pretrained(options.model, precision=options.precision)
    measured = measure(model, kind=options.kind, price=options.price)
    options.output.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return 0


def measure(model: MultiModalModel, *, kind: str, price: float | None, rounds: int = ROUNDS) -> dict[str, Any]:
    """The fields of :class:`multimodal.cluster.planning.Measurements`, medians over rounds and sample pictures."""
    model.engine.prepare()
    first, later, lengths = asyncio.run(_questions(model, rounds))
    picture_bytes = [sample.path.stat().st_size for sample in sample_images()]
    states = model.engine.pictures
    cached_pictures = states.room // (states.nbytes // len(states))
    model.model.generation_config.eos_token_id = None  # steps are counted in answers that do not end by themselves
    step = {rows: statistics.median(steps(model, rows) for _ in range(rounds)) for rows in _counts(model)}

    def read(answers: list[Answer]) -> float:
        """Seconds until an answer's first token: from there on it is written."""
        return max(statistics.median(seconds - (tokens - 1) * step[1] for tokens, seconds in answers), 0.0)

    return {
        "kind": kind,
        "source": f"python -m benchmarks.service_times, {time.strftime('%Y-%m-%d')}",
        "first": read(first),
        "later": read(later),
        "step": {str(rows): seconds for rows, seconds in step.items()},
        "answer_tokens": lengths,
        "slots": model.engine.runner.slots,
        "cached_pictures": cached_pictures,
        "picture_bytes": round(statistics.mean(picture_bytes)),
        "price": price,
    }


async def _questions(model: MultiModalModel, rounds: int) -> tuple[list[Answer], list[Answer], list[int]]:
    """Answers to first and to later questions about the sample pictures, and how long answers are, in tokens."""
    first: list[Answer] = []
    later: list[Answer] = []
    lengths: list[int] = []
    transport = httpx.ASGITransport(app=create_app(model, name="model"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=600) as client:
        for turn in range(rounds + 1):
            for sample in sample_images():
                model.forget()
                asked = [await _ask(client, question, sample) for question in ("What is this?", sample.prompt)]
                if turn:  # with the first one, pages of weights are touched for the first time
                    first.append(asked[0])
                    later.append(asked[1])
                    lengths += [tokens for tokens, _ in asked if turn == 1]
    return first, later, lengths


async def _ask(client: httpx.AsyncClient, question: str, sample: SamplePicture) -> Answer:
    kind = mimetypes.guess_type(sample.path.name)[0] or "application/dicom"
    url = f"data:{kind};base64,{base64.b64encode(sample.path.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": "model", "messages": [{"role": "user", "content": parts}]}
    began = time.perf_counter()
    said = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
    return said["usage"]["completion_tokens"], time.perf_counter() - began


def steps(model: MultiModalModel, rows: int) -> float:
    """Seconds of a step with so many answers in it: the time between tokens that came while all were written."""
    new_tokens, between = NEW_TOKENS, list[float]()
    while len(between) < NEW_TOKENS // 2:  # the first answer may be written before the last prompt is read
        generations = model.engine.generate([_prompt(model, row, new_tokens) for row in range(rows)])
        begin = max(_times(generation)[0] for generation in generations)
        end = min(_times(generation)[-1] for generation in generations)
        between = [at for at in _times(generations[0]) if begin <= at <= end]
        new_tokens *= 2
    return (between[-1] - between[0]) / (len(between) - 1)


def _times(generation: Generation) -> list[float]:
    return [token.time for token in generation.tokens]


def _prompt(model: MultiModalModel, row: int, new_tokens: int) -> Request:
    """A picture and words without sense: a step takes longer for who sees, and not for what is said."""
    image = load_image(sample_images()[0].path)
    (pixels,) = model.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    chance = torch.Generator().manual_seed(row)
    most = min(model.model.config.text_config.vocab_size, 40_000)
    words = torch.randint(most // 2, most, (20,), generator=chance).tolist()
    return Request([model.model.config.image_token_id, *words], [Picture(pixels, digest_of(pixels))], new_tokens)


def _counts(model: MultiModalModel) -> list[int]:
    slots = model.engine.runner.slots
    return sorted({1, max(1, slots // 4), max(1, slots // 2), slots})


if __name__ == "__main__":
    sys.exit(main())
