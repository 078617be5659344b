"""Training as a whole: it learns from pictures, changes what it should and nothing else, stops and goes on."""

from __future__ import annotations

import json
import logging
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.data import DataError, Sample, read
from multimodal.data.controls import shuffle_images
from multimodal.data.held_out import is_held_out
from multimodal.data.refusals import REFUSALS
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor, VisionEncoder
from multimodal.fusion.bases import read_tensors
from multimodal.model import MultiModalModel
from multimodal.training import checkpoints, question_head
from multimodal.training import train as training
from multimodal.training.augmentation import View
from multimodal.training.averaging import MovingAverage
from multimodal.training.checkpoints import last_checkpoint, remove_incomplete
from multimodal.training.collator import FusionCollator, Source, TrainingSet
from multimodal.training.evaluation import accuracy, predict
from multimodal.training.pictures import LivePictures
from multimodal.training.train import TrainingSettings, train
from multimodal.training.trainer import SHORT, FusionTrainer, attention_kernels, box_losses
from multimodal.training.validation import Validation, choose_questions
from multimodal.training.vision_side import VisionSettings
from tests.fusion.tiny import open_gates
from tests.training.tiny import draw, save_sequential_encoder, tiny_model

Fused = tuple[FusionForConditionalGeneration, FusionProcessor]


