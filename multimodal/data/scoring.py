"""How right generated answers are: exact match, which every model card reports, ROUGE-L for long ones, and intervals.

Two answers are equal when they are the same after lower-casing and stripping punctuation. Nothing else is forgiven: no
synonym, no article, no word order.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from statistics import median

LONG = 8  # words; answers longer than this (the median) are scored with ROUGE-L, too


def normalise_answer(answer: str) -> str:
    """Lower-cases an answer, strips its punctuation and its extra white space.

    Punctuation is what Unicode calls punctuation or symbol, Chinese marks included. It is removed, not replaced by a
    space (as SQuAD's official script does: "X-ray" equals "Xray"). Full-width letters and digits count as the ordinary
    ones (NFKC).
    """
    text = unicodedata.normalize("NFKC", answer).lower()
    return " ".join("".join(char for char in text if unicodedata.category(char)[0] not in "PS").split())


def exact_match(prediction: str, answer: str) -> bool:
    """Tells whether a prediction says the same as the answer, after `normalise_answer`."""
    return normalise_answer(prediction) == normalise_answer(answer)


def words_of(text: str) -> list[str]:
    """Returns the words of a normalised text; in Chinese, which has no spaces, every character is one."""
    return re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", normalise_answer(text))


def rouge_l(prediction: str, answer: str) -> float:
    """Returns the F-measure of the longest common subsequence of words, 0 to 1.

    C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1, with beta 1: recall and
    precision count the same. Nothing but the words is compared, and these as `normalise_answer` leaves them.
    """
    said, expected = words_of(prediction), words_of(answer)
    if not said and not expected:
        return 1.0
    return 2 * common_length(said, expected) / (len(said) + len(expected))


def are_long(answers: Sequence[str]) -> bool:
    """Tells whether right answers are sentences: few given ones will match exactly."""
    return bool(answers) and median(len(words_of(answer)) for answer in answers) > LONG


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)  # of what was read of `one` so far, with each beginning of `other`
    for word in one:
        before = 0
        for place, candidate in enumerate(other, start=1):
            longer = before + 1 if word == candidate else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longer
    return lengths[-1]


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, 0 to 1; unlike the usual one it fits small numbers and shares near 0 and 1.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    if not total:
        return 0.0, 1.0
    z = 1.959964  # the normal distribution's 97.5th percentile
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)
