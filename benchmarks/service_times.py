"""How long a replica takes for what: the figures that ``multimodal plan`` simulates queues with.

Nobody else may ask while this runs, and nothing else should.

    python -m benchmarks.service_times --kind "2 cores, int8" --output mine.json [--price 0.10] [--model embedded]
    multimodal plan --rate 100 --p99 2 --kind mine.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from multimodal import MultiModalModel
from multimodal.engine import Generation, Picture, Request, digest_of
from multimodal.images import load_image
from multimodal.samples import sample_images

ROUNDS = 5
NEW_TOKENS = 32


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
    samples = sample_images()
    model.engine.runner.prepare()
    first: list[float] = []
    later: list[float] = []
    lengths: list[int] = []
    for turn in range(rounds + 1):
        for sample in samples:
            model.forget()
            asked = [model(question, sample.path) for question in ("What is this?", sample.prompt)]
            if turn:  # with the first one, pages of weights are touched for the first time
                first.append(asked[0].timings.first_token)
                later.append(asked[1].timings.first_token)
                lengths += [answer.usage.completion_tokens for answer in asked if turn == 1]
    states = model.engine.pictures
    model.model.generation_config.eos_token_id = None  # steps are counted in answers that do not end by themselves
    return {
        "kind": kind,
        "source": f"python -m benchmarks.service_times, {time.strftime('%Y-%m-%d')}",
        "first": statistics.median(first),
        "later": statistics.median(later),
        "step": {str(rows): statistics.median(steps(model, rows) for _ in range(rounds)) for rows in _counts(model)},
        "answer_tokens": lengths,
        "slots": model.engine.runner.slots,
        "cached_pictures": states.room // (states.nbytes // len(states)),
        "picture_bytes": round(statistics.mean(sample.path.stat().st_size for sample in samples)),
        "price": price,
    }


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
