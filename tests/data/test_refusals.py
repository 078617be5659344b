"""Questions out of scope: which question meets which picture, and pictures of nothing."""

from pathlib import Path

import pytest

from multimodal.data.facts import organs_in
from multimodal.data.refusals import (
    ANYWHERE,
    MEDICAL,
    PRODUCT,
    REFUSALS,
    organ_questions,
    plain_refusals,
    refusals,
)
from multimodal.data.sample import Sample


def scan(number: int, question: str = "Is this a CT?", location: str = "Pelvic Cavity") -> Sample:
    meta = {"modality": "CT", "location": location}
    return Sample(question, "Yes", (Path(f"xmlab{number}/source.jpg"),), f"slake/{number}", meta)


def product(number: int) -> Sample:
    return Sample("What product is this?", "Kiwi", (Path(f"{number}.jpg"),), f"grocery/{number}", {"class_id": "7"})


def test_each_picture_meets_what_it_cannot_answer() -> None:
    made = refusals([scan(n) for n in range(200)] + [product(n) for n in range(200)], share=1)
    assert len(made) == 400
    for sample in made:
        language = sample.meta["language"]
        assert sample.answer == REFUSALS[language]
        shop = sample.id.startswith("refusal/grocery")
        own = MEDICAL[language] if shop else (*PRODUCT[language], *organ_questions([scan(0)], language))
        assert sample.question in (*own, *ANYWHERE[language])
    assert {sample.meta["language"] for sample in made} == {"en", "zh"}
    assert len({sample.question for sample in made}) > 80


def test_what_the_data_asks_or_mentions_is_left_alone() -> None:
    heart = [scan(0), scan(0, "Does the picture contain heart?")]
    assert any("heart" in question for question in organ_questions(heart[:1], "en"))
    assert not any("heart" in question for question in organ_questions(heart, "en"))
    assert not any("brain" in question for question in organ_questions([scan(0, "图片中包含脑吗?")], "en"))
    assert organ_questions([scan(0, location="somewhere")], "en") == ()
    asked = [scan(0, question) for question in (*PRODUCT["en"], *ANYWHERE["en"], *PRODUCT["zh"], *ANYWHERE["zh"])]
    for seed in range(30):
        (sample,) = refusals(asked, seed=seed, share=1)
        assert organs_in(sample.question)


def test_share_seed_and_order() -> None:
    sources = [product(n) for n in range(80)] + [scan(n) for n in range(20)]
    made = refusals(sources, share=0.2)
    assert len(made) == 20
    assert sum(sample.id.startswith("refusal/slake") for sample in made) == 10
    assert made == refusals(sources, share=0.2)
    assert made != refusals(sources, share=0.2, seed=1)
    order = [sample.id for sample in sources]
    assert [order.index(sample.id.removeprefix("refusal/")) for sample in made] == sorted(
        order.index(sample.id.removeprefix("refusal/")) for sample in made
    )
    assert refusals([], share=0.5) == []
    assert len(refusals(sources[:80], share=0.5)) == 40
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        refusals(sources, share=2)


def test_pictures_of_nothing(tmp_path: Path) -> None:
    made = plain_refusals(tmp_path / "plain", count=16)
    assert len({sample.images[0].read_bytes() for sample in made}) == 16
    assert {sample.answer for sample in made} <= set(REFUSALS.values())
    assert all("{" not in sample.question for sample in made)
    again = plain_refusals(tmp_path / "again", count=16)
    assert [s.question for s in made] == [s.question for s in again]
    assert [s.images[0].read_bytes() for s in made] == [s.images[0].read_bytes() for s in again]
    other = plain_refusals(tmp_path / "other", count=16, seed=1)
    assert [s.images[0].read_bytes() for s in made] != [s.images[0].read_bytes() for s in other]
