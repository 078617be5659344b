"""`describe`: figures, and the leak check by content and by look; the command that prints them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from multimodal.cli import main
from multimodal.data import DataError, read
from multimodal.data.describe import describe, warnings_of
from multimodal.data.leaks import NEAR, difference_hash, find_leaks, fingerprints

from .conftest import save_drawing, save_picture, slake_record, write_slake


def write_csv(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> str:
    lines = ["image,question,answer", *(",".join(row) for row in rows)]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / name)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """Six rows on two pictures: one repeated, two that contradict each other."""
    save_drawing(tmp_path / "a.png", 1)
    save_drawing(tmp_path / "b.png", 2)
    rows = [
        ("a.png", "What?", "Liver"),
        ("a.png", "what", "liver."),
        ("a.png", "Where?", "On the left side"),
        ("b.png", "What?", "Lung"),
        ("b.png", "What?", "Heart"),
        ("b.png", "Which?", "Liver"),
    ]
    return write_csv(tmp_path, "my.csv", rows)


def test_figures(mine: str) -> None:
    (split,) = describe([mine]).splits
    assert (split.split, split.questions, split.pictures, split.boxed, split.bad) == ("all", 6, 2, 0, 0)
    assert (split.words.median, split.words.longest) == (1, 4)
    assert (split.characters.median, split.characters.longest) == (5, 16)
    assert split.answers == 4
    assert split.frequent[0] == ("Liver", 3)
    assert split.repeated == 1
    assert split.contradicting == (("my:5", "my:6"),)


def test_the_same_picture_under_another_name_is_the_same_question(tmp_path: Path, mine: str) -> None:
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    other = write_csv(tmp_path, "other.csv", [("a.png", "What?", "Liver"), ("copy.png", "What?", "Spleen")])
    assert describe([other]).splits[0].contradicting == (("other:2", "other:3"),)


def test_no_rows(tmp_path: Path) -> None:
    found = describe([write_csv(tmp_path, "none.csv", [])])
    assert found.splits[0].questions == 0 and not found.leaks


def test_splits_that_are_here(clothing: Path) -> None:
    names = [f"clothing:{clothing}"]
    assert [split.split for split in describe(names).splits] == ["train", "validation"]
    assert [split.split for split in describe(names, "val").splits] == ["validation"]
    with pytest.raises(DataError, match=r"test: No such file"):
        describe(names, "test")
    with pytest.raises(DataError, match=r"train: No such file"):
        describe([f"clothing:{clothing / 'elsewhere'}"])


class TestLeaks:
    def test_none(self, clothing: Path) -> None:
        assert describe([f"clothing:{clothing}"]).leaks == ()

    def test_the_same_bytes(self, clothing: Path) -> None:
        source, copy = clothing / "train/hat/hat0.jpg", clothing / "validation/hat/other.jpg"
        shutil.copy(source, copy)
        (leak,) = describe([f"clothing:{clothing}"]).leaks
        assert (leak.first, leak.second, leak.exact) == (source, copy, True)
        assert (leak.first_in, leak.second_in) == (
            ((f"clothing:{clothing}", "train"),),
            ((f"clothing:{clothing}", "validation"),),
        )

    def test_a_copy_that_was_made_smaller(self, clothing: Path) -> None:
        source, copy = clothing / "train/hat/hat0.jpg", clothing / "validation/hat/other.jpg"
        with Image.open(source) as image:
            image.resize((60, 60)).save(copy, quality=60)
        (leak,) = describe([f"clothing:{clothing}"], "train").leaks
        assert (leak.first, leak.second, leak.exact) == (source, copy, False)
        assert 0 <= leak.difference <= NEAR

    def test_copies_within_a_split_are_none(self, clothing: Path) -> None:
        shutil.copy(clothing / "train/hat/hat0.jpg", clothing / "train/hat/hat2.jpg")
        assert describe([f"clothing:{clothing}"]).leaks == ()

    def test_one_file_in_two_splits(self, tmp_path: Path) -> None:
        for split in ("train", "validate"):
            write_slake(tmp_path, [slake_record()], split)
        (leak,) = describe([f"slake:{tmp_path}", f"slake-zh:{tmp_path}"]).leaks
        assert leak.first == leak.second == tmp_path / "imgs/xmlab1/source.jpg"

    def test_across_data_sets(self, tmp_path: Path, clothing: Path) -> None:
        shutil.copy(clothing / "train/hat/hat0.jpg", tmp_path / "mine.jpg")
        files = [write_csv(tmp_path, name, [("mine.jpg", "What?", "Hat")]) for name in ("one.csv", "two.csv")]
        assert len(describe([f"clothing:{clothing}", files[0]]).leaks) == 1
        assert [leak.first.name for leak in describe(files).leaks] == ["mine.jpg"]
        assert describe([files[0], files[0]]).leaks == ()

    def test_training_splits_may_share_pictures(self, grocery: Path) -> None:
        for number, sample in enumerate(read(f"grocery:{grocery}") + read(f"grocery:{grocery}", "val")):
            save_drawing(sample.images[0], number)
        assert describe([f"grocery:{grocery}", f"grocery-categories:{grocery}"]).leaks == ()

    def test_pictures_of_one_colour_look_like_no_other(self, tmp_path: Path) -> None:
        with Image.open(save_picture(tmp_path / "a.png", (40, 30))) as image:
            assert difference_hash(image.convert("RGB")) is None
        save_picture(tmp_path / "b.png", (30, 40))
        names = [write_csv(tmp_path, f"{name}.csv", [(f"{name}.png", "What?", "Red")]) for name in "ab"]
        assert describe(names).leaks == ()

    def test_the_warning_names_the_pairs_and_counts_them_all(self, clothing: Path) -> None:
        for number in range(3):
            save_drawing(clothing / f"train/hat/more{number}.png", 200 + number)
            shutil.copy(clothing / f"train/hat/more{number}.png", clothing / f"validation/hat/same{number}.png")
        (warning,) = warnings_of(describe([f"clothing:{clothing}"]), shown=2)
        title, first, _, more = warning.splitlines()
        assert title == (
            f"leak: 3 x the same picture in clothing:{clothing} train and in clothing:{clothing} validation:"
        )
        assert first == f"  {clothing}/train/hat/more0.png = {clothing}/validation/hat/same0.png"
        assert more == "  ... and 1 more (--json names all)"


class TestCommand:
    def test_tables_and_warnings(self, mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with Path(mine).open("a") as file:
            file.write("\ngone.png,What?,Liver\nbroken.png,What?,Liver")
        (tmp_path / "broken.png").write_bytes(b"no picture")
        assert main(["describe", "--data", mine]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "│ questions │ 7 │" in printed and "│ rows that could not be read │ 1 │" in printed
        assert f"2 could not be read: {mine}, line 8: the picture {tmp_path}/gone.png is missing" in printed
        assert f"{tmp_path}/broken.png: " in printed
        assert "1 x rows that ask the same about the same pictures, with different answers: my:5, my:6" in printed
        assert "no picture stands in two splits" in printed

    def test_json(self, clothing: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copy(clothing / "train/hat/hat0.jpg", clothing / "validation/hat/other.jpg")
        (clothing / "train/notes.txt").touch()
        assert main(["describe", "--data", f"clothing:{clothing}", "--split", "validation", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [split["questions"] for split in found["splits"]] == [2]
        assert found["splits"][0]["frequent"] == [["Hat", 2]]
        assert [Path(error["file"]).name for error in found["bad"]] == ["notes.txt"]
        assert [leak["exact"] for leak in found["leaks"]] == [True]

    def test_an_unknown_name_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["describe", "--data", "coco:folder"]) == 1
        assert "no reader for this" in capsys.readouterr().err


@pytest.mark.needs_data
def test_the_limit_holds_on_real_pictures(real_data: Path, tmp_path: Path) -> None:
    """Copies of every fifteenth training picture are found, and no other picture is taken for one of them."""
    pictures = list(dict.fromkeys(sample.images[0] for sample in read(f"slake:{real_data / 'slake'}")))[::15]
    copies = []
    for number, path in enumerate(pictures):
        with Image.open(path) as image:
            copies.append(tmp_path / f"{number}.jpg")
            image.convert("RGB").resize((image.width // 2, image.height // 2)).save(copies[-1], quality=70)
    places = {path: [("slake", "train")] for path in pictures} | {path: [("mine", "all")] for path in copies}
    leaks = find_leaks(places, fingerprints(places, broken=[]))
    found = [(leak.first, leak.second) for leak in leaks]
    assert sum(pair in found for pair in zip(pictures, copies, strict=True)) >= 0.95 * len(pictures)
    assert len(found) <= len(pictures)
