"""Batches: the chat as the model will be asked it, the answer as labels, views and order by seed and epoch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.data import Sample, read
from multimodal.model import MultiModalModel, conversation
from multimodal.training.collator import IGNORED, EpochOrder, FusionCollator, Source, TrainingSet
from multimodal.training.pictures import LivePictures
from tests.training.tiny import IMAGE_SIZE, draw


@pytest.fixture
def samples(task: Path) -> list[Sample]:
    """Questions about one picture, about two and about none, and one that says what only a template may say."""
    found = read(f"slake:{task}", "train")[:6]
    two = Sample("Is it red?", "no", (found[0].images[0], found[2].images[0]))
    return [*found, two, Sample("Is it red?", "no"), Sample("<image> <|im_end|>?", "yes", found[0].images)]


@pytest.fixture
def dataset(fused: Any, samples: list[Sample]) -> TrainingSet:
    pictures = LivePictures([], image_processor=fused[1].image_processor, augmentation="medical")
    return TrainingSet([Source(samples, pictures)], fused[1], seed=3)


def test_prompts_are_those_that_the_model_is_asked(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    model = MultiModalModel(*fused)
    tokenizer = fused[1].tokenizer
    for sample, row in zip(samples, dataset.rows, strict=True):
        pictures = [draw("red", 0) for _ in sample.images]
        asked = model.encode([conversation(sample.question, pictures)])["input_ids"][0].tolist()
        assert row.input_ids[: len(asked)] == asked
        assert row.labels[: len(asked)] == [IGNORED] * len(asked)
        assert row.input_ids[len(asked) :] == row.labels[len(asked) :]
        assert tokenizer.decode(row.labels[len(asked) :]) == sample.answer + tokenizer.eos_token
        assert row.input_ids.count(fused[1].image_token_id) == len(sample.images)


def test_padding(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    pad = fused[1].tokenizer.pad_token_id
    batch = FusionCollator(pad)([dataset[0, index] for index in range(len(dataset))])
    longest = max(len(row.input_ids) for row in dataset.rows)
    for index, row in enumerate(dataset.rows):
        empty = longest - len(row.input_ids)
        assert batch["input_ids"][index].tolist() == row.input_ids + [pad] * empty
        assert batch["labels"][index].tolist() == row.labels + [IGNORED] * empty
        assert batch["attention_mask"][index].tolist() == [1] * len(row.input_ids) + [0] * empty
        count = len(samples[index].images)
        assert batch["pixel_values"][index, :count].flatten(1).any(-1).all()
        assert not batch["pixel_values"][index, count:].any()
    assert batch["pixel_values"].shape == (len(samples), 2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_no_pictures_no_tensor(dataset: TrainingSet) -> None:
    batch = FusionCollator(0)([dataset[0, 7]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_views_follow_seed_epoch_and_sample(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    def view(dataset: TrainingSet, epoch: int, index: int, place: int = 0) -> torch.Tensor:
        return dataset[epoch, index]["pixel_values"][place]

    first = view(dataset, 0, 0)
    torch.manual_seed(99)  # nothing else has a say
    assert torch.equal(first, view(dataset, 0, 0))
    assert not torch.equal(first, view(dataset, 1, 0))
    assert not torch.equal(first, view(dataset, 0, 1))  # the same picture, asked about in another row
    other = TrainingSet([Source(samples, dataset.rows[0].pictures)], fused[1], seed=4)
    assert not torch.equal(first, view(other, 0, 0))


def test_order_follows_seed_and_epoch(dataset: TrainingSet) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochOrder(dataset, 3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 2) == order(0, 2)
    assert {epoch for epoch, _ in order(0, 2)} == {2}
    orders = [[index for _, index in order(seed, epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(sorted(indices) == list(range(len(dataset))) for indices in orders)
    assert len({tuple(indices) for indices in orders}) == 4


def test_digest_tells_data_apart(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    pictures = dataset.rows[0].pictures
    assert TrainingSet([Source(samples, pictures)], fused[1]).digest == dataset.digest
    assert TrainingSet([Source(samples[1:], pictures)], fused[1]).digest != dataset.digest
