"""What is in a data set, before anyone trains on it: counts, lengths, repeated questions, pictures in two splits.

Reads every row and opens every picture once. A row or a picture that can't be read is counted and listed, never fatal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from multimodal.data.leaks import Fingerprint, Leak, Place, find_leaks, fingerprints
from multimodal.data.sample import DataError, Sample
from multimodal.data.scoring import normalise_answer
from multimodal.data.sources import ALIASES, WHOLE, read, splits_of

FREQUENT = 5


@dataclass(frozen=True)
class Lengths:
    """How long answers are: half of them at most `median`, 95 of 100 at most `most`, all at most `longest`."""

    median: float
    most: float
    longest: int


@dataclass(frozen=True)
class SplitDescription:
    """One split of one data set.

    Attributes:
        data: The data set, as the command line names it.
        split: Its split, by our name.
        questions: Rows that could be read.
        pictures: Different files.
        boxed: Questions that say where to look.
        words: Lengths of the answers in words, between white space.
        characters: Lengths of the answers in characters, which say more in Chinese.
        answers: Different answers, as exact match counts them.
        frequent: The most frequent answers with their number.
        repeated: Rows beyond the first with the same question, pictures and answer.
        contradicting: Groups of rows, by id, with the same question and pictures but different answers.
        bad: How many rows could not be read.
    """

    data: str
    split: str
    questions: int
    pictures: int
    boxed: int
    words: Lengths
    characters: Lengths
    answers: int
    frequent: tuple[tuple[str, int], ...]
    repeated: int
    contradicting: tuple[tuple[str, ...], ...]
    bad: int


@dataclass(frozen=True)
class Description:
    """What `describe` found.

    Attributes:
        splits: Each split of each data set.
        bad: Rows that could not be read, of all splits that are here.
        broken: Pictures that could not be read.
        leaks: Pictures that stand in two splits; of all splits that are here, whichever are described.
    """

    splits: tuple[SplitDescription, ...]
    bad: tuple[DataError, ...]
    broken: tuple[DataError, ...]
    leaks: tuple[Leak, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain lists and texts, for JSON."""
        return {
            "splits": [split_as_dict(split) for split in self.splits],
            "bad": [error_as_dict(error) for error in self.bad],
            "broken": [error_as_dict(error) for error in self.broken],
            "leaks": [leak_as_dict(leak) for leak in self.leaks],
        }


def describe(names: Sequence[str | Path], split: str | None = None, *, progress: bool = False) -> Description:
    """Describes data sets, and looks for pictures that stand in two splits.

    Args:
        names: Data sets, as `read` takes them.
        split: Describe only this one; the pictures of the others are compared all the same. All that are here if not
            given.
        progress: Show a bar while pictures are read.

    Returns:
        The figures, and what is wrong.

    Raises:
        DataError: No reader has a name, or a file as a whole can't be read.
        ValueError: A data set has no such split.
    """
    only = ALIASES.get(split, split) if split else None
    bad: dict[Place, list[DataError]] = {}
    samples: dict[Place, list[Sample]] = {}
    for name in dict.fromkeys(map(str, names)):
        here = splits_of(name) or ("train",)  # which then says what is missing
        wanted = here if only is None or only in here or here == (WHOLE,) else (*here, only)
        for each in wanted:
            bad[name, each] = []
            samples[name, each] = read(name, each, skip_bad=bad[name, each])
    pictures: dict[Path, list[Place]] = {}
    for place, rows in samples.items():
        for path in dict.fromkeys(path for row in rows for path in row.images):
            pictures.setdefault(path, []).append(place)
    broken: list[DataError] = []
    prints = fingerprints(pictures, progress=progress, broken=broken)
    return Description(
        splits=tuple(
            described(place, rows, len(bad[place]), prints)
            for place, rows in samples.items()
            if only is None or place[1] in (only, WHOLE)
        ),
        bad=tuple({str(error): error for errors in bad.values() for error in errors}.values()),
        broken=tuple(broken),
        leaks=tuple(find_leaks(pictures, prints)),
    )


def described(place: Place, rows: Sequence[Sample], bad: int, prints: dict[Path, Fingerprint]) -> SplitDescription:
    """Returns the figures of one split."""
    answers = Counter(normalise_answer(row.answer) for row in rows)
    spelled: dict[str, str] = {}
    asked: dict[tuple[Any, ...], list[Sample]] = {}
    for row in rows:
        spelled.setdefault(normalise_answer(row.answer), row.answer)
        shown = tuple(prints[path].digest if path in prints else str(path) for path in row.images)
        asked.setdefault((normalise_answer(row.question), *shown), []).append(row)
    groups = [group for group in asked.values() if len(group) > 1]
    distinct = [len({normalise_answer(row.answer) for row in group}) for group in groups]
    return SplitDescription(
        data=place[0],
        split=place[1],
        questions=len(rows),
        pictures=len({path for row in rows for path in row.images}),
        boxed=sum(bool(row.boxes) for row in rows),
        words=lengths([len(row.answer.split()) for row in rows]),
        characters=lengths([len(row.answer) for row in rows]),
        answers=len(answers),
        frequent=tuple((spelled[answer], count) for answer, count in answers.most_common(FREQUENT)),
        repeated=sum(len(group) - kinds for group, kinds in zip(groups, distinct, strict=True)),
        contradicting=tuple(
            tuple(row.id for row in group) for group, kinds in zip(groups, distinct, strict=True) if kinds > 1
        ),
        bad=bad,
    )


