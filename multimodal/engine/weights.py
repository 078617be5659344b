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
class GateWeights:
    """A dynamic gate's token weight, the norm's weight in it: ``sigmoid(<weight, normed> + bias)``."""

    weight: torch.Tensor  # (D,)
    bias: torch.Tensor  # (1,)


class LayerWeights:
    """One decoder layer, in float32; each matrix is made when it is asked for.

    Args:
        model: The fused model.
        index: Which layer.
        adapter: PEFT's name of the adapter to add, or None.
    """

    def __init__(self, model: FusionForConditionalGeneration, index: int, adapter: str | None = None) -> None:
        self._layer: Any = model.model.language_model.layers[index]
        self._adapter = adapter

    @property
    def attention_norm(self) -> torch.Tensor:
        """``(D,)``, belongs before ``qkv``."""
        return _of(self._layer.input_layernorm)

    @property
    def qkv(self) -> torch.Tensor:
        """``((H + 2K) * C, D)``."""
        attention = self._layer.self_attn
        return _joined([attention.q_proj, attention.k_proj, attention.v_proj], self._adapter)

    @property
    def o(self) -> torch.Tensor:
        """``(D, H * C)``."""
        return matrix(self._layer.self_attn.o_proj, self._adapter)

    @property
    def feed_forward_norm(self) -> torch.Tensor:
        """``(D,)``, belongs before ``gate_up``."""
        return _of(self._layer.post_attention_layernorm)

    @property
    def gate_up(self) -> torch.Tensor:
        """``(2F, D)``."""
        return _joined([self._layer.mlp.gate_proj, self._layer.mlp.up_proj], self._adapter)

    @property
    def down(self) -> torch.Tensor:
        """``(D, F)``."""
        return matrix(self._layer.mlp.down_proj, self._adapter)


class BlockWeights:
    """One cross-attention block, in float32; each matrix is made when it is asked for.

    ``tanh(alpha)`` is in ``o`` and ``down``, and with it a static gate.

    Args:
        model: The fused model.
        index: Which block.
        adapter: PEFT's name of the adapter to add, or None.
    """

    def __init__(self, model: FusionForConditionalGeneration, index: int, adapter: str | None = None) -> None:
        self._block: Any = model.model.cross_attention_blocks[index]
        self._adapter = adapter

    @property
    def attention_norm(self) -> torch.Tensor:
        """``(D,)``, belongs before ``q``."""
        return _of(self._block.attention_norm)

    @property
    def q(self) -> torch.Tensor:
        """``(H * C, D)``."""
        return matrix(self._block.attention.q_proj, self._adapter)

    @property
    def o(self) -> torch.Tensor:
        """``(D, H * C)``."""
        return matrix(self._block.attention.o_proj, self._adapter) * _opening(self._block.attention_gate)

    @property
    def feed_forward_norm(self) -> torch.Tensor:
        """``(D,)``, belongs before ``gate_up``."""
        return _of(self._block.feed_forward_norm)

    @property
    def gate_up(self) -> torch.Tensor:
        """``(2F, D)``."""
        feed_forward = self._block.feed_forward
        return _joined([feed_forward.gate_proj, feed_forward.up_proj], self._adapter)

    @property
    def down(self) -> torch.Tensor:
        """``(D, F)``."""
        return matrix(self._block.feed_forward.down_proj, self._adapter) * _opening(self._block.feed_forward_gate)

    @property
    def attention_gate(self) -> GateWeights | None:
        """None for a static gate."""
        return _gate(self._block.attention_gate, self.attention_norm, self._adapter)

    @property
    def feed_forward_gate(self) -> GateWeights | None:
        """Likewise."""
        return _gate(self._block.feed_forward_gate, self.feed_forward_norm, self._adapter)


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


def _opening(gate: TanhGate) -> torch.Tensor:
    return _float(gate.alpha).tanh()[:, None]


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
