"""SLAKE 1.0: questions about CT, MRI and X-ray pictures, in English and Chinese (Liu et al., ISBI 2021; CC-BY-4.0).

Reads the published layout: `train.json`, `validate.json` and `test.json` beside `imgs/xmlabN/source.jpg`. Knows nothing
of the knowledge graph and the boxes that come with it. Every row is kept: one training question (qid 1622) has an empty
answer, as its publisher left it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from multimodal.data.sample import DataError, RowError, Sample, picture, read_text, row, tidy

SLAKE_SPLITS = ("train", "validate", "test")
META = ("answer_type", "content_type", "modality", "location")
REMEDY = "Give the folder that holds train.json and imgs/, as SLAKE 1.0 is published"


def read_slake(
    folder: str | Path,
    split: str = "train",
    language: Literal["en", "zh"] | None = "en",
    *,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads one split of SLAKE.

    The publishers write the same answer with different white space ("Transverse  Plane", "Left Lung,Lower Right"),
    which no model can guess: runs of white space become one space, and a comma is followed by one space in English and
    by none in Chinese.

    Args:
        folder: Holds `train.json` and its kin, and `imgs/`.
        split: `"train"`, `"validate"` or `"test"`.
        language: `"en"`, `"zh"`, or `None` for both.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per question, in the file's order. `meta` has answer_type (`OPEN` or `CLOSED`), content_type,
        modality, location and language.

    Raises:
        DataError: The split's file is missing or isn't a JSON list, or (without `skip_bad`) a row is broken.
        ValueError: SLAKE has no such split or language.
    """
    if split not in SLAKE_SPLITS:
        raise ValueError(f"SLAKE has no split {split!r}: use one of {', '.join(SLAKE_SPLITS)}")
    if language not in ("en", "zh", None):
        raise ValueError(f"SLAKE has no language {language!r}: use 'en', 'zh' or None for both")
    folder = Path(folder)
    file = folder / f"{split}.json"
    samples = []
    for line, record in json_rows(file):
        with row(file, line, skip_bad):
            sample = slake_sample(record, folder / "imgs")
            if language in (None, sample.meta["language"]):
                samples.append(sample)
    return samples


def slake_sample(record: Any, images: Path) -> Sample:
    """Makes a sample of one record of the published JSON."""
    if not isinstance(record, dict):
        raise RowError(f"a record should be an object, not {type(record).__name__}", REMEDY)
    if missing := [
        key for key in ("qid", "img_name", "question", "answer", "q_lang", *META) if record.get(key) is None
    ]:
        raise RowError(f"the record lacks {', '.join(missing)}", "Add it, or get the file from SLAKE again")
    language = str(record["q_lang"])
    return Sample(
        question=tidy(str(record["question"])),
        answer=re.sub(r"\s*,\s*", ", " if language == "en" else ",", tidy(str(record["answer"]))),
        images=(picture(images / str(record["img_name"]), remedy="Put it there; SLAKE's imgs.zip has it"),),
        id=f"slake/{record['qid']}",
        meta={key: str(record[key]) for key in META} | {"language": language},
    )


def json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields each element of a JSON list with the line on which it starts, so that an error can name that line.

    Raises:
        DataError: The file is missing, isn't valid JSON, or holds no list.
    """
    text = read_text(file, remedy=REMEDY)
    try:
        if not isinstance(json.loads(text), list):
            raise DataError("expected a JSON list of records", file=file, line=1, remedy=REMEDY)
    except json.JSONDecodeError as error:
        remedy = "Repair that line, or get the file from SLAKE again"
        raise DataError(f"broken JSON: {error.msg}", file=file, line=error.lineno, remedy=remedy) from None
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    start = next_value(text, text.index("[") + 1)
    while text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        record, end = decoder.raw_decode(text, start)
        yield line, record
        start = next_value(text, end)


def next_value(text: str, position: int) -> int:
    """Returns where the next value of a JSON list starts, or the list's closing bracket."""
    while text[position] in " \t\r\n,":
        position += 1
    return position
