"""Gated cross-attention: where text tokens read region tokens.

One block stands before a decoder layer: norm, cross-attention, gate, residual; norm, feed-forward, gate, residual.
What always holds: a token that sees no image leaves the block with exactly the bits it came with, whatever the gates,
because BOTH branches are set to zero for it. A block keeps nothing between calls: what belongs to one forward pass
travels in :class:`VisionContext`, and keys and values live in the generation cache.

Axes: B batch, T text tokens, I images, L region tokens per image, S = I * L, D width, H heads, K key/value heads,
C width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from multimodal.fusion.gates import GATES

if TYPE_CHECKING:
    from multimodal.fusion.cache import FusionCache
    from multimodal.fusion.configuration import FusionConfig


@dataclass
class BlockRecord:
    """What one block did in one forward pass, kept only when a trace is asked for; gradients flow through it.

    Attributes:
        attention_gate: ``(B, T)``, openness of the attention gate, 0 where a token sees no image.
        feed_forward_gate: ``(B, T)``, openness of the feed-forward gate, likewise.
        attention: ``(B, T, S)``, attention over region tokens, mean of the heads, 0 where a token sees no image.
    """

    attention_gate: torch.Tensor
    feed_forward_gate: torch.Tensor
    attention: torch.Tensor


@dataclass
class VisionContext:
    """What the blocks need in one forward pass.

    Attributes:
        image_states: ``(B, S, D_v)``, region tokens that are new in this pass; None when all are in the cache.
        visible: ``(B, T, S)`` boolean, True where a token sees a region token (cached ones first).
        cache: Where cross keys and values are kept, or None.
        records: One :class:`BlockRecord` per block, appended in order, when a trace is asked for.
    """

    image_states: torch.Tensor | None
    visible: torch.Tensor
    cache: FusionCache | None = None
    records: list[BlockRecord] | None = None
    sees_image: torch.Tensor = field(init=False)  # (B, T, 1)
    attention_mask: torch.Tensor = field(init=False)  # (B, 1, T, S)

    def __post_init__(self) -> None:
        """Derive the masks once for all blocks."""
        self.sees_image = self.visible.any(-1, keepdim=True)
        # Softmax over nothing is NaN: a token that sees nothing attends to everything, and its result is discarded.
        self.attention_mask = (self.visible | ~self.sees_image).unsqueeze(1)


def visible_images(ordinals: torch.Tensor, images_before: torch.Tensor, visibility: str) -> torch.Tensor:
    """Tell which images each token sees.

    Args:
        ordinals: ``(B, I)``, 1 for a row's first image, 2 for its second; 0 for padding.
        images_before: ``(B, T)``, how many image placeholders stand at or before each token.
        visibility: ``"all_previous"`` or ``"latest"``.

    Returns:
        ``(B, T, I)`` boolean.
    """
    slots = ordinals[:, None, :]  # (B, 1, I)
    before = images_before[:, :, None]  # (B, T, 1)
    if visibility == "latest":
        return (slots > 0) & (slots == before.minimum(slots.amax(-1, keepdim=True)))
    return (slots > 0) & (slots <= before)


class CrossAttention(nn.Module):
    """Multi-head cross-attention with optional query/key norm and grouped key/value heads.

    Args:
        hidden_size: Width ``D`` of the queries and of the result.
        source_size: Width of what is attended to.
        num_heads: Query heads ``H``.
        num_key_value_heads: Key/value heads ``K``; divides ``H``.
        qk_norm: RMSNorm over each head's queries and keys.
        eps: Epsilon of the norms.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        source_size: int,
        num_heads: int,
        num_key_value_heads: int,
        qk_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or num_heads % num_key_value_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}, "
                f"and num_heads a multiple of num_key_value_heads={num_key_value_heads}"
            )
        self.head_dim = hidden_size // num_heads
        self.groups = num_heads // num_key_value_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(source_size, num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(source_size, num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, length, C)

    def keys_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project ``(B, S, source_size)`` to keys and values, each ``(B, K, S, C)``."""
        return self.k_norm(self._heads(self.k_proj(source))), self._heads(self.v_proj(source))

    def forward(
        self,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``(B, T, D)``.
            keys: ``(B, K, S, C)``, from :meth:`keys_values`.
            values: ``(B, K, S, C)``, likewise.
            attention_mask: ``(B, 1, T, S)``: boolean, True where a query may look, at least once in every row; or what
                is added to the scores.
            output_attentions: Compute step by step and return the attention map as well.

        Returns:
            The result ``(B, T, D)`` and the attention map ``(B, T, S)``, mean of the heads, or None.
        """
        queries = self.q_norm(self._heads(self.q_proj(hidden_states)))  # (B, H, T, C)
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        attention_map = None
        if output_attentions:
            keys, values = (x.repeat_interleave(self.groups, dim=1) for x in (keys, values))  # (B, H, S, C)
            scores = queries @ keys.transpose(-1, -2) * self.head_dim**-0.5  # (B, H, T, S)
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attention_mask, float("-inf"))
            elif attention_mask is not None:
                scores = scores + attention_mask
            weights = scores.softmax(-1, dtype=torch.float32)
            attention_map = weights.mean(1)  # (B, T, S)
            attended = weights.to(values.dtype) @ values  # (B, H, T, C)
        else:
            if attention_mask is not None and attention_mask.dtype != torch.bool:
                attention_mask = attention_mask.to(queries.dtype)
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=attention_mask, enable_gqa=self.groups > 1
            )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), attention_map


