"""SLAKE: the published layout, its faults, and the real files where they are at hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from multimodal.data import DataError, read_slake

from .conftest import slake_record, write_slake


def test_a_record_becomes_a_sample(tmp_path: Path) -> None:
    (sample,) = read_slake(write_slake(tmp_path, [slake_record()]))
    assert sample.question == "Which plane is this?"
    assert sample.answer == "Transverse Plane"
    assert sample.images == (tmp_path / "imgs" / "xmlab1" / "source.jpg",)
    assert sample.id == "slake/7"
    assert sample.meta == {
        "answer_type": "OPEN",
        "content_type": "Plane",
        "modality": "MRI",
        "location": "Abdomen",
        "language": "en",
    }


@pytest.mark.parametrize(
    ("language", "published", "answer"),
    [
        ("en", "Left Lung,Lower Right", "Left Lung, Lower Right"),
        ("en", " Left Lung , Lower Right ", "Left Lung, Lower Right"),
        ("zh", "左肺, 右下", "左肺,右下"),
        ("en", "", ""),
    ],
)
def test_stray_white_space_in_answers(tmp_path: Path, language: Any, published: str, answer: str) -> None:
    write_slake(tmp_path, [slake_record(q_lang=language, answer=published)])
    assert [sample.answer for sample in read_slake(tmp_path, language=language)] == [answer]


def test_split_and_language_choose_the_records(tmp_path: Path) -> None:
    write_slake(tmp_path, [slake_record(), slake_record(q_lang="zh", qid=8)])
    write_slake(tmp_path, [slake_record(qid=9)], split="validate")
    chosen = {language: [s.id for s in read_slake(tmp_path, language=language)] for language in ("en", "zh", None)}
    assert chosen == {"en": ["slake/7"], "zh": ["slake/8"], None: ["slake/7", "slake/8"]}
    assert [sample.id for sample in read_slake(tmp_path, "validate")] == ["slake/9"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({key: value for key, value in slake_record().items() if key != "answer"}, "lacks answer"),
        (slake_record(answer=None), "lacks answer"),
        (slake_record(img_name="xmlab2/source.jpg"), "picture .*xmlab2.* is missing"),
        ("a string", "should be an object, not str"),
    ],
)
def test_a_broken_record_is_named_by_its_line(tmp_path: Path, record: Any, reason: str) -> None:
    write_slake(tmp_path, [slake_record(), record, slake_record(qid=8)])
    with pytest.raises(DataError, match=reason) as caught:
        read_slake(tmp_path)
    assert caught.value.line == 2 + len(json.dumps(slake_record(), indent=0).splitlines())
    skipped: list[DataError] = []
    assert [sample.id for sample in read_slake(tmp_path, skip_bad=skipped)] == ["slake/7", "slake/8"]
    assert [str(error) for error in skipped] == [str(caught.value)]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [("[\n{},\n{]", 3, "broken JSON"), ('{"a": []}', 1, "expected a JSON list"), ("", 1, "broken JSON")],
)
def test_a_file_that_is_no_list_of_records(tmp_path: Path, text: str, line: int, reason: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        read_slake(tmp_path, skip_bad=[])
    assert caught.value.line == line


def test_a_missing_file_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.json: No such file.*Give the folder that holds"):
        read_slake(tmp_path, "test")
    with pytest.raises(ValueError, match="no split 'val'"):
        read_slake(tmp_path, "val")
    with pytest.raises(ValueError, match="no language 'fr'"):
        read_slake(tmp_path, language="fr")


def test_empty_list_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(" [ ] \n")
    assert read_slake(tmp_path) == []
    write_slake(tmp_path, [])
    (tmp_path / "train.json").write_text(json.dumps([slake_record(), slake_record(qid=8)]))
    assert len(read_slake(tmp_path)) == 2


@pytest.mark.needs_data
def test_the_real_files(real_data: Path) -> None:
    train, validate = (read_slake(real_data / "slake", split) for split in ("train", "validate"))
    assert (len(train), len(validate)) == (4919, 1053)
    assert [sample.id for sample in train + validate if not sample.answer] == ["slake/1622"]
    assert len(read_slake(real_data / "slake", language=None)) == 4919 + 4878
    assert not {sample.images for sample in train} & {sample.images for sample in validate}
