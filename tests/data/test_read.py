"""`read`: the names that the command line takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from multimodal.data import (
    DataError,
    iterate,
    read,
    read_clothing,
    read_grocery,
    read_grocery_categories,
    read_grocery_descriptions,
    read_slake,
    read_vqa_rad,
    splits_of,
)

from .conftest import slake_record, vqa_rad_record, write_slake, write_vqa_rad


def test_slake(tmp_path: Path) -> None:
    write_slake(tmp_path, [slake_record()], split="validate")
    for split in ("validation", "validate", "val"):
        assert read(f"slake:{tmp_path}", split) == read_slake(tmp_path, "validate")


def test_grocery(grocery: Path) -> None:
    assert read(f"grocery:{grocery}") == read_grocery(grocery)
    for split in ("validation", "validate", "val"):
        assert read(f"grocery:{grocery}", split) == read_grocery(grocery, "val")


def test_every_name(tmp_path: Path, grocery: Path, clothing: Path) -> None:
    write_slake(tmp_path, [slake_record(), slake_record(q_lang="zh", qid=8)])
    write_vqa_rad(tmp_path, [vqa_rad_record(image_name=f"{number}.jpg", qid=number) for number in range(10)])
    assert [sample.id for sample in read(f"slake-zh:{tmp_path}")] == ["slake/8"]
    assert read(f"vqa-rad:{tmp_path}") == read_vqa_rad(tmp_path)
    assert read(f"vqa-rad/3:{tmp_path}", "val") == read_vqa_rad(tmp_path, "validation", fold=3)
    assert read(f"grocery-categories:{grocery}", "validation") == read_grocery_categories(grocery, "val")
    assert read(f"grocery-descriptions:{grocery}", "validation") == read_grocery_descriptions(grocery, "val")
    assert read(f"clothing:{clothing}", "val") == read_clothing(clothing, "validation")


def test_splits_that_are_here(tmp_path: Path, grocery: Path, clothing: Path) -> None:
    assert splits_of(f"slake:{tmp_path}") == ()
    write_slake(tmp_path, [slake_record()], split="validate")
    write_vqa_rad(tmp_path, [vqa_rad_record()])
    assert splits_of(f"slake:{tmp_path}") == ("validation",)
    assert splits_of(f"vqa-rad:{tmp_path}") == ("train",)
    assert splits_of(f"vqa-rad/0:{tmp_path}") == ("train", "validation")
    assert splits_of(f"grocery:{grocery}") == splits_of(f"grocery:{grocery / 'dataset'}") == ("train", "validation")
    assert splits_of(f"clothing:{clothing}") == ("train", "validation")
    assert splits_of("my.jsonl") == splits_of("my.csv") == ("all",)


def test_jsonl_csv_and_skip_bad(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{}\n")
    (tmp_path / "my.csv").write_text("image,label\ngone.png,Liver\n")
    for name in ("my.jsonl", "my.csv"):
        skipped: list[DataError] = []
        assert read(tmp_path / name, skip_bad=skipped) == []
        assert len(skipped) == 1


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n'
    (tmp_path / "my.jsonl").write_text(line + "broken\n")
    samples = iterate(tmp_path / "my.jsonl")
    assert next(samples).answer == "!"
    with pytest.raises(DataError, match="line 2: broken JSON"):
        next(samples)


@pytest.mark.parametrize("name", ["my.txt", "slake:", "slake", "coco:folder", "vqa-rad/5:folder"])
def test_an_unknown_name(name: str) -> None:
    for reader in (read, iterate, splits_of):
        with pytest.raises(DataError, match=r"no reader for this.*Give slake:FOLDER, slake-zh:FOLDER"):
            reader(name)


def test_reading_needs_no_large_library() -> None:
    large = {"torch", "transformers", "datasets", "PIL", "numpy"}
    code = f"import sys, multimodal.data; sys.exit(bool({large} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
