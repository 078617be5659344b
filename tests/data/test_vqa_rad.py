"""VQA-RAD: the published layout, folds by picture, and the real files where they are at hand."""

from pathlib import Path
from typing import Any

import pytest

from multimodal.data import DataError, read, read_vqa_rad
from multimodal.data.vqa_rad import FOLDS

from .conftest import vqa_rad_record, write_vqa_rad


def test_a_record_becomes_a_sample(tmp_path: Path) -> None:
    (sample,) = read_vqa_rad(write_vqa_rad(tmp_path, [vqa_rad_record()]))
    assert (sample.question, sample.answer) == ("What type of imaging is this?", "ultra sound")
    assert sample.images == (tmp_path / "images" / "a.jpg",)
    assert sample.id == "vqa-rad/4"
    assert sample.meta == {"answer_type": "OPEN", "question_type": "MODALITY", "organ": "CHEST"}


@pytest.mark.parametrize(
    ("published", "answer"), [(4, "4"), ("yes", "Yes"), ("NO ", "No"), ("No ", "No"), ("not seen", "not seen")]
)
def test_answers(tmp_path: Path, published: Any, answer: str) -> None:
    (sample,) = read_vqa_rad(write_vqa_rad(tmp_path, [vqa_rad_record(answer=published)]))
    assert sample.answer == answer


def test_folds_share_no_picture_and_leave_none_out(tmp_path: Path) -> None:
    records = [vqa_rad_record(qid=qid, image_name=f"{qid % 12}.jpg") for qid in range(60)]
    write_vqa_rad(tmp_path, records)
    whole = read_vqa_rad(tmp_path)
    held_out = []
    for fold in range(FOLDS):
        train = read(f"vqa-rad/{fold}:{tmp_path}", "train")
        validation = read(f"vqa-rad/{fold}:{tmp_path}", "validation")
        assert not {sample.images for sample in train} & {sample.images for sample in validation}
        assert sorted(sample.id for sample in train + validation) == sorted(sample.id for sample in whole)
        assert len({sample.images for sample in validation}) in (2, 3)
        held_out += validation
    assert sorted(sample.id for sample in held_out) == sorted(sample.id for sample in whole)


def test_folds_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    records = [vqa_rad_record(qid=qid, image_name=f"{qid}.jpg") for qid in range(12)]
    write_vqa_rad(tmp_path / "a", records)
    write_vqa_rad(tmp_path / "b", records[::-1])
    first, second = (read_vqa_rad(tmp_path / name, "validation", fold=1) for name in "ab")
    assert (
        [sample.id for sample in first]
        == [sample.id for sample in second][::-1]
        == [f"vqa-rad/{number}" for number in (2, 3, 5)]
    )


def test_the_test_split_is_the_same_with_and_without_a_fold(tmp_path: Path) -> None:
    write_vqa_rad(tmp_path, [vqa_rad_record(qid=1)], "testset.json")
    assert read(f"vqa-rad:{tmp_path}", "test") == read(f"vqa-rad/2:{tmp_path}", "test")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("a string", "should be an object, not str"),
        (vqa_rad_record(answer=None), "lacks answer"),
        ({"qid": 1}, "lacks image_name, question, answer"),
    ],
)
def test_a_broken_record_is_named_by_its_line(tmp_path: Path, record: Any, reason: str) -> None:
    write_vqa_rad(tmp_path, [vqa_rad_record(), record])
    with pytest.raises(DataError, match=reason) as caught:
        read_vqa_rad(tmp_path)
    assert caught.value.line == 12
    skipped: list[DataError] = []
    assert len(read_vqa_rad(tmp_path, skip_bad=skipped)) == 1
    assert len(skipped) == 1


def test_missing_files_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trainset\.json: No such file.*Give the folder that holds trainset\.json"):
        read_vqa_rad(tmp_path)
    with pytest.raises(ValueError, match=r"no validation split of its own.*vqa-rad/0, .*vqa-rad/4"):
        read(f"vqa-rad:{tmp_path}", "validation")
    with pytest.raises(ValueError, match="no split 'dev'"):
        read_vqa_rad(tmp_path, "dev")
    with pytest.raises(ValueError, match="no fold 5: use 0 to 4"):
        read_vqa_rad(tmp_path, fold=5)
    write_vqa_rad(tmp_path, [vqa_rad_record()])
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(DataError, match=r"picture .*a\.jpg is missing"):
        read_vqa_rad(tmp_path)


@pytest.mark.needs_data
def test_the_real_files(real_data: Path) -> None:
    samples = read_vqa_rad(real_data / "vqa-rad")
    assert len(samples) == 1152 and len({sample.images for sample in samples}) == 111
    assert {sample.meta["answer_type"] for sample in samples} == {"OPEN", "CLOSED"}
    folds = [read_vqa_rad(real_data / "vqa-rad", "validation", fold) for fold in range(FOLDS)]
    assert [len(fold) for fold in folds] == [263, 233, 193, 250, 213]
