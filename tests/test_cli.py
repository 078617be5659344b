"""The command line, every command, on a tiny model and drawn pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal import presets, weights
from multimodal.cli import main
from multimodal.fusion.bases import read_tensors
from multimodal.training import train as training
from multimodal.training.checkpoints import last_checkpoint
from multimodal.training.train import TrainingSettings
from multimodal.training.trainer import FusionTrainer
from multimodal.training.vision_side import VisionSettings
from tests.training.tiny import draw, save_checkpoint, tiny_model, write_task

ROOT = Path(__file__).parent.parent
COMMANDS = (
    *("ask", "train", "adapt", "evaluate", "calibrate", "label", "compare", "advise", "describe", "serve", "models"),
    *("keys", "batch", "plan", "migrate", "pull"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds data/ (the task in SLAKE's layout), fused/ (open gates, untrained), picture.png and, later, trained/."""
    folder = tmp_path_factory.mktemp("cli")
    write_task(folder / "data", train=16, validate=12)
    draw("red", 3).save(folder / "picture.png")
    save_checkpoint(folder)
    return folder


def train_command(folder: Path, output: Path, **changes: Any) -> list[str]:
    options = {
        "data": f"slake:{folder / 'data'}",
        "model": folder / "fused",
        "output": output,
        "cache": folder / "cache",
        "batch-size": 12,
        "learning-rate": 1e-2,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A model that does the task, made by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "VIEWS", {"medical": 3, "shop": 3})
        assert main(train_command(folder, folder / "trained", epochs=14)) == 0
    return folder / "trained"


