"""Samples to train on and to measure with, and the readers that make them.

A reader takes a folder in its publisher's layout, or a user's own file, and gives a plain list of `Sample`; it needs no
network, opens no picture and loads no pickle. `read` finds the reader by name, for the command line.
"""

from pathlib import Path

from multimodal.data.grocery import read_grocery, read_grocery_descriptions
from multimodal.data.jsonl import read_jsonl
from multimodal.data.sample import DataError, Sample
from multimodal.data.scoring import exact_match, normalise_answer
from multimodal.data.slake import read_slake

__all__ = [
    "DataError",
    "Sample",
    "exact_match",
    "normalise_answer",
    "read",
    "read_grocery",
    "read_grocery_descriptions",
    "read_jsonl",
    "read_slake",
]

# Each publisher calls its validation split by another name; `read` takes them all.
SPLITS = {"slake": {"val": "validate", "validation": "validate"}, "grocery": {"validate": "val", "validation": "val"}}


def read(name_or_path: str | Path, split: str = "train", *, skip_bad: list[DataError] | None = None) -> list[Sample]:
    """Reads a data set by the name that the command line takes.

    Args:
        name_or_path: `slake:FOLDER` (English questions), `grocery:FOLDER`, `grocery-descriptions:FOLDER` (it has one
            split) or the path of a `.jsonl` file.
        split: `"train"`, `"validation"` (or `"validate"`, `"val"`) or `"test"`. A JSONL file has no splits.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        The samples, in the source's order.

    Raises:
        DataError: No reader has this name, or a file or row can't be read.
        ValueError: The data set has no such split.
    """
    name, _, folder = str(name_or_path).partition(":")
    split = SPLITS.get(name, {}).get(split, split)
    if name == "slake" and folder:
        return read_slake(folder, split, skip_bad=skip_bad)
    if name == "grocery" and folder:
        return read_grocery(folder, split, skip_bad=skip_bad)
    if name == "grocery-descriptions" and folder:
        return read_grocery_descriptions(folder, skip_bad=skip_bad)
    if str(name_or_path).endswith(".jsonl"):
        return read_jsonl(name_or_path, skip_bad=skip_bad)
    raise DataError(
        "no reader for this",
        file=Path(name_or_path),
        remedy="Give slake:FOLDER, grocery:FOLDER, grocery-descriptions:FOLDER or a .jsonl file",
    )
