"""Several processes share the steps of one: the order is dealt out, and the curve is that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from multimodal.data import Sample
from multimodal.training import checkpoints
from multimodal.training import train as training
from multimodal.training.collator import IGNORED, EpochOrder, FusionCollator, Source, TrainingSet
from multimodal.training.picture_set import PictureOrder
from multimodal.training.pictures import LivePictures
from multimodal.training.processes import own_share, rows_of_a_process, say, totals
from multimodal.training.trainer import FusionTrainer
from tests.training.runs import command, curve, make_folder, run
from tests.training.tiny import draw

ROOT = Path(__file__).parent.parent.parent


def become(patch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    patch.setenv("RANK", str(rank))
    patch.setenv("WORLD_SIZE", str(world_size))


def rows(count: int) -> Any:
    """What ``EpochOrder`` looks at of a training set."""
    return SimpleNamespace(
        rows=[SimpleNamespace(passes=1.0 if index % 3 else 1.5) for index in range(count)],
        lengths=[(index % 7 + 1, index % 3) for index in range(count)],
    )


def pictures(count: int) -> Any:
    return SimpleNamespace(pictures=[(Path(str(index)), [None] * (index % 9 + 1)) for index in range(count)])


def real(rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that count."""
    return sorted(row for row in rows if row[1] >= 0)


