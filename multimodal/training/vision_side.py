"""The vision side learns first: encoder and resampler, from questions, with a light head in the decoder's place.

Through the decoder a question costs tens of milliseconds; through this head it costs a fraction of one, so pictures are
seen many times in minutes, each with several of its questions at once. The head reads the question with a small
recurrent network, attends over the region tokens and picks one of the training answers; where a sample says where to
look (``Sample.boxes``), its attention is drawn there. Where all that a picture shows has a box (``detection.json``
beside it), a linear map from the encoder's features also says for each grid cell what lies there. Afterwards head and
map are thrown away and the vision side is frozen: the cross-attention blocks then learn to read region tokens that
already tell pictures apart. It knows nothing of the decoder. What always holds: which pictures stand in a step, how
they are seen and what dropout takes away follow from the seed alone, so a run that goes on after an interruption, or on
several processes, gives the same curve.

Axes: N pictures, Q questions about them, T words of a question, R grid cells, L region tokens, D width, A answers,
H heads, B labels of boxes.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from multimodal.data import Box, Sample, normalise_answer
from multimodal.data.boxes import read_boxes
from multimodal.fusion import FusionForConditionalGeneration, RegionResampler, VisionEncoder
from multimodal.fusion.vision import as_grid
from multimodal.training.augmentation import View, box_target, covered_cells
from multimodal.training.checkpoints import (
    LOGGING_STEPS,
    CheckpointOnInterrupt,
    ResumableTrainer,
    last_checkpoint,
    load_trained,
    remove_incomplete,
    save_trained,
    write_text,
)
from multimodal.training.pictures import Pictures
from multimodal.training.processes import is_main, own_share, rows_of_a_process, totals, wait_for_all, world_size

SAVE_STEPS = 250
QUESTIONS = 8  # of a picture, in one step
WIDTH = 512  # of the head
HEADS = 8
DROPOUT = 0.2
BOX_WEIGHT = 0.2  # of the loss that draws the head's attention into the box
LAYOUT_WEIGHT = 0.2  # of the loss of what lies in each grid cell
UNKNOWN = -1  # an answer that training did not have
LONGEST_ANSWER = 40  # letters: longer ones are texts, not classes
WORD = re.compile(r"[a-z0-9]+|[^\W\d_a-z]")  # a word, or one letter of another script: Chinese needs no more


@dataclass(frozen=True)
class VisionSettings:
    """How the vision side is trained.

    Attributes:
        stages: Last stages of the encoder that learn.
        epochs: Passes over the pictures (one with many questions comes several times in each).
        batch_size: Pictures in a step.
        learning_rate: Of resampler and head: a peak, reached after 5 % of the steps, then a cosine to zero.
        encoder_learning_rate: Of the encoder, likewise.
        label_smoothing: Of the answers.
        seed: Of everything random.
    """

    stages: int = 1
    epochs: float = 4
    batch_size: int = 16
    learning_rate: float = 6e-4
    encoder_learning_rate: float = 3e-4
    label_smoothing: float = 0.05
    seed: int = 0


class RowDropout(nn.Module):
    """Dropout whose mask follows from a number of each row, not from the state of a random number generator.

    Args:
        place: Tells the masks of one row in several places apart.
    """

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Drop.

        Args:
            states: ``(Q, ...)``; what lies behind the first axis is counted from its beginning, so padding at the end
                changes nothing.
            rows: ``(Q,)``, the number of each row; in evaluation not needed.
        """
        if not self.training or rows is None:
            return states
        cells = torch.arange(states[0].numel(), device=states.device)
        bits = _mixed(_mixed(rows + self.place)[:, None] + cells)  # (Q, cells)
        kept = (bits & 0xFFFFFF) >= DROPOUT * 2**24
        return states * kept.view_as(states) / (1 - DROPOUT)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Random bits that follow from a number: the mixing of splitmix64 (Steele et al., 2014, figure 15)."""
    numbers = numbers * -7046029254386353131  # the golden ratio, as an odd number of 64 bits
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


class QuestionHead(nn.Module):
    """Question and region tokens to answer logits: attention by the question, then a classifier.

    Args:
        num_words: Size of the vocabulary of the questions.
        hidden_size: Width of the region tokens.
        num_answers: ``A``.
    """

    def __init__(self, *, num_words: int, hidden_size: int, num_answers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, WIDTH // 2)
        self.reader = nn.GRU(WIDTH // 2, WIDTH // 2, batch_first=True, bidirectional=True)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(hidden_size, WIDTH)
        self.value = nn.Linear(hidden_size, WIDTH)
        self.seen_norm = nn.LayerNorm(2 * WIDTH)
        self.seen_proj = nn.Linear(2 * WIDTH, WIDTH)
        self.question_proj = nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.Linear(2 * WIDTH, WIDTH)
        self.word_dropout, self.seen_dropout, self.hidden_dropout = RowDropout(1), RowDropout(2), RowDropout(3)
        self.classifier = nn.Linear(WIDTH, num_answers)

    def forward(
        self,
        regions: torch.Tensor,
        questions: torch.Tensor,
        of_picture: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer.

        Args:
            regions: ``(N, L, D)``, region tokens.
            questions: ``(Q, T)``, numbers of words, 0 behind the end.
            of_picture: ``(Q,)``, which picture each is about.
            rows: ``(Q,)``, for dropout.

        Returns:
            Logits ``(Q, A)`` and attention over the region tokens ``(Q, L)``, mean of the heads.
        """
        lengths = (questions != 0).sum(-1).clamp_min(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.word_dropout(self.words(questions), rows), lengths, batch_first=True, enforce_sorted=False
        )
        question = self.reader(packed)[1].transpose(0, 1).flatten(1)  # (Q, WIDTH)

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (., H, ., WIDTH/H)

        queries = heads(self.query(question)[:, None])  # (Q, H, 1, WIDTH/H)
        values = self.value(regions)  # (N, L, WIDTH)
        scores = queries @ heads(self.key(regions))[of_picture].transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        weights = scores.softmax(-1)  # (Q, H, 1, L)
        found = (weights @ heads(values)[of_picture]).flatten(1)  # (Q, WIDTH)
        seen = self.seen_norm(torch.cat([found, values.mean(1)[of_picture]], -1))
        seen = self.seen_proj(self.seen_dropout(seen, rows))  # (Q, WIDTH)
        asked = self.question_proj(question)
        hidden = functional.gelu(self.hidden(torch.cat([seen * asked, seen + asked], -1)))
        return self.classifier(self.hidden_dropout(hidden, rows)), weights.mean(1).squeeze(1)


