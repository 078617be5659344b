"""LoRA on the decoder: where it is and where it is not, that it stops and goes on, and that it comes back."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multimodal.adapters import attach
from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
from multimodal.fusion.bases import load_encoder, read_tensors
from multimodal.fusion.low_rank import CONFIG, DECODER_ADAPTER, WEIGHTS, read_low_rank
from multimodal.model import load
from multimodal.training.lora import BLOCKS, RESAMPLER, add_to_decoder, decoder_layers, linear_layers
from multimodal.training.prefix import can_keep_prefixes
from multimodal.training.train import TrainingSettings, train
from multimodal.training.trainer import FusionTrainer
from tests.fusion.tiny import (
    assert_close,
    assert_differs,
    assert_same,
    mixed_batch,
    open_gates,
    save_decoder,
    save_encoder,
)
from tests.training.tiny import tiny_model

Fused = tuple[FusionForConditionalGeneration, FusionProcessor]
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")


def expected_layers(*numbers: int) -> set[str]:
    names = [f"self_attn.{kind}_proj" for kind in ATTENTION] + [f"mlp.{kind}_proj" for kind in FEED_FORWARD]
    return {f"model.language_model.layers.{number}.{name}" for number in numbers for name in names}


def wrapped(model: torch.nn.Module) -> set[str]:
    """Every module that PEFT put something into, whatever it is called."""
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


class TestScope:
    @pytest.mark.parametrize(
        ("decoder", "encoder"), [("llama", "clip"), ("qwen2", "vit"), ("mistral", "clip"), ("llama", "fusion_vision")]
    )
    def test_every_module_that_gets_lora(self, decoder: str, encoder: str, tmp_path: Path) -> None:
        text = save_decoder(tmp_path / "text", kind=decoder)
        vision = load_encoder(str(save_encoder(tmp_path / "vision", kind=encoder)))
        model = FusionForConditionalGeneration.fuse(
            text=str(text), vision=vision, image_token_id=3, num_latents=3, cross_attention_layers=[2, 3]
        )
        if encoder == "clip":
            assert any(name.endswith("q_proj") for name, _ in model.model.vision_encoder.named_modules())
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert can_keep_prefixes(model)
        said = add_to_decoder(model, 2, seed=0)
        assert wrapped(model) == set(said) == expected_layers(2, 3)
        assert not can_keep_prefixes(model)
        now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained <= now, "what was trained before is still"
        assert all(".lora_A." in name or ".lora_B." in name for name in now - trained)
        assert len(now - trained) == 2 * len(said)

    def test_the_other_patterns(self, fused: Fused) -> None:
        blocks, resampler = (linear_layers(fused[0], pattern) for pattern in (BLOCKS, RESAMPLER))
        assert len(blocks) == 2 * 7 and all(name.startswith("model.cross_attention_blocks.") for name in blocks)
        assert len(resampler) == 1 + 7 and all(name.startswith("model.resampler.") for name in resampler)
        attach(fused[0], decoder_layers(fused[0]), name="one", rank=2, scale=1.0)
        assert linear_layers(fused[0], BLOCKS) == blocks, "also beside an adapter"
        assert set(decoder_layers(fused[0])) == expected_layers(1, 2, 3)

    def test_fresh_lora_changes_nothing_and_follows_its_seed(self, fused: Fused) -> None:
        model = fused[0]
        open_gates(model)
        inputs = mixed_batch()
        inputs["input_ids"][inputs["input_ids"] == 3] = fused[1].image_token_id
        with torch.no_grad():
            before = model(**inputs).logits
        state = torch.get_rng_state()
        layers = add_to_decoder(model, 2, seed=5)
        assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers change"
        with torch.no_grad():
            assert_same(model(**inputs).logits, before)
        again = tiny_model(model.config.text_base, model.config.vision_base)[0]
        torch.manual_seed(99)
        add_to_decoder(again, 2, seed=5)
        for name in layers:
            one, other = (m.get_submodule(name).lora_A["decoder"].weight for m in (model, again))
            assert_same(one, other, name)

    def test_a_trained_decoder_needs_none(self, fused: Fused) -> None:
        fused[0].set_trainable(decoder=True)
        with pytest.raises(ValueError, match="whole decoder is trained"):
            add_to_decoder(fused[0], 2, seed=0)


@pytest.fixture
def settings(task: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingSettings:
    """Six steps, three in an epoch."""
    return TrainingSettings(
        data={f"slake:{task}": 1.0},
        output=tmp_path / "run",
        cache=tmp_path_factory.getbasetemp() / "lora-cache",
        epochs=2,
        batch_size=12,
        learning_rate=1e-2,
        views={"medical": 2, "shop": 2},
        lora_rank=2,
    )


def changed(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    return TrainingSettings(**{**settings.__dict__, **changes})


def logits(model: FusionForConditionalGeneration) -> torch.Tensor:
    inputs = mixed_batch()
    inputs["input_ids"][inputs["input_ids"] == 3] = model.config.image_token_id
    with torch.no_grad():
        return model.eval()(**inputs).logits


class TestTraining:
    def test_saving_and_loading_gives_the_same_logits(self, bases: tuple[str, str], settings: TrainingSettings) -> None:
        model, processor = tiny_model(*bases)
        open_gates(model)
        decoder = {name: tensor.clone() for name, tensor in model.model.language_model.state_dict().items()}
        train(model, processor, settings)
        (kept,) = settings.cache.glob("*.suffixes")
        assert kept.stat().st_size, "what is below LoRA is computed once"
        assert not kept.with_suffix(".prefixes").stat().st_size, "with LoRA the decoder's keys are no constants"
        assert not wrapped(model) and not hasattr(model, "peft_config"), "a plain model again"
        moved = {
            f"model.language_model.{name.removesuffix('.weight')}"
            for name, tensor in model.model.language_model.state_dict().items()
            if not torch.equal(tensor, decoder[name])
        }
        assert moved == expected_layers(1, 2, 3)

        saved = read_tensors(str(settings.output))
        assert all(name.startswith(("model.resampler.", "model.cross_attention_blocks.")) for name in saved)
        small = sum(file.stat().st_size for file in (settings.output / DECODER_ADAPTER).iterdir())
        assert small < 60_000, "rank 2 only"
        loaded, _ = load(settings.output, dtype=torch.float32)
        assert_close(logits(loaded), logits(model), "loaded", limit=1e-5)
        with torch.no_grad():
            loaded.model.language_model.load_state_dict(decoder)
        assert_differs(logits(loaded), logits(model), "the decoder as it was")

    def test_going_on_from_it_keeps_it_and_adds_to_it(
        self, bases: tuple[str, str], settings: TrainingSettings, tmp_path: Path
    ) -> None:
        train(*tiny_model(*bases), settings)
        first = read_low_rank(str(settings.output), subfolder=DECODER_ADAPTER)
        assert first is not None and first.rank == 2

        model, processor = load(settings.output, dtype=torch.float32)
        assert can_keep_prefixes(model), "a decoder that holds LoRA is frozen as any other"
        model.set_trainable()
        train(model, processor, changed(settings, lora_rank=0, max_steps=1, output=tmp_path / "fusion only"))
        assert_close(logits(load(tmp_path / "fusion only", dtype=torch.float32)[0]), logits(model), limit=1e-5)
        kept = read_low_rank(str(tmp_path / "fusion only"), subfolder=DECODER_ADAPTER)
        assert kept is not None
        for name, (a, b) in first.pairs.items():
            assert_same(kept.pairs[name][0], a, name)
            assert_same(kept.pairs[name][1], b, name)

        model, processor = load(settings.output, dtype=torch.float32)
        model.set_trainable()
        train(model, processor, changed(settings, lora_rank=3, output=tmp_path / "more"))
        both = read_low_rank(str(tmp_path / "more"), subfolder=DECODER_ADAPTER)
        assert both is not None and both.rank == 5
        assert_close(logits(load(tmp_path / "more", dtype=torch.float32)[0]), logits(model), limit=1e-5)

    def test_saved_over_one_with_lora_a_model_without_has_none(
        self, bases: tuple[str, str], settings: TrainingSettings
    ) -> None:
        train(*tiny_model(*bases), changed(settings, max_steps=1))
        assert (settings.output / DECODER_ADAPTER).is_dir()
        tiny_model(*bases)[0].save_pretrained(settings.output)
        assert not (settings.output / DECODER_ADAPTER).exists()

    def test_an_interrupted_run_ends_with_the_same_weights(
        self, bases: tuple[str, str], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(output: str) -> dict[str, torch.Tensor]:
            return train(*tiny_model(*bases), changed(settings, output=settings.output / output)).state_dict()

        whole = run("whole")
        original, calls = FusionTrainer.compute_loss, iter(range(1, 100))

        def compute_loss(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == 4:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 4 of 6"):
            patch.setattr(FusionTrainer, "compute_loss", compute_loss)
            run("stopped")
        resumed = run("stopped")
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            assert_same(resumed[name], tensor, name)

    def test_a_run_from_before_there_was_lora_goes_on(self, bases: tuple[str, str], settings: TrainingSettings) -> None:
        settings = changed(settings, lora_rank=0)
        train(*tiny_model(*bases), changed(settings, max_steps=1))
        file = settings.output / "training.json"
        noted = json.loads(file.read_text())
        del noted["lora_rank"]
        file.write_text(json.dumps(noted))
        train(*tiny_model(*bases), changed(settings, max_steps=2))
        with pytest.raises(ValueError, match="lora rank was 0, is 2"):
            train(*tiny_model(*bases), changed(settings, max_steps=3, lora_rank=2))


class TestFiles:
    @pytest.fixture
    def folder(self, fused: Fused, tmp_path: Path) -> Path:
        """A checkpoint with a decoder's adapter."""
        from multimodal.training.lora import make_part_of_decoder

        add_to_decoder(fused[0], 2, seed=0)
        make_part_of_decoder(fused[0])
        fused[0].save_pretrained(tmp_path)
        fused[1].save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"peft_type": "IA3"}, "IA3 instead of LORA"),
            ({"r": 4}, "rank 4 in its configuration"),
            ({"use_dora": True}, "use_dora"),
            ({"lora_alpha": None}, "lora_alpha is None"),
        ],
    )
    def test_what_is_not_plain_lora_is_refused(self, folder: Path, change: dict[str, Any], problem: str) -> None:
        file = folder / DECODER_ADAPTER / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match=f"{problem}.*only plain LoRA"):
            load(folder)

    def test_another_models_is_refused(self, folder: Path) -> None:
        file = folder / DECODER_ADAPTER / WEIGHTS
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
        save_file(tensors | {name: torch.zeros(2, 7)}, file)
        with pytest.raises(ValueError, match=r"adds \(64, 7\) to model\.language_model.*q_proj, and the model has"):
            load(folder)
        save_file({name: tensors[name]}, file)
        with pytest.raises(ValueError, match="not one pair of matrices"):
            load(folder)

    def test_broken_files_are_named(self, folder: Path) -> None:
        (folder / DECODER_ADAPTER / WEIGHTS).write_bytes(b"no safetensors")
        with pytest.raises(ValueError, match="decoder_adapter cannot be read"):
            load(folder)
