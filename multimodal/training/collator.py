"""Samples to batches: the question as a chat, the answer as labels, each picture as a random view.

Which samples stand in a step, and which view a picture gets in it, follow from seed and epoch alone: a run that goes on
after an interruption sees what an uninterrupted one would have seen. With a frozen decoder, what stands in front of a
row's first picture, its prefix, comes as kept numbers (see ``prefix.py``), and only the rest as tokens.

Axes: B batch, T text tokens, I images, R grid cells, D width; of prefixes: N decoder layers, K key/value heads,
P tokens, C width of a head.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from multimodal.data import Sample
from multimodal.fusion import FusionProcessor
from multimodal.model import conversation
from multimodal.training.augmentation import box_target
from multimodal.training.pictures import Pictures
from multimodal.training.prefix import PrefixCache, suffix_start
from multimodal.training.processes import own_share, world_size

IGNORED = -100  # the label that the loss leaves out
# How many batches are sorted by length together. Where a tenth of the answers are descriptions of 30 to 100 tokens,
# 26 % of a step's tokens are padding with 8, 8 % with 32, 4 % with 64; where a fiftieth are, 36 %, 12 % and 6 %.
SORTED_BATCHES = 64


@dataclass(frozen=True)
class Source:
    """Samples of one data set and their pictures, and how often a sample comes in an epoch."""

    samples: Sequence[Sample]
    pictures: Pictures
    passes: float = 1.0


@dataclass(frozen=True)
class Row:
    """A sample as tokens; ``start`` is where its first picture stands."""

    sample: Sample
    pictures: Pictures
    input_ids: list[int]
    labels: list[int]
    start: int | None
    passes: float


def rows_of(source: Source, processor: FusionProcessor) -> list[Row]:
    """The samples of a source as tokens; they have answers."""
    if not source.samples:
        return []
    tokenizer, rows = processor.tokenizer, []
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
        start = suffix_start(prompt, processor.image_token_id)
        rows.append(Row(sample, source.pictures, [*prompt, *answer], labels, start, source.passes))
    return rows


def item_of(
    row: Row, seed: str, *, grid: tuple[int, int] | None = None, start: int = 0, idle: bool = False
) -> dict[str, Any]:
    """What a collator takes of a row.

    Args:
        row: The row.
        seed: Fixes the views of its pictures.
        grid: The encoder's: where given, the item says where to look.
        start: Leave out tokens before this one.
        idle: Whether no token of it counts.
    """
    drawn = [row.pictures.draw(path, f"{seed}/{place}") for place, path in enumerate(row.sample.images)]
    target = {}
    if grid is not None and len(drawn) == 1 and row.sample.boxes and not idle:
        target["target"] = box_target(row.sample.boxes, drawn[0][1], grid)
    return {
        **target,
        "input_ids": row.input_ids[start:],
        "labels": [IGNORED] * (len(row.labels) - start) if idle else row.labels[start:],
        row.pictures.key: [states for states, _ in drawn],
    }


class TrainingSet(Dataset):
    """All sources as tokens and pictures; tokenised once. Its items are asked for by epoch and number.

    Args:
        sources: What to train on; their samples have answers.
        processor: The fused model's processor.
        seed: Fixes the views.
        grid: The encoder's, for the boxes: where given, items say where to look.
        frozen_decoder: Whether a step's work is what stands behind the prefixes: batches are sorted by that.

    Attributes:
        prefixes: What is known of the rows, if set; then items are suffixes, or whole rows if the decoder learns.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: FusionProcessor,
        *,
        seed: int = 0,
        grid: tuple[int, int] | None = None,
        frozen_decoder: bool = False,
    ) -> None:
        self.seed, self.grid, self.frozen_decoder = seed, grid, frozen_decoder
        self.prefixes: PrefixCache | None = None
        self.rows: list[Row] = [row for source in sources for row in rows_of(source, processor)]

    @property
    def digest(self) -> str:
        """Tells two training sets apart by what they ask and answer."""
        return hashlib.sha256(repr([(row.input_ids, row.labels) for row in self.rows]).encode()).hexdigest()[:16]

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Of each row: tokens that a step has to run over, and tokens of a prefix in front of them."""
        starts = [row.start or 0 if self.frozen_decoder else 0 for row in self.rows]
        return [(len(row.input_ids) - start, start) for row, start in zip(self.rows, starts, strict=True)]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """One sample's tokens, and its pictures as they look in an epoch; ``~index``: no token of it counts."""
        epoch, index = item
        idle, index = index < 0, max(index, ~index)
        row = self.rows[index]
        known: dict[str, Any] = {} if self.prefixes is None else {"prefix": self.prefixes[row.input_ids]}
        start = (row.start or 0) if known and self.frozen_decoder else 0
        return {**known, **item_of(row, f"{self.seed}/{epoch}/{index}", grid=self.grid, start=start, idle=idle)}