VIEWS = {"medical": 3, "shop": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(task: Path, cache: Path, tmp_path: Path) -> TrainingSettings:
    """Six steps, three in an epoch, a checkpoint after every fifth."""
    return TrainingSettings(
        data={f"slake:{task}": 1.0},
        output=tmp_path / "run",
        cache=cache,
        epochs=2,
        batch_size=12,
        learning_rate=1e-2,
        save_steps=5,
        views=VIEWS,
    )


def changed(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    return TrainingSettings(**{**settings.__dict__, **changes})


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C while a step is computed."""
    original, calls = FusionTrainer.compute_loss, iter(range(1, 1000))

    def compute_loss(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", compute_loss)


@pytest.fixture(scope="module")
def trained(
    bases: tuple[str, str], task: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], FusionForConditionalGeneration, Path]:
    """The state before, the trained model and its folder."""
    model, processor = tiny_model(*bases)
    before, output = state(model), tmp_path_factory.mktemp("trained")
    settings = TrainingSettings(
        data={f"slake:{task}": 1.0},
        output=output,
        cache=cache,
        epochs=14,
        batch_size=12,
        learning_rate=1e-2,
        views=VIEWS,
    )
    return before, train(model, processor, settings), output


class TestLearning:
    def test_answers_are_right_with_the_picture_and_not_with_another(self, trained: Any, task: Path) -> None:
        model = MultiModalModel.from_pretrained(trained[2], dtype=torch.float32)
        samples = read(f"slake:{task}", "validation")
        right = accuracy(predict(model, samples, progress=False))
        shuffled = accuracy(predict(model, shuffle_images(samples), progress=False))
        assert right >= 0.9, f"{right:.0%} right with the pictures"
        assert shuffled <= right - 0.3, f"{shuffled:.0%} right with other pictures, {right:.0%} with their own"

    def test_exactly_the_trained_parts_changed(self, trained: Any) -> None:
        before, model, _ = trained
        named = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert named and all(name.startswith(("model.resampler.", "model.cross_attention_blocks.")) for name in named)
        assert differing(before, model.state_dict()) == named

    def test_saved_is_what_was_trained_and_it_comes_back(self, trained: Any) -> None:
        _, model, output = trained
        saved = read_tensors(str(output))
        assert saved.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        again = FusionForConditionalGeneration.from_pretrained(output)
        assert differing(state(again), model.state_dict()) == set()


@pytest.mark.parametrize(
    ("vision_stages", "stop_at"),
    [(0, 4), (0, 3), (2, 4)],
    ids=["inside the second epoch", "between epochs", "pictures through the encoder"],
)
def test_an_interrupted_run_ends_with_the_same_weights(
    vision_stages: int,
    stop_at: int,
    bases: tuple[str, str],
    settings: TrainingSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(output: str) -> dict[str, torch.Tensor]:
        model, processor = tiny_model(*bases)
        model.set_trainable(vision_stages=vision_stages)
        return state(train(model, processor, changed(settings, output=settings.output / output)))

    whole = run("whole")
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match=rf"after step {stop_at} of 6: the same"),
    ):
        interrupt_at(patch, stop_at)
        run("stopped")
    assert not (settings.output / "stopped" / "model.safetensors").exists()
    last = last_checkpoint(settings.output / "stopped" / "checkpoints")
    assert last is not None and last.name == f"checkpoint-{stop_at}"

    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        resumed = run("stopped")
    assert differing(resumed, whole) == set()
    assert not [record.message for record in caplog.records if "keys" in record.message]


def test_random_numbers_drawn_elsewhere_do_not_matter(
    bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = state(train(*tiny_model(*bases), changed(settings, max_steps=3)))
    original = FusionTrainer.compute_loss

    def compute_loss(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
        torch.rand(7)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", compute_loss)
    other = changed(settings, max_steps=3, output=settings.output / "other")
    assert differing(state(train(*tiny_model(*bases), other)), whole) == set()


def test_a_finished_run_is_left_alone(
    bases: tuple[str, str], settings: TrainingSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, max_steps=4)  # in the middle of an epoch
    whole = state(train(*tiny_model(*bases), settings))
    assert differing(state(train(*tiny_model(*bases), settings)), whole) == set()
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_run_goes_on_only_with_its_own_settings(bases: tuple[str, str], settings: TrainingSettings) -> None:
    train(*tiny_model(*bases), changed(settings, max_steps=1))
    with pytest.raises(ValueError, match=r"a run that differs \(batch size was 12, is 6\): give another output folder"):
        train(*tiny_model(*bases), changed(settings, batch_size=6))
    more = {name: 2.0 for name in settings.data}
    with pytest.raises(ValueError, match=r"a run that differs \(data was"):
        train(*tiny_model(*bases), changed(settings, data=more))
    file = settings.output / "training.json"
    noted = json.loads(file.read_text())
    for option in ("validate_steps", "patience", "validate_limit", "ema", "lora_rank"):
        del noted[option]  # as a run of an older version noted it
    file.write_text(json.dumps(noted))
    train(*tiny_model(*bases), changed(settings, max_steps=2))  # longer is allowed
    with pytest.raises(ValueError, match=r"a run that differs \(ema was 0\.0, is 0\.9\)"):
        train(*tiny_model(*bases), changed(settings, ema=0.9))


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, content in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (100, '{"glob'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content:
            (folder / "trainer_state.json").write_text(content)
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "checkpoint-10"
    remove_incomplete(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}


def curve(folder: Path) -> list[dict[str, float]]:
    """What is in the log of a run's last checkpoint."""
    last = last_checkpoint(folder / "checkpoints")
    assert last is not None
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def test_the_curve_is_that_of_an_uninterrupted_run(
    bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two of its points, each the mean over four steps."""
    monkeypatch.setattr(training, "LOGGING_STEPS", 4)
    settings = changed(settings, epochs=3)
    train(*tiny_model(*bases), settings)
    stopped = changed(settings, output=settings.output / "stopped")
    for step in (3, 3, 1):  # once more between the same two points, then behind one
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, step)
            train(*tiny_model(*bases), stopped)
    train(*tiny_model(*bases), stopped)
    whole = curve(settings.output)
    assert [entry["step"] for entry in whole] == [4, 8]
    assert curve(stopped.output) == whole


class TestLoss:
    @pytest.fixture
    def batch(self, fused: Fused, task: Path) -> dict[str, torch.Tensor]:
        """Rows of several lengths, one without a picture."""
        samples = read(f"slake:{task}", "train")[:5]
        samples.append(Sample(question="no picture, and a longer question than the others?", answer="yes"))
        kinds = {path: "none" for sample in samples for path in sample.images}
        pictures = LivePictures(kinds, image_processor=fused[1].image_processor)
        dataset = TrainingSet([Source(samples, pictures)], fused[1])
        return FusionCollator(fused[1].tokenizer.pad_token_id)([dataset[0, index] for index in range(len(dataset))])

    @pytest.fixture
    def trainer(self, fused: Fused, settings: TrainingSettings) -> FusionTrainer:
        arguments = training._arguments(settings, settings.output, bf16=False)
        return FusionTrainer(model=fused[0], args=arguments)

    def test_is_the_models_own(self, fused: Fused, batch: dict[str, torch.Tensor], trainer: FusionTrainer) -> None:
        model = fused[0]
        expected = model(**batch).loss
        torch.testing.assert_close(trainer.compute_loss(model, batch), expected)
        count = (batch["labels"] != -100).sum()
        torch.testing.assert_close(trainer.compute_loss(model, batch, num_items_in_batch=2 * count), expected / 2)

    def test_leaves_the_batch_as_it_is(
        self, fused: Fused, batch: dict[str, torch.Tensor], trainer: FusionTrainer
    ) -> None:
        keys = set(batch)
        _, outputs = trainer.compute_loss(fused[0], batch, return_outputs=True)
        assert set(batch) == keys
        assert outputs.logits.shape[1] < batch["labels"].shape[1]  # logits only where answers stand

    def test_only_the_answers_tokens_carry_it(
        self, fused: Fused, batch: dict[str, torch.Tensor], trainer: FusionTrainer
    ) -> None:
        """Of what comes in: no gradient reaches the logits of a question's tokens, or of the padding's."""
        end = fused[1].tokenizer.eos_token_id
        captured: list[torch.Tensor] = []
        original = fused[0].lm_head.forward

        def capture(states: torch.Tensor) -> torch.Tensor:
            logits = original(states)
            logits.retain_grad()
            captured.append(logits)
            return logits

        fused[0].lm_head.forward = capture  # type: ignore[method-assign, assignment]
        trainer.compute_loss(fused[0], batch).backward()
        grad = captured[0].grad
        assert grad is not None
        gradients = grad.abs().sum(-1) > 0  # (B, positions that some row wants)
        wanted = (batch["labels"][:, 1:] != -100).any(0).nonzero().squeeze(-1)
        assert torch.equal(gradients, batch["labels"][:, wanted + 1] != -100)
        for row, ids in zip(batch["labels"], batch["input_ids"], strict=True):
            answer = row[row != -100]
            assert answer[-1] == end and (answer[:-1] != end).all()
            assert torch.equal(ids[row != -100], answer)

    def test_smoothing(self, fused: Fused, batch: dict[str, torch.Tensor], settings: TrainingSettings) -> None:
        arguments = training._arguments(changed(settings, label_smoothing=0.1), settings.output, bf16=False)
        trainer = FusionTrainer(model=fused[0].train(), args=arguments)
        smooth = trainer.compute_loss(fused[0], batch)
        logits = fused[0](**batch).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        rows = logits[labels != -100]
        right = rows.gather(1, labels[labels != -100][:, None]).mean()
        torch.testing.assert_close(smooth, -(0.9 * right + 0.1 * rows.mean()))
        torch.testing.assert_close(trainer.compute_loss(fused[0].eval(), batch), -right)

    def test_boxes_add_what_of_the_attention_misses_them(
        self, fused: Fused, batch: dict[str, torch.Tensor], settings: TrainingSettings
    ) -> None:
        model = fused[0]
        open_gates(model)
        cells = 16
        everywhere = torch.ones(6, cells) / cells
        everywhere[5] = 0  # the row without a picture
        half = everywhere.clone()
        half[:, : cells // 2] = 0
        half[0] = 0  # nobody says where to look
        arguments = training._arguments(settings, settings.output, bf16=False)
        trainer = FusionTrainer(model=model, args=arguments, box_weight=0.5)
        plain = FusionTrainer(model=model, args=arguments).compute_loss(model, batch)
        torch.testing.assert_close(trainer.compute_loss(model, {**batch, "targets": everywhere}), plain)
        torch.testing.assert_close(trainer.compute_loss(model, batch), plain)

        trace = model(**batch, output_trace=True).trace
        losses = box_losses(trace, batch["labels"], half)
        tokens = (batch["labels"][1:5] != -100).sum()
        assert losses.shape == (tokens,) and (losses > 0).all()
        found = trainer.compute_loss(model, {**batch, "targets": half})
        torch.testing.assert_close(found, plain + 0.5 * losses.mean())
        # By hand, for the first token of row 1: what its blocks' attention, on average, sees of the right half.
        at = int((batch["labels"][1] != -100).nonzero()[0]) - 1
        seen = trace.attention[1, :, at, 0].mean(0) @ trace.resampler_maps[1, 0]
        torch.testing.assert_close(losses[0], -seen[cells // 2 :].sum().log())

    def test_each_kind_of_parameter_has_its_rate(self, trainer: FusionTrainer) -> None:
        matrices, vectors, gates, resampler = trainer.create_optimizer().param_groups
        assert gates["lr"] > matrices["lr"] == vectors["lr"] > resampler["lr"]
        assert matrices["weight_decay"] > gates["weight_decay"] == vectors["weight_decay"] == resampler["weight_decay"]
        assert len(gates["params"]) == 4  # two blocks, attention and feed-forward
        assert all(parameter.ndim > 1 for parameter in matrices["params"])
        assert len(resampler["params"]) == len(list(trainer.model.model.resampler.parameters()))
        trained = sum(parameter.requires_grad for parameter in trainer.model.parameters())
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == trained


class TestTrainedEncoder:
    def test_its_last_stages_learn_and_are_saved(self, fused: Fused, settings: TrainingSettings) -> None:
        model, processor = fused
        model.set_trainable(vision_stages=1)
        open_gates(model)
        before = state(model)
        train(model, processor, changed(settings, max_steps=2))
        moved = {name for name in differing(before, state(model)) if name.startswith("model.vision_encoder.")}
        last = {name for name in before if ".layers.2." in name or ".layer.2." in name}
        last = {name for name in last if name.startswith("model.vision_encoder.")}
        assert moved and moved <= last
        saved = {name for name in read_tensors(str(settings.output)) if name.startswith("model.vision_encoder.")}
        assert saved == last
        again = FusionForConditionalGeneration.from_pretrained(settings.output)
        assert differing(state(again), state(model)) == set()

    def test_needs_no_features(self, fused: Fused, settings: TrainingSettings, tmp_path: Path) -> None:
        model, processor = fused
        model.set_trainable(vision_stages=1)
        train(model, processor, changed(settings, max_steps=1, cache=tmp_path / "unused"))
        assert not list((tmp_path / "unused").glob("*.float16"))

    def test_batch_normalisation_in_bfloat16(
        self, bases: tuple[str, str], settings: TrainingSettings, tmp_path: Path
    ) -> None:
        """Frozen stages in bfloat16 before trained ones in float32, with statistics that stay."""
        encoder = VisionEncoder.create(backend="torchvision", name="mobilenet_v3_small", image_size=32)
        encoder.save_pretrained(tmp_path / "vision")
        model, processor = tiny_model(bases[0], str(tmp_path / "vision"))
        model.to(torch.bfloat16).set_trainable(vision_stages=2)
        open_gates(model)
        before = state(model)
        train(model, processor, changed(settings, max_steps=2))
        moved = differing(before, state(model))
        assert any(name.startswith("model.vision_encoder.") for name in moved)
        assert not any(name.endswith(("running_mean", "running_var")) for name in moved)
        assert {tensor.dtype for tensor in model.state_dict().values()} <= {torch.bfloat16, torch.int64}


class TestAllStagesOpenFirst:
    """The vision side's training opens the whole encoder: nothing can be kept, so every draw is a view of its own."""

    def test_views_are_drawn_anew_and_what_is_kept_is_the_trained_encoder_s(
        self, bases: tuple[str, str], settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        views: dict[Path, set[View]] = defaultdict(set)
        original = LivePictures.draw

        def draw(self: LivePictures, path: Path, seed: str) -> tuple[torch.Tensor, View]:
            pixels, view = original(self, path, seed)
            views[path].add(view)
            return pixels, view

        monkeypatch.setattr(LivePictures, "draw", draw)
        monkeypatch.setattr(question_head, "WIDTH", 64)
        model, processor = tiny_model(bases[0], save_sequential_encoder(tmp_path / "encoder"), images_last=True)
        stages = len(model.model.vision_encoder.stages())
        before = state(model)
        cache = tmp_path / "cache"
        train(
            model,
            processor,
            changed(settings, cache=cache, vision=VisionSettings(stages=stages, epochs=3), views={"medical": 1}),
        )
        assert max(len(its) for its in views.values()) >= 3  # one in each epoch, though one view is kept
        moved = {name for name in differing(before, state(model)) if name.startswith("model.vision_encoder.")}
        assert "model.vision_encoder.trunk.features.0.weight" in moved  # the very first convolution
        (kept,) = cache.glob("*.names")  # features of the trained encoder; nothing from below it
        assert len(kept.read_text().splitlines()) == len({name.split()[0] for name in kept.read_text().splitlines()})


class TestWhatIsToldFirst:
    """Before an encoder or a decoder has computed anything."""

    @pytest.fixture(autouse=True)
    def no_computing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def computing(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("something was computed before the data were checked")

        monkeypatch.setattr(VisionEncoder, "forward", computing)
        monkeypatch.setattr(FusionTrainer, "train", computing)

    def test_a_data_set_that_is_not_there(self, fused: Fused, settings: TrainingSettings, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere.*Give the folder that holds train\.json"):
            train(*fused, changed(settings, data={**settings.data, f"slake:{tmp_path / 'nowhere'}": 1.0}))

    @pytest.mark.parametrize("vision_stages", [0, 1])
    def test_broken_pictures(
        self, vision_stages: int, fused: Fused, settings: TrainingSettings, tmp_path: Path
    ) -> None:
        rows = []
        for number in range(8):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
            content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "Is it red?"}]
            rows.append(
                {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": f"{number}"}]}
            )
        for broken in (6, 7):  # not the same bytes: a cache opens equal files once
            file = tmp_path / f"{broken}.png"
            file.write_bytes(file.read_bytes()[: 40 + broken])
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
        fused[0].set_trainable(vision_stages=vision_stages)
        own = changed(settings, data={str(tmp_path / "own.jsonl"): 1.0}, cache=tmp_path / "cache")
        with pytest.raises(DataError) as caught:
            train(*fused, own)
        assert caught.value.file == tmp_path / "6.png" and caught.value.remedy
        assert str(tmp_path / "7.png") in str(caught.value)

    def test_nothing_to_train(self, fused: Fused, settings: TrainingSettings) -> None:
        fused[0].set_trainable(fusion=False)
        with pytest.raises(ValueError, match=r"nothing is trained"):
            train(*fused, settings)

    def test_rows_that_teach_nothing(
        self, fused: Fused, settings: TrainingSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        turns = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "no"}]
        (tmp_path / "own.jsonl").write_text(json.dumps({"messages": turns}))
        with pytest.raises(ValueError, match=r"own\.jsonl: no sample to train on"):
            train(*fused, changed(settings, data={str(tmp_path / "own.jsonl"): 1.0}))
        assert "1 samples without a picture left out" in capsys.readouterr().out


def own_file(folder: Path, rows: int = 8) -> Path:
    """A user's file with a picture for each row."""
    lines = []
    for number in range(rows):
        draw("red", number).save(folder / f"{number}.png")
        content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "Is it red?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return folder / "own.jsonl"


class TestWhatIsRead:
    def read(self, settings: TrainingSettings) -> Any:
        return training._read(settings, decoder_is_trained=False)

    def test_held_out_pictures_are_never_trained_on(self, settings: TrainingSettings) -> None:
        """Neither themselves nor in a question that was added to them."""
        settings = changed(settings, held_out=0.3, refusals=1.0)
        (name,) = settings.data
        all_pictures = {path for sample in read(name, "train") for path in sample.images}
        held_out = {path for path in all_pictures if is_held_out(path, 0.3)}
        data = self.read(settings)
        used = {path for found in data.samples.values() for sample in found for path in sample.images}
        assert held_out and all_pictures - held_out == used & all_pictures
        assert not held_out & data.kinds.keys()

    def test_refusals_are_added(self, settings: TrainingSettings) -> None:
        assert "refusals" not in self.read(settings).samples
        data = self.read(changed(settings, refusals=0.5))
        added = data.samples["refusals"]
        assert {sample.answer for sample in added} <= set(REFUSALS.values())
        (name,) = settings.data
        about_the_task = [s for s in added if s.images[0] in {p for s in data.samples[name] for p in s.images}]
        assert len(about_the_task) == 8 and len(added) > 8
        assert all(path.exists() and data.kinds[path] == "shop" for s in added[8:] for path in s.images)

    def test_kinds_follow_the_data_set(self) -> None:
        assert training.kind_of("grocery-facts:/data") == training.kind_of("clothing:/data") == "shop"
        assert training.kind_of("slake-zh:/data") == training.kind_of("vqa-rad/0:/data") == "medical"
        assert training.kind_of("/data/grocery.jsonl") == "medical"  # may be one: no mirroring

    def test_broken_rows_are_listed_if_they_may_be_left_out(
        self, settings: TrainingSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = own_file(tmp_path)
        (tmp_path / "3.png").write_bytes(b"no picture")
        (tmp_path / "5.png").unlink()
        with file.open("a") as stream:
            stream.write("\n{broken")
        own = changed(settings, data={str(file): 1.0}, skip_bad=True)
        (found,) = self.read(own).samples.values()
        assert [sample.images[0].name for sample in found] == [f"{number}.png" for number in (0, 1, 2, 4, 6, 7)]
        printed = capsys.readouterr().out
        assert "3 could not be read:" in printed
        assert "own.jsonl, line 6: " in printed and "own.jsonl, line 9: broken JSON" in printed
        assert "3.png: this picture" in printed
        with pytest.raises(DataError, match=r"own\.jsonl, line 6: "):
            self.read(changed(own, skip_bad=False))

    def test_a_tenth_of_an_own_files_pictures_is_kept_for_validation(
        self, settings: TrainingSettings, tmp_path: Path
    ) -> None:
        file = str(own_file(tmp_path, rows=60))
        own = changed(settings, data={file: 1.0, **settings.data}, held_out=0.2)
        assert self.read(own).validation == {}
        whole, data = self.read(own), self.read(changed(own, validate_steps=5))
        assert data.validation.keys() == own.data.keys()
        kept, asked = set(data.samples[file]), set(data.validation[file])
        assert asked and not kept & asked and kept | asked == set(whole.samples[file])
        assert not any(is_held_out(path, 0.2) for sample in asked for path in sample.images)
        assert not {path for s in asked for path in s.images} & data.kinds.keys()


class TestValidation:
    def settings(self, settings: TrainingSettings, **changes: Any) -> TrainingSettings:
        return changed(settings, **{"epochs": 4, "validate_steps": 2, "validate_limit": 12} | changes)

    def test_the_best_weights_are_kept_and_restored(
        self, bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings, seen = self.settings(settings), {}
        scores = iter([0.25, 0.5, 0.75, 0.75, 0.5, 0.25])

        def score(self: Validation) -> dict[str, float]:
            seen[self.trainer.state.global_step] = state(self.model)
            return {"eval_exact_match": next(scores)}

        monkeypatch.setattr(Validation, "_scores", score)
        model = train(*tiny_model(*bases), settings)
        assert list(seen) == [2, 4, 6, 8, 10, 12]
        assert differing(state(model), seen[6]) == set()  # the first of equals
        best = FusionForConditionalGeneration.from_pretrained(settings.output / "best")
        assert differing(state(best), seen[6]) == set()
        found = [entry["eval_exact_match"] for entry in curve(settings.output) if "eval_exact_match" in entry]
        assert found == [0.25, 0.5, 0.75, 0.75, 0.5, 0.25]

    def test_it_stops_where_nothing_is_gained_and_goes_on_if_it_may(
        self,
        bases: tuple[str, str],
        settings: TrainingSettings,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        settings = self.settings(settings, patience=2)
        monkeypatch.setattr(Validation, "_scores", lambda self: {"eval_exact_match": 0.5})
        stopped = state(train(*tiny_model(*bases), settings))
        last = last_checkpoint(settings.output / "checkpoints")
        assert last is not None and last.name == "checkpoint-6"
        assert differing(state(train(*tiny_model(*bases), settings)), stopped) == set()
        assert "checkpoint-6 is at the end of this training: nothing is left to do" in capsys.readouterr().out
        train(*tiny_model(*bases), changed(settings, patience=9))
        last = last_checkpoint(settings.output / "checkpoints")
        assert last is not None and last.name == "checkpoint-12"

    @pytest.mark.parametrize("ema", [0.0, 0.9])
    def test_an_interrupted_run_decides_the_same(
        self, ema: float, bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = self.settings(settings, ema=ema, save_steps=3)
        whole = state(train(*tiny_model(*bases), settings))
        stopped = changed(settings, output=settings.output / "stopped")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, 5)
            train(*tiny_model(*bases), stopped)
        # Behind the checkpoint a process was killed, after it had found something better.
        best = stopped.output / "checkpoints" / "best.safetensors"
        best.unlink()  # the checkpoint has it, too
        best.write_bytes(b"what a killed process left")
        assert differing(state(train(*tiny_model(*bases), stopped)), whole) == set()
        assert curve(stopped.output) == curve(settings.output)

    def test_scores_are_of_greedy_answers(self, trained: Any, task: Path, settings: TrainingSettings) -> None:
        model, processor = MultiModalModel.from_pretrained(trained[2], dtype=torch.float32), None
        samples = read(f"slake:{task}", "validation")
        trainer = FusionTrainer(model=model.model, args=training._arguments(settings, settings.output, bf16=False))
        validation = Validation(
            trainer,
            model.processor,
            {"slake:a": samples[:14], "b/c.jsonl": samples[14:]},
            every=1,
            patience=0,
            output=settings.output,
            average=processor,
        )
        first, second = (accuracy(predict(model, some, progress=False)) for some in (samples[:14], samples[14:]))
        assert validation._scores() == {
            "eval_exact_match": pytest.approx((14 * first + 10 * second) / 24),
            "eval_exact_match_slake": pytest.approx(first),
            "eval_exact_match_c": pytest.approx(second),
        }

    def test_what_is_asked(self, fused: Fused, task: Path) -> None:
        tokenizer, samples = fused[1].tokenizer, read(f"slake:{task}", "validation")
        long = [Sample("Describe it.", "word " * 60, samples[0].images)] * 9
        splits = {"a": samples, "long": long, "b": samples[:3], "c": samples}
        chosen = choose_questions(splits, tokenizer, limit=20, seed=0)
        assert {name: len(found) for name, found in chosen.items()} == {"a": 8, "b": 3, "c": 9}
        assert chosen == choose_questions(splits, tokenizer, limit=20, seed=0)
        assert chosen != choose_questions(splits, tokenizer, limit=20, seed=1)
        with pytest.raises(ValueError, match="no data set has a validation split with short answers"):
            choose_questions({"long": long, "none": []}, tokenizer, limit=20, seed=0)


class TestAverage:
    def test_it_is_what_is_saved(
        self, bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights: list[dict[str, torch.Tensor]] = []
        original = MovingAverage.on_optimizer_step

        def remember(self: MovingAverage, *args: Any, **kwargs: Any) -> None:
            weights.append(state(self.model))
            original(self, *args, **kwargs)

        monkeypatch.setattr(MovingAverage, "on_optimizer_step", remember)
        model, processor = tiny_model(*bases)
        expected = state(model)
        model = train(model, processor, changed(settings, ema=0.5))
        for step, found in enumerate(weights, start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            expected = {name: decay * expected[name] + (1 - decay) * found[name] for name in expected}
        assert len(weights) == 6
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                torch.testing.assert_close(tensor, expected[name])
        assert differing(state(model), weights[-1])

    def test_a_finished_run_gives_it_again(self, bases: tuple[str, str], settings: TrainingSettings) -> None:
        settings = changed(settings, ema=0.9, max_steps=4)
        whole = state(train(*tiny_model(*bases), settings))
        assert differing(state(train(*tiny_model(*bases), settings)), whole) == set()


def test_an_empty_answer_is_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample("a?", "b", (Path("p"),), id="kept"), Sample("a?", "", (Path("p"),), id="slake/1622")]
    assert [sample.id for sample in training._usable("slake", samples, False)] == ["kept"]
    assert "no answer: slake/1622" in capsys.readouterr().out


def test_arguments(settings: TrainingSettings) -> None:
    arguments = training._arguments(settings, settings.output, bf16=True)
    assert arguments.report_to == []
    assert arguments.use_cpu is not torch.cuda.is_available()
    assert arguments.n_gpu <= 1


def test_tensorboard_only_if_asked(bases: tuple[str, str], settings: TrainingSettings) -> None:
    pytest.importorskip("tensorboard")
    train(*tiny_model(*bases), changed(settings, max_steps=1))
    assert not list(settings.output.rglob("events.out.*"))
    asked = changed(settings, max_steps=1, tensorboard=True, output=settings.output / "asked")
    train(*tiny_model(*bases), asked)
    assert list(asked.output.rglob("events.out.*"))


@pytest.mark.parametrize(("length", "kernel"), [(SHORT, "math"), (SHORT + 1, "flash")])
def test_short_rows_take_products_of_matrices(length: int, kernel: str) -> None:
    query = torch.ones(1, 2, 4, 8, requires_grad=True)
    with attention_kernels(torch.zeros(1, length, dtype=torch.long)):
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert (attended.grad_fn is not None) and ("Flash" in attended.grad_fn.name()) is (kernel == "flash")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background may ignore SIGINT, and hands that on."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_at_once() -> None:
    with checkpoints.CheckpointOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
