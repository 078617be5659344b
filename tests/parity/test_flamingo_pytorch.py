"""Our attention and block against PyPI's flamingo-pytorch, in both of its visibility modes.

What is shared: projections, mask, softmax, gates, residuals. What differs by design: flamingo-pytorch has LayerNorm
where we have RMSNorm, and a GELU feed-forward where ours is SwiGLU. The attention is compared alone, behind the
published LayerNorm; the block is compared with the published norms and feed-forward put in the place of ours.

For a token that sees no picture, flamingo-pytorch sets the attention to zero only where it looks at the nearest
picture (`only_attend_immediate_media=True`); elsewhere it attends to every region alike, and its feed-forward always
changes the token. Such tokens are compared only where both mean the same.
"""

import pytest
import torch
from torch import nn

from multimodal.fusion.cross_attention import CrossAttention, GatedCrossAttentionBlock

from .converters import from_flamingo_pytorch_attention
from .scene import HEADS, WIDTH, assert_same, fusion_config, make_scene, randomise

flamingo_pytorch = pytest.importorskip("flamingo_pytorch", reason="install the extra 'test' for this comparison")

MODES = pytest.mark.parametrize(
    ("visibility", "immediate"), [("latest", True), ("all_previous", False)], ids=["latest", "all_previous"]
)


@MODES
def test_attention(visibility: str, immediate: bool) -> None:
    published = flamingo_pytorch.flamingo_pytorch.MaskedCrossAttention(
        dim=WIDTH, dim_head=WIDTH // HEADS, heads=HEADS, only_attend_immediate_media=immediate
    )
    randomise(published)
    ours = CrossAttention(
        hidden_size=WIDTH, source_size=WIDTH, num_heads=HEADS, num_key_value_heads=HEADS, qk_norm=False
    )
    ours.load_state_dict(from_flamingo_pytorch_attention(published.state_dict()))

    scene = make_scene(visibility)
    context = scene.context
    with torch.no_grad():
        expected = published(scene.hidden_states, scene.regions, media_locations=scene.placeholders)
        keys, values = ours.keys_values(scene.regions.flatten(1, 2))
        got, _ = ours(published.norm(scene.hidden_states), keys, values, context.attention_mask)
    got = got.masked_fill(~context.sees_image, 0)
    compared = torch.ones_like(scene.sees_image) if immediate else scene.sees_image
    assert_same(got[compared], expected[compared])


@MODES
def test_block(visibility: str, immediate: bool) -> None:
    published = flamingo_pytorch.GatedCrossAttentionBlock(
        dim=WIDTH, dim_head=WIDTH // HEADS, heads=HEADS, only_attend_immediate_media=immediate
    )
    randomise(published)
    ours = GatedCrossAttentionBlock(fusion_config(qk_norm=False, per_channel=False), block_index=0)
    ours.attention.load_state_dict(from_flamingo_pytorch_attention(published.attn.state_dict()))
    ours.attention_gate.load_state_dict({"alpha": published.attn_gate})
    ours.feed_forward_gate.load_state_dict({"alpha": published.ff_gate})
    ours.register_module("attention_norm", published.attn.norm)
    ours.register_module("feed_forward_norm", published.ff[0])
    ours.register_module("feed_forward", nn.Sequential(*published.ff[1:]))

    scene = make_scene(visibility)
    with torch.no_grad():
        expected = published(scene.hidden_states, scene.regions, media_locations=scene.placeholders)
        got = ours(scene.hidden_states, scene.context)
    seeing = scene.sees_image
    assert (expected - scene.hidden_states)[seeing].abs().max() > 0.1
    assert_same(got[seeing], expected[seeing])
    assert torch.equal(got[~seeing], scene.hidden_states[~seeing])
