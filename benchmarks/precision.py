"""What does a precision cost: right answers, agreement with float32, surprise, memory?

Every precision answers the same questions through the engine; greedy, exact match. Agreement is the share of answers
that are word for word those of float32; surprise is the perplexity of the right answers' tokens. With ``--torch`` int8
and int4 are computed as on a GPU, by torch on unpacked weights: slowly on a CPU.

    python -m benchmarks.precision slake:FOLDER [--limit 300] [--precisions float32,bfloat16,int8,int4] [--torch]
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from multimodal import MultiModalModel
from multimodal.data import Sample, exact_match, read
from multimodal.engine import Engine, Picture, Request
from multimodal.engine.quantised import Kind
from multimodal.engine.runner import Row, TorchRunner
from multimodal.model import conversation

NEW_TOKENS = 32
QUANTISED: tuple[Kind, ...] = get_args(Kind)


class Questions:
    """Samples as requests; each picture is prepared once.

    Args:
        model: Its processor is used.
        samples: Questions and their right answers.
    """

    def __init__(self, model: MultiModalModel, samples: list[Sample]) -> None:
        self.samples = samples
        known: dict[Path, Picture] = {}
        self.pictures = [[known.setdefault(path, model._picture(path)) for path in its.images] for its in samples]
        self.tokens = model.tokenise([conversation(its.question, its.images) for its in samples])
        tokenizer = model.processor.tokenizer
        self.answers = [
            [*tokenizer(its.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for its in samples
        ]

    def answer(self, engine: Engine) -> list[str]:
        """What the engine says."""
        asked = [Request(*pair, NEW_TOKENS) for pair in zip(self.tokens, self.pictures, strict=True)]
        generations = engine.generate(asked)
        for generation in generations:
            if generation.error is not None:
                raise generation.error
        return [generation.text.strip() for generation in generations]

    @torch.inference_mode()
    def surprise(self, engine: Engine) -> float:
        """Perplexity of the right answers, their tokens read one by one as a step reads them."""
        total, count, runner = 0.0, 0, engine.runner
        for prompt, pictures, answer in zip(self.tokens, self.pictures, self.answers, strict=True):
            for place, picture in enumerate(pictures):
                states = engine.pictures.get((picture.digest, None), partial(engine.encode, picture))
                runner.see(0, place, states)
            image = engine.model.config.image_token_id
            seen = list(itertools.accumulate(int(token == image) for token in prompt))
            logits = runner.read(0, prompt, 0, seen)
            for place, token in enumerate(answer):
                total -= float(logits.log_softmax(-1)[token])
                count += 1
                if place + 1 < len(answer):
                    (logits,) = runner.step([Row(0, token, len(prompt) + place, len(pictures))])
        return math.exp(total / count)


def by_torch(model: MultiModalModel, kind: Kind) -> Engine:
    """An engine that computes in bfloat16 with weights unpacked by torch."""
    most = model.model.config.text_config.max_position_embeddings
    runner = TorchRunner(model.model, torch.bfloat16, slots=8, positions=most, pictures=1, quantised=kind)
    return Engine(model.model, model.processor.tokenizer, runner=runner)


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Quality and memory of each precision.")
    parser.add_argument("data", help="validation questions, as `multimodal evaluate --data` takes them")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument(
        "--precisions", type=lambda text: text.split(","), default=["float32", "bfloat16", "int8", "int4"]
    )
    parser.add_argument("--torch", action="store_true", help="int8 and int4 by torch, as on a GPU")
    options = parser.parse_args()
    samples = read(options.data, "validation")[: options.limit]
    table = Table("precision", "right", "as float32", "perplexity", "weights a step reads", title=options.data)
    exact: list[str] = []
    questions = None
    for precision in dict.fromkeys(["float32", *options.precisions]):
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        model = MultiModalModel.from_pretrained(options.model, dtype=dtype, precision=precision)
        questions = questions or Questions(model, samples)
        engine = by_torch(model, precision) if options.torch and precision in QUANTISED else model.engine
        said = questions.answer(engine)
        exact = exact or said
        right = sum(exact_match(text, its.answer) for text, its in zip(said, samples, strict=True))
        same = sum(text == its for text, its in zip(said, exact, strict=True))
        table.add_row(
            precision,
            f"{right / len(samples):.1%} of {len(samples)}",
            f"{same / len(samples):.1%}",
            f"{questions.surprise(engine):.3f}",
            f"{engine.runner.weight_bytes / 1e6:.0f} MB",
        )
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
