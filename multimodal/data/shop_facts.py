"""What a shop would ask about a photograph, answered from what the data states: name, category, description.

Grocery Store's descriptions say what a product tastes like and what it is good for, in some sentence or in none. A
question about taste or use is asked only where a sentence answers it, and that sentence is the answer, word for word.
Clothing states one thing, the kind of garment; whatever is written about it says no more than that.

Long descriptions are cut after a sentence, never inside one, except where the whole description is asked for: that
answer is the one that `read_grocery_descriptions` gives.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from multimodal.data.clothing import read_clothing
from multimodal.data.grocery import read_grocery_descriptions
from multimodal.data.sample import DataError, Sample, choose

MAX_WORDS = 50  # about 70 tokens of SmolLM2's tokenizer
# One prompt of each kind is asked first in evaluation splits.
GROCERY_PROMPTS = {
    "description": (
        "Write a shop description for this.",
        "Write a shop description.",
        "Describe this for a shop.",
        "Describe this product.",
    ),
    "short description": (
        "Write a short shop description for this.",
        "Write a short product description.",
        "Describe this product in a sentence or two.",
        "Describe this briefly for a shop.",
    ),
    "listing": (
        "Write a product listing with name, category and description.",
        "Write a product listing for this.",
        "Give me name, category and description of this product.",
        "Fill in a catalogue entry: name, category, description.",
    ),
    "title": (
        "Write a one-line shop title for this.",
        "Write a title for this product.",
        "Suggest a short title for a web shop.",
        "Give this a shop title.",
    ),
    "identity": (
        "What is this, and which category does it belong to?",
        "Name this product and its category.",
        "Tell me what this is and what kind of product it is.",
        "What am I looking at?",
    ),
    "taste": (
        "What is it and how does it taste?",
        "What does this taste like?",
        "How does this product taste?",
        "Describe the taste of this.",
    ),
    "use": (
        "What can I use it for?",
        "What is this good for?",
        "How can I use this product?",
        "What can I make with this?",
    ),
}
CLOTHING_PROMPTS = {
    "title": (
        "Write a one-line shop title for this.",
        "Write a title for this item.",
        "Suggest a short title for a web shop.",
        "Give this a shop title.",
    ),
    "sentence": (
        "Describe this item.",
        "Describe this item of clothing.",
        "What does the picture show?",
        "What am I looking at?",
    ),
    "listing": (
        "Write a product listing with name and category.",
        "Give me name and category of this item.",
        "Fill in a catalogue entry: name, category.",
    ),
}
# How a sentence calls the classes of Clothing; another class is "a ..." with its own name.
GARMENTS = {
    "longsleeve": "a long-sleeved top",
    "outwear": "an item of outerwear",
    "pants": "pants",
    "shoes": "shoes",
    "shorts": "shorts",
    "t-shirt": "a T-shirt",
}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
TASTE = re.compile(
    r"\b(?:taste|flavou?r)\b|\bis (?:\w+ )?sweet\b|\b(?:is|are) (?:much )?sweeter\b|juicy,? (?:mild )?and sweet"
)
NO_TASTE = re.compile(r"good taste|very different|taste the most|taste is completely")
USE = re.compile(
    r"\b(?:suitable for|used|you use|fits? (?:well|for|in|the)|eaten (?:raw|cooked|naturally|with|on)|eat (?:it|raw)|"
    r"base for|excellent as|great for|good (?:for|as|to|flavou?ring|allround)|popular (?:choice|as)|enjoyed|match)\b|"
    r"\b(?:have in the|extra good)\b",
    re.IGNORECASE,
)
NO_USE = re.compile(r"taste is very different|vitamins are best kept")


def read_grocery_facts(
    folder: str | Path,
    split: str = "train",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads each photograph with one thing that a shop would ask, and the answer from the product's own text.

    Args:
        folder: The folder `dataset`, or the one that holds it.
        split: `"train"`, `"val"` or `"test"`. Training also has the iconic picture of every product.
        seed: Another seed asks other things of the same photographs.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per picture. `meta` has class_id, coarse_class, name and the kind of question as content_type.

    Raises:
        DataError: A file of the data set is missing, or (without `skip_bad`) a row is broken.
        ValueError: Grocery Store has no such split.
    """
    made = []
    for sample in read_grocery_descriptions(folder, split, skip_bad=skip_bad):
        answers = grocery_answers(sample.meta["name"], sample.meta["coarse_class"], sample.answer)
        key = sample.id.replace("grocery/description/", "grocery/facts/", 1)
        kind = choose(tuple(answers), key=key, seed=seed)
        made.append(asked(sample, key, kind, answers[kind], GROCERY_PROMPTS, split, seed))
    return made


