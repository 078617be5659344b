"""Grocery Store: the published layout, its faults, and the real files where they are at hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from multimodal.data import DataError, read, read_grocery, read_grocery_categories, read_grocery_descriptions
from multimodal.data.grocery import CATEGORY_QUESTIONS, DESCRIPTION_QUESTIONS, NAME_QUESTIONS


def test_a_photograph_becomes_a_sample(grocery: Path) -> None:
    first, second = read_grocery(grocery, "val")
    assert (first.question, first.answer) == ("What product is this?", "Golden Delicious")
    assert first.images == (grocery / "dataset/val/Fruit/Apple/Golden-Delicious/Golden-Delicious_000.jpg",)
    assert first.id == "grocery/val/Fruit/Apple/Golden-Delicious/Golden-Delicious_000"
    assert first.meta == {"class_id": "0", "coarse_class": "Apple"}
    assert (second.answer, second.meta["coarse_class"]) == ("Oatly Oat Milk", "Oat Milk")


def test_the_folder_itself_or_its_parent(grocery: Path) -> None:
    assert read_grocery(grocery) == read_grocery(grocery / "dataset")
    assert len(read_grocery(grocery)) == 4


def test_training_phrasings_vary_and_stay(grocery: Path) -> None:
    asked = [tuple(sample.question for sample in read_grocery(grocery, seed=seed)) for seed in range(10)]
    assert len(set(asked)) > 1
    assert {question for questions in asked for question in questions} == set(NAME_QUESTIONS)
    assert asked[0] == tuple(sample.question for sample in read_grocery(grocery))
    assert {sample.question for seed in range(10) for sample in read_grocery(grocery, "val", seed=seed)} == {
        NAME_QUESTIONS[0]
    }


def test_categories(grocery: Path) -> None:
    first, second = read_grocery_categories(grocery, "val")
    assert (first.question, first.answer) == ("What kind of product is this?", "Apple")
    assert (second.answer, second.meta) == ("Oat Milk", {"class_id": "1", "name": "Oatly Oat Milk"})
    assert first.images == read_grocery(grocery, "val")[0].images
    assert first.id == "grocery/category/val/Fruit/Apple/Golden-Delicious/Golden-Delicious_000"
    asked = {sample.question for seed in range(10) for sample in read_grocery_categories(grocery, seed=seed)}
    assert asked == set(CATEGORY_QUESTIONS)


def test_brands_of_packages(grocery: Path) -> None:
    """What grows has none."""
    (sample,) = read(f"grocery-brands:{grocery}", "validation")
    assert (sample.question, sample.answer) == ("Which brand is printed on this package?", "Oatly")
    assert sample.images[0].name == "Oatly-Oat-Milk_000.jpg" and sample.meta["name"] == "Oatly Oat Milk"


def test_descriptions_in_training(grocery: Path) -> None:
    first, second, *photographs = read_grocery_descriptions(grocery)
    assert first.answer == "Golden-Delicious tastes good. From Arlagårdar."
    assert [first.images[0].name, second.images[0].name] == [
        "Golden-Delicious_Iconic.jpg",
        "Oatly-Oat-Milk_Iconic.jpg",
    ]
    assert first.id == "grocery/description/0"
    assert first.meta == {"class_id": "0", "coarse_class": "Apple", "name": "Golden Delicious"}
    assert [sample.images for sample in photographs] == [sample.images for sample in read_grocery(grocery)]
    assert [sample.answer for sample in photographs] == [first.answer] * 2 + [second.answer] * 2
    asked = {sample.question for seed in range(10) for sample in read_grocery_descriptions(grocery, seed=seed)}
    assert asked == set(DESCRIPTION_QUESTIONS)


def test_descriptions_in_evaluation(grocery: Path) -> None:
    samples = [sample for seed in range(10) for sample in read_grocery_descriptions(grocery, "val", seed=seed)]
    assert {sample.question for sample in samples} == {"Describe this product for a shop."}
    assert {sample.images for sample in samples} == {sample.images for sample in read_grocery(grocery, "val")}


def append(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(file.read_text() + text)


@pytest.mark.parametrize(
    ("name", "spoil", "line", "reason"),
    [
        ("train.txt", append("train/a.jpg, 0\n"), 5, "expected 'picture, class, coarse class'"),
        ("train.txt", append("train/a.jpg, 99, 0\n"), 5, "class '99' is not in classes.csv"),
        ("train.txt", append("\ntrain/a.jpg, 0, 0\n"), 6, "picture .*a.jpg is missing"),
        ("classes.csv", append("Kiwi,2,Kiwi\n"), 4, r"no value for Iconic Image Path"),
    ],
)
def test_a_broken_line_is_named(
    grocery: Path, name: str, spoil: Callable[[Path], object], line: int, reason: str
) -> None:
    spoil(grocery / "dataset" / name)
    with pytest.raises(DataError, match=reason) as caught:
        read_grocery(grocery)
    assert (caught.value.file, caught.value.line) == (grocery / "dataset" / name, line)
    skipped: list[DataError] = []
    assert len(read_grocery(grocery, skip_bad=skipped)) == 4
    assert [str(error) for error in skipped] == [str(caught.value)]


@pytest.mark.parametrize(
    ("spoil", "reason", "lost"),
    [
        (lambda text, picture: text.unlink(), "description .* is missing", 3),
        (lambda text, picture: text.write_text(" \n"), "description .* is empty", 3),
        (lambda text, picture: picture.unlink(), "picture .* is missing", 1),
    ],
)
def test_a_broken_product_is_named(
    grocery: Path, spoil: Callable[[Path, Path], object], reason: str, lost: int
) -> None:
    folder = grocery / "dataset/iconic-images-and-descriptions/Packages/Oat-Milk/Oatly-Oat-Milk"
    spoil(folder / "Oatly-Oat-Milk_Description.txt", folder / "Oatly-Oat-Milk_Iconic.jpg")
    with pytest.raises(DataError, match=reason) as caught:
        read_grocery_descriptions(grocery)
    assert (caught.value.file.name, caught.value.line) == ("classes.csv", 3)
    skipped: list[DataError] = []
    assert len(read_grocery_descriptions(grocery, skip_bad=skipped)) == 6 - lost
    assert len(skipped) == lost  # the product, and each photograph that so has no description


def test_missing_files_and_wrong_names(grocery: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no classes\.csv here.*Give the folder"):
        read_grocery(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"test\.txt: No such file"):
        read_grocery(grocery, "test")
    with pytest.raises(ValueError, match="no split 'validate'"):
        read_grocery(grocery, "validate")
    (grocery / "dataset" / "classes.csv").write_text("Class Name (str),Class ID (int)\n")
    with pytest.raises(DataError, match=r"the columns Coarse Class Name .* are missing"):
        read_grocery(grocery)


@pytest.mark.needs_data
def test_the_real_files(real_data: Path) -> None:
    train, val = (read_grocery(real_data / "grocery", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2640, 296)
    assert len({sample.answer for sample in train}) == 81
    assert {sample.answer for sample in read_grocery_categories(real_data / "grocery", "val")} <= {
        sample.answer for sample in read_grocery_categories(real_data / "grocery")
    }
    assert len(read_grocery_descriptions(real_data / "grocery")) == 2640 + 81
    assert len(read_grocery_descriptions(real_data / "grocery", "val")) == 296
