"""The pointing game on maps that are known, and on a real tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multimodal.data import Box, Sample
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.model import MultiModalModel
from multimodal.training.evaluation import Prediction
from multimodal.training.pointing import Look, coverage, holds, look, score, table_of
from tests.fusion.tiny import open_gates
from tests.training.scripted import Scripted
from tests.training.tiny import draw, tiny_model

LEFT, RIGHT = Box("left", 0, 0, 0.5, 1), Box("right", 0.5, 0, 0.5, 1)


def looked(row: int, column: int, *boxes: Box, picture: str = "a", correct: bool = True, kind: str = "x") -> Look:
    """All attention at one cell of a grid of 4 by 4."""
    heat = np.zeros((4, 4))
    heat[row, column] = 1
    sample = Sample("Where?", "there", (Path(picture),), meta={"content_type": kind}, boxes=boxes)
    return Look(Prediction(sample, "there", correct, -0.1, 0.9), boxes, heat)


def test_cover_is_the_union_cell_by_cell() -> None:
    assert coverage([LEFT, RIGHT, LEFT], (3, 5)) == pytest.approx(1)
    cover = coverage([Box("a", 0.125, 0, 0.25, 0.5), Box("b", 0.25, 0.25, 0.25, 0.5)], (2, 4))
    assert cover == pytest.approx(np.array([[0.5, 0.75, 0, 0], [0, 0.5, 0, 0]]))
    assert coverage([], (2, 2)) == pytest.approx(0)
    assert coverage([Box("edge", 0.9, 0.9, 0.1, 0.1)], (9, 9)).mean() == pytest.approx(0.01)
    assert coverage([Box("beyond", 0.9, 0.9, 0.5, 0.5)], (9, 9)).mean() == pytest.approx(0.01)


def test_the_peak_is_a_cells_centre() -> None:
    assert looked(0, 3, LEFT).peak == (0.875, 0.125)
    nowhere = Look(looked(0, 0, LEFT).prediction, (LEFT,), np.zeros((4, 4)))
    assert nowhere.peak is None and not holds(nowhere.boxes, nowhere.peak)


def test_score() -> None:
    small = Box("small", 0.75, 0.75, 0.25, 0.25)
    looks = [
        looked(3, 3, small, picture="a", kind="x"),
        looked(0, 0, small, picture="b", kind="x", correct=False),
        looked(1, 2, LEFT, RIGHT, picture="c", kind="y"),
        looked(1, 0, LEFT, picture="d", kind="y"),
    ]
    found = score(looks)
    assert (found.questions, found.hits, found.share) == (4, 3, 0.75)
    assert found.uniform == pytest.approx((1 / 16 + 1 / 16 + 1 + 1 / 2) / 4)
    assert found.centre == 0.5  # the middle lies on the edge that LEFT and RIGHT share, and not in the small box
    assert found.mass == pytest.approx(0.75) and found.correct == 0.75
    assert 0 < found.shuffled < 0.75
    assert score(looks) == found and score(looks, seed=1).hits == 3
    head, rows = table_of(looks)
    assert [row[:3] for row in rows] == [["all", "4", "75.0 %"], ["x", "2", "50.0 %"], ["y", "2", "100.0 %"]]
    assert len(head) == len(rows[0])


def test_other_boxes_are_those_of_other_pictures() -> None:
    for own, other, share in ((LEFT, RIGHT, 0.0), (RIGHT, LEFT, 1.0)):
        looks = [looked(0, 0, own, picture="a"), looked(0, 0, own, picture="a"), looked(0, 0, other, picture="b")]
        assert score(looks, [0, 1]).shuffled == share
    assert score([looked(0, 0, LEFT)]).shuffled == 0


def test_nothing_to_point_at() -> None:
    with pytest.raises(ValueError, match="no question of the split has a box"):
        table_of([])


# ---- on a real tiny model


@pytest.fixture(scope="module")
def model(bases: tuple[str, str]) -> MultiModalModel:
    """Random weights, open gates."""
    made = MultiModalModel(*tiny_model(*bases))
    open_gates(made.model)
    return made


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        draw(path.stem, 1).save(path)
    one = [Sample(f"Is it {path.stem}?", "yes", (path,), boxes=(LEFT,)) for path in paths]
    second = Box("second", 0.2, 0.2, 0.3, 0.3, image=1)
    return [
        Sample("No boxes?", "yes", (paths[0],)),
        *one,
        Sample("What colour is the second?", "red", (paths[1], paths[0]), boxes=(second, LEFT)),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_heat_is_the_mean_attention_of_the_answers_tokens(
    model: MultiModalModel, samples: list[Sample], batch_size: int
) -> None:
    looks = look(model, samples, batch_size=batch_size, max_new_tokens=5, progress=False)
    assert [one.prediction.sample for one in looks] == samples[1:]
    for one in looks:
        sample = one.prediction.sample
        image = sample.boxes[0].image
        answer = model(sample.question, list(sample.images), max_new_tokens=5, trace=True)
        assert answer.trace is not None and answer.text == one.prediction.text
        tokens = len(answer.tokens) - answer.finished
        heat = answer.trace.image_attention(image)[0, :tokens].mean(0)
        assert one.heat == pytest.approx((heat / heat.sum()).numpy(), abs=1e-4)
        assert one.boxes == sample.boxes[:1]


def test_the_end_of_an_answer_and_what_follows_do_not_count(model: MultiModalModel, samples: list[Sample]) -> None:
    said = {"Is it red?": "yes", "Is it green?": "What colour is this? no", "Is it blue?": ""}
    together = look(Scripted(model, said), samples[1:4], progress=False)
    for sample, one in zip(samples[1:4], together, strict=True):
        (alone,) = look(Scripted(model, said), [sample], progress=False)
        assert one.heat == pytest.approx(alone.heat, abs=1e-5)
        assert one.heat.sum() == pytest.approx(1, abs=1e-4)


def test_shut_gates_look_nowhere(
    fused: tuple[FusionForConditionalGeneration, FusionProcessor], samples: list[Sample]
) -> None:
    looks = look(MultiModalModel(*fused), samples, max_new_tokens=2, progress=False)
    assert [one.peak for one in looks] == [None] * 4
    found = score(looks)
    assert (found.hits, found.mass, found.shuffled) == (0, 0, 0)