def read_clothing_facts(
    folder: str | Path,
    split: str = "train",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads each photograph with one thing that a shop would ask, answered from its class alone.

    Args:
        folder: Holds `train/`, `validation/` and `test/`.
        split: `"train"`, `"validation"` or `"test"`.
        seed: Another seed asks other things of the same photographs.
        skip_bad: Where given, files that are no pictures are put here, as errors, instead of being raised.

    Returns:
        One sample per picture. `meta` has the class and the kind of question as content_type.

    Raises:
        DataError: The split's folder is missing, or (without `skip_bad`) a file in it is no picture.
        ValueError: The data set has no such split.
    """
    made = []
    for sample in read_clothing(folder, split, skip_bad=skip_bad):
        answers = clothing_answers(sample.meta["class"], sample.answer)
        key = sample.id.replace("clothing/", "clothing/facts/", 1)
        kind = choose(tuple(answers), key=key, seed=seed)
        made.append(asked(sample, key, kind, answers[kind], CLOTHING_PROMPTS, split, seed))
    return made


def asked(
    sample: Sample, key: str, kind: str, answer: str, prompts: Mapping[str, tuple[str, ...]], split: str, seed: int
) -> Sample:
    """Makes the sample of one question about a picture that another sample has."""
    return Sample(
        question=choose(prompts[kind], key=f"{key}/{kind}", seed=seed) if split == "train" else prompts[kind][0],
        answer=answer,
        images=sample.images,
        id=key,
        meta={**sample.meta, "content_type": kind, "language": "en"},
    )


def grocery_answers(name: str, category: str, description: str) -> dict[str, str]:
    """Returns the answer to each kind of question that a product's name, category and description can answer."""
    short = first_sentences(description)
    answers = {
        "description": description,
        "short description": short,
        "listing": f"Name: {name}. Category: {category}. Description: {short}",
        "title": title(name, category),
        "identity": f"This is {name}. Category: {category}.",
    }
    said = sentences(description)
    if taste := [text for text in said if TASTE.search(words_of_taste(text)) and not NO_TASTE.search(text)]:
        answers["taste"] = f"This is {name}. {taste[0]}"
    if use := [text for text in said if USE.search(text) and not NO_USE.search(text)]:
        answers["use"] = first_sentences(" ".join(use[:2]))
    return answers


def clothing_answers(folder: str, name: str) -> dict[str, str]:
    """Returns the answer to each kind of question that a class of clothes can answer."""
    garment = GARMENTS.get(folder, f"a {name.lower()}")
    return {
        "title": title(name, "Clothing"),
        "sentence": f"The picture shows {garment}.",
        "listing": f"Name: {name}. Category: Clothing.",
    }


def title(name: str, category: str) -> str:
    """Returns a title of one line; the category is left out where the name says it."""
    return name if category.lower() in name.lower() else f"{name} | {category}"


def sentences(text: str) -> list[str]:
    """Splits a text into sentences."""
    return [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence]


def first_sentences(text: str, max_words: int = MAX_WORDS) -> str:
    """Returns as many whole sentences as fit, at least one."""
    chosen: list[str] = []
    for sentence in sentences(text):
        if chosen and len(" ".join([*chosen, sentence]).split()) > max_words:
            break
        chosen.append(sentence)
    return " ".join(chosen)


def words_of_taste(sentence: str) -> str:
    """Returns a sentence in lower case without names that sound like a taste: sour cream, sweet potato."""
    return re.sub(r"\b(?:sour (?:cream|milk)|sweet potato(?:es)?|sweet desserts?)\b", " ", sentence.lower())
