"""Few examples: drawn evenly over their answers, a part of them held out, and two sets of answers to it compared.

It knows no model. What always holds: examples that share a picture stand on one side, whatever its file is called.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from multimodal.data import Sample, normalise_answer
from multimodal.data.scoring import wilson_interval

SURE = 0.05  # the usual level of significance


def draw_evenly(samples: Sequence[Sample], count: int, *, seed: int) -> list[Sample]:
    """Draw so many samples, as evenly over their answers as there are; in their old order."""
    by_answer: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        by_answer[normalise_answer(sample.answer)].append(place)
    chance = random.Random(seed)
    piles = [chance.sample(by_answer[answer], len(by_answer[answer])) for answer in sorted(by_answer)]
    chance.shuffle(piles)  # where they do not come out even, no answer is always the one that gets less
    drawn: list[int] = []
    while len(drawn) < count and any(piles):
        drawn += [pile.pop() for pile in piles if pile]
    return [samples[place] for place in sorted(drawn[:count])]


def split_by_answer(samples: Sequence[Sample], share: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a share of the samples: whole pictures, of every answer its share, of none all.

    Returns:
        Those to train on and those held out, each in their old order.
    """
    groups = _by_picture(samples)
    often = Counter(normalise_answer(sample.answer) for sample in samples)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for group in groups:
        # The rarest of its answers: a frequent one gets its share anyhow. Answers that come once make one stratum.
        rarest = min((normalise_answer(samples[place].answer) for place in group), key=lambda answer: often[answer])
        strata[rarest if often[rarest] > 1 else ""].append(group)
    chance = random.Random(seed)
    held_out: set[int] = set()
    owed = 0.0  # samples: what one stratum gives too little, the next ones give
    for answer in sorted(strata):
        stratum = strata[answer]
        chance.shuffle(stratum)
        owed += share * sum(map(len, stratum))
        for group in stratum[1:]:
            if len(group) / 2 > owed:
                break
            held_out.update(group)
            owed -= len(group)
    kept = [sample for place, sample in enumerate(samples) if place not in held_out]
    return kept, [samples[place] for place in sorted(held_out)]


def _by_picture(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of samples that are joined by a picture, by its content."""
    leader = list(range(len(samples)))

    def find(place: int) -> int:
        while leader[place] != place:
            leader[place] = place = leader[leader[place]]
        return place

    first: dict[bytes, int] = {}
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for sample in samples for path in sample.images}
    for place, sample in enumerate(samples):
        for path in sample.images:
            other = find(first.setdefault(digests[path], place))
            leader[max(other, find(place))] = min(other, find(place))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(samples)):
        groups[find(place)].append(place)
    return list(groups.values())


@dataclass(frozen=True)
class Paired:
    """The same questions answered twice, before and after.

    Attributes:
        total: Questions.
        before: Right answers before.
        after: Right answers after.
        gained: Questions that were wrong before and are right after.
        lost: Questions that were right before and are wrong after.
    """

    total: int
    before: int
    after: int
    gained: int
    lost: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Count."""
        pairs = list(zip(before, after, strict=True))
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        return cls(len(pairs), sum(before), sum(after), gained, lost)

    @property
    def chance(self) -> float:
        """How likely so uneven a split of gained and lost questions is, if neither is better: McNemar's exact test.

        Q. McNemar, "Note on the sampling error of the difference between correlated proportions", 1947; two-sided.
        """
        changed, fewer = self.gained + self.lost, min(self.gained, self.lost)
        if not changed:
            return 1.0
        return min(1.0, 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)

    @property
    def verdict(self) -> str:
        """Whether it is better, in words."""
        if self.chance < SURE:
            return "better" if self.gained > self.lost else "worse"
        return "no difference that this many questions could show"

    def lines(self) -> list[str]:
        """What a person wants to know of it."""
        if not self.total:
            return ["nothing was held out, so nobody knows how good it is"]
        return [
            f"before: {self._score(self.before)}",
            f"after:  {self._score(self.after)}",
            f"of the same {self.total} questions {self.gained} became right and {self.lost} wrong: {self.verdict} "
            f"(exact McNemar test, p = {self.chance:.2g})",
        ]

    def _score(self, right: int) -> str:
        low, high = wilson_interval(right, self.total)
        return f"{right} of {self.total} right, {right / self.total:.1%} (95 % interval {low:.1%} to {high:.1%})"
