"""Questions of a shop: answers word for word from the data, and none where the data has none."""

from pathlib import Path

import pytest

from multimodal.data.prompts import check_form
from multimodal.data.shop_facts import (
    CLOTHING_PROMPTS,
    GROCERY_PROMPTS,
    clothing_answers,
    first_sentences,
    grocery_answers,
    read_clothing_facts,
    read_grocery_facts,
    title,
)

from .conftest import save_picture

LEMON = "Lemon is used as a flavor in food and drinks and has a very tart and sour taste."


def test_answers_are_the_products_own_sentences() -> None:
    text = "Fresh apple juice from Sweden. Fresh and sour taste. Fits the breakfast table. Without pulp."
    assert grocery_answers("Bravo Apple Juice", "Juice", text) == {
        "description": text,
        "short description": text,
        "listing": f"Name: Bravo Apple Juice. Category: Juice. Description: {text}",
        "title": "Bravo Apple Juice",
        "identity": "This is Bravo Apple Juice. Category: Juice.",
        "taste": "This is Bravo Apple Juice. Fresh and sour taste.",
        "use": "Fits the breakfast table.",
    }


@pytest.mark.parametrize(
    "text",
    [
        "Ecological milk from Swedish farms.",
        "Sour cream made from fresh cream.",
        "Papayan has a salmon-pink pulp.",
        "Sweet potatoes are oblong.",
        "Pears taste the most when they are really ripe.",
    ],
)
def test_no_taste_and_no_use_are_made_up(text: str) -> None:
    assert not {"taste", "use"} & set(grocery_answers("Name", "Category", text))


def test_long_texts_end_after_a_sentence() -> None:
    assert first_sentences("One two three. Four five. Six.", max_words=5) == "One two three. Four five."
    assert first_sentences("One two three four.", max_words=2) == "One two three four."
    assert (
        first_sentences("Made of 1.5 percent fat, e.g. cream. Good.", max_words=7)
        == "Made of 1.5 percent fat, e.g. cream."
    )
    assert title("Granny Smith", "Apple") == "Granny Smith | Apple"
    assert title("Banana", "Banana") == "Banana"


def test_grocery(grocery: Path) -> None:
    samples = read_grocery_facts(grocery)
    assert samples == read_grocery_facts(grocery)
    for sample in samples:
        assert sample.question in GROCERY_PROMPTS[sample.meta["content_type"]]
        assert sample.id.startswith("grocery/facts/")
        assert sample.images[0].is_file()
    many = [read_grocery_facts(grocery, seed=seed) for seed in range(20)]
    assert {s.meta["content_type"] for samples in many for s in samples} >= {"description", "listing", "title"}
    assert {s.question for seed in range(20) for s in read_grocery_facts(grocery, "val", seed=seed)} <= {
        prompts[0] for prompts in GROCERY_PROMPTS.values()
    }
    with pytest.raises(ValueError, match="no split 'validate'"):
        read_grocery_facts(grocery, "validate")


def test_clothing(tmp_path: Path) -> None:
    for name in ("dress", "shoes"):
        for split in ("train", "validation"):
            save_picture(tmp_path / split / name / "a.jpg")
    samples = [sample for seed in range(20) for sample in read_clothing_facts(tmp_path, seed=seed)]
    assert {(s.meta["class"], s.answer) for s in samples} == {
        ("dress", "Dress | Clothing"),
        ("dress", "The picture shows a dress."),
        ("dress", "Name: Dress. Category: Clothing."),
        ("shoes", "Shoes | Clothing"),
        ("shoes", "The picture shows shoes."),
        ("shoes", "Name: Shoes. Category: Clothing."),
    }
    assert {s.question for s in read_clothing_facts(tmp_path, "validation")} <= {
        prompts[0] for prompts in CLOTHING_PROMPTS.values()
    }
    assert clothing_answers("scarf", "Scarf")["sentence"] == "The picture shows a scarf."


@pytest.mark.needs_data
def test_the_real_files(real_data: Path) -> None:
    samples = read_grocery_facts(real_data / "grocery")
    samples += read_clothing_facts(real_data / "clothing") if (real_data / "clothing").is_dir() else []
    assert len(samples) in (2721, 2721 + 3068)
    assert not {s.answer: found for s in samples if (found := check_form(s.answer, "en"))}
