"""The store of features: rows named by content, kind and view; it grows, and leaves no trace of an interruption."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.data import DataError
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor, VisionEncoder
from multimodal.fusion.vision import as_grid
from multimodal.training import features as module
from multimodal.training.augmentation import View
from multimodal.training.features import CachedPictures, FeatureCache, view_of
from multimodal.training.pictures import LivePictures
from tests.training.tiny import draw

VIEWS = 3
Make = Callable[..., FeatureCache]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five pictures: with three views, one batch is not full."""
    (tmp_path / "pictures").mkdir()
    found = [tmp_path / "pictures" / f"{number}.png" for number in range(5)]
    for number, path in enumerate(found):
        draw("red" if number % 2 else "blue", number).save(path)
    return found


@pytest.fixture
def make(fused: tuple[FusionForConditionalGeneration, FusionProcessor], paths: list[Path], tmp_path: Path) -> Make:
    """A store with all pictures in three medical views, if nothing else is said."""

    def make(
        folder: Path = tmp_path / "cache",
        *,
        pictures: list[Path] = paths,
        augmentation: str = "medical",
        views: int = VIEWS,
        **changes: Any,
    ) -> FeatureCache:
        encoder, processor = fused[0].model.vision_encoder, fused[1].image_processor
        cache = FeatureCache(folder, **{"encoder": encoder, "image_processor": processor} | changes)
        cache.add(pictures, augmentation=augmentation, views=views)
        return cache

    return make


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views each call of an encoder, or of some of its stages, took."""
    counted: list[int] = []
    for name in ("forward", "run_stages"):
        original = getattr(VisionEncoder, name)

        def counting(self: VisionEncoder, states: torch.Tensor, *args: Any, original: Any = original) -> Any:
            counted.append(len(states))
            return original(self, states, *args)

        monkeypatch.setattr(VisionEncoder, name, counting)
    return counted


def content(folder: Path) -> tuple[bytes, bytes]:
    (features,), (names,) = folder.glob("*.float16"), folder.glob("*.names")
    return features.read_bytes(), names.read_bytes()


def files(folder: Path) -> int:
    return len(list(folder.glob("*.float16")))


def test_view_0_is_the_encoders_output(make: Make, fused: Any, paths: list[Path]) -> None:
    cache = make()
    pixels = fused[1].image_processor([draw("red", 1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = fused[0].model.vision_encoder(pixels).features[0]
    found, view = cache.view(paths[1], "medical", 0)
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
    assert view == View()


def test_other_views_are_the_augmented_picture(make: Make, fused: Any, paths: list[Path]) -> None:
    cache = make()
    found, view = cache.view(paths[1], "medical", 1)
    assert view != cache.view(paths[1], "medical", 2)[1] != cache.view(paths[0], "medical", 2)[1]
    pixels = fused[1].image_processor([view.of(draw("red", 1))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = fused[0].model.vision_encoder(pixels).features[0]
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)


class TestGrowth:
    def test_only_what_is_new_is_computed(self, make: Make, paths: list[Path], encoded: list[int]) -> None:
        make(pictures=paths[:3])
        assert sum(encoded) == 9
        make()
        assert sum(encoded) == 15  # two pictures more
        make(views=5)
        assert sum(encoded) == 25  # two views more
        make(views=2)
        assert sum(encoded) == 25

    def test_rows_stay_where_they_are(self, make: Make, paths: list[Path], tmp_path: Path) -> None:
        make(pictures=paths[2:])
        features, names = content(tmp_path / "cache")
        make()
        more, longer = content(tmp_path / "cache")
        assert more.startswith(features) and longer.startswith(names)
        assert len(longer.splitlines()) == 15

    def test_all_kinds_share_a_file_and_the_picture_as_it_is(
        self, make: Make, tmp_path: Path, encoded: list[int]
    ) -> None:
        make()
        make(augmentation="shop")
        make(augmentation="none", views=1)
        assert files(tmp_path / "cache") == 1
        assert sum(encoded) == 15 + 10  # of the shop's views, the first is there already

    def test_what_was_not_added_is_not_there(self, make: Make, paths: list[Path]) -> None:
        cache = make(pictures=paths[:2])
        with pytest.raises(KeyError):
            cache.view(paths[0], "medical", VIEWS)
        with pytest.raises(KeyError):
            cache.view(paths[0], "shop", 1)

    def test_an_open_store_sees_what_another_one_adds(self, make: Make, paths: list[Path]) -> None:
        cache = make(pictures=paths[:2])
        row = cache.view(paths[1], "medical", 1)[0]
        other = make(pictures=paths)
        cache.add(paths[3:], augmentation="medical", views=VIEWS)
        assert torch.equal(cache.view(paths[1], "medical", 1)[0], row)
        assert torch.equal(cache.view(paths[4], "medical", 2)[0], other.view(paths[4], "medical", 2)[0])

    def test_no_pictures_at_all(self, make: Make) -> None:
        make(pictures=[])


class TestInterruption:
    @pytest.mark.parametrize("batches", [0, 1, 3])
    def test_it_goes_on_where_it_was(
        self, make: Make, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
    ) -> None:
        make(tmp_path / "whole")
        original = VisionEncoder.forward
        del encoded[:]

        def forward(self: VisionEncoder, pixel_values: torch.Tensor) -> Any:
            if len(encoded) == batches:
                raise KeyboardInterrupt
            return original(self, pixel_values)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(VisionEncoder, "forward", forward)
            make()
        del encoded[:]
        make()
        assert content(tmp_path / "cache") == content(tmp_path / "whole")
        assert len(encoded) == 4 - batches  # nothing was computed twice
        make()
        assert len(encoded) == 4 - batches

    def test_a_kill_at_any_byte_leaves_no_trace(self, make: Make, tmp_path: Path) -> None:
        make(tmp_path / "whole")
        features, names = content(tmp_path / "whole")
        row, lines = len(features) // 15, [0, *(at + 1 for at, byte in enumerate(names) if byte == 10)]
        for whole, extra_bytes, extra_letters in [
            (0, 3, 0),
            (4, 0, 0),
            (4, 4 * row, 0),
            (4, 4 * row, 9),
            (8, row + 1, 0),
        ]:
            folder = tmp_path / f"{whole} {extra_bytes} {extra_letters}"
            shutil.copytree(tmp_path / "whole", folder)
            (stored,), (named,) = folder.glob("*.float16"), folder.glob("*.names")
            stored.write_bytes(features[: whole * row + extra_bytes])
            named.write_bytes(names[: lines[whole] + extra_letters])
            make(folder)
            assert content(folder) == (features, names)

    def test_names_without_features_do_not_count(self, make: Make, tmp_path: Path, encoded: list[int]) -> None:
        make()
        whole = content(tmp_path / "cache")
        (stored,) = (tmp_path / "cache").glob("*.float16")
        stored.write_bytes(whole[0][: len(whole[0]) // 15 * 12])  # as a disk that ran full leaves it
        del encoded[:]
        make()
        assert content(tmp_path / "cache") == whole and sum(encoded) == 3

    def test_two_processes_at_once(self, make: Make, tmp_path: Path) -> None:
        make(tmp_path / "alone")
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=make) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
        assert content(tmp_path / "cache") == content(tmp_path / "alone")


class TestNames:
    def test_another_picture_of_the_same_name_gets_other_features(self, make: Make, paths: list[Path]) -> None:
        before = make().view(paths[0], "medical", 0)[0]
        draw("white", 99).save(paths[0])
        assert not torch.equal(make().view(paths[0], "medical", 0)[0], before)

    def test_a_data_set_may_move(self, make: Make, paths: list[Path], tmp_path: Path, encoded: list[int]) -> None:
        before = make().view(paths[0], "medical", 1)
        moved = [tmp_path / f"other_{9 - number}.png" for number in range(len(paths))]
        for path, target in zip(paths, moved, strict=True):
            shutil.move(path, target)
        del encoded[:]
        after = make(pictures=moved).view(moved[0], "medical", 1)
        assert torch.equal(after[0], before[0]) and after[1] == before[1]
        assert not encoded

    def test_the_same_picture_under_two_names_is_kept_once(
        self, make: Make, paths: list[Path], tmp_path: Path, encoded: list[int]
    ) -> None:
        shutil.copy(paths[0], tmp_path / "copy.png")
        cache = make(pictures=[*paths, tmp_path / "copy.png"])
        assert sum(encoded) == 15
        assert torch.equal(cache.view(paths[0], "medical", 1)[0], cache.view(tmp_path / "copy.png", "medical", 1)[0])

    def test_whatever_decides_the_features_makes_another_file(self, make: Make, fused: Any, tmp_path: Path) -> None:
        make()
        fused[1].image_processor.image_mean = [0.1, 0.5, 0.5]
        make()
        encoder = fused[0].model.vision_encoder
        with torch.no_grad():  # the sum of the weights stays the same
            weight = next(parameter for parameter in encoder.parameters() if parameter.ndim == 2)
            weight.copy_(weight.flip(0))
        make()
        encoder.to(torch.bfloat16)
        make()
        assert files(tmp_path / "cache") == 4


def test_a_broken_picture_is_named_before_anything_is_encoded(
    make: Make, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionEncoder, "forward", None)
    paths[4].write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        make()
    assert caught.value.file == paths[4] and caught.value.remedy


class TestOpenStages:
    """Features below the last stages, of a trunk whose stages are called one after another."""

    @pytest.fixture
    def encoder(self) -> VisionEncoder:
        torch.manual_seed(0)
        return VisionEncoder.create(backend="torchvision", name="resnet18", image_size=32).eval()

    @pytest.fixture
    def options(self, encoder: VisionEncoder) -> dict[str, Any]:
        return {"encoder": encoder, "image_processor": encoder.image_processor()}

    def test_the_open_stages_go_on_from_them(
        self, make: Make, options: dict[str, Any], paths: list[Path], tmp_path: Path
    ) -> None:
        encoder = options["encoder"]
        below, whole = make(open_stages=2, **options), make(**options)
        states = below.view(paths[0], "medical", 1)[0]
        assert states.shape == below.shape and states.ndim == 3
        with torch.no_grad():
            features = as_grid(encoder.run_stages(states[None].float(), len(encoder.stages()) - 2), "resnet18").features
        torch.testing.assert_close(features[0], whole.view(paths[0], "medical", 1)[0].float(), atol=1e-2, rtol=1e-2)
        assert files(tmp_path / "cache") == 2

    def test_what_is_open_may_change(self, make: Make, options: dict[str, Any], tmp_path: Path) -> None:
        make(open_stages=2, **options)
        for module_ in options["encoder"].stages()[-1]:
            for parameter in module_.parameters():
                parameter.data += 1
        make(open_stages=2, **options)
        assert files(tmp_path / "cache") == 1
        next(options["encoder"].stages()[0][0].parameters()).data += 1
        make(open_stages=2, **options)
        assert files(tmp_path / "cache") == 2

    def test_a_store_above_takes_what_the_one_below_has(
        self, make: Make, options: dict[str, Any], paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = make(tmp_path / "alone", **options)
        below = make(open_stages=2, **options)
        monkeypatch.setattr(module, "load_image", None)  # no picture is opened again
        module._opened.cache_clear()
        above = FeatureCache(tmp_path / "cache", below=below, **options)
        monkeypatch.setattr(module, "check_pictures", lambda paths: None)
        above.add(paths, augmentation="medical", views=VIEWS)
        for view in range(VIEWS):
            found, expected = (cache.view(paths[1], "medical", view)[0].float() for cache in (above, alone))
            torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)

    def test_a_backbone_that_cannot_be_cut(self, make: Make) -> None:
        with pytest.raises(ValueError, match="vit: a transformers backbone cannot be cut"):
            make(open_stages=1)


class TestDraws:
    def test_a_draw_follows_the_seed(self, make: Make, paths: list[Path]) -> None:
        pictures = CachedPictures(make(), dict.fromkeys(paths, "medical"), views={"medical": VIEWS})
        views = [pictures.cache.view(paths[0], "medical", view) for view in range(VIEWS)]
        drawn: Counter[int] = Counter()
        for seed in range(30):
            states, view = pictures.draw(paths[0], str(seed))
            (number,) = [n for n, (features, _) in enumerate(views) if torch.equal(features, states)]
            assert view == views[number][1]
            drawn[number] += 1
        assert set(drawn) == set(range(VIEWS))
        assert torch.equal(pictures.draw(paths[0], "7")[0], pictures.draw(paths[0], "7")[0])

    def test_each_picture_has_its_kind(self, make: Make, paths: list[Path], encoded: list[int]) -> None:
        kinds = {paths[0]: "medical", paths[1]: "shop", paths[2]: "none"}
        pictures = CachedPictures(make(pictures=[]), kinds, views={"medical": 3, "shop": 2, "none": 1})
        assert sum(encoded) == 6
        assert {pictures.draw(paths[2], str(seed))[1] for seed in range(5)} == {View()}

    @pytest.mark.parametrize("open_stages", [0, 1])
    def test_a_shops_picture_is_mirrored_as_it_lies(self, open_stages: int, make: Make, paths: list[Path]) -> None:
        encoder = VisionEncoder.create(backend="torchvision", name="resnet18", image_size=96).eval()
        cache = make(pictures=[], encoder=encoder, image_processor=encoder.image_processor(), open_stages=open_stages)
        pictures = CachedPictures(cache, {paths[0]: "shop"}, views={"shop": 1})
        plain, seen = cache.view(paths[0], "shop", 0)[0], set()
        for seed in range(20):
            states, view = pictures.draw(paths[0], str(seed))
            grid = plain if open_stages else plain.T.unflatten(1, tuple(encoder.config.grid_size))
            expected = grid.flip(-1) if view.mirrored else grid
            assert torch.equal(states, expected if open_stages else expected.flatten(1).T)
            seen.add(view.mirrored)
        assert seen == {True, False}

    def test_live_pictures_are_the_same_views(self, fused: Any, paths: list[Path]) -> None:
        live = LivePictures({paths[0]: "medical"}, image_processor=fused[1].image_processor)
        pixels, view = live.draw(paths[0], "a seed")
        expected = fused[1].image_processor(view.of(draw("blue", 0)), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected)
        assert view != live.draw(paths[0], "another")[1]

    def test_a_view_follows_content_kind_and_number(self) -> None:
        assert view_of("a", "medical", 1) == view_of("a", "medical", 1) != view_of("a", "shop", 1)
        assert view_of("a", "medical", 1) != view_of("b", "medical", 1)
        assert view_of("a", "medical", 0) == view_of("b", "shop", 0) == View()


@pytest.mark.parametrize("processes", [1, 3])
def test_pictures_from_other_processes_are_the_same(
    make: Make, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU, where others open the pictures."""
    make()
    monkeypatch.setattr(module, "loading_processes", lambda: processes)
    make(tmp_path / "other")
    assert content(tmp_path / "other") == content(tmp_path / "cache")
