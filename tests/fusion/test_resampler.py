"""RegionResampler: a grid of any size becomes a few region tokens, and the order of its cells matters."""

from __future__ import annotations

import pytest
import torch

from multimodal.fusion import RegionResampler
from multimodal.fusion.resampler import grid_centres, position_embedding_2d
from tests.fusion.tiny import assert_close, assert_differs, assert_same, fusion_config, open_gates, tiny_model

LATENTS = 3


@pytest.fixture
def resampler() -> RegionResampler:
    torch.manual_seed(0)
    resampler = RegionResampler(fusion_config(num_latents=LATENTS, resampler_hidden_size=32, resampler_heads=2)).eval()
    open_gates(resampler)
    return resampler


def grid_features(rows: int, columns: int, *, images: int = 2) -> torch.Tensor:
    return torch.randn(images, rows * columns, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (7, 3), (1, 1)])
def test_any_grid_gives_as_many_region_tokens(resampler: RegionResampler, grid: tuple[int, int]) -> None:
    regions, maps = resampler(grid_features(*grid), grid, output_attentions=True)
    assert regions.shape == (2, LATENTS, 32)
    assert maps.shape == (2, LATENTS, grid[0] * grid[1])
    assert_close(maps.sum(-1), torch.ones(2, LATENTS), "a region's map sums to one")
    assert (maps >= 0).all()


def test_the_map_costs_nothing_unless_asked_for(resampler: RegionResampler) -> None:
    features = grid_features(4, 4)
    with_map, _ = resampler(features, (4, 4), output_attentions=True)
    without, maps = resampler(features, (4, 4))
    assert maps is None
    assert_close(without, with_map)


def test_positions_matter(resampler: RegionResampler) -> None:
    features = grid_features(4, 4)
    regions, _ = resampler(features, (4, 4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert_differs(resampler(features[:, order], (4, 4))[0], regions, "cells in another order")
    mirrored = features.unflatten(1, (4, 4)).flip(2).flatten(1, 2)
    assert_differs(resampler(mirrored, (4, 4))[0], regions, "left and right exchanged")
    turned = features.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert_differs(resampler(turned, (4, 4))[0], regions, "rows and columns exchanged")
    assert_differs(resampler(features, (2, 8))[0], regions, "the same cells in a grid of another shape")


def test_pictures_do_not_mix(resampler: RegionResampler) -> None:
    features = grid_features(4, 4)
    regions, _ = resampler(features, (4, 4))
    for image in (0, 1):
        assert_close(resampler(features[image][None], (4, 4))[0][0], regions[image], f"picture {image}")


def test_latents_stand_for_different_regions(resampler: RegionResampler) -> None:
    regions, maps = resampler(grid_features(4, 4), (4, 4), output_attentions=True)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert_differs(regions[:, one], regions[:, other])
        assert_differs(maps[:, one], maps[:, other])


def test_each_cell_has_a_position_of_its_own() -> None:
    like = torch.zeros(1)
    positions = position_embedding_2d((9, 9), 64, like=like)
    assert positions.shape == (81, 64)
    assert (torch.cdist(positions, positions) + 10 * torch.eye(81)).min() > 0.1
    rows, columns = positions.unflatten(0, (9, 9)).split(32, dim=-1)
    assert_same(rows, rows[:, :1].expand(-1, 9, -1), "half of the width tells the row")
    assert_same(columns, columns[:1].expand(9, -1, -1), "half the column")


def test_positions_cover_the_same_picture_at_any_grid() -> None:
    like = torch.zeros(1)
    coarse = position_embedding_2d((3, 3), 64, like=like).unflatten(0, (3, 3))
    fine = position_embedding_2d((9, 9), 64, like=like).unflatten(0, (9, 9))
    assert_close(coarse[1, 1], fine[4, 4], "the centre")
    assert_close(coarse[0, 2], fine[1, 7], "the centre of a corner's cell")


# ---- how it starts


@pytest.mark.parametrize("latents", [1, 3, 9, 32])
def test_queries_start_spread_over_the_picture(latents: int) -> None:
    resampler = tiny_model(shut=True, num_latents=latents).model.resampler
    places = resampler.places
    assert places.shape == (latents, 2)
    assert (places > 0).all()
    assert (places < 1).all()
    if latents > 1:
        assert (torch.cdist(places, places) + torch.eye(latents)).min() >= 1 / latents
    _, maps = resampler(torch.randn(1, 144, 24), (12, 12), output_attentions=True)
    assert_close(maps.sum(-1), torch.ones(1, latents))


def test_a_query_starts_by_looking_near_its_place() -> None:
    resampler = tiny_model(shut=True, num_latents=9).model.resampler
    _, maps = resampler(torch.zeros(1, 81, 24), (9, 9), output_attentions=True)
    middles = maps[0] @ grid_centres((9, 9), like=maps)  # (L, 2)
    for axis in (0, 1):  # what it reads there pulls it away a little, and at the rim the picture ends
        correlation = torch.corrcoef(torch.stack([middles[:, axis], resampler.places[:, axis]]))[0, 1]
        assert correlation > 0.9, f"axis {axis}: {correlation:.3f}"


def test_region_tokens_tell_pictures_apart_from_the_start() -> None:
    resampler = tiny_model(shut=True).model.resampler
    first, second = resampler(grid_features(4, 4), (4, 4))[0]
    assert_differs(first, second, least=0.1)


def test_grid_centres() -> None:
    centres = grid_centres((2, 4), like=torch.zeros(1))
    assert centres.tolist() == [[row, column] for row in (0.25, 0.75) for column in (0.125, 0.375, 0.625, 0.875)]
