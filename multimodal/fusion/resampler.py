"""RegionResampler: a grid of image features becomes a few region tokens.

Learned queries attend over the encoder's grid; positions are 2-D, so that "left" and "top" can be read from a region
token. Each query starts with a place of its own on the picture and a Gaussian around it: without that, all queries
begin by averaging the whole grid and were seen to stay there, one constant for every picture. The attention map of the
last layer says which part of the grid each region token stands for. It knows nothing about text.

Axes: N images, R grid cells, L region tokens, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from multimodal.fusion.cross_attention import CrossAttention, FeedForward

if TYPE_CHECKING:
    from multimodal.fusion.configuration import FusionConfig


def position_embedding_2d(grid: tuple[int, int], width: int, *, like: torch.Tensor) -> torch.Tensor:
    """Fixed sine-cosine embedding of a grid; half of the width tells the row, half the column.

    Source: Vaswani et al., 2017, section 3.5, in two dimensions as in Chen et al., "MoCo v3", 2021, appendix.
    Coordinates run from 0 to 1 (times 64), so that any grid covers the same picture.

    Args:
        grid: Rows and columns.
        width: ``D``, a multiple of 4.
        like: A tensor whose dtype and device the result takes.

    Returns:
        ``(rows * columns, D)``, row by row.
    """
    rows, columns = grid
    frequencies = 100.0 ** -(torch.arange(width // 4, device=like.device) / (width // 4))  # (D/4,)

    def encode(count: int) -> torch.Tensor:
        centres = (torch.arange(count, device=like.device) + 0.5) / count * 64
        angles = centres[:, None] * frequencies  # (count, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (count, D/2)

    row = encode(rows)[:, None, :].expand(rows, columns, -1)
    column = encode(columns)[None, :, :].expand(rows, columns, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1).to(like.dtype)  # (R, D)


def grid_centres(grid: tuple[int, int], *, like: torch.Tensor) -> torch.Tensor:
    """Where the cells of a grid lie: ``(rows * columns, 2)``, row and column from 0 to 1, row by row."""
    rows, columns = ((torch.arange(count, device=like.device) + 0.5) / count for count in grid)
    return torch.cartesian_prod(rows, columns).to(like.dtype)


class ResamplerLayer(nn.Module):
    """Queries attend over the grid, then a feed-forward; both pre-norm with a residual."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.resampler_hidden_size
        self.attention_norm = LlamaRMSNorm(width)
        self.attention = CrossAttention(
            hidden_size=width,
            source_size=width,
            num_heads=config.resampler_heads,
            num_key_value_heads=config.resampler_heads,
        )
        self.feed_forward_norm = LlamaRMSNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)

    def forward(
        self, latents: torch.Tensor, source: torch.Tensor, place: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Refine ``(N, L, D)`` from ``(N, R, D)``.

        Args:
            latents: ``(N, L, D)``.
            source: ``(N, R, D)``.
            place: ``(1, 1, L, R)``, added to the attention scores.
            output_attentions: Return the attention map as well.

        Returns:
            The refined latents and the attention map ``(N, L, R)``, or None.
        """
        keys, values = self.attention.keys_values(source)
        attended, attention_map = self.attention(
            self.attention_norm(latents), keys, values, place, output_attentions=output_attentions
        )
        latents = latents + attended
        return latents + self.feed_forward(self.feed_forward_norm(latents)), attention_map


class RegionResampler(nn.Module):
    """Learned queries that turn grid features into region tokens.

    Source: the Perceiver resampler of Alayrac et al., "Flamingo", 2022, section 3.1.1, with 2-D positions on the grid
    and the Gaussian spatial prior of Gao et al., "Fast convergence of DETR with spatially modulated co-attention",
    2021, section 3.2: to the score of query ``l`` and cell ``r`` is added ``-|place_l - centre_r|^2 / (2 spread_l^2)``.

    Args:
        config: The fused model's configuration (``num_latents``, ``resampler_*``).
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.resampler_hidden_size
        self.latents = nn.Parameter(torch.empty(config.num_latents, width))
        self.places = nn.Parameter(torch.empty(config.num_latents, 2))  # row and column, 0 to 1
        self.log_spreads = nn.Parameter(torch.empty(config.num_latents))
        self.input_norm = LlamaRMSNorm(config.vision_config.hidden_size)
        self.input_proj = nn.Linear(config.vision_config.hidden_size, width)
        self.source_norm = LlamaRMSNorm(width)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.resampler_layers))
        self.output_norm = LlamaRMSNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries spread evenly over the picture, and region tokens that tell pictures apart from the first step on.

        Projections keep the scale of what they read and the feed-forward starts at zero. With the decoder's small
        deviation (0.02) a region token begins faint, and the first steps of Adam drown it in one constant.
        """
        count = len(self.latents)
        columns = math.ceil(math.sqrt(count))
        places = grid_centres((math.ceil(count / columns), columns), like=self.places)[:count]
        init.normal_(self.latents, std=0.02)
        init.copy_(self.places, places)
        init.constant_(self.log_spreads, -math.log(columns))  # as wide as the distance between two queries
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=module.in_features**-0.5)
        init.zeros_(self.input_proj.bias)
        for layer in self.layers:
            init.zeros_(layer.feed_forward.down_proj.weight)

    def forward(
        self, features: torch.Tensor, grid: tuple[int, int], output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Resample.

        Args:
            features: ``(N, R, D_vision)``, grid features, row by row.
            grid: Rows and columns, ``rows * columns == R``.
            output_attentions: Return the map as well.

        Returns:
            Region tokens ``(N, L, D)`` and the last layer's attention map ``(N, L, R)``, or None.
        """
        source = self.input_proj(self.input_norm(features))  # (N, R, D)
        source = self.source_norm(source) + position_embedding_2d(grid, source.shape[-1], like=source)
        latents = self.latents.expand(features.shape[0], -1, -1)  # (N, L, D)
        distances = (self.places[:, None] - grid_centres(grid, like=self.places)).square().sum(-1)  # (L, R)
        place = (-0.5 * distances * (-2 * self.log_spreads[:, None]).exp()).to(source.dtype)[None, None]  # (1, 1, L, R)
        attention_map = None
        for layer in self.layers:
            latents, attention_map = layer(latents, source, place, output_attentions)
        return self.output_norm(latents), attention_map
