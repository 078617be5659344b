"""Whole runs of ``multimodal train`` in processes of their own, small enough for a test.

They are forked from the test's process, so nothing is imported twice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from multimodal import model
from multimodal.cli import main
from multimodal.training import checkpoints, prefix, question_head, train, vision_side
from tests.training.tiny import save_sequential_encoder, tiny_model, write_task

# Eight steps of each phase.
RECIPE = """
[passes]
"slake:task" = 1.5

[vision]
stages = 2
epochs = 4
batch_size = 8
learning_rate = 2e-3

[training]
epochs = 2
batch_size = 12
learning_rate = 1e-2
save_steps = 2
box_weight = 0.1
ema = 0.9
validate_steps = 3
validate_limit = 8

[views]
medical = 2
"""


def make_folder(folder: Path, text: str) -> Path:
    """Put task/, fused/ (untrained, pictures last) and recipe.toml into a folder."""
    write_task(folder / "task", train=16, validate=12)
    model, processor = tiny_model(text, save_sequential_encoder(folder / "encoder"), images_last=True)
    model.save_pretrained(folder / "fused")
    processor.save_pretrained(folder / "fused")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    options = {
        "--recipe": folder / "recipe.toml",
        "--root": folder,
        "--model": folder / "fused",
        "--output": folder / output,
    }
    return ["train", *(str(word) for pair in options.items() for word in pair), *more]


def make_fast() -> None:
    """A small head, several batches of prefixes, and points of the curve and checkpoints that do not coincide.

    All in float32: where a processor has bfloat16, its rounding hangs on which rows share a product.
    """
    model.fastest_dtype = lambda device: torch.float32
    question_head.WIDTH, vision_side.SAVE_STEPS = 64, 3
    prefix.BATCH_TOKENS = 8
    train.LOGGING_STEPS = vision_side.LOGGING_STEPS = 2
    torch.set_num_threads(1)


def fast_main() -> None:
    """For a fresh interpreter: run the command that its arguments are."""
    make_fast()
    sys.exit(main(sys.argv[1:]))


def run(words: Sequence[str], set_up: Callable[[], None] | None = None, *, processes: int = 1) -> list[int | None]:
    """The exit codes of a command's processes, which train together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def work(rank: int) -> None:
        if processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        make_fast()
        if set_up is not None:
            set_up()
        os._exit(main(words))

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(900)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in started]


def curve(folder: Path) -> list[dict[str, float]]:
    """What is in the log of the last of some checkpoints."""
    last = checkpoints.last_checkpoint(folder)
    assert last is not None
    return json.loads((last / "trainer_state.json").read_text())["log_history"]
