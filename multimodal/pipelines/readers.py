"""What a text-only pipeline reads off a picture before a text model is asked: text (OCR), labels, a caption.

A reader takes a picture and gives a ``Step``. What always holds: a picture that was read before is not read again
(:class:`KeptReader`), and the step then says so and says what reading took the first time.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from shutil import which
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from multimodal.images import load_image, read_encoded
from multimodal.journal import Journal
from multimodal.pipelines.protocol import PipelineError, Step
from multimodal.weights import locate

ENCODER = "efficientnet-lite2"
LABELS = 5
LEAST_SURE = 0.5  # of a line of text: below it RapidOCR itself calls it no text
INSTALL = "pip install 'multimodal[compare]'"


class Reader(Protocol):
    """Reads something off a picture; from several threads, one after another.

    Attributes:
        name: Of its step, and of the prompt's variable that has what it read.
        digest: Changes when it may read something else.
    """

    name: str
    digest: str

    def read(self, picture: Image.Image) -> Step:
        """What is there to read. ``output`` is empty where there is nothing."""
        ...

    def prepare(self) -> None:
        """Load what reading needs."""
        ...


class RapidOcr:
    """Printed text in Latin and Chinese script, by RapidOCR (PP-OCR models, which lie in its wheel).

    Lines come in reading order, from the top; ``details["boxes"]`` has their places as shares of the picture.

    Raises:
        PipelineError: If RapidOCR is not installed.
    """

    name = "ocr"
    digest = "rapidocr"

    @cached_property
    def _engine(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise PipelineError(
                f"reading text off pictures needs RapidOCR, which is not installed: {INSTALL}"
            ) from None
        return RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": LEAST_SURE,
                # Two threads that spin for work would take the cores from the model that answers.
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def prepare(self) -> None:
        """Load the models."""
        _ = self._engine

    def read(self, picture: Image.Image) -> Step:
        """Find and read lines of text."""
        started = time.perf_counter()
        found = self._engine(np.asarray(picture)[:, :, ::-1])  # it takes blue first, as OpenCV does
        corners = (
            np.zeros((0, 4, 2)) if found.boxes is None else np.asarray(found.boxes, float) / picture.size
        )  # (L, 4, 2)
        lows, highs = corners.min(1), corners.max(1)  # (L, 2)
        return Step(
            self.name,
            seconds=time.perf_counter() - started,
            output="\n".join(found.txts or ()),
            details={
                "boxes": [
                    [round(float(number), 4) for number in (*low, *(high - low))]
                    for low, high in zip(lows, highs, strict=True)
                ],
                "scores": [round(float(score), 3) for score in found.scores or ()],
            },
        )


class Tesseract:
    """The same by Tesseract, where it is installed: weaker on small print on packages (3 of 31 brands, not 24).

    Raises:
        PipelineError: If it is not installed, or fails.
    """

    name = "ocr"
    digest = "tesseract"

    def prepare(self) -> None:
        """It is a program of its own."""

    def read(self, picture: Image.Image) -> Step:
        """Read the text of the page."""
        import subprocess
        from io import BytesIO

        if which("tesseract") is None:
            raise PipelineError("tesseract is not installed: install it (Debian: tesseract-ocr), or use RapidOCR")
        started = time.perf_counter()
        stream = BytesIO()
        picture.save(stream, format="PNG")
        done = subprocess.run(
            ["tesseract", "stdin", "stdout", "--psm", "11"], input=stream.getvalue(), capture_output=True, timeout=60
        )
        if done.returncode:
            reason = " ".join(done.stderr.decode(errors="replace").split())[:200]
            raise PipelineError(f"tesseract fails ({reason}): try it on the picture by hand, or use RapidOCR")
        lines = (" ".join(line.split()) for line in done.stdout.decode(errors="replace").splitlines())
        return Step(self.name, seconds=time.perf_counter() - started, output="\n".join(filter(None, lines)))


class ImageNetTags:
    """ImageNet's likeliest labels, by EfficientNet-Lite2: the encoder that the embedded fused model has, as published.

    Raises:
        WeightsError: If it is not here; ``multimodal pull`` fetches it.
    """

    name = "tags"
    digest = f"imagenet-{ENCODER}-{LABELS}"

    @cached_property
    def _parts(self) -> tuple[Any, Any, dict[str, torch.Tensor], Sequence[str]]:
        from safetensors.torch import load_file
        from torchvision.models import ResNet101_Weights
        from transformers import ViTImageProcessor

        from multimodal.fusion.vision import VisionEncoder

        folder = locate(ENCODER)
        return (
            VisionEncoder.from_pretrained(folder).eval(),
            ViTImageProcessor.from_pretrained(folder),
            load_file(folder / "classifier.safetensors"),
            ResNet101_Weights.IMAGENET1K_V1.meta["categories"],
        )

    def prepare(self) -> None:
        """Load the models."""
        _ = self._parts

    @torch.inference_mode()
    def read(self, picture: Image.Image) -> Step:
        """Name what the picture is likeliest of, with probabilities."""
        encoder, prepare, classifier, names = self._parts
        started = time.perf_counter()
        pixels = prepare(picture, return_tensors="pt")["pixel_values"]
        features = encoder(pixels).features.mean(1)  # (1, D)
        chances = torch.nn.functional.linear(features, classifier["weight"], classifier["bias"]).softmax(-1)[0]
        shares, places = (each.tolist() for each in chances.topk(LABELS))
        labels = [names[place] for place in places]
        return Step(
            self.name,
            seconds=time.perf_counter() - started,
            output=", ".join(f"{label} {share:.0%}" for label, share in zip(labels, shares, strict=True)),
            details={"labels": labels, "shares": [round(share, 4) for share in shares]},
        )


class Captioner:
    """A sentence about the picture, by any captioner that transformers' ``image-text-to-text`` pipeline runs.

    Args:
        name: A folder or a hub id.

    Raises:
        PipelineError: If it cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self.name, self.digest, self._model = "caption", f"caption-{name}", name

    @cached_property
    def _pipeline(self) -> Any:
        from transformers import pipeline

        try:
            return pipeline("image-text-to-text", model=self._model)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PipelineError(
                f"the captioner {self._model!r} cannot be loaded: {reason}: give a folder or hub id that transformers' "
                "image-text-to-text pipeline runs"
            ) from error

    def prepare(self) -> None:
        """Load the models."""
        _ = self._pipeline

    def read(self, picture: Image.Image) -> Step:
        """Describe the picture."""
        pipeline, started = self._pipeline, time.perf_counter()
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe this picture."}]
        said = pipeline(
            text=[{"role": "user", "content": content}],
            return_full_text=False,
            generate_kwargs={"max_new_tokens": 64, "do_sample": False},
        )
        return Step(self.name, time.perf_counter() - started, str(said[0]["generated_text"]).strip())


