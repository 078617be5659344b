"""The frozen prefix of a row: what no picture and no trained weight can change.

Tokens in front of a row's first picture see none, so with a frozen decoder their keys and values are constants. And as
no block stands before the first cross-attention layer, the states with which the rest of the row enters that layer are
constants too. Given both, only the layers from there on have to be run, over the rest of the row, the suffix. What
always holds: the suffix leaves with the numbers that it has in a forward pass over the whole row, its gradients too.

This file knows nothing of where the constants are kept (see ``training/prefix.py``).

Axes: B batch, N decoder layers from the first with a block on, K key/value heads, P prefix tokens, T suffix tokens,
C width of a head, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

if TYPE_CHECKING:
    from multimodal.fusion.cross_attention import VisionContext


@dataclass(frozen=True)
class PrefixStates:
    """The constants of rows, as :meth:`FusionModel.forward` takes them.

    Attributes:
        states: ``(B, T, D)``, the suffix as it enters the first layer with a block.
        keys: ``(B, N, K, P, C)``, the prefix's keys; rows with a shorter prefix are padded on the left.
        values: ``(B, N, K, P, C)``, likewise.
    """

    states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def prefix_obstacle(language_model: Any) -> str | None:
    """Why a decoder's layers can not be run over a suffix alone; None if they can.

    Checked is what :func:`run_suffix` relies on: Llama's call signature, full attention in every layer, a mask that is
    a tensor, and layers that compute the same each time.
    """
    config, layers = language_model.config, language_model.layers
    expected = list(inspect.signature(LlamaDecoderLayer.forward).parameters)
    for kind in {type(layer) for layer in layers}:
        if list(inspect.signature(kind.forward).parameters) != expected:
            return f"a {kind.__name__} is not called as Llama's layers are"
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return "gradient checkpointing drops the keys and values of the prefix"
    rotary = getattr(language_model, "rotary_emb", None)
    if rotary is None or list(inspect.signature(rotary.forward).parameters)[:2] != ["x", "position_ids"]:
        return f"{type(language_model).__name__} has no rotary embedding like Llama's"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "not all of its layers have full attention"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no mask of this kind: use sdpa or eager"
    if getattr(config, "attention_dropout", 0):
        return "attention_dropout makes its layers compute something else each time"
    return None


def run_suffix(
    language_model: Any,
    prefix: PrefixStates,
    *,
    first: int,
    attention_mask: torch.Tensor | None,
    vision_context: VisionContext | None,
) -> torch.Tensor:
    """Run a decoder's layers from ``first`` on, and its last norm, over the suffix.

    Args:
        language_model: The decoder, without its head.
        prefix: What is known already.
        first: The layer that ``prefix.states`` enter; layers before it are not run.
        attention_mask: ``(B, P + T)``, 1 for tokens, 0 for padding: of prefixes on the left, of suffixes on the right.
        vision_context: What the blocks need.

    Returns:
        ``(B, T, D)``.

    Raises:
        ValueError: If this decoder can not be run so, or shapes do not fit each other.
    """
    obstacle = prefix_obstacle(language_model)
    if obstacle is not None:
        raise ValueError(f"this decoder can not go on behind a prefix: {obstacle}")
    states, layers = prefix.states, language_model.layers[first:]
    (batch, length), past = states.shape[:2], prefix.keys.shape[3]
    if prefix.keys.shape != prefix.values.shape or prefix.keys.shape[:2] != (batch, len(layers)):
        raise ValueError(
            f"prefix keys {tuple(prefix.keys.shape)} and values {tuple(prefix.values.shape)} must be alike and start "
            f"with ({batch}, {len(layers)}): rows, and decoder layers from {first} on"
        )
    if attention_mask is None:
        attention_mask = torch.ones(batch, past + length, dtype=torch.long, device=states.device)
    if attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must be {(batch, past + length)}: prefix and suffix"
        )
    kept = attention_mask.bool()

    cache = DynamicCache()
    for index, (keys, values) in enumerate(zip(prefix.keys.unbind(1), prefix.values.unbind(1), strict=True), first):
        cache.update(keys.to(states.dtype), values.to(states.dtype), index)

    # A token's place is counted from its row's own first token: a prefix is padded on the left.
    position_ids = kept[:, :past].sum(-1, keepdim=True) + torch.arange(length, device=states.device)  # (B, T)
    position_embeddings = language_model.rotary_emb(states, position_ids)
    mask = _suffix_mask(kept, past, states.dtype, eager=language_model.config._attn_implementation == "eager")
    for layer in layers:
        states = layer(
            states,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=position_embeddings,
            vision_context=vision_context,
        )
    return language_model.norm(states)


def _suffix_mask(kept: torch.Tensor, past: int, dtype: torch.dtype, *, eager: bool) -> torch.Tensor:
    """Which of prefix and suffix ``(B, P + T)`` each token of the suffix sees: ``(B, 1, T, P + T)``.

    Boolean for sdpa; eager attention adds it to its scores.
    """
    columns = torch.arange(kept.shape[1], device=kept.device)
    rows = columns[past:, None]
    # Padding sees itself too: softmax over nothing is NaN.
    visible = (columns <= rows) & kept[:, None] | (columns == rows)  # (B, T, P + T)
    if not eager:
        return visible[:, None]
    return torch.zeros(visible.shape, dtype=dtype, device=kept.device).masked_fill(~visible, torch.finfo(dtype).min)[
        :, None
    ]
