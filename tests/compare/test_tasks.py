# ruff: noqa: RUF001
"""What is asked: the same draw every time, one name for each question, errors that name the line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from multimodal.compare.tasks import make_task
from multimodal.data import DataError
from tests.data.conftest import grocery, save_picture, slake_record, write_slake  # noqa: F401


def line(question: str, answer: str, *images: str, **more: Any) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "images": list(images), **more}, ensure_ascii=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for number in range(5):
        save_picture(tmp_path / "pictures" / f"{number}.png", (4 + number, 3))
    lines = [line(f"Question {number}?", f"answer {number}", f"pictures/{number % 5}.png") for number in range(30)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "mine.jsonl"


def test_a_file_of_ones_own(own: Path) -> None:
    task = make_task(str(own))
    assert (task.name, len(task.samples), task.metric) == ("mine", 30, "exact")
    assert [sample.id for sample in task.samples][:2] == ["mine:1", "mine:2"]
    assert task.samples[7].images == (own.parent / "pictures" / "2.png",)
    assert task.max_new_tokens == 32


def test_a_draw_is_the_same_every_time_and_from_everywhere(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = make_task(str(own), limit=8, seed=3)
    assert len(drawn.samples) == 8 and drawn == make_task(str(own), limit=8, seed=3)
    places = [int(sample.id.partition(":")[2]) for sample in drawn.samples]
    assert places == sorted(places) != list(range(1, 9))
    assert drawn.samples != make_task(str(own), limit=8, seed=4).samples
    monkeypatch.chdir(own.parent)
    assert [sample.id for sample in make_task("mine.jsonl", limit=8, seed=3).samples] == [
        sample.id for sample in drawn.samples
    ]


def test_a_limit_beyond_what_is_there_takes_all(own: Path) -> None:
    assert make_task(str(own), limit=100) == make_task(str(own))


def test_pictures_are_found_from_every_folder(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(path.is_absolute() and path.exists() for each in make_task(own.name).samples for path in each.images)


def test_no_two_questions_have_one_name(tmp_path: Path) -> None:
    names = ["a", "a", "a (2)", "b", "a", "a (2)"]
    (tmp_path / "mine.jsonl").write_text("\n".join(line("Q?", "A", id=name) for name in names))
    found = [sample.id for sample in make_task(str(tmp_path / "mine.jsonl")).samples]
    assert found[:2] == ["a", "a (2)"] and len(set(found)) == len(names)
    assert found == [sample.id for sample in make_task(str(tmp_path / "mine.jsonl")).samples]


def test_answers_that_are_sentences_are_scored_as_such(tmp_path: Path) -> None:
    sentence = "A crisp and sweet apple with thin red skin that keeps for weeks in a cool place. " * 3
    (tmp_path / "mine.jsonl").write_text("\n".join(line("Describe it.", sentence) for _ in range(3)))
    task = make_task(str(tmp_path / "mine.jsonl"))
    assert task.metric == "rouge_l" and len(sentence) / 4 < task.max_new_tokens < len(sentence)


def test_a_chinese_answer_has_room(tmp_path: Path) -> None:
    answer = "苹果" * 60
    (tmp_path / "mine.jsonl").write_text(line("这是什么？", answer))
    assert make_task(str(tmp_path / "mine.jsonl")).max_new_tokens > len(answer)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"messages": [', "broken JSON"),
        (line("", "no"), "the question is empty"),
        (line("What?", "that", "pictures/gone.png"), "gone.png"),
    ],
)
def test_a_broken_line_is_named_or_left_out(own: Path, broken: str, said: str) -> None:
    lines = own.read_text().splitlines()
    own.write_text("\n".join([*lines[:3], broken, *lines[3:]]))
    with pytest.raises(DataError, match=said) as caught:
        make_task(str(own))
    assert (caught.value.file, caught.value.line) == (own, 4)
    bad: list[DataError] = []
    assert len(make_task(str(own), skip_bad=bad).samples) == 30
    assert [(error.file, error.line) for error in bad] == [(own, 4)]


def test_a_data_set_by_name_under_a_root(tmp_path: Path) -> None:
    records = [slake_record(qid=number, question=f"Q{number}?") for number in range(3)]
    chinese = slake_record(qid=9, q_lang="zh", question="这是什么？", answer="肺")
    write_slake(tmp_path / "slake", [*records, chinese], "validate")
    task = make_task("slake", root=tmp_path)
    assert (task.name, [sample.question for sample in task.samples]) == ("slake", ["Q0?", "Q1?", "Q2?"])
    assert make_task(f"slake:{tmp_path / 'slake'}").samples == task.samples
    assert [sample.answer for sample in make_task("slake-zh", root=tmp_path).samples] == ["肺"]


def test_an_empty_split_says_which_there_are(tmp_path: Path) -> None:
    write_slake(tmp_path / "slake", [], "validate")
    write_slake(tmp_path / "slake", [slake_record()], "train")
    with pytest.raises(DataError, match=r"no question is in its validation split.*Its splits are: .*train"):
        make_task("slake", root=tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        make_task(str(tmp_path / "mine.jsonl"))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        make_task(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="slak"):
        make_task("slak", root=tmp_path)
    with pytest.raises(DataError, match=r"Give the folder"):
        make_task("slake", root=tmp_path)


def test_what_grows_and_what_is_packed_are_shown_apart(grocery: Path) -> None:  # noqa: F811
    shutil.copytree(grocery / "dataset", grocery / "root" / "grocery" / "dataset")
    task = make_task("grocery", root=grocery / "root")
    assert task.name == "grocery"
    assert {sample.answer: sample.meta["subsets"] for sample in task.samples} == {
        "Golden Delicious": "fruit_and_vegetables",
        "Oatly Oat Milk": "packages",
    }
    assert all("subsets" in each.meta for each in make_task("grocery-descriptions", root=grocery / "root").samples)


def test_a_folder_of_that_name_makes_no_subset_elsewhere(tmp_path: Path) -> None:
    save_picture(tmp_path / "Fruit" / "a.png")
    (tmp_path / "mine.jsonl").write_text(line("What?", "an apple", "Fruit/a.png"))
    assert "subsets" not in make_task(str(tmp_path / "mine.jsonl")).samples[0].meta
