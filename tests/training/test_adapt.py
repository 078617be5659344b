"""Adaptation: an adapter is made from few examples, saved, stopped and gone on with, loaded, and refused elsewhere."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multimodal import cli
from multimodal.adapters import BASE, AdapterError
from multimodal.data import Sample, read_csv
from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.low_rank import CONFIG, WEIGHTS
from multimodal.model import MultiModalModel
from multimodal.training import adapt as adapting
from multimodal.training.adapt import AdaptReport, AdaptSettings, adapt
from multimodal.training.trainer import FusionTrainer
from tests.fusion.tiny import assert_close, assert_differs, assert_same, open_gates
from tests.training.tiny import COLOURS, draw, encode, tiny_model

QUESTION = "What colour is this?"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty drawn pictures and their colours."""
    folder = tmp_path_factory.mktemp("own")
    with (folder / "own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer"])
        for number in range(40):
            colour = list(COLOURS)[number % 4]
            draw(colour, number).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", QUESTION, colour])
    return folder / "own.csv"


@pytest.fixture(scope="module")
def examples(table: Path) -> list[Sample]:
    return read_csv(table)


@pytest.fixture(scope="module")
def checkpoint(bases: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model, processor = tiny_model(*bases)
    open_gates(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "LEAST_STEPS", 8)
        patch.setattr(adapting, "PASSES", 2)
        patch.setattr(adapting, "SAVE_STEPS", 3)
        patch.setattr(adapting, "MOST_VIEWS", 2)
        yield


def load(checkpoint: Path) -> MultiModalModel:
    return MultiModalModel.from_pretrained(checkpoint, dtype=torch.float32)


def logits(model: MultiModalModel) -> torch.Tensor:
    inputs = encode(model, [[{"role": "user", "content": [{"type": "image", "image": draw("red", 99)}]}]])
    with torch.no_grad():
        return model.model(**inputs).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.fixture(scope="module")
def adapted(
    checkpoint: Path, examples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> tuple[MultiModalModel, AdaptReport, torch.Tensor]:
    """A model with its adapter after a few dozen steps, the report, and the logits before."""
    model = load(checkpoint)
    before = logits(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "PASSES", 30)
        patch.setattr(adapting, "LEARNING_RATE", 1e-2)
        patch.setattr(adapting, "RANK", 16)
        report = adapt(model, examples, AdaptSettings(tmp_path_factory.mktemp("out") / "colours", augment="shop"))
    return model, report, before


class TestAdapting:
    def test_it_learns_and_says_what_that_shows(self, adapted: Any) -> None:
        _, report, _ = adapted
        assert (report.examples, report.score.total, report.answers) == (32, 8, 4)
        assert report.score.before <= 2 and report.score.after >= 7, str(report)
        assert report.score.verdict == "better"
        assert report.steps == report.plan.steps == 60
        text = str(report)
        assert "95 % interval" in text and "McNemar" in text and "32 examples with 4 different answers" in text
        assert AdaptReport.read(report.folder) == report

    def test_the_folder_holds_an_adapter_and_nothing_else(self, adapted: Any) -> None:
        _, report, _ = adapted
        names = {file.name for file in report.folder.iterdir()}
        assert names == {CONFIG, WEIGHTS, BASE, "report.json", "run.json"}
        assert json.loads((report.folder / BASE).read_text())["name"] == "tiny"
        assert "/" not in (report.folder / CONFIG).read_text(), "no path of this machine"

    def test_it_is_switched_on_and_off(self, adapted: Any) -> None:
        model, _, before = adapted
        assert model.adapters == ["colours"] and model.adapter == "colours"
        assert_differs(logits(model), before)
        model.set_adapter(None)
        assert_same(logits(model), before, "without it, bit for bit")
        answer = model(QUESTION, draw("green", 77), adapter="colours", max_new_tokens=4)
        assert answer.text == "green"
        assert_same(logits(model), before, "an answer's own adapter is for that answer")
        model.set_adapter("colours")
        assert not [name for name, p in model.model.named_parameters() if p.requires_grad and "lora" in name]

    def test_loaded_into_another_it_gives_the_same(self, adapted: Any, checkpoint: Path) -> None:
        model, report, before = adapted
        model.set_adapter("colours")
        other = load(checkpoint)
        trained = {name for name, p in other.model.named_parameters() if p.requires_grad}
        assert other.load_adapter(report.folder) == "colours"
        assert_same(logits(other), before, "loaded, but not chosen")
        other.set_adapter("colours")
        assert_close(logits(other), logits(model), limit=1e-6)
        assert other.load_adapter(report.folder, "again") == "again"
        assert other.adapters == ["colours", "again"]
        other.set_adapter("again")
        assert_close(logits(other), logits(model), limit=1e-6)
        now = {name.replace(".base_layer", "") for name, p in other.model.named_parameters() if p.requires_grad}
        assert now == trained, "what would be trained is as before"

    def test_peft_itself_can_load_it(self, adapted: Any, checkpoint: Path) -> None:
        from peft import PeftModel

        model, report, _ = adapted
        model.set_adapter("colours")
        other = load(checkpoint)
        tuned = PeftModel.from_pretrained(other.model, report.folder)
        inputs = encode(model, [[{"role": "user", "content": [{"type": "image", "image": draw("red", 99)}]}]])
        with torch.no_grad():
            assert_close(tuned(**inputs).logits, logits(model), limit=1e-6)

    def test_an_interrupted_run_ends_with_the_same_adapter(
        self, checkpoint: Path, examples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(folder: str) -> AdaptReport:
            return adapt(load(checkpoint), examples, AdaptSettings(tmp_path / folder))

        whole = run("whole")
        original, calls = FusionTrainer.compute_loss, iter(range(1, 100))

        def compute_loss(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == adapting.TIMED_STEPS + 4:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=r"after step 4 of 8: the same"):
            patch.setattr(FusionTrainer, "compute_loss", compute_loss)
            run("stopped")
        monkeypatch.setattr(adapting, "predict", _only_once(adapting.predict))  # what was right before is known
        resumed = run("stopped")
        for name, tensor in weights(whole.folder).items():
            assert_same(weights(resumed.folder)[name], tensor, name)
        assert resumed.score == whole.score
        again = run("stopped")
        assert again == resumed, "a finished one is left alone"

    def test_the_clock_stops_it(
        self, checkpoint: Path, examples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(adapting.Clock, "on_step_end", _stop_after(3))
        report = adapt(load(checkpoint), examples, AdaptSettings(tmp_path / "late"))
        assert report.steps == 3 and "stopped by the clock before 8" in str(report)
        assert weights(report.folder)

    def test_the_model_is_as_before_when_it_fails(
        self, checkpoint: Path, examples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(checkpoint)
        before = logits(model)
        names, trained = list(model.model.state_dict()), [p.requires_grad for p in model.model.parameters()]

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("out of steam")

        monkeypatch.setattr(FusionTrainer, "compute_loss", fail)
        with pytest.raises(RuntimeError, match="out of steam"):
            adapt(model, examples, AdaptSettings(tmp_path / "failed"))
        assert list(model.model.state_dict()) == names and model.adapters == [] and not model.model.training
        assert [p.requires_grad for p in model.model.parameters()] == trained
        assert_same(logits(model), before)


def _only_once(predict: Any) -> Any:
    calls: list[int] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        assert len(calls) == 1
        return predict(*args, **kwargs)

    return once


def _stop_after(steps: int) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= steps

    return on_step_end


class TestWhatIsToldFirst:
    def test_too_few(self, checkpoint: Path, examples: list[Sample], tmp_path: Path) -> None:
        blind = [Sample(QUESTION, "red") for _ in range(20)]
        with pytest.raises(ValueError, match=r"9 examples are too few"):
            adapt(load(checkpoint), [*examples[:9], *blind], AdaptSettings(tmp_path / "few"))
        assert not (tmp_path / "few").exists()

    def test_too_little_time(self, checkpoint: Path, examples: list[Sample], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"minutes are too few: a pass over 32 examples takes"):
            adapt(load(checkpoint), examples, AdaptSettings(tmp_path / "short", minutes=1e-6))

    def test_a_folder_that_holds_something_else(
        self, adapted: Any, checkpoint: Path, examples: list[Sample], tmp_path: Path
    ) -> None:
        (tmp_path / "photo.jpg").write_bytes(b"")
        with pytest.raises(ValueError, match=r"holds something else: give another"):
            adapt(load(checkpoint), examples, AdaptSettings(tmp_path))
        with pytest.raises(ValueError, match=r"differs \(examples, augment, seed\): give another"):
            adapt(load(checkpoint), examples[:20], AdaptSettings(adapted[1].folder, seed=1))

    def test_peft_is_missing(
        self, adapted: Any, checkpoint: Path, examples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("peft", "peft.tuners", "peft.tuners.tuners_utils"):
            monkeypatch.setitem(__import__("sys").modules, name, None)
        for use in (
            lambda: load(checkpoint).load_adapter(adapted[1].folder),
            lambda: adapt(load(checkpoint), examples, AdaptSettings(tmp_path / "without")),
        ):
            with pytest.raises(AdapterError, match=r"pip install 'multimodal\[train\]'"):
                use()
        assert load(checkpoint)("Is it red?", draw("red", 1), max_new_tokens=2).tokens, "everything else works"


class TestRefused:
    def test_made_for_another_model(self, adapted: Any, bases: tuple[str, str]) -> None:
        other = MultiModalModel(*tiny_model(*bases, seed=7), name="other")
        with pytest.raises(AdapterError, match=r"made for the model 'tiny' \(\w{8}\), and this is 'other' \(\w{8}\)"):
            other.load_adapter(adapted[1].folder)
        assert other.adapters == []

    def test_the_same_model_in_bfloat16(self, adapted: Any, checkpoint: Path) -> None:
        """Numbers that bfloat16 holds are the same in float32."""
        model = load(checkpoint)
        model.model.to(torch.bfloat16)
        half = MultiModalModel(model.model, model.processor)
        half.load_adapter(adapted[1].folder)
        half.set_adapter("colours")
        assert logits(half).dtype == torch.bfloat16

    def test_another_size(self, adapted: Any, checkpoint: Path, tmp_path: Path) -> None:
        folder = _copy(adapted[1].folder, tmp_path / "copy")
        config = json.loads((folder / CONFIG).read_text())
        tensors = {
            name: tensor[:, :5] if name.endswith("A.weight") else tensor for name, tensor in weights(folder).items()
        }
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        model = load(checkpoint)
        with pytest.raises(AdapterError, match=r"adds \(\d+, 5\) to model\.\S+, and the model has one of"):
            model.load_adapter(folder)
        (folder / CONFIG).write_text(json.dumps({**config, "peft_type": "IA3"}))
        with pytest.raises(AdapterError, match="IA3"):
            model.load_adapter(folder)
        assert model.adapters == [] and not hasattr(model.model, "peft_config")

    def test_no_adapter_there_and_no_pickle_read(self, adapted: Any, checkpoint: Path, tmp_path: Path) -> None:
        model = load(checkpoint)
        with pytest.raises(AdapterError, match=r"holds no adapter \(adapter_config\.json is missing\)"):
            model.load_adapter(tmp_path)
        folder = _copy(adapted[1].folder, tmp_path / "copy")
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
            model.load_adapter(folder)

    def test_names(self, adapted: Any, checkpoint: Path) -> None:
        model = load(checkpoint)
        model.load_adapter(adapted[1].folder, "v1.0 of mine")
        with pytest.raises(AdapterError, match=r"called 'v1\.0 of mine' is loaded already"):
            model.load_adapter(adapted[1].folder, "v1.0 of mine")
        with pytest.raises(AdapterError, match=r"no adapter is called 'yours': use v1\.0 of mine, None"):
            model.set_adapter("yours")
        with pytest.raises(AdapterError, match="yours"):
            model.stream("Is it red?", adapter="yours")


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_the_command(
    checkpoint: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["adapt", str(table), "--model", str(checkpoint), "--limit", "24", "--augment", "shop"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "24 of 40 examples, drawn evenly over 4 answers" in said
    assert "before:" in said and "after:" in said and "own-adapter" in said
    assert (tmp_path / "own-adapter" / WEIGHTS).exists()
    assert cli.main([*arguments, "--seed", "1"]) == 1
    assert "differs" in capsys.readouterr().err

    def answers(*options: str) -> str:
        output = tmp_path / "answers.jsonl"
        questions = ["--data", str(table), "--split", "all", "--model", str(checkpoint), "--output", str(output)]
        assert cli.main(["evaluate", *questions, *options]) == 0
        return output.read_text()

    assert answers("--adapter", "own-adapter") != answers()
    picture = next(table.parent.rglob("*.png"))
    assert cli.main(["ask", str(picture), QUESTION, "--model", str(checkpoint), "--adapter", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["ask", str(picture), QUESTION, "--model", str(checkpoint), "--adapter", "own-adapter"]) == 0
    assert capsys.readouterr().out


def test_a_fused_model_of_a_checkpoint_with_an_adapter_saves_as_before(adapted: Any, tmp_path: Path) -> None:
    """``digest_of`` tells models apart by what they are, not by what is attached."""
    from multimodal.adapters import digest_of

    model, report, _ = adapted
    assert digest_of(model.model) == json.loads((report.folder / BASE).read_text())["digest"]
    assert isinstance(model.model, FusionForConditionalGeneration)
