"""Clothing: folders of classes, their faults, and the real ones where they are at hand."""

from pathlib import Path

import pytest

from multimodal.data import DataError, read_clothing
from multimodal.data.clothing import CLOTHING_QUESTIONS


def test_a_picture_becomes_a_sample(clothing: Path) -> None:
    (sample,) = read_clothing(clothing, "validation")
    assert (sample.question, sample.answer) == ("What kind of clothing is this?", "Hat")
    assert sample.images == (clothing / "validation/hat/new.PNG",)
    assert sample.id == "clothing/validation/hat/new"
    assert sample.meta == {"class": "hat"}


def test_answers_are_plain_words_in_the_order_of_names(clothing: Path) -> None:
    assert [sample.answer for sample in read_clothing(clothing)] == [
        answer for answer in ("Hat", "Long sleeve", "T-shirt") for _ in range(2)
    ]


def test_training_phrasings_vary(clothing: Path) -> None:
    asked = {sample.question for seed in range(10) for sample in read_clothing(clothing, seed=seed)}
    assert asked == set(CLOTHING_QUESTIONS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("train/notes.txt", "a file stands among the class folders"), ("train/hat/notes.txt", "not a picture's name")],
)
def test_a_stray_file_is_named(clothing: Path, name: str, reason: str) -> None:
    (clothing / name).touch()
    (clothing / "train/hat/.DS_Store").touch()
    with pytest.raises(DataError, match=reason) as caught:
        read_clothing(clothing)
    assert caught.value.file == clothing / name
    skipped: list[DataError] = []
    assert len(read_clothing(clothing, skip_bad=skipped)) == 6
    assert len(skipped) == 1


def test_missing_folders_and_wrong_names(clothing: Path) -> None:
    with pytest.raises(DataError, match=r"test: No such file.*Give the folder that holds train/"):
        read_clothing(clothing, "test")
    with pytest.raises(ValueError, match="no split 'val'"):
        read_clothing(clothing, "val")
    (clothing / "test").mkdir()
    with pytest.raises(DataError, match="no class folders here"):
        read_clothing(clothing, "test")


@pytest.mark.needs_data
def test_the_real_files(real_data: Path) -> None:
    train, validation = (read_clothing(real_data / "clothing", split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (3068, 341)
    answers = {"Dress", "Hat", "Long sleeve", "Outerwear", "Pants", "Shirt", "Shoes", "Shorts", "Skirt", "T-shirt"}
    assert {sample.answer for sample in train} == {sample.answer for sample in validation} == answers
