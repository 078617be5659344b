"""VQA-RAD: questions that clinicians asked about radiology pictures (Lau et al., Scientific Data 2018; CC0).

Reads the layout in which the data set is passed on: `trainset.json` and `testset.json` beside `images/`. The official
training file shares all of its test's pictures, so a figure on the official test says little about new pictures: the
folds here are made by picture, of whatever the training file holds. A fold depends on the pictures' names alone, not on
the order of the file or a random number.
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from multimodal.data.sample import DataError, RowError, Sample, picture, row, tidy
from multimodal.data.slake import json_rows

FOLDS = 5
FILES = {"train": "trainset.json", "test": "testset.json"}
META = {"answer_type": "answer_type", "question_type": "question_type", "organ": "image_organ"}
REMEDY = "Give the folder that holds trainset.json and images/"


def read_vqa_rad(
    folder: str | Path,
    split: str = "train",
    fold: int | None = None,
    *,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads one split of VQA-RAD.

    The publishers write "yes" and "Yes", which no model can guess: a yes or no begins with a capital letter, and runs
    of white space become one space. A number becomes text.

    Args:
        folder: Holds `trainset.json`, `testset.json` and `images/`.
        split: `"train"` or `"test"`; with a fold also `"validation"`.
        fold: 0 to 4. Its pictures are the validation split, and training has those of the other four.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per question, in the file's order. `meta` has answer_type (`OPEN` or `CLOSED`), question_type and
        organ.

    Raises:
        DataError: The split's file is missing or isn't a JSON list, or (without `skip_bad`) a row is broken.
        ValueError: There is no such split or fold.
    """
    return list(iterate_vqa_rad(folder, split, fold, skip_bad=skip_bad))


def iterate_vqa_rad(
    folder: str | Path,
    split: str = "train",
    fold: int | None = None,
    *,
    skip_bad: list[DataError] | None = None,
) -> Iterator[Sample]:
    """Yields what `read_vqa_rad` returns, one sample at a time."""
    if fold is not None and fold not in range(FOLDS):
        raise ValueError(f"VQA-RAD has no fold {fold}: use 0 to {FOLDS - 1}")
    if split == "validation" and fold is None:
        names = ", ".join(f"vqa-rad/{number}" for number in range(FOLDS))
        raise ValueError(f"VQA-RAD has no validation split of its own: use a fold by picture, one of {names}")
    if split not in (*FILES, "validation"):
        raise ValueError(f"VQA-RAD has no split {split!r}: use train, validation (with a fold) or test")
    folder = Path(folder)
    file = folder / FILES.get(split, FILES["train"])
    records = list(json_rows(file, remedy=REMEDY))
    held_out = set() if fold is None or split == "test" else pictures_of_fold(records, fold)
    for line, record in records:
        sample = None
        with row(file, line, skip_bad):
            sample = vqa_rad_sample(record, folder / "images")
        if sample is not None and (split == "test" or (sample.images[0].name in held_out) == (split == "validation")):
            yield sample


def pictures_of_fold(records: list[tuple[int, Any]], fold: int) -> set[str]:
    """Returns the pictures of a fold: all names, in the order of their digests, dealt out like cards."""
    named = {record["image_name"] for _, record in records if isinstance(record, dict) and "image_name" in record}
    names = sorted(map(str, named), key=lambda name: sha256(name.encode()).digest())
    return set(names[fold::FOLDS])


def vqa_rad_sample(record: Any, images: Path) -> Sample:
    """Makes a sample of one record of the published JSON."""
    if not isinstance(record, dict):
        raise RowError(f"a record should be an object, not {type(record).__name__}", REMEDY)
    needed = ("qid", "image_name", "question", "answer", *META.values())
    if missing := [key for key in needed if record.get(key) is None]:
        raise RowError(f"the record lacks {', '.join(missing)}", "Add it, or get the file from its publisher again")
    answer = tidy(str(record["answer"]))
    return Sample(
        question=tidy(str(record["question"])),
        answer=answer.capitalize() if answer.lower() in ("yes", "no") else answer,
        images=(picture(images / str(record["image_name"]), remedy="Put it there; the published images have it"),),
        id=f"vqa-rad/{record['qid']}",
        meta={name: tidy(str(record[key])) for name, key in META.items()},
    )
