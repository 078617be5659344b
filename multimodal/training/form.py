"""The test of form: forty prompts of the kind that people type, and what is wrong with the form of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multimodal.data import Sample
from multimodal.data.prompts import FORM_PROMPTS, PICTURES, FormPrompt, check_form
from multimodal.model import MultiModalModel
from multimodal.samples import sample_images
from multimodal.training.evaluation import predict

MAX_NEW_TOKENS = 128  # what `ask` and the demo allow if nobody says otherwise


@dataclass(frozen=True)
class FormAnswer:
    """A prompt, what the model said, and what is wrong with its form; nothing for a good answer."""

    prompt: FormPrompt
    text: str
    problems: tuple[str, ...]


def check_prompts(
    model: MultiModalModel, *, batch_size: int = 32, max_new_tokens: int = MAX_NEW_TOKENS, progress: bool = True
) -> list[FormAnswer]:
    """Ask the forty prompts, each about its sample picture.

    Args:
        model: A trained model.
        batch_size: Prompts at a time.
        max_new_tokens: At most so many tokens; an answer that is longer is cut.
        progress: Show a bar.

    Raises:
        ValueError: If the sample pictures are not here.
    """
    here = {sample.path.name: sample.path for sample in sample_images()}
    if missing := sorted(set(PICTURES.values()) - here.keys()):
        raise ValueError(f"the sample pictures {', '.join(missing)} are not here: run it in a clone, which has assets/")
    asked = [Sample(prompt.prompt, "", (here[PICTURES[prompt.picture]],)) for prompt in FORM_PROMPTS]
    predictions = predict(model, asked, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress)
    return [
        FormAnswer(prompt, prediction.text, tuple(check_form(prediction.text, prompt.language)))
        for prompt, prediction in zip(FORM_PROMPTS, predictions, strict=True)
    ]


def table_of(answers: Sequence[FormAnswer]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table."""
    rows = [
        [answer.prompt.prompt, answer.prompt.picture, answer.text, ", ".join(answer.problems) or "good"]
        for answer in answers
    ]
    return ["prompt", "picture", "answer", "form"], rows
