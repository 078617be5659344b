"""Pictures with all their questions, as the vision side learns from them (``vision_side.py``).

A picture is seen once for several of its questions. What always holds: which pictures stand in a step, how they are
seen and which questions are asked follow from seed and epoch alone.

Axes: N pictures, Q questions about them, T words of a question, R grid cells, D width, B labels of boxes.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from multimodal.data import Box, Sample, normalise_answer
from multimodal.data.boxes import read_boxes
from multimodal.training.augmentation import View, box_target, covered_cells
from multimodal.training.pictures import Pictures
from multimodal.training.processes import own_share

UNKNOWN = -1  # an answer that training did not have
LONGEST_ANSWER = 40  # letters: longer ones are texts, not classes
WORD = re.compile(r"[a-z0-9]+|[^\W\d_a-z]")  # a word, or one letter of another script: Chinese needs no more


def known_layouts(layouts: torch.Tensor) -> torch.Tensor:
    """Which pictures' boxes are known, ``(N,)``, of layouts ``(N, R, B)``."""
    return (layouts >= 0).flatten(1).all(1) & (layouts.shape[-1] > 0)


class PictureSet(Dataset):
    """Pictures with their questions. Items are asked for by epoch and number, as in ``collator.TrainingSet``.

    Only samples with one picture and a short answer take part.

    Args:
        samples: Questions, answers, pictures.
        pictures: What the pictures become.
        like: The training set, whose words and answers are known; None for that set itself.
        grid: Rows and columns, for the boxes.
        questions: At most so many questions of a picture at a time; None for all.
        seed: Fixes views and the choice of questions.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        pictures: Pictures,
        *,
        like: PictureSet | None = None,
        grid: tuple[int, int],
        questions: int | None,
        seed: int,
    ) -> None:
        by_picture: dict[Path, list[Sample]] = defaultdict(list)
        for sample in samples:
            if len(sample.images) == 1 and 0 < len(sample.answer) <= LONGEST_ANSWER:
                by_picture[sample.images[0]].append(sample)
        self.source, self.pictures = pictures, list(by_picture.items())
        self.grid, self.questions, self.seed = grid, questions, seed
        self.words: dict[str, int]
        self.answers: dict[str, int]
        self.labels: dict[str, int]
        self.boxes: dict[Path, tuple[Box, ...]] = {}  # all of a picture, to learn from
        if like is not None:
            self.words, self.answers, self.labels = like.words, like.answers, like.labels
        else:
            known = [sample for _, found in self.pictures for sample in found]
            words = {word for sample in known for word in WORD.findall(sample.question.lower())}
            self.words = {word: number for number, word in enumerate(sorted(words), start=2)}  # 0 padding, 1 unknown
            answers = {normalise_answer(sample.answer) for sample in known}
            self.answers = {answer: number for number, answer in enumerate(sorted(answers))}
            for path, found in self.pictures:
                if any(sample.boxes for sample in found):  # so the reader found the picture's file in order
                    self.boxes[path] = read_boxes(path)
            labels = {box.label.lower() for boxes in self.boxes.values() for box in boxes}
            self.labels = {label: number for number, label in enumerate(sorted(labels))}

    def read(self, question: str) -> list[int]:
        """The numbers of a question's words, at least one."""
        return [self.words.get(word, 1) for word in WORD.findall(question.lower())] or [1]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int, int]) -> dict[str, Any]:
        """One picture in the view of an epoch and a pass, with some of its questions; ``~index``: none that count."""
        epoch, index, turn = item
        idle, index = index < 0, max(index, ~index)
        path, chosen = self.pictures[index]
        seed = f"{self.seed}/{epoch}/{index}/{turn}"
        states, view = self.source.draw(path, seed)
        if self.questions is not None and len(chosen) > self.questions:
            chosen = random.Random(seed).sample(chosen, self.questions)
        boxes = [() if idle else sample.boxes for sample in chosen]
        chance = random.Random(f"{seed}/dropout")
        return {
            "states": states,
            "questions": [self.read(sample.question) for sample in chosen],
            "answers": [UNKNOWN if idle else self._number(sample.answer) for sample in chosen],
            "targets": [box_target(its, view, self.grid) for its in boxes],
            "rows": [chance.getrandbits(63) for _ in chosen],
            "layout": self._layout(() if idle else self.boxes.get(path, ()), view),
        }

    def _layout(self, boxes: Sequence[Box], view: View) -> torch.Tensor:
        """The share of each grid cell that each label's boxes cover, ``(R, B)``; -1 where there are no boxes."""
        cells = self.grid[0] * self.grid[1]
        if not boxes:
            return torch.full((cells, len(self.labels)), -1.0)
        layout = torch.zeros(cells, len(self.labels))
        for label in {box.label.lower() for box in boxes}:
            its = [box for box in boxes if box.label.lower() == label]
            layout[:, self.labels[label]] = covered_cells(its, view, self.grid)
        return layout

    def _number(self, answer: str) -> int:
        return self.answers.get(normalise_answer(answer), UNKNOWN)

    @property
    def digest(self) -> str:
        """Tells two sets apart by what they ask and answer."""
        asked = [[(sample.question, sample.answer) for sample in samples] for _, samples in self.pictures]
        return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


class PictureOrder(Sampler[tuple[int, int, int]]):
    """All pictures in random order, one with n questions about root n times; it follows from seed and epoch alone.

    Where several processes share a step, each gets its part of the order.

    Args:
        dataset: The pictures.
        batch_size: Pictures in a step of all processes together.
        seed: Fixes the order, together with the epoch.
    """

    def __init__(self, dataset: PictureSet, batch_size: int, *, seed: int) -> None:
        self.passes = [
            (index, turn)
            for index, (_, samples) in enumerate(dataset.pictures)
            for turn in range(max(round(math.sqrt(len(samples))), 1))
        ]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; ``Trainer`` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of pictures that this process takes in an epoch, each as often as it comes."""
        return len(self._own(self.passes))

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Epoch, number, and how often the picture came before."""
        order = list(self.passes)
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for index, turn in self._own(order):
            yield self.epoch, index, turn

    def _own(self, order: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        steps = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [row for step in steps for row in own_share(step, lambda row: (~row[0], row[1]))]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch; see :meth:`VisionSide.forward`."""
    questions = [question for item in items for question in item["questions"]]
    longest = max(map(len, questions))
    return {
        "states": torch.stack([item["states"] for item in items]).float(),
        "questions": torch.tensor([ids + [0] * (longest - len(ids)) for ids in questions]),
        "of_picture": torch.tensor([place for place, item in enumerate(items) for _ in item["questions"]]),
        "answers": torch.tensor([answer for item in items for answer in item["answers"]]),
        "targets": torch.stack([target for item in items for target in item["targets"]]),
        "rows": torch.tensor([row for item in items for row in item["rows"]]),
        "layouts": torch.stack([item["layout"] for item in items]),
    }
