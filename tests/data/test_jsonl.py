"""JSONL in the messages format: each accepted way to name a picture, and each fault with file, line and remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from multimodal.data import DataError, read_jsonl

from .conftest import save_picture


def line_of(content: Any, answer: Any = "Cardiomegaly", **top: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **top}


def parts(*items: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": item} if isinstance(item, str) else {"type": "image"} | item for item in items]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures a.png and shots/b.png."""
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "shots" / "b.png")
    return tmp_path


def write(folder: Path, *lines: Any) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "my.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder / "my.jsonl"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (line_of(parts({"image": "a.png"}, "What?")), ["a.png"]),
        (line_of(parts({"path": "a.png"}, "What?")), ["a.png"]),
        (line_of(parts({"url": "a.png"}, "What?")), ["a.png"]),
        (line_of([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]), ["a.png"]),
        (line_of(parts("What?", {"path": "a.png"}, {"path": "shots/b.png"})), ["a.png", "b.png"]),
        (line_of(parts({}, {}, "What?"), images=["shots/b.png", "a.png"]), ["b.png", "a.png"]),
        (line_of(parts({}, {"path": "a.png"}, "What?"), images=["shots/b.png"]), ["b.png", "a.png"]),
        (line_of("What?", images=["a.png"]), ["a.png"]),
        (line_of("What?", images=[{"path": "a.png", "bytes": None}]), ["a.png"]),
        (line_of("What?", image="a.png"), ["a.png"]),
        (line_of("<image>What?", images=["a.png"]), ["a.png"]),
        (line_of("<image><image>\nWhat?", images=["a.png", "shots/b.png"]), ["a.png", "b.png"]),
        (line_of(parts("<image>What?"), images=["a.png"]), ["a.png"]),
        ({"image": "a.png", "question": "What?", "answer": "Cardiomegaly"}, ["a.png"]),
        ({"images": ["a.png", "shots/b.png"], "question": "What?", "answer": "Cardiomegaly"}, ["a.png", "b.png"]),
        (line_of("What?"), []),
        (line_of("What?", images=None), []),
        (line_of("What?", parts("Cardiomegaly")), []),
    ],
)
def test_every_common_way_to_name_pictures(folder: Path, line: dict[str, Any], names: list[str]) -> None:
    (sample,) = read_jsonl(write(folder, line))
    assert (sample.question, sample.answer) == ("What?", "Cardiomegaly")
    assert [image.name for image in sample.images] == names
    assert all(image.is_file() for image in sample.images)


def test_what_else_a_line_says_is_kept(folder: Path) -> None:
    line = line_of("What?", id="q1", language="zh", boxes=[[1, 2, 3, 4]])
    line["messages"].insert(0, {"role": "system", "content": "You are a radiologist."})
    (sample,) = read_jsonl(write(folder, line))
    assert sample.id == "q1"
    assert sample.meta == {"language": "zh", "boxes": "[[1, 2, 3, 4]]", "system": "You are a radiologist."}


def test_a_line_without_messages_keeps_the_rest(folder: Path) -> None:
    line = {"question": "What?", "answer": "Cardiomegaly", "language": "en"}
    flat, both = read_jsonl(write(folder, line, line_of("What is it?", question="another", answer="one")))
    assert flat.meta == {"language": "en"}
    assert (both.question, both.answer, both.meta) == ("What is it?", "one", {"question": "another"})


def test_text_is_kept_as_it_is(folder: Path) -> None:
    (sample,) = read_jsonl(write(folder, line_of("Which?\n1. Liver\n2. Lung\u2028end", "Both:\nliver, lung")))
    assert sample.question == "Which?\n1. Liver\n2. Lung\u2028end"
    assert sample.answer == "Both:\nliver, lung"


def test_ids_and_empty_lines(folder: Path) -> None:
    assert [sample.id for sample in read_jsonl(write(folder, line_of("a"), "", line_of("b")))] == ["my:1", "my:3"]


def test_paths_are_relative_to_the_file_or_to_a_given_folder(folder: Path) -> None:
    (folder / "labels").mkdir()
    file = write(folder / "labels", line_of("What?", images=["shots/b.png"]))
    with pytest.raises(DataError, match=r"missing.*image_folder"):
        read_jsonl(file)
    assert read_jsonl(file, folder)[0].images == (folder / "shots" / "b.png",)
    absolute = write(folder / "labels", line_of("What?", images=[str(folder / "a.png")]))
    assert read_jsonl(absolute)[0].images == (folder / "a.png",)


BAD = [
    ('{"messages": [', r"broken JSON: .* \(column \d+\)\. Write one JSON object a line"),
    ("[]", "should be an object, not list"),
    ({"prompt": "What?"}, r"no list of 'messages' among the keys \['prompt'\]\. Write the line like"),
    ({"question": "What?"}, r"no list of 'messages' among the keys \['question'\]"),
    ({"question": "What?", "answer": None}, "the assistant's message has no 'content'"),
    ({"messages": "What?"}, "no list of 'messages'"),
    ({"messages": []}, "found nothing"),
    ({"messages": line_of("a")["messages"][:1]}, r"found user\. Write one line for each question"),
    ({"messages": line_of("a")["messages"] * 2}, "found user, assistant, user, assistant"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "the user's message has no 'content'"),
    (line_of("What?", None), "the assistant's message has no 'content'"),
    (line_of(" "), "the question is empty"),
    (line_of("What?", ""), "the answer is empty"),
    (line_of("What?", images=["gone.png"]), r"picture .*gone\.png is missing\. Put it there"),
    (line_of("What?", images=["https://host/a.png"]), "is not a path"),
    (line_of("What?", images=["data:image/png;base64,AAAA"]), "is not a path"),
    (line_of("What?", images=[None]), "can't read the picture entry None"),
    (line_of("What?", images=[{"bytes": "AAAA"}]), "can't read the picture entry"),
    (line_of("<image><image>What?", images=["a.png"]), "2 placeholders but 1 pictures are listed"),
    (line_of("<image>What?"), "1 placeholders but 0 pictures"),
    (line_of(parts({}, "What?")), "1 placeholders but 0 pictures"),
    (line_of(parts({"path": "a.png"}, "What?"), images=["a.png"]), "0 placeholders but 1 pictures"),
    (line_of(parts({"path": "a.png"}, "Before", {"path": "a.png"}, "What?")), "text stands between two pictures"),
    (line_of([{"type": "video", "path": "a.mp4"}]), "can't read the content part"),
    (line_of(["What?"]), "can't read the content part"),
    (line_of(7), "can't read the content part 7"),
    (line_of("What?", parts({"path": "a.png"}, "This")), "not the user's holds a picture"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_broken_line_is_named(folder: Path, line: Any, reason: str) -> None:
    file = write(folder, line_of("first"), line)
    with pytest.raises(DataError, match=reason) as caught:
        read_jsonl(file)
    assert (caught.value.file, caught.value.line) == (file, 2)
    assert caught.value.remedy in str(caught.value)


def test_skip_bad_collects_every_error_and_keeps_the_rest(folder: Path) -> None:
    skipped: list[DataError] = []
    file = write(folder, line_of("first"), *(line for line, _ in BAD), line_of("last"))
    assert [sample.question for sample in read_jsonl(file, skip_bad=skipped)] == ["first", "last"]
    assert [error.line for error in skipped] == list(range(2, 2 + len(BAD)))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"my\.jsonl: No such file.*Give the path"):
        read_jsonl(tmp_path / "my.jsonl", skip_bad=[])
