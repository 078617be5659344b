"""A tiny fused model with random weights that answers in readable words and never ends by itself, and a free port."""

from __future__ import annotations

import socket
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, ViTImageProcessor

from multimodal.fusion import FusionProcessor
from multimodal.fusion.processing import CHATML_TEMPLATE, template_with_images
from tests.fusion.tiny import IMAGE_SIZE, text_config, tiny_model

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # how byte-level tokenizers write one
WORDS = [
    "the",
    "lung",
    "heart",
    "left",
    "right",
    "upper",
    "lower",
    "clear",
    "pale",
    "dark",
    "round",
    "small",
    "large",
    "red",
    "green",
    "box",
    "fruit",
    "apple",
    "pear",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few whole words with the space before them."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(SPACE + word for word in WORDS)]
    made = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<image>"],
    )


def save_tiny_model(folder: Path) -> Path:
    """Save it with open gates."""
    words = tokenizer()
    text = text_config(
        vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=2048
    )
    model = tiny_model(text=text, image_token_id=SPECIAL.index("<image>"))
    model.generation_config = GenerationConfig(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=list(range(len(words) - len(WORDS))),  # the end of the answer among them
        repetition_penalty=1.3,  # or it says one word for ever
    )
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    FusionProcessor(ViTImageProcessor(size=size), words, template_with_images(CHATML_TEMPLATE)).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
