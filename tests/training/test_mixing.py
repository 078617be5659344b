"""Mixtures: which rows come as one, what is said about them, and that the probe tells answers apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.data import Sample
from multimodal.training import mixing
from multimodal.training.collator import IGNORED, Source
from multimodal.training.features import CachedPictures, FeatureCache
from multimodal.training.mixing import MixedSet, Probe, _wrong
from tests.fusion.tiny import assert_same
from tests.training.tiny import COLOURS, draw

QUESTION, OTHER = "What colour is this?", "Is it red?"


def test_the_probe_finds_what_tells_answers_apart() -> None:
    chance = torch.Generator().manual_seed(0)
    answers = torch.arange(3).repeat(20)
    features = torch.randn(60, 9, 8, generator=chance)
    features[:, :, :3] += 2 * torch.nn.functional.one_hot(answers, 3)[:, None]
    probe = Probe(features, answers)
    unseen = torch.randn(3, 9, 8, generator=chance)
    unseen[:, :, :3] += 2 * torch.eye(3)[:, None]
    assert probe(unseen).tolist() == [0, 1, 2]
    assert not probe.weight.requires_grad


def test_a_probe_is_judged_by_examples_that_it_has_not_seen() -> None:
    """Where something is, it cannot tell: mean and maximum are the same."""
    chance = torch.Generator().manual_seed(0)
    left, right = ([torch.randn(2, 9, 8, generator=chance) / 9 for _ in range(20)] for _ in range(2))
    for its, cell in ((left, 0), (right, 8)):
        for example in its:
            example[:, cell] += 3
    assert _wrong([left, right]) > 0.25
    for example in right:
        example[:, 8, 0] += 3
    assert _wrong([left, right]) == 0


@pytest.fixture
def mixed(fused: Any, tmp_path: Path) -> MixedSet:
    """Three pictures of each colour, one of them with a question of its own; and two that stay as they are."""
    samples = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        draw(list(COLOURS)[number % 4], number).save(path)
        samples.append(Sample(QUESTION, list(COLOURS)[number % 4], (path,)))
    samples.append(Sample(OTHER, "yes", samples[0].images))  # its question leaves no choice
    samples.append(Sample(QUESTION, "no", samples[1].images))  # nobody else answers so
    model, processor = fused
    cache = FeatureCache(tmp_path, encoder=model.model.vision_encoder, image_processor=processor.image_processor)
    pictures = CachedPictures(cache, {path: "shop" for sample in samples for path in sample.images}, views={"shop": 3})
    return MixedSet([Source(samples, pictures)], processor, seed=5)


def said(mixed: MixedSet, item: dict[str, Any]) -> str:
    """The answer that an item teaches."""
    return next(row.sample.answer for row in mixed.rows if row.labels == item["labels"])


class TestMixedSet:
    def test_rows_with_a_choice_come_as_mixtures(self, mixed: MixedSet) -> None:
        pictures = mixed.rows[0].pictures
        assert isinstance(pictures, CachedPictures)
        views = [view for place in range(12) for view in both(pictures, mixed.rows[place].sample.images[0])]
        (choice,) = mixed.choices
        assert sorted(choice.rows) == list(range(12))
        for epoch in range(8):
            item = mixed[epoch, 2]
            (features,) = item["image_features"]
            assert features.shape == views[0].shape and features.dtype == views[0].dtype
            answer = said(mixed, item)
            assert answer == list(COLOURS)[int(choice.probe(features[None]))]
            own = both(pictures, mixed.rows[2].sample.images[0])
            pairs = ((first, second) for first in own for second in views)
            assert any(lies_between(features, first, second) for first, second in pairs)

    def test_the_probe_has_the_last_word(self, mixed: MixedSet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Probe, "__call__", lambda self, features: torch.tensor([3]))
        assert {said(mixed, mixed[epoch, 2]) for epoch in range(4)} == {"white"}

    def test_rows_stay_as_they_are_where_no_probe_tells_their_answers_apart(
        self, mixed: MixedSet, fused: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            mixing, "_wrong", lambda views: 0.51
        )  # two thirds of what the most frequent answer gets wrong are 0.5
        source = Source([row.sample for row in mixed.rows], mixed.rows[0].pictures)
        assert not MixedSet([source], fused[1], seed=5).choices

    def test_others_stay_as_they_are(self, mixed: MixedSet) -> None:
        pictures = mixed.rows[0].pictures
        assert isinstance(pictures, CachedPictures)
        for place, answer in ((12, "yes"), (13, "no")):
            item = mixed[0, place]
            views = both(pictures, mixed.rows[place].sample.images[0])
            assert any(torch.equal(item["image_features"][0], view) for view in views)
            assert said(mixed, item) == answer

    def test_seed_epoch_and_row_decide(self, mixed: MixedSet) -> None:
        first, again, later = mixed[1, 4], mixed[1, 4], mixed[2, 4]
        assert_same(first["image_features"][0], again["image_features"][0])
        assert first["labels"] == again["labels"]
        assert not torch.equal(first["image_features"][0], later["image_features"][0])

    def test_a_row_that_only_fills_a_batch_counts_for_nothing(self, mixed: MixedSet) -> None:
        assert set(mixed[0, ~3]["labels"]) == {IGNORED}


def both(pictures: CachedPictures, path: Path) -> list[torch.Tensor]:
    """All views of a picture, and each of them mirrored."""
    views = list(pictures.views_of(path))
    return views + [view.unflatten(0, (4, 4)).flip(1).flatten(0, 1) for view in views]


def lies_between(mixed: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether it is a mixture of the two, with at least half of the first, but for what all cells have in common."""
    mixed, first, second = (features.float() - features.float().mean(0) for features in (mixed, first, second))
    way = second - first
    share = ((mixed - first) * way).sum() / way.square().sum().clamp_min(1e-9)
    return bool(0 <= share + 1e-2 <= 0.52 and (first + share * way - mixed).abs().max() < 0.02)
