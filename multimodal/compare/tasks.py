"""What is asked in a comparison: questions with right answers, and the score that decides.

A task is a data set of ``multimodal.data`` by its name (``slake``, in the folder of that name under a root), a name
with its folder (``slake:FOLDER``), or a person's own JSONL or CSV file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from multimodal.data import DataError, Sample, read, splits_of
from multimodal.data.scoring import are_long
from multimodal.data.sources import SOURCES, WHOLE

SHORTEST, SPARE, BYTES_PER_TOKEN = 32, 16, 3  # tokens; a token of English has about four bytes, of Chinese about two
SHELVES = {"Packages": "packages", "Fruit": "fruit_and_vegetables", "Vegetables": "fruit_and_vegetables"}


@dataclass(frozen=True)
class Task:
    """Questions.

    Attributes:
        name: Short, as tables show it.
        samples: The questions; ``meta["subsets"]`` names the parts that are shown apart, with spaces between.
        metric: The score that decides: ``"exact"``, or ``"rouge_l"`` where answers are sentences.
        max_new_tokens: Room for the longest right answer and a little more.
    """

    name: str
    samples: tuple[Sample, ...]
    metric: str
    max_new_tokens: int


def make_task(
    name: str,
    *,
    root: Path = Path(),
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> Task:
    """Read a task's questions.

    Args:
        name: As above.
        root: Folder that data sets are in.
        split: Which split; a person's own file has none.
        limit: Draw at most so many questions.
        seed: Of the draw.
        skip_bad: Where given, rows that cannot be read are put here instead of being raised.

    Raises:
        DataError: If a file or a row cannot be read, or nothing is there.
    """
    short = name.partition(":")[0]
    data = f"{short}:{root / short.partition('-')[0].partition('/')[0]}" if name in SOURCES else name
    if name in SOURCES and name.startswith("vqa-rad"):
        data = f"{short}:{root / 'vqa-rad'}"
    samples = [_with_subsets(sample) for sample in read(data, split, skip_bad=skip_bad) if sample.answer]
    if not samples:
        there = ", ".join(splits_of(data)) or "none"
        place = Path(data.partition(":")[2] or data)
        raise DataError(f"no question is in its {split} split", file=place, remedy=f"Its splits are: {there}")
    called = Path(name).stem if WHOLE in splits_of(data) else short
    if limit is not None and limit < len(samples):
        drawn = random.Random(f"{seed}/{called}").sample(range(len(samples)), limit)
        samples = [samples[place] for place in sorted(drawn)]
    longest = max(len(sample.answer.encode()) for sample in samples)
    return Task(
        name=called,
        samples=tuple(_named(samples)),
        metric="rouge_l" if are_long([sample.answer for sample in samples]) else "exact",
        max_new_tokens=max(SHORTEST, longest // BYTES_PER_TOKEN + SPARE),
    )


def _named(samples: Sequence[Sample]) -> list[Sample]:
    """Each with a name that no other has, and its pictures wherever this process is."""
    seen: set[str] = set()
    named = []
    for place, sample in enumerate(samples, start=1):
        given = sample.id or f"line {place}"
        numbered = (f"{given} ({number})" for number in count(2))
        name = next(name for name in chain([given], numbered) if name not in seen)
        seen.add(name)
        # The report may be written from another folder.
        named.append(replace(sample, id=name, images=tuple(path.absolute() for path in sample.images)))
    return named


def _with_subsets(sample: Sample) -> Sample:
    """Packages apart from what grows: on them a name is printed."""
    parts = sample.images[0].parts if sample.images else ()
    shelf = next((SHELVES[part] for part in parts if part in SHELVES), None)
    if shelf is None or "coarse_class" not in sample.meta:
        return sample
    return replace(sample, meta={**sample.meta, "subsets": shelf})
