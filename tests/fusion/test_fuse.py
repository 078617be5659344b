"""``fuse`` joins any Llama-like decoder and any encoder; LoRA and a fused model get along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor, TanhGate, VisionEncoder
from multimodal.fusion.bases import load_encoder
from tests.fusion.tiny import (
    IMAGE_TOKEN,
    assert_close,
    assert_differs,
    assert_same,
    mixed_batch,
    open_gates,
    photo,
    save_decoder,
    save_encoder,
    text_only,
    tiny_encoder,
    tiny_model,
    tiny_tokenizer,
)

NEEDS_GRADIENT = True  # LoRA is trained; the rest does not mind


@pytest.mark.parametrize(
    ("decoder", "encoder"),
    [("llama", "vit"), ("qwen2", "clip"), ("mistral", "vit"), ("llama", "clip"), ("qwen2", "fusion_vision")],
)
def test_fuse_joins_decoder_and_encoder(tmp_path: Path, decoder: str, encoder: str) -> None:
    text, vision = save_decoder(tmp_path / "text", kind=decoder), save_encoder(tmp_path / "vision", kind=encoder)
    processor = FusionProcessor.fuse(text=str(text), vision=str(vision))
    model = FusionForConditionalGeneration.fuse(
        text=str(text), vision=str(vision), image_token_id=processor.image_token_id, num_latents=3, gate="tanh"
    )
    assert not model.training
    assert model.config.text_base == str(text)
    assert model.config.vision_base == str(vision)
    inputs = processor(images=[photo(0), photo(1)], text=["look <image> here", "and <image>"], return_tensors="pt")
    bare = AutoModelForCausalLM.from_pretrained(text)
    with torch.no_grad():
        shut = model(**inputs).logits
        assert_same(shut, bare(**text_only(inputs)).logits, "shut gates")
        features = model.model.get_image_features(inputs["pixel_values"][:, 0]).features
        assert_close(
            features, load_encoder(str(vision))(inputs["pixel_values"][:, 0]).features, "the encoder's weights"
        )
        open_gates(model)
        assert_differs(model(**inputs).logits, shut)
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert_same(cached, model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))


def test_fuse_keeps_the_decoders_dtype_and_generation_settings(tmp_path: Path) -> None:
    text = save_decoder(tmp_path / "text")
    decoder = AutoModelForCausalLM.from_pretrained(text, dtype=torch.bfloat16)
    decoder.generation_config.max_new_tokens = 5
    decoder.save_pretrained(text)
    model = FusionForConditionalGeneration.fuse(text=str(text), vision=tiny_encoder(), image_token_id=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.max_new_tokens == 5
    assert model.generation_config.suppress_tokens == [4]
    assert model.config.vision_base is None


def test_the_gates_are_shut_and_the_bases_frozen(tmp_path: Path) -> None:
    model = FusionForConditionalGeneration.fuse(
        text=str(save_decoder(tmp_path / "text")), vision=tiny_encoder(), image_token_id=4
    )
    gates = [module for module in model.modules() if isinstance(module, TanhGate)]
    assert gates
    assert not any(module.alpha.any() for module in gates)
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"resampler", "cross_attention_blocks"}


def test_fuse_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    text = str(save_decoder(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"num_latent: FusionConfig has no such field"):
        FusionForConditionalGeneration.fuse(text=text, vision=tiny_encoder(), image_token_id=4, num_latent=3)
    with pytest.raises(TypeError, match="image_token_id"):
        FusionForConditionalGeneration.fuse(text=text, vision=tiny_encoder())  # type: ignore[call-arg]


def test_fuse_refuses_a_decoder_of_another_build(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel; a decoder that is built like Llama is needed"):
        FusionForConditionalGeneration.fuse(text=str(tmp_path), vision=tiny_encoder(), image_token_id=4)


# ---- the placeholder


def test_a_placeholder_is_added_where_the_embedding_has_a_row_to_spare(tmp_path: Path) -> None:
    text = str(save_decoder(tmp_path / "text", with_image=False))
    vision = str(save_encoder(tmp_path / "vision"))
    processor = FusionProcessor.fuse(text=text, vision=vision)
    assert processor.image_token == IMAGE_TOKEN
    assert processor.image_token_id == len(tiny_tokenizer(with_image=False))
    model = FusionForConditionalGeneration.fuse(text=text, vision=vision, image_token_id=processor.image_token_id)
    inputs = processor(images=photo(), text="see <image>", return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()


def test_a_full_vocabulary_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    size = len(tiny_tokenizer(with_image=False))
    text = str(save_decoder(tmp_path / "text", with_image=False, vocab_size=size))
    vision = str(save_encoder(tmp_path / "vision"))
    with pytest.raises(ValueError, match=rf"vocabulary of {size} has no row to spare for <image>.*image_token="):
        FusionProcessor.fuse(text=text, vision=vision)
    processor = FusionProcessor.fuse(text=text, vision=vision, image_token="<spare>")
    ids = processor(images=photo(), text="see <spare>", return_tensors="pt")["input_ids"]
    assert (ids == processor.image_token_id).sum() == 1


def test_an_image_token_that_is_not_one_token(tmp_path: Path) -> None:
    text, vision = str(save_decoder(tmp_path / "text")), str(save_encoder(tmp_path / "vision"))
    with pytest.raises(ValueError, match="'picture' is not one token of this tokenizer"):
        FusionProcessor.fuse(text=text, vision=vision, image_token="picture")


# ---- image processors


def test_each_encoder_brings_its_image_processor(tmp_path: Path) -> None:
    text = str(save_decoder(tmp_path / "text"))
    clip = FusionProcessor.fuse(text=text, vision=str(save_encoder(tmp_path / "clip", kind="clip")))
    assert "CLIP" in type(clip.image_processor).__name__
    own = str(save_encoder(tmp_path / "own", kind="fusion_vision"))
    by_folder, by_object = (FusionProcessor.fuse(text=text, vision=vision) for vision in (own, load_encoder(own)))
    picture = photo()
    assert_same(*(each(images=picture, text="<image>")["pixel_values"] for each in (by_folder, by_object)))


def test_a_torchvision_name_brings_its_image_processor(tmp_path: Path) -> None:
    text = str(save_decoder(tmp_path / "text"))
    processor = FusionProcessor.fuse(text=text, vision="torchvision/mobilenet_v3_small")
    assert processor(images=photo(), text="<image>")["pixel_values"].shape == (1, 1, 3, 224, 224)


def test_an_unsaved_transformers_encoder_has_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AutoImageProcessor"):
        FusionProcessor.fuse(text=str(save_decoder(tmp_path / "text")), vision=tiny_encoder())


# ---- LoRA


def test_lora_on_the_decoder_trains_only_its_adapters() -> None:
    model, inputs = tiny_model(), mixed_batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 4, "A and B of two projections in four layers"
    assert all("language_model" in name and "lora_" in name for name in trained)
    assert_same(tuned(**inputs).logits.detach(), expected, "fresh adapters change nothing")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    tuned(**inputs, labels=labels).loss.backward()
    received = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert received == set(trained)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = tuned.generate(**inputs, **options)
    assert_same(cached, tuned.generate(**inputs, **options, use_cache=False))
    with torch.no_grad():
        adapted = tuned(**inputs).logits
        assert_differs(adapted, expected)
        assert_close(tuned.merge_and_unload()(**inputs).logits, adapted, limit=1e-4)


def test_lora_beside_the_fusion() -> None:
    """Adapters on the decoder and the fusion itself, trained together."""
    model, inputs = tiny_model(), mixed_batch()
    config = LoraConfig(r=2, target_modules=r"model\.language_model\.layers\.\d+\.mlp\.down_proj")
    tuned = get_peft_model(model, config)
    model.model.resampler.requires_grad_(True)
    model.model.cross_attention_blocks.requires_grad_(True)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    received = {name for name, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
    parts = ("lora_", ".resampler.", ".cross_attention_blocks.")
    assert all(any(part in name for name in received) for part in parts)
    assert all(any(part in name for part in parts) for name in received)


def test_wrap_takes_over_an_encoder(tmp_path: Path) -> None:
    encoder = load_encoder(str(save_encoder(tmp_path / "clip", kind="clip")))
    assert isinstance(encoder, VisionEncoder)
    assert encoder.config.grid_size == [4, 4]
    again = VisionEncoder.from_pretrained(encoder.save_pretrained(tmp_path / "again") or tmp_path / "again")
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same(again(pixel_values).features, encoder(pixel_values).features)