class EpochOrder(Sampler[tuple[int, int]]):
    """The order of an epoch's samples: random, in batches of like length, so that little is padded.

    What counts is the tokens that a step runs over: behind a prefix only those of the suffix.

    Samples are sorted by length within some batches, whose order is then shuffled. Unshuffled (as transformers does it,
    over 50 batches) whole stretches hold one data set, and training swings between the two.

    Where several processes share a step, the order is that of all of them, and each gets its part of every batch.

    Args:
        dataset: What to put in order.
        batch_size: Samples in a step of all processes together.
        seed: Fixes the order, together with the epoch.
    """

    def __init__(self, dataset: TrainingSet, batch_size: int, *, seed: int) -> None:
        self.lengths = dataset.lengths
        by_passes: dict[float, list[int]] = defaultdict(list)
        for index, row in enumerate(dataset.rows):
            by_passes[row.passes].append(index)
        self.groups = sorted(by_passes.items())
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; ``Trainer`` does, also when it goes on in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of samples that this process takes in an epoch, each as often as it comes."""
        total = sum(len(rows) * int(passes) + round(len(rows) * (passes % 1)) for passes, rows in self.groups)
        full, left = divmod(total, self.batch_size)
        return full * (self.batch_size // world_size()) + len(own_share(range(left), lambda index: ~index))

    def padding(self) -> float:
        """Share of padding among the tokens that the epoch's steps run over, 0 to 1."""
        lengths = [self.lengths[index][0] for _, index in self]
        batches = [lengths[start : start + self.batch_size] for start in range(0, len(lengths), self.batch_size)]
        return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of epoch and number."""
        chance = random.Random(f"{self.seed}/{self.epoch}")
        order = []
        for passes, rows in self.groups:
            whole = int(passes)
            order += rows * whole + chance.sample(rows, round(len(rows) * (passes % 1)))
        chance.shuffle(order)
        size = self.batch_size
        for start in range(0, len(order), size * SORTED_BATCHES):
            near = sorted(order[start : start + size * SORTED_BATCHES], key=self.lengths.__getitem__)
            batches = [near[first : first + size] for first in range(0, len(near), size)]
            short = batches.pop() if len(batches[-1]) < size else []  # stays the epoch's last
            chance.shuffle(batches)
            for index in (index for batch in [*batches, short] for index in own_share(batch, lambda row: ~row)):
                yield self.epoch, index


class FusionCollator:
    """Pads rows on the right, prefixes on the left, and lists of pictures at the end.

    Args:
        pad_token_id: What fills short rows.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch: ``input_ids``, ``labels`` and ``attention_mask`` ``(B, T)``, and what the pictures became.

        That is ``image_features`` ``(B, I, R, D)`` or ``pixel_values`` ``(B, I, 3, height, width)``, left out where no
        row has a picture. Where a row says where to look, ``targets`` ``(B, R)`` do, 0 for the rows that do not. Behind
        prefixes there are also ``prefix_keys`` and ``prefix_values`` ``(B, N, K, P, C)`` and ``prefix_states``
        ``(B, T, D)``, and ``attention_mask`` is ``(B, P + T)``.
        """
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([numbers + [filler] * (longest - len(numbers)) for numbers in lists])

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": padded([row["labels"] for row in rows], IGNORED),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if "prefix" in rows[0]:
            prefixes = [row["prefix"] for row in rows]
            batch["prefix_keys"] = _padded_left([prefix.keys for prefix in prefixes])
            batch["prefix_values"] = _padded_left([prefix.values for prefix in prefixes])
            batch["prefix_states"] = pad_sequence([prefix.states for prefix in prefixes], batch_first=True)
            counts = torch.tensor([[prefix.keys.shape[2]] for prefix in prefixes])  # (B, 1)
            most = batch["prefix_keys"].shape[3]
            kept = (torch.arange(most) >= most - counts).long()  # (B, P)
            batch["attention_mask"] = torch.cat([kept, batch["attention_mask"]], dim=1)
        targets = [row["target"] for row in rows if "target" in row]
        if targets:
            nowhere = torch.zeros_like(targets[0])
            batch["targets"] = torch.stack([row.get("target", nowhere) for row in rows])
        for key in ("image_features", "pixel_values"):
            drawn = [row.get(key, []) for row in rows]
            if any(drawn):
                batch[key] = _stacked(drawn)
        return batch


def _padded_left(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows ``(N, K, P, C)`` as one tensor ``(B, N, K, P, C)``."""
    longest = max(row.shape[2] for row in rows)
    padded = rows[0].new_zeros(len(rows), *rows[0].shape[:2], longest, rows[0].shape[3])
    for index, row in enumerate(rows):
        padded[index, :, :, longest - row.shape[2] :] = row
    return padded


def _stacked(drawn: list[list[torch.Tensor]]) -> torch.Tensor:
    """Rows of pictures as one tensor ``(B, I, ...)``."""
    first = next(picture for row in drawn for picture in row)
    stacked = first.new_zeros(len(drawn), max(map(len, drawn)), *first.shape)
    for index, row in enumerate(drawn):
        for place, picture in enumerate(row):
            stacked[index, place] = picture
    return stacked
