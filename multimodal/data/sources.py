"""Data sets by the names that the command line takes: which reader, which splits, and whether a split is here.

A name is `slake:FOLDER` and so on, or the path of a user's own `.jsonl` or `.csv` file, which has no splits. `iterate`
yields samples one at a time; `read` is their list. To add a data set, add a line to `SOURCES`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from multimodal.data.clothing import iterate_clothing
from multimodal.data.compose import read_slake_reports
from multimodal.data.grocery import (
    iterate_grocery,
    iterate_grocery_brands,
    iterate_grocery_categories,
    iterate_grocery_descriptions,
)
from multimodal.data.jsonl import iterate_jsonl
from multimodal.data.sample import DataError, Sample
from multimodal.data.shop_facts import read_clothing_facts, read_grocery_facts
from multimodal.data.slake import iterate_slake
from multimodal.data.table import iterate_csv
from multimodal.data.typed import read_slake_typed
from multimodal.data.vqa_rad import FOLDS, iterate_vqa_rad

ALIASES = {"val": "validation", "validate": "validation"}
WHOLE = "all"  # what `splits_of` calls the one split of a user's own file


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        iterate: Its reader, called with the folder, the publisher's name of the split and `skip_bad`.
        splits: For each split, by our name, the publisher's name, then files or folders that hold it: any one of them
            tells that it is here.
    """

    iterate: Callable[..., Iterator[Sample]]
    splits: Mapping[str, tuple[str, ...]]


def _composed(read: Callable[..., list[Sample]]) -> Callable[..., Iterator[Sample]]:
    """A reader that composes its samples from all that is known of a picture: it has them only as a whole."""
    return lambda *given, **options: iter(read(*given, **options))


SLAKE = {
    "train": ("train", "train.json"),
    "validation": ("validate", "validate.json"),
    "test": ("test", "test.json"),
}
VQA_RAD = {"train": ("train", "trainset.json"), "test": ("test", "testset.json")}
VQA_RAD_FOLD = {"train": VQA_RAD["train"], "validation": ("validation", "trainset.json"), "test": VQA_RAD["test"]}
GROCERY = {
    "train": ("train", "train.txt", "dataset/train.txt"),
    "validation": ("val", "val.txt", "dataset/val.txt"),
    "test": ("test", "test.txt", "dataset/test.txt"),
}
CLOTHING = {split: (split, split) for split in ("train", "validation", "test")}
SOURCES = {
    "slake": Source(iterate_slake, SLAKE),
    "slake-zh": Source(partial(iterate_slake, language="zh"), SLAKE),
    "vqa-rad": Source(iterate_vqa_rad, VQA_RAD),
    **{f"vqa-rad/{fold}": Source(partial(iterate_vqa_rad, fold=fold), VQA_RAD_FOLD) for fold in range(FOLDS)},
    "grocery": Source(iterate_grocery, GROCERY),
    "grocery-brands": Source(iterate_grocery_brands, GROCERY),
    "grocery-categories": Source(iterate_grocery_categories, GROCERY),
    "grocery-descriptions": Source(iterate_grocery_descriptions, GROCERY),
    "clothing": Source(iterate_clothing, CLOTHING),
    "slake-reports": Source(_composed(read_slake_reports), SLAKE),
    "slake-zh-reports": Source(_composed(partial(read_slake_reports, language="zh")), SLAKE),
    "slake-typed": Source(_composed(read_slake_typed), SLAKE),
    "slake-zh-typed": Source(_composed(partial(read_slake_typed, language="zh")), SLAKE),
    "grocery-facts": Source(_composed(read_grocery_facts), GROCERY),
    "clothing-facts": Source(_composed(read_clothing_facts), CLOTHING),
}
FILES = {".jsonl": iterate_jsonl, ".csv": iterate_csv}
NAMES = (
    "slake:FOLDER, slake-zh:FOLDER, vqa-rad:FOLDER, vqa-rad/K:FOLDER (fold K of 0 to 4), grocery:FOLDER, "
    "grocery-categories:FOLDER, grocery-brands:FOLDER, grocery-descriptions:FOLDER, clothing:FOLDER, the composed "
    "slake-reports:FOLDER, slake-zh-reports:FOLDER, slake-typed:FOLDER, slake-zh-typed:FOLDER, grocery-facts:FOLDER "
    "and clothing-facts:FOLDER, or a .jsonl or .csv file"
)


def read(name_or_path: str | Path, split: str = "train", *, skip_bad: list[DataError] | None = None) -> list[Sample]:
    """Reads a data set by the name that the command line takes.

    Args:
        name_or_path: `slake:FOLDER` (English questions), `slake-zh:FOLDER` (Chinese), `vqa-rad:FOLDER`,
            `vqa-rad/K:FOLDER` (K from 0 to 4: the fold of pictures that validation has), `grocery:FOLDER` (names),
            `grocery-categories:FOLDER`, `grocery-descriptions:FOLDER`, `clothing:FOLDER`, or the path of a `.jsonl` or
            `.csv` file.
        split: `"train"`, `"validation"` (or `"validate"`, `"val"`) or `"test"`. A user's own file has no splits.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        The samples, in the source's order.

    Raises:
        DataError: No reader has this name, or a file or row can't be read.
        ValueError: The data set has no such split.
    """
    return list(iterate(name_or_path, split, skip_bad=skip_bad))


def iterate(
    name_or_path: str | Path, split: str = "train", *, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields what `read` returns, one sample at a time.

    A user's own file is read line by line and may be larger than memory. An unknown name is told at once, whatever is
    wrong with the data when its turn comes.
    """
    source, path = find(name_or_path)
    if source is None:
        return FILES[path.suffix](path, skip_bad=skip_bad)
    split = ALIASES.get(split, split)
    publishers, *_ = source.splits.get(split, (split,))
    return source.iterate(path, publishers, skip_bad=skip_bad)


def splits_of(name_or_path: str | Path) -> tuple[str, ...]:
    """Returns which splits of a data set are here, by our names; `("all",)` for a user's own file.

    Raises:
        DataError: No reader has this name.
    """
    source, folder = find(name_or_path)
    if source is None:
        return (WHOLE,)
    return tuple(
        split for split, (_, *files) in source.splits.items() if any((folder / file).exists() for file in files)
    )


def find(name_or_path: str | Path) -> tuple[Source | None, Path]:
    """Returns the data set of a name with its folder, or `None` with the path of a user's own file.

    Raises:
        DataError: No reader has this name.
    """
    name, _, folder = str(name_or_path).partition(":")
    if folder and name in SOURCES:
        return SOURCES[name], Path(folder)
    if Path(name_or_path).suffix in FILES:
        return None, Path(name_or_path)
    raise DataError("no reader for this", file=Path(name_or_path), remedy=f"Give {NAMES}")
