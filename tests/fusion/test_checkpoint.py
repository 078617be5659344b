"""Save = reload; a checkpoint of a fused model holds what was trained, and names its bases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from multimodal.fusion import FusionConfig, FusionForConditionalGeneration, FusionProcessor, bases
from tests.fusion.tiny import (
    assert_close,
    assert_differs,
    assert_same,
    mixed_batch,
    open_gates,
    photo,
    save_decoder,
    save_encoder,
    text_config,
    tiny_model,
)

TEXT, VISION = "tiny-decoder", "tiny-encoder"


@dataclass(frozen=True)
class Fused:
    """A fused model with open gates whose bases lie elsewhere, and its processor."""

    model: FusionForConditionalGeneration
    processor: FusionProcessor
    folders: dict[str, Path]


@pytest.fixture(params=["vit", "fusion_vision"])
def fused(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fused]:
    """The bases are known by name only, through a locator."""
    folders = {TEXT: save_decoder(tmp_path / "text"), VISION: save_encoder(tmp_path / "vision", kind=request.param)}
    locators: list[bases.Locator] = []
    monkeypatch.setattr(bases, "_locators", lambda: locators)
    bases.register_locator(folders.get)
    processor = FusionProcessor.fuse(text=TEXT, vision=VISION)
    torch.manual_seed(0)
    model = FusionForConditionalGeneration.fuse(
        text=TEXT, vision=VISION, image_token_id=processor.image_token_id, num_latents=3
    )
    open_gates(model)
    yield Fused(model, processor, folders)


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def answer(model: FusionForConditionalGeneration, processor: FusionProcessor) -> torch.Tensor:
    inputs = processor(images=[photo(0), photo(1)], text=["look <image> here", "and <image>"], return_tensors="pt")
    return model(**inputs).logits


def assert_all_tensors_equal(model: FusionForConditionalGeneration, expected: FusionForConditionalGeneration) -> None:
    tensors, others = model.state_dict(), expected.state_dict()
    assert set(tensors) == set(others)
    for name, tensor in others.items():
        assert_same(tensors[name], tensor, name)


# ---- without bases everything is saved


@pytest.mark.parametrize("tied", [True, False])
def test_save_is_reload(tmp_path: Path, gate: str, visibility: str, tied: bool) -> None:
    text = text_config(tie_word_embeddings=tied)
    model = tiny_model(text=text, gate=gate, visibility=visibility, gate_per_channel=tied)
    model.save_pretrained(tmp_path)
    again = FusionForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.training
    assert_all_tensors_equal(again, model)
    assert_close(again(**mixed_batch()).logits, model(**mixed_batch()).logits)  # other memory, other rounding
    for name in ("gate", "visibility", "gate_per_channel", "num_latents", "cross_attention_layers", "image_token_id"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert names_in(tmp_path) | {"lm_head.weight"} == set(model.state_dict()), "a tied head may be left out"


def test_in_shards(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_all_tensors_equal(FusionForConditionalGeneration.from_pretrained(tmp_path), model)


# ---- with bases, what was trained


def test_a_checkpoint_holds_what_was_trained(fused: Fused, tmp_path: Path) -> None:
    fused.model.save_pretrained(tmp_path / "fused")
    names = names_in(tmp_path / "fused")
    trained = {name for name, parameter in fused.model.named_parameters() if parameter.requires_grad}
    assert names == trained
    assert {name.split(".")[1] for name in names} == {"resampler", "cross_attention_blocks"}
    stored = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert (stored["text_base"], stored["vision_base"]) == (TEXT, VISION)


def test_with_bases_save_is_reload(fused: Fused, tmp_path: Path) -> None:
    expected = answer(fused.model, fused.processor)
    fused.model.save_pretrained(tmp_path / "fused")
    again = FusionForConditionalGeneration.from_pretrained(tmp_path / "fused")
    assert_all_tensors_equal(again, fused.model)
    assert_close(answer(again, fused.processor), expected)
    assert again.generation_config.suppress_tokens == [fused.processor.image_token_id]
    again.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(tmp_path / "fused")
    assert_close(answer(FusionForConditionalGeneration.from_pretrained(tmp_path / "again"), fused.processor), expected)


def test_opened_vision_stages_are_kept(fused: Fused, tmp_path: Path) -> None:
    model = fused.model
    model.set_trainable(vision_stages=1)
    opened = {name for name, p in model.named_parameters() if p.requires_grad and "vision_encoder" in name}
    assert opened
    before = answer(model, fused.processor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in opened:
                parameter.mul_(1.5)
    expected = answer(model, fused.processor)
    assert_differs(expected, before)
    model.save_pretrained(tmp_path / "fused")
    kept = {name for name in names_in(tmp_path / "fused") if "vision_encoder" in name}
    assert opened <= kept
    assert len(kept) < len(model.model.vision_encoder.state_dict())
    again = FusionForConditionalGeneration.from_pretrained(tmp_path / "fused")
    assert_all_tensors_equal(again, model)
    assert_close(answer(again, fused.processor), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad and "vision_encoder" in n} == opened


def test_what_was_trained_once_is_kept_when_it_is_frozen_again(fused: Fused, tmp_path: Path) -> None:
    model = fused.model
    model.set_trainable(vision_stages=1, decoder=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    model.set_trainable()  # a second phase of training, of the fusion alone
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {
        "resampler",
        "cross_attention_blocks",
    }
    model.save_pretrained(tmp_path / "fused")
    assert_all_tensors_equal(FusionForConditionalGeneration.from_pretrained(tmp_path / "fused"), model)


def test_a_trained_decoder_is_kept(fused: Fused, tmp_path: Path) -> None:
    fused.model.set_trainable(decoder=True)
    fused.model.save_pretrained(tmp_path / "fused")
    names = names_in(tmp_path / "fused")
    assert any(name.startswith("model.language_model.") for name in names)
    assert not any(name.startswith("model.vision_encoder.") for name in names)
    assert_all_tensors_equal(FusionForConditionalGeneration.from_pretrained(tmp_path / "fused"), fused.model)


def test_dtype(fused: Fused, tmp_path: Path) -> None:
    fused.model.to(torch.bfloat16).save_pretrained(tmp_path / "fused")
    load = FusionForConditionalGeneration.from_pretrained
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32), ("auto", torch.bfloat16)):
        options = {} if asked is None else {"dtype": asked}
        again = load(tmp_path / "fused", **options)
        assert {parameter.dtype for parameter in again.parameters()} == {expected}, asked
    assert_all_tensors_equal(load(tmp_path / "fused"), fused.model)


def test_loading_info(fused: Fused, tmp_path: Path) -> None:
    fused.model.save_pretrained(tmp_path / "fused")
    loaded: Any = FusionForConditionalGeneration.from_pretrained(tmp_path / "fused", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_all_tensors_equal(model, fused.model)


def test_a_folder_names_itself_as_a_base(tmp_path: Path) -> None:
    text, vision = save_decoder(tmp_path / "text"), save_encoder(tmp_path / "vision")
    model = FusionForConditionalGeneration.fuse(text=str(text), vision=str(vision), image_token_id=3)
    model.save_pretrained(tmp_path / "fused")
    assert_all_tensors_equal(FusionForConditionalGeneration.from_pretrained(tmp_path / "fused"), model)


def test_a_decoder_with_a_head_of_its_own(tmp_path: Path) -> None:
    text = save_decoder(tmp_path / "text", tie_word_embeddings=False)
    model = FusionForConditionalGeneration.fuse(
        text=str(text), vision=str(save_encoder(tmp_path / "vision")), image_token_id=3
    )
    model.save_pretrained(tmp_path / "fused")
    again = FusionForConditionalGeneration.from_pretrained(tmp_path / "fused")
    assert_all_tensors_equal(again, model)
    assert_differs(again.lm_head.weight, again.model.language_model.embed_tokens.weight)


# ---- the doors of transformers


@pytest.fixture
def saved(fused: Fused, tmp_path: Path) -> Path:
    folder = tmp_path / "fused"
    fused.model.save_pretrained(folder)
    fused.processor.save_pretrained(folder)
    return folder


def test_auto_classes(fused: Fused, saved: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(saved), FusionConfig)
    processor = AutoProcessor.from_pretrained(saved)
    assert isinstance(processor, FusionProcessor)
    assert processor.image_token_id == fused.processor.image_token_id
    assert processor.chat_template == fused.processor.chat_template
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert isinstance(model, FusionForConditionalGeneration)
    assert_close(answer(model, processor), answer(fused.model, fused.processor))


def test_pipeline(fused: Fused, saved: Path) -> None:
    ask = pipeline("image-text-to-text", model=str(saved))
    content = [{"type": "image", "image": photo()}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}]
    told = ask(messages, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False})
    inputs = fused.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sequences = fused.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = fused.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert told[0]["generated_text"] == expected


def test_pipeline_from_the_objects(fused: Fused) -> None:
    ask = pipeline("image-text-to-text", model=fused.model, processor=fused.processor)
    told = ask(photo(), text="see <image>", max_new_tokens=3, return_full_text=False)
    assert isinstance(told[0]["generated_text"], str)


# ---- locators


def test_a_locator_is_asked_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locators: list[bases.Locator] = []
    monkeypatch.setattr(bases, "_locators", lambda: locators)

    def known(name: str) -> Path | None:
        return tmp_path if name == "known" else None

    bases.register_locator(known)
    bases.register_locator(known)
    assert locators == [known]
    assert bases.locate_base("known") == str(tmp_path)
    assert bases.locate_base("other/name") == "other/name"
