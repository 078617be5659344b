"""Tiny fused models with random weights, rows of text with pictures among it, and comparisons that say how far off.

Axes: B batch, T text tokens, I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from multimodal.fusion import DynamicGate, FusionConfig, FusionForConditionalGeneration, TanhGate, VisionEncoder
from multimodal.fusion.cross_attention import FeedForward

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
VOCABULARY = 97
IMAGE_SIZE, PATCH = 32, 8
GRID = (IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": PATCH,
    "image_size": IMAGE_SIZE,
    "initializer_range": 0.2,
}


def text_config(**changes: Any) -> LlamaConfig:
    """Four layers, four heads over two key/value heads."""
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "initializer_range": 0.2,
            **changes,
        }
    )


def tiny_encoder() -> VisionEncoder:
    return VisionEncoder.create(backend="transformers", name="vit", image_size=IMAGE_SIZE, backbone_config=dict(VIT))


def fusion_config(*, text: LlamaConfig | None = None, **options: Any) -> FusionConfig:
    return FusionConfig(
        **{
            "text_config": text or text_config(),
            "vision_config": tiny_encoder().config,
            "image_token_id": IMAGE,
            "num_latents": 3,
            "cross_attention_layers": [1, 3],
            **options,
        }
    )


def tiny_model(*, seed: int = 0, shut: bool = False, **options: Any) -> FusionForConditionalGeneration:
    """A model in evaluation mode; its gates are open unless they are asked to be ``shut``."""
    torch.manual_seed(seed)
    model = FusionForConditionalGeneration(fusion_config(**options)).eval()
    if not shut:
        open_gates(model)
    return model


def open_gates(model: nn.Module, *, seed: int = 1) -> None:
    """Random gates far from zero, for dynamic ones a weight that differs from token to token; no branch is shut."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, TanhGate):
            nn.init.normal_(module.alpha, std=1.0, generator=generator)
        if isinstance(module, DynamicGate):
            nn.init.normal_(module.token_weight.weight, std=0.3, generator=generator)
            nn.init.normal_(module.token_weight.bias, std=0.3, generator=generator)
        if isinstance(module, FeedForward) and not module.down_proj.weight.any():  # the resampler's start so
            nn.init.normal_(module.down_proj.weight, std=0.2, generator=generator)


def bare_decoder(model: FusionForConditionalGeneration) -> LlamaForCausalLM:
    """The stock decoder with the fused model's weights."""
    decoder = LlamaForCausalLM(model.config.text_config).eval()
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    return decoder


def words(count: int, *, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(IMAGE + 1, VOCABULARY, (count,), generator=generator).tolist()


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random pictures ``(*shape, 3, height, width)``."""
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def batch(rows: Sequence[Sequence[int]], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of tokens, padded on the left, and a random picture for each placeholder."""
    length = max(len(row) for row in rows)
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    most = max(list(row).count(IMAGE) for row in rows)
    if most:
        pixel_values = pictures(len(rows), most, seed=seed)
        for row, tokens in enumerate(rows):
            pixel_values[row, list(tokens).count(IMAGE) :] = 0
        inputs["pixel_values"] = pixel_values
    return inputs


def mixed_batch() -> dict[str, torch.Tensor]:
    """Rows of 0, 1 and 2 pictures and of different lengths."""
    return batch(
        [
            words(6, seed=1),
            [*words(2, seed=2), IMAGE, *words(6, seed=3)],
            [IMAGE, *words(3, seed=4), IMAGE, *words(2, seed=5)],
        ]
    )


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row by itself: no padding, and only its own pictures."""
    kept = inputs["attention_mask"][row].bool()
    single = {key: inputs[key][row, kept][None] for key in ("input_ids", "attention_mask")}
    count = int((single["input_ids"] == IMAGE).sum())
    if count:
        single["pixel_values"] = inputs["pixel_values"][row : row + 1, :count]
    return single


def text_only(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in inputs.items() if key != "pixel_values"}


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal bit for bit."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.equal(actual, expected), f"{what}: largest difference {largest_difference(actual, expected):.3g}"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "", *, limit: float = 2e-5) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = largest_difference(actual, expected)
    assert difference <= limit, f"{what}: largest difference {difference:.3g}, limit {limit:.3g}"


def assert_differs(actual: torch.Tensor, expected: torch.Tensor, what: str = "", *, least: float = 1e-3) -> None:
    difference = largest_difference(actual, expected)
    assert difference >= least, f"{what}: largest difference {difference:.3g}, expected at least {least:.3g}"


# ---- parts on disk

LETTERS = "abcdefghijklmnopqrstuvwxyz .,?!:\n"
IMAGE_TOKEN = "<image>"


def tiny_tokenizer(*, with_image: bool = True) -> PreTrainedTokenizerFast:
    """One token for each letter and a few special ones, ``<image>`` among them or not."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", *([IMAGE_TOKEN] if with_image else []), "<spare>"]
    vocabulary = {token: index for index, token in enumerate([*special, "<unk>", *LETTERS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[token for token in special if token in (IMAGE_TOKEN, "<spare>")],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
        " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return tokenizer


def save_decoder(folder: Path, *, kind: str = "llama", seed: int = 0, with_image: bool = True, **changes: Any) -> Path:
    """A random decoder and its tokenizer."""
    tokenizer = tiny_tokenizer(with_image=with_image)
    options = text_config(**{"vocab_size": VOCABULARY, **changes}).to_dict()
    options.pop("model_type")
    options.pop("architectures", None)
    torch.manual_seed(seed)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path, *, kind: str = "vit", seed: int = 0) -> Path:
    """A random image encoder and its image processor: ``vit``, ``clip`` (both towers) or ``fusion_vision``."""
    torch.manual_seed(seed)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "clip":
        vision = {**VIT, "model_type": "clip_vision_model"}
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(text_config={**text, "vocab_size": 20}, vision_config=vision, projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
        CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    elif kind == "vit":
        ViTModel(ViTConfig(**VIT)).save_pretrained(folder)
        ViTImageProcessor(size=size).save_pretrained(folder)
    else:
        encoder = VisionEncoder.create(backend="torchvision", name="mobilenet_v3_small", image_size=IMAGE_SIZE)
        encoder.save_pretrained(folder)
    return folder


def photo(seed: int = 0, *, side: int = 40) -> Image.Image:
    """A small noisy picture."""
    pixels = torch.randint(0, 256, (side, side + 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())
