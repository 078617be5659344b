"""Short questions in other words than SLAKE's: answered with its words, and only from what it states."""

from pathlib import Path

import pytest

from multimodal.data import DataError, read_slake
from multimodal.data.facts import Fact, picture_facts
from multimodal.data.typed import ANSWERS, PROMPTS, read_slake_typed, typed_answers

from .conftest import save_picture, slake_record, write_slake


def facts(*rows: str) -> set[Fact]:
    """Facts as "kind subject value", with - for a space inside a name."""
    return {Fact(*(part.replace("-", " ") for part in row.split())) for row in rows}


SCAN = {Fact("modality", "picture", "X-ray")} | facts("plane picture coronal", "region picture chest")


@pytest.mark.parametrize(
    ("known", "english", "chinese"),
    [
        (
            SCAN | facts("organ lung present", "organ heart present", "organ liver absent"),
            {"modality": "X-Ray", "plane": "Coronal Plane", "region": "Chest", "organs": "Lungs, Heart"},
            {"modality": "X光", "plane": "冠状面", "region": "胸腔", "organs": "肺、心脏"},
        ),
        (facts("modality picture not-CT"), {}, {}),
        (facts("health lung abnormal"), {"lung": "Yes"}, {"lung": "是的"}),
        (facts("health lung healthy"), {"lung": "No"}, {"lung": "不是"}),
        (facts("finding cardiomegaly present", "health heart abnormal"), {"heart": "Yes"}, {"heart": "是的"}),
        (facts("finding cardiomegaly absent"), {"heart": "No"}, {"heart": "不是"}),
        (facts("health heart healthy"), {"heart": "No"}, {"heart": "不是"}),
        (facts("health heart abnormal", "finding pneumonia present"), {}, {}),  # not every ill heart is too large
    ],
)
def test_answers_say_what_is_stated(known: set[Fact], english: dict[str, str], chinese: dict[str, str]) -> None:
    assert typed_answers(known, "en") == english
    assert typed_answers(known, "zh") == chinese


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    """A chest film of which three things are known, and one of which only the modality is."""
    known = (
        (1, "Modality", "What modality is used to take this image?", "X-Ray", "Lung"),
        (1, "Abnormality", "Is the lung healthy?", "No", "Lung"),
        (2, "Modality", "What modality is used to take this image?", "CT", ""),
    )
    rows = [
        slake_record(
            qid=number,
            img_name=f"xmlab{picture}/source.jpg",
            content_type=content,
            question=question,
            answer=answer,
            modality=answer if content == "Modality" else "X-Ray",
            location=place,
        )
        for number, (picture, content, question, answer, place) in enumerate(known)
    ]
    save_picture(tmp_path / "imgs" / "xmlab2" / "source.jpg")
    return write_slake(tmp_path, rows)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_two_of_a_picture_and_fewer_where_less_is_known(slake: Path, language: str) -> None:
    samples = read_slake_typed(slake, language=language)
    assert [sample.images[0].parent.name for sample in samples] == ["xmlab1", "xmlab1", "xmlab2"]
    assert len({sample.id for sample in samples}) == 3
    known = {image: picture_facts(group) for image, group in grouped(slake).items()}
    for sample in samples:
        kind = sample.id.rsplit("/", 1)[1]
        assert sample.question in PROMPTS[language][kind]
        assert sample.answer == typed_answers(known[sample.images[0]], language)[kind]
        assert sample.meta["language"] == language


def grouped(slake: Path) -> dict[Path, list]:
    groups: dict[Path, list] = {}
    for sample in read_slake(slake, "train", None):
        groups.setdefault(sample.images[0], []).append(sample)
    return groups


def test_another_seed_asks_in_other_words(slake: Path) -> None:
    asked = {tuple(s.question for s in read_slake_typed(slake, seed=seed)) for seed in range(10)}
    assert len(asked) > 5
    assert read_slake_typed(slake, seed=3) == read_slake_typed(slake, seed=3)


def test_the_two_languages_ask_and_answer_the_same() -> None:
    assert PROMPTS["en"].keys() == PROMPTS["zh"].keys()
    assert ANSWERS["en"].keys() == ANSWERS["zh"].keys()


def test_wrong_names_and_bad_rows(slake: Path) -> None:
    with pytest.raises(ValueError, match="language 'fr'"):
        read_slake_typed(slake, language="fr")
    with pytest.raises(ValueError, match="no split 'val'"):
        read_slake_typed(slake, "val")
    write_slake(slake, [slake_record(answer=None), slake_record()])
    skipped: list[DataError] = []
    assert read_slake_typed(slake, skip_bad=skipped)
    assert len(skipped) == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_real_answers_are_words_that_slake_uses(real_data: Path, language: str) -> None:
    own = {sample.answer for sample in read_slake(real_data / "slake", "train", language)}
    samples = read_slake_typed(real_data / "slake", "validate", language)
    assert len(samples) > 150
    said = {sample.answer for sample in samples if not sample.id.endswith("/organs")}
    assert said <= own
