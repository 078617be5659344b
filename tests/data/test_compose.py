"""Composed reports: their form in both languages, and the score that reads them back."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from multimodal.data import DataError, read_slake
from multimodal.data.compose import (
    ABNORMAL_PROMPTS,
    REPORT_PROMPTS,
    abnormal_part,
    compose_report,
    compose_slake,
    pictures,
    read_slake_reports,
)
from multimodal.data.facts import Fact, picture_facts
from multimodal.data.prompts import check_form
from multimodal.data.report_score import read_report, score_report, total

from .conftest import slake_record, write_slake


def facts(*rows: str) -> set[Fact]:
    """Facts as "kind subject value", with - for a space inside a name."""
    return {Fact(*(part.replace("-", " ") for part in row.split())) for row in rows}


SCAN = facts("modality picture CT", "plane picture transverse", "region picture chest")
ORGANS = facts("organ lung present", "organ heart present", "organ liver absent")
PNEUMONIA = facts("finding pneumonia present", "health picture abnormal", "place abnormality lower-left-lung")
MRI = facts("modality picture MRI", "weighting picture T2", "region picture head")
TUMOR = facts(
    "finding brain-edema present",
    "finding brain-tumor present",
    "place abnormality right-lobe",
    "health picture abnormal",
) | {Fact("finding", "brain enhancing tumor", "present")}


@pytest.mark.parametrize(
    ("known", "english", "chinese"),
    [
        (
            SCAN | ORGANS | PNEUMONIA,
            "This is a transverse CT scan of the chest. It shows the lungs and heart. "
            "There is pneumonia in the lower left lung.",
            "这是胸部的横断面CT图像。可见肺、心脏。异常：肺炎，位于左下肺。",  # noqa: RUF001
        ),
        (
            MRI | TUMOR,
            "This is a T2-weighted MRI scan of the head. "
            "There is brain edema and an enhancing tumor in the right lobe.",
            "这是头部的T2加权MRI图像。异常：脑水肿、增强型肿瘤，位于右叶。",  # noqa: RUF001
        ),
        (
            {Fact("modality", "picture", "X-ray")} | facts("health picture healthy"),
            "This is an X-ray. No abnormality is visible.",
            "这是X光片。未见异常。",
        ),
        (
            facts("health liver healthy", "health kidney healthy"),
            "The liver and kidneys look healthy.",
            "肝脏、肾脏正常。",
        ),
        (facts("health lung abnormal", "health picture abnormal"), "The lungs look abnormal.", "肺异常。"),
        (
            facts("health picture abnormal", "place abnormality both-lung"),
            "There is an abnormality in both lungs.",
            "可见异常，位于双肺。",  # noqa: RUF001
        ),
        (
            facts("finding mass present", "place abnormality upper-left"),
            "There is a pulmonary mass on the upper left of the picture.",
            "异常：肺肿块，位于图像左上。",  # noqa: RUF001
        ),
        (facts("finding liver-cancer present", "place abnormality liver"), "There is liver cancer.", "异常：肝癌。"),  # noqa: RUF001
        (facts("count kidney 2", "colour lung black"), "", ""),
    ],
)
def test_the_form(known: set[Fact], english: str, chinese: str) -> None:
    assert compose_report(known, "en") == english
    assert compose_report(known, "zh") == chinese


def test_which_finding_is_where_is_not_made_up() -> None:
    two = facts("finding mass present", "finding atelectasis present")
    assert abnormal_part(two | facts("place abnormality both-lung")) == (
        "There is atelectasis and a pulmonary mass. The abnormality is in both lungs."
    )
    assert abnormal_part(two | facts("place mass left-lung")) == (
        "There is atelectasis. There is a pulmonary mass in the left lung."
    )
    assert abnormal_part(two | facts("place abnormality left-lung", "place abnormality lower-left-lung")) == (
        "There is atelectasis and a pulmonary mass in the lower left lung."
    )
    heart = facts("finding cardiomegaly present", "finding pneumothorax present")
    assert abnormal_part(heart | facts("place abnormality heart", "place abnormality left-lung")) == (
        "There is cardiomegaly. There is pneumothorax in the left lung."
    )


def records(*rows: tuple[str, str, str, str]) -> Iterable[dict[str, object]]:
    for number, (language, content, question, answer) in enumerate(rows):
        yield slake_record(
            qid=number,
            q_lang=language,
            content_type=content,
            question=question,
            answer=answer,
            modality="X-Ray",
            location="Lung",
        )


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    """One chest film: six questions in two languages, one of them contradicted."""
    rows = records(
        ("en", "Modality", "What modality is used to take this image?", "X-Ray"),
        ("en", "Abnormality", "What diseases are included in the picture?", "Pneumonia"),
        ("zh", "Position", "异常病变在哪个位置?", "右肺, 左下"),
        ("en", "Organ", "Does the picture contain heart?", "Yes"),
        ("en", "Organ", "Does the picture contain liver?", "Yes"),
        ("zh", "Organ", "图片中包含肝脏吗?", "不包含"),
    )
    return write_slake(tmp_path, list(rows))


REPORT = "This is an X-ray of the chest. It shows the heart. There is pneumonia in the lower right lung."


def test_reports_of_a_picture(slake: Path) -> None:
    first, second, part = read_slake_reports(slake)
    assert first.answer == second.answer == REPORT
    assert part.answer == "There is pneumonia in the lower right lung."
    assert first.question != second.question
    assert first.images == (slake / "imgs/xmlab1/source.jpg",)
    assert [s.id for s in (first, part)] == ["slake/xmlab1/report/en/0", "slake/xmlab1/abnormality-report/en/0"]
    assert first.meta["content_type"] == "Report"
    assert part.meta["content_type"] == "Abnormality report"
    chinese, chinese_part = read_slake_reports(slake, language="zh")
    assert chinese.answer == "这是胸部的X光片。可见心脏。异常：肺炎，位于右下肺。"  # noqa: RUF001
    assert chinese_part.answer == "异常：肺炎，位于右下肺。"  # noqa: RUF001
    assert chinese.meta["language"] == "zh"


def test_prompts_depend_on_the_seed_alone_and_name_the_picture_rightly(slake: Path) -> None:
    samples = read_slake(slake, language=None)
    asked = {tuple(s.question for s in compose_slake(samples, "en", seed)) for seed in range(20)}
    assert len(asked) > 10
    assert compose_slake(samples, "en", 3) == compose_slake(samples, "en", 3)
    typed = " ".join(" ".join(questions) for questions in asked)
    assert "X-ray" in typed
    assert "CT" not in typed
    assert "MRI" not in typed
    assert "{" not in typed


def test_nothing_is_asked_that_the_data_is_silent_about(tmp_path: Path) -> None:
    write_slake(tmp_path, list(records(("en", "Organ", "Does the picture contain heart?", "Yes"))))
    assert [s.meta["content_type"] for s in read_slake_reports(tmp_path)] == ["Report", "Report"]


def test_wrong_names_and_bad_rows(slake: Path) -> None:
    with pytest.raises(ValueError, match="no reports in language 'fr'"):
        read_slake_reports(slake, language="fr")
    with pytest.raises(ValueError, match="no split 'val'"):
        read_slake_reports(slake, "val")
    write_slake(slake, [slake_record(answer=None), slake_record()])
    skipped: list[DataError] = []
    assert read_slake_reports(slake, skip_bad=skipped)
    assert len(skipped) == 1


def test_a_composed_report_says_exactly_its_facts() -> None:
    said = SCAN | facts("organ lung present", "organ heart present") | PNEUMONIA
    for language in ("en", "zh"):
        report = compose_report(SCAN | ORGANS | PNEUMONIA, language)
        assert read_report(report) == said
        score = score_report(report, SCAN | ORGANS | PNEUMONIA)
        assert (score.precision, score.recall) == (1, 1)
        assert (score.right, score.wrong, score.missed) == (said, set(), set())


@pytest.mark.parametrize(
    ("text", "wrong", "missed"),
    [
        (
            "This is a coronal CT scan of the chest. It shows the lungs and heart. "
            "There is pneumonia in the lower left lung.",
            "plane picture coronal",
            "plane picture transverse",
        ),
        (
            "This is a transverse CT scan of the chest. It shows the lungs, heart and liver. "
            "There is pneumonia in the right lung.",
            "organ liver present|place abnormality right-lung",
            "place abnormality lower-left-lung",
        ),
        (
            "This is a transverse CT scan of the chest. It shows the lungs and heart. No abnormality is visible.",
            "health picture healthy",
            "health picture abnormal|finding pneumonia present|place abnormality lower-left-lung",
        ),
        (
            "这是胸部的横断面CT图像。可见肺。异常：肺炎，位于左肺。",  # noqa: RUF001
            "",
            "organ heart present",
        ),
        ("the the lungs of there. it it is", "", "everything"),
    ],
)
def test_wrong_missing_and_garbled_reports_score_lower(text: str, wrong: str, missed: str) -> None:
    known = SCAN | ORGANS | PNEUMONIA
    score = score_report(text, known)
    assert score.wrong == (facts(*wrong.split("|")) if wrong else set())
    expected = read_report(compose_report(known))
    assert score.missed == (expected if missed == "everything" else facts(*missed.split("|")))
    assert (score.precision < 1) == bool(wrong or missed == "everything")
    assert score.recall < 1


def test_what_the_data_is_silent_about_is_not_judged() -> None:
    score = score_report("This is a CT scan. It shows the spleen. There is a mass in the left lung.", SCAN)
    assert score.right == facts("modality picture CT")
    assert score.wrong == set()
    listed = SCAN | facts("findings picture pneumonia", "finding pneumonia present")
    assert score_report("There is a mass.", listed).wrong == facts("finding mass present")
    healthy = SCAN | facts("health picture healthy")
    assert score_report("There is a mass.", healthy).wrong == facts("finding mass present", "health picture abnormal")
    kinds = facts("findings picture brain-tumor", "finding brain-tumor present")
    assert score_report("There is an enhancing tumor.", kinds).wrong == set()


def test_totals_count_every_fact_once() -> None:
    known = SCAN | ORGANS | PNEUMONIA
    good, bad = score_report(compose_report(known), known), score_report("This is an MRI scan.", known)
    totals = total([good, bad])
    assert totals.precision == 8 / 9
    assert totals.recall == 8 / 16
    assert totals.by_kind["modality"] == (0.5, 0.5, 2, 2)
    assert totals.reports == 2
    assert total([]).precision == 0


@pytest.mark.needs_data
@pytest.mark.parametrize(("language", "count"), [("en", 254), ("zh", 158)])
def test_the_real_reports(real_data: Path, language: str, count: int) -> None:
    samples = read_slake_reports(real_data / "slake", "validate", language)
    assert len(samples) == count
    assert len({sample.id for sample in samples}) == count
    problems = {s.answer: found for s in samples if (found := check_form(s.answer, language))}
    assert not problems
    asked = {sample.question for sample in read_slake(real_data / "slake", "validate", None)}
    prompts = (*REPORT_PROMPTS[language], *ABNORMAL_PROMPTS[language])
    assert not asked & {prompt.format(picture="image") for prompt in prompts}


@pytest.mark.needs_data
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_real_facts_score_full_marks_and_those_of_another_picture_do_not(real_data: Path, language: str) -> None:
    by_picture = pictures(read_slake(real_data / "slake", "validate", None))
    known = [picture_facts(samples) for samples in by_picture.values()]
    own = total([score_report(compose_report(one, language), one) for one in known])
    assert (own.precision, own.recall) == (1, 1)
    half = len(known) // 2
    other = total([score_report(compose_report(known[i - half], language), one) for i, one in enumerate(known)])
    assert other.precision < 0.75
    assert other.recall < 0.6
