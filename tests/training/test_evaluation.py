"""Figures: exact on a model whose answers are known; a shuffle that gives nobody its own picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.data import Sample
from multimodal.images import ImageError
from multimodal.training.evaluation import Prediction, accuracy, accuracy_by, predict, shuffle_images

TEXTS = ["Left Lung.", "yes", "No", "two"]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = (tmp_path / "a.png",)
    return [
        Sample("Where?", "left lung", images, meta={"answer_type": "OPEN"}),
        Sample("Is it?", "Yes", images, meta={"answer_type": "CLOSED"}),
        Sample("Is it?", "yes", images, meta={"answer_type": "CLOSED"}),
        Sample("How many?", "three", images),
    ]


class FakeModel:
    """Says TEXTS, one after the other, whatever it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.model = SimpleNamespace(generate=self.generate)
        self.processor = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=self.batch_decode))

    def encode(self, conversations: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(conversations), 5, dtype=torch.long)}

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["do_sample"] is False
        done = sum(self.batches)
        self.batches.append(len(input_ids))
        answers = torch.arange(done, done + len(input_ids))[:, None]
        return torch.cat([input_ids, answers], dim=1)

    def batch_decode(self, answers: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [f" {TEXTS[int(row[0])]} " for row in answers]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_exact_figures(samples: list[Sample], batch_size: int) -> None:
    predictions = predict(FakeModel(), samples, batch_size=batch_size, progress=False)
    assert [(p.sample, p.text, p.correct) for p in predictions] == list(
        zip(samples, TEXTS, [True, True, False, False], strict=True)
    )
    assert accuracy(predictions) == 0.5
    assert accuracy_by(predictions) == [("all", 4, 0.5), ("OPEN", 1, 1.0), ("CLOSED", 2, 0.5)]
    assert accuracy_by(predictions, key="modality") == [("all", 4, 0.5)]


def test_nothing_to_score() -> None:
    assert predict(FakeModel(), [], progress=False) == []
    for score in (accuracy, accuracy_by):
        with pytest.raises(ValueError, match="the split is empty"):
            score([])


def test_a_broken_picture_is_an_error(samples: list[Sample]) -> None:
    samples[0].images[0].write_bytes(b"no picture")
    with pytest.raises(ImageError):
        predict(FakeModel(), samples, progress=False)


def of_pictures(*names: str) -> list[Sample]:
    return [Sample(f"{index}?", "a", (Path(name),) if name else (), id=str(index)) for index, name in enumerate(names)]


@pytest.mark.parametrize(
    "names", ["abcdef", "aab", "a" * 200 + "b", "abab"], ids=["all differ", "some alike", "nearly all alike", "two"]
)
def test_nobody_keeps_its_own_picture(names: str) -> None:
    samples = of_pictures(*names)
    shuffled = shuffle_images(samples)
    assert all(new.images != old.images for new, old in zip(shuffled, samples, strict=True))
    assert [(s.question, s.answer, s.id) for s in shuffled] == [(s.question, s.answer, s.id) for s in samples]
    assert shuffled == shuffle_images(samples)


def test_the_seed_decides() -> None:
    samples = of_pictures(*"abcdefgh")
    assert shuffle_images(samples, seed=1) != shuffle_images(samples, seed=2)


def test_where_no_other_picture_can_be_had() -> None:
    for names in ([], ["a"], ["a", "a"], ["", "a", ""]):
        assert shuffle_images(of_pictures(*names)) == of_pictures(*names)


def test_questions_without_a_picture_stay_so() -> None:
    shuffled = shuffle_images(of_pictures("a", "", "b"))
    assert [bool(sample.images) for sample in shuffled] == [True, False, True]


def test_predictions_are_frozen(samples: list[Sample]) -> None:
    with pytest.raises(AttributeError):
        Prediction(samples[0], "a", True).text = "b"  # type: ignore[misc]
