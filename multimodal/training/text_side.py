"""Training the decoder alone, by LoRA, to answer without seeing: the fair rival of a fused model.

A text model that was never trained on the task, beside a fused one that was, would credit the picture with what
training did. So the same decoder learns from the same examples what the text-only pipeline would send it (text and
labels that programs read off the picture), or the question alone. What comes out is an adapter of the fused model:
without a picture a fused model is its decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from multimodal.data import Sample
from multimodal.pipelines.prompts import TEXT_ONLY, ReadingPrompt
from multimodal.pipelines.readers import ImageNetTags, KeptReader, RapidOcr

BLIND, READ = "blind", "text_only"  # the pipelines whose prompts can be trained on


def kept_readers(folder: Path | None = None) -> list[KeptReader]:
    """The readers of the text-only pipeline, with what they read kept in a folder."""
    return [
        KeptReader(reader, None if folder is None else folder / f"{reader.name}.jsonl")
        for reader in (RapidOcr(), ImageNetTags())
    ]


def as_text(samples: Sequence[Sample], pipeline: str, cache: Path) -> list[Sample]:
    """What a pipeline would send to its text model in each sample's place.

    Args:
        samples: With pictures.
        pipeline: ``"text_only"``, or ``"blind"``.
        cache: Folder for what is read off pictures.

    Raises:
        ValueError: If there is no such pipeline.
        ImageError: If a picture cannot be used.
    """
    if pipeline == BLIND:
        return [replace(sample, images=(), boxes=()) for sample in samples]
    if pipeline != READ:
        raise ValueError(f"pipeline = {pipeline!r} cannot be trained for: use {BLIND!r} or {READ!r}")
    prompt = ReadingPrompt(kept_readers(cache), TEXT_ONLY)
    return [
        replace(sample, question=prompt.of(sample.question, sample.images)[0], images=(), boxes=())
        for sample in tqdm(samples, desc="reading pictures")
    ]
