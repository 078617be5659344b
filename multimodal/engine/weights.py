"""A fused model's weights as a flat list of matrices: what a runner packs, in whatever precision.

What can be computed once is: static gates and the query norm are folded into the matrices next to them, queries, keys
and values are one matrix, and so are gate and up projection. Norm weights stand beside the matrices that they belong
to, and a runner folds them in where that costs no precision. An adapter's low-rank product is added to the layers that
it is for. Nothing of the model is changed, and only one layer at a time is held in float32.

Axes: D width, H heads, K key/value heads, C width of a head, F width of the feed-forward, M blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.gates import DynamicGate, TanhGate


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, in float32.

    Attributes:
        attention_norm: ``(D,)``, belongs before ``qkv``.
        qkv: ``((H + 2K) * C, D)``.
        o: ``(D, H * C)``.
        feed_forward_norm: ``(D,)``, belongs before ``gate_up``.
        gate_up: ``(2F, D)``.
        down: ``(D, F)``.
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    feed_forward_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class GateWeights:
    """A dynamic gate's token weight, the norm's weight in it: ``sigmoid(<weight, normed> + bias)``."""

    weight: torch.Tensor  # (D,)
    bias: torch.Tensor  # (1,)


@dataclass(frozen=True)
class BlockWeights:
    """One cross-attention block, in float32; ``tanh(alpha)`` is in ``o`` and ``down``.

    Attributes:
        attention_norm: ``(D,)``, belongs before ``q``.
        q: ``(H * C, D)``.
        o: ``(D, H * C)``.
        feed_forward_norm: ``(D,)``, belongs before ``gate_up``.
        gate_up: ``(2F, D)``.
        down: ``(D, F)``.
        attention_gate: None for a static gate, which is in ``o``.
        feed_forward_gate: Likewise.
    """

    attention_norm: torch.Tensor
    q: torch.Tensor
    o: torch.Tensor
    feed_forward_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    attention_gate: GateWeights | None
    feed_forward_gate: GateWeights | None


def obstacle(model: FusionForConditionalGeneration) -> str | None:
    """Why a model cannot be run from flat weights, or None where it can: a plain Llama decoder."""
    text = model.config.text_config
    if text.model_type != "llama":
        return f"its decoder is a {text.model_type}"
    if getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False):
        return "its decoder has biases"
    if text.hidden_act != "silu":
        return f"its decoder's activation is {text.hidden_act}"
    if text.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"its decoder's positions are of the kind {text.rope_parameters['rope_type']}"
    return None


def touches_decoder(model: FusionForConditionalGeneration, adapter: str | None) -> bool:
    """Whether an adapter, by PEFT's name, adds to the decoder's own layers."""
    parts = (model.model.language_model, model.lm_head)
    return any(adapter in getattr(module, "lora_A", {}) for part in parts for module in part.modules())


def layer_weights(model: FusionForConditionalGeneration, index: int, adapter: str | None = None) -> LayerWeights:
    """The weights of a decoder layer.

    Args:
        model: The fused model.
        index: Which layer.
        adapter: PEFT's name of the adapter to add, or None.
    """
    layer: Any = model.model.language_model.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=_of(layer.input_layernorm),
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj], adapter),
        o=matrix(attention.o_proj, adapter),
        feed_forward_norm=_of(layer.post_attention_layernorm),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj], adapter),
        down=matrix(mlp.down_proj, adapter),
    )


def block_weights(model: FusionForConditionalGeneration, index: int, adapter: str | None = None) -> BlockWeights:
    """The weights of a cross-attention block; see :func:`layer_weights`."""
    block: Any = model.model.cross_attention_blocks[index]
    norms = _of(block.attention_norm), _of(block.feed_forward_norm)
    openings = [_float(gate.alpha).tanh()[:, None] for gate in (block.attention_gate, block.feed_forward_gate)]
    feed_forward = block.feed_forward
    return BlockWeights(
        attention_norm=norms[0],
        q=matrix(block.attention.q_proj, adapter),
        o=matrix(block.attention.o_proj, adapter) * openings[0],
        feed_forward_norm=norms[1],
        gate_up=_joined([feed_forward.gate_proj, feed_forward.up_proj], adapter),
        down=matrix(feed_forward.down_proj, adapter) * openings[1],
        attention_gate=_gate(block.attention_gate, norms[0], adapter),
        feed_forward_gate=_gate(block.feed_forward_gate, norms[1], adapter),
    )


def head_norm(model: FusionForConditionalGeneration) -> torch.Tensor:
    """The final norm's weight ``(D,)`` in float32; it belongs before the head."""
    return _of(model.model.language_model.norm)


def query_norms(model: FusionForConditionalGeneration) -> torch.Tensor | None:
    """Weights of the blocks' query norms ``(M, C)``, to be multiplied into the cross keys; None without such norms."""
    if not model.config.qk_norm:
        return None
    blocks: Any = model.model.cross_attention_blocks
    return torch.stack([_of(block.attention.q_norm) for block in blocks])


@torch.no_grad()
def rotary_tables(model: FusionForConditionalGeneration, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``(positions, C)`` of the decoder's own rotary embedding, in float32."""
    rotary: Any = model.model.language_model.rotary_emb
    device = rotary.inv_freq.device
    like = torch.empty(1, dtype=torch.float32, device=device)
    cos, sin = rotary(like, torch.arange(positions, device=device)[None])
    return cos[0].float(), sin[0].float()


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float()


def _of(norm: Any) -> torch.Tensor:
    return _float(norm.weight)


def _gate(gate: TanhGate, norm: torch.Tensor, adapter: str | None) -> GateWeights | None:
    if not isinstance(gate, DynamicGate):
        return None
    bias = getattr(gate.token_weight, "base_layer", gate.token_weight).bias
    return GateWeights(matrix(gate.token_weight, adapter)[0] * norm, _float(bias))


def matrix(linear: Any, adapter: str | None, rows: slice = slice(None)) -> torch.Tensor:
    """Some rows of a linear layer's matrix in float32, the adapter's low-rank product added to them."""
    weight = _float(getattr(linear, "base_layer", linear).weight[rows])
    if adapter in getattr(linear, "lora_A", {}):
        product = _float(linear.lora_B[adapter].weight[rows]) @ _float(linear.lora_A[adapter].weight)
        weight = weight + linear.scaling[adapter] * product
    return weight


def _joined(linears: Sequence[Any], adapter: str | None) -> torch.Tensor:
    return torch.cat([matrix(linear, adapter) for linear in linears])
