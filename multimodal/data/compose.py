# ruff: noqa: RUF001, RUF002
"""Reports about a SLAKE picture, composed from what the data states about it, to train a model that writes them.

A report has one form, always in the same order, so that a small model can learn it and a program can read it back
(`report_score`): what kind of picture, which organs, what is abnormal. Each part is left out where the data doesn't
state it. Asked only what is abnormal, the answer is that part alone.

    This is a transverse CT scan of the abdomen. It shows the liver, spleen and kidneys. There is liver cancer.
    这是腹部的横断面CT图像。可见肝脏、脾脏、肾脏。异常：肝癌。

The prompts are what people type. What they are called in a prompt ("X-ray", "scan", "image") is right or generic, never
wrong: a wrong word would teach the model to read the answer from the question, or to ignore the question.
"""

from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Literal

from multimodal.data.facts import ABNORMALITY, PICTURE, Fact, picture_facts
from multimodal.data.sample import DataError, Sample
from multimodal.data.slake import read_slake
from multimodal.data.terms import FINDINGS, LEVELS, MODALITIES, ORGANS, PARTS, PLANES, REGIONS, SIDES, Term, word

Language = Literal["en", "zh"]

MAX_ORGANS = 6  # a report names no more; 6 in Chinese are about 40 tokens of SmolLM2's tokenizer
# {picture} is what the picture is called: its modality, or a word that fits every picture.
REPORT_PROMPTS = {
    "en": (
        "Describe this {picture}.",
        "Describe the {picture}.",
        "Can you describe this {picture}?",
        "Please describe this {picture}.",
        "Write a short report.",
        "Write a short report for this {picture}.",
        "Write a report.",
        "What do you see?",
        "What do you see in this {picture}?",
        "What does this {picture} show?",
        "What can you see here?",
        "Tell me about this {picture}.",
        "Explain this {picture}.",
        "Summarise this {picture}.",
        "Summarise the findings.",
        "Give me a summary of this {picture}.",
        "Report this {picture}.",
        "What is in this {picture}?",
    ),
    "zh": (
        "描述这张{picture}。",
        "请描述这张{picture}。",
        "请描述一下这张{picture}。",
        "描述一下这张{picture}",
        "写一份简短的报告。",
        "请为这张{picture}写一份简短的报告。",
        "写一份报告。",
        "你看到了什么？",
        "这张{picture}显示了什么？",
        "这张{picture}里有什么？",
        "介绍一下这张{picture}。",
        "总结一下这张{picture}。",
    ),
}
ABNORMAL_PROMPTS = {
    "en": (
        "What is abnormal here?",
        "What is abnormal in this {picture}?",
        "What's wrong in this {picture}?",
        "What is wrong here?",
        "Is anything abnormal?",
        "Is anything abnormal here?",
        "Is there anything abnormal in this {picture}?",
        "Describe the abnormality.",
        "Describe the abnormality in this {picture}.",
        "Describe what is abnormal in this {picture}.",
        "Are there any problems in this {picture}?",
        "Do you see anything unusual?",
        "What are the abnormal findings?",
        "Summarise what is abnormal.",
        "List the abnormalities.",
    ),
    "zh": (
        "描述这张{picture}的异常",
        "描述这张{picture}的异常。",
        "请描述这张{picture}中的异常。",
        "这里有什么异常？",
        "这张{picture}有什么异常？",
        "这张{picture}有什么问题？",
        "有没有异常？",
        "有哪些异常？",
        "总结一下异常。",
        "请说明异常情况。",
    ),
}
CALLED: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {"X-ray": ("X-ray", "radiograph"), "CT": ("CT", "CT scan"), "MRI": ("MRI", "MRI scan")},
    "zh": {"X-ray": ("X光片",), "CT": ("CT", "CT图像"), "MRI": ("MRI图像", "核磁共振图像")},
}
CALLED_ANYTHING = {"en": ("image", "picture", "scan", "medical image"), "zh": ("图片", "图像", "医学图像")}
# Reports and abnormal parts asked for, per picture and seed.
COUNTS = {"en": (2, 1), "zh": (1, 1)}
BARE = {
    "center": ("in the center", "中部"),
    "top": ("at the top", "上部"),
    "bottom": ("at the bottom", "下部"),
}
# Findings whose name says where they are.
HOME = {"cardiomegaly": "heart", "liver cancer": "liver", "kidney cancer": "kidney"}
COUNTABLE = ("nodule", "mass", "brain tumor", "brain enhancing tumor", "brain non-enhancing tumor")


