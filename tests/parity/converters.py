"""Weights of published gated cross-attention, renamed for ours.

One function per published implementation; each takes a state dict and gives the state dict that
`GatedCrossAttentionBlock.load_state_dict` takes whole (`strict=True`), so that no weight can be left out unseen.
"""

import re
from collections.abc import Mapping, Sequence

import torch

State = dict[str, torch.Tensor]

MLLAMA_BLOCK = {
    "cross_attn_attn_gate": "attention_gate.alpha",
    "cross_attn_mlp_gate": "feed_forward_gate.alpha",
    "cross_attn": "attention",
    "input_layernorm": "attention_norm",
    "mlp": "feed_forward",
    "post_attention_layernorm": "feed_forward_norm",
}
IDEFICS_BLOCK = {
    "alpha_cross_attn": "attention_gate.alpha",
    "alpha_dense": "feed_forward_gate.alpha",
    "cross_attn.q_layer_norm": "attention.q_norm",
    "cross_attn.k_layer_norm": "attention.k_norm",
    "cross_attn": "attention",
    "input_layernorm": "attention_norm",
    "mlp": "feed_forward",
    "post_attention_layernorm": "feed_forward_norm",
}


def renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> State:
    """Replaces the beginning of every key by the first entry of ``names`` that fits it, up to a dot or the end."""
    pattern = re.compile(rf"^({'|'.join(map(re.escape, names))})(?=\.|$)")
    return {pattern.sub(lambda found: names[found[1]], key): value for key, value in state.items()}


def from_mllama_layer(state: Mapping[str, torch.Tensor]) -> State:
    """Converts transformers' `MllamaCrossAttentionDecoderLayer`: every weight has its counterpart."""
    return renamed(state, MLLAMA_BLOCK)


def from_idefics_layer(state: Mapping[str, torch.Tensor]) -> State:
    """Converts transformers' `IdeficsGatedCrossAttentionLayer`; its ``(1, 1, D)`` gates lose their leading axes."""
    ours = renamed(state, IDEFICS_BLOCK)
    return {key: value.flatten() if key.endswith("alpha") else value for key, value in ours.items()}


def from_flamingo_pytorch_attention(state: Mapping[str, torch.Tensor]) -> State:
    """Converts flamingo-pytorch's `MaskedCrossAttention` for our `CrossAttention`, its input LayerNorm left out."""
    keys, values = state["to_kv.weight"].chunk(2)
    return {
        "q_proj.weight": state["to_q.weight"],
        "k_proj.weight": keys,
        "v_proj.weight": values,
        "o_proj.weight": state["to_out.weight"],
    }


def from_mllama_text(state: Mapping[str, torch.Tensor], cross_layers: Sequence[int]) -> tuple[State, list[State]]:
    """Converts transformers' `MllamaTextModel` to a `LlamaModel` and our blocks.

    Mllama counts its cross-attention layers among the decoder's; ours stand beside them, so the other layers move down.

    Args:
        state: The published model's weights.
        cross_layers: Mllama's ``cross_attention_layers``.

    Returns:
        The decoder's weights, and one block's weights for each cross layer, in order.
    """
    decoder: State = {}
    blocks: list[State] = [{} for _ in cross_layers]
    for key, value in state.items():
        found = re.match(r"layers\.(\d+)\.(.+)", key)
        if found is None:
            decoder[key] = value
        elif (layer := int(found[1])) in cross_layers:
            blocks[list(cross_layers).index(layer)][found[2]] = value
        else:
            decoder[f"layers.{decoder_layer(layer, cross_layers)}.{found[2]}"] = value
    return decoder, [from_mllama_layer(block) for block in blocks]


def decoder_layer(layer: int, cross_layers: Sequence[int]) -> int:
    """Returns the decoder layer that Mllama's layer is, or before which it stands if it is a cross layer."""
    return layer - sum(cross < layer for cross in cross_layers)
