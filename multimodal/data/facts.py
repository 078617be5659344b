# ruff: noqa: RUF001
"""What the data states about a SLAKE picture: its questions, answers and boxes, read as facts.

A question with its answer is a statement ("Does the picture contain liver?" "Yes"), in English or Chinese alike. The
rule is never to invent one: a question that these rules don't know gives nothing, and where two statements contradict
each other, both are dropped. Knows nothing of reports.

Kinds of facts, with an example each:

    modality   picture      X-ray      (or "not CT")          organ     liver        present / absent
    weighting  picture      T2                                count     kidney       2
    plane      picture      transverse                        largest   picture      lung
    region     picture      chest                             position  liver        upper left
    finding    pneumonia    present / absent                  colour    lung         black
    findings   picture      mass, nodule   (all there are)    health    lung         healthy / abnormal
    place      abnormality  lower left lung (or "not ...")    health    picture      healthy / abnormal
    place      pneumonia    lower left lung
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multimodal.data.boxes import read_boxes
from multimodal.data.sample import DataError, Sample
from multimodal.data.terms import (
    FINDINGS,
    MODALITIES,
    ORGANS,
    PARTS,
    PLANES,
    REGIONS,
    WEIGHTINGS,
    Term,
    names,
    places,
    without,
)

PICTURE, ABNORMALITY = "picture", "abnormality"
# Kinds of which a picture has one value only.
EXCLUSIVE = ("modality", "weighting", "plane", "region", "findings", "count", "largest", "health", "organ", "finding")
YES = ("yes", "是的", "是", "有", "包含", "包括", "存在", "可以", "健康", "正常")
NO = ("no", "不是", "没有", "否", "不包含", "不包括", "不存在", "不可以", "不正常", "不健康", "无异常")
NOTHING = ("none", "无", "没有", "不包含", "0")
UNSEEN = ("not seen", "不存在")
# What a question about health asks, the sick wording first: "unhealthy" holds "healthy".
SICK = re.compile(r"abnormal|unhealthy|not healthy|异常|不正常|不健康|存在疾病")
WELL = re.compile(r"normal|healthy|正常|健康")
ABOUT_WHOLE = re.compile(r"image|picture|patient|图|病人|患者|any ")


@dataclass(frozen=True, order=True)
class Fact:
    """One thing that holds for a picture, under names that don't depend on the language.

    Attributes:
        kind: What sort of thing it is; see the top of this file.
        subject: What it is about: an organ, a finding, `"abnormality"` or `"picture"`.
        value: What holds for it.
    """

    kind: str
    subject: str
    value: str


def picture_facts(samples: Sequence[Sample]) -> frozenset[Fact]:
    """Returns what the questions of one picture, and the boxes that lie beside it, state about it.

    Args:
        samples: Questions about the same picture, in English, Chinese or both.

    Raises:
        ValueError: There is no sample, or they are about different pictures.
    """
    if len({sample.images for sample in samples}) != 1:
        raise ValueError("give the samples of exactly one picture")
    boxed = box_names(samples[0].images[0])
    facts = {*(fact for sample in samples for fact in stated(sample)), *box_facts(boxed)}
    location = samples[0].meta.get("location", "")
    if not any(fact.kind == "region" and not fact.value.startswith("not ") for fact in facts):
        facts |= set(one_of("region", location, REGIONS))
    if location in ("Brain", "Brain_Tissue"):
        facts.add(Fact("organ", "brain", "present"))
    return consistent(in_region(facts))


def in_region(facts: set[Fact]) -> set[Fact]:
    """Reads "the left lobe" as the left lung in a picture of the chest: SLAKE asks for a lobe and means a lung."""
    if Fact("region", PICTURE, "chest") not in facts:
        return facts
    return {
        Fact(fact.kind, fact.subject, re.sub("lobe$", "lung", fact.value)) if fact.kind == "place" else fact
        for fact in facts
    }


def stated(sample: Sample) -> set[Fact]:
    """Returns what one question and its answer state. Empty where the rules don't know the question."""
    question, answer = sample.question.lower(), sample.answer.lower().strip(" .。")
    kind = sample.meta.get("content_type", "")
    if not answer:
        return set()
    rules = CONTENT_RULES.get(kind, CLOSED_RULES if answer in YES + NO else OPEN_RULES)
    facts = next((set(given) for rule in rules if (given := list(rule(question, answer)))), set())
    return facts | set(from_meta(sample))


