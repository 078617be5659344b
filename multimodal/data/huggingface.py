"""Samples as a Hugging Face data set, for whoever wants its `map`, `filter`, streaming and loaders.

Pictures stay paths: `cast_column("images", List(Image()))` decodes them. Nothing is cached on disk, so a changed file
is never served stale, and nothing needs the hub. The library takes seconds to import: it waits until it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from multimodal.data.sample import Box, DataError, Sample
from multimodal.data.sources import find, iterate

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


def load_samples(
    name_or_path: str | Path,
    split: str = "train",
    *,
    streaming: bool = False,
    skip_bad: list[DataError] | None = None,
) -> Dataset | IterableDataset:
    """Loads a data set as `datasets.Dataset`.

    Args:
        name_or_path: As `read` takes it.
        split: As `read` takes it.
        streaming: Gives a `datasets.IterableDataset` that reads again for every pass, one sample at a time: a `.jsonl`
            or `.csv` file may be larger than memory. What is wrong with the data is told when its turn comes.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised; when streaming,
            once for every pass, and only by the process that reads.

    Returns:
        Rows of question, answer, images (paths), id, meta (an object of texts) and boxes; `sample_from` turns one back.

    Raises:
        DataError: No reader has this name, or (without `streaming`) a file or row can't be read.
        ValueError: The data set has no such split.
    """
    from datasets import Dataset
    from datasets.io.generator import GeneratorDatasetInputStream

    find(name_or_path)  # an unknown name is told now
    rows = partial(rows_of, name_or_path, split, skip_bad)
    if not streaming:
        return Dataset.from_list(list(rows()), features=features())
    with TemporaryDirectory() as unused:  # the library leaves a lock file where it might cache
        return GeneratorDatasetInputStream(rows, features=features(), cache_dir=unused, streaming=True).read()


def sample_from(row: Mapping[str, Any]) -> Sample:
    """Returns the sample of a row of `load_samples`."""
    return Sample(
        question=row["question"],
        answer=row["answer"],
        images=tuple(map(Path, row["images"])),
        id=row["id"],
        meta=row["meta"],
        boxes=tuple(Box(**box) for box in row["boxes"]),
    )


def rows_of(name_or_path: str | Path, split: str, skip_bad: list[DataError] | None) -> Iterator[dict[str, Any]]:
    """Yields the samples of a data set as rows."""
    for sample in iterate(name_or_path, split, skip_bad=skip_bad):
        yield {
            "question": sample.question,
            "answer": sample.answer,
            "images": [str(path) for path in sample.images],
            "id": sample.id,
            "meta": dict(sample.meta),
            "boxes": [asdict(box) for box in sample.boxes],
        }


def features() -> Features:
    """Returns the columns and their types."""
    from datasets import Features, Json, List, Value

    text, share = Value("string"), Value("float64")
    box = {"label": text, "left": share, "top": share, "width": share, "height": share, "image": Value("int32")}
    return Features(
        {"question": text, "answer": text, "images": List(text), "id": text, "meta": Json(), "boxes": List(box)}
    )
