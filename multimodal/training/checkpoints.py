"""Checkpoints of ``Trainer``: which one is whole, how a person's Ctrl-C makes one, and what else one must hold.

What always holds: a process may be killed between any two bytes that it writes. A file that stands for something that
is finished is written beside its place and then moved there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.training.processes import loading_processes, totals, world_size

STATE = "trainer_state.json"
LOSS_SO_FAR = "loss_so_far.json"
LOGGING_STEPS = 20  # steps between two points of a curve


class CheckpointOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends training behind the current step, with a checkpoint; a second one ends it at once.

    Use as a context manager around ``Trainer.train``, in the main thread (elsewhere Python allows no handler).
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> CheckpointOnInterrupt:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.__exit__(None, None, None)
        os.write(2, b"\nstopping: a checkpoint comes first (once more, and it ends without one)\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any of the processes was asked to: all must stop behind the same step."""
        (asked,) = totals([self.asked], args.device)
        if asked:
            self.asked = control.should_save = control.should_training_stop = True


class ResumableTrainer(Trainer):
    """``Trainer`` whose loss curve, too, is that of an uninterrupted run, and whose order knows of all processes.

    Args:
        **options: Of ``Trainer``.

    Raises:
        ValueError: If weights would be sharded.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed shard weights that are trained, of which a fused model has few, and a checkpoint "
                "holds whole ones: start one process for each GPU with torchrun, without either; --shard-decoder "
                "shares out a frozen decoder"
            )
        in_a_notebook = DEFAULT_PROGRESS_CALLBACK is not ProgressCallback
        if in_a_notebook and not self.args.disable_tqdm:  # its bar fails where training stops early
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(ProgressCallback)
        self._gone_on_from: Path | None = None
        self.add_callback(_GoOn(self))

    def loader_of(self, order: Sampler | None) -> DataLoader:
        """Batches of this process. The order, or a stream without one, has dealt out the rows, so nothing else may."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            sampler=order,
            collate_fn=self.data_collator,
            num_workers=loading_processes(),
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def steps_left(self, checkpoint: Path) -> int:
        """How many steps are left behind a checkpoint: where none is, ``Trainer`` would make one too many."""
        total = self.args.max_steps
        if total <= 0:
            total = math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))
        return total - TrainerState.load_from_json(str(checkpoint / STATE)).global_step

    def go_on(self, checkpoint: Path | None) -> None:
        """Take over what a checkpoint has beside what ``Trainer`` reads; None where training begins.

        The curve has means over several steps: a run that goes on between two of its points begins with what it had.
        """
        if checkpoint is not None and (checkpoint / LOSS_SO_FAR).is_file():
            content = json.loads((checkpoint / LOSS_SO_FAR).read_text())
            self._tr_loss += content["loss"]
            self._globalstep_last_logged = content["since"]

    def save_beside(self, checkpoint: Path, loss_so_far: float) -> None:
        """Write what :meth:`go_on` reads; only one process is asked to."""
        content = {"loss": loss_so_far, "since": self._globalstep_last_logged}
        (checkpoint / LOSS_SO_FAR).write_text(json.dumps(content))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # what is written next, and last, is the state
        (loss,) = totals([self._tr_loss.item() / world_size()], self.args.device)
        if self.args.should_save:
            self.save_beside(Path(output_dir), loss)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        self._gone_on_from = Path(resume_from_checkpoint)


class _GoOn(TrainerCallback):
    """Has the trainer go on when everything is where it belongs."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Behind ``Trainer``'s own preparations."""
        self.trainer.go_on(self.trainer._gone_on_from)


def write_text(file: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(file)
    beside.write_text(text)
    beside.replace(file)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(file)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, beside, metadata)
    beside.replace(file)


def _beside(file: Path) -> Path:
    for left in file.parent.glob(f"{file.name}.*.unfinished"):  # by a process that was killed: only one writes
        left.unlink()
    return file.with_name(f"{file.name}.{os.getpid()}.unfinished")


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained of a model, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, file: Path) -> None:
    """Write what is trained of a model into a safetensors file."""
    save_tensors(trained_tensors(model), file)


def load_trained(model: nn.Module, file: Path) -> None:
    """Fill in what is trained from a checkpoint's file.

    ``Trainer`` would load it too, but take the frozen parts, which a checkpoint leaves out, for lost ones and warn of
    them, and do no more than warn where a trained part is missing.

    Raises:
        KeyError: If a trained part is not in it.
    """
    stored = load_file(file)
    with torch.no_grad():
        for name, parameter in trained_tensors(model).items():
            parameter.copy_(stored[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = sorted(_checkpoints(folder), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_complete(path)), None)


def remove_incomplete(folder: Path) -> None:
    """Delete checkpoints that were cut short: ``Trainer`` counts them when it deletes older ones, which are whole."""
    for path in _checkpoints(folder):
        if not _is_complete(path):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir()]


def _is_complete(checkpoint: Path) -> bool:
    """``Trainer`` writes its state last: a checkpoint that was cut short has none, or half of one."""
    try:
        TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, ValueError):
        return False
    return True
