"""Our block against transformers' Idefics, with its options: query/key norm on or off, gates scalar or per channel.

Idefics differs by design for a token that sees no picture: its attention branch is set to zero, as ours, but its
feed-forward branch still changes the token. So the whole block is compared at the tokens that see a picture, and at
every token where the feed-forward gate is shut.
"""

import pytest
import torch
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from multimodal.fusion.cross_attention import GatedCrossAttentionBlock

from .converters import from_idefics_layer
from .scene import HEADS, INNER, WIDTH, Scene, assert_same, fusion_config, make_scene, randomise


def pair(*, qk_norm: bool, per_channel: bool) -> tuple[IdeficsGatedCrossAttentionLayer, GatedCrossAttentionBlock]:
    """Builds the published block with random weights, and ours with the same."""
    config = IdeficsConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        alpha_type="vector" if per_channel else "float",
        qk_layer_norms=qk_norm,
        rms_norm_eps=1e-6,
        vision_config={"embed_dim": WIDTH},
        attn_implementation="eager",
    )
    published = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    randomise(published)
    ours = GatedCrossAttentionBlock(fusion_config(qk_norm=qk_norm, per_channel=per_channel), block_index=0).eval()
    return published, ours


def run_both(
    published: IdeficsGatedCrossAttentionLayer, ours: GatedCrossAttentionBlock, scene: Scene
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies the weights, runs both blocks, and returns the published result and ours."""
    ours.load_state_dict(from_idefics_layer(published.state_dict()))
    with torch.no_grad():
        expected = published(
            scene.hidden_states,
            image_hidden_states=scene.regions.flatten(1, 2),
            image_attention_mask=scene.additive_mask,
            cross_attention_gate=scene.sees_image.float(),
        )
        return expected, ours(scene.hidden_states, scene.context)


@pytest.mark.parametrize("visibility", ["all_previous", "latest"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_tokens_that_see_a_picture(visibility: str, qk_norm: bool, per_channel: bool) -> None:
    scene = make_scene(visibility)
    expected, got = run_both(*pair(qk_norm=qk_norm, per_channel=per_channel), scene)
    seeing = scene.sees_image
    assert (expected - scene.hidden_states)[seeing].abs().max() > 0.1
    assert_same(got[seeing], expected[seeing])
    assert torch.equal(got[~seeing], scene.hidden_states[~seeing])


@pytest.mark.parametrize("visibility", ["all_previous", "latest"])
def test_every_token_where_the_feed_forward_gate_is_shut(visibility: str) -> None:
    scene = make_scene(visibility)
    published, ours = pair(qk_norm=True, per_channel=True)
    torch.nn.init.zeros_(published.alpha_dense)
    expected, got = run_both(published, ours, scene)
    assert_same(got, expected)
