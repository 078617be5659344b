"""A whole tiny model on disk, and a task on drawn pictures that cannot be done without them.

Decoder and encoder have random weights and stay frozen: all that is learned is in resampler and cross-attention.
Picture and question decide the answer: "What colour is this?" has four answers, "Is it red?" two.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTImageProcessor

from multimodal.fusion import FusionForConditionalGeneration, FusionProcessor, VisionEncoder
from multimodal.fusion.processing import CHATML_TEMPLATE
from tests.fusion.tiny import open_gates

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 60), "blue": (30, 60, 220), "white": (240, 240, 240)}
PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
IMAGE_SIZE = 32
CORPUS = ["What colour is this?", "Is it red?", "user\n", "assistant\n", *COLOURS, "yes", "no"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the words of the task as one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD, extra_special_tokens=[IMAGE]
    )


def save_bases(folder: Path) -> tuple[str, str]:
    """A tiny decoder with its tokenizer and a tiny encoder with its image processor, as folders."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text, vision = folder / "text", folder / "vision"
    tokenizer.save_pretrained(text)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(text)
    backbone = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
        "image_size": IMAGE_SIZE,
        "initializer_range": 0.2,
    }
    encoder = VisionEncoder.create(
        backend="transformers", name="vit", image_size=IMAGE_SIZE, backbone_config=dict(backbone)
    )
    encoder.save_pretrained(vision)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(vision)
    return str(text), str(vision)


def save_sequential_encoder(folder: Path) -> str:
    """A small encoder whose stages can be run one by one, with random weights, and its image processor."""
    torch.manual_seed(0)
    encoder = VisionEncoder.create(backend="torchvision", name="squeezenet1_1", image_size=80)
    encoder.save_pretrained(folder)
    encoder.image_processor().save_pretrained(folder)
    return str(folder)


def tiny_model(
    text: str, vision: str, *, seed: int | None = 1, images_last: bool = False, **options: Any
) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """A freshly fused model, gates shut, in float32. Without a seed, its weights follow torch's own state."""
    if seed is not None:
        torch.manual_seed(seed)
    processor = FusionProcessor.fuse(text=text, vision=vision, chat_template=CHATML_TEMPLATE, images_last=images_last)
    model = FusionForConditionalGeneration.fuse(
        text=text,
        vision=vision,
        image_token_id=processor.image_token_id,
        **{"cross_attention_layers": [1, 3], "num_latents": 4, "resampler_layers": 1, **options},
    )
    return model, processor


def save_checkpoint(folder: Path, *, seed: int = 1, open_: bool = True) -> Path:
    """A fused checkpoint, gates open so that pictures count; its bases lie beside it."""
    model, processor = tiny_model(*save_bases(folder), seed=seed)
    if open_:
        open_gates(model, seed=seed)
    model.save_pretrained(folder / "fused")
    processor.save_pretrained(folder / "fused")
    return folder / "fused"


def draw(colour: str, seed: int) -> Image.Image:
    """A square of a colour, its place and its shade random, on grey."""
    chance = random.Random(seed)
    image = Image.new("RGB", (40, 36), (chance.randint(90, 130),) * 3)
    left, top = chance.randint(0, 12), chance.randint(0, 10)
    shade = tuple(max(0, min(255, value + chance.randint(-15, 15))) for value in COLOURS[colour])
    ImageDraw.Draw(image).rectangle((left, top, left + 26, top + 24), fill=shade)
    return image


def write_task(folder: Path, *, train: int = 24, validate: int = 12) -> Path:
    """The task in SLAKE's published layout, two questions about each picture."""
    number = 0
    for split, count in (("train", train), ("validate", validate)):
        records = []
        for _ in range(count):
            colour = list(COLOURS)[number % len(COLOURS)]
            name = f"xmlab{number}/source.jpg"
            path = folder / "imgs" / name
            path.parent.mkdir(parents=True)
            draw(colour, seed=number).save(path, quality=95)
            for kind, question, answer in (
                ("OPEN", "What colour is this?", colour),
                ("CLOSED", "Is it red?", "yes" if colour == "red" else "no"),
            ):
                records.append(
                    {
                        "img_name": name,
                        "question": question,
                        "answer": answer,
                        "q_lang": "en",
                        "location": "Square",
                        "modality": "Drawing",
                        "answer_type": kind,
                        "content_type": "Colour",
                        "qid": 2 * number + (kind == "CLOSED"),
                    }
                )
            number += 1
        (folder / f"{split}.json").write_text(json.dumps(records))
    return folder


def encode(model: Any, conversations: list[Any]) -> dict[str, torch.Tensor]:
    """The inputs of ``generate`` for some conversations, pictures included, by the processor's own template."""
    inputs = model.processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )
    return dict(inputs)