def rows(printed: str) -> dict[str, list[str]]:
    """The rows of printed tables by their first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells}


class TestAsk:
    def test_prints_the_answer(self, trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["ask", str(folder / "picture.png"), "What colour is this?", "--model", str(trained)]) == 0
        assert capsys.readouterr().out == "red\n"

    def test_json(self, trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["ask", str(folder / "picture.png"), "Is it red?", "--model", str(trained), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["text"] == "yes" and answer["finished"] is True
        assert 0 < answer["confidence"] <= 1
        assert answer["usage"]["images"] == 1 and answer["timings"]["total"] > 0
        assert "gates" not in answer

    def test_trace(self, trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["ask", str(folder / "picture.png"), "What colour is this?", "--model", str(trained), "--json"]
        capsys.readouterr()
        assert main([*command, "--trace", str(tmp_path / "trace.png")]) == 0
        with Image.open(tmp_path / "trace.png") as drawn:
            assert drawn.format == "PNG" and min(drawn.size) > 100
        gates = json.loads(capsys.readouterr().out)["gates"]
        assert "".join(token for token, _ in gates).startswith("red")
        assert all(0 <= openness <= 1 for _, openness in gates)

    def test_length_limit(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["ask", str(folder / "picture.png"), "Is it red?", "--model", str(folder / "fused"), "--json"]
        assert main([*command, "--max-new-tokens", "2"]) == 0
        assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] <= 2


class TestErrors:
    """One line, that says what to do, and 1."""

    def complaint(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        capsys.readouterr()
        assert main(command) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        *_, line = printed.err.strip().splitlines()
        assert line.startswith("multimodal: ") and "Traceback" not in printed.err
        return line

    def test_ask(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        picture = str(folder / "picture.png")
        assert "'nowhere.png' does not exist" in self.complaint(["ask", "nowhere.png", "What?"], capsys)
        assert "no trained model 'nonsense'" in self.complaint(["ask", picture, "?", "--model", "nonsense"], capsys)
        fused = ["--model", str(folder / "fused")]
        assert "the prompt is empty" in self.complaint(["ask", picture, " ", *fused], capsys)
        (tmp_path / "broken.png").write_bytes(b"no picture")
        assert "broken.png" in self.complaint(["ask", str(tmp_path / "broken.png"), "What?"], capsys)

    def test_evaluate(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty.jsonl").touch()
        fused = ["--model", str(folder / "fused")]
        command = ["evaluate", "--data", str(tmp_path / "empty.jsonl"), *fused]
        assert "the split is empty" in self.complaint(command, capsys)
        assert "no reader for this" in self.complaint(["evaluate", "--data", "imagenet:x", *fused], capsys)
        command = ["evaluate", "--data", f"slake:{folder / 'data'}", "--split", "tset", *fused]
        assert "no split 'tset'" in self.complaint(command, capsys)

    def test_pull(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "No weights for 'nonsense'" in self.complaint(["pull", "nonsense"], capsys)

    def test_train(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(train_command(folder, tmp_path, data=f"slake:{tmp_path}")) == 1
        assert "Give the folder that holds train.json" in capsys.readouterr().err
        assert main(train_command(folder, tmp_path, vision_stages=99)) == 1
        assert "this encoder has 3 stages" in capsys.readouterr().err
        assert main(train_command(folder, tmp_path, model="nonsense")) == 1
        assert "no trained model 'nonsense'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words", [["draw"], [], ["ask", "x"], ["ask", "x", "y", "--colour"], ["ask", "x", "y", "--max-new-tokens", "0"]]
    )
    def test_words_that_are_not_known(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert "usage: multimodal" in capsys.readouterr().err

    def test_debug_shows_where_it_comes_from(self) -> None:
        with pytest.raises(ValueError, match="does not exist"):
            main(["--debug", "ask", "nowhere.png", "What?"])


class TestTrain:
    def test_prints_what_is_trained_and_how_to_go_on(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "a run"
        assert main(train_command(folder, output, max_steps=1, cache=output / "cache")) == 0
        printed = capsys.readouterr().out
        table = rows(printed)
        for part, all_of_it in (
            ("vision encoder", False),
            ("resampler", True),
            ("cross-attention", True),
            ("decoder", False),
        ):
            count, trained = table[part]
            assert trained == (count if all_of_it else "0")
        evaluate = f"multimodal evaluate --model '{output}' --data slake:{folder / 'data'}"
        assert f"{evaluate}\n" in printed and f"{evaluate} --shuffle-images\n" in printed

    def test_vision_stages(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = train_command(folder, tmp_path / "run", max_steps=1, vision_stages=1, cache=tmp_path / "unused")
        assert main(command) == 0
        assert int(rows(capsys.readouterr().out)["vision encoder"][1].replace(",", "")) > 0
        assert any("vision_encoder" in name for name in read_tensors(str(tmp_path / "run")))
        assert not list((tmp_path / "unused").glob("*.float16"))

    def test_ctrl_c_says_how_to_go_on(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        original = FusionTrainer.compute_loss

        def compute_loss(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(FusionTrainer, "compute_loss", compute_loss)
        assert main(train_command(folder, tmp_path / "run", max_steps=3)) == 130
        assert "stopped after step 2 of 3: the same command goes on from there" in capsys.readouterr().err
        assert last_checkpoint(tmp_path / "run" / "checkpoints") is not None
        assert not (tmp_path / "run" / "model.safetensors").exists()

    def test_the_seed_fixes_the_new_weights(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bases = str(folder / "text"), str(folder / "vision")
        monkeypatch.setattr(presets, "build", lambda name, **_: tiny_model(*bases, seed=None))

        def run(output: str, seed: int) -> dict[str, torch.Tensor]:
            command = train_command(folder, tmp_path / output, model="embedded", max_steps=1, seed=seed)
            assert main(command) == 0
            return read_tensors(str(tmp_path / output))

        one, same, other = run("one", 5), run("same", 5), run("other", 6)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], TrainingSettings]]:
        """What the command would build and train."""
        found: list[tuple[dict[str, Any], TrainingSettings]] = []
        built: dict[str, Any] = {}
        tiny = tiny_model

        def build(name: str, **options: Any) -> Any:
            built.clear()
            built.update(name=name, **options)
            return tiny(*self.bases, seed=None)

        monkeypatch.setattr(presets, "build", build)
        monkeypatch.setattr(
            training, "train", lambda _model, _processor, settings: found.append((dict(built), settings))
        )
        return found

    @pytest.fixture(autouse=True)
    def know_the_bases(self, folder: Path) -> None:
        self.bases = str(folder / "text"), str(folder / "vision")

    def test_a_recipe_says_it_all(
        self, tmp_path: Path, asked: list[tuple[dict[str, Any], TrainingSettings]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "own.toml").write_text(
            '[passes]\n"slake:a" = 0.5\n[training]\nepochs = 3\nseed = 4\nema = 0.9\n[vision]\nstages = 2\n'
            '[architecture]\ngate = "tanh"'
        )
        words = ["train", "--recipe", str(tmp_path / "own.toml"), "--root", "DATA", "--output", str(tmp_path / "run")]
        assert main(words) == 0
        assert "first the vision side: the encoder's last stages (2) and the resampler" in capsys.readouterr().out
        built, settings = asked.pop()
        assert (built["name"], built["gate"]) == ("embedded", "tanh")
        assert settings == TrainingSettings(
            data={"slake:DATA/a": 0.5},
            output=tmp_path / "run",
            cache=tmp_path / "run" / "features",
            epochs=3,
            seed=4,
            ema=0.9,
            vision=VisionSettings(stages=2, seed=4),
        )

        more = ["--data", "own.jsonl", "--epochs", "1", "--seed", "7", "--gate", "dynamic"]
        more += ["--cross-layers", "1,3", "--latents", "9", "--model", "resnet101-12l"]
        assert main([*words, *more]) == 0
        built, settings = asked.pop()
        assert built["name"] == "resnet101-12l" and built["cross_attention_layers"] == [1, 3]
        assert built["num_latents"] == 9
        assert built["gate"] == "dynamic"  # what the command line says goes before the recipe
        assert settings.data == {"slake:DATA/a": 0.5, "own.jsonl": 1.0}
        assert (settings.epochs, settings.seed, settings.vision) == (1, 7, VisionSettings(stages=2, seed=7))

    def test_every_option_arrives(self, tmp_path: Path, asked: list[tuple[dict[str, Any], TrainingSettings]]) -> None:
        options: dict[str, Any] = {
            "epochs": 1.5,
            "batch_size": 4,
            "learning_rate": 0.1,
            "label_smoothing": 0.2,
            "box_weight": 0.3,
            "lora_rank": 2,
            "validate_steps": 5,
            "patience": 6,
            "validate_limit": 7,
            "ema": 0.8,
            "save_steps": 9,
            "max_steps": 10,
            "seed": 11,
        }
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        words += ["--skip-bad", "--tensorboard", "--data", "a.jsonl", "--output", str(tmp_path), "--cache", "c"]
        assert main(["train", *words]) == 0
        ((_, settings),) = asked
        assert settings == TrainingSettings(
            data={"a.jsonl": 1.0}, output=tmp_path, cache=Path("c"), skip_bad=True, tensorboard=True, **options
        )

    def test_what_does_not_go_together(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--output", str(tmp_path)]) == 1
        assert "nothing to train on: give --data or --recipe" in capsys.readouterr().err
        assert main(train_command(folder, tmp_path, gate="tanh")) == 1
        assert "has its gates and its layers: only a preset takes gate" in capsys.readouterr().err
        assert main(["train", "--recipe", "medicine", "--output", str(tmp_path)]) == 1
        known = "blind, commerce, general, medical, text_only"
        assert f"there is no recipe 'medicine': give {known}" in capsys.readouterr().err

    def test_an_own_file_is_validated_on_pictures_that_are_not_trained_on(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = []
        for number in range(40):
            colour = ("red", "blue")[number % 2]
            draw(colour, number).save(tmp_path / f"{number}.png")
            content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "What colour is this?"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": colour}]
            lines.append(json.dumps({"messages": turns}))
        (tmp_path / "own.jsonl").write_text("\n".join(lines))
        output = tmp_path / "run"
        command = train_command(
            folder, output, data=tmp_path / "own.jsonl", max_steps=4, validate_steps=2, patience=5, ema=0.5
        )
        assert main(command) == 0
        last = last_checkpoint(output / "checkpoints")
        assert last is not None
        log = json.loads((last / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "eval_exact_match" in entry] == [2, 4]
        assert (output / "best" / "config.json").exists()
        assert main(["evaluate", "--model", str(output / "best"), "--data", str(tmp_path / "own.jsonl")]) == 0


class TestEvaluate:
    def test_figures_and_answers(
        self, trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def share(*words: str) -> float:
            capsys.readouterr()
            assert main(["evaluate", "--data", f"slake:{folder / 'data'}", "--model", str(trained), *words]) == 0
            table = rows(capsys.readouterr().out)
            assert [table[name][0] for name in ("all", "OPEN", "CLOSED")] == ["24", "12", "12"]
            return float(table["all"][1].removesuffix(" %"))

        output = tmp_path / "new" / "answers.jsonl"
        right = share("--output", str(output))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(lines) == 24
        assert lines[0].keys() == {"id", "question", "images", "answer", "said", "correct", "confidence"}
        assert right == pytest.approx(100 * sum(line["correct"] for line in lines) / 24, abs=0.1)
        assert right >= 90 and share("--shuffle-images") <= right - 30

    def test_limit(self, trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        command = ["evaluate", "--data", f"slake:{folder / 'data'}", "--model", str(trained), "--limit", "3"]
        assert main(command) == 0
        assert rows(capsys.readouterr().out)["all"][0] == "3"


class TestParts:
    def test_models_lists_what_is_here(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(presets, "ASSETS", tmp_path)
        assert main(["models"]) == 0
        table = rows(capsys.readouterr().out)
        assert table["embedded"][0] == table["resnet101-12l"][0] == "to be trained"
        for part in weights.parts():
            assert table[part.name][0] == part.state and table[part.name][2] == part.licence

        (tmp_path / "embedded").mkdir()
        (tmp_path / "embedded" / "config.json").touch()
        assert main(["models"]) == 0
        assert rows(capsys.readouterr().out)["embedded"][0] == "trained"

    @pytest.mark.parametrize(("words", "names"), [([], None), (["a", "b"], ["a", "b"])])
    def test_pull_fetches_what_is_named(
        self, words: list[str], names: list[str] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[list[str] | None] = []
        monkeypatch.setattr(weights, "pull", asked.append)
        assert main(["pull", *words]) == 0
        assert asked == [names]


class TestInstalled:
    def test_console_script(self) -> None:
        script = shutil.which(
            "multimodal", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        if script is None:
            pytest.skip("the package is not installed here")
        done = subprocess.run([script, "ask", "nowhere.png", "What?"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == "multimodal: file 'nowhere.png' does not exist. Check the path.\n"

    def test_help_needs_no_torch(self) -> None:
        code = (
            "import sys; from multimodal.cli import main\n"
            "try: main(['ask', '--help'])\n"
            "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.stdout.endswith("False False\n")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0 and re.search(rf"\n    {command}\s", capsys.readouterr().out)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: multimodal {command}" in capsys.readouterr().out