class VisionSide(nn.Module):
    """Open stages of the encoder, resampler, head, and the map of what lies where, as one model.

    Args:
        encoder: The encoder.
        resampler: The resampler.
        head: The head.
        settings: How they are trained.
        num_labels: ``B``, how many things have boxes.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        resampler: RegionResampler,
        head: QuestionHead,
        settings: VisionSettings,
        *,
        num_labels: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.resampler, self.head, self.settings = encoder, resampler, head, settings
        self.layout = nn.Linear(encoder.config.hidden_size, num_labels) if num_labels else None
        if self.layout is not None:
            nn.init.zeros_(self.layout.weight)
            nn.init.constant_(self.layout.bias, -4.0)  # most cells hold few of the things: start from a share of 2 %
        self.start = len(encoder.stages()) - settings.stages

    def forward(
        self,
        states: torch.Tensor,
        questions: torch.Tensor,
        of_picture: torch.Tensor,
        answers: torch.Tensor,
        targets: torch.Tensor,
        rows: torch.Tensor | None = None,
        layouts: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses, each summed over its questions or pictures, the weight of the answers, and logits.

        Args:
            states: ``(N, D, rows, columns)``, the input of the first open stage.
            questions: As for the head.
            of_picture: Likewise.
            answers: ``(Q,)``.
            targets: ``(Q, R)``, where to look: sums to 1, or 0 where nobody knows.
            rows: As for the head.
            layouts: ``(N, R, B)``, the share of each cell that a thing's boxes cover; below 0 where nobody knows.
        """
        features, grid = as_grid(self.encoder.run_stages(states, self.start), self.encoder.config.name)
        regions, maps = self.resampler(features, grid, output_attentions=True)  # (N, L, D), (N, L, R)
        logits, attention = self.head(regions, questions, of_picture, rows)
        losses = functional.cross_entropy(
            logits,
            answers,
            ignore_index=UNKNOWN,
            label_smoothing=self.settings.label_smoothing if self.training else 0.0,
            reduction="none",
        )
        # One picture with eight questions must not count as much as eight pictures with one.
        weights = of_picture.bincount()[of_picture].float().rsqrt() * (answers != UNKNOWN)
        boxed = targets.sum(-1) > 0
        looked = (attention[boxed, None] @ maps[of_picture[boxed]]).squeeze(1)  # (Q_boxed, R)
        inside = (looked * (targets[boxed] > 0)).sum(-1)
        missed = features.new_zeros(())
        if self.layout is not None and layouts is not None:
            known = known_layouts(layouts)
            missed = functional.binary_cross_entropy_with_logits(
                self.layout(features[known]), layouts[known], reduction="none"
            )
            missed = missed.mean(1).sum()
        return {
            "answer_loss": (losses * weights).sum(),
            "weight": weights.sum(),
            "box_loss": -inside.clamp_min(1e-6).log().sum(),
            "layout_loss": missed,
            "logits": logits,
        }


