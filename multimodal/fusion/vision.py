"""VisionEncoder: one face over many image encoders.

Whatever the backbone, the result is grid features, row by row, with the grid's height and width, and the image
processor that belongs to it. Three backends: any transformers vision model (CLIP, SigLIP, ViT, DINOv2, ResNet, ...),
any torchvision classification trunk, and EfficientNet-Lite. It knows nothing about text, and loads no file: pretrained
weights come through ``from_pretrained`` or a state dict.

Axes: N images, R grid cells (rows * columns), D width.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

# The means and deviations with which the published weights were trained.
EFFICIENTNET_LITE_MEAN, EFFICIENTNET_LITE_STD = [127 / 255] * 3, [128 / 255] * 3
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# Their published weights were trained with these instead of ImageNet's mean and deviation.
TORCHVISION_HALF = ("googlenet", "inception_v3")

# What a torchvision classifier has behind its last feature map; the trunk ends before the first of these.
TORCHVISION_HEADS = ("avgpool", "flatten", "classifier", "fc", "head", "heads")

# Children that only hold the blocks.
TORCHVISION_CONTAINERS = ("features", "layers", "blocks", "trunk_output")


class VisionFeatures(NamedTuple):
    """Grid features ``(N, R, D)`` and the grid's ``(rows, columns)``."""

    features: torch.Tensor
    grid: tuple[int, int]


class VisionConfig(PreTrainedConfig):
    """Configuration of a :class:`VisionEncoder`.

    Args:
        backend: ``"transformers"``, ``"torchvision"`` or ``"efficientnet_lite"``.
        name: The backbone's name in its library (``"resnet101"``, ``"efficientnet-lite2"``); for transformers, the
            model type.
        image_size: Side of the square input, pixels.
        hidden_size: Width ``D`` of the features.
        grid_size: Rows and columns of the grid at ``image_size``.
        backbone_config: The backbone's own configuration, for transformers.
    """

    model_type = "fusion_vision"
    base_config_key = "vision_config"

    backend: str = "efficientnet_lite"
    name: str = "efficientnet-lite2"
    image_size: int = 288
    hidden_size: int = 1280
    grid_size: list[int] | tuple[int, int] = (9, 9)
    backbone_config: dict[str, Any] | None = None


def as_grid(states: torch.Tensor, name: str) -> VisionFeatures:
    """Turn a feature map ``(N, D, rows, columns)`` into grid features, row by row; ``name`` is for an error."""
    if states.ndim != 4:
        raise ValueError(f"backbone {name!r} gives {tuple(states.shape)}, not a grid of features")
    return VisionFeatures(states.flatten(2).transpose(1, 2), (states.shape[2], states.shape[3]))


def _torchvision_trunk(name: str) -> nn.Module:
    from torchvision.models import get_model

    if name.startswith("vit_"):
        raise ValueError(f"torchvision's {name} keeps no grid: use a ViT of the transformers backend")
    parts = OrderedDict()
    for part, module in get_model(name, weights=None).named_children():
        if part in TORCHVISION_HEADS:
            break
        if not part.lower().startswith("aux"):  # classifiers in the middle, for training
            parts[part] = nn.Sequential(*module) if isinstance(module, nn.ModuleList) else module
    return nn.Sequential(parts)


def _torchvision_stages(trunk: nn.Module) -> list[list[nn.Module]]:
    parts: list[nn.Module] = []
    for name, child in trunk.named_children():
        parts += child.children() if name in TORCHVISION_CONTAINERS else [child]
    stages: list[list[nn.Module]] = [[]]
    for part in parts:
        weighs = any(parameter.ndim > 1 for parameter in part.parameters())
        if weighs and any(_parameter_count(module) for module in stages[-1]):
            stages.append([])
        stages[-1].append(part)  # norms and what has no weights go with the block before them
    return stages


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _efficientnet_lite_trunk(config: VisionConfig) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    # The input size fixes the padding that "same" convolutions get.
    trunk = EfficientNet.from_name(config.name, image_size=config.image_size)
    trunk._fc = nn.Identity()
    return trunk


def _transformers_trunk(config: VisionConfig) -> nn.Module:
    backbone = dict(config.backbone_config or {})
    backbone.pop("dtype", None)  # the fused model's own holds
    backbone_config = AutoConfig.for_model(backbone.pop("model_type", config.name), **backbone)
    return AutoModel.from_config(backbone_config)


