"""A user's CSV: each accepted header and separator, and each fault with file, line and remedy."""

from pathlib import Path

import pytest

from multimodal.data import DataError, read_csv

from .conftest import save_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures a.png and shots/b.png."""
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "shots" / "b.png")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "my.csv").write_text(text, encoding="utf-8")
    return folder / "my.csv"


@pytest.mark.parametrize(
    "text",
    [
        "image,question,answer\na.png,What?,Liver\n",
        "\ufeffImage, Prompt ,LABEL\r\na.png,What?,Liver\r\n",
        "answer,path,question\nLiver,a.png,What?",
        "image;question;answer\na.png;What?;Liver\n",
        "image\tquestion\tanswer\na.png\tWhat?\tLiver\n",
        'image,question,answer\n"a.png"," What? ","Liver"\n\n',
    ],
)
def test_every_common_way_to_write_it(folder: Path, text: str) -> None:
    (sample,) = read_csv(write(folder, text))
    assert (sample.question, sample.answer, sample.images) == ("What?", "Liver", (folder / "a.png",))
    assert (sample.id, dict(sample.meta)) == ("my:2", {})


def test_pictures_alone_with_a_label(folder: Path) -> None:
    file = write(folder, "picture,class\na.png,Liver\n")
    assert read_csv(file)[0].question == "What is this?"
    assert read_csv(file, question="Which organ?")[0].question == "Which organ?"
    with pytest.raises(DataError, match="no column question or prompt among picture, class"):
        read_csv(file, question=None)


def test_several_pictures_ids_and_other_columns(folder: Path) -> None:
    text = "image,question,answer,id,ward\na.png; shots/b.png;,What changed?,Nothing,,3\na.png,What?,Liver,q7,\n"
    first, second = read_csv(write(folder, text))
    assert first.images == (folder / "a.png", folder / "shots/b.png")
    assert (first.id, first.meta, second.id, second.meta) == ("my:2", {"ward": "3"}, "q7", {"ward": ""})


def test_a_cell_of_several_lines_keeps_line_numbers(folder: Path) -> None:
    text = 'image,question,answer\na.png,"Which?\n1. Liver\n2. Lung",1\na.png,What?,\n'
    with pytest.raises(DataError, match="the answer is empty") as caught:
        read_csv(write(folder, text))
    assert caught.value.line == 5
    assert read_csv(folder / "my.csv", skip_bad=[])[0].question == "Which?\n1. Liver\n2. Lung"


def test_paths_are_relative_to_the_file_or_to_a_given_folder(folder: Path) -> None:
    (folder / "labels").mkdir()
    file = write(folder / "labels", "image,label\na.png,Liver\n")
    with pytest.raises(DataError, match=r"missing.*image_folder"):
        read_csv(file)
    assert read_csv(file, folder)[0].images == (folder / "a.png",)


BAD = [
    ("a.png,What?", r"the header has 3 columns and this row 2\. Put cells"),
    ("a.png,What?,Liver,more", "the header has 3 columns and this row 4"),
    (",What?,Liver", "the image is empty"),
    ("a.png,,Liver", "the question is empty"),
    ("a.png,What?, ", r"the answer is empty\. Write it, or delete the row"),
    ("gone.png,What?,Liver", r"picture .*gone\.png is missing\. Put it there"),
    ("https://host/a.png,What?,Liver", "is not a path"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_broken_row_is_named(folder: Path, line: str, reason: str) -> None:
    file = write(folder, f"image,question,answer\na.png,What?,Liver\n{line}\n")
    with pytest.raises(DataError, match=reason) as caught:
        read_csv(file)
    assert (caught.value.file, caught.value.line) == (file, 3)


def test_skip_bad_collects_every_error_and_keeps_the_rest(folder: Path) -> None:
    lines = ["image,question,answer", "a.png,What?,first", *(line for line, _ in BAD), "a.png,What?,last"]
    skipped: list[DataError] = []
    samples = read_csv(write(folder, "\n".join(lines)), skip_bad=skipped)
    assert [sample.answer for sample in samples] == ["first", "last"]
    assert [error.line for error in skipped] == list(range(3, 3 + len(BAD)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"no column image or images or picture or file or path among nothing\. Name the columns"),
        ("image,question\n", "no column answer or label or class among image, question"),
        ("image,answer,Image\n", "two columns have the same name"),
        ("image,answer\n" + "a" * 200_000, "broken CSV: field larger than field limit"),
    ],
)
def test_a_file_that_is_no_such_table(folder: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_csv(write(folder, text), skip_bad=[])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"my\.csv: No such file.*Give the path"):
        read_csv(tmp_path / "my.csv", skip_bad=[])
