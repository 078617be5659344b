"""How many generated answers are right: greedy, exact match after normalisation, and ROUGE-L where answers are long.

With the pictures shuffled between questions, or left out, the same figure says how much the model owes to language
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from multimodal.data import DataError, Sample, exact_match
from multimodal.data.scoring import are_long, rouge_l, wilson_interval
from multimodal.images import ImageError, load_image
from multimodal.model import MultiModalModel
from multimodal.training.answering import Answered, PictureFeatures, answer_all


@dataclass(frozen=True)
class Prediction:
    """A sample and what the model said.

    Attributes:
        sample: The question.
        text: What the model said.
        correct: Whether that is the sample's answer.
        logprob: Log-probability that the model gave to all of it.
        confidence: What an ``Answer`` has: the chance that it is right.
    """

    sample: Sample
    text: str
    correct: bool
    logprob: float
    confidence: float


def readable(samples: Sequence[Sample], skip_bad: list[DataError]) -> list[Sample]:
    """Leave out samples with a picture that cannot be opened, and note each such picture once."""
    broken: dict[Path, bool] = {}
    for path in (path for sample in samples for path in sample.images):
        if path not in broken:
            try:
                load_image(path)
            except ImageError as error:
                skip_bad.append(DataError(f"this picture {error.problem}", file=path, remedy=error.remedy))
                broken[path] = True
            else:
                broken[path] = False
    return [sample for sample in samples if not any(broken[path] for path in sample.images)]


def predict(
    model: MultiModalModel,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    pictures: PictureFeatures | None = None,
    progress: bool = True,
) -> list[Prediction]:
    """Answer every sample greedily.

    Args:
        model: A trained model.
        samples: Questions and their pictures.
        batch_size: Questions at a time.
        max_new_tokens: At most so many tokens; None takes what the longest of the samples' own answers needs.
        pictures: Features of pictures, for several calls to share.
        progress: Show a bar.

    Returns:
        Predictions in the order of the samples.

    Raises:
        ImageError: If a picture cannot be used.
        ModelError: If a question is too long for the model.
    """
    found: dict[int, Prediction] = {}
    for batch in answer_all(
        model,
        samples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        pictures=pictures,
        progress=progress,
    ):
        found |= predictions_of(model, samples, batch)
    return [found[place] for place in range(len(samples))]


def predictions_of(model: MultiModalModel, samples: Sequence[Sample], batch: Answered) -> dict[int, Prediction]:
    """The predictions of one batch, by their place among the samples."""
    return {
        place: Prediction(
            samples[place], text, exact_match(text, samples[place].answer), logprob, model.confidence_of(logprob)
        )
        for place, text, logprob in zip(batch.places, batch.texts, batch.logprobs, strict=True)
    }


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Share of right answers, 0 to 1.

    Raises:
        ValueError: If there are none.
    """
    if not predictions:
        raise ValueError("there are no predictions to score: the split is empty")
    return sum(prediction.correct for prediction in predictions) / len(predictions)


def accuracy_by(predictions: Sequence[Prediction], key: str = "answer_type") -> list[tuple[str, int, float]]:
    """Accuracy over all, then for each value of a ``meta`` entry: name, number of questions, share of right answers."""
    return [
        (name, len(places), accuracy([predictions[place] for place in places]))
        for name, places in groups([prediction.sample for prediction in predictions], key).items()
    ]


def groups(samples: Sequence[Sample], key: str) -> dict[str, list[int]]:
    """The places of all samples, then of those with each value of a ``meta`` entry."""
    found = {"all": list(range(len(samples)))}
    for place, sample in enumerate(samples):
        if key in sample.meta:
            found.setdefault(sample.meta[key], []).append(place)
    return found


def mean_rouge(predictions: Sequence[Prediction]) -> float:
    """Mean ROUGE-L of the answers with the samples' own, 0 to 1."""
    return sum(rouge_l(prediction.text, prediction.sample.answer) for prediction in predictions) / len(predictions)


def table_of(
    predictions: Sequence[Prediction],
    key: str = "answer_type",
    *,
    beside: Mapping[str, Sequence[Prediction]] | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: all questions, then those with each value of a ``meta`` entry.

    Args:
        predictions: What to show.
        key: The entry.
        beside: The same questions answered otherwise, by the name of a column.

    Raises:
        ValueError: If there are no predictions.
    """
    accuracy(predictions)  # there are some
    samples = [prediction.sample for prediction in predictions]
    long, beside = are_long([sample.answer for sample in samples]), beside or {}
    head = ["questions", "number", "exact match", "95 % interval", *(["ROUGE-L"] if long else [])]
    rows = []
    for name, places in groups(samples, key).items():
        row = [name, f"{len(places)}", *_figures([predictions[place] for place in places], long=long)]
        for others in beside.values():
            figures = _figures([others[place] for place in places], long=long)
            row.append(", ".join([figures[0], *figures[2:]]))
        rows.append(row)
    return [*head, *beside], rows


def _figures(predictions: Sequence[Prediction], *, long: bool) -> list[str]:
    share = accuracy(predictions)
    low, high = wilson_interval(sum(prediction.correct for prediction in predictions), len(predictions))
    figures = [f"{100 * share:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"]
    return [*figures, f"{mean_rouge(predictions):.3f}"] if long else figures
