"""VisionEncoder: many image encoders, one face. Random weights throughout: what is tested is the grid.

Axes: N images, R grid cells, D width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from multimodal.fusion import VisionConfig, VisionEncoder
from tests.fusion.tiny import VIT, assert_close, assert_differs, assert_same, photo, tiny_encoder, tiny_model

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32}
PATCHES = {"patch_size": 8, "image_size": 32, "initializer_range": 0.2}
SMALL_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 4, 2], "num_heads": [1, 2, 4]}

# name, size of the picture, configuration, grid, width, number of stages
TRANSFORMERS: dict[str, tuple[str, int, dict[str, Any], tuple[int, int], int, int]] = {
    "vit": ("vit", 32, {**LAYERS, **PATCHES}, (4, 4), 24, 2),
    "clip": ("clip_vision_model", 32, {**LAYERS, **PATCHES}, (4, 4), 24, 2),
    "siglip": ("siglip_vision_model", 32, {**LAYERS, **PATCHES}, (4, 4), 24, 2),
    "dinov2": ("dinov2", 32, {**LAYERS, **PATCHES, "mlp_ratio": 2}, (4, 4), 24, 2),
    "dinov2 with registers": (
        "dinov2_with_registers",
        32,
        {**LAYERS, **PATCHES, "mlp_ratio": 2, "num_register_tokens": 4},
        (4, 4),
        24,
        2,
    ),
    "resnet": ("resnet", 64, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 3]}, (8, 8), 16, 2),
    "convnext": ("convnext", 64, {"hidden_sizes": [8, 12, 16], "depths": [1, 5, 1], "num_stages": 3}, (4, 4), 16, 3),
    "swin": ("swin", 64, {**SMALL_SWIN, "window_size": 4}, (4, 4), 32, 3),
}

# size of the picture, grid, width, number of stages
TORCHVISION = {
    "resnet18": (64, (2, 2), 512, 5),
    "convnext_tiny": (64, (2, 2), 768, 8),
    "efficientnet_b0": (64, (2, 2), 1280, 9),
    "mobilenet_v3_small": (64, (2, 2), 576, 13),
    "densenet121": (64, (2, 2), 1024, 8),
    "regnet_y_400mf": (64, (2, 2), 440, 5),
    "swin_t": (64, (2, 2), 768, 8),
}


def transformers_encoder(kind: str) -> VisionEncoder:
    name, size, options, *_ = TRANSFORMERS[kind]
    torch.manual_seed(0)
    return VisionEncoder.create(backend="transformers", name=name, image_size=size, backbone_config=dict(options))


@cache
def torchvision_encoder(name: str, size: int) -> VisionEncoder:
    """Built once: no test changes its weights."""
    torch.manual_seed(0)
    return VisionEncoder.create(backend="torchvision", name=name, image_size=size)


def assert_grid(encoder: VisionEncoder, grid: tuple[int, int], width: int) -> None:
    encoder.eval()
    size = encoder.config.image_size
    features, found = encoder(torch.randn(2, 3, size, size))
    assert found == tuple(encoder.config.grid_size) == grid
    assert features.shape == (2, grid[0] * grid[1], width)
    assert encoder.config.hidden_size == width
    assert features.isfinite().all()


def corners(encoder: VisionEncoder, *, patch: int) -> dict[tuple[int, int], tuple[int, int]]:
    """The cell that changes most when a corner of the picture does, for each corner; corners as 0 or 1."""
    encoder.eval()
    size = encoder.config.image_size
    plain = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2)) * 0.1
    before = encoder(plain).features
    strongest = {}
    for row in (0, 1):
        for column in (0, 1):
            changed = plain.clone()
            top, left = row * (size - patch), column * (size - patch)
            changed[..., top : top + patch, left : left + patch] += 3
            features, (rows, columns) = encoder(changed)
            cell = int((features - before).norm(dim=-1).argmax())
            strongest[row, column] = (cell // columns // (rows - 1), cell % columns // (columns - 1))
    return strongest


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_backbones_give_their_grid(kind: str) -> None:
    *_, grid, width, stages = TRANSFORMERS[kind]
    encoder = transformers_encoder(kind)
    assert_grid(encoder, grid, width)
    assert len(encoder.stages()) == stages


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_trunks_give_their_grid(name: str) -> None:
    size, grid, width, stages = TORCHVISION[name]
    encoder = torchvision_encoder(name, size)
    assert_grid(encoder, grid, width)
    assert len(encoder.stages()) == stages


def test_efficientnet_lite_gives_its_grid() -> None:
    encoder = VisionEncoder.create(backend="efficientnet_lite", name="efficientnet-lite0", image_size=64)
    assert_grid(encoder, (2, 2), 1280)


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "dinov2", "dinov2 with registers", "resnet", "convnext"])
def test_a_cell_stands_where_its_patch_stands(kind: str) -> None:
    encoder = transformers_encoder(kind)
    assert corners(encoder, patch=8) == {(0, 0): (0, 0), (0, 1): (0, 1), (1, 0): (1, 0), (1, 1): (1, 1)}


@pytest.mark.parametrize(("name", "size"), [("resnet18", 96), ("swin_t", 64)])
def test_a_cell_of_a_trunk_stands_where_its_patch_stands(name: str, size: int) -> None:
    encoder = torchvision_encoder(name, size)
    assert corners(encoder, patch=24) == {(0, 0): (0, 0), (0, 1): (0, 1), (1, 0): (1, 0), (1, 1): (1, 1)}


def test_the_class_token_is_no_cell() -> None:
    encoder = tiny_encoder().eval()
    pixel_values = torch.randn(1, 3, 32, 32)
    whole = encoder.trunk(pixel_values).last_hidden_state
    assert whole.shape[1] == 1 + 16
    assert_same(encoder(pixel_values).features, whole[:, 1:])


# ---- normalisation statistics, stages


@pytest.mark.parametrize("make", [lambda: torchvision_encoder("resnet18", 64), lambda: transformers_encoder("resnet")])
def test_batch_norm_keeps_its_statistics_in_training(make: Any) -> None:
    encoder = make().train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    assert any("running_mean" in name for name in before)
    size = encoder.config.image_size
    encoder(torch.randn(4, 3, size, size) * 3 + 1)
    for name, value in encoder.named_buffers():
        assert_same(value, before[name], name)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert encoder.training


def assert_stages_follow_the_picture(encoder: VisionEncoder) -> None:
    """No part stands in two stages, and each stage runs after the one before it."""
    order: list[nn.Module] = []
    stages = encoder.stages()
    weighty = [[part for part in stage if any(True for _ in part.parameters())] for stage in stages]
    parts = [part for stage in weighty for part in stage]  # an activation may be one module in two places
    hooks = [part.register_forward_pre_hook(lambda module, _args: order.append(module)) for part in parts]
    size = encoder.config.image_size
    encoder.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    assert [id(part) for part in order] == [id(part) for part in parts]


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_stages(kind: str) -> None:
    assert_stages_follow_the_picture(transformers_encoder(kind))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_stages_cover_the_trunk(name: str) -> None:
    encoder = torchvision_encoder(name, 64)
    assert_stages_follow_the_picture(encoder)
    assert covered(encoder) == {id(parameter) for parameter in encoder.parameters()}


def test_efficientnet_lite_stages_cover_the_trunk() -> None:
    encoder = VisionEncoder.create(backend="efficientnet_lite", name="efficientnet-lite0", image_size=64)
    assert_stages_follow_the_picture(encoder)
    assert covered(encoder) == {id(parameter) for parameter in encoder.parameters()}


def covered(encoder: VisionEncoder) -> set[int]:
    return {id(p) for stage in encoder.stages() for part in stage for p in part.parameters()}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_set_trainable_opens_the_last_stages_and_no_others(count: int) -> None:
    model = tiny_model(vision_config=torchvision_encoder("resnet18", 64).config)
    model.set_trainable(vision_stages=count)
    encoder = model.model.vision_encoder
    opened = {name.split(".")[1] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert opened == {0: set(), 1: {"layer4"}, 3: {"layer2", "layer3", "layer4"}}[count]


# ---- preparing pictures


@pytest.mark.parametrize(
    ("backend", "name"), [("torchvision", "resnet18"), ("efficientnet_lite", "efficientnet-lite0")]
)
def test_the_image_processor_prepares_pictures(backend: str, name: str) -> None:
    encoder = VisionEncoder.create(backend=backend, name=name, image_size=64).eval()
    processor = encoder.image_processor()
    prepared = processor([photo(0), photo(1, side=90)], return_tensors="pt")["pixel_values"]
    assert prepared.shape == (2, 3, 64, 64)
    assert encoder(prepared).features.shape[0] == 2
    white = processor(Image.new("RGB", (50, 80), "white"), return_tensors="pt")["pixel_values"]
    expected = {"torchvision": (1 - 0.485) / 0.229, "efficientnet_lite": 1.0}[backend]
    assert_close(white[0, 0], torch.full((64, 64), expected), "white in the first channel", limit=1e-3)


def test_nothing_of_a_picture_is_cut_away() -> None:
    picture = Image.new("RGB", (200, 50), "black")
    picture.paste((255, 255, 255), (190, 0, 200, 50))  # the right end
    prepared = torchvision_encoder("resnet18", 64).image_processor()(picture, return_tensors="pt")["pixel_values"]
    assert prepared[0, 0, :, -1].min() > prepared[0, 0, :, 0].max() + 1


# ---- building, saving, errors


def test_save_is_reload(tmp_path: Any) -> None:
    for encoder in (transformers_encoder("dinov2"), torchvision_encoder("mobilenet_v3_small", 64)):
        encoder.save_pretrained(tmp_path)
        again = VisionEncoder.from_pretrained(tmp_path)
        assert set(again.state_dict()) == set(encoder.state_dict())
        for name, tensor in encoder.state_dict().items():
            assert_same(again.state_dict()[name], tensor, name)
        assert again.config.grid_size == encoder.config.grid_size


def test_random_weights_keep_the_signal() -> None:
    """A trunk that is trained from scratch starts with features neither dead nor exploded."""
    encoder = torchvision_encoder("resnet18", 64).train()
    first, second = encoder(torch.randn(2, 3, 64, 64)).features
    assert 1e-3 < first.std() < 1e3
    assert_differs(first, second)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown vision backend 'timm': use 'transformers', 'torchvision'"):
        VisionEncoder(VisionConfig(backend="timm", name="resnet50"))


@pytest.mark.parametrize(
    ("backend", "name", "message"),
    [
        ("torchvision", "resnet19", "resnet19"),
        ("torchvision", "vit_b_16", "vit_b_16 keeps no grid"),
        ("transformers", "vat", "vat"),
    ],
)
def test_an_unknown_backbone_is_an_error(backend: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoder.create(backend=backend, name=name, image_size=64)


def test_tiny_encoder_is_a_vit() -> None:
    assert tiny_encoder().config.hidden_size == VIT["hidden_size"]
