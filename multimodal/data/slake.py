"""SLAKE 1.0: questions about CT, MRI and X-ray pictures, in English and Chinese (Liu et al., ISBI 2021; CC-BY-4.0).

Reads the published layout: `train.json`, `validate.json` and `test.json` beside `imgs/xmlabN/source.jpg`, with the
boxes of `imgs/xmlabN/detection.json` (see `boxes.py`), and the knowledge graph, `KG/en_disease.csv` and its kin. Every
row is kept: one training question (qid 1622) has an empty answer, as its publisher left it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from multimodal.data.boxes import boxes_for, read_boxes
from multimodal.data.sample import Box, DataError, RowError, Sample, picture, read_lines, read_text, row, tidy

SLAKE_SPLITS = ("train", "validate", "test")
META = ("answer_type", "content_type", "modality", "location")
REMEDY = "Give the folder that holds train.json and imgs/, as SLAKE 1.0 is published"


@dataclass(frozen=True)
class KnowledgeTriple:
    """One line of SLAKE's knowledge graph, such as (Pneumonia, location, Lung).

    Attributes:
        subject: A disease or an organ.
        attribute: What is said about it: location, symptom, function, ...
        value: What is said, often a list in words.
        language: `"en"` or `"zh"`.
    """

    subject: str
    attribute: str
    value: str
    language: str


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
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised. A broken
            `detection.json` is put here once; its picture's questions are kept, without boxes.

    Returns:
        One sample per question, in the file's order. `meta` has answer_type (`OPEN` or `CLOSED`), content_type,
        modality, location and language; `boxes` are those of what is asked about.

    Raises:
        DataError: The split's file is missing or isn't a JSON list, or (without `skip_bad`) a row or the boxes of its
            picture are broken.
        ValueError: SLAKE has no such split or language.
    """
    return list(iterate_slake(folder, split, language, skip_bad=skip_bad))


def iterate_slake(
    folder: str | Path,
    split: str = "train",
    language: Literal["en", "zh"] | None = "en",
    *,
    skip_bad: list[DataError] | None = None,
) -> Iterator[Sample]:
    """Yields what `read_slake` returns, one sample at a time."""
    if split not in SLAKE_SPLITS:
        raise ValueError(f"SLAKE has no split {split!r}: use one of {', '.join(SLAKE_SPLITS)}")
    if language not in ("en", "zh", None):
        raise ValueError(f"SLAKE has no language {language!r}: use 'en', 'zh' or None for both")
    folder = Path(folder)
    file = folder / f"{split}.json"
    known: dict[Path, tuple[Box, ...]] = {}
    for line, record in json_rows(file):
        sample = None
        with row(file, line, skip_bad):
            sample = slake_sample(record, folder / "imgs")
        if sample is not None and language in (None, sample.meta["language"]):
            (path,) = sample.images
            if path not in known:
                known[path] = boxes_of(path, skip_bad)
            yield replace(sample, boxes=boxes_for(sample.question, sample.answer, known[path]))


def boxes_of(path: Path, skip_bad: list[DataError] | None) -> tuple[Box, ...]:
    """Reads the boxes of a picture; where they are broken and `skip_bad` is given, there are none."""
    try:
        return read_boxes(path)
    except DataError as error:
        if skip_bad is None:
            raise
        skip_bad.append(error)
        return ()


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


def json_rows(file: Path, *, remedy: str = REMEDY) -> Iterator[tuple[int, Any]]:
    """Yields each element of a JSON list with the line on which it starts, so that an error can name that line.

    Raises:
        DataError: The file is missing, isn't valid JSON, or holds no list.
    """
    text = read_text(file, remedy=remedy)
    try:
        if not isinstance(json.loads(text), list):
            raise DataError("expected a JSON list of records", file=file, line=1, remedy=remedy)
    except json.JSONDecodeError as error:
        repair = "Repair that line, or get the file from its publisher again"
        raise DataError(f"broken JSON: {error.msg}", file=file, line=error.lineno, remedy=repair) from None
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


def read_slake_knowledge(
    folder: str | Path, language: Literal["en", "zh"] | None = None, *, skip_bad: list[DataError] | None = None
) -> list[KnowledgeTriple]:
    """Reads the knowledge graph of diseases and organs.

    Args:
        folder: SLAKE's folder, or `KG` inside it.
        language: `"en"`, `"zh"`, or `None` for both.
        skip_bad: Where given, lines that can't be read are put here, as errors, instead of being raised.

    Returns:
        The triples of `en_disease.csv`, `en_organ.csv` and so on, by file, in each file's order. What follows a second
        `#` is the value, whatever it holds.

    Raises:
        DataError: There are no such files, a file isn't UTF-8, or (without `skip_bad`) a line isn't
            `subject#attribute#value`.
    """
    folder = Path(folder)
    folder = folder / "KG" if (folder / "KG").is_dir() else folder
    files = [file for file in sorted(folder.glob("*.csv")) if language in (None, file.name.partition("_")[0])]
    if not files:
        remedy = "Give the folder that holds KG/en_disease.csv, as SLAKE 1.0 is published"
        raise DataError(
            f"there are no {f'{language}_*' if language else '*'}.csv of a graph", file=folder, remedy=remedy
        )
    triples = []
    for file in files:
        for line, text in enumerate(read_lines(file, remedy=REMEDY), start=1):
            content = text.strip().strip('"')  # the published file has a quotation mark alone on line 795
            if line == 1 or not content:  # line 1 names the columns
                continue
            with row(file, line, skip_bad):
                fields = [tidy(field) for field in content.split("#", 2)]
                if len(fields) != 3 or not all(fields):
                    raise RowError(f"expected 'subject#attribute#value', got {content[:80]!r}", "Repair the line")
                subject, attribute, value = fields
                triples.append(KnowledgeTriple(subject, attribute, value, file.name.partition("_")[0]))
    return triples
