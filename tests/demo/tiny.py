"""What the demo's tests ask instead of the real thing.

A tiny fused model with random weights that answers in readable words and never ends by itself, readers of pictures that
always read the same, a comparison that was run, and a free port.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, ViTImageProcessor

from multimodal.fusion import FusionProcessor
from multimodal.fusion.processing import CHATML_TEMPLATE, template_with_images
from multimodal.pipelines.protocol import Answer, Step, Usage
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


class Reads:
    """A reader that reads the same off every picture."""

    def __init__(self, name: str, output: str, **details: Any) -> None:
        self.name, self.digest = name, f"always {output}"
        self.output, self.details = output, details

    def prepare(self) -> None:
        """Nothing is loaded."""

    def read(self, picture: Image.Image) -> Step:
        return Step(self.name, 0.25, self.output, details=self.details)


def parts_of_tiny(model: Any, name: str) -> Any:
    """As ``demo.comparing.parts_of``, with such readers."""
    from multimodal.pipelines import Parts, PipelineSettings
    from multimodal.pipelines.readers import KeptReader

    parts = Parts(PipelineSettings(model=name))
    parts.model = model
    boxes = [[0.1, 0.1, 0.5, 0.1], [0.1, 0.3, 0.3, 0.1]]
    parts.readers = {
        "ocr": KeptReader(Reads("ocr", "OAT BISCUITS\nSugar <21 g>", boxes=boxes)),
        "tags": KeptReader(Reads("tags", "packet 61%, carton 12%")),
    }
    return parts


def save_comparison(folder: Path, *, questions: int = 6) -> Path:
    """Write a comparison as if it had been run: two pipelines here, and one that asks an endpoint elsewhere."""
    from multimodal.compare.store import Key, Record, Store

    pipelines = {"native": (1, 0.3, 0.0), "blind": (3, 0.1, 0.0), "hosted": (1, 1.5, 0.002)}
    asked = [
        {"id": str(number), "question": f"Question {number}?", "target": "yes", "images": [], "meta": {}}
        for number in range(questions)
    ]
    store = Store(folder)
    store.note(
        {
            "command": "multimodal compare --tasks toy",
            "settings": {},
            "machine": {"cores": "2"},
            "controls": [""],
            "pipelines": list(pipelines),
            "remote": {name: name == "hosted" for name in pipelines},
            "tasks": [{"name": "toy", "metric": "exact", "questions": asked}],
        }
    )
    for name, (every, seconds, cost) in pipelines.items():
        for number in range(questions):
            answer = Answer(
                "no" if number % every else "yes",
                usage=Usage(100, 2, 0),
                first_token=seconds / 2,
                total=seconds,
                cost=cost,
            )
            store.add(Key("toy", name, "", str(number)), Record("digest", answer))
        took = questions * seconds
        store.add_group(task="toy", pipeline=name, control="", seconds=took, answers=questions, watt_hours=None)
        store.add_group(pipeline=name, peak_memory=2**30)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
