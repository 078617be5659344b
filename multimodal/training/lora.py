"""LoRA: which layers of a fused model get low-rank additions, and how they become part of its decoder.

A layer is chosen by its full name. "q_proj" alone would also be found in a vision tower, in the resampler and in the
cross-attention blocks. On the decoder, only layers from the first with a block on are chosen: below it nothing depends
on a picture, and gradients end there.

What always holds: no random number is drawn but by the seed, and none while training (no dropout), so that a run which
goes on after an interruption ends as an uninterrupted one.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from multimodal.adapters import attach, detach, layers_of, train_adapter, weights_of
from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.low_rank import LowRank

DECODER = r"model\.language_model\.layers\.(\d+)\.(self_attn|mlp)\.\w+_proj"
BLOCKS = r"model\.cross_attention_blocks\.\d+\.(attention|feed_forward)\.\w+_proj"
RESAMPLER = r"model\.resampler\.(input_proj|layers\.\d+\.(attention|feed_forward)\.\w+_proj)"
DECODER_NAME = "decoder"  # of the adapter, while it is trained
SCALE = 2.0  # of the additions: their rate of learning is that of the other parts


def linear_layers(model: nn.Module, pattern: str) -> list[str]:
    """Full names of the linear layers that a pattern matches as a whole."""
    return [
        name
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name) and isinstance(getattr(module, "base_layer", module), nn.Linear)
    ]


def decoder_layers(model: FusionForConditionalGeneration) -> list[str]:
    """Projections of attention and feed-forward of the decoder's layers from the first with a block on."""
    first = model.config.cross_attention_layers[0]
    found = linear_layers(model, DECODER)
    return [name for name in found if int(re.fullmatch(DECODER, name)[1]) >= first]  # type: ignore[index]


def add_to_decoder(model: FusionForConditionalGeneration, rank: int, *, seed: int) -> list[str]:
    """Give the decoder LoRA that is trained beside what is trained already.

    Args:
        model: The fused model.
        rank: Of the additions.
        seed: Of their first values.

    Returns:
        Full names of the layers.

    Raises:
        ValueError: If the decoder has no layer of the kind, or is trained as a whole.
        AdapterError: If PEFT is missing.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError("--lora-rank: this decoder has no projections that are called as Llama's are")
    if model.get_submodule(layers[0]).weight.requires_grad:
        raise ValueError("--lora-rank: the whole decoder is trained, so additions to it would learn nothing more")
    attach(model, layers, name=DECODER_NAME, rank=rank, scale=SCALE, seed=seed)
    train_adapter(model, DECODER_NAME)
    return layers


@torch.no_grad()
def make_part_of_decoder(model: FusionForConditionalGeneration) -> None:
    """Add the decoder's LoRA to its weights, and note it as ``model.decoder_adapter``, which a checkpoint holds."""
    attached = weights_of(model, DECODER_NAME)
    pairs = {name: (a.detach().float().clone(), b.detach().float().clone()) for name, (a, b) in attached.pairs.items()}
    learnt = LowRank(pairs, attached.scale)
    for name, layer in layers_of(model, DECODER_NAME).items():
        weight = layer.base_layer.weight
        weight.copy_(weight.float() + learnt.delta(name))
    detach(model, DECODER_NAME)
    before = model.decoder_adapter
    model.decoder_adapter = learnt if before is None else before.and_then(learnt)