class KeptReader:
    """A reader that reads each picture once: what it read is kept, in memory and, if wanted, on disk.

    Args:
        reader: Who reads.
        file: JSON lines; what other processes add is not seen. None keeps nothing beyond this object's life.

    Raises:
        ValueError: If the file holds something else.
    """

    def __init__(self, reader: Reader, file: Path | None = None) -> None:
        self.reader, self.name, self.digest = reader, reader.name, reader.digest
        self._journal = None if file is None else Journal(file)
        self._lock = threading.Lock()
        records = [] if self._journal is None else self._journal.read()
        self._kept = {each["picture"]: Step(**each["step"]) for each in records if each["reader"] == self.digest}

    def prepare(self) -> None:
        """Load what reading needs."""
        self.reader.prepare()

    def read(self, image: Any) -> Step:
        """What is to be read off a picture: anything that ``load_image`` takes; ``details["picture"]`` names it.

        Raises:
            ImageError: If it cannot be used.
        """
        encoded = read_encoded(image)
        picture = load_image(image) if encoded is None else None
        # The same bytes are another picture in another shape.
        data = f"{picture.size} ".encode() + picture.tobytes() if picture is not None else encoded.data  # type: ignore[union-attr]
        key = hashlib.sha256(data).hexdigest()[:32]
        with self._lock:  # one at a time: a second question about a picture waits for what the first one reads
            cached = key in self._kept
            if not cached:
                step = self.reader.read(picture or load_image(encoded))  # type: ignore[arg-type]
                self._kept[key] = step
                if self._journal is not None:
                    self._journal.append({"reader": self.digest, "picture": key, "step": asdict(step)})
            step = self._kept[key]
            return replace(step, cached=cached, details={**step.details, "picture": key, "kept": cached})
