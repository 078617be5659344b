"""Training on data sets that memory does not hold: samples are read, mixed and made into rows as steps need them.

What always holds: all processes read the same order, which follows from the seed alone and never ends, and each takes
every ``world_size``-th sample of it. So a step of several processes has the samples of a step of one, no sample is in
two of them, and none waits at the end of an epoch for another that has one sample more.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from multimodal.data import Sample
from multimodal.data.sources import iterate
from multimodal.fusion import FusionProcessor
from multimodal.training.collator import Source, item_of, rows_of
from multimodal.training.pictures import Pictures
from multimodal.training.processes import rank, rows_of_a_process, world_size

BUFFER = 10_000  # samples of a data set that wait in memory, of which the next one is drawn; texts and paths only
COMPARED = 100  # samples that tell two data sets apart


class TrainingStream(IterableDataset):
    """Rows of this process, without an end.

    Args:
        sources: Data sets, as ``multimodal.data.read`` takes them, and what their pictures become. They take turns, as
            long as they last: in an epoch each sample comes once.
        processor: The fused model's processor.
        batch_size: Samples in a step of all processes together.
        seed: Fixes order and views.
        grid: The encoder's, for the boxes: where given, items say where to look.
        needs_picture: Leave out samples without one.
        start: How many samples of the order are left out, since earlier steps had them.

    Raises:
        DataError: When the turn of a row or a picture comes that cannot be used.
        ValueError: If there is no sample to train on.
    """

    def __init__(
        self,
        sources: Mapping[str, Pictures],
        processor: FusionProcessor,
        *,
        batch_size: int,
        seed: int = 0,
        grid: tuple[int, int] | None = None,
        needs_picture: bool = True,
        start: int = 0,
    ) -> None:
        self.sources, self.processor, self.batch_size = dict(sources), processor, batch_size
        self.seed, self.grid, self.needs_picture, self.start = seed, grid, needs_picture, start

    @property
    def digest(self) -> str:
        """Tells two streams apart by their first samples."""
        first = [
            (sample.question, sample.answer) for name in self.sources for sample in islice(self._read(name), COMPARED)
        ]
        return hashlib.sha256(repr(first).encode()).hexdigest()[:16]

    def order(self) -> Iterator[tuple[int, int, str, Sample]]:
        """All samples of all processes: epoch, number in it, data set and sample."""
        for epoch in count():
            number = -1
            mixed = [_shuffled(self._read(name), f"{self.seed}/{epoch}/{name}") for name in self.sources]
            for number, (name, sample) in enumerate(_in_turn(dict(zip(self.sources, mixed, strict=True)))):
                yield epoch, number, name, sample
            if number < 0:
                raise ValueError(f"{', '.join(self.sources)}: no sample to train on")

    def own(self) -> Iterator[tuple[int, int, str, Sample]]:
        """Those of this process, from the start on."""
        return islice(self.order(), self.start + rank(), None, world_size())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Items as ``TrainingSet`` has them. A loading process makes whole batches, one after the others'."""
        each, worker = rows_of_a_process(self.batch_size), get_worker_info()
        loaders, which = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for place, (epoch, number, name, sample) in enumerate(self.own()):
            if place // each % loaders == which:
                (row,) = rows_of(Source([sample], self.sources[name]), self.processor)
                yield item_of(row, f"{self.seed}/{epoch}/{number}", grid=self.grid)

    def _read(self, name: str) -> Iterator[Sample]:
        for sample in iterate(name, "train"):
            if sample.answer and (sample.images or not self.needs_picture):
                yield sample


def _shuffled(samples: Iterator[Sample], seed: str) -> Iterator[Sample]:
    """Each once, in an order that is random as far as the buffer reaches."""
    chance = random.Random(seed)
    waiting = list(islice(samples, BUFFER))
    for sample in samples:
        place = chance.randrange(len(waiting))
        yield waiting[place]
        waiting[place] = sample
    chance.shuffle(waiting)
    yield from waiting


def _in_turn(streams: Mapping[str, Iterator[Sample]]) -> Iterator[tuple[str, Sample]]:
    """One of each, again and again; who has no more is passed over."""
    left = dict(streams)
    while left:
        for name, samples in list(left.items()):
            try:
                yield name, next(samples)
            except StopIteration:
                del left[name]
