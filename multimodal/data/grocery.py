"""Grocery Store: shelf photographs of 81 products, and what a shop says about each (Klasson et al., WACV 2019; MIT).

Reads the published layout: `dataset/train.txt` (and val, test) with lines `picture, class, coarse class`, and
`classes.csv`, which gives each class its name, an iconic picture and a description. The answers are words that a person
would say: "Golden Delicious", not class 0. Training phrasings vary so that the model learns the task and not one
sentence; evaluation splits always ask the first, so that two runs can be compared.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from multimodal.data.sample import DataError, RowError, Sample, choose, picture, read_text, row, tidy

GROCERY_SPLITS = ("train", "val", "test")
NAME_QUESTIONS = ("What product is this?", "Name this product.", "Which grocery item is shown?")
DESCRIPTION_QUESTIONS = (
    "Describe this product for a shop.",
    "Write a shop description for this product.",
    "What would a shop write about this product?",
)
COLUMNS = {
    "name": "Class Name (str)",
    "id": "Class ID (int)",
    "coarse": "Coarse Class Name (str)",
    "picture": "Iconic Image Path (str)",
    "description": "Product Description Path (str)",
}
REMEDY = "Give the folder that holds train.txt and classes.csv, or its parent, as Grocery Store is published"
RESTORE = "Put it there; the published data set has it"


@dataclass(frozen=True)
class Product:
    """One class of `classes.csv`: its names in plain words, and paths relative to the data set's folder."""

    name: str
    coarse: str
    picture: str
    description: str
    line: int


def read_grocery(
    folder: str | Path,
    split: str = "train",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads the photographs of one split, each with the question for the product's name.

    Args:
        folder: The folder `dataset`, or the one that holds it.
        split: `"train"`, `"val"` or `"test"`.
        seed: Another seed asks the training questions in other words; evaluation splits always ask the same.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per photograph, in the file's order. `meta` has class_id and coarse_class.

    Raises:
        DataError: A file of the data set is missing, or (without `skip_bad`) a row is broken.
        ValueError: Grocery Store has no such split.
    """
    if split not in GROCERY_SPLITS:
        raise ValueError(f"Grocery Store has no split {split!r}: use one of {', '.join(GROCERY_SPLITS)}")
    folder = dataset_folder(folder)
    products = read_products(folder, skip_bad)
    file = folder / f"{split}.txt"
    samples = []
    for line, text in enumerate(read_text(file, remedy=REMEDY).splitlines(), start=1):
        if not text.strip():
            continue
        with row(file, line, skip_bad):
            fields = [field.strip() for field in text.split(",")]
            if len(fields) != 3:
                raise RowError(f"expected 'picture, class, coarse class', got {text!r}", "Repair the line")
            path, class_id, _ = fields
            if class_id not in products:
                raise RowError(f"class {class_id!r} is not in classes.csv", "Repair the line, or add the class there")
            key = f"grocery/{PurePosixPath(path).with_suffix('')}"
            samples.append(
                Sample(
                    question=choose(NAME_QUESTIONS, key=key, seed=seed) if split == "train" else NAME_QUESTIONS[0],
                    answer=products[class_id].name,
                    images=(picture(folder / path, remedy=RESTORE),),
                    id=key,
                    meta={"class_id": class_id, "coarse_class": products[class_id].coarse},
                )
            )
    return samples


def read_grocery_descriptions(
    folder: str | Path, *, seed: int = 0, skip_bad: list[DataError] | None = None
) -> list[Sample]:
    """Reads each product's iconic picture with the description that a shop gives it.

    Args:
        folder: The folder `dataset`, or the one that holds it.
        seed: Another seed asks the questions in other words.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per product. `meta` has class_id, coarse_class and the product's name.

    Raises:
        DataError: `classes.csv` is missing, or (without `skip_bad`) a row, its picture or its description is broken.
    """
    folder = dataset_folder(folder)
    samples = []
    for class_id, product in read_products(folder, skip_bad).items():
        with row(folder / "classes.csv", product.line, skip_bad):
            key = f"grocery/description/{class_id}"
            samples.append(
                Sample(
                    question=choose(DESCRIPTION_QUESTIONS, key=key, seed=seed),
                    answer=description(folder / product.description),
                    images=(picture(folder / product.picture, remedy=RESTORE),),
                    id=key,
                    meta={"class_id": class_id, "coarse_class": product.coarse, "name": product.name},
                )
            )
    return samples


def dataset_folder(folder: str | Path) -> Path:
    """Returns the folder that holds `classes.csv`: the given one, or `dataset` inside it."""
    for candidate in (Path(folder), Path(folder) / "dataset"):
        if (candidate / "classes.csv").is_file():
            return candidate
    raise DataError("there is no classes.csv here, nor in dataset/", file=Path(folder), remedy=REMEDY)


def read_products(folder: Path, skip_bad: list[DataError] | None) -> dict[str, Product]:
    """Reads `classes.csv` into products by class id, in the file's order."""
    file = folder / "classes.csv"
    reader = csv.DictReader(io.StringIO(read_text(file, remedy=REMEDY)))
    if missing := [column for column in COLUMNS.values() if column not in (reader.fieldnames or ())]:
        raise DataError(f"the columns {', '.join(missing)} are missing", file=file, line=1, remedy="Restore the header")
    products = {}
    for record in reader:
        with row(file, reader.line_num, skip_bad):
            if empty := [column for column in COLUMNS.values() if not record[column]]:
                raise RowError(f"no value for {', '.join(empty)}", "Fill it in, or get the file again")
            products[record[COLUMNS["id"]].strip()] = Product(
                name=words(record[COLUMNS["name"]]),
                coarse=words(record[COLUMNS["coarse"]]),
                picture=record[COLUMNS["picture"]].strip().lstrip("/"),
                description=record[COLUMNS["description"]].strip().lstrip("/"),
                line=reader.line_num,
            )
    return products


def description(path: Path) -> str:
    """Reads the text that describes a product."""
    if not path.is_file():
        raise RowError(f"the description {path} is missing", RESTORE)
    text = tidy(read_text(path, remedy=RESTORE))
    if not text:
        raise RowError(f"the description {path} is empty", RESTORE)
    return text


def words(name: str) -> str:
    """Turns a class name into plain words: "Oatly-Natural-Oatghurt" becomes "Oatly Natural Oatghurt"."""
    return tidy(name.replace("-", " "))
