"""Samples to batches: the question as a chat, the answer as labels, the picture as cached features.

Axes: B batch, T text tokens, I images, R grid cells, D width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from multimodal.data import Sample
from multimodal.fusion import FusionProcessor
from multimodal.training.features import FeatureCache

IGNORED = -100  # the label that the loss leaves out


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The chat that asks a sample's question: its pictures first, then the text."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in sample.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}]


@dataclass(frozen=True)
class Source:
    """Samples of one data set and the features of their pictures."""

    samples: Sequence[Sample]
    features: FeatureCache


class TrainingSet(Dataset):
    """All sources as tokens and picture references; tokenised once.

    Args:
        sources: What to train on.
        processor: The fused model's processor.
    """

    def __init__(self, sources: Sequence[Source], processor: FusionProcessor) -> None:
        self.rows: list[dict[str, Any]] = []
        end = processor.tokenizer.eos_token
        for source in sources:
            prompts = [
                processor.apply_chat_template(conversation(sample), add_generation_prompt=True)
                for sample in source.samples
            ]
            answers = [sample.answer + end for sample in source.samples]
            prompt_ids = processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]
            answer_ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
            for sample, prompt, answer in zip(source.samples, prompt_ids, answer_ids, strict=True):
                self.rows.append(
                    {
                        "input_ids": prompt + answer,
                        "labels": [IGNORED] * len(prompt) + answer,
                        "images": sample.images,
                        "features": source.features,
                        "length": len(prompt) + len(answer),
                    }
                )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample's tokens and picture references."""
        return self.rows[index]


class FusionCollator:
    """Pads on the right, and takes a random view of every picture.

    The views come from Python's own random numbers, whose state ``Trainer`` saves and restores.

    Args:
        pad_token_id: What fills short rows.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch: ``input_ids``, ``labels``, ``attention_mask`` ``(B, T)``, ``image_features`` ``(B, I, R, D)``."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            ),
        }
        most = max(len(row["images"]) for row in rows)
        if most:
            batch["image_features"] = self._features(rows, most)
        return batch

    def _features(self, rows: Sequence[dict[str, Any]], most: int) -> torch.Tensor:
        found = [
            [row["features"][path, random.randrange(row["features"].views)] for path in row["images"]] for row in rows
        ]
        shape = next(feature.shape for row in found for feature in row)
        features = torch.zeros(len(rows), most, *shape, dtype=torch.float16)
        for index, row in enumerate(found):
            for place, feature in enumerate(row):
                features[index, place] = feature
        return features
