"""FusionConfig: what follows from the decoder is filled in, and what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from multimodal.fusion import FusionConfig, VisionConfig
from tests.fusion.tiny import PAD, VOCABULARY, fusion_config, text_config


def test_defaults_follow_the_decoder() -> None:
    config = FusionConfig(text_config=text_config(num_hidden_layers=12), vision_config=VisionConfig(), image_token_id=3)
    assert config.cross_attention_layers == [4, 8]
    assert config.cross_attention_heads == 4
    assert config.cross_attention_key_value_heads == 2
    assert config.cross_intermediate_size == 24
    assert config.resampler_hidden_size == 32
    assert config.resampler_heads == 1


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 30])
def test_default_layers_fit_any_depth(layers: int) -> None:
    chosen = fusion_config(
        text=text_config(num_hidden_layers=layers), cross_attention_layers=None
    ).cross_attention_layers
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < layers


@pytest.mark.parametrize("width", [32, 64, 100, 200, 576, 1000])
def test_the_default_number_of_resampler_heads_divides_its_width(width: int) -> None:
    config = fusion_config(resampler_hidden_size=width)
    assert width % config.resampler_heads == 0
    assert config.resampler_heads <= max(width // 64, 1)


def test_dicts_become_configurations() -> None:
    config = fusion_config()
    again = FusionConfig(**config.to_dict())
    assert isinstance(again.text_config, LlamaConfig)
    assert isinstance(again.vision_config, VisionConfig)
    assert again.to_dict() == config.to_dict()


def test_a_decoder_of_another_kind_keeps_its_class() -> None:
    text = {"model_type": "qwen2", **{k: v for k, v in text_config().to_dict().items() if k != "model_type"}}
    assert isinstance(fusion_config(text=text).text_config, Qwen2Config)


def test_save_is_reload(tmp_path: Any) -> None:
    config = fusion_config(gate="tanh", visibility="latest", text_base="a decoder", bases={"text": {"digest": "1"}})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, FusionConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_the_text_configuration_is_found_by_transformers() -> None:
    config = fusion_config()
    assert config.get_text_config(decoder=True) is config.text_config
    assert config.tie_word_embeddings


def test_a_default_configuration_exists() -> None:
    assert FusionConfig().text_config.model_type == "llama"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "sigmoid"}, "gate='sigmoid' is unknown: use one of tanh, dynamic"),
        ({"visibility": "next"}, "visibility='next' is unknown: use one of all_previous, latest"),
        ({"cross_attention_layers": []}, r"cross_attention_layers=\[\] must ascend within the decoder's 4 layers"),
        ({"cross_attention_layers": [3, 1]}, r"cross_attention_layers=\[3, 1\] must ascend"),
        ({"cross_attention_layers": [1, 1]}, r"cross_attention_layers=\[1, 1\] must ascend"),
        ({"cross_attention_layers": [1, 4]}, r"cross_attention_layers=\[1, 4\] .* 0 to 3"),
        ({"cross_attention_layers": [-1]}, r"cross_attention_layers=\[-1\]"),
        ({"image_token_id": VOCABULARY}, f"image_token_id={VOCABULARY} is outside of the decoder's vocabulary"),
        ({"image_token_id": -1}, "image_token_id=-1 is outside of the decoder's vocabulary"),
        ({"image_token_id": PAD}, "image_token_id=0 is the decoder's pad_token_id: name a spare token"),
        ({"resampler_hidden_size": 30}, "resampler_hidden_size=30 must be a multiple of 4"),
        ({"resampler_heads": 5}, "resampler_heads=5 must divide 32"),
        ({"cross_attention_heads": 3}, "cross_attention_heads=3 must divide 32"),
        ({"cross_attention_key_value_heads": 3}, "cross_attention_key_value_heads=3 must divide 4"),
        ({"cross_attention_heads": 0}, "cross_attention_heads=0 must divide 32"),
        ({"num_latents": 0}, "num_latents=0 must be at least 1"),
        ({"resampler_layers": 0}, "resampler_layers=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_config(**options)


def test_several_end_tokens_are_all_refused_as_placeholder() -> None:
    with pytest.raises(ValueError, match="image_token_id=7 is the decoder's eos_token_id"):
        fusion_config(text=text_config(eos_token_id=[2, 7]), image_token_id=7)
