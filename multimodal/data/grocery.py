"""Grocery Store: shelf photographs of 81 products, and what a shop says about each (Klasson et al., WACV 2019; MIT).

Reads the published layout: `dataset/train.txt` (and val, test) with lines `picture, class, coarse class`, and
`classes.csv`, which gives each class its name, an iconic picture and a description. The answers are words that a person
would say: "Golden Delicious", not class 0. Training phrasings vary so that the model learns the task and not one
sentence; evaluation splits always ask the first, so that two runs can be compared.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from multimodal.data.sample import DataError, RowError, Sample, choose, picture, read_lines, read_text, row, tidy

GROCERY_SPLITS = ("train", "val", "test")
NAME_QUESTIONS = ("What product is this?", "Name this product.", "Which grocery item is shown?")
BRANDS = ("Alpro", "Arla", "Bravo", "Garant", "God Morgon", "Oatly", "Tropicana", "Valio", "Yoggi")
BRAND_QUESTION = "Which brand is printed on this package?"
CATEGORY_QUESTIONS = (
    "What kind of product is this?",
    "Which category does this product belong to?",
    "What type of grocery is shown?",
)
DESCRIPTION_QUESTIONS = (
    "Describe this product for a shop.",
    "Write a shop description for this product.",
    "What would a shop write about this product?",
    "Write a product description.",
    "Describe this item for an online shop.",
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

    id: str
    name: str
    coarse: str
    picture: str
    description: str
    line: int


@dataclass(frozen=True)
class Photograph:
    """One line of a split's file: the picture without its suffix, its path, and what it shows."""

    key: str
    path: Path
    product: Product


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
    return list(iterate_grocery(folder, split, seed=seed, skip_bad=skip_bad))


def read_grocery_categories(
    folder: str | Path,
    split: str = "train",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads the photographs of one split, each with the question for the kind of product: "Apple", "Oat Milk".

    Arguments and errors are those of `read_grocery`.

    Returns:
        One sample per photograph, in the file's order. `meta` has class_id and the product's name.
    """
    return list(iterate_grocery_categories(folder, split, seed=seed, skip_bad=skip_bad))


def read_grocery_descriptions(
    folder: str | Path,
    split: str = "train",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads the photographs of one split, each with the description that a shop gives the product.

    Training also has the iconic picture of every product, in front of the photographs. Arguments and errors are those
    of `read_grocery`; a missing or empty description is an error of the row.

    Returns:
        One sample per picture. `meta` has class_id, coarse_class and the product's name.
    """
    return list(iterate_grocery_descriptions(folder, split, seed=seed, skip_bad=skip_bad))


def iterate_grocery(
    folder: str | Path, split: str = "train", *, seed: int = 0, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields what `read_grocery` returns, one sample at a time."""
    check_split(split)
    folder = dataset_folder(folder)
    products = read_products(folder, skip_bad)
    for photograph in photographs(folder, split, products, skip_bad):
        key, product = f"grocery/{photograph.key}", photograph.product
        yield Sample(
            question=choose(NAME_QUESTIONS, key=key, seed=seed) if split == "train" else NAME_QUESTIONS[0],
            answer=product.name,
            images=(photograph.path,),
            id=key,
            meta={"class_id": product.id, "coarse_class": product.coarse},
        )


def iterate_grocery_categories(
    folder: str | Path, split: str = "train", *, seed: int = 0, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields what `read_grocery_categories` returns, one sample at a time."""
    check_split(split)
    folder = dataset_folder(folder)
    products = read_products(folder, skip_bad)
    for photograph in photographs(folder, split, products, skip_bad):
        key, product = f"grocery/category/{photograph.key}", photograph.product
        yield Sample(
            question=choose(CATEGORY_QUESTIONS, key=key, seed=seed) if split == "train" else CATEGORY_QUESTIONS[0],
            answer=product.coarse,
            images=(photograph.path,),
            id=key,
            meta={"class_id": product.id, "name": product.name},
        )


def iterate_grocery_brands(
    folder: str | Path, split: str = "train", *, seed: int = 0, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields the photographs of packages, each with the question for the brand that is printed on it.

    The answer is the beginning of the product's name. Arguments and errors are those of `read_grocery`, but for the
    seed: all are asked alike, since nothing of ours trains on it.
    """
    check_split(split)
    folder = dataset_folder(folder)
    products = read_products(folder, skip_bad)
    for photograph in photographs(folder, split, products, skip_bad):
        product = photograph.product
        brand = next((brand for brand in BRANDS if product.name.startswith(f"{brand} ")), None)
        if brand is not None:
            yield Sample(
                question=BRAND_QUESTION,
                answer=brand,
                images=(photograph.path,),
                id=f"grocery/brand/{photograph.key}",
                meta={"class_id": product.id, "coarse_class": product.coarse, "name": product.name},
            )


def iterate_grocery_descriptions(
    folder: str | Path, split: str = "train", *, seed: int = 0, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields what `read_grocery_descriptions` returns, one sample at a time."""
    check_split(split)
    folder = dataset_folder(folder)
    products = read_products(folder, skip_bad)
    described: dict[str, str] = {}
    iconic: dict[str, Path] = {}
    for class_id, product in products.items():
        with row(folder / "classes.csv", product.line, skip_bad):
            described[class_id] = description(folder / product.description)
            if split == "train":
                iconic[class_id] = picture(folder / product.picture, remedy=RESTORE)

    def sample(product: Product, path: Path, key: str) -> Sample:
        asked = choose(DESCRIPTION_QUESTIONS, key=key, seed=seed) if split == "train" else DESCRIPTION_QUESTIONS[0]
        meta = {"class_id": product.id, "coarse_class": product.coarse, "name": product.name}
        return Sample(question=asked, answer=described[product.id], images=(path,), id=key, meta=meta)

    for class_id, path in iconic.items():
        yield sample(products[class_id], path, f"grocery/description/{class_id}")
    usable = {class_id: products[class_id] for class_id in described}
    for photograph in photographs(folder, split, usable, skip_bad):
        yield sample(photograph.product, photograph.path, f"grocery/description/{photograph.key}")


def check_split(split: str) -> None:
    """Refuses a split that Grocery Store doesn't have."""
    if split not in GROCERY_SPLITS:
        raise ValueError(f"Grocery Store has no split {split!r}: use one of {', '.join(GROCERY_SPLITS)}")


def photographs(
    folder: Path, split: str, products: dict[str, Product], skip_bad: list[DataError] | None
) -> Iterator[Photograph]:
    """Yields the photographs of one split, in its file's order."""
    file = folder / f"{split}.txt"
    for line, content in enumerate(read_lines(file, remedy=REMEDY), start=1):
        text = content.strip()
        if not text:
            continue
        found = None
        with row(file, line, skip_bad):
            fields = [field.strip() for field in text.split(",")]
            if len(fields) != 3:
                raise RowError(f"expected 'picture, class, coarse class', got {text!r}", "Repair the line")
            path, class_id, _ = fields
            if class_id not in products:
                reason = f"class {class_id!r} is not in classes.csv, or broken there"
                raise RowError(reason, "Repair the line, or the class")
            key = str(PurePosixPath(path).with_suffix(""))
            found = Photograph(key, picture(folder / path, remedy=RESTORE), products[class_id])
        if found is not None:
            yield found


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
            class_id = record[COLUMNS["id"]].strip()
            products[class_id] = Product(
                id=class_id,
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
