"""Early stopping by what counts: exact match of greedy answers, not the loss.

Every so many steps some validation questions are answered. What scored best is kept on disk and taken at the end; where
nothing was gained for long, training stops. What always holds: all that this decides follows from the log that a
checkpoint has, and the best weights lie in the checkpoint, too, so a run that goes on decides what an uninterrupted one
would have.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.data import DataError, Sample, exact_match, read, splits_of
from multimodal.data.held_out import split_held_out
from multimodal.data.sources import WHOLE
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.model import MultiModalModel
from multimodal.training.answering import PictureFeatures, answer_all
from multimodal.training.averaging import MovingAverage, filled_in
from multimodal.training.checkpoints import ResumableTrainer, save_trained
from multimodal.training.processes import is_main, rank, totals, world_size

SCORE = "eval_exact_match"
BEST = "best.safetensors"
OWN_SHARE = 0.1  # of the pictures of a user's own file: they are asked about here, and not trained on
LONGEST = 24  # tokens; longer answers are texts, of which hardly one is generated word for word


def split_own(samples: Sequence[Sample], held_out: float) -> tuple[list[Sample], list[Sample]]:
    """Of a user's own file: what to train on, and a tenth by picture to validate on.

    Args:
        samples: Without those whose picture is held out for calibration.
        held_out: The share of the pictures that are: the tenth lies beside it.
    """
    return split_held_out(samples, held_out + OWN_SHARE)


def read_validation(names: Iterable[str], *, skip_bad: list[DataError] | None = None) -> dict[str, list[Sample]]:
    """The validation splits of those data sets that have one. A user's own file has none."""
    return {
        name: read(name, "validation", skip_bad=skip_bad)
        for name in names
        if "validation" in splits_of(name) and WHOLE not in splits_of(name)
    }


def choose_questions(
    splits: Mapping[str, Sequence[Sample]], tokenizer: Any, *, limit: int, seed: int
) -> dict[str, list[Sample]]:
    """Some questions with short answers, as many of each data set as far as it has them.

    Args:
        splits: Validation samples by data set.
        tokenizer: Counts an answer's tokens.
        limit: How many in all.
        seed: Of the choice.

    Raises:
        ValueError: If there is none.
    """
    short = {}
    for name, samples in splits.items():
        counts = [len(ids) for ids in tokenizer([s.answer for s in samples])["input_ids"]] if samples else []
        fitting = [s for s, count in zip(samples, counts, strict=True) if s.answer and count <= LONGEST]
        if fitting:
            short[name] = fitting
    if not short:
        raise ValueError(
            "--validate-steps: no data set has a validation split with short answers, and no own file enough pictures "
            "for a tenth of them: leave it out"
        )
    chosen, left = {}, limit
    for place, name in enumerate(sorted(short, key=lambda name: (len(short[name]), name))):
        count = min(len(short[name]), left // (len(short) - place))
        left -= count
        places = random.Random(f"validation/{seed}/{name}").sample(range(len(short[name])), count)
        chosen[name] = [short[name][index] for index in sorted(places)]
    return {name: chosen[name] for name in splits if chosen.get(name)}


class Validation(TrainerCallback):
    """Answers the questions, keeps the best weights, stops where nothing is gained.

    Args:
        trainer: It logs the scores.
        processor: The fused model's processor.
        questions: By data set.
        every: Steps between two scores; the last step is scored, too.
        patience: Stop after so many scores that are not better than the best before them; 0 for never.
        output: The run's folder: the best model is in ``best`` there.
        average: Score and keep this instead of the last step's weights.
    """

    def __init__(
        self,
        trainer: ResumableTrainer,
        processor: FusionProcessor,
        questions: Mapping[str, Sequence[Sample]],
        *,
        every: int,
        patience: int,
        output: Path,
        average: MovingAverage | None,
    ) -> None:
        self.trainer, self.processor, self.questions = trainer, processor, questions
        self.every, self.patience, self.output, self.average = every, patience, output, average
        self.best = output / "checkpoints" / BEST
        self._pictures: PictureFeatures | None = None

    @property
    def model(self) -> FusionForConditionalGeneration:
        """The model that is trained, without what may be wrapped around it."""
        return self.trainer.model

    def begin(self, checkpoint: Path | None) -> None:
        """Forget what was best behind the checkpoint that the run goes on from."""
        if not is_main():
            return
        self.best.unlink(missing_ok=True)
        if checkpoint is not None and (checkpoint / BEST).exists():
            _link(checkpoint / BEST, self.best)
            with filled_in(self.model, load_file(self.best)):
                self._write_best()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Score, keep, stop."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        with filled_in(self.model, None if self.average is None else self.average.tensors):
            due = control.should_log
            self.trainer.log(self._scores())
            control.should_log = due  # a point of the loss at this step comes behind it
            if best_step(state.log_history) == state.global_step and is_main():
                save_trained(self.model, self.best)
                self._write_best()
        if has_stalled(state.log_history, self.patience):
            control.should_save = control.should_training_stop = True

    def save(self, checkpoint: Path) -> None:
        """Put what is best so far into a checkpoint's folder."""
        if self.best.exists():
            _link(self.best, checkpoint / BEST)

    def _write_best(self) -> None:
        if getattr(self.model, "_hf_peft_config_loaded", False):  # LoRA is no part of the decoder yet
            save_trained(self.model, self.output / "best" / SAFE_WEIGHTS_NAME)
            return
        self.model.save_pretrained(self.output / "best")
        self.processor.save_pretrained(self.output / "best")

    def _scores(self) -> dict[str, float]:
        model = MultiModalModel(self.model.eval(), self.processor)
        encoder = self.model.model.vision_encoder
        if self._pictures is None or any(parameter.requires_grad for parameter in encoder.parameters()):
            self._pictures = PictureFeatures(model)
        right: list[float] = []
        for samples in self.questions.values():
            own = samples[rank() :: world_size()]
            found = 0
            with self.trainer.compute_loss_context_manager():
                for batch in answer_all(model, own, pictures=self._pictures, progress=False):
                    said = zip(batch.places, batch.texts, strict=True)
                    found += sum(exact_match(text, own[place].answer) for place, text in said)
            right.append(found)
        right = totals(right, self.trainer.args.device)
        counts = [len(samples) for samples in self.questions.values()]
        shares = {
            f"{SCORE}_{_short(name)}": found / count
            for name, found, count in zip(self.questions, right, counts, strict=True)
        }
        return {SCORE: sum(right) / sum(counts), **(shares if len(shares) > 1 else {})}


def best_step(log: Sequence[Mapping[str, float]]) -> int | None:
    """The step with the best score, the first of equals; None where none was scored."""
    scored = [entry for entry in log if SCORE in entry]
    return int(max(scored, key=lambda entry: entry[SCORE])["step"]) if scored else None


def has_stalled(log: Sequence[Mapping[str, float]], patience: int) -> bool:
    """Whether the last so many scores brought nothing; never for a patience of 0."""
    steps = [int(entry["step"]) for entry in log if SCORE in entry]
    best = best_step(log)
    return best is not None and 0 < patience <= len(steps) - 1 - steps.index(best)


def _short(name: str) -> str:
    """A data set's name without its folder."""
    reader, colon, _ = name.partition(":")
    return reader if colon else Path(name).stem


def _link(source: Path, target: Path) -> None:
    """The same file in a second place; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
