# ruff: noqa: RUF001
"""How much of a report is right, and how much it leaves out, measured against the facts of the picture.

A report is read back into facts, sentence by sentence, by the words that `compose` writes and by their other spellings
in either language; what isn't understood says nothing. Each fact said is right, wrong, or can't be judged because the
data is silent about it.

    precision = facts said that the data confirms / facts said that the data confirms or contradicts
    recall    = facts said and right / facts that the data states and a composed report says

The facts of a report are: modality, weighting, plane, region, each organ, each finding, where the abnormality is, and
whether anything is abnormal at all (any finding says so) or which organs look healthy or abnormal.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from multimodal.data.compose import compose_report
from multimodal.data.facts import ABNORMALITY, EXCLUSIVE, PICTURE, Fact, findings_in, organs_in
from multimodal.data.terms import FINDINGS, MODALITIES, PLANES, REGIONS, WEIGHTINGS, names, places, says, without

NO_ABNORMALITY = re.compile(r"\bno (?:visible )?(?:abnormal|disease|finding)|未见异常|无异常|没有异常|未见明显异常")
LOOKS_WELL = re.compile(r"\b(?:looks?|is|are) (?:healthy|normal)|(?<!不)正常|健康")
LOOKS_SICK = re.compile(r"\b(?:looks?|is|are) abnormal|异常")
SHOWS = re.compile(r"\b(?:shows?|visible|contains?)\b|可见|包含")


@dataclass(frozen=True)
class ReportScore:
    """What one report says and leaves out.

    Attributes:
        right: Facts said that the data confirms.
        wrong: Facts said that the data contradicts.
        found: Facts that a composed report says and that this one says too.
        missed: Facts that a composed report says and that this one doesn't.
    """

    right: frozenset[Fact]
    wrong: frozenset[Fact]
    found: frozenset[Fact]
    missed: frozenset[Fact]

    @property
    def precision(self) -> float:
        """Share of what was said, and can be judged, that is right; 0 where nothing that was said can be judged."""
        return share(len(self.right), len(self.wrong))

    @property
    def recall(self) -> float:
        """Share of the facts of a composed report that were said."""
        return share(len(self.found), len(self.missed))


@dataclass(frozen=True)
class ReportTotals:
    """Precision and recall over many reports, every fact counting the same.

    Attributes:
        precision: Facts right of facts right or wrong.
        recall: Facts found of facts found or missed.
        by_kind: The same two for each kind of fact, with the number of facts said and judged, and to be said.
        reports: How many reports were scored.
    """

    precision: float
    recall: float
    by_kind: dict[str, tuple[float, float, int, int]]
    reports: int


def score_report(text: str, facts: Collection[Fact]) -> ReportScore:
    """Scores a report against the facts of its picture.

    Args:
        text: A whole report, in English or Chinese.
        facts: What the data states about the picture, from `picture_facts`.
    """
    said = read_report(text)
    judged = {fact: verdict(fact, facts) for fact in said}
    expected = read_report(compose_report(facts, "en"))
    found = {fact for fact in expected if any(agrees(one, fact) and judged[one] for one in said)}
    return ReportScore(
        right=frozenset(fact for fact, right in judged.items() if right),
        wrong=frozenset(fact for fact, right in judged.items() if right is False),
        found=frozenset(found),
        missed=frozenset(expected - found),
    )


def total(scores: Sequence[ReportScore]) -> ReportTotals:
    """Adds up scores: every fact counts the same, whatever the length of its report."""
    counts: dict[str, list[int]] = {}
    for score in scores:
        for column, facts in enumerate((score.right, score.wrong, score.found, score.missed)):
            for fact in facts:
                counts.setdefault(fact.kind, [0, 0, 0, 0])[column] += 1
    right, wrong, found, missed = (sum(row[column] for row in counts.values()) for column in range(4))
    return ReportTotals(
        precision=share(right, wrong),
        recall=share(found, missed),
        by_kind={
            kind: (share(row[0], row[1]), share(row[2], row[3]), row[0] + row[1], row[2] + row[3])
            for kind, row in sorted(counts.items())
        },
        reports=len(scores),
    )


def read_report(text: str) -> set[Fact]:
    """Reads the facts that a report states."""
    facts: set[Fact] = set()
    for sentence in re.split(r"(?<=[.!?])\s+|[。！？\n]", text.lower()):
        facts |= set(read_sentence(sentence))
    return facts


def read_sentence(sentence: str) -> Iterable[Fact]:
    """Yields the facts of one sentence."""
    findings = findings_in(sentence)
    organs = organs_in(sentence)
    rest = without(sentence, FINDINGS)
    if NO_ABNORMALITY.search(sentence):
        yield Fact("health", PICTURE, "healthy")
    elif names(sentence, MODALITIES):
        yield from read_scan(sentence)
    elif findings:
        yield Fact("health", PICTURE, "abnormal")
        yield from (Fact("finding", finding, "present") for finding in findings)
        yield from (Fact("place", ABNORMALITY, place) for place in places(placed(rest)))
    elif re.search(r"an abnormality|abnormality is|可见异常|异常位于", sentence):
        yield Fact("health", PICTURE, "abnormal")
        yield from (Fact("place", ABNORMALITY, place) for place in places(placed(rest)))
    elif organs and LOOKS_SICK.search(sentence):
        yield Fact("health", PICTURE, "abnormal")
        yield from (Fact("health", organ, "abnormal") for organ in organs)
    elif organs and LOOKS_WELL.search(sentence):
        yield from (Fact("health", organ, "healthy") for organ in organs)
    elif organs and SHOWS.search(sentence):
        yield from (Fact("organ", organ, "present") for organ in organs)


def read_scan(sentence: str) -> Iterable[Fact]:
    """Yields what a sentence says about the kind of picture."""
    yield from (Fact("modality", PICTURE, name) for name in names(sentence, MODALITIES))
    yield from (Fact("plane", PICTURE, name) for name in names(sentence, PLANES))
    yield from (Fact("region", PICTURE, name) for name in names(sentence, REGIONS))
    yield from (Fact("weighting", PICTURE, name) for name in WEIGHTINGS if name.lower() in sentence)


def placed(sentence: str) -> str:
    """Returns the part of a sentence that says where something is."""
    sentence = re.sub(r"of the (?:picture|image)|图像", " ", sentence)
    match = re.search(r"位于(.*)$|\b(?:in|on|at)\b(.*)$", sentence)
    return (match[1] or match[2]) if match else ""


def verdict(said: Fact, facts: Collection[Fact]) -> bool | None:
    """Tells whether the data confirms a fact; `None` where it is silent about it."""
    if said.kind == "place":
        return place_verdict(said.value, facts)
    if said in facts:
        return True
    values = {fact.value for fact in facts if (fact.kind, fact.subject) == (said.kind, said.subject)}
    if said.kind == "finding":
        return False if "absent" in values or not possible(said.subject, facts) else None
    if f"not {said.value}" in values:
        return False
    stated = {value for value in values if not value.startswith("not ")}
    return False if said.kind in EXCLUSIVE and stated else None


def possible(finding: str, facts: Collection[Fact]) -> bool:
    """Tells whether a finding may be there although no fact says so: not where all that is there was listed."""
    if Fact("health", PICTURE, "healthy") in facts:
        return False
    lists = [fact.value.split(", ") for fact in facts if fact.kind == "findings"]
    return all("enhancing" in finding and "brain tumor" in listed for listed in lists)


def place_verdict(place: str, facts: Collection[Fact]) -> bool | None:
    """Tells whether something abnormal is at a place."""
    stated = [fact.value for fact in facts if fact.kind == "place"]
    if f"not {place}" in stated or Fact("health", PICTURE, "healthy") in facts:
        return False
    verdicts = [says(place, other) for other in stated if not other.startswith("not ")]
    if place.startswith("both "):
        part = place.removeprefix("both ")
        if all(any(says(f"{side} {part}", other) for other in stated) for side in ("left", "right")):
            return True
    if True in verdicts:
        return True
    return False if False in verdicts else None


def agrees(said: Fact, expected: Fact) -> bool:
    """Tells whether a fact that was said is the one that is expected; a place may be coarser or finer."""
    if "place" in (said.kind, expected.kind):
        return said.kind == expected.kind and bool(says(said.value, expected.value))
    return said == expected


def share(part: int, rest: int) -> float:
    """Returns a part of the sum, or 0 of nothing."""
    return part / (part + rest) if part + rest else 0.0
