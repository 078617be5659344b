"""How good one answer is: every score of it, each 0 to 1.

Exact match, token F1 (P. Rajpurkar et al., "SQuAD", 2016, section 4.1) and ROUGE-L compare words as
``multimodal.data.scoring`` leaves them; chrF is sacrebleu's.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

from multimodal.data.refusals import REFUSALS
from multimodal.data.scoring import exact_match, rouge_l, words_of
from multimodal.pipelines.endpoint import Endpoint
from multimodal.pipelines.protocol import PipelineError

SHORTEST_WORD = 4  # letters of a word that says something: in English the shorter ones are mostly grammar
GRAMMAR = frozenset(
    word
    for line in (
        "also been both from have into more most other some such than that their them then there these they",
        "this very well were what when which while will with would your",
        "的 了 是 在 和 有 与 及 或 也 都 这 那 它 被 把 为 于 个",
    )
    for word in line.split()
)
CHINESE = "\u3400"  # the first of its characters, each of which is a word
REFUSAL = re.compile(
    r"\b(i (can ?not|can['\u2019]t|am unable|am not able|do not know|don['\u2019]t know)|as an ai|i['\u2019]?m sorry|"
    r"unable to (tell|see|determine|answer))\b|无法|不能(判断|确定|回答)",
    re.IGNORECASE,
)
JUDGE = """Question: {question}
Right answer: {target}
Given answer: {text}
Does the given answer say the same as the right answer? Answer with one word, yes or no."""


def scores_of(text: str, target: str, *, metric: str) -> dict[str, float]:
    """The scores of an answer.

    Args:
        text: What was said.
        target: The right answer.
        metric: Which score decides; those of descriptions are only computed for descriptions.
    """
    scores = {
        "exact": float(exact_match(text, target)),
        "contains": float(contains(text, target)),
        "f1": token_f1(text, target),
    }
    if metric == "rouge_l":
        scores |= {
            "rouge_l": rouge_l(text, target),
            "chrf": _chrf().sentence_score(text, [target]).score / 100,
            "attribute_recall": attribute_recall(text, target),
        }
    return {**scores, "refused": float(has_refused(text))}


def contains(text: str, target: str) -> bool:
    """Whether the right answer's words stand in the answer, one after another: what a model that talks may claim."""
    said, expected = words_of(text), words_of(target)
    return any(said[place : place + len(expected)] == expected for place in range(len(said) - len(expected) + 1))


def token_f1(text: str, target: str) -> float:
    """F-measure of the words that both have, 0 to 1, each as often as it comes."""
    said, expected = Counter(words_of(text)), Counter(words_of(target))
    common = sum((said & expected).values())
    return 2 * common / (said.total() + expected.total()) if common else float(not said and not expected)


def attribute_recall(text: str, target: str) -> float:
    """Share of what the right description says of the thing that the answer says, too, 0 to 1.

    Attributes are its words that say something: four letters or more, or a Chinese character, and none of grammar's.
    """
    expected = {
        word for word in words_of(target) if word not in GRAMMAR and (len(word) >= SHORTEST_WORD or word >= CHINESE)
    }
    return len(expected & set(words_of(text))) / len(expected) if expected else 1.0


def has_refused(text: str) -> bool:
    """Whether an answer says that it cannot tell."""
    return bool(REFUSAL.search(text)) or any(exact_match(text, refusal) for refusal in REFUSALS.values())


@dataclass(frozen=True)
class Judgement:
    """What a judge said of an answer: 1 or 0, and what asking cost in US dollars; None where that is not known."""

    score: float
    cost: float | None


class Judge:
    """A language model that says whether two answers mean the same: the score ``"judged"``.

    Args:
        endpoint: Where it is.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def score(self, question: str, text: str, target: str) -> Judgement:
        """1 if it says yes, 0 if no.

        Raises:
            PipelineError: If it says neither, or does not answer.
        """
        prompt = JUDGE.format(question=question, target=target, text=text)
        said = self.endpoint.ask([{"role": "user", "content": prompt}], max_new_tokens=8)
        words = words_of(said.text)
        if not words or words[0] not in ("yes", "no"):
            raise PipelineError(
                f"the judge at {self.endpoint.url} says neither yes nor no ({said.text[:40]!r}): use a larger one"
            )
        return Judgement(float(words[0] == "yes"), said.cost)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