def from_meta(sample: Sample) -> Iterator[Fact]:
    """Yields the kind of picture that every record of SLAKE names beside its question."""
    yield from one_of("modality", sample.meta.get("modality", ""), MODALITIES)


def one_of(kind: str, text: str, terms: tuple[Term, ...]) -> Iterator[Fact]:
    """Yields the fact that a text names exactly one of these terms."""
    named = names(text, terms)
    if len(named) == 1:
        yield Fact(kind, PICTURE, named[0])


def presence(kind: str, subjects: Iterable[str], yes: bool = True) -> Iterator[Fact]:
    """Yields that organs or findings are there, or that they are not."""
    yield from (Fact(kind, subject, "present" if yes else "absent") for subject in subjects)


def organs_in(text: str) -> list[str]:
    """Returns the organs that a text names; a finding's name is no mention of its organ."""
    return names(without(text, FINDINGS), ORGANS)


def findings_in(text: str) -> list[str]:
    """Returns the findings that a text names. A tumor that enhances, or doesn't, is a brain tumor too."""
    named = names(text, FINDINGS)
    return list(dict.fromkeys([*named, *(["brain tumor"] if any("enhancing" in name for name in named) else [])]))


# Questions with the answer yes or no.


def closed_scan(question: str, answer: str) -> Iterator[Fact]:
    """Is this a CT? Is this a T2 weighted MRI? Is this a coronal plane? Is this a study of the chest?"""
    denied = "" if answer in YES else "not "
    if not re.match(r"is this|do the organs|这|图像中的器官是否", question):
        return
    weightings = [weighting for weighting in WEIGHTINGS if weighting.lower() in question]
    if weightings:
        yield from (Fact("weighting", PICTURE, denied + weighting) for weighting in weightings)
    elif re.search(r"study of|exist in the|关于|存在于", question):
        yield from (Fact("region", PICTURE, denied + name) for name in names(question, REGIONS))
    else:
        for kind, terms in (("modality", MODALITIES), ("plane", PLANES)):
            yield from (Fact(kind, PICTURE, denied + name) for name in names(question, terms))


def closed_finding(question: str, answer: str) -> Iterator[Fact]:
    """Can pneumonia be observed on the lower right lung? Does the patient have liver cancer?"""
    findings = findings_in(question)
    if not findings or re.search(r"enhancing\?|增强性", question):
        return
    yes = answer in YES
    where = places(without(question, FINDINGS))
    if yes or not where:
        yield from presence("finding", findings, yes)
    if yes and len(names(question, FINDINGS)) == 1:
        yield from (Fact("place", findings[0], place) for place in where)
    if yes:
        yield Fact("health", PICTURE, "abnormal")


def closed_health(question: str, answer: str) -> Iterator[Fact]:
    """Is the lung healthy? Does this image look abnormal? Are there abnormalities in the patient's right lung?"""
    sick = bool(SICK.search(question))
    if not sick and not WELL.search(question):
        return
    abnormal = (answer in YES) == sick
    if answer in ("正常", "健康", "无异常", "不正常", "不健康"):  # these say it whichever way the question is put
        abnormal = answer in ("不正常", "不健康")
    sided = [place for place in places(question) if place.split()[0] in ("left", "right", "upper", "lower")]
    organs = organs_in(question)
    if sided:
        yield from (Fact("place", ABNORMALITY, place if abnormal else f"not {place}") for place in sided)
        if abnormal:
            yield Fact("health", PICTURE, "abnormal")
    elif organs:
        yield from (Fact("health", organ, "abnormal" if abnormal else "healthy") for organ in organs)
        if abnormal:
            yield Fact("health", PICTURE, "abnormal")
    elif ABOUT_WHOLE.search(question) and not re.search("chest|胸", question):
        yield Fact("health", PICTURE, "abnormal" if abnormal else "healthy")


def closed_organ(question: str, answer: str) -> Iterator[Fact]:
    """Does the picture contain liver?"""
    if re.search("在哪", question) and answer in UNSEEN:
        yield from presence("organ", organs_in(question), False)
        return
    asked = re.search(r"contain|is there|appear|exist|包含|里有|中有|出现|存在", question)
    if asked and not re.search(r"organs? |tissue|器官|组织", question):
        yield from presence("organ", organs_in(question), answer in YES)


