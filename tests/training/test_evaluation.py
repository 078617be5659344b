"""Figures: exact on a model whose answers are known; a shuffle that gives nobody its own picture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from multimodal.data import DataError, Sample
from multimodal.data.controls import shuffle_images, without_images
from multimodal.images import ImageError
from multimodal.model import ModelError, MultiModalModel, conversation
from multimodal.training.answering import PictureFeatures, answer_all, answer_limit
from multimodal.training.evaluation import (
    Prediction,
    accuracy,
    accuracy_by,
    predict,
    readable,
    table_of,
)
from tests.fusion.tiny import open_gates
from tests.training.scripted import Scripted
from tests.training.tiny import IMAGE, draw, encode, tiny_model

SAID = {"Where is it?": "Left Lung.", "Is it red?": "yes", "Is it blue?": "No", "How many?": "two"}


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = (tmp_path / "a.png",)
    return [
        Sample("Where is it?", "left lung", images, meta={"answer_type": "OPEN"}),
        Sample("Is it red?", "Yes", images, meta={"answer_type": "CLOSED"}),
        Sample("Is it blue?", "yes", images, meta={"answer_type": "CLOSED"}),
        Sample("How many?", "three", images),
    ]


@pytest.fixture(scope="module")
def model(bases: tuple[str, str]) -> MultiModalModel:
    """Random weights, open gates."""
    made = MultiModalModel(*tiny_model(*bases))
    open_gates(made.model)
    return made


@pytest.fixture
def scripted(model: MultiModalModel) -> Scripted:
    return Scripted(model, SAID, {"How many?": 0.25})


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_exact_figures(scripted: Scripted, samples: list[Sample], batch_size: int) -> None:
    predictions = predict(scripted, samples, batch_size=batch_size, progress=False)
    assert [(p.sample, p.text, p.correct) for p in predictions] == list(
        zip(samples, SAID.values(), [True, True, False, False], strict=True)
    )
    assert [p.confidence for p in predictions] == pytest.approx([0.9, 0.9, 0.9, 0.25], rel=1e-4)
    assert accuracy(predictions) == 0.5
    assert accuracy_by(predictions) == [("all", 4, 0.5), ("OPEN", 1, 1.0), ("CLOSED", 2, 0.5)]
    assert accuracy_by(predictions, key="modality") == [("all", 4, 0.5)]


def test_table(scripted: Scripted, samples: list[Sample]) -> None:
    predictions = predict(scripted, samples, progress=False)
    head, rows = table_of(predictions, beside={"blind": predictions})
    assert head == ["questions", "number", "exact match", "95 % interval", "blind"]
    assert rows[0] == ["all", "4", "50.0 %", "15.0 to 85.0 %", "50.0 %"]
    assert [row[:3] for row in rows[1:]] == [["OPEN", "1", "100.0 %"], ["CLOSED", "2", "50.0 %"]]


def test_long_answers_get_rouge(scripted: Scripted, samples: list[Sample]) -> None:
    told = "a ripe yellow fruit from far away that tastes very sweet"
    scripted.answers["Describe it."] = told.replace("very ", "")
    described = [Sample("Describe it.", told, samples[0].images)] * 2
    head, rows = table_of(predict(scripted, described, progress=False))
    assert head[-1] == "ROUGE-L" and rows == [["all", "2", "0.0 %", "0.0 to 65.8 %", "0.952"]]
    assert "ROUGE-L" not in table_of(predict(scripted, samples, progress=False))[0]


def test_nothing_to_score(scripted: Scripted) -> None:
    assert predict(scripted, [], progress=False) == []
    for score in (accuracy, accuracy_by, table_of):
        with pytest.raises(ValueError, match="the split is empty"):
            score([])


def test_a_broken_picture_is_an_error_unless_it_is_skipped(scripted: Scripted, samples: list[Sample]) -> None:
    bad: list[DataError] = []
    assert readable(samples, bad) == samples and not bad
    samples[0].images[0].write_bytes(b"no picture")
    with pytest.raises(ImageError):
        predict(scripted, samples, progress=False)
    alone = Sample("Is it red?", "no")
    assert readable([*samples, alone], bad) == [alone]
    assert [error.file for error in bad] == [samples[0].images[0]]


# ---- answering in batches, on a real tiny model


@pytest.fixture
def mixed(tmp_path: Path) -> list[Sample]:
    """Questions of several lengths with one picture, two or none; one of them types a placeholder."""
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        draw(path.stem, 1).save(path)
    asked = [("What colour is this?", 1), ("Is it red?", 2), ("?", 0), (f"Is {IMAGE} red or not, tell me!", 1)]
    chance = random.Random(0)
    return [Sample(text, "red", tuple(chance.sample(paths, count))) for text, count in asked for _ in range(3)]


def test_batches_answer_as_singles(model: MultiModalModel, mixed: list[Sample]) -> None:
    answers = [model(sample.question, list(sample.images), max_new_tokens=6) for sample in mixed]
    for batch_size in (1, 5, 32):
        predictions = predict(model, mixed, batch_size=batch_size, max_new_tokens=6, progress=False)
        for sample, answer, prediction in zip(mixed, answers, predictions, strict=True):
            assert prediction.sample is sample and prediction.text == answer.text
            assert prediction.confidence == pytest.approx(answer.confidence, rel=1e-3)


def test_prompts_are_those_of_encode(model: MultiModalModel, mixed: list[Sample]) -> None:
    for sample in mixed:
        pictures = [Image.open(path).convert("RGB") for path in sample.images]
        encoded = encode(model, [conversation(sample.question, pictures)])["input_ids"]
        assert model.tokenise([conversation(sample.question, sample.images)]) == encoded.tolist()


def test_each_picture_is_encoded_once(model: MultiModalModel, mixed: list[Sample]) -> None:
    features = PictureFeatures(model)
    different = {path for sample in mixed for path in sample.images}
    first = predict(model, mixed, batch_size=2, max_new_tokens=4, pictures=features, progress=False)
    predict(model, shuffle_images(mixed), batch_size=2, max_new_tokens=4, pictures=features, progress=False)
    assert features.encoded == len(different)
    small = PictureFeatures(model, room=1)
    again = predict(model, mixed, batch_size=2, max_new_tokens=4, pictures=small, progress=False)
    assert small.encoded > len(different) and not small._kept
    assert [one.text for one in again] == [one.text for one in first]


def test_answers_end_where_they_end(
    model: MultiModalModel, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(model, {sample.question: "yes" for sample in mixed} | {"?": "What colour is this? red"})
    for batch in answer_all(scripted, mixed, progress=False):
        assert all(batch.finished)
        assert {count for count, text in zip(batch.counts, batch.texts, strict=True) if text == "yes"} == {2}
        assert max(batch.counts) == batch.sequences.shape[1] - batch.prompt_length
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", None)
    for batch in answer_all(model, mixed, max_new_tokens=3, progress=False):
        assert not any(batch.finished) and set(batch.counts) == {3}


def test_the_limit_follows_the_longest_answer(scripted: Scripted, samples: list[Sample]) -> None:
    assert answer_limit(scripted, []) == answer_limit(scripted, samples) == 24
    long = [*samples, Sample("How many?", "x" * 90, samples[0].images)]
    assert answer_limit(scripted, long) > 90
    predict(scripted, long, progress=False)
    assert scripted.asked[-1]["max_new_tokens"] == answer_limit(scripted, long)
    predict(scripted, long, max_new_tokens=5, progress=False)
    assert scripted.asked[-1]["max_new_tokens"] == 5


def test_a_question_that_is_too_long(model: MultiModalModel) -> None:
    with pytest.raises(ModelError, match=r"a question has \d+ tokens, where the model takes 256"):
        predict(model, [Sample("#" * 300, "a")], progress=False)
    text = "#" * 240
    assert predict(model, [Sample(text, "a" * 100)], progress=False)[0].sample.question == text


def test_blind_questions_have_no_picture(scripted: Scripted, samples: list[Sample]) -> None:
    predict(scripted, without_images(samples), progress=False)
    assert "image_features" not in scripted.asked[-1]
    placeholder = scripted.processor.image_token_id
    assert not torch.isin(scripted.asked[-1]["input_ids"], torch.tensor(placeholder)).any()
    predict(scripted, samples, progress=False)
    assert scripted.asked[-1]["image_features"].shape[:2] == (4, 1)


# ---- shuffling


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
        Prediction(samples[0], "a", True, -0.1, 0.9).text = "b"  # type: ignore[misc]
