"""How many steps a second does training make, with and without what is computed only once?

Trains the embedded decoder, frozen, on generated questions about random pictures, three times from the same weights
and in the same order: with nothing kept; with the encoder's features kept; with the decoder's prefixes kept too. Then
twice with LoRA on the decoder's upper half, without and with the states below it. What counts is the ratio of the
steps per second, and that the losses are the same. Measured is the processors' time for this
process (shared out over its threads), so that other work on the machine does not change the verdict.

    python -m benchmarks.prefix [--steps 12] [--batch-size 16]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments

from multimodal.data import Sample
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.presets import build
from multimodal.training.augmentation import View
from multimodal.training.collator import FusionCollator, Source, TrainingSet
from multimodal.training.lora import add_to_decoder
from multimodal.training.prefix import PrefixCache
from multimodal.training.train import FusionTrainer

LIMIT = 1.8  # issue 3: at least so many times faster, where it applies
PICTURES = 16
WARM_UP = 2  # steps that are not timed
RANK = 16  # of LoRA

# Lengths as in SLAKE: questions of 5 to 12 words, answers of 1 to 4.
THINGS = ["lung", "liver", "heart", "spleen", "left kidney", "spinal cord", "small bowel", "brain stem"]
QUESTIONS = [
    "Does the picture contain a {}?",
    "Where is the {} in this image?",
    "Which organ is larger, the {} or the {}?",
    "What is the main cause of the abnormality in the {} that is seen here?",
    "How many abnormalities of the {} are there on the left side of the picture?",
    "Is the {} healthy?",
    "What is the effect of the {} on the body?",
    "Which part of the body does the {} belong to?",
]
ANSWERS = ["Yes", "No", "Lower left", "Pneumonia, cardiomegaly", "{}", "Right {}", "2", "Upper right lobe of the {}"]


def _seconds() -> float:
    return time.process_time() / torch.get_num_threads()


@dataclass
class Drawn:
    """Pictures that are all there: pixels, or features of the encoder."""

    key: str
    tensors: dict[Path, torch.Tensor]

    def draw(self, path: Path, seed: str) -> tuple[torch.Tensor, View]:
        """The picture as it is."""
        return self.tensors[path], View()


@dataclass
class Steps(TrainerCallback):
    """Notes how long each step took and its loss."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _last: float = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock; from then on a batch's making counts too."""
        self._last = _seconds()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time since the step before."""
        now = _seconds()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Note the loss."""
        if "loss" in logs:
            self.losses.append(logs["loss"])


def questions(count: int, pictures: Sequence[Path]) -> list[Sample]:
    """Questions and answers of realistic lengths, the same in every run."""
    chance = random.Random(0)

    def filled(patterns: list[str]) -> str:
        pattern = chance.choice(patterns)
        return pattern.format(*chance.sample(THINGS, pattern.count("{}")))

    return [Sample(filled(QUESTIONS), filled(ANSWERS), (chance.choice(pictures),)) for _ in range(count)]


def random_pictures(processor: FusionProcessor) -> dict[Path, torch.Tensor]:
    """Prepared pictures of noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (PICTURES, 12, 12, 3), generator=generator, dtype=torch.uint8).numpy()
    images = [Image.fromarray(pixels).resize((300, 300)) for pixels in noise]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return {Path(f"{number}.png"): picture for number, picture in enumerate(pixels)}


@torch.no_grad()
def features_of(model: FusionForConditionalGeneration, pictures: dict[Path, torch.Tensor]) -> dict[Path, torch.Tensor]:
    """What the encoder makes of pictures."""
    encoder = model.model.vision_encoder.eval()
    return {path: encoder(pixels[None]).features[0] for path, pixels in pictures.items()}


@dataclass(frozen=True)
class Kind:
    """What a run trains, and what it keeps."""

    name: str
    keep_features: bool = False
    keep_prefixes: bool = False
    lora: bool = False


KINDS = (
    Kind("nothing kept"),
    Kind("features kept", keep_features=True),
    Kind("features and prefixes kept", keep_features=True, keep_prefixes=True),
    Kind("LoRA, features kept", keep_features=True, lora=True),
    Kind("LoRA, features and what is below it kept", keep_features=True, keep_prefixes=True, lora=True),
)


def run(kind: Kind, *, steps: int, batch_size: int, folder: Path) -> tuple[Steps, float]:
    """Train some steps; returns what they took, and the seconds of what was computed before."""
    torch.manual_seed(0)
    model, processor = build("embedded", dtype=torch.float32)
    pictures = random_pictures(processor)
    samples = questions(steps * batch_size, list(pictures))
    if kind.lora:
        add_to_decoder(model, RANK, seed=0)
    start = _seconds()
    drawn = Drawn("pixel_values", pictures)
    if kind.keep_features:
        drawn = Drawn("image_features", features_of(model, pictures))
    dataset = TrainingSet([Source(samples, drawn)], processor, frozen_decoder=not kind.lora)
    if kind.keep_prefixes:
        dataset.prefixes = PrefixCache(folder, model, [row.input_ids for row in dataset.rows])
    before = _seconds() - start
    noted = Steps()
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=FusionCollator(processor.tokenizer.pad_token_id),
        callbacks=[noted],
    )
    trainer.train()
    return noted, before


def main() -> int:
    """Measure, print the table and return 1 when the limit is missed or the losses differ."""
    parser = argparse.ArgumentParser(description="Training steps per second, with and without what is kept.")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run, two of them not timed (default: 12)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions in a step (default: 16)")
    options = parser.parse_args()
    table = Table("training", "steps/s", "times", "computed before", "largest difference of a loss")
    first: dict[bool, tuple[float, list[float]]] = {}  # with LoRA and without: steps a second and losses
    missed = False
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            noted, before = run(kind, steps=options.steps, batch_size=options.batch_size, folder=Path(folder))
        rate = 1 / statistics.median(noted.seconds[WARM_UP:])
        slowest, losses = first.setdefault(kind.lora, (rate, noted.losses))
        difference = max(abs(one - other) for one, other in zip(noted.losses, losses, strict=True))
        missed |= difference > 1e-3 or (kind.keep_prefixes and not kind.lora and rate / slowest < LIMIT)
        table.add_row(kind.name, f"{rate:.2f}", f"{rate / slowest:.2f}", f"{before:.1f} s", f"{difference:.1e}")
    Console().print(table)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
