"""The vision side alone: it learns the drawn task, looks where boxes say, changes what it should, stops and goes on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from multimodal.data import Box, Sample, read
from multimodal.data.boxes import read_boxes
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.fusion.vision import as_grid
from multimodal.training import question_head
from multimodal.training import vision_side as module
from multimodal.training.augmentation import box_target
from multimodal.training.checkpoints import last_checkpoint
from multimodal.training.features import CachedPictures, FeatureCache
from multimodal.training.picture_set import UNKNOWN, PictureOrder, PictureSet, collate, known_layouts
from multimodal.training.question_head import QuestionHead, RowDropout
from multimodal.training.vision_side import VisionSettings, VisionSide, VisionTrainer, train_vision
from tests.training.tiny import save_sequential_encoder, tiny_model

Fused = tuple[FusionForConditionalGeneration, FusionProcessor]
GRID = (4, 4)


@pytest.fixture(scope="module", autouse=True)
def small_head() -> Iterator[None]:
    """The head's own width would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_head, "WIDTH", 64)
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_sequential_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def fused(bases: tuple[str, str], encoder: str) -> Fused:
    return tiny_model(bases[0], encoder)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[VisionSide]:
    """Every vision side that is made."""
    made: list[VisionSide] = []
    original = VisionSide.__init__

    def remember(self: VisionSide, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(VisionSide, "__init__", remember)
    return made


# Two steps in each of two epochs.
SETTINGS = VisionSettings(stages=2, epochs=2, batch_size=8, learning_rate=2e-3, encoder_learning_rate=1e-3)
MANY = replace(SETTINGS, epochs=40)


def pictures_of(fused: Fused, samples: Sequence[Sample], folder: Path, *, views: int = 2) -> CachedPictures:
    model, processor = fused
    cache = FeatureCache(
        folder, encoder=model.model.vision_encoder, image_processor=processor.image_processor, open_stages=2
    )
    kinds = {path: "medical" for sample in samples for path in sample.images}
    return CachedPictures(cache, kinds, views={"medical": views})


def run(
    fused: Fused, samples: Sequence[Sample], settings: VisionSettings, features: Path, output: Path, **options: Any
) -> dict[str, tuple[int, float]]:
    return train_vision(fused[0], samples, pictures_of(fused, samples, features), settings, output=output, **options)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


class TestLearning:
    @pytest.fixture(scope="class")
    @staticmethod
    def learnt(
        bases: tuple[str, str],
        encoder: str,
        task: Path,
        features: Path,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> tuple[dict[str, torch.Tensor], Fused, dict[str, tuple[int, float]]]:
        """The state before, the model, and how it did on pictures that it never saw."""
        fused = tiny_model(bases[0], encoder)
        before = state(fused[0])
        samples, held_out = read(f"slake:{task}", "train"), read(f"slake:{task}", "validation")
        scores = run(
            fused,
            samples,
            MANY,
            features,
            tmp_path_factory.mktemp("learnt"),
            validation={"task": held_out},
            validation_pictures=pictures_of(fused, held_out, features, views=1),
        )
        return before, fused, scores

    def test_it_learns_the_task(self, learnt: Any) -> None:
        count, share = learnt[2]["task"]
        assert count == 24
        assert share >= 0.8, f"{share:.0%} right; who always says the likeliest answer has 50 %"

    def test_only_what_is_open_changed_and_all_is_frozen_after(self, learnt: Any) -> None:
        before, (model, _), _ = learnt
        moved = differing(before, state(model))
        assert any(name.startswith("model.resampler.") for name in moved)
        last = {id(p) for stage in model.model.vision_encoder.stages()[-2:] for m in stage for p in m.parameters()}
        open_ = {name for name, parameter in model.named_parameters() if id(parameter) in last}
        assert open_ & moved and moved <= open_ | {name for name in before if name.startswith("model.resampler.")}
        assert not any(name.endswith(("running_mean", "running_var")) for name in moved)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.config.trainable_vision_stages == 2  # so a checkpoint keeps them


class TestBoxes:
    """Two squares of different colours: the question names one, and its box says where it is."""

    @pytest.fixture
    def samples(self, tmp_path: Path) -> list[Sample]:
        found = []
        for number in range(24):
            image = Image.new("RGB", (64, 64), (110, 110, 110))
            places = [(0, 0), (32, 0), (0, 32), (32, 32)]
            red, blue = places[number % 4], places[(number + 1 + number // 4 % 3) % 4]
            for (left, top), fill in ((red, (230, 20, 20)), (blue, (20, 40, 230))):
                ImageDraw.Draw(image).rectangle((left + 2, top + 2, left + 29, top + 29), fill=fill)
            path = tmp_path / f"{number}.png"
            image.save(path)
            for name, (left, top) in (("red", red), ("blue", blue)):
                box = Box(name, left / 64, top / 64, 0.5, 0.5)
                answer = ("left" if left == 0 else "right") + (" top" if top == 0 else " bottom")
                found.append(Sample(f"Where is {name}?", answer, (path,), boxes=(box,)))
        return found

    def share_inside(self, side: VisionSide, dataset: PictureSet) -> float:
        """How much of the attention lies in the boxes, on average."""
        batch = collate([dataset[0, index, 0] for index in range(len(dataset))])
        with torch.no_grad():
            features, grid = as_grid(side.encoder.run_stages(batch["states"], side.start), "")
            regions, maps = side.resampler(features, grid, output_attentions=True)
            _, attention = side.head(regions, batch["questions"], batch["of_picture"])
        looked = (attention[:, None] @ maps[batch["of_picture"]]).squeeze(1)
        return float((looked * (batch["targets"] > 0)).sum(-1).mean())

    def test_attention_is_drawn_into_them(
        self,
        fused: Fused,
        samples: list[Sample],
        sides: list[VisionSide],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "BOX_WEIGHT", 1.0)
        grid = tuple(fused[0].config.vision_config.grid_size)
        pictures = pictures_of(fused, samples, tmp_path / "features", views=1)
        dataset = PictureSet(samples, pictures, grid=grid, questions=None, seed=0)
        settings = VisionSettings(stages=2, epochs=16, batch_size=8, learning_rate=3e-3)
        train_vision(fused[0], samples, pictures, settings, output=tmp_path / "run")
        (side,) = sides
        inside = self.share_inside(side.eval(), dataset)
        assert inside >= 0.5, f"{inside:.0%} of the attention lies in boxes that are a quarter of the picture"

    def test_the_loss_is_that_of_the_share_inside(self, fused: Fused, samples: list[Sample], tmp_path: Path) -> None:
        grid = tuple(fused[0].config.vision_config.grid_size)
        plain = [replace(sample, boxes=()) for sample in samples]
        pictures = pictures_of(fused, samples, tmp_path / "features", views=1)
        losses = []
        for some in (samples, plain):
            dataset = PictureSet(some, pictures, grid=grid, questions=None, seed=0)
            head = QuestionHead(num_words=len(dataset.words) + 2, hidden_size=64, num_answers=len(dataset.answers))
            torch.manual_seed(0)
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            model = fused[0].model
            side = VisionSide(model.vision_encoder, model.resampler, head, VisionSettings(stages=2)).eval()
            batch = collate([dataset[0, index, 0] for index in range(6)])
            with torch.no_grad():
                losses.append(side(**batch))
            if some is samples:
                assert torch.equal(
                    batch["targets"][0], box_target(samples[0].boxes, pictures.draw(samples[0].images[0], "")[1], grid)
                )
                inside = self.share_inside(side, dataset)
        assert losses[1]["box_loss"] == 0
        assert torch.equal(losses[0]["answer_loss"], losses[1]["answer_loss"])
        mean = float(losses[0]["box_loss"]) / 12
        assert mean >= -torch.tensor(inside).log() - 0.2  # Jensen: the mean of -log is at least -log of the mean


class TestLayout:
    """One square a picture, red or blue, with a file of boxes beside it."""

    @pytest.fixture
    def samples(self, tmp_path: Path) -> list[Sample]:
        found = []
        for number in range(24):
            name, fill = (("Red", (230, 20, 20)), ("Blue", (20, 40, 230)))[number % 2]
            left, top = ((0, 0), (32, 0), (0, 32), (32, 32))[number // 2 % 4]
            image = Image.new("RGB", (64, 64), (110, 110, 110))
            ImageDraw.Draw(image).rectangle((left, top, left + 31, top + 31), fill=fill)
            path = tmp_path / f"{number}" / "source.png"
            path.parent.mkdir()
            image.save(path)
            path.with_name("detection.json").write_text(json.dumps([{name: [left, top, 32, 32]}]))
            (box,) = read_boxes(path)
            found.append(Sample("Which colour?", name, (path,), boxes=(box,)))
        return found

    @pytest.fixture
    def pictures(self, fused: Fused, samples: list[Sample], tmp_path: Path) -> CachedPictures:
        return pictures_of(fused, samples, tmp_path / "features", views=1)

    def test_it_says_which_cells_the_boxes_cover(self, samples: list[Sample], pictures: CachedPictures) -> None:
        dataset = PictureSet(samples, pictures, grid=GRID, questions=None, seed=0)
        assert dataset.labels == {"blue": 0, "red": 1}
        layout = dataset[0, 2, 0]["layout"].view(*GRID, 2)  # a red square on the upper right
        assert not layout[..., 0].any()
        assert layout[:2, 2:, 1].eq(1).all() and layout[..., 1].sum() == 4

    def test_nobody_knows_without_the_file_or_in_an_idle_row(
        self, samples: list[Sample], pictures: CachedPictures
    ) -> None:
        samples[0].images[0].with_name("detection.json").unlink()
        samples[1] = replace(samples[1], boxes=())  # as a reader leaves it where the file is broken
        dataset = PictureSet(samples, pictures, grid=GRID, questions=None, seed=0)
        layouts = collate([dataset[0, index, 0] for index in (0, 1, 2, ~3)])["layouts"]
        assert known_layouts(layouts).tolist() == [False, False, True, False]
        none = PictureSet(samples[:2], pictures, grid=GRID, questions=None, seed=0)
        assert none.labels == {} and not known_layouts(collate([none[0, 0, 0]])["layouts"]).any()

    def test_features_learn_what_lies_where(
        self, fused: Fused, samples: list[Sample], pictures: CachedPictures, sides: list[VisionSide], tmp_path: Path
    ) -> None:
        dataset = PictureSet(samples, pictures, grid=GRID, questions=None, seed=0)
        settings = VisionSettings(stages=2, epochs=40, batch_size=8, learning_rate=1e-2, encoder_learning_rate=3e-3)
        train_vision(fused[0], samples, pictures, settings, output=tmp_path / "run")
        (side,) = sides
        batch = collate([dataset[0, index, 0] for index in range(len(dataset))])
        with torch.no_grad():
            features, _ = as_grid(side.eval().encoder.run_stages(batch["states"], side.start), "")
            assert side.layout is not None
            said = side.layout(features).sigmoid()
        inside, outside = said[batch["layouts"] == 1].mean(), said[batch["layouts"] == 0].mean()
        assert inside >= 0.5 and outside <= 0.2, f"{inside:.0%} inside of the boxes, {outside:.0%} outside"

    def test_without_boxes_nothing_changes(self, fused: Fused, samples: list[Sample], pictures: CachedPictures) -> None:
        dataset = PictureSet([replace(s, boxes=()) for s in samples], pictures, grid=GRID, questions=None, seed=0)
        head = QuestionHead(num_words=len(dataset.words) + 2, hidden_size=64, num_answers=len(dataset.answers))
        model = fused[0].model
        side = VisionSide(model.vision_encoder, model.resampler, head, VisionSettings(stages=2))
        assert side.layout is None
        assert side(**collate([dataset[0, 0, 0]]))["layout_loss"] == 0


@pytest.fixture(scope="module")
def whole(
    bases: tuple[str, str], encoder: str, task: Path, features: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    run(tiny_model(bases[0], encoder), read(f"slake:{task}", "train"), SETTINGS, features, output)
    return output


class TestInterruption:
    @pytest.fixture
    def samples(self, task: Path) -> list[Sample]:
        return read(f"slake:{task}", "train")

    @pytest.fixture
    def copied(self, whole: Path, tmp_path: Path) -> Path:
        shutil.copytree(whole, tmp_path / "copied")
        return tmp_path / "copied"

    @pytest.mark.parametrize("stop_at", [1, 2], ids=["in an epoch", "between epochs"])
    def test_it_ends_with_the_same_weights(
        self,
        stop_at: int,
        whole: Path,
        bases: tuple[str, str],
        encoder: str,
        samples: list[Sample],
        features: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        original, calls = VisionTrainer.compute_loss, iter(range(1, 100))

        def compute_loss(self: VisionTrainer, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == stop_at:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        result = tmp_path / "vision.safetensors"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop_at}"):
            patch.setattr(VisionTrainer, "compute_loss", compute_loss)
            run(tiny_model(bases[0], encoder), samples, SETTINGS, features, tmp_path)
        assert not result.exists()
        torch.rand(7)  # nothing else has a say
        run(tiny_model(bases[0], encoder), samples, SETTINGS, features, tmp_path)
        assert differing(load_file(result), load_file(whole / "vision.safetensors")) == set()

    def test_a_run_that_was_stopped_at_its_very_end(
        self, fused: Fused, samples: list[Sample], features: Path, tmp_path: Path
    ) -> None:
        """Killed between the last checkpoint and the result, in the middle of an epoch: no step too many is made."""
        settings = replace(SETTINGS, epochs=0.5)
        run(fused, samples, settings, features, tmp_path)
        result = tmp_path / "vision.safetensors"
        whole = load_file(result)
        result.unlink()
        run(fused, samples, settings, features, tmp_path)
        assert differing(load_file(result), whole) == set()
        last = last_checkpoint(tmp_path / "checkpoints")
        assert last is not None and last.name == "checkpoint-1"

    def test_a_finished_one_is_taken_as_it_is(
        self,
        copied: Path,
        fused: Fused,
        samples: list[Sample],
        features: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(VisionTrainer, "train", None)
        run(fused, samples, SETTINGS, features, copied)
        stored = load_file(copied / "vision.safetensors")
        found = fused[0].model.resampler.state_dict()
        assert found and all(torch.equal(found[name], stored[f"resampler.{name}"]) for name in found)

    def test_other_settings_are_refused(
        self, copied: Path, fused: Fused, samples: list[Sample], features: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"differs \(batch size was 8, is 4\): give another output folder"):
            run(fused, samples, replace(SETTINGS, batch_size=4), features, copied)
        with pytest.raises(ValueError, match=r"differs \(questions was about 16 pictures"):
            run(fused, samples[1:], SETTINGS, features, copied)
        (copied / "vision.json").unlink()  # a run of an older version has none
        run(fused, samples, SETTINGS, features, copied)
        assert json.loads((copied / "vision.json").read_text())["batch_size"] == 8


class TestSet:
    @pytest.fixture
    def dataset(self, fused: Fused, task: Path, features: Path) -> PictureSet:
        samples = read(f"slake:{task}", "train")
        two = Sample("Which?", "left", samples[0].images * 2)
        long = Sample("Describe it.", "a" * 41, samples[0].images)
        nothing = Sample("Is it red?", "", samples[0].images)
        pictures = pictures_of(fused, samples, features)
        return PictureSet([*samples, two, long, nothing], pictures, grid=GRID, questions=8, seed=3)

    def test_questions_with_one_picture_and_a_short_answer(self, dataset: PictureSet) -> None:
        assert len(dataset) == 16
        assert dataset.answers.keys() == {"red", "green", "blue", "white", "yes", "no"}
        item = dataset[0, 0, 0]
        assert len(item["questions"]) == len(item["answers"]) == len(item["targets"]) == 2

    def test_words_of_every_script(self, dataset: PictureSet) -> None:
        known = {"what", "colour", "is", "this", "it", "red"}
        assert dataset.words.keys() == known
        assert dataset.read("What colour?") == [dataset.words["what"], dataset.words["colour"]]
        assert dataset.read("Is 肺 red") == [dataset.words["is"], 1, dataset.words["red"]]
        assert dataset.read("?") == [1]  # a recurrent network needs a word

    def test_a_picture_with_many_questions_comes_often(self, dataset: PictureSet) -> None:
        path, samples = dataset.pictures[0]
        dataset.pictures[0] = (path, [replace(samples[0], question=f"{n}?") for n in range(18)])
        order = PictureOrder(dataset, 4, seed=0)
        assert [turn for index, turn in order.passes if index == 0] == [0, 1, 2, 3]  # about the root of 18
        assert len(order) == 15 + 4
        items = [dataset[0, 0, turn] for turn in range(4)]
        assert all(len(item["questions"]) == 8 for item in items)

    def test_order_and_items_follow_seed_and_epoch(self, dataset: PictureSet) -> None:
        def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
            sampler = PictureOrder(dataset, 4, seed=seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        assert order(0, 1) == order(0, 1)
        assert {epoch for epoch, *_ in order(0, 1)} == {1}
        assert len({tuple(index for _, index, _ in order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
        one, same = dataset[0, 3, 0], dataset[0, 3, 0]
        assert torch.equal(one["states"], same["states"]) and one["rows"] == same["rows"]
        assert one["rows"] != dataset[1, 3, 0]["rows"]

    def test_an_idle_row_counts_for_nothing(self, dataset: PictureSet) -> None:
        item = dataset[0, ~3, 0]
        assert set(item["answers"]) == {UNKNOWN} and not torch.stack(item["targets"]).any()
        assert torch.equal(item["states"], dataset[0, 3, 0]["states"])


class TestDropout:
    @pytest.fixture
    def states(self) -> torch.Tensor:
        return torch.ones(64, 12, 32)

    def test_its_mask_follows_from_the_row_alone(self, states: torch.Tensor) -> None:
        rows = torch.randint(2**62, (64,))
        dropout = RowDropout(1)
        dropped = dropout(states, rows)
        assert torch.equal(dropout(states[10:20], rows[10:20]), dropped[10:20])
        assert torch.equal(dropout(states[:, :5], rows), dropped[:, :5])  # padding changes nothing
        assert not torch.equal(RowDropout(2)(states, rows), dropped)
        assert not torch.equal(dropped[0], dropped[1])

    def test_it_takes_a_fifth_away(self, states: torch.Tensor) -> None:
        dropped = RowDropout(1)(states, torch.arange(64))  # numbers that are close give other masks, too
        assert set(dropped.unique().tolist()) == {0.0, 1.25}
        assert dropped.mean() == pytest.approx(1, abs=0.01)
        for axis in (0, 1, 2):
            others = tuple({0, 1, 2} - {axis})
            assert (dropped.mean(others) - 1).abs().max() < 0.1
        kept = (dropped > 0).float().flatten(1)
        assert (torch.corrcoef(kept) - torch.eye(64)).abs().max() < 0.3

    def test_none_in_evaluation(self, states: torch.Tensor) -> None:
        dropout = RowDropout(1)
        assert dropout(states, None) is states
        assert dropout.eval()(states, torch.arange(64)) is states