class FeedForward(nn.Module):
    """SwiGLU feed-forward, the decoder's own kind. Source: Shazeer, "GLU variants improve transformer", 2020."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map ``(..., D)`` to ``(..., D)``."""
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and feed-forward, each behind a gate that starts shut.

    Source: Alayrac et al., "Flamingo", 2022, section 3.1.2; query/key norm and grouped heads as in Llama 3.2 Vision.

    Args:
        config: The fused model's configuration.
        block_index: The block's place among the blocks, and its index in the cross-attention cache.
    """

    def __init__(self, config: FusionConfig, block_index: int) -> None:
        super().__init__()
        text = config.text_config
        eps = getattr(text, "rms_norm_eps", 1e-6)
        gate = GATES[config.gate]
        self.config = config
        self.block_index = block_index
        self.attention_norm = LlamaRMSNorm(text.hidden_size, eps=eps)
        self.attention = CrossAttention(
            hidden_size=text.hidden_size,
            source_size=config.resampler_hidden_size,
            num_heads=config.cross_attention_heads,
            num_key_value_heads=config.cross_attention_key_value_heads,
            qk_norm=config.qk_norm,
            eps=eps,
        )
        self.attention_gate = gate(text.hidden_size, config.gate_per_channel)
        self.feed_forward_norm = LlamaRMSNorm(text.hidden_size, eps=eps)
        self.feed_forward = FeedForward(text.hidden_size, config.cross_intermediate_size, text.hidden_act)
        self.feed_forward_gate = gate(text.hidden_size, config.gate_per_channel)

    def forward(self, hidden_states: torch.Tensor, context: VisionContext) -> torch.Tensor:
        """Let the tokens of ``(B, T, D)`` read the images they see; the result has the same shape and dtype."""
        keys, values = self._keys_values(context)
        tracing = context.records is not None
        eager = tracing or self.config.text_config._attn_implementation == "eager"
        unseen = ~context.sees_image

        normed = self.attention_norm(hidden_states)
        branch, attention_map = self.attention(normed, keys, values, context.attention_mask, output_attentions=eager)
        branch, attention_openness = self.attention_gate(branch, normed)
        hidden_states = hidden_states + branch.to(hidden_states.dtype).masked_fill(unseen, 0)

        normed = self.feed_forward_norm(hidden_states)
        branch, feed_forward_openness = self.feed_forward_gate(self.feed_forward(normed), normed)
        hidden_states = hidden_states + branch.to(hidden_states.dtype).masked_fill(unseen, 0)

        if context.records is not None:
            context.records.append(
                BlockRecord(
                    attention_gate=attention_openness.float().masked_fill(unseen.squeeze(-1), 0),
                    feed_forward_gate=feed_forward_openness.float().masked_fill(unseen.squeeze(-1), 0),
                    attention=attention_map.masked_fill(unseen, 0),
                )
            )
        return hidden_states

    def _keys_values(self, context: VisionContext) -> tuple[torch.Tensor, torch.Tensor]:
        new = None if context.image_states is None else self.attention.keys_values(context.image_states)
        if context.cache is not None:
            return context.cache.update_cross(self.block_index, new)
        assert new is not None  # without a cache there is a context only where there are new images
        return new
