"""Accuracy of generated answers: greedy, exact match after normalisation.

With the pictures shuffled between questions, the same figure says how much the model owes to language alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from multimodal.data import Sample, exact_match
from multimodal.images import load_image
from multimodal.model import MultiModalModel, conversation

MAX_ANSWER_TOKENS = 24  # the longest short answer of SLAKE's training split has 22
CACHED_PICTURES = 128  # the questions of SLAKE stand in order of their pictures


@dataclass(frozen=True)
class Prediction:
    """A sample, what the model said, and whether that is right."""

    sample: Sample
    text: str
    correct: bool


def shuffle_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Give every question the pictures of a random other one, never its own unless all have the same.

    Questions without a picture stay as they are.
    """
    chance = random.Random(seed)
    pool = [sample.images for sample in samples if sample.images]

    def others(images: tuple[Path, ...]) -> tuple[Path, ...]:
        while (drawn := chance.choice(pool)) == images:
            pass
        return drawn

    if len(set(pool)) < 2:
        return list(samples)
    return [replace(sample, images=others(sample.images)) if sample.images else sample for sample in samples]


@torch.inference_mode()
def predict(
    model: MultiModalModel, samples: Sequence[Sample], *, batch_size: int = 32, progress: bool = True
) -> list[Prediction]:
    """Answer every sample greedily.

    Args:
        model: A trained model.
        samples: Questions and their pictures.
        batch_size: Questions at a time.
        progress: Show a bar.

    Returns:
        Predictions in the order of the samples.

    Raises:
        ImageError: If a picture cannot be used.
    """
    load = lru_cache(CACHED_PICTURES)(load_image)
    predictions = []
    for start in tqdm(range(0, len(samples), batch_size), desc="answers", disable=not progress):
        batch = samples[start : start + batch_size]
        inputs = model.encode([conversation(s.question, [load(path) for path in s.images]) for s in batch])
        sequences = model.model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers = sequences[:, inputs["input_ids"].shape[1] :]
        texts = model.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for sample, text in zip(batch, texts, strict=True):
            predictions.append(Prediction(sample, text.strip(), exact_match(text, sample.answer)))
    return predictions


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Share of right answers, 0 to 1.

    Raises:
        ValueError: If there are none.
    """
    if not predictions:
        raise ValueError("there are no predictions to score: the split is empty")
    return sum(prediction.correct for prediction in predictions) / len(predictions)


def accuracy_by(predictions: Sequence[Prediction], key: str = "answer_type") -> list[tuple[str, int, float]]:
    """Accuracy over all, then for each value of a ``meta`` entry: name, number of questions, share of right answers."""
    groups = {"all": list(predictions)}
    for prediction in predictions:
        if key in prediction.sample.meta:
            groups.setdefault(prediction.sample.meta[key], []).append(prediction)
    return [(name, len(group), accuracy(group)) for name, group in groups.items()]
