"""Training the decoder alone: what it is shown, what comes out, and what is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from multimodal.adapters import layers_of, read_adapter
from multimodal.data import Sample
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.model import MultiModalModel
from multimodal.training import text_side
from multimodal.training.text_side import as_text
from multimodal.training.train import TrainingSettings, train
from tests.training.tiny import tiny_model, write_task

Fused = tuple[FusionForConditionalGeneration, FusionProcessor]


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    task = write_task(tmp_path / "task", train=16, validate=12)
    return TrainingSettings(
        data={f"slake:{task}": 1.0}, output=tmp_path / "tuned", cache=tmp_path / "cache", epochs=8, batch_size=8,
        learning_rate=3e-2, lora_rank=4, pipeline="blind",
    )  # fmt: skip


def test_an_adapter_comes_out_and_the_model_stays(
    bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multimodal.training.pictures.load_image", None)  # no picture is opened
    monkeypatch.setattr("multimodal.training.features.load_image", None)
    model, processor = tiny_model(*bases)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, processor, settings)
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer.", ".")]), name

    fresh = MultiModalModel(*tiny_model(*bases))
    weights = read_adapter(settings.output, fresh.model, base="tiny")
    assert all(float(b.abs().max()) > 0 for _, b in weights.pairs.values()), "every part of it has learnt"
    fresh.load_adapter(settings.output, "tuned")
    assert layers_of(fresh.model, "tuned")
    sure = {}
    for adapter in (None, "tuned"):
        answer = fresh("What colour is it?", adapter=adapter, max_new_tokens=4)
        sure[adapter] = (answer.text, answer.confidence)
    assert sure["tuned"][1] > 2 * sure[None][1], "it has learnt how such questions are answered"


def test_what_the_text_model_is_told(tmp_path: Path) -> None:
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 20), "OATLY", fill="black", font=ImageFont.load_default(48))
    picture.save(tmp_path / "oatly.png")
    sample = Sample("What product is this?", "Oatly Oat Milk", (tmp_path / "oatly.png",), id="one")
    (told,) = as_text([sample], "text_only", tmp_path / "cache")
    assert told.images == () and told.answer == sample.answer and told.id == "one"
    assert "Printed text in it: OATLY" in told.question and "It may show: " in told.question
    assert "What product is this?" in told.question
    (blind,) = as_text([sample], "blind", tmp_path / "cache")
    assert blind.question == sample.question and blind.images == ()


def test_pictures_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    sample = Sample("What is it?", "red", (tmp_path / "red.png",))
    first = as_text([sample, sample], "text_only", tmp_path / "cache")
    monkeypatch.setattr(text_side.RapidOcr, "read", None)
    assert as_text([sample], "text_only", tmp_path / "cache") == first[:1]


def test_mistakes(bases: tuple[str, str], settings: TrainingSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it a lora_rank"):
        train(*tiny_model(*bases), TrainingSettings(**{**settings.__dict__, "lora_rank": 0}))
    with pytest.raises(ValueError, match="'mind' cannot be trained for: use 'blind' or 'text_only'"):
        as_text([], "mind", tmp_path)