class VisionEncoder(PreTrainedModel):
    """Any supported image encoder as ``pixel_values -> grid features``.

    Batch normalisation keeps its published statistics, also in training: batches of a few pictures would spoil them.

    Args:
        config: A :class:`VisionConfig`.

    Raises:
        ValueError: If the backend is unknown, or the backbone gives no grid.
    """

    config_class = VisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    trunk: Any  # whatever class the backend's library gives

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        if config.backend == "torchvision":
            self.trunk = _torchvision_trunk(config.name)
        elif config.backend == "efficientnet_lite":
            self.trunk = _efficientnet_lite_trunk(config)
        elif config.backend == "transformers":
            self.trunk = _transformers_trunk(config)
        else:
            raise ValueError(
                f"unknown vision backend {config.backend!r}: use 'transformers', 'torchvision' or 'efficientnet_lite'"
            )
        self.post_init()

    @classmethod
    def create(
        cls, *, backend: str, name: str, image_size: int, backbone_config: dict[str, Any] | None = None
    ) -> VisionEncoder:
        """Build an encoder with random weights and find out its width and grid by running it once."""
        config = VisionConfig(backend=backend, name=name, image_size=image_size, backbone_config=backbone_config)
        encoder = cls(config)
        encoder._probe()
        return encoder

    @classmethod
    def wrap(cls, backbone: PreTrainedModel) -> VisionEncoder:
        """Take over a transformers vision model, weights and all.

        Args:
            backbone: A vision model, or a two-tower model such as CLIP, of which the vision tower is taken.
        """
        backbone = getattr(backbone, "vision_model", backbone)
        backbone_config = backbone.config.to_dict()
        image_size = backbone_config.get("image_size") or 224
        image_size = image_size if isinstance(image_size, int) else max(image_size)
        config = VisionConfig(
            backend="transformers",
            name=backbone.config.model_type,
            image_size=image_size,
            backbone_config=backbone_config,
        )
        encoder = cls(config)
        encoder.trunk.load_state_dict(backbone.state_dict())
        encoder.to(backbone.dtype)
        encoder._probe()
        return encoder

    @torch.no_grad()
    def _probe(self) -> None:
        was_training, size = self.training, self.config.image_size
        pixel_values = torch.zeros(1, 3, size, size, dtype=self.dtype, device=self.device)
        features, grid = self.eval()(pixel_values)
        self.train(was_training)
        self.config.hidden_size, self.config.grid_size = features.shape[-1], list(grid)

    def forward(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """Encode pictures.

        Args:
            pixel_values: ``(N, 3, height, width)``, prepared by :meth:`image_processor`.

        Returns:
            Features ``(N, R, D)``, row by row, and the grid.
        """
        pixel_values = pixel_values.to(self.dtype)
        if self.is_sequential:
            return as_grid(self.run_stages(pixel_values, 0), self.config.name)
        output = self.trunk(pixel_values).last_hidden_state
        if output.ndim == 4:
            return as_grid(output, self.config.name)
        if output.ndim != 3:
            raise ValueError(f"backbone {self.config.name!r} gives {tuple(output.shape)}, not a grid of features")
        grid = self._patch_grid(output.shape[1], pixel_values.shape[-2:])
        return VisionFeatures(output[:, -grid[0] * grid[1] :], grid)  # class and register tokens stand in front

    @property
    def is_sequential(self) -> bool:
        """Whether the stages, called one after another, are the whole backbone (see :meth:`run_stages`)."""
        return self.config.backend != "transformers"

    def run_stages(self, states: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor:
        """Run some of the stages of a sequential backbone.

        Args:
            states: What comes out of the stage before ``start``; for 0, pixel values ``(N, 3, height, width)``.
            start: First stage to run.
            stop: Stage to stop before; None runs to the end.

        Returns:
            ``(N, D, rows, columns)``.
        """
        states = states.contiguous(memory_format=torch.channels_last)  # depthwise convolutions take half the time
        for stage in self.stages()[start:stop]:
            for module in stage:
                states = module(states)
        return states

    def _patch_grid(self, tokens: int, size: torch.Size) -> tuple[int, int]:
        patch = getattr(self.trunk.config, "patch_size", None)
        if patch:
            patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
            # Hierarchical models (Swin) merge patches by a power of two before their last stage.
            for merge in (1, 2, 4, 8, 16):
                rows, columns = size[0] // (patch_height * merge), size[1] // (patch_width * merge)
                if rows * columns <= tokens:
                    return rows, columns
        side = int(tokens**0.5)
        return side, side

    def train(self, mode: bool = True) -> VisionEncoder:
        """Set the mode of everything but batch normalisation, which keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def stages(self) -> list[list[nn.Module]]:
        """The backbone's parts in the order in which a picture meets them, the last stage last.

        Torchvision trunks are cut into their outermost blocks, EfficientNet-Lite where the resolution halves: their
        parts, called one after another, are the whole backbone. Transformers models are cut into their outermost layers
        or stages, without what stands before and behind these.
        """
        if self.config.backend == "torchvision":
            return _torchvision_stages(self.trunk)
        if self.config.backend == "efficientnet_lite":
            stages = [[self.trunk._conv_stem, self.trunk._bn0, self.trunk._swish]]
            for block in self.trunk._blocks:
                stride = block._block_args.stride
                if max(stride) > 1 if isinstance(stride, list | tuple) else stride > 1:
                    stages.append([])
                stages[-1].append(block)
            stages[-1] += [self.trunk._conv_head, self.trunk._bn1, self.trunk._swish]
            return stages
        lists = (module for module in self.trunk.modules() if isinstance(module, nn.ModuleList))
        outermost = max(lists, key=_parameter_count, default=self.trunk.children())
        return [[layer] for layer in outermost]

    def image_processor(self) -> Any:
        """The Hugging Face image processor for torchvision and EfficientNet-Lite backbones.

        The whole picture is squeezed to a square: nothing is cropped away, so that the grid covers all of it. For a
        transformers backbone use ``AutoImageProcessor``, which knows what the model was trained with.

        Raises:
            ValueError: For a transformers backbone.
        """
        from transformers import ViTImageProcessor

        if self.config.backend == "transformers":
            raise ValueError("load the backbone's own image processor with AutoImageProcessor.from_pretrained")
        lite = self.config.backend == "efficientnet_lite"
        mean, std = (EFFICIENTNET_LITE_MEAN, EFFICIENTNET_LITE_STD) if lite else (IMAGENET_MEAN, IMAGENET_STD)
        if self.config.name in TORCHVISION_HALF:
            mean = std = [0.5] * 3
        return ViTImageProcessor(
            size={"height": self.config.image_size, "width": self.config.image_size},
            resample=3 if lite else 2,
            image_mean=mean,
            image_std=std,
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # He et al., 2015: deep trunks do not train from a fixed deviation
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
