"""Reports: asked once for each picture, scored against its questions in both languages; and the test of form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.data import DataError
from multimodal.data.prompts import FORM_PROMPTS
from multimodal.model import MultiModalModel
from multimodal.training import form
from multimodal.training.reports import floor, read_pictures, table_of, write_reports
from tests.training.scripted import Scripted
from tests.training.tiny import tiny_model

SCANS = {"xmlab1": ("CT", "Liver", "Abdomen"), "xmlab2": ("X-Ray", "Lung", "Chest")}
TOLD = "This is a CT scan of the abdomen. It shows the liver."
PROMPTS = {"en": "Describe this image.", "zh": "描述这张图片。"}


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    """Two pictures, two English questions and a Chinese one about each."""
    records: list[dict[str, Any]] = []
    for name, (modality, organ, location) in SCANS.items():
        path = tmp_path / "imgs" / name / "source.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
        for language, question, answer in (
            ("en", f"Does the picture contain {organ.lower()}?", "Yes"),
            ("en", "What modality is used to take this image?", modality),
            ("zh", "图中有异常吗?", "没有"),
        ):
            records.append(
                {
                    "img_name": f"{name}/source.jpg",
                    "question": question,
                    "answer": answer,
                    "q_lang": language,
                    "location": location,
                    "modality": modality,
                    "answer_type": "OPEN",
                    "content_type": "Organ",
                    "qid": len(records),
                }
            )
    (tmp_path / "validate.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture(scope="module")
def model(bases: tuple[str, str]) -> MultiModalModel:
    return MultiModalModel(*tiny_model(*bases))


def test_pictures_have_their_questions_in_both_languages(slake: Path) -> None:
    for name in ("slake", "slake-zh"):
        found = read_pictures(f"{name}:{slake}")
        assert [{sample.meta["language"] for sample in samples} for samples in found] == [{"en", "zh"}] * 2
        assert [len(samples) for samples in found] == [3, 3]


def test_broken_rows_are_listed_once(slake: Path) -> None:
    file = slake / "validate.json"
    file.write_text(json.dumps([*json.loads(file.read_text()), {"qid": 99}]))
    with pytest.raises(DataError):
        read_pictures(f"slake:{slake}")
    bad: list[DataError] = []
    assert len(read_pictures(f"slake:{slake}", skip_bad=bad)) == 2 and len(bad) == 1


@pytest.mark.parametrize("name", ["grocery:folder", "mine.jsonl", "slake:"])
def test_other_data_says_nothing_of_reports(name: str) -> None:
    with pytest.raises(ValueError, match="reports are scored on slake:FOLDER only"):
        read_pictures(name)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_picture_is_asked_once_and_scored(slake: Path, model: MultiModalModel, language: Any) -> None:
    scripted = Scripted(model, {PROMPTS[language]: TOLD})
    reports = write_reports(scripted, read_pictures(f"slake:{slake}"), language, progress=False)
    assert [report.prediction.text for report in reports] == [TOLD] * 2
    liver, lung = (report.score for report in reports)
    assert liver.precision == 1 and not liver.wrong
    assert {(fact.kind, fact.value) for fact in lung.wrong} >= {("modality", "CT")}
    assert lung.precision < 0.5 and lung.recall < liver.recall
    head, rows = table_of(reports)
    assert rows[0][0] == "all" and rows[-1][0] == "another picture's report"
    assert {row[0] for row in rows[1:-1]} >= {"modality", "organ"}
    assert all(len(row) == len(head) for row in rows)
    modality = next(row for row in rows if row[0] == "modality")
    assert modality[1:] == ["50.0 %", "50.0 %", "2", "2"]


def test_the_floor_is_what_other_pictures_reports_score(slake: Path, model: MultiModalModel) -> None:
    by_picture = read_pictures(f"slake:{slake}")
    composed = write_reports(Scripted(model, {PROMPTS["en"]: TOLD}), by_picture, progress=False)
    same = floor(composed)  # every picture has the same report
    assert same.reports == 2 and 0 < same.precision < 1
    assert floor(composed[:1]).reports == 0
    with pytest.raises(ValueError, match="the split is empty"):
        table_of([])


# ---- form


def test_every_prompt_is_asked_about_its_picture(model: MultiModalModel) -> None:
    said = {prompt.prompt: "肝脏" if prompt.language == "zh" else "Liver" for prompt in FORM_PROMPTS}
    said["What do you see?"] = "a a a a a a"
    scripted = Scripted(model, said)
    answers = form.check_prompts(scripted, batch_size=7, progress=False)
    assert [answer.prompt for answer in answers] == list(FORM_PROMPTS)
    bad = {answer.prompt.prompt: answer.problems for answer in answers if answer.problems}
    assert bad.keys() == {"What do you see?"} and "loop" in bad["What do you see?"]
    assert sum(len(asked["input_ids"]) for asked in scripted.asked) == 40
    assert all(asked["max_new_tokens"] == 128 for asked in scripted.asked)
    head, rows = form.table_of(answers)
    assert len(rows) == 40 and all(len(row) == len(head) for row in rows)
    assert rows[4][2:] == ["a a a a a a", ", ".join(bad["What do you see?"])] and rows[0][-1] == "good"


def test_without_the_sample_pictures(model: MultiModalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "sample_images", lambda: [])
    with pytest.raises(ValueError, match=r"chest_film\.png.* are not here"):
        form.check_prompts(model)
