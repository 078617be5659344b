"""Batches: the chat as the model will be asked it, the answer as labels, views and order by seed and epoch alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.data import Sample, read
from multimodal.fusion import FusionProcessor
from multimodal.fusion.processing import CHATML_TEMPLATE, template_with_images
from multimodal.model import MultiModalModel, conversation
from multimodal.training.collator import IGNORED, EpochOrder, FusionCollator, Source, TrainingSet
from multimodal.training.pictures import LivePictures
from multimodal.training.prefix import PrefixCache
from tests.training.tiny import IMAGE_SIZE, draw, encode


@pytest.fixture
def samples(task: Path) -> list[Sample]:
    """Questions about one picture, about two and about none, and one that says what only a template may say."""
    found = read(f"slake:{task}", "train")[:6]
    two = Sample("Is it red?", "no", (found[0].images[0], found[2].images[0]))
    return [*found, two, Sample("Is it red?", "no"), Sample("<image> <|im_end|>?", "yes", found[0].images)]


@pytest.fixture
def dataset(fused: Any, samples: list[Sample]) -> TrainingSet:
    kinds = {path: "medical" for sample in samples for path in sample.images}
    pictures = LivePictures(kinds, image_processor=fused[1].image_processor)
    return TrainingSet([Source(samples, pictures)], fused[1], seed=3)


def test_prompts_are_those_that_the_model_is_asked(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    model = MultiModalModel(*fused)
    tokenizer = fused[1].tokenizer
    for sample, row in zip(samples, dataset.rows, strict=True):
        pictures = [draw("red", 0) for _ in sample.images]
        asked = encode(model, [conversation(sample.question, pictures)])["input_ids"][0].tolist()
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


def test_passes_say_how_often_a_sample_comes(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    pictures = dataset.rows[0].pictures
    sources = [
        Source(samples[:4], pictures, 2.0),
        Source(samples[4:6], pictures, 0.5),
        Source(samples[6:], pictures, 1.4),
        Source([], pictures, 3.0),
    ]
    order = EpochOrder(TrainingSet(sources, fused[1]), 4, seed=0)
    rarely = set()
    for epoch in range(20):
        order.set_epoch(epoch)
        counts = Counter(index for _, index in order)
        assert len(order) == counts.total() == 4 * 2 + 1 + 3 + 1
        assert [counts[index] for index in range(4)] == [2] * 4
        assert sorted(counts[index] for index in range(4, 6)) == [0, 1]
        assert sorted(counts[index] for index in range(6, 9)) == [1, 1, 2]
        rarely |= {index for index in range(4, 6) if counts[index]}
    assert rarely == {4, 5}  # over the epochs all have their turn


def test_behind_prefixes_only_the_rest_is_in_a_batch(
    fused: Any, samples: list[Sample], dataset: TrainingSet, tmp_path: Path
) -> None:
    model, processor = fused
    seeing = [sample for sample in samples if sample.images]
    chat = template_with_images(CHATML_TEMPLATE, images_last=True)
    last = FusionProcessor(processor.image_processor, processor.tokenizer, chat)
    known = TrainingSet([Source(seeing, dataset.rows[0].pictures)], last, frozen_decoder=True)
    whole = [known[0, index] for index in range(len(known))]
    known.prefixes = PrefixCache(tmp_path, model, [row.input_ids for row in known.rows])
    items = [known[0, index] for index in range(len(known))]
    for item, row, sample, before in zip(items, known.rows, seeing, whole, strict=True):
        start = row.input_ids.index(processor.image_token_id)
        assert item["input_ids"] == row.input_ids[start:]
        assert item["labels"] == row.labels[start:]
        text = processor.tokenizer.decode(item["input_ids"])
        end = processor.tokenizer.eos_token
        images = "<image>" * len(sample.images)
        assert text == f"{images}{end}\n<|im_start|>assistant\n{sample.answer}{end}"
        assert torch.equal(item["pixel_values"][0], before["pixel_values"][0])

    batch = FusionCollator(processor.tokenizer.pad_token_id)(items)
    starts = [row.input_ids.index(processor.image_token_id) for row in known.rows]
    longest = max(starts)
    for index, (row, start) in enumerate(zip(known.rows, starts, strict=True)):
        count, length = longest - start, len(row.input_ids) - start
        kept = batch["attention_mask"][index]
        assert kept[:longest].tolist() == [0] * count + [1] * start
        assert kept[longest:].sum() == length
        assert not batch["prefix_keys"][index, :, :, :count].any()
        assert batch["prefix_values"][index, :, :, count:].any(-1).all()
        assert torch.equal(batch["prefix_states"][index, :length], items[index]["prefix"].states)


def realistic_lengths(count: int, descriptions: float) -> list[tuple[int, int]]:
    """Tokens behind and in front of the picture: answers of a few words as in SLAKE, and some descriptions."""
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        short = chance.choice([1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12])
        answer = chance.randint(30, 100) if chance.random() < descriptions else short
        rows.append((8 + answer, chance.randint(8, 30)))
    return rows


@pytest.mark.parametrize("descriptions", [0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("batch_size", [16, 32])
def test_little_is_padded(dataset: TrainingSet, batch_size: int, descriptions: float) -> None:
    order = EpochOrder(dataset, batch_size, seed=0)
    order.lengths = realistic_lengths(10_000, descriptions)
    order.groups = [(1.0, list(range(10_000)))]
    for epoch in range(2):
        order.set_epoch(epoch)
        assert order.padding() <= 0.1, f"{order.padding():.1%} of the tokens are padding"


def test_padding_is_counted_in_batches(dataset: TrainingSet) -> None:
    order = EpochOrder(dataset, 2, seed=0)
    order.lengths = [(2, 0), (2, 0), (4, 0)]
    order.groups = [(1.0, [0, 1, 2])]
    assert order.padding() == 0  # sorted: two of 2, then the last alone
    order.lengths = [(1, 0), (3, 0), (8, 0)]
    assert order.padding() == pytest.approx(2 / 14)


def test_batches_are_sorted_by_what_a_step_runs_over(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    assert [length for length, _ in dataset.lengths] == [len(row.input_ids) for row in dataset.rows]
    frozen = TrainingSet([Source(samples, dataset.rows[0].pictures)], fused[1], frozen_decoder=True)
    for (length, start), row in zip(frozen.lengths, frozen.rows, strict=True):
        assert length + start == len(row.input_ids)
        assert start == (row.start or 0)


def test_digest_tells_data_apart(fused: Any, samples: list[Sample], dataset: TrainingSet) -> None:
    pictures = dataset.rows[0].pictures
    assert TrainingSet([Source(samples, pictures)], fused[1]).digest == dataset.digest
    assert TrainingSet([Source(samples[1:], pictures)], fused[1]).digest != dataset.digest
