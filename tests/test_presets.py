"""The named architectures: built as they say, with shut gates, and ready to be trained, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal import presets
from multimodal.fusion import DynamicGate, FusionForConditionalGeneration, FusionProcessor, TanhGate
from multimodal.model import conversation
from multimodal.presets import PRESETS, build, trained_folder
from multimodal.weights import parts

READY = all(part.state != "absent" for part in parts() if part.default)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(processor: FusionProcessor) -> dict[str, torch.Tensor]:
    """One question about a picture."""
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    return dict(
        processor.apply_chat_template(
            conversation("What is this?", [picture]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no preset 'nonsense': use one of embedded, resnet101-12l"):
        build("nonsense")


def test_trained_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "ASSETS", tmp_path)
    assert trained_folder("embedded") is None
    for name in ("embedded", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert trained_folder("embedded") == tmp_path / "embedded"
    assert trained_folder("samples") is None and trained_folder("") is None and trained_folder("..") is None


@pytest.mark.skipif(not READY, reason="the embedded parts are not here: run `multimodal pull`")
def test_embedded_starts_as_its_decoder() -> None:
    model, processor = build("embedded")
    config = model.config
    assert (config.text_base, config.vision_base) == ("smollm2-135m-instruct", "efficientnet-lite2")
    assert config.gate == "dynamic" and len(model.model.cross_attention_blocks) == 7
    assert {part.name for part in model.trainable_parts() if part.trainable} == {"resampler", "cross-attention"}
    asked = inputs(processor)
    with torch.no_grad():
        seeing = model(**asked).logits
        asked["pixel_values"] = -asked["pixel_values"]
        assert torch.equal(model(**asked).logits, seeing), "a picture counts although the gates are shut"


@pytest.fixture(scope="module")
def scratch() -> Any:
    if parts()[0].state == "absent":
        pytest.skip("the tokenizer comes with a part that is not here: run `multimodal pull`")
    torch.manual_seed(0)
    return build("resnet101-12l")


class TestFromScratch:
    def test_architecture(self, scratch: tuple[FusionForConditionalGeneration, FusionProcessor]) -> None:
        model, processor = scratch
        config = model.config
        assert config.text_config.num_hidden_layers == len(model.model.language_model.layers) == 12
        assert (config.vision_config.backend, config.vision_config.name) == ("torchvision", "resnet101")
        blocks = [len(stage) for name, stage in model.model.vision_encoder.trunk.named_children() if "layer" in name]
        assert blocks == [3, 4, 23, 3]
        gates = [module for module in model.modules() if isinstance(module, TanhGate)]
        assert len(gates) == 2 * len(PRESETS["resnet101-12l"].options["cross_attention_layers"])
        assert all(isinstance(gate, DynamicGate) and not gate.alpha.any() for gate in gates)
        assert all(part.parameters == part.trainable for part in model.trainable_parts())
        assert len(processor.tokenizer) == config.text_config.vocab_size
        with torch.no_grad():
            features = model.model.get_image_features(torch.randn(1, 3, 224, 224)).features
        assert 1e-2 < features.std() < 10, "33 residual blocks blow the features up, or kill them"

    def test_saves_and_comes_back_whole(
        self, scratch: tuple[FusionForConditionalGeneration, FusionProcessor], tmp_path: Path
    ) -> None:
        model, processor = scratch
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again, expected = FusionForConditionalGeneration.from_pretrained(tmp_path), model.state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, expected[name])] == []
        asked = inputs(processor)
        same = inputs(FusionProcessor.from_pretrained(tmp_path))
        assert all(torch.equal(asked[key], same[key]) for key in ("input_ids", "attention_mask"))
        assert all(part.parameters == part.trainable for part in again.trainable_parts())

    def test_a_step_lowers_the_loss(self, scratch: tuple[FusionForConditionalGeneration, FusionProcessor]) -> None:
        """All parts learn at once, once the gates are open a crack."""
        model, processor = scratch
        asked = inputs(processor)
        labels = asked["input_ids"]
        for gate in (module for module in model.modules() if isinstance(module, TanhGate)):
            torch.nn.init.constant_(gate.alpha, 0.1)
        before = model(**asked, labels=labels).loss
        before.backward()
        for name in (
            "vision_encoder.trunk.conv1",
            "vision_encoder.trunk.layer4",
            "resampler",
            "cross_attention_blocks",
        ):
            gradients = [p.grad for key, p in model.model.named_parameters() if key.startswith(name)]
            assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients), name
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
        with torch.no_grad():
            assert model(**asked, labels=labels).loss < before
