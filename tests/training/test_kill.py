"""A run that is killed again and again, at moments that hurt, ends as if nothing had happened: curve and weights.

Each run is a process of its own, forked from this one so that nothing is imported twice. It kills itself with SIGKILL
at a chosen moment, which leaves on disk what a kill from outside would: no handler runs, nothing is flushed. The slow
test kills from outside, at random times, a command in a fresh interpreter.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.training import checkpoints, features, prefix
from multimodal.training.trainer import FusionTrainer
from multimodal.training.vision_side import VisionTrainer
from tests.training.runs import command, curve, make_folder, run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bases: tuple[str, str]) -> Path:
    return make_folder(tmp_path_factory.mktemp("killed"), bases[0])


def kill_in(
    target: Any,
    name: str,
    call: int = 1,
    then: Callable[..., Any] | None = None,
    only: Callable[..., bool] = lambda *args: True,
) -> Callable[[], None]:
    """A trap: at the n-th call of a function (with arguments that count), do part of what it does, and die."""

    def set_up() -> None:
        original, calls = getattr(target, name), iter(range(1, 10_000))

        def trap(*args: Any, **kwargs: Any) -> Any:
            if only(*args) and next(calls) == call:
                if then is not None:
                    then(original, *args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(target, name, trap)

    return set_up


def half_a_row(_: Any, stream: Any, states: torch.Tensor) -> None:
    content = states.to(torch.float16).numpy().tobytes()
    stream.write(content[: len(content) * 5 // 8])
    stream.flush()


def half_the_state(_: Any, state: TrainerState, path: str) -> None:
    Path(path).write_text(json.dumps(vars(state), default=str)[:200])


def half_the_file(original: Any, tensors: Any, file: Path, *args: Any) -> None:
    original(tensors, file, *args)
    file.write_bytes(file.read_bytes()[:1000])


def one_of_its_files(_: Any, folder: Any, **options: Any) -> None:
    next(Path(folder).glob("*.safetensors")).unlink()


def all_of_it(original: Any, *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)


def assert_alike(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "vision/vision.safetensors", "best/model.safetensors"):
        found, expected = load_file(one / name), load_file(other / name)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == [], name
    for name in ("checkpoints", "vision/checkpoints"):
        assert curve(one / name) == curve(other / name)
    for kind in ("*.float16", "*.names", "*.prefixes", "*.suffixes"):
        files = [{file.name: file.read_bytes() for file in (run / "features").glob(kind)} for run in (one, other)]
        assert files[0] and files[0] == files[1], kind
    assert not list(one.rglob("*.unfinished"))


TRAPS = {
    "half a row of the features is written": kill_in(features, "_write", 3, half_a_row),
    "step 1 of the vision side": kill_in(VisionTrainer, "compute_loss", 1),
    "behind its first checkpoint": kill_in(VisionTrainer, "compute_loss", 5),
    "inside its next one, weights are written": kill_in(VisionTrainer, "_save_optimizer_and_scheduler", 1),
    "its result is half written": kill_in(checkpoints, "save_file", 3, half_the_file),
    "half of the prefixes are computed": kill_in(prefix, "_keys_and_values", 2),
    "between two checkpoints": kill_in(FusionTrainer, "compute_loss", 4),
    "inside one, half of its state is written": kill_in(TrainerState, "save_to_json", 1, half_the_state),
    "the best weights so far are half written": kill_in(checkpoints, "save_file", 1, half_the_file),
    "their average is half written": kill_in(checkpoints, "save_file", 2, half_the_file),
    "just behind a step": kill_in(FusionTrainer, "_maybe_log_save_evaluate"),
    "an older checkpoint is half deleted": kill_in(shutil, "rmtree", 1, one_of_its_files),
    "the result has no processor yet": kill_in(
        FusionForConditionalGeneration,
        "save_pretrained",
        then=all_of_it,
        only=lambda model, folder: Path(folder).name == "killed",
    ),
}


def test_killed_at_every_turn(folder: Path) -> None:
    assert run(command(folder, "whole")) == [0]
    for moment, trap in TRAPS.items():
        assert run(command(folder, "killed"), trap) == [-signal.SIGKILL], f"it was not killed: {moment}"
        assert not (folder / "killed" / "tokenizer.json").exists()
    assert run(command(folder, "killed")) == [0]
    assert_alike(folder / "killed", folder / "whole")
    points = [entry["step"] for entry in curve(folder / "whole" / "checkpoints") if "loss" in entry]
    assert points == [2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(folder: Path, seed: int) -> None:
    """From outside, at any moment, until it is through."""
    chance, output = random.Random(seed), f"random {seed}"
    words = [sys.executable, "-c", "from tests.training.runs import fast_main; fast_main()", *command(folder, output)]
    if not (folder / "whole").exists():
        assert run(command(folder, "whole")) == [0]
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while not (folder / output / "training.json").exists() and process.poll() is None and kills > 20:
            time.sleep(0.01)  # enough of the kills before the first step
        delay = chance.expovariate(1 / 6)
        while process.poll() is None and time.monotonic() < started + 2 + delay:
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    else:
        assert run(command(folder, output)) == [0]
    assert kills
    assert_alike(folder / output, folder / "whole")
