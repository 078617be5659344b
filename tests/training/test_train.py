"""Training as a whole: it learns from pictures, changes what it should and nothing else, stops and goes on."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.data import DataError, Sample, read
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor, VisionEncoder
from multimodal.fusion.bases import read_tensors
from multimodal.model import MultiModalModel
from multimodal.training import train as training
from multimodal.training.collator import FusionCollator, Source, TrainingSet
from multimodal.training.evaluation import accuracy, predict, shuffle_images
from multimodal.training.pictures import LivePictures
from multimodal.training.train import FusionTrainer, TrainingSettings, last_checkpoint, train
from tests.fusion.tiny import open_gates
from tests.training.tiny import tiny_model

Fused = tuple[FusionForConditionalGeneration, FusionProcessor]


@pytest.fixture(autouse=True)
def few_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VIEWS", {"slake": ("medical", 3)})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(task: Path, cache: Path, tmp_path: Path) -> TrainingSettings:
    """Six steps, three in an epoch, a checkpoint after every fifth."""
    return TrainingSettings(
        data=(f"slake:{task}",),
        output=tmp_path / "run",
        cache=cache,
        epochs=2,
        batch_size=12,
        learning_rate=1e-2,
        save_steps=5,
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
        data=(f"slake:{task}",), output=output, cache=cache, epochs=14, batch_size=12, learning_rate=1e-2
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
    train(*tiny_model(*bases), changed(settings, max_steps=2))  # longer is allowed


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, content in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (100, '{"glob'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content:
            (folder / "trainer_state.json").write_text(content)
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "checkpoint-10"


class TestLoss:
    @pytest.fixture
    def batch(self, fused: Fused, task: Path) -> dict[str, torch.Tensor]:
        """Rows of several lengths, one without a picture."""
        samples = read(f"slake:{task}", "train")[:5]
        samples.append(Sample(question="no picture, and a longer question than the others?", answer="yes"))
        pictures = LivePictures([], image_processor=fused[1].image_processor, augmentation="none")
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
        assert not (tmp_path / "unused").exists()

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
            train(*fused, changed(settings, data=(*settings.data, f"slake:{tmp_path / 'nowhere'}")))

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
        own = changed(settings, data=(str(tmp_path / "own.jsonl"),), cache=tmp_path / "cache")
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
            train(*fused, changed(settings, data=(str(tmp_path / "own.jsonl"),)))
        assert "1 samples without a picture left out" in capsys.readouterr().out


def test_an_empty_answer_is_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample("a?", "b", (Path("p"),), id="kept"), Sample("a?", "", (Path("p"),), id="slake/1622")]
    assert [sample.id for sample in training._usable("slake", samples, False)] == ["kept"]
    assert "no answer: slake/1622" in capsys.readouterr().out


def test_arguments(settings: TrainingSettings) -> None:
    arguments = training._arguments(settings, settings.output, bf16=True)
    assert arguments.report_to == []
    assert arguments.use_cpu is not torch.cuda.is_available()


def test_tensorboard_only_if_asked(bases: tuple[str, str], settings: TrainingSettings) -> None:
    pytest.importorskip("tensorboard")
    train(*tiny_model(*bases), changed(settings, max_steps=1))
    assert not list(settings.output.rglob("events.out.*"))
    asked = changed(settings, max_steps=1, tensorboard=True, output=settings.output / "asked")
    train(*tiny_model(*bases), asked)
    assert list(asked.output.rglob("events.out.*"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background may ignore SIGINT, and hands that on."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_at_once() -> None:
    with training.CheckpointOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