def known_layouts(layouts: torch.Tensor) -> torch.Tensor:
    """Which pictures' boxes are known, ``(N,)``, of layouts ``(N, R, B)``."""
    return (layouts >= 0).flatten(1).all(1) & (layouts.shape[-1] > 0)


class PictureSet(Dataset):
    """Pictures with their questions. Items are asked for by epoch and number, as in ``collator.TrainingSet``.

    Only samples with one picture and a short answer take part.

    Args:
        samples: Questions, answers, pictures.
        pictures: What the pictures become.
        like: The training set, whose words and answers are known; None for that set itself.
        grid: Rows and columns, for the boxes.
        questions: At most so many questions of a picture at a time; None for all.
        seed: Fixes views and the choice of questions.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        pictures: Pictures,
        *,
        like: PictureSet | None = None,
        grid: tuple[int, int],
        questions: int | None,
        seed: int,
    ) -> None:
        by_picture: dict[Path, list[Sample]] = defaultdict(list)
        for sample in samples:
            if len(sample.images) == 1 and 0 < len(sample.answer) <= LONGEST_ANSWER:
                by_picture[sample.images[0]].append(sample)
        self.source, self.pictures = pictures, list(by_picture.items())
        self.grid, self.questions, self.seed = grid, questions, seed
        self.words: dict[str, int]
        self.answers: dict[str, int]
        self.labels: dict[str, int]
        # What is in a picture counts only where it's asked about by its boxes: then the reader found them in order.
        self.boxes = {
            path: boxes
            for path, found in self.pictures
            if any(sample.boxes for sample in found) and (boxes := read_boxes(path))
        }
        if like is not None:
            self.words, self.answers, self.labels = like.words, like.answers, like.labels
        else:
            known = [sample for _, found in self.pictures for sample in found]
            words = {word for sample in known for word in WORD.findall(sample.question.lower())}
            self.words = {word: number for number, word in enumerate(sorted(words), start=2)}  # 0 padding, 1 unknown
            answers = {normalise_answer(sample.answer) for sample in known}
            self.answers = {answer: number for number, answer in enumerate(sorted(answers))}
            labels = {box.label.lower() for boxes in self.boxes.values() for box in boxes}
            self.labels = {label: number for number, label in enumerate(sorted(labels))}

    def read(self, question: str) -> list[int]:
        """The numbers of a question's words, at least one."""
        return [self.words.get(word, 1) for word in WORD.findall(question.lower())] or [1]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int, int]) -> dict[str, Any]:
        """One picture in the view of an epoch and a pass, with some of its questions; ``~index``: none that count."""
        epoch, index, turn = item
        idle, index = index < 0, max(index, ~index)
        path, chosen = self.pictures[index]
        seed = f"{self.seed}/{epoch}/{index}/{turn}"
        states, view = self.source.draw(path, seed)
        if self.questions is not None and len(chosen) > self.questions:
            chosen = random.Random(seed).sample(chosen, self.questions)
        boxes = [() if idle else sample.boxes for sample in chosen]
        chance = random.Random(f"{seed}/dropout")
        return {
            "states": states,
            "questions": [self.read(sample.question) for sample in chosen],
            "answers": [UNKNOWN if idle else self._number(sample.answer) for sample in chosen],
            "targets": [box_target(its, view, self.grid) for its in boxes],
            "rows": [chance.getrandbits(63) for _ in chosen],
            "layout": self._layout(() if idle else self.boxes.get(path, ()), view),
        }

    def _layout(self, boxes: Sequence[Box], view: View) -> torch.Tensor:
        """The share of each grid cell that each label's boxes cover, ``(R, B)``; -1 where there are no boxes."""
        cells = self.grid[0] * self.grid[1]
        if not boxes:
            return torch.full((cells, len(self.labels)), -1.0)
        layout = torch.zeros(cells, len(self.labels))
        for label in {box.label.lower() for box in boxes} & self.labels.keys():
            its = [box for box in boxes if box.label.lower() == label]
            layout[:, self.labels[label]] = covered_cells(its, view, self.grid)
        return layout

    def _number(self, answer: str) -> int:
        return self.answers.get(normalise_answer(answer), UNKNOWN)

    @property
    def digest(self) -> str:
        """Tells two sets apart by what they ask and answer."""
        asked = [[(sample.question, sample.answer) for sample in samples] for _, samples in self.pictures]
        return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


