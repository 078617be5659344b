"""Who wins, in plain words, and what the sample is too small to say.

What it does not know: HTML. What always holds: nobody "wins" or "beats" without an adjusted p below 0.05; a difference
is said with its interval; the fused model is held against every other pipeline, also where it loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from multimodal.compare.report import words
from multimodal.compare.results import Results
from multimodal.compare.statistics import Difference
from multimodal.compare.summary import BLIND, Figures, Pair

NATIVE = "native"  # the fused model, which the comparison is about
ALPHA = 0.05
BRACKETS = (
    "In brackets: the 95 % interval, and p adjusted for all the pairs that were compared; a pipeline beats another "
    "where it is below 0.05."
)


@dataclass(frozen=True)
class Verdict:
    """What a task shows.

    Attributes:
        task: Its name.
        headline: Who wins, or that nobody does.
        points: More sentences: the fused model against each of the others, controls, errors.
    """

    task: str
    headline: str
    points: tuple[str, ...] = ()


def verdicts(results: Results, figures: Sequence[Figures], pairs: Sequence[Pair]) -> list[Verdict]:
    """One for each task."""
    return [
        _verdict(task, [each for each in figures if each.task == task], [pair for pair in pairs if pair.task == task])
        for task in results.tasks
    ]


def _verdict(task: str, figures: Sequence[Figures], pairs: Sequence[Pair]) -> Verdict:
    asked = sum(each.errors for each in figures)
    # The deciding score of each, the best first; sorted() keeps the run's order among equals.
    ranked = sorted((each for each in figures if each.score), key=lambda each: -each.score.value if each.score else 0)
    if not ranked:
        return Verdict(
            task, f"No pipeline answered a question of {task}: {words.plural(asked, 'error')}, listed below."
        )
    remarks = _incomplete(figures)
    leader = ranked[0]
    if len(ranked) == 1:
        count = leader.score.count if leader.score else 0
        said = f"Only {leader.pipeline} answered {task}: {_score(leader)}, {words.plural(count, 'question')}."
        return Verdict(task, f"{said} There is nothing to compare it with.", (*_shuffled(leader), *remarks))
    rival = ranked[1]
    reference = next((each for each in ranked if each.pipeline == NATIVE), leader)
    others = [
        each
        for each in ranked
        if each is not reference and not (each in (leader, rival) and reference in (leader, rival))
    ]
    compared = [sentence for each in others if (sentence := _against(reference, each, pairs))]
    return Verdict(task, _headline(task, leader, rival, pairs), (*compared, *_shuffled(reference), *remarks))


def _headline(task: str, leader: Figures, rival: Figures, pairs: Sequence[Pair]) -> str:
    found = _difference(leader.pipeline, rival.pipeline, pairs)
    if found is None:
        return (
            f"{leader.pipeline} has the highest score on {task} ({_score(leader)}), but {rival.pipeline}, the next, "
            "answered none of the same questions: the two cannot be compared."
        )
    if not _is_found(found):
        return (
            f"No clear winner on {task}: {leader.pipeline} scores {_value(leader)}, {rival.pipeline} {_value(rival)}. "
            f"On the same {words.plural(found.count, 'question')} {_undecided(leader, rival, found)}."
        )
    # On the questions that both answered, the second may be the better one.
    best, next_best = (leader, rival) if found.value > 0 else (rival, leader)
    more = words.gap(abs(found.value), leader.metric)
    blind = " It sees no picture." if best.pipeline == BLIND else ""
    return (
        f"{best.pipeline} wins on {task}: {_value(best)}, {more} more than {next_best.pipeline}, the next best, on the "
        f"same {words.plural(found.count, 'question')} ({_evidence(found, leader.metric)}).{blind}"
    )


def _against(reference: Figures, other: Figures, pairs: Sequence[Pair]) -> str:
    found = _difference(reference.pipeline, other.pipeline, pairs)
    if found is None:
        return ""
    blind = other.pipeline == BLIND
    if not _is_found(found):
        end = ", so it is not shown that seeing the picture helps" if blind else ""
        return f"{_undecided(reference, other, found)}{end}."
    best, worse = (reference, other) if found.value > 0 else (other, reference)
    end = ", which sees no picture," if blind and worse is other else ""
    start = ", which sees no picture," if blind and best is other else ""
    more = words.gap(abs(found.value), reference.metric)
    return f"{best.pipeline}{start} beats {worse.pipeline}{end} by {more} ({_evidence(found, reference.metric)})."


def _difference(first: str, second: str, pairs: Sequence[Pair]) -> Difference | None:
    """Of two pipelines, that of the first less that of the second."""
    for pair in pairs:
        if (pair.first, pair.second) == (first, second):
            return pair.difference
        if (pair.first, pair.second) == (second, first):
            there = pair.difference
            return replace(
                there, value=-there.value, low=-there.high, high=-there.low,
                only_first=there.only_second, only_second=there.only_first,
            )  # fmt: skip
    return None


def _is_found(difference: Difference) -> bool:
    return difference.adjusted_p < ALPHA and difference.value != 0


def _evidence(difference: Difference, metric: str) -> str:
    """Interval and p, for how much better the better one is."""
    low, high = difference.low, difference.high
    if difference.value < 0:
        low, high = -high, -low
    p = words.p_value(difference.adjusted_p)
    return f"{words.ends(low, high, metric)}, p {p if p.startswith('<') else f'= {p}'}"


def _undecided(one: Figures, other: Figures, difference: Difference) -> str:
    """What is seen of a difference that was not found. The difference is that of the first less that of the second."""
    if difference.only_first == 0 and difference.only_second == 0:
        return f"{one.pipeline} and {other.pipeline} were right on the very same questions"
    more, less = (one, other) if difference.value >= 0 else (other, one)
    found = words.gap(abs(difference.value), one.metric)
    said = f"{more.pipeline} scores {found} more than {less.pipeline} ({_evidence(difference, one.metric)})"
    if abs(difference.value) < difference.detectable:
        return (
            f"{said}, less than this sample could find: it takes about {words.gap(difference.detectable, one.metric)}"
        )
    return f"{said}, which may be chance once all the pairs that were compared are counted"


def _shuffled(figures: Figures) -> list[str]:
    if figures.shuffled is None or figures.score is None:
        return []
    score = words.interval(figures.shuffled, figures.metric)
    said = f"Given the pictures of other questions, {figures.pipeline} scores {score}"
    if figures.shuffled.high < figures.score.low:
        return [f"{said}: it does use the right picture."]
    return [f"{said}, which overlaps with its score on the right ones: it is not shown that it looks at them."]


def _incomplete(figures: Sequence[Figures]) -> list[str]:
    asked = {each.pipeline: (each.score.count if each.score else 0) + each.errors for each in figures}
    most = max(asked.values())
    said = [
        f"{each.pipeline} gave no answer to {each.errors:,} of {words.plural(asked[each.pipeline], 'question')}: "
        "they count neither as right nor as wrong."
        for each in figures
        if each.errors
    ]
    late = [f"{name} {count:,}" for name, count in asked.items() if count < most]
    if late:
        said.append(f"Unfinished: of {words.plural(most, 'question')}, {words.listed(late)} were asked so far.")
    return said


def _score(figures: Figures) -> str:
    return words.interval(figures.score, figures.metric)


def _value(figures: Figures) -> str:
    return words.score(figures.score.value if figures.score else None, figures.metric)