class TestOrder:
    @pytest.mark.parametrize("world_size", [2, 3, 4])
    @pytest.mark.parametrize("count", [24, 25, 31, 50])
    @pytest.mark.parametrize("kind", [EpochOrder, PictureOrder])
    def test_each_step_is_dealt_out(
        self, kind: Any, count: int, world_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = kind(rows(count) if kind is EpochOrder else pictures(count), 12, seed=5)
        order.set_epoch(2)
        whole = list(order)
        assert len(whole) == len(order)
        steps = [whole[start : start + 12] for start in range(0, len(whole), 12)]

        each, dealt = 12 // world_size, []
        for rank in range(world_size):
            become(monkeypatch, rank, world_size)
            own = list(order)
            assert len(own) == len(order)
            dealt.append([own[start : start + each] for start in range(0, len(own), each)])
        assert {len(own) for own in dealt} == {len(steps)}  # or some would wait for the others for ever
        for index, step in enumerate(steps):
            parts = [own[index] for own in dealt]
            assert sorted(step) == real([row for part in parts for row in part])
            assert all(parts)
            if len(step) == 12:
                assert {len(part) for part in parts} == {each}

    def test_who_gets_nothing_takes_a_row_that_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        become(monkeypatch, 3, 4)
        assert own_share([7, 8], lambda row: ~row) == [~7]
        assert own_share([], lambda row: ~row) == []
        become(monkeypatch, 1, 4)
        assert own_share([7, 8, 9, 1, 2, 3], lambda row: ~row) == [8, 3]

    def test_such_a_row_has_no_labels(self, fused: Any, tmp_path: Path) -> None:
        draw("red", 0).save(tmp_path / "a.png")
        sample = Sample("Is it red?", "yes", (tmp_path / "a.png",))
        live = LivePictures({tmp_path / "a.png": "none"}, image_processor=fused[1].image_processor)
        dataset = TrainingSet([Source([sample], live)], fused[1], grid=(4, 4))
        batch = FusionCollator(0)([dataset[0, ~0]])
        expected = FusionCollator(0)([dataset[0, 0]])
        assert (batch.pop("labels") == IGNORED).all() and (expected.pop("labels") != IGNORED).any()
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)

    def test_a_step_that_cannot_be_dealt_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert rows_of_a_process(32) == 32
        become(monkeypatch, 0, 8)
        assert rows_of_a_process(32) == 4
        for batch_size in (4, 30):
            with pytest.raises(
                ValueError, match=rf"{batch_size} rows cannot be dealt out to 8 processes: give a batch"
            ):
                rows_of_a_process(batch_size)

    def test_one_speaks(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        for rank in range(3):
            become(monkeypatch, rank, 3)
            say(f"rank {rank}")
        assert capsys.readouterr().out == "rank 0\n"

    def test_sharded_weights_are_refused(self, fused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Trainer.create_accelerator_and_postprocess

        def with_fsdp(self: Trainer) -> None:
            original(self)
            self.is_fsdp_enabled = True

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
        with pytest.raises(ValueError, match="one process for each GPU with torchrun, without either"):
            FusionTrainer(model=fused[0], args=TrainingArguments(str(tmp_path), use_cpu=True))

    def test_one_process_is_its_own_total(self) -> None:
        assert totals([1, 2.5]) == [1, 2.5]


def assert_near(one: Path, other: Path) -> None:
    """The same curve within 1e-4, and the same decisions."""
    for name in ("vision/checkpoints", "checkpoints"):
        found, expected = curve(one / name), curve(other / name)
        assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
        for key in ("step", "epoch", "learning_rate", "loss", "eval_exact_match"):
            ours, theirs = ([entry[key] for entry in log if key in entry] for log in (found, expected))
            assert ours == pytest.approx(theirs, abs=1e-4), f"{key} of {name}"
    for name in ("vision/vision.safetensors", "model.safetensors"):
        weights, wanted = load_file(one / name), load_file(other / name)
        assert weights.keys() == wanted.keys()
        worst = max((weights[key] - wanted[key]).abs().max().item() for key in weights)
        assert worst < 2e-3, f"{name} differs by {worst:.1e}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bases: tuple[str, str]) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("processes"), bases[0])
    assert run(command(folder, "one")) == [0]
    return folder


def test_two_processes_give_the_curve_of_one(folder: Path) -> None:
    assert run(command(folder, "two"), processes=2) == [0, 0]
    assert_near(folder / "two", folder / "one")
    names = [{path.relative_to(folder / run) for path in (folder / run).rglob("*")} for run in ("one", "two")]
    extra = {str(path) for path in names[1] - names[0]}
    # Features are named by the encoder's weights, whose last bits hang on the number of processes.
    unexpected = {name for name in extra if "rng_state_" not in name and not name.startswith("features/")}
    assert not unexpected  # nothing is written twice under two names


def shards_are_kept() -> None:
    """In a run's process: at its end each layer of the decoder is here by half."""
    original = training.load_trained

    def check(model: Any, file: Path) -> None:
        parameters = list(model.model.language_model.layers.parameters())
        assert parameters and all(isinstance(its, DTensor) for its in parameters)
        held = sum(its.to_local().numel() for its in parameters)
        assert held < 0.6 * sum(its.numel() for its in parameters)
        original(model, file)

    training.load_trained = check


def test_a_decoder_that_is_shared_out_gives_the_curve_of_a_whole_one(folder: Path) -> None:
    plain = unscored(folder)
    assert run(command(folder, "whole", *plain)) == [0]
    sharded = command(folder, "sharded", *plain, "--shard-decoder")
    assert run(sharded, shards_are_kept, processes=2) == [0, 0]
    assert_near(folder / "sharded", folder / "whole")


def unscored(folder: Path) -> list[str]:
    """The words that have no score made on the way."""
    recipe = folder / "unscored.toml"
    recipe.write_text((folder / "recipe.toml").read_text().replace("validate_steps = 3\n", ""))
    return ["--recipe", str(recipe)]


def test_what_cannot_be_shared_out(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = unscored(folder)
    for words, message in (
        (plain, "shares a decoder out between processes: start several with torchrun"),
        ([], "validate_steps: not with shard_decoder"),
        ([*plain, "--lora-rank", "2"], "lora_rank: not with shard_decoder"),
    ):
        assert run(command(folder, "refused", "--shard-decoder", *words)) == [1]
        assert message in capfd.readouterr().err


@pytest.mark.slow
class TestTorchrun:
    """The real launcher."""

    def start(self, folder: Path, output: str, *more: str, restarts: int = 0) -> subprocess.Popen[str]:
        script = folder / "fast.py"
        script.write_text("from tests.training.runs import fast_main; fast_main()")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        launcher += ["--max_restarts", str(restarts)]
        return subprocess.Popen(
            [*launcher, str(script), *command(folder, output, *more)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def test_it_gives_the_curve_of_one(self, folder: Path) -> None:
        process = self.start(folder, "torchrun")
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
        assert printed.count("saved in ") == 1
        assert_near(folder / "torchrun", folder / "one")

    @pytest.mark.parametrize("processes", [1, 2])
    def test_killed_it_goes_on_with_as_many_processes_as_there_are(self, folder: Path, processes: int) -> None:
        output = f"killed {processes}"
        process = self.start(folder, output)
        deadline = time.monotonic() + 300
        while checkpoints.last_checkpoint(folder / output / "checkpoints") is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert run(command(folder, output), processes=processes) == [0] * processes
        assert_near(folder / output, folder / "one")

    def test_a_killed_rank_is_started_again_from_the_last_checkpoint(self, folder: Path) -> None:
        process = self.start(folder, "restarted", restarts=1)
        deadline = time.monotonic() + 300
        while checkpoints.last_checkpoint(folder / "restarted" / "checkpoints") is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0 and "saved in " in printed, printed
        assert_near(folder / "restarted", folder / "one")

    def test_ctrl_c_ends_all_of_them_behind_the_same_step(self, folder: Path) -> None:
        process = self.start(folder, "stopped", "--epochs", "200")
        deadline = time.monotonic() + 300
        while checkpoints.last_checkpoint(folder / "stopped" / "checkpoints") is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode != 0
        assert "the same command goes on from there" in printed

    def test_a_batch_that_cannot_be_dealt_out(self, folder: Path) -> None:
        process = self.start(folder, "odd", "--batch-size", "13")
        printed, _ = process.communicate(timeout=300)
        assert process.returncode != 0
        assert "a step of 13 rows cannot be dealt out to 2 processes" in printed
        assert not (folder / "odd" / "training.json").exists()
