"""Many questions answered greedily: in batches of like length, each picture encoded once for all its questions.

What it does not know: which answers are right. What always holds: every sample is answered exactly once, and says which
it is, since batches come in another order than the samples.

Axes: B batch, T tokens, I images, R grid cells, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from multimodal.data import Sample
from multimodal.images import load_image
from multimodal.model import ModelError, MultiModalModel, conversation
from multimodal.training.features import ENCODE_BATCH
from multimodal.training.processes import at_a_time

# Tokens. The longest short answer of SLAKE's training split has 22; a sentence that goes on may be a little longer
# than the longest right answer, and is wrong anyhow.
SHORTEST_LIMIT, SPARE = 24, 8


@dataclass(frozen=True)
class Answered:
    """One batch.

    Attributes:
        places: Which of the samples these are.
        texts: What the model said.
        counts: Tokens of each answer, its end included.
        finished: Whether an answer came to its end.
        logprobs: Log-probability of each answer, its end included.
        inputs: What ``generate`` was given: ``input_ids`` and ``attention_mask`` ``(B, T)``, padded on the left, and
            ``image_features`` ``(B, I, R, D)`` if there are pictures.
        sequences: ``(B, T_all)``, prompts and answers.
    """

    places: list[int]
    texts: list[str]
    counts: list[int]
    finished: list[bool]
    logprobs: list[float]
    inputs: dict[str, torch.Tensor]
    sequences: torch.Tensor

    @property
    def prompt_length(self) -> int:
        """Length of the prompts, padding included."""
        return self.inputs["input_ids"].shape[1]


class PictureFeatures:
    """What the encoder makes of pictures, by path, kept while there is room. Several runs may share it.

    Args:
        model: Its encoder and image processor are used.
        room: Bytes.
    """

    def __init__(self, model: MultiModalModel, room: int = 2**30) -> None:
        self.model, self.room, self.encoded = model, room, 0
        self._kept: OrderedDict[Path, torch.Tensor] = OrderedDict()

    def of(self, rows: Sequence[Sequence[Path]]) -> torch.Tensor | None:
        """Features ``(B, I, R, D)`` of rows of pictures, short rows padded with zeros; None where there is no picture.

        Raises:
            ImageError: If a picture cannot be used.
        """
        wanted = dict.fromkeys(path for row in rows for path in row)
        if not wanted:
            return None
        self._encode([path for path in wanted if path not in self._kept])
        for path in wanted:
            self._kept.move_to_end(path)
        first = self._kept[next(iter(wanted))]
        features = first.new_zeros(len(rows), max(map(len, rows)), *first.shape)
        for index, row in enumerate(rows):
            for place, path in enumerate(row):
                features[index, place] = self._kept[path]
        while len(self._kept) * first.nbytes > self.room:
            self._kept.popitem(last=False)
        return features

    def _encode(self, paths: Sequence[Path]) -> None:
        prepare, fused = self.model.processor.image_processor, self.model.model
        size = at_a_time(ENCODE_BATCH)
        for start in range(0, len(paths), size):
            some = paths[start : start + size]
            pixels = prepare([load_image(path) for path in some], return_tensors="pt")["pixel_values"]
            self._kept.update(zip(some, fused.model.get_image_features(pixels.to(fused.device)).features, strict=True))
            self.encoded += len(some)


@torch.inference_mode()
def answer_all(
    model: MultiModalModel,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    pictures: PictureFeatures | None = None,
    progress: bool = True,
) -> Iterator[Answered]:
    """Answer every sample greedily.

    Args:
        model: A trained model.
        samples: Questions and their pictures.
        batch_size: Questions at a time.
        max_new_tokens: At most so many tokens; None takes what the longest of the samples' own answers needs.
        pictures: Features of pictures that other runs may have made.
        progress: Show a bar.

    Raises:
        ImageError: If a picture cannot be used.
        ModelError: If a question is too long for the model.
    """
    pictures = pictures or PictureFeatures(model)
    limit = max_new_tokens or answer_limit(model, samples)
    prompts = model.tokenise([conversation(sample.question, sample.images) for sample in samples]) if samples else []
    order = sorted(range(len(samples)), key=lambda place: (len(prompts[place]), len(samples[place].answer)))
    with tqdm(total=len(samples), desc="answers", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs: dict[str, torch.Tensor] = dict(
                model.processor.tokenizer.pad(
                    {"input_ids": [prompts[place] for place in places]}, return_tensors="pt"
                ).to(model.model.device)
            )
            features = pictures.of([samples[place].images for place in places])
            if features is not None:
                inputs["image_features"] = features
            yield _generate(model, places, inputs, _within(model, inputs["input_ids"].shape[1], limit))
            bar.update(len(places))


def answer_limit(model: MultiModalModel, samples: Sequence[Sample]) -> int:
    """How many tokens the longest of the samples' answers takes, and a few more."""
    answers = [sample.answer for sample in samples if sample.answer]
    if not answers:
        return SHORTEST_LIMIT
    tokens = model.processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    return max(max(map(len, tokens)) + SPARE, SHORTEST_LIMIT)


def _within(model: MultiModalModel, prompt_length: int, limit: int) -> int:
    most = model.model.config.text_config.max_position_embeddings
    if prompt_length >= most:
        raise ModelError(f"a question has {prompt_length} tokens, where the model takes {most} in all: leave it out")
    return min(limit, most - prompt_length)


def _generate(model: MultiModalModel, places: list[int], inputs: dict[str, torch.Tensor], limit: int) -> Answered:
    sure = _Likeliest()
    sequences = model.model.generate(
        **inputs, max_new_tokens=limit, do_sample=False, logits_processor=LogitsProcessorList([sure])
    )
    new = sequences[:, inputs["input_ids"].shape[1] :]  # (B, T_new)
    ends = torch.tensor(sorted(model.end_tokens), dtype=new.dtype, device=new.device)
    is_end = torch.isin(new, ends)
    # Up to the first end; behind it stands padding.
    said = is_end.cumsum(-1) - is_end.long() == 0  # (B, T_new)
    logprobs = torch.stack(sure.logprobs[: new.shape[1]], dim=1)
    return Answered(
        places=places,
        texts=[text.strip() for text in model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)],
        counts=said.sum(-1).tolist(),
        finished=is_end.any(-1).tolist(),
        logprobs=(logprobs * said).sum(-1).tolist(),
        inputs=inputs,
        sequences=sequences,
    )


class _Likeliest(LogitsProcessor):
    """Notes the log-probability of the likeliest token in every step, which is what greedy decoding takes.

    ``output_logits`` would keep the whole vocabulary for every step: a gigabyte where the answers are long.
    """

    def __init__(self) -> None:
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the scores as they are."""
        self.logprobs.append(scores.float().log_softmax(-1).amax(-1))
        return scores