def lengths(counts: list[int]) -> Lengths:
    """Summarises lengths; all are 0 where there are none."""
    if not counts:
        return Lengths(0, 0, 0)
    median, most = np.percentile(counts, [50, 95])
    return Lengths(float(median), float(most), max(counts))


def table_of(splits: Sequence[SplitDescription]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of a table, a column for each split."""

    def frequent(split: SplitDescription) -> str:
        shares = ((shorten(answer, 30) or "(empty)", count / split.questions) for answer, count in split.frequent)
        return ", ".join(f"{answer} {share:.0%}" for answer, share in shares)

    def length(figures: Lengths) -> str:
        return f"{figures.median:g} / {figures.most:g} / {figures.longest}"

    rows: dict[str, list[str]] = {
        "questions": [f"{split.questions:,}" for split in splits],
        "pictures": [f"{split.pictures:,}" for split in splits],
        "questions with boxes": [f"{split.boxed:,}" for split in splits],
        "different answers": [f"{split.answers:,}" for split in splits],
        "answer in words: median / 95 % / longest": [length(split.words) for split in splits],
        "answer in characters": [length(split.characters) for split in splits],
        "most frequent answers": [frequent(split) for split in splits],
        "repeated rows": [f"{split.repeated:,}" for split in splits],
        "contradicting groups of rows": [f"{len(split.contradicting):,}" for split in splits],
        "rows that could not be read": [f"{split.bad:,}" for split in splits],
    }
    return ["", *(split.split for split in splits)], [[name, *cells] for name, cells in rows.items()]


def warnings_of(description: Description, *, shown: int = 10) -> list[str]:
    """Returns in words what is wrong, each of several kinds in one text that names its first cases.

    Args:
        description: What `describe` found.
        shown: Cases that are named; the number is always that of all.
    """
    found = []
    for split in description.splits:
        if split.contradicting:
            cases = [", ".join(group) for group in split.contradicting]
            title = "rows that ask the same about the same pictures, with different answers"
            found.append(listing(f"{split.data} {split.split}: {len(cases):,} x {title}", cases, shown))
    for exact in (True, False):
        by_places: dict[str, list[str]] = {}
        for leak in description.leaks:
            if leak.exact == exact:
                held_in = dict.fromkeys((places(leak.first_in), places(leak.second_in)))
                by_places.setdefault(" and in ".join(held_in), []).append(pair(leak))
        for where, cases in by_places.items():
            what = "the same picture" if exact else "nearly the same picture"
            found.append(listing(f"leak: {len(cases):,} x {what} in {where}", cases, shown))
    return found


def pair(leak: Leak) -> str:
    """Returns the files of a leak, in words."""
    if leak.exact:
        return f"{leak.first}" if leak.first == leak.second else f"{leak.first} = {leak.second}"
    return f"{leak.first} ~ {leak.second} ({leak.difference:.0%} of their bits differ)"


def listing(title: str, cases: list[str], shown: int) -> str:
    """Returns a title and the first of its cases, a line each."""
    more = [f"... and {len(cases) - shown:,} more (--json names all)"] if len(cases) > shown else []
    return "\n  ".join([f"{title}:", *cases[:shown], *more])


def places(held_in: Sequence[Place]) -> str:
    """Returns data sets and splits in words."""
    return ", ".join(f"{data} {split}" for data, split in held_in)


def split_as_dict(split: SplitDescription) -> dict[str, Any]:
    """Returns one split's figures for JSON."""
    return {
        **vars(split),
        "words": vars(split.words),
        "characters": vars(split.characters),
        "frequent": [list(pair) for pair in split.frequent],
        "contradicting": [list(group) for group in split.contradicting],
    }


def error_as_dict(error: DataError) -> dict[str, Any]:
    """Returns an error for JSON."""
    return {"file": str(error.file), "line": error.line, "reason": error.reason, "remedy": error.remedy}


def leak_as_dict(leak: Leak) -> dict[str, Any]:
    """Returns a leak for JSON."""
    return {
        "first": str(leak.first),
        "second": str(leak.second),
        "first_in": [list(place) for place in leak.first_in],
        "second_in": [list(place) for place in leak.second_in],
        "exact": leak.exact,
        "difference": round(leak.difference, 4),
    }