# Questions with any other answer.


def open_scan(question: str, answer: str) -> Iterator[Fact]:
    """What modality is used? What is the mr weighting? What is the scanning plane?"""
    if re.fullmatch(r"t[12]", answer):
        yield Fact("weighting", PICTURE, answer.upper())
    elif not re.search(r"organ|器官", question):
        yield from one_of("modality", answer, MODALITIES)
        yield from one_of("plane", answer, PLANES)


def open_region(question: str, answer: str) -> Iterator[Fact]:
    """Which part of the body does this image belong to? Which organ system is imaged?"""
    if re.search(
        r"part of the (?:human )?body|from the aspect|where does the|organ system|"
        r"身体|哪个部[分位]|展示的位置|器官系统",
        question,
    ) and not re.search(r"organ on|lower end|marks|下端|顶部|右下|黑色|灰色|上方|lung|heart|肺|疾病|异常", question):
        yield from one_of("region", answer, REGIONS)


def open_findings(question: str, answer: str) -> Iterator[Fact]:
    """What diseases are included in the picture? What disease is shown on the right of lung?"""
    if not re.search(r"what disease|什么疾?病|哪些疾病|哪些异常", question):
        return
    findings = findings_in(answer)
    where = places(question)
    whole = re.search(r"included|哪些", question)
    if answer in NOTHING and whole:
        yield Fact("health", PICTURE, "healthy")
        yield Fact("findings", PICTURE, "none")
    elif findings:
        yield from presence("finding", findings)
        yield Fact("health", PICTURE, "abnormal")
        if whole and len(names(answer, FINDINGS)) == len(re.split("[,，]", answer)):  # each one is known
            yield Fact("findings", PICTURE, ", ".join(sorted(findings)))
        yield from (Fact("place", finding, place) for finding in findings for place in where if " " in place)


def open_abnormal_organ(question: str, answer: str) -> Iterator[Fact]:
    """Which organ is abnormal, heart or lung?"""
    if re.search(r"which organ.* abnormal|哪个(?:器官)?是(?:异常|不正常)", question):
        organs = organs_in(question) if answer in ("both", "都是") else organs_in(answer)
        yield from (Fact("health", organ, "abnormal") for organ in organs)
        if organs:
            yield Fact("health", PICTURE, "abnormal")


def open_place(question: str, answer: str) -> Iterator[Fact]:
    """Where is the abnormality located? Where is the brain edema? Which side of lung is abnormal?"""
    findings = findings_in(question)
    side = re.search(
        r"which (?:side|lobe|hemisphere|part of chest)|哪一?[侧个部](?:侧|叶|部分)?|哪侧|哪个(?:叶|半球)", question
    )
    asked = re.search(r"where (?:is|are)|what part|which part|哪|位于", question)
    about = findings or re.search(r"abnormal|异常|不正常", question)
    well = side and re.search(r"(?<!ab)normal|(?<!不)正常", question)
    if (not asked and not side) or not (about or well):
        return
    part = next(iter(places(without(question, FINDINGS))), "") or part_of(question)
    where = places(answer, part if part in PARTS else "")
    if answer in ("both", "双侧", "都是") and part in PARTS:
        where = [f"both {part}"]
    if well:
        yield from (Fact("place", ABNORMALITY, f"not {place}") for place in where if "both" not in place)
        return
    yield from (Fact("place", subject, place) for subject in findings or [ABNORMALITY] for place in where)
    yield from presence("finding", findings)
    yield Fact("health", PICTURE, "abnormal")


def part_of(question: str) -> str:
    """Returns the part of the body that a question about a side is about."""
    text = without(question, FINDINGS)
    parts = {"lung": "lung|肺", "chest": "chest|胸", "lobe": "lobe|hemisphere|brain|叶|脑"}
    return next((part for part, words in parts.items() if re.search(words, text)), "")


def open_count(question: str, answer: str) -> Iterator[Fact]:
    """How many kidneys in this image? How many kinds of abnormalities?"""
    if not re.search(r"how many|多少|几", question) or not answer.isdigit():
        return
    if re.search(r"kinds of|种异常", question):
        yield Fact("count", ABNORMALITY, answer)
        yield Fact("health", PICTURE, "healthy" if answer == "0" else "abnormal")
        return
    for organ in organs_in(question):
        yield Fact("count", organ, answer)
        yield from presence("organ", [organ], answer != "0")


