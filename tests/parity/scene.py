"""The scene that every published block is compared on: rows of text with pictures among it, and open gates.

Axes: B batch, T text tokens, I images, L region tokens per image, S = I * L, D width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig

from multimodal.fusion.configuration import FusionConfig
from multimodal.fusion.cross_attention import VisionContext, visible_images

WIDTH, HEADS, INNER, REGIONS = 64, 4, 112, 3
LIMIT = 1e-5


@dataclass(frozen=True)
class Scene:
    """Text states, region tokens, and which token sees which.

    Attributes:
        hidden_states: ``(B, T, D)``.
        regions: ``(B, I, L, D)``.
        placeholders: ``(B, T)`` boolean, True where a picture stands in the text.
        visible: ``(B, T, S)`` boolean.
    """

    hidden_states: torch.Tensor
    regions: torch.Tensor
    placeholders: torch.Tensor
    visible: torch.Tensor

    @property
    def sees_image(self) -> torch.Tensor:
        """``(B, T)`` boolean, True for a token that sees any image."""
        return self.visible.any(-1)

    @property
    def context(self) -> VisionContext:
        """What our block takes."""
        return VisionContext(image_states=self.regions.flatten(1, 2), visible=self.visible)

    @property
    def additive_mask(self) -> torch.Tensor:
        """``(B, 1, T, S)``, as transformers' blocks take it."""
        return additive(self.visible)


def additive(visible: torch.Tensor) -> torch.Tensor:
    """Turns ``(B, T, S)`` into ``(B, 1, T, S)``: 0 where a token sees, the lowest number where it does not."""
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


def make_scene(visibility: str) -> Scene:
    """Draws three rows of 9 tokens: a picture at 1 and at 5; at 0 and at 1; and at 3 with no second one."""
    generator = torch.Generator().manual_seed(1)
    placeholders = torch.zeros(3, 9, dtype=torch.bool)
    placeholders[[0, 0, 1, 1, 2], [1, 5, 0, 1, 3]] = True
    ordinals = torch.tensor([[1, 2], [1, 2], [1, 0]])
    visible = visible_images(ordinals, placeholders.cumsum(-1), visibility)  # (B, T, I)
    return Scene(
        hidden_states=torch.randn(3, 9, WIDTH, generator=generator),
        regions=torch.randn(3, 2, REGIONS, WIDTH, generator=generator),
        placeholders=placeholders,
        visible=visible.repeat_interleave(REGIONS, -1),  # (B, T, S)
    )


def fusion_config(*, key_value_heads: int = HEADS, qk_norm: bool, per_channel: bool) -> FusionConfig:
    """Configures a block of ours with static gates, at the sizes that the published blocks are built with."""
    text = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=2,
        vocab_size=32,
        intermediate_size=INNER,
    )
    return FusionConfig(
        text_config=text, gate="tanh", gate_per_channel=per_channel, qk_norm=qk_norm, cross_intermediate_size=INNER
    )


def randomise(module: nn.Module) -> None:
    """Draws every weight anew, so that norms are not 1 and gates are open: half of them negative, none near zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "alpha" in name or "gate" in name.rpartition(".")[2]:
                weight.copy_(noise.sign() * (0.5 + noise.abs()))
            elif weight.dim() == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)


def assert_same(ours: torch.Tensor, published: torch.Tensor) -> None:
    """Fails with the largest difference where it is more than the limit."""
    difference = (ours - published).abs().max().item()
    assert difference <= LIMIT, f"largest difference {difference:.2e}, allowed {LIMIT:.0e}"
