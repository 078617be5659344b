"""The feature cache: keyed by content, complete or absent, the same bytes however often it was interrupted."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.data import DataError
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor, VisionEncoder
from multimodal.training.features import FeatureCache
from tests.training.tiny import draw

VIEWS = 3


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five pictures: with three views, one batch is not full."""
    (tmp_path / "pictures").mkdir()
    found = [tmp_path / "pictures" / f"{number}.png" for number in range(5)]
    for number, path in enumerate(found):
        draw("red" if number % 2 else "blue", number).save(path)
    return found


@pytest.fixture
def make(
    fused: tuple[FusionForConditionalGeneration, FusionProcessor], paths: list[Path], tmp_path: Path
) -> Callable[..., FeatureCache]:
    def make(**changes: Any) -> FeatureCache:
        options = {
            "folder": tmp_path / "cache",
            "paths": paths,
            "encoder": fused[0].model.vision_encoder,
            "image_processor": fused[1].image_processor,
            "augmentation": "medical",
            "views": VIEWS,
        } | changes
        return FeatureCache(options.pop("folder"), options.pop("paths"), **options)

    return make


def content(folder: Path) -> bytes:
    (file,) = folder.glob("*.float16")
    return file.read_bytes()


def files(folder: Path) -> int:
    return len(list(folder.glob("*.float16")))


def test_view_0_is_the_encoders_output(make: Any, fused: Any, paths: list[Path]) -> None:
    cache = make()
    pixels = fused[1].image_processor([draw("red", 1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = fused[0].model.vision_encoder(pixels).features[0]
    torch.testing.assert_close(cache.view(paths[1], 0).float(), expected, atol=2e-3, rtol=2e-3)
    assert not torch.equal(cache.view(paths[1], 1), cache.view(paths[1], 2))


def test_a_draw_follows_the_seed(make: Any, paths: list[Path]) -> None:
    cache = make()
    views = [cache.view(paths[0], view) for view in range(VIEWS)]
    drawn = [
        next(i for i, view in enumerate(views) if torch.equal(view, cache.draw(paths[0], str(s)))) for s in range(30)
    ]
    assert set(drawn) == set(range(VIEWS))
    assert torch.equal(cache.draw(paths[0], "7"), cache.draw(paths[0], "7"))


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_an_interruption_leaves_no_trace(
    make: Any, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder=tmp_path / "whole")
    original = VisionEncoder.forward
    calls: list[int] = []

    def forward(self: VisionEncoder, pixel_values: torch.Tensor) -> Any:
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, pixel_values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VisionEncoder, "forward", forward)
        make()
    assert files(tmp_path / "cache") == 0
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    with unfinished.open("ab") as stream:
        stream.write(b"half a batch, as a kill leaves it")

    counted: list[int] = []

    def counting(self: VisionEncoder, pixel_values: torch.Tensor) -> Any:
        counted.append(len(pixel_values))
        return original(self, pixel_values)

    monkeypatch.setattr(VisionEncoder, "forward", counting)
    make()
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert len(counted) == 4 - batches  # nothing was computed twice
    make()
    assert len(counted) == 4 - batches


def test_another_picture_of_the_same_name_gets_other_features(make: Any, paths: list[Path]) -> None:
    before = make().view(paths[0], 0)
    draw("white", 99).save(paths[0])
    assert not torch.equal(make().view(paths[0], 0), before)


def test_a_data_set_may_move(make: Any, paths: list[Path], tmp_path: Path) -> None:
    before = make().view(paths[0], 1)
    moved = [tmp_path / f"other_{9 - number}.png" for number in range(len(paths))]
    for path, target in zip(paths, moved, strict=True):
        shutil.move(path, target)
    after = make(paths=moved)
    assert files(tmp_path / "cache") == 1
    assert torch.equal(after.view(moved[0], 1), before)


def test_the_same_picture_under_two_names_is_kept_once(make: Any, paths: list[Path], tmp_path: Path) -> None:
    make()
    shutil.copy(paths[0], tmp_path / "copy.png")
    cache = make(paths=[*paths, tmp_path / "copy.png"])
    assert files(tmp_path / "cache") == 1
    assert torch.equal(cache.view(paths[0], 1), cache.view(tmp_path / "copy.png", 1))


def test_whatever_decides_the_features_makes_another_file(make: Any, fused: Any, tmp_path: Path) -> None:
    make()
    make(augmentation="shop")
    make(views=2)
    fused[1].image_processor.image_mean = [0.1, 0.5, 0.5]
    make()
    encoder = fused[0].model.vision_encoder
    with torch.no_grad():  # the sum of the weights stays the same
        weight = next(parameter for parameter in encoder.parameters() if parameter.ndim == 2)
        weight.copy_(weight.flip(0))
    make()
    encoder.to(torch.bfloat16)
    make()
    assert files(tmp_path / "cache") == 6


def test_two_processes_at_once(make: Any, tmp_path: Path) -> None:
    make(folder=tmp_path / "alone")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert content(tmp_path / "cache") == content(tmp_path / "alone")


def test_a_broken_picture_is_named_before_anything_is_encoded(
    make: Any, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionEncoder, "forward", None)
    paths[4].write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        make()
    assert caught.value.file == paths[4] and caught.value.remedy


def test_no_pictures_at_all(make: Any) -> None:
    make(paths=[])
