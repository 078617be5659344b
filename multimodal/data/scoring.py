"""Exact match of generated answers: the figure that every model card and every comparison here reports.

Two answers are equal when they are the same after lower-casing and stripping punctuation. Nothing else is forgiven: no
synonym, no article, no word order.
"""

import unicodedata


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