def read_slake_reports(
    folder: str | Path,
    split: str = "train",
    language: Language = "en",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads one split of SLAKE as report-style samples, a few for each picture.

    The facts come from the questions of both languages, so that an English and a Chinese report say the same.

    Args:
        folder: Holds `train.json` and its kin, and `imgs/`.
        split: `"train"`, `"validate"` or `"test"`.
        language: The language of prompts and reports.
        seed: Another seed asks in other words.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        Three English or two Chinese samples per picture, in the order of the pictures' first questions; fewer where the
        data says nothing of what is abnormal.

    Raises:
        DataError: The split's file is missing or isn't a JSON list, or (without `skip_bad`) a row is broken.
        ValueError: SLAKE has no such split or language.
    """
    check_language(language)
    by_picture = pictures(read_slake(folder, split, None, skip_bad=skip_bad))
    return [sample for samples in by_picture.values() for sample in compose_slake(samples, language, seed)]


def pictures(samples: Sequence[Sample]) -> dict[tuple[Path, ...], list[Sample]]:
    """Groups samples by the picture that they are about, in the order of the pictures' first samples."""
    by_picture: dict[tuple[Path, ...], list[Sample]] = {}
    for sample in samples:
        by_picture.setdefault(sample.images, []).append(sample)
    return by_picture


def compose_slake(samples: Sequence[Sample], language: Language = "en", seed: int = 0) -> list[Sample]:
    """Composes report-style samples of what one picture's questions and boxes state.

    Args:
        samples: Questions about the same picture, in either language or both.
        language: The language of prompts and reports.
        seed: Another seed asks in other words; the reports stay the same.

    Returns:
        Up to two reports and one abnormal part in English, one of each in Chinese. `meta` has what SLAKE's questions
        have, with the content_type `Report` or `Abnormality report`.
    """
    check_language(language)
    facts = picture_facts(samples)
    first = samples[0]
    name = first.images[0].parent.name
    random = Random(f"{seed}/{name}/{language}")
    modality = one(facts, "modality")
    reports, parts = COUNTS[language]
    made = []
    for kind, answer, prompts, count in (
        ("Report", compose_report(facts, language), REPORT_PROMPTS[language], reports),
        ("Abnormality report", abnormal_part(facts, language), ABNORMAL_PROMPTS[language], parts),
    ):
        for number, prompt in enumerate(random.sample(prompts, count) if answer else ()):
            called = random.choice([*CALLED[language].get(modality, ()), random.choice(CALLED_ANYTHING[language])])
            made.append(
                Sample(
                    question=prompt.format(picture=called),
                    answer=answer,
                    images=first.images,
                    id=f"slake/{name}/{kind.lower().replace(' ', '-')}/{language}/{number}",
                    meta={**first.meta, "language": language, "content_type": kind, "answer_type": "OPEN"},
                )
            )
    return made


def compose_report(facts: Collection[Fact], language: Language = "en") -> str:
    """Composes the whole report: kind of picture, organs, what is abnormal. Empty where no fact fits the form."""
    parts = (scan_part(facts, language), organ_part(facts, language), abnormal_part(facts, language))
    return joined([part for part in parts if part], language)


def scan_part(facts: Collection[Fact], language: Language) -> str:
    """Says what kind of picture it is, of which part of the body, or nothing where the modality is not stated."""
    modality, weighting, plane, region = (one(facts, kind) for kind in ("modality", "weighting", "plane", "region"))
    if not modality:
        return ""
    what, where = word(modality, MODALITIES, language), region and word(region, REGIONS, language)
    how = plane and word(plane, PLANES, language)
    if language == "zh":
        return f"这是{where}{'的' if where else ''}{how}{weighting + '加权' if weighting else ''}{what}。"
    words = [how, f"{weighting}-weighted" if weighting else "", what]
    said = " ".join(part for part in words if part)
    article = "an" if said.startswith(("X", "MRI")) else "a"
    return f"This is {article} {said}{f' of the {where}' if where else ''}."


def organ_part(facts: Collection[Fact], language: Language) -> str:
    """Says which organs are there."""
    organs = seen_organs(facts)
    if not organs:
        return ""
    said = listed(organs, ORGANS, language)
    return f"可见{said}。" if language == "zh" else f"It shows the {said}."


def seen_organs(facts: Collection[Fact]) -> list[str]:
    """Returns the organs that an answer names, at most six."""
    there = {fact.subject for fact in facts if (fact.kind, fact.value) == ("organ", "present")}
    return [organ.name for organ in ORGANS if organ.name in there and organ.name != "bronchus"][:MAX_ORGANS]


def abnormal_part(facts: Collection[Fact], language: Language = "en") -> str:
    """Says what is abnormal and where, or that nothing is. Empty where the data states neither."""
    findings = said_findings(facts)
    health = {fact.subject: fact.value for fact in facts if fact.kind == "health"}
    sick = [organ.name for organ in ORGANS if health.get(organ.name) == "abnormal"]
    well = [organ.name for organ in ORGANS if health.get(organ.name) == "healthy"]
    if findings:
        return findings_part(facts, findings, language)
    if health.get(PICTURE) == "healthy":
        return "未见异常。" if language == "zh" else "No abnormality is visible."
    if where := phrase(finest(stated_places(facts, ABNORMALITY)), language):
        return f"可见异常，位于{where}。" if language == "zh" else f"There is an abnormality {where}."
    if sick:
        return state(sick, "abnormal", language)
    if health.get(PICTURE) == "abnormal":
        return "可见异常。" if language == "zh" else "There is an abnormality."
    return state(well, "healthy", language) if well else ""


def findings_part(facts: Collection[Fact], findings: Sequence[str], language: Language) -> str:
    """Says findings and where they are.

    Findings that share their only place are said together. Where the data places the abnormality but not each of
    several findings, the place has a sentence of its own: which finding is where is not stated.
    """
    homed = [finding for finding in findings if finding in HOME]
    others = [finding for finding in findings if finding not in HOME]
    homes = {HOME[finding] for finding in homed}
    whole = stated_places(facts, ABNORMALITY) - homes
    own = {finding: finest(stated_places(facts, finding)) for finding in others}
    everything = finest({*whole, *(place for finding in others for place in stated_places(facts, finding))})
    if len(others) == 1:
        own[others[0]] = everything
    elif len(everything) == 1 and not everything[0].startswith("both") and (whole or all(own.values())):
        own = dict.fromkeys(others, everything)
    sentences = [findings_sentence(homed, [], language)] if homed else []
    for places, group in groupby(others, key=own.__getitem__):
        sentences.append(findings_sentence(list(group), places, language))
    if len(others) > 1 and not any(own.values()) and (where := phrase(everything, language)):
        sentences.append(f"异常位于{where}。" if language == "zh" else f"The abnormality is {where}.")
    return joined(sentences, language)


def findings_sentence(findings: Sequence[str], places: Sequence[str], language: Language) -> str:
    """Says findings that share their places."""
    where = phrase(places, language)
    if language == "zh":
        return f"异常：{listed(findings, FINDINGS, language)}{where and f'，位于{where}'}。"
    said = [word(finding, FINDINGS, language) for finding in findings]
    counted = [
        f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if finding in COUNTABLE else name
        for finding, name in zip(findings, said, strict=True)
    ]
    return f"There is {enumerated(counted)}{where and f' {where}'}."


def said_findings(facts: Collection[Fact]) -> list[str]:
    """Returns the findings that a report names: a kind of brain tumor makes the general word needless."""
    there = {fact.subject for fact in facts if (fact.kind, fact.value) == ("finding", "present")}
    if any("enhancing" in name for name in there):
        there.discard("brain tumor")
    return [finding.name for finding in FINDINGS if finding.name in there]


def stated_places(facts: Collection[Fact], subject: str) -> set[str]:
    """Returns the places that the data gives for a finding, or for the abnormality."""
    places = {fact.value for fact in facts if (fact.kind, fact.subject) == ("place", subject)}
    return {place for place in places if not place.startswith("not ")}


def finest(places: Collection[str]) -> list[str]:
    """Returns the finest of places that hold one another, at most two, and parts of the body where any is named."""
    anatomical = {place for place in places if set(place.split()) & set(PARTS)}
    if both := {place for place in anatomical if place.startswith("both ")}:
        return sorted(both)[-1:]  # "both lungs" before "both chests"
    chosen = anatomical or set(places)
    return sorted(place for place in chosen if not any(coarser(place, other) for other in chosen))[:2]


def coarser(place: str, other: str) -> bool:
    """Tells whether one place holds the other: "left lung" holds "lower left lung", and "left chest" holds both."""
    words, others = (set(name.split()) for name in (place, other))
    return words < others or ("chest" in words and "lung" in others and words - {"chest"} <= others)


def phrase(places: Sequence[str], language: Language) -> str:
    """Says places: "in the lower left lung", "on the left of the picture"."""
    if language == "zh":
        return "和".join(place_zh(place) for place in places)
    return " and ".join(place_en(place) for place in places)


def place_en(place: str) -> str:
    """Says a place in English."""
    words = place.split()
    if place in BARE:
        return f"{BARE[place][0]} of the picture"
    if words[0] == "both":
        return f"in both {words[1]}s"
    if words[-1] in PARTS:
        return f"in the {place}"
    return f"on the {place} of the picture"


def place_zh(place: str) -> str:
    """Says a place in Chinese."""
    words = place.split()
    if place in BARE:
        return f"图像{BARE[place][1]}"
    side = next((SIDES[word] for word in words if word in SIDES), "")
    level = next((LEVELS[word] for word in words if word in LEVELS), "")
    part = next((PARTS[word] for word in words if word in PARTS), "")
    return f"{side}{level}{part}" if part else f"图像{side}{level or '侧'}"


def state(organs: Sequence[str], value: str, language: Language) -> str:
    """Says that organs look healthy or abnormal."""
    said = listed(organs, ORGANS, language)
    if language == "zh":
        return f"{said}{'正常' if value == 'healthy' else '异常'}。"
    one_thing = len(organs) == 1 and not said.endswith("s")
    return f"The {said} {'looks' if one_thing else 'look'} {value}."


def listed(names: Sequence[str], terms: tuple[Term, ...], language: Language) -> str:
    """Says names as a list: "a, b and c"."""
    said = [word(name, terms, language) for name in names]
    return "、".join(said) if language == "zh" else enumerated(said)


def enumerated(words: Sequence[str]) -> str:
    """Says words as an English list: "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def one(facts: Collection[Fact], kind: str) -> str:
    """Returns the value of a kind that has one value, or an empty string."""
    values = [fact.value for fact in facts if (fact.kind, fact.subject) == (kind, PICTURE)]
    return next((value for value in values if not value.startswith("not ")), "")


def joined(parts: Sequence[str], language: Language) -> str:
    """Joins sentences."""
    return ("" if language == "zh" else " ").join(parts)


def check_language(language: str) -> None:
    """Refuses a language that reports are not written in."""
    if language not in COUNTS:
        raise ValueError(f"no reports in language {language!r}: use 'en' or 'zh'")
