"""Clothing: photographs of ten kinds of clothes (A. Grigorev, clothing dataset, small; CC0).

Reads the published layout: `train/`, `validation/` and `test/`, each with one folder of pictures for every class. So it
reads any user's folder of class folders. The answers are words that a person would say: "T-shirt", "Long sleeve".
"""

from collections.abc import Iterator
from pathlib import Path

from multimodal.data.sample import DataError, RowError, Sample, choose, row, tidy

CLOTHING_SPLITS = ("train", "validation", "test")
CLOTHING_QUESTIONS = (
    "What kind of clothing is this?",
    "Which piece of clothing is shown?",
    "What garment is this?",
    "Name this item of clothing.",
)
# Where a folder's name isn't what a person says; any other is taken as it is.
NAMES = {"longsleeve": "Long sleeve", "outwear": "Outerwear", "t-shirt": "T-shirt"}
SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
REMEDY = "Give the folder that holds train/ and validation/, each with a folder for every class"


def read_clothing(
    folder: str | Path,
    split: str = "train",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads the photographs of one split, each with the question for the kind of clothing.

    Args:
        folder: Holds `train/`, `validation/` and `test/`.
        split: `"train"`, `"validation"` or `"test"`.
        seed: Another seed asks the training questions in other words; evaluation splits always ask the same.
        skip_bad: Where given, files that are no pictures are put here, as errors, instead of being raised.

    Returns:
        One sample per picture, by class and name. `meta` has the class.

    Raises:
        DataError: The split's folder is missing or has no class folders, or (without `skip_bad`) a file in it is no
            picture. Hidden files don't count.
        ValueError: The data set has no such split.
    """
    return list(iterate_clothing(folder, split, seed=seed, skip_bad=skip_bad))


def iterate_clothing(
    folder: str | Path, split: str = "train", *, seed: int = 0, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields what `read_clothing` returns, one sample at a time."""
    if split not in CLOTHING_SPLITS:
        raise ValueError(f"Clothing has no split {split!r}: use one of {', '.join(CLOTHING_SPLITS)}")
    folder = Path(folder) / split
    classes = entries(folder)
    if not any(path.is_dir() for path in classes):
        raise DataError("there are no class folders here", file=folder, remedy=REMEDY)
    for path in classes:
        if not path.is_dir():
            with row(path, None, skip_bad):
                raise RowError("a file stands among the class folders", "Move it into one, or delete it")
            continue
        for image in entries(path):
            sample = None
            with row(image, None, skip_bad):
                if not image.is_file() or image.suffix.lower() not in SUFFIXES:
                    raise RowError(
                        f"not a picture's name (one of {', '.join(sorted(SUFFIXES))})", "Delete or rename it"
                    )
                key = f"clothing/{split}/{path.name}/{image.stem}"
                sample = Sample(
                    question=choose(CLOTHING_QUESTIONS, key=key, seed=seed)
                    if split == "train"
                    else CLOTHING_QUESTIONS[0],
                    answer=class_name(path.name),
                    images=(image,),
                    id=key,
                    meta={"class": path.name},
                )
            if sample is not None:
                yield sample


def entries(folder: Path) -> list[Path]:
    """Returns what lies in a folder, by name, hidden files left out."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(error.strerror or str(error), file=folder, remedy=REMEDY) from None


def class_name(folder: str) -> str:
    """Turns a class folder's name into plain words, with a capital letter: "dress" becomes "Dress"."""
    if folder in NAMES:
        return NAMES[folder]
    name = tidy(folder.replace("_", " "))
    return name[:1].upper() + name[1:]
