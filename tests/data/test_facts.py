"""Facts of a picture: what each kind of question states, in both languages, and that nothing is made up."""

import json
from pathlib import Path

import pytest

from multimodal.data import read_slake
from multimodal.data.facts import Fact, consistent, picture_facts, stated
from multimodal.data.sample import Sample
from multimodal.data.terms import FINDINGS, ORGANS, names, places, says, without

from .conftest import slake_record, write_slake


def sample(question: str, answer: str, content: str = "Organ") -> Sample:
    return Sample(question, answer, (Path("xmlab1/source.jpg"),), meta={"content_type": content})


def of(question: str, answer: str, content: str = "Organ") -> set[tuple[str, str, str]]:
    return {(fact.kind, fact.subject, fact.value) for fact in stated(sample(question, answer, content))}


@pytest.mark.parametrize(
    ("question", "answer", "facts"),
    [
        ("What modality is used to take this image?", "X-Ray", {("modality", "picture", "X-ray")}),
        ("这张照片是怎么拍的?", "核磁共振", {("modality", "picture", "MRI")}),
        ("Is this a CT scan?", "No", {("modality", "picture", "not CT")}),
        ("Is this an MRI image with T2 weighted?", "No", {("weighting", "picture", "not T2")}),
        ("What is the mr weighting in this image?", "T1", {("weighting", "picture", "T1")}),
        ("What is the scanning plane of this image?", "Transverse Plane", {("plane", "picture", "transverse")}),
        ("这是矢状面吗?", "不是", {("plane", "picture", "not sagittal")}),
        ("Which part of the body does this image belong to?", "Brain", {("region", "picture", "head")}),
        ("What organ system is pictured?", "Chest", {("region", "picture", "chest")}),
        ("这张图像是关于盆腔吗?", "不是", {("region", "picture", "not pelvis")}),
        ("Does the picture contain liver?", "No", {("organ", "liver", "absent")}),
        ("图片中包含肾脏吗?", "包含", {("organ", "kidney", "present")}),
        ("What is the main organ in the image?", "Lung, Heart", {("organ", n, "present") for n in ("lung", "heart")}),
        ("Where is the liver?", "Upper Left", {("organ", "liver", "present"), ("position", "liver", "upper left")}),
        ("Where is the liver?", "Not seen", {("organ", "liver", "absent")}),
        ("Which is the kidney?", "Upper left of spleen", {("organ", "kidney", "present")}),
        ("肝脏在哪个位置?", "不存在", {("organ", "liver", "absent")}),
        ("How many kidneys in this image?", "0", {("count", "kidney", "0"), ("organ", "kidney", "absent")}),
        ("Is the lung healthy?", "No", {("health", "lung", "abnormal"), ("health", "picture", "abnormal")}),
        ("Is the liver not healthy?", "No", {("health", "liver", "healthy")}),
        ("肝脏是健康的吗?", "健康", {("health", "liver", "healthy")}),
        ("这张图片看起来正常吗?", "不正常", {("health", "picture", "abnormal")}),
        ("Does this image look normal?", "Yes", {("health", "picture", "healthy")}),
        ("What are the white veins in the picture?", "The weather", set()),
        ("Does the picture contain liver?", "", set()),
    ],
)
def test_what_a_question_states(question: str, answer: str, facts: set[tuple[str, str, str]]) -> None:
    assert of(question, answer) == facts


@pytest.mark.parametrize(
    ("question", "answer", "facts"),
    [
        (
            "What diseases are included in the picture?",
            "Noudle, Effusion",
            {("finding", "nodule", "present"), ("finding", "effusion", "present")}
            | {("findings", "picture", "effusion, nodule"), ("health", "picture", "abnormal")},
        ),
        (
            "图片中包含哪些疾病?",
            "无",
            {("findings", "picture", "none"), ("health", "picture", "healthy")},
        ),
        (
            "What disease is/are shown on the right of brain?",
            "Brain Edema",
            {("finding", "brain edema", "present"), ("place", "brain edema", "right lobe")}
            | {("health", "picture", "abnormal")},
        ),
        ("Can pneumonia be observed on the lower right lung in this picture?", "No", set()),
        (
            "Can pneumonia be observed on the lower right lung in this picture?",
            "Yes",
            {("finding", "pneumonia", "present"), ("place", "pneumonia", "lower right lung")}
            | {("health", "picture", "abnormal")},
        ),
        ("Does the patient have liver cancer?", "No", {("finding", "liver cancer", "absent")}),
        (
            "Where is/are the abnormality located?",
            "Left Lung, Lower Right",
            {("place", "abnormality", "lower left lung"), ("health", "picture", "abnormal")},
        ),
        (
            "图中肺哪一侧是异常的,左侧还是右侧?",
            "右侧",
            {("place", "abnormality", "right lung"), ("health", "picture", "abnormal")},
        ),
        ("Which lobe is normal in this image?", "Left", {("place", "abnormality", "not left lobe")}),
        ("Is/Are there abnormalities in the patient's left lung?", "No", {("place", "abnormality", "not left lung")}),
        (
            "Which organ is abnormal, heart or lung?",
            "Both",
            {("health", subject, "abnormal") for subject in ("heart", "lung", "picture")},
        ),
    ],
)
def test_what_a_question_about_findings_states(question: str, answer: str, facts: set[tuple[str, str, str]]) -> None:
    assert of(question, answer, "Abnormality") == facts


