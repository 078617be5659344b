"""Our block against transformers' Mllama (Llama 3.2 Vision): one layer, and a tiny text stack as a whole.

Mllama differs by design for a token that sees no picture: it lets that token attend to every region alike and only
sets its feed-forward branch to zero, where ours leaves the token untouched. So a layer is compared at the tokens that
see a picture, and the stack with every token behind its picture.
"""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, MllamaTextModel

from multimodal.fusion.configuration import FusionConfig
from multimodal.fusion.cross_attention import GatedCrossAttentionBlock, visible_images
from multimodal.fusion.modeling import FusionModel
from multimodal.fusion.vision import VisionConfig

from .converters import decoder_layer, from_mllama_layer, from_mllama_text
from .scene import (
    HEADS,
    INNER,
    REGIONS,
    WIDTH,
    additive,
    assert_same,
    fusion_config,
    make_scene,
    randomise,
)

IMAGE = 3
ROTARY = {"rope_type": "default", "rope_theta": 500_000.0}


def mllama_config(key_value_heads: int = HEADS) -> MllamaTextConfig:
    return MllamaTextConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        num_key_value_heads=key_value_heads,
        intermediate_size=INNER,
        cross_attention_layers=[1, 4],
        rope_parameters=ROTARY,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        attn_implementation="eager",
    )


class AsGiven(nn.Module):
    """Stands in the resampler's place: the region tokens are the features that the test gives."""

    def forward(
        self, features: torch.Tensor, grid: tuple[int, int], output_attentions: bool
    ) -> tuple[torch.Tensor, None]:
        return features, None


def fusion_text_side(mllama: MllamaTextConfig, visibility: str) -> FusionModel:
    """Builds a fused model with Mllama's text stack: fewer decoder layers, with blocks before some of them."""
    cross_layers = mllama.cross_attention_layers
    text = LlamaConfig(
        vocab_size=mllama.vocab_size + 8,  # Mllama adds 8 rows to its embedding
        hidden_size=mllama.hidden_size,
        num_hidden_layers=mllama.num_hidden_layers - len(cross_layers),
        num_attention_heads=mllama.num_attention_heads,
        num_key_value_heads=mllama.num_key_value_heads,
        intermediate_size=mllama.intermediate_size,
        rope_parameters=ROTARY,
        rms_norm_eps=mllama.rms_norm_eps,
    )
    tiny_vit = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    config = FusionConfig(
        text_config=text,
        vision_config=VisionConfig(
            backend="transformers", name="vit", image_size=8, hidden_size=WIDTH, backbone_config=tiny_vit
        ),
        cross_attention_layers=[decoder_layer(layer, cross_layers) for layer in cross_layers],
        cross_intermediate_size=mllama.intermediate_size,
        gate="tanh",
        gate_per_channel=False,
        qk_norm=True,
        num_latents=REGIONS,
        visibility=visibility,
        image_token_id=IMAGE,
    )
    model = FusionModel(config).eval()
    model.resampler = AsGiven()
    return model


@pytest.mark.parametrize("visibility", ["all_previous", "latest"])
@pytest.mark.parametrize("key_value_heads", [HEADS, 2, 1])
def test_one_layer(visibility: str, key_value_heads: int) -> None:
    published = MllamaCrossAttentionDecoderLayer(mllama_config(key_value_heads), layer_idx=1).eval()
    randomise(published)
    ours = GatedCrossAttentionBlock(
        fusion_config(key_value_heads=key_value_heads, qk_norm=True, per_channel=False), block_index=0
    ).eval()
    ours.load_state_dict(from_mllama_layer(published.state_dict()))

    scene = make_scene(visibility)
    with torch.no_grad():
        expected = published(
            scene.hidden_states,
            cross_attention_states=scene.regions.flatten(1, 2),
            cross_attention_mask=scene.additive_mask,
            attention_mask=None,
            full_text_row_masked_out_mask=scene.sees_image[:, None, :, None].float(),
        )
        got = ours(scene.hidden_states, scene.context)
    seeing = scene.sees_image
    assert (expected - scene.hidden_states)[seeing].abs().max() > 0.1
    assert_same(got[seeing], expected[seeing])
    assert torch.equal(got[~seeing], scene.hidden_states[~seeing])


@pytest.mark.parametrize("visibility", ["all_previous", "latest"])
@pytest.mark.parametrize("key_value_heads", [HEADS, 2])
def test_the_text_stack_as_a_whole(visibility: str, key_value_heads: int) -> None:
    mllama = mllama_config(key_value_heads)
    published = MllamaTextModel(mllama).eval()
    randomise(published)
    ours = fusion_text_side(mllama, visibility)
    decoder, blocks = from_mllama_text(published.state_dict(), mllama.cross_attention_layers)
    ours.language_model.load_state_dict(decoder)
    for block, state in zip(ours.cross_attention_blocks, blocks, strict=True):
        block.load_state_dict(state)

    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(IMAGE + 1, 32, (2, 10), generator=generator)
    input_ids[[0, 0, 1, 1], [0, 4, 0, 7]] = IMAGE  # every token stands behind a picture of its row
    features = torch.randn(2, 2, REGIONS, WIDTH, generator=generator)  # (B, I, L, D)
    images_before = (input_ids == IMAGE).cumsum(-1)
    visible = visible_images(torch.tensor([[1, 2], [1, 2]]), images_before, visibility).repeat_interleave(REGIONS, -1)
    with torch.no_grad():
        expected = published(
            input_ids, cross_attention_states=features.flatten(1, 2), cross_attention_mask=additive(visible)
        ).last_hidden_state
        got = ours(input_ids, image_features=features).last_hidden_state
        blind = published(input_ids).last_hidden_state
    assert (expected - blind).abs().max() > 0.1
    assert_same(got, expected)