def open_organ(question: str, answer: str) -> Iterator[Fact]:
    """What is the largest organ? What organ is the gray part? Where is the liver? What color is the lung?"""
    organs = organs_in(answer)
    if re.search(r"biggest|bigger|smaller|smallest|largest|最大|更大|更小|最小", question):
        yield from presence("organ", organs)
        if organs and re.search(r"largest organ|最大的器官", question):
            yield Fact("largest", PICTURE, organs[0])
    elif re.match(r"(?:which|where) (?:is|are|place)", question) or re.search(r"在哪|哪一?个是", question):
        asked = organs_in(question)
        yield from presence("organ", asked, answer not in UNSEEN)
        if len(asked) == 1 and answer not in UNSEEN and not organs:  # not "upper left of spleen"
            yield from (Fact("position", asked[0], place) for place in places(answer))
    elif not re.search(r"organ system|器官系统|part of the body|function|功能", question):
        yield from presence("organ", organs)


def colour(question: str, answer: str) -> Iterator[Fact]:
    """What color is the lung in the picture?"""
    value = next((name for name, ways in COLOURS.items() if answer in ways), "")
    if not value or not re.search(r"colou?r|颜色", question):
        return
    asked = findings_in(question) or organs_in(question)
    if not findings_in(question):
        yield from presence("organ", asked)
    if len(asked) == 1 and not re.search("left|right|左|右", question):
        yield Fact("colour", asked[0], value)


def known_parts(question: str, answer: str) -> Iterator[Fact]:
    """Which organs in the picture belong to the respiratory system?"""
    if re.match(r"which organs?/organ|图片中哪个器官属于", question):
        yield from presence("organ", organs_in(answer))


COLOURS = {
    "black": ("black", "黑色"),
    "white": ("white", "白色"),
    "gray": ("gray", "grey", "灰色"),
    "light gray": ("light grey", "light gray", "浅灰色"),
    "dark gray": ("dark gray", "dark grey", "深灰色"),
}
CLOSED_RULES = (closed_scan, closed_finding, closed_health, closed_organ)
OPEN_RULES = (open_count, open_findings, open_abnormal_organ, open_place, open_region, open_scan, open_organ)
CONTENT_RULES = {"KG": (known_parts,), "Color": (colour,), "Shape": ()}


def box_names(picture: Path) -> list[str]:
    """Returns what the boxes beside a picture are around; nothing where it has none that can be read.

    A broken file is named by `read_slake`, which reads it too.
    """
    try:
        return [box.label for box in read_boxes(picture)]
    except DataError:
        return []


def box_facts(boxed: Iterable[str]) -> Iterator[Fact]:
    """Yields that what has a box is there."""
    for name in boxed:
        findings = findings_in(name)
        yield from presence("finding", findings) if findings else presence("organ", organs_in(name))
        if findings:
            yield Fact("health", PICTURE, "abnormal")


def consistent(facts: Iterable[Fact]) -> frozenset[Fact]:
    """Drops what contradicts something else."""
    stated = set(facts)
    by_subject: dict[tuple[str, str], set[str]] = {}
    for fact in stated:
        by_subject.setdefault((fact.kind, fact.subject), set()).add(fact.value)
    wrong = outside_lists(stated)
    for (kind, subject), values in by_subject.items():
        positive = {value for value in values if not value.startswith("not ")}
        clashing = {value for value in positive if f"not {value}" in values}
        clashing |= {f"not {value}" for value in clashing}
        if kind in EXCLUSIVE and len(positive) > 1:
            clashing |= positive
        wrong |= {Fact(kind, subject, value) for value in clashing}
    return frozenset(stated - wrong)


def outside_lists(facts: set[Fact]) -> set[Fact]:
    """Returns findings that a list of all findings leaves out, with that list; "brain tumor" holds its kinds."""
    lists = {fact: set(fact.value.split(", ")) for fact in facts if fact.kind == "findings"}
    wrong = set()
    for fact in facts:
        if (fact.kind, fact.value) == ("finding", "present"):
            general = "brain tumor" if "enhancing" in fact.subject else fact.subject
            clashing = {other for other, listed in lists.items() if not {fact.subject, general} & listed}
            wrong |= clashing | ({fact} if clashing else set())
    return wrong
