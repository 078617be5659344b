"""The pointing game: does the model look where the thing is that it is asked about?

A question with boxes is answered greedily. Where the model looked is its own attention to the picture
(``FusionTrace.image_attention``) in the states that chose the answer's tokens, averaged over them. It is a hit if the
centre of the cell with the most attention lies in one of the boxes (J. Zhang et al., "Top-down Neural Attention by
Excitation Backprop", 2016, but over questions, not classes, and without their margin of 15 pixels). What a map scores
that knows nothing is measured on the same questions: any place alike, the middle of the picture, and the model's own
peaks on other pictures' boxes, which is what it gets for liking some places.

Axes: B batch, T tokens, rows and columns of the grid. Boxes are in shares of the picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from multimodal.data import Box, Sample
from multimodal.data.scoring import wilson_interval
from multimodal.model import MultiModalModel
from multimodal.training.answering import Answered, PictureFeatures, answer_all
from multimodal.training.evaluation import Prediction, groups, predictions_of

OTHERS = 20  # other pictures' boxes that each peak is tried on


@dataclass(frozen=True)
class Look:
    """Where the model looked for one answer.

    Attributes:
        prediction: The question and what was said.
        boxes: Where the thing is, all in the same picture.
        heat: ``(rows, columns)``, attention to that picture; sums to 1, or is 0 where the model did not look.
    """

    prediction: Prediction
    boxes: tuple[Box, ...]
    heat: np.ndarray

    @property
    def peak(self) -> tuple[float, float] | None:
        """Centre of the cell with the most attention, across and down; None where the model did not look."""
        if not self.heat.any():
            return None
        row, column = np.unravel_index(int(self.heat.argmax()), self.heat.shape)
        return (column + 0.5) / self.heat.shape[1], (row + 0.5) / self.heat.shape[0]


@dataclass(frozen=True)
class PointingScore:
    """Shares over some questions, 0 to 1.

    Attributes:
        questions: How many.
        hits: Peaks in a box of the question, a number.
        uniform: The share that a map would hit whose peak is anywhere: the mean area of the boxes.
        centre: The share that the middle of the picture hits.
        shuffled: The share that the model's peaks hit on the boxes of other pictures.
        mass: Attention that lies in the boxes.
        correct: Right answers.
    """

    questions: int
    hits: int
    uniform: float
    centre: float
    shuffled: float
    mass: float
    correct: float

    @property
    def share(self) -> float:
        """The share of hits."""
        return self.hits / self.questions


def look(
    model: MultiModalModel,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    pictures: PictureFeatures | None = None,
    progress: bool = True,
) -> list[Look]:
    """Answer the samples that have boxes, and note where the model looked.

    Args:
        model: A trained model.
        samples: Those without boxes are left out. Where boxes are in several pictures, the first one's picture counts.
        batch_size: Questions at a time.
        max_new_tokens: As in ``predict``.
        pictures: As in ``predict``.
        progress: Show a bar.

    Returns:
        In the order of the samples.

    Raises:
        ImageError: If a picture cannot be used.
        ModelError: If a question is too long for the model.
    """
    boxed = [sample for sample in samples if sample.boxes]
    found: dict[int, Look] = {}
    batches = answer_all(
        model,
        boxed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        pictures=pictures,
        progress=progress,
    )
    for batch in batches:
        predictions = predictions_of(model, boxed, batch)
        for place, heat in zip(batch.places, heat_of(model, boxed, batch), strict=True):
            image = boxed[place].boxes[0].image
            boxes = tuple(box for box in boxed[place].boxes if box.image == image)
            found[place] = Look(predictions[place], boxes, heat)
    return [found[place] for place in range(len(boxed))]


def heat_of(model: MultiModalModel, samples: Sequence[Sample], batch: Answered) -> list[np.ndarray]:
    """Attention of each answer of a batch to the picture that its boxes are in."""
    trace = model.model.trace(
        batch.sequences,
        prompt_length=batch.prompt_length,
        image_features=batch.inputs.get("image_features"),
        attention_mask=batch.inputs["attention_mask"],
    )
    images = [samples[place].boxes[0].image for place in batch.places]
    if trace is None:
        grid = model.model.config.vision_config.grid_size
        return [np.zeros(tuple(grid)) for _ in images]
    maps = {image: trace.image_attention(image) for image in set(images)}  # (B, T, rows, columns)
    heats = []
    for row, (image, count, finished) in enumerate(zip(images, batch.counts, batch.finished, strict=True)):
        tokens = max(count - finished, 1)  # without the end of the answer, unless there is nothing else
        heat = maps[image][row, :tokens].float().mean(0).cpu().numpy()
        heats.append(heat / max(float(heat.sum()), 1e-9))
    return heats


def score(looks: Sequence[Look], places: Sequence[int] | None = None, *, seed: int = 0) -> PointingScore:
    """Score the game.

    Args:
        looks: From :func:`look`.
        places: Which of them to score; other boxes are drawn from all of them. None: all.
        seed: Of that draw.

    Raises:
        ValueError: If there are none.
    """
    places = range(len(looks)) if places is None else places
    chosen = [looks[place] for place in places]
    if not chosen:
        raise ValueError("there is nothing to point at: no question of the split has a box")
    covers = [coverage(one.boxes, one.heat.shape) for one in chosen]
    return PointingScore(
        questions=len(chosen),
        hits=sum(holds(one.boxes, one.peak) for one in chosen),
        uniform=float(np.mean([cover.mean() for cover in covers])),
        centre=float(np.mean([holds(one.boxes, (0.5, 0.5)) for one in chosen])),
        shuffled=float(np.mean([_elsewhere(one, looks, random.Random(f"{seed}/{i}")) for i, one in enumerate(chosen)])),
        mass=float(np.mean([(one.heat * cover).sum() for one, cover in zip(chosen, covers, strict=True)])),
        correct=sum(one.prediction.correct for one in chosen) / len(chosen),
    )


def _elsewhere(one: Look, looks: Sequence[Look], chance: random.Random) -> float:
    """How often a peak lies in the boxes of questions about other pictures."""
    own = one.prediction.sample.images
    drawn = [chance.choice(looks) for _ in range(2 * OTHERS)]
    others = [other for other in drawn if other.prediction.sample.images != own][:OTHERS]
    return float(np.mean([holds(other.boxes, one.peak) for other in others])) if others else 0.0


def holds(boxes: Sequence[Box], point: tuple[float, float] | None) -> bool:
    """Whether a point, across and down, lies in any of the boxes."""
    if point is None:
        return False
    x, y = point
    return any(box.left <= x <= box.left + box.width and box.top <= y <= box.top + box.height for box in boxes)


def coverage(boxes: Sequence[Box], grid: tuple[int, ...]) -> np.ndarray:
    """Which share of each cell ``(rows, columns)`` the boxes cover together; its mean is the area of their union."""
    rows, columns = grid
    across = _edges([box.left for box in boxes] + [box.left + box.width for box in boxes], columns)
    down = _edges([box.top for box in boxes] + [box.top + box.height for box in boxes], rows)
    covered = np.zeros((rows, columns))
    for top, bottom in pairwise(down):
        for left, right in pairwise(across):
            x, y = (left + right) / 2, (top + bottom) / 2
            if holds(boxes, (x, y)):
                covered[int(y * rows), int(x * columns)] += (right - left) * (bottom - top)
    return covered * rows * columns


def _edges(edges: Sequence[float], cells: int) -> list[float]:
    """Where a box or a cell begins or ends, in order: nothing changes between two of them."""
    inside = (min(max(edge, 0.0), 1.0) for edge in edges)
    return sorted({*inside, *(cell / cells for cell in range(cells + 1))})


def table_of(looks: Sequence[Look], key: str = "content_type") -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: all questions, then those with each value of a ``meta`` entry.

    Raises:
        ValueError: If there are none.
    """
    head = [
        "questions",
        "number",
        "peak in a box",
        "95 % interval",
        "anywhere",
        "middle",
        "others' boxes",
        "attention inside",
        "exact match",
    ]
    rows = []
    for name, places in groups([one.prediction.sample for one in looks], key).items():
        figures = score(looks, places)
        low, high = wilson_interval(figures.hits, figures.questions)
        shares = (figures.uniform, figures.centre, figures.shuffled, figures.mass, figures.correct)
        rows.append(
            [
                name,
                f"{figures.questions}",
                f"{100 * figures.share:.1f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                *(f"{100 * share:.1f} %" for share in shares),
            ]
        )
    return head, rows
