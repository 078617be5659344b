# ruff: noqa: RUF001
"""Forty prompts of the kind that people type, and what makes the form of an answer wrong.

`check_form` looks at form only: whether the answer is in the language of the prompt, whether it goes round in circles,
whether it stops in the middle of a sentence, whether there is an answer at all. Whether the answer is true is another
matter (`report_score`). A single word or a short phrase is a whole answer: "Liver", "Left Lung, Lower Right".
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Kind = Literal["medical", "shop", "label"]


@dataclass(frozen=True)
class FormPrompt:
    """A prompt with the picture that it is asked about.

    Attributes:
        prompt: What is typed.
        language: The language that the answer must have, `"en"` or `"zh"`.
        picture: The kind of picture; `PICTURES` names one of `assets/samples` for each.
    """

    prompt: str
    language: Literal["en", "zh"]
    picture: Kind


PICTURES: dict[Kind, str] = {"medical": "chest_film.png", "shop": "product_shot.png", "label": "label.png"}
FORM_PROMPTS = (
    FormPrompt("Describe this X-ray", "en", "medical"),
    FormPrompt("What is abnormal here?", "en", "medical"),
    FormPrompt("Describe this image.", "en", "medical"),
    FormPrompt("Write a short report.", "en", "medical"),
    FormPrompt("What do you see?", "en", "medical"),
    FormPrompt("Is anything abnormal?", "en", "medical"),
    FormPrompt("Summarise the findings.", "en", "medical"),
    FormPrompt("is the heart too big?", "en", "medical"),
    FormPrompt("What kind of scan is this and what does it show?", "en", "medical"),
    FormPrompt("Which organs can you see?", "en", "medical"),
    FormPrompt("Explain this picture to a patient.", "en", "medical"),
    FormPrompt("anything wrong with the lungs?", "en", "medical"),
    FormPrompt("What modality is used to take this image?", "en", "medical"),
    FormPrompt("Where is the abnormality?", "en", "medical"),
    FormPrompt("How does this product taste?", "en", "medical"),
    FormPrompt("描述这张X光片的异常", "zh", "medical"),
    FormPrompt("请描述这张图片。", "zh", "medical"),
    FormPrompt("写一份简短的报告。", "zh", "medical"),
    FormPrompt("这张片子有什么问题？", "zh", "medical"),
    FormPrompt("你看到了什么？", "zh", "medical"),
    FormPrompt("心脏正常吗？", "zh", "medical"),
    FormPrompt("有没有异常", "zh", "medical"),
    FormPrompt("这是什么类型的图像？", "zh", "medical"),
    FormPrompt("总结一下这张X光片。", "zh", "medical"),
    FormPrompt("Write a shop description for this", "en", "shop"),
    FormPrompt("Write a one-line shop title for this.", "en", "shop"),
    FormPrompt("Write a product listing with name, category and description.", "en", "shop"),
    FormPrompt("What is it and how does it taste?", "en", "shop"),
    FormPrompt("What can I use it for?", "en", "shop"),
    FormPrompt("What product is this?", "en", "shop"),
    FormPrompt("describe this product in one sentence", "en", "shop"),
    FormPrompt("Which category does this belong to?", "en", "shop"),
    FormPrompt("What disease is shown in the lung?", "en", "shop"),
    FormPrompt("Who took this picture?", "en", "shop"),
    FormPrompt("How much does it cost?", "en", "shop"),
    FormPrompt("肺部有什么疾病？", "zh", "shop"),
    FormPrompt("这个多少钱？", "zh", "shop"),
    FormPrompt("What does the label say?", "en", "label"),
    FormPrompt("How much sugar is in one serving?", "en", "label"),
    FormPrompt("标签上写了什么？", "zh", "label"),
)

EMPTY, LANGUAGE, LOOP, CUT, BROKEN = "empty answer", "wrong language", "loop", "cut sentence", "broken characters"
MAX_PHRASE = 8  # words of an answer that needs no full stop
MAX_ITEM = 4  # words of each item of a list that needs none
MAX_PHRASE_ZH = 12  # characters
END = re.compile(r"[.!?…。！？][\"'”’)\]）】]*$")
# A phrase with one of these is a sentence.
VERBS = re.compile(r"\b(?:is|are|was|were|has|have|shows?|looks?|can|cannot|tastes?|contains?|fits?)\b", re.IGNORECASE)
VERBS_ZH = re.compile("这是|这张|可见|异常：|位于|显示|未见")
# What no answer ends with.
OPEN_ENDS = re.compile(
    r"(?:[,;:\-–(\[、，；：（]|\b(?:a|an|the|and|or|of|in|on|at|to|for|with|by|from|is|are|as|its?|this|that)|.{3}[的和与或在是及])$",
    re.IGNORECASE,
)
# Words in Latin letters that a Chinese answer may hold.
INTERNATIONAL = re.compile(r"x-?\s?ray|ct|mri|mr|t[12]|x|u|kg|g|ml|l|cm|mm|kcal", re.IGNORECASE)


def check_form(text: str, language: str) -> list[str]:
    """Returns what is wrong with the form of an answer.

    Args:
        text: The answer.
        language: The language that it must have, `"en"` or `"zh"`.

    Returns:
        Any of `"empty answer"`, `"broken characters"`, `"wrong language"`, `"loop"` and `"cut sentence"`; nothing for a
        good answer.
    """
    text = text.strip()
    if not any(char.isalnum() for char in text):
        return [EMPTY]
    problems = []
    if "\ufffd" in text or re.search(r"<\|?\w+\|?>", text):
        problems.append(BROKEN)
    if not in_language(text, language):
        problems.append(LANGUAGE)
    if loops(text):
        problems.append(LOOP)
    if is_cut(text):
        problems.append(CUT)
    return problems


def in_language(text: str, language: str) -> bool:
    """Tells whether an answer has the letters of a language; a name or a number alone has no language."""
    chinese = sum(is_chinese(char) for char in text)
    if language == "en":
        return not any(char.isalpha() and not is_latin(char) for char in text)
    latin = [word for word in re.findall(r"[A-Za-zÀ-ÿ][\w-]*", text, re.ASCII) if not INTERNATIONAL.fullmatch(word)]
    if not chinese:
        return not latin and not any(char.isalpha() and not is_latin(char) for char in text)
    return len(latin) <= 2 or chinese > 2 * sum(map(len, latin))


def is_chinese(char: str) -> bool:
    """Tells whether a character is a Chinese one."""
    return "\u4e00" <= char <= "\u9fff" or "\u3400" <= char <= "\u4dbf"


def is_latin(char: str) -> bool:
    """Tells whether a letter is of the Latin alphabet, with or without marks, or a sign such as µ."""
    return unicodedata.name(char, "").startswith(("LATIN", "MICRO", "GREEK", "FULLWIDTH LATIN"))


def loops(text: str) -> bool:
    """Tells whether a text repeats itself.

    It does if a piece stands three times in a row, a piece of four words or more (of eight Chinese characters) twice in
    a row inside a sentence, a sentence of three words or more twice, or the same four words three times.
    """
    words = words_of(text)
    long = 8 if sum(map(is_chinese, text)) > len(words) / 2 else 4
    said = [part.strip().lower() for part in re.split(r"(?<=[.!?])\s+|[。！？\n]", text)]
    if any(count > 1 for part, count in Counter(said).items() if len(part.split()) > 2 or len(part) > 7):
        return True
    if any(in_a_row(words_of(part), times=2, least=long) for part in said) or in_a_row(words, times=3):
        return True
    grams = Counter(tuple(words[start : start + long]) for start in range(len(words) - long + 1))
    return bool(grams) and max(grams.values()) > 2


def words_of(text: str) -> list[str]:
    """Returns the words of a text, or its characters where it is Chinese, in lower case."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())


def in_a_row(words: list[str], *, times: int, least: int = 1) -> bool:
    """Tells whether a piece of at least so many words stands so many times in a row."""
    for size in range(least, len(words) // times + 1):
        for start in range(len(words) - size * times + 1):
            if words[start : start + size] * times == words[start : start + size * times]:
                return True
    return False


def is_cut(text: str) -> bool:
    """Tells whether an answer stops in the middle of a sentence."""
    if text.count("(") > text.count(")") or text.count("（") > text.count("）"):
        return True
    if END.search(text):
        return False
    if OPEN_ENDS.search(text) or re.search(r"[.!?]\s|[。！？]", text):
        return True
    if any(map(is_chinese, text)):
        items = re.split("[,，、;；]", text)
        return bool(VERBS_ZH.search(text)) or any(len(item) > MAX_PHRASE_ZH for item in items)
    items = [item.split() for item in re.split("[,;|]", text)]
    short = sum(map(len, items)) <= MAX_PHRASE or (len(items) > 1 and all(len(item) <= MAX_ITEM for item in items))
    return bool(VERBS.search(text)) or not short