def test_other_kinds_of_question() -> None:
    assert of("What color is the lung in the picture?", "Black", "Color") == {
        ("organ", "lung", "present"),
        ("colour", "lung", "black"),
    }
    assert of("What is the largest organ in the picture?", "Liver", "Size") == {
        ("organ", "liver", "present"),
        ("largest", "picture", "liver"),
    }
    assert of("Which is bigger in this image, liver or heart?", "Almost the same", "Size") == set()
    assert of("图片中哪个器官属于循环系统?", "心脏", "KG") == {("organ", "heart", "present")}
    assert (
        of("How to treat the disease located on the left of lung in this image?", "Surgical treatment", "KG") == set()
    )


def test_contradictions_are_dropped() -> None:
    present, absent = Fact("organ", "liver", "present"), Fact("organ", "liver", "absent")
    heart = Fact("organ", "heart", "present")
    assert consistent([present, absent, heart]) == {heart}
    chest, denied = Fact("region", "picture", "chest"), Fact("region", "picture", "not chest")
    assert consistent([chest, denied]) == set()
    assert consistent([chest, Fact("region", "picture", "abdomen")]) == set()
    assert consistent([chest, Fact("region", "picture", "not head")]) == {chest, Fact("region", "picture", "not head")}
    places_of_it = {Fact("place", "abnormality", f"{side} lung") for side in ("left", "right")}
    assert consistent(places_of_it) == places_of_it


def test_a_finding_outside_the_list_of_all_is_dropped_with_the_list() -> None:
    nodule, mass = (Fact("finding", name, "present") for name in ("nodule", "mass"))
    assert consistent([nodule, mass, Fact("findings", "picture", "mass")]) == {mass}
    kind, all_there = Fact("finding", "brain enhancing tumor", "present"), Fact("findings", "picture", "brain tumor")
    assert consistent([kind, all_there]) == {kind, all_there}


def test_boxes_location_and_lobes(tmp_path: Path) -> None:
    write_slake(
        tmp_path,
        [
            slake_record(location="Lung", modality="X-Ray", question="What is this?", answer="A picture"),
            slake_record(content_type="Position", question="Which lobe is abnormal?", answer="Left"),
        ],
    )
    (tmp_path / "imgs/xmlab1/detection.json").write_text(json.dumps([{"Mass": [0, 0, 1, 1]}, {"Heart": [0, 0, 1, 1]}]))
    facts = picture_facts(read_slake(tmp_path, language=None))
    assert Fact("finding", "mass", "present") in facts
    assert Fact("organ", "heart", "present") in facts
    assert Fact("region", "picture", "chest") in facts
    assert Fact("place", "abnormality", "left lung") in facts
    with pytest.raises(ValueError, match="exactly one picture"):
        picture_facts([])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Left Lung, Upper Right", ["upper left lung"]),
        ("右肺, 左下", ["lower right lung"]),
        ("Both Lungs", ["both lung"]),
        ("Liver, Kidney", ["liver", "kidney"]),
        ("Center, Left Lung", ["center", "left lung"]),
        ("右下角", ["lower right"]),
        ("双肺", ["both lung"]),
        ("顶部", ["top"]),
        ("Under the trachea", []),
    ],
)
def test_places(text: str, found: list[str]) -> None:
    assert places(text) == found


@pytest.mark.parametrize(
    ("said", "stated", "agrees"),
    [
        ("left lung", "lower left lung", True),
        ("lower left lung", "left lung", True),
        ("right lung", "lower left lung", False),
        ("left lung", "both lung", True),
        ("both lung", "left lung", False),
        ("upper left lung", "lower left lung", False),
        ("left lung", "left", None),
        ("center", "top", False),
    ],
)
def test_places_that_agree(said: str, stated: str, agrees: bool | None) -> None:
    assert says(said, stated) is agrees


def test_names() -> None:
    assert names("脑水肿,增强型脑肿瘤,非增强型脑肿瘤", FINDINGS) == names(
        "brain edema, an enhancing tumor and a non-enhancing tumor", FINDINGS
    )
    assert names(without("Brain Edema in the heart", FINDINGS), ORGANS) == ["heart"]
    assert names("heartburn, 肺支气管", ORGANS) == ["bronchus"]


@pytest.mark.needs_data
def test_the_real_questions(real_data: Path) -> None:
    samples = read_slake(real_data / "slake", "validate", None)
    asked = [s for s in samples if s.answer and s.meta["content_type"] not in ("KG", "Shape", "Color")]
    silent = [
        s
        for s in asked
        if not stated(Sample(s.question, s.answer, s.images, meta={"content_type": s.meta["content_type"]}))
    ]
    assert len(silent) < 0.05 * len(asked), [(s.question, s.answer) for s in silent[:20]]