class PictureOrder(Sampler[tuple[int, int, int]]):
    """All pictures in random order, one with n questions about root n times; it follows from seed and epoch alone.

    Where several processes share a step, each gets its part of the order.

    Args:
        dataset: The pictures.
        batch_size: Pictures in a step of all processes together.
        seed: Fixes the order, together with the epoch.
    """

    def __init__(self, dataset: PictureSet, batch_size: int, *, seed: int) -> None:
        self.passes = [
            (index, turn)
            for index, (_, samples) in enumerate(dataset.pictures)
            for turn in range(max(round(math.sqrt(len(samples))), 1))
        ]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; ``Trainer`` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of pictures that this process takes in an epoch, each as often as it comes."""
        return len(self._own(self.passes))

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Epoch, number, and how often the picture came before."""
        order = list(self.passes)
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for index, turn in self._own(order):
            yield self.epoch, index, turn

    def _own(self, order: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        steps = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [row for step in steps for row in own_share(step, lambda row: (~row[0], row[1]))]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch; see :meth:`VisionSide.forward`."""
    questions = [question for item in items for question in item["questions"]]
    longest = max(map(len, questions))
    return {
        "states": torch.stack([item["states"] for item in items]).float(),
        "questions": torch.tensor([ids + [0] * (longest - len(ids)) for ids in questions]),
        "of_picture": torch.tensor([place for place, item in enumerate(items) for _ in item["questions"]]),
        "answers": torch.tensor([answer for item in items for answer in item["answers"]]),
        "targets": torch.stack([target for item in items for target in item["targets"]]),
        "rows": torch.tensor([row for item in items for row in item["rows"]]),
        "layouts": torch.stack([item["layout"] for item in items]),
    }


class VisionTrainer(ResumableTrainer):
    """``Trainer`` with an order by seed and epoch, and a rate for each of the two parts."""

    def get_train_dataloader(self) -> DataLoader:
        """Batches in an order that follows from seed and epoch."""
        batch_size = self.model.settings.batch_size
        return self.loader_of(PictureOrder(self.train_dataset, batch_size, seed=self.args.seed))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The mean over all questions of a step, on whichever process they are, and over what has boxes."""
        outputs = model(**inputs)
        boxed, known = inputs["targets"].sum(-1) > 0, known_layouts(inputs["layouts"])
        counts = totals([outputs["weight"].item(), boxed.sum().item(), known.sum().item()], self.args.device)
        loss = outputs["answer_loss"] / max(counts[0], 1e-6)
        loss = loss + BOX_WEIGHT * outputs["box_loss"] / max(counts[1], 1)
        loss = loss + LAYOUT_WEIGHT * outputs["layout_loss"] / max(counts[2], 1)
        loss = loss * world_size()  # the gradients of the processes will be averaged
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; the encoder at its own rate."""
        settings = self.model.settings
        encoder = {*self.model.encoder.parameters()}
        others = [p for p in self.model.parameters() if p not in encoder]
        groups = [
            {"params": others, "lr": settings.learning_rate},
            {
                "params": [p for p in self.model.encoder.parameters() if p.requires_grad],
                "lr": settings.encoder_learning_rate,
            },
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_trained(self.model, Path(output_dir or self.args.output_dir) / SAFE_WEIGHTS_NAME)


def train_vision(
    model: FusionForConditionalGeneration,
    samples: Sequence[Sample],
    pictures: Pictures,
    settings: VisionSettings,
    *,
    output: Path,
    validation: Mapping[str, Sequence[Sample]] | None = None,
    validation_pictures: Pictures | None = None,
) -> dict[str, tuple[int, float]]:
    """Train the vision side of a fused model, in place, or take what ``output`` holds of an earlier run.

    Args:
        model: Its encoder and resampler are in float32 afterwards, and frozen.
        samples: Questions, answers, pictures.
        pictures: The pictures as features below the open stages.
        settings: How.
        output: Folder for checkpoints and ``vision.safetensors``, what was trained.
        validation: What the head is measured on at the end, by name.
        validation_pictures: Its pictures.

    Returns:
        For each validation set the number of its questions with a short answer, and the head's accuracy on them: what
        is to be expected of the fused model, not its own figure.

    Raises:
        ValueError: If ``output`` holds a run that differs.
        KeyboardInterrupt: If it was stopped; the same call goes on.
    """
    encoder, resampler = model.model.vision_encoder.float(), model.model.resampler.float()
    model.requires_grad_(False)
    for module in [*(module for stage in encoder.stages()[-settings.stages :] for module in stage), resampler]:
        module.requires_grad_(True)
    model.config.trainable_vision_stages = max(model.config.trainable_vision_stages, settings.stages)
    finished = output / "vision.safetensors"
    grid = tuple(encoder.config.grid_size)
    dataset = PictureSet(samples, pictures, grid=grid, questions=QUESTIONS, seed=settings.seed)
    checkpoints = output / "checkpoints"
    last = last_checkpoint(checkpoints)
    _note_run(output / "vision.json", dataset, settings, going_on=finished.exists() or last is not None)
    torch.manual_seed(settings.seed)
    head = QuestionHead(
        num_words=len(dataset.words) + 2,
        hidden_size=model.config.resampler_hidden_size,
        num_answers=len(dataset.answers),
    )
    side = VisionSide(encoder, resampler, head, settings, num_labels=len(dataset.labels))
    stop = CheckpointOnInterrupt()
    trainer = VisionTrainer(
        model=side,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=rows_of_a_process(settings.batch_size),
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            logging_steps=LOGGING_STEPS,
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[stop],
    )
    if finished.exists():
        load_trained(side, finished)
    else:
        if last is not None and trainer.steps_left(last) <= 0:
            load_trained(side, last / SAFE_WEIGHTS_NAME)
        else:
            if is_main():
                remove_incomplete(checkpoints)
            with stop:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            if stop.asked and trainer.state.global_step < trainer.state.max_steps:
                step = trainer.state.global_step
                raise KeyboardInterrupt(
                    f"the vision side stopped after step {step}: the same command goes on from there"
                )
        if is_main():
            save_trained(side, finished)
        wait_for_all()
    scores: dict[str, tuple[int, float]] = {}
    for name, held_out in (validation or {}).items():
        assert validation_pictures is not None
        questions = PictureSet(held_out, validation_pictures, like=dataset, grid=grid, questions=None, seed=0)
        scores[name] = _accuracy(side, questions)
    model.requires_grad_(False)
    return scores


def _note_run(file: Path, dataset: PictureSet, settings: VisionSettings, *, going_on: bool) -> None:
    """Write down what the run is, or compare: going on with other settings would mix two runs."""
    now = {**asdict(settings), "questions": f"about {len(dataset)} pictures, {dataset.digest}"}
    if going_on and file.exists():
        before = json.loads(file.read_text())
        changes = [
            f"{key.replace('_', ' ')} was {before.get(key)}, is {now[key]}"
            for key in now
            if before.get(key) != now[key]
        ]
        if changes:
            raise ValueError(
                f"{file.parent} holds a run of the vision side that differs ({'; '.join(changes)}): "
                "give another output folder"
            )
    elif is_main():
        write_text(file, json.dumps(now, indent=2) + "\n")


@torch.inference_mode()
def _accuracy(model: VisionSide, dataset: PictureSet) -> tuple[int, float]:
    model.eval()
    right = total = 0
    for start in range(0, len(dataset), 8):
        batch = collate([dataset[0, index, 0] for index in range(start, min(start + 8, len(dataset)))])
        device = next(model.parameters()).device
        said = model(**{key: value.to(device) for key, value in batch.items()})["logits"].argmax(-1).cpu()
        right += int((said == batch["answers"]).sum())
        total += len(said)
    return total, right / max(total, 1)
