"""Boxes: the published file, its faults, and which of them a question is about."""

import json
from pathlib import Path
from typing import Any

import pytest

from multimodal.data import Box, DataError, read_boxes, read_slake
from multimodal.data.boxes import boxes_for

from .conftest import save_picture, slake_record, write_slake


def write_boxes(picture: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    picture.with_name("detection.json").write_text(text)
    return picture


def labelled(*labels: str) -> tuple[Box, ...]:
    return tuple(Box(label, 0.0, 0.0, 0.5, 0.5) for label in labels)


def test_pixels_become_shares_of_the_picture(tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "source.jpg", (200, 100))
    write_boxes(picture, [{"Liver": [50.0, 25, 100, 50.0]}, {"Mass": [0, 0, 20, 10], "Heart": [1, 1, 1, 1]}])
    liver, mass, heart = read_boxes(picture)
    assert liver == Box("Liver", left=0.25, top=0.25, width=0.5, height=0.5, image=0)
    assert (mass.label, heart.label) == ("Mass", "Heart")


def test_boxes_are_clipped_to_the_picture(tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "source.jpg", (200, 100))
    outside = [{"A": [-20, -10, 40, 20]}, {"B": [180, 90, 99, 99]}, {"C": [300, 0, 5, 5]}, {"D": [5, 5, 0, 5]}]
    first, second = read_boxes(write_boxes(picture, outside))
    assert first == Box("A", 0.0, 0.0, 0.1, 0.1)
    assert (second.left, second.top, second.width, second.height) == pytest.approx((0.9, 0.9, 0.1, 0.1))


def test_no_file_no_boxes(tmp_path: Path) -> None:
    assert read_boxes(save_picture(tmp_path / "source.jpg")) == ()
    assert read_boxes(write_boxes(tmp_path / "source.jpg", [])) == ()


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[\n{"Liver": [1, 2', 2, "broken JSON"),
        ({"Liver": [1, 2, 3, 4]}, None, "expected a list of objects"),
        (["Liver"], None, "expected a list of objects"),
        ([{"Liver": [1, 2, 3]}], None, "box of 'Liver' is not four numbers"),
        ([{"Liver": [1, 2, 3, "4"]}], None, "box of 'Liver' is not four numbers"),
        ([{"Liver": None}], None, "box of 'Liver' is not four numbers: None"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: Any, line: int | None, reason: str) -> None:
    picture = write_boxes(save_picture(tmp_path / "source.jpg"), content)
    with pytest.raises(DataError, match=reason) as caught:
        read_boxes(picture)
    assert (caught.value.file, caught.value.line) == (tmp_path / "detection.json", line)


def test_a_picture_without_a_size(tmp_path: Path) -> None:
    (tmp_path / "source.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"source\.jpg: can't read the picture's size"):
        read_boxes(write_boxes(tmp_path / "source.jpg", [{"Liver": [0, 0, 1, 1]}]))


LUNGS = ("Left Lung", "Right Lung")
KIDNEYS = ("Left Kidney", "Right Kidney")
TUMORS = ("Brain Enhancing Tumor", "Brain Non-enhancing Tumor")


@pytest.mark.parametrize(
    ("question", "answer", "labels", "chosen"),
    [
        # the question names it: case, plural, side
        ("Where is the liver?", "Left", ("Liver", "Spleen"), ("Liver",)),
        ("How many KIDNEYS are there?", "2", KIDNEYS, KIDNEYS),
        ("What color is the left lung?", "Black", LUNGS, ("Left Lung",)),
        ("What color are the left and right lungs?", "Black", LUNGS, LUNGS),
        ("Is there a mass on the upper right lung?", "No", (*LUNGS, "Mass"), ("Right Lung", "Mass")),
        ("What is left of the lung?", "Heart", LUNGS, LUNGS),
        ("What color do the teeth show?", "White", ("Tooth",), ("Tooth",)),
        ("Where is the atelectasis?", "Left Lung", ("Atelectasis", "Atelectasis"), ("Atelectasis", "Atelectasis")),
        ("Does the picture contain liver?", "No", ("Spleen",), ()),
        ("Where is the Prostate?", "Center", ("Prostate",), ("Prostate",)),
        # a name inside a longer one is another thing
        ("Where is the liver cancer?", "Left", ("Liver", "Liver Cancer"), ("Liver Cancer",)),
        ("Can it control the heartbeat?", "No", ("Heart",), ()),
        ("Is there hearing?", "No", ("Left Ear",), ()),
        ("Where is the non-enhancing tumor?", "Top", TUMORS, TUMORS[1:]),
        ("Where is the enhancing tumor?", "Top", TUMORS, TUMORS[:1]),
        ("Where is the brain tumor?", "Top", (*TUMORS, "Brain Edema"), TUMORS),
        # a comparison needs the box of what is the answer
        ("Which is bigger, liver or kidney?", "Liver", ("Liver",), ("Liver",)),
        ("Which is bigger, liver or kidney?", "Kidney", ("Liver",), ()),
        # questions about health lead to the findings, of the place that they name
        ("Is the lung healthy?", "No", ("Pneumonia", "Cardiomegaly"), ("Pneumonia",)),
        ("Is the heart healthy?", "No", ("Pneumonia", "Cardiomegaly"), ("Cardiomegaly",)),
        ("Where is/are the abnormality located?", "Left Lung", ("Left Lung", "Mass"), ("Mass",)),
        ("What disease is shown?", "Brain Edema", ("Brain Edema", *TUMORS), ("Brain Edema",)),
        ("Is the kidney normal?", "Yes", ("Liver Cancer",), ()),
        ("Which hemisphere is normal?", "Left", ("Brain Edema",), ()),
        # else the answer names it, and says little more
        ("What is the largest organ?", "Lung", LUNGS, LUNGS),
        ("What is on the left?", "Heart and Liver", ("Liver", "Heart", "Spleen"), ("Liver", "Heart")),
        ("What is it?", "Lower Left Lung, Right", LUNGS, ("Left Lung",)),
        ("What is it?", "Both Lungs", LUNGS, LUNGS),
        ("What is the cause?", "lung tumor, smoking", LUNGS, ()),
        ("Where is it?", "Above the rectum", ("Rectum",), ()),
        # the same in Chinese
        ("肝脏在哪个位置?", "左侧", ("Liver", "Spleen"), ("Liver",)),
        ("图中左肺显示什么颜色?", "黑色", LUNGS, ("Left Lung",)),
        ("图中右侧肾脏在哪?", "右侧", KIDNEYS, ("Right Kidney",)),
        ("图中有多少个肾脏?", "2", KIDNEYS, KIDNEYS),
        ("图中肺癌在哪?", "左肺", (*LUNGS, "Lung Cancer"), ("Lung Cancer",)),
        ("图中非增强型脑肿瘤在哪里?", "左叶", TUMORS, TUMORS[1:]),
        ("图中脑瘤在哪?", "左叶", TUMORS, TUMORS),
        ("肺是健康的吗?", "不是", ("Pneumonia", "Cardiomegaly"), ("Pneumonia",)),
        ("图中肺哪一侧是正常的?", "左侧", ("Pneumonia",), ()),
        ("图中最大的器官是什么?", "左肺和心脏", (*LUNGS, "Heart"), ("Left Lung", "Heart")),
        ("这是什么?", "肺支气管", (*LUNGS, "Trachea"), ()),
    ],
)
def test_what_a_question_is_about(question: str, answer: str, labels: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    assert boxes_for(question, answer, labelled(*labels)) == labelled(*chosen)


def test_slake_says_where_to_look(tmp_path: Path) -> None:
    asked = [slake_record(question="Where is the liver?"), slake_record(qid=8)]
    write_slake(tmp_path, [*asked, slake_record(qid=9, q_lang="zh", question="肝脏在哪?", answer="左侧")])
    write_boxes(tmp_path / "imgs/xmlab1/source.jpg", [{"Liver": [1, 0, 2, 3]}])
    box = Box("Liver", 0.25, 0.0, 0.5, 1.0)
    assert [sample.boxes for sample in read_slake(tmp_path, language=None)] == [(box,), (), (box,)]


def test_broken_boxes_are_told_once_and_cost_no_question(tmp_path: Path) -> None:
    write_slake(tmp_path, [slake_record(), slake_record(qid=8)])
    write_boxes(tmp_path / "imgs/xmlab1/source.jpg", "[{")
    with pytest.raises(DataError, match=r"detection\.json, line 1: broken JSON"):
        read_slake(tmp_path)
    skipped: list[DataError] = []
    assert [sample.boxes for sample in read_slake(tmp_path, skip_bad=skipped)] == [(), ()]
    assert len(skipped) == 1


@pytest.mark.needs_data
@pytest.mark.parametrize(("language", "number"), [("en", 372), ("zh", 358)])
def test_the_real_boxes(real_data: Path, language: Any, number: int) -> None:
    samples = read_slake(real_data / "slake", "validate", language)
    assert sum(bool(sample.boxes) for sample in samples) == number
