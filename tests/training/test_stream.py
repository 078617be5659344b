"""Streams: dealt out without overlap, mixed as far as the buffer reaches, and gone on with where they were left."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from multimodal.cli import main
from multimodal.data import DataError
from multimodal.training import stream as streams
from multimodal.training.collator import FusionCollator
from multimodal.training.pictures import StreamedPictures
from multimodal.training.stream import TrainingStream
from multimodal.training.trainer import FusionTrainer
from tests.training.runs import curve, make_folder, run
from tests.training.test_processes import become
from tests.training.tiny import COLOURS, draw

SAMPLES = 22  # of a file; with 8 in a step, an epoch ends in the middle of one


def write(folder: Path, name: str = "mine", count: int = SAMPLES) -> Path:
    """A file of questions, a picture for each; answers name the sample."""
    lines = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        draw(colour, seed=number).save(folder / f"{name}{number}.png")
        turns = [
            {"role": "user", "content": "What colour is this?"},
            {"role": "assistant", "content": f"{colour} {number}"},
        ]
        lines.append(json.dumps({"messages": turns, "images": [f"{name}{number}.png"]}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def make(fused: Any, tmp_path: Path) -> Callable[..., TrainingStream]:
    def make(*files: Path, **options: Any) -> TrainingStream:
        pictures = StreamedPictures("none", image_processor=fused[1].image_processor)
        sources = {str(path): pictures for path in files or [write(tmp_path)]}
        return TrainingStream(sources, fused[1], **{"batch_size": 8, **options})

    return make


def ids(stream: TrainingStream, count: int) -> list[str]:
    return [f"{epoch}/{sample.id}" for epoch, _, _, sample in islice(stream.own(), count)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_every_step_without_overlap(
    make: Callable[..., TrainingStream], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, steps = make(), 3 * SAMPLES // 8
    one = ids(stream, 8 * steps)
    parts = []
    for rank in range(world_size):
        become(monkeypatch, rank, world_size)
        parts.append(ids(stream, 8 * steps // world_size))
    everything = [name for part in parts for name in part]
    assert len(everything) == len(set(everything)) and set(everything) == set(one)
    each = 8 // world_size
    for step in range(steps):
        dealt = {name for part in parts for name in part[step * each : (step + 1) * each]}
        assert dealt == set(one[8 * step : 8 * step + 8])


def test_each_sample_comes_once_in_an_epoch_in_another_order(make: Callable[..., TrainingStream]) -> None:
    stream = make()
    found = ids(stream, 2 * SAMPLES)
    first, second = ([name.partition("/")[2] for name in found[part:][:SAMPLES]] for part in (0, SAMPLES))
    assert {name[0] for name in found[:SAMPLES]} == {"0"} and {name[0] for name in found[SAMPLES:]} == {"1"}
    assert sorted(first) == sorted(second) and len(set(first)) == SAMPLES and first != second
    assert ids(stream, 2 * SAMPLES) == found
    stream.seed = 1
    assert ids(stream, 2 * SAMPLES) != found


def test_what_waits_in_memory_is_the_buffer(
    make: Callable[..., TrainingStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, read = make(), []
    original = streams.iterate

    def counted(*args: Any) -> Any:
        for sample in original(*args):
            read.append(sample.id)
            yield sample

    monkeypatch.setattr(streams, "iterate", counted)
    monkeypatch.setattr(streams, "BUFFER", 5)
    found = ids(stream, SAMPLES)
    assert len(set(found)) == SAMPLES
    read.clear()
    for taken, _ in enumerate(islice(stream.own(), SAMPLES - 5), start=1):
        assert len(read) == 5 + taken


def test_several_files_take_turns(make: Callable[..., TrainingStream], tmp_path: Path) -> None:
    few, many = write(tmp_path, "few", 3), write(tmp_path, "many", 9)
    found = [Path(name).stem for _, _, name, _ in islice(make(few, many).own(), 12)]
    assert found == ["few", "many"] * 3 + ["many"] * 6


def test_it_begins_where_it_is_told(make: Callable[..., TrainingStream], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, later = make(), make(start=24)
    assert ids(later, 20) == ids(whole, 44)[24:]
    become(monkeypatch, 1, 2)
    assert ids(later, 10) == ids(whole, 22)[12:]


@pytest.mark.parametrize("loaders", [1, 3])
def test_loading_processes_make_the_batches_of_one(make: Callable[..., TrainingStream], loaders: int) -> None:
    stream = make()

    def batches(loaders: int) -> list[dict[str, torch.Tensor]]:
        loader = DataLoader(stream, batch_size=8, collate_fn=FusionCollator(0), num_workers=loaders)
        return list(islice(loader, 5))

    for ours, alone in zip(batches(loaders), batches(0), strict=True):
        assert ours.keys() == alone.keys() and all(torch.equal(ours[key], alone[key]) for key in ours)


def test_what_cannot_be_trained_on_is_told_when_its_turn_comes(
    make: Callable[..., TrainingStream], tmp_path: Path
) -> None:
    path = write(tmp_path)
    (tmp_path / "mine5.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"mine5\.png"):
        list(islice(make(path), SAMPLES))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl: no sample to train on"):
        next(make(path).own())
    assert next(make(path, needs_picture=False).own())[3].answer == "So."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bases: tuple[str, str]) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("stream"), bases[0])
    write(folder)
    assert run(command(folder, "one"), seen_by(folder / "seen by one")) == [0]
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    options = {
        "--data": folder / "mine.jsonl",
        "--model": folder / "fused",
        "--output": folder / output,
        "--max-steps": 8,
        "--batch-size": 8,
        "--save-steps": 3,
        "--learning-rate": 1e-2,
    }
    return ["train", "--streaming", *(str(word) for pair in options.items() for word in pair), *more]


def seen_by(folder: Path, *, die_at: int = 0) -> Callable[[], None]:
    """Notes what this process trains on, and how far it comes."""
    folder.mkdir(exist_ok=True)
    own, loss = TrainingStream.own, FusionTrainer.compute_loss

    def set_up() -> None:
        def noting(self: TrainingStream) -> Any:
            for found in own(self):
                with (folder / os.environ.get("RANK", "0")).open("a") as file:
                    file.write(f"{found[0]}/{found[3].id}\n")
                yield found

        def dying(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
            if die_at and self.state.global_step == die_at:
                os._exit(9)
            return loss(self, *args, **kwargs)

        TrainingStream.own, FusionTrainer.compute_loss = noting, dying  # type: ignore[method-assign]

    return set_up


def assert_near(one: Path, other: Path) -> None:
    """The same curve."""
    ours, theirs = ([entry for entry in curve(run / "checkpoints") if "loss" in entry] for run in (one, other))
    assert len(ours) == 4 and [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], abs=1e-4)


@pytest.mark.slow
def test_two_processes_read_everything_once_and_give_the_curve_of_one(folder: Path) -> None:
    assert run(command(folder, "two"), seen_by(folder / "seen by two"), processes=2) == [0, 0]
    first, second = ((folder / "seen by two" / rank).read_text().split() for rank in "01")
    (alone,) = ((folder / "seen by one" / rank).read_text().split() for rank in "0")
    assert not set(first) & set(second)
    epoch = Counter(name.partition("/")[2] for name in (*first, *second) if name.startswith("0/"))
    assert len(epoch) == SAMPLES and set(epoch.values()) == {1}
    assert set(alone[:64]) == {*first[:32], *second[:32]}
    assert_near(folder / "two", folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_it_goes_on_behind_what_was_seen(folder: Path, processes: int) -> None:
    output, seen = f"killed {processes}", folder / f"seen by {processes} killed"
    assert run(command(folder, output), seen_by(seen, die_at=4)) == [9]
    for file in seen.iterdir():
        file.unlink()
    assert run(command(folder, output), seen_by(seen), processes=processes) == [0] * processes
    later = {name for file in seen.iterdir() for name in file.read_text().split()[: 40 // processes]}
    assert later == set((folder / "seen by one" / "0").read_text().split()[24:64])  # the checkpoint is behind step 3
    assert_near(folder / output, folder / "one")


def test_what_looks_at_a_whole_data_set_is_refused(
    tmp_path: Path, bases: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path, bases[0])
    write(folder)
    assert main([*command(folder, "odd"), "--validate-steps", "5", "--skip-bad"]) == 1
    assert "skip_bad, validate_steps: not with streaming" in capsys.readouterr().err
    assert main([*command(folder, "odd"), "--max-steps", "-1"]) == 1
    assert "a stream has no end: give max_steps" in capsys.readouterr().err
