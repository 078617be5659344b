"""Samples to batches: the question as a chat, the answer as labels, each picture as a random view.

Which samples stand in a step, and which view a picture gets in it, follow from seed and epoch alone: a run that goes on
after an interruption sees what an uninterrupted one would have seen.

Axes: B batch, T text tokens, I images, R grid cells, D width.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from multimodal.data import Sample
from multimodal.fusion import FusionProcessor
from multimodal.model import conversation
from multimodal.training.pictures import Pictures

IGNORED = -100  # the label that the loss leaves out
SORTED_BATCHES = 8  # how many batches are sorted by length together


@dataclass(frozen=True)
class Source:
    """Samples of one data set and their pictures."""

    samples: Sequence[Sample]
    pictures: Pictures


@dataclass(frozen=True)
class _Row:
    sample: Sample
    pictures: Pictures
    input_ids: list[int]
    labels: list[int]


class TrainingSet(Dataset):
    """All sources as tokens and pictures; tokenised once. Its items are asked for by epoch and number.

    Args:
        sources: What to train on; their samples have answers.
        processor: The fused model's processor.
        seed: Fixes the views.
    """

    def __init__(self, sources: Sequence[Source], processor: FusionProcessor, *, seed: int = 0) -> None:
        self.seed = seed
        self.rows: list[_Row] = []
        tokenizer = processor.tokenizer
        for source in sources:
            if not source.samples:
                continue
            prompts = tokenizer.apply_chat_template(
                [conversation(sample.question, sample.images) for sample in source.samples],
                chat_template=processor.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
            answers = tokenizer([sample.answer for sample in source.samples], add_special_tokens=False)["input_ids"]
            for sample, prompt, words in zip(source.samples, prompts, answers, strict=True):
                answer = [*words, tokenizer.eos_token_id]
                labels = [IGNORED] * len(prompt) + answer
                self.rows.append(_Row(sample, source.pictures, [*prompt, *answer], labels))

    @property
    def digest(self) -> str:
        """Tells two training sets apart by what they ask and answer."""
        return hashlib.sha256(repr([(row.input_ids, row.labels) for row in self.rows]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """One sample's tokens, and its pictures as they look in an epoch."""
        epoch, index = item
        row = self.rows[index]
        return {
            "input_ids": row.input_ids,
            "labels": row.labels,
            row.pictures.key: [
                row.pictures.draw(path, f"{self.seed}/{epoch}/{index}/{place}")
                for place, path in enumerate(row.sample.images)
            ],
        }


class EpochOrder(Sampler[tuple[int, int]]):
    """The order of an epoch's samples: random, in batches of like length, so that little is padded.

    Samples are sorted by length only within a few batches, whose order is then shuffled. Sorted over longer stretches
    (as transformers does, over 50 batches) whole stretches hold one data set, and training swings between the two.

    Args:
        dataset: What to put in order.
        batch_size: Samples in a step.
        seed: Fixes the order, together with the epoch.
    """

    def __init__(self, dataset: TrainingSet, batch_size: int, *, seed: int) -> None:
        self.lengths = [len(row.input_ids) for row in dataset.rows]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; ``Trainer`` does, also when it goes on in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of epoch and number."""
        chance = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        size = self.batch_size
        for start in range(0, len(order), size * SORTED_BATCHES):
            near = sorted(order[start : start + size * SORTED_BATCHES], key=self.lengths.__getitem__)
            batches = [near[first : first + size] for first in range(0, len(near), size)]
            short = batches.pop() if len(batches[-1]) < size else []  # stays the epoch's last
            chance.shuffle(batches)
            for index in (index for batch in [*batches, short] for index in batch):
                yield self.epoch, index


class FusionCollator:
    """Pads rows on the right, and lists of pictures at the end.

    Args:
        pad_token_id: What fills short rows.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch: ``input_ids``, ``labels`` and ``attention_mask`` ``(B, T)``, and what the pictures became.

        That is ``image_features`` ``(B, I, R, D)`` or ``pixel_values`` ``(B, I, 3, height, width)``, left out where no
        row has a picture.
        """
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([numbers + [filler] * (longest - len(numbers)) for numbers in lists])

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": padded([row["labels"] for row in rows], IGNORED),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        for key in ("image_features", "pixel_values"):
            drawn = [row.get(key, []) for row in rows]
            if any(drawn):
                batch[key] = _stacked(drawn)
        return batch


def _stacked(drawn: list[list[torch.Tensor]]) -> torch.Tensor:
    """Rows of pictures as one tensor ``(B, I, ...)``."""
    first = next(picture for row in drawn for picture in row)
    stacked = first.new_zeros(len(drawn), max(map(len, drawn)), *first.shape)
    for index, row in enumerate(drawn):
        for place, picture in enumerate(row):
            stacked[index, place] = picture
    return stacked
