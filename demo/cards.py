"""What is shown of a pipeline's reply: a card with its answer, its figures, and in a fold what it saw.

What it does: turns a reply into HTML. What it does not know: Gradio, events, how the reply was made.

What always holds: everything that a model, a reader or a person wrote is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from demo.comparing import Reply
from demo.shared import fitted
from demo.wording import WORDS, say

if TYPE_CHECKING:
    from multimodal.pipelines import Answer, Step

SIDE = 640  # pixels of the picture on which boxes are drawn
TITLES = {  # of steps; others are called as they are
    "ocr": "step_ocr",
    "tags": "step_tags",
    "caption": "step_caption",
    "model": "step_prompt",
    "llm": "step_prompt",
}
ASKED = ("model", "llm")  # the step that the answer comes from: its output is what was sent


def waiting(pipeline: str, text: str = "", language: str = "en") -> str:
    """A card without an answer yet, as HTML."""
    inside = f'<p class="doing" role="status">{escape(text)}</p>' if text else ""
    return _card(pipeline, inside, language)


def card(reply: Reply, picture: Image.Image, language: str = "en") -> str:
    """A card, as HTML.

    Args:
        reply: With the answer, or why there is none.
        picture: Boxes are drawn on it.
        language: As `demo.wording` has it.
    """
    answer = reply.answer
    if answer is None:
        return _card(reply.pipeline, f'<p class="notice" role="status">{escape(reply.error)}</p>', language)
    text = escape(answer.text) or f"<em>{say('empty_answer', language)}</em>"
    end = "" if answer.finished else f'<p class="caption">{say("cut_at_limit", language)}</p>'
    told = f'<p class="said">{text}</p>{end}{_figures(answer, language)}{_saw(answer, picture, language)}'
    return _card(reply.pipeline, told, language)


def dollars(cost: float | None, language: str = "en") -> str:
    """What a call cost, for people."""
    if cost is None:
        return say("not_known", language)
    return f"${cost:.5f}" if cost else "$0"


def _card(pipeline: str, inside: str, language: str) -> str:
    about = say(f"about_{pipeline}", language) if f"about_{pipeline}" in WORDS[language] else ""
    return (
        f'<article class="card" data-pipeline="{escape(pipeline)}"><h2>{escape(pipeline)}</h2>'
        f'<p class="caption">{about}</p>{inside}</article>'
    )


def _figures(answer: Answer, language: str) -> str:
    sure = say("not_known", language) if answer.confidence is None else f"{100 * answer.confidence:.0f} %"
    facts = [
        ("figure_confidence", sure),
        ("figure_first_token", f"{answer.first_token:.2f} s"),
        ("figure_in_all", f"{answer.total:.2f} s"),
        ("figure_read", f"{answer.usage.prompt_tokens}"),
        ("figure_written", f"{answer.usage.completion_tokens}"),
        ("figure_cost", dollars(answer.cost, language)),
    ]
    rows = "".join(f"<div><dt>{say(name, language)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="figures">{rows}</dl>'


def _saw(answer: Answer, picture: Image.Image, language: str) -> str:
    seen = say("saw_picture" if answer.usage.images else "saw_no_picture", language)
    steps = "".join(_step(step, picture, language) for step in answer.steps)
    return (
        f'<details class="saw"><summary>{say("what_it_saw", language)}</summary><p class="caption">{seen}</p>'
        f"{steps}</details>"
    )


def _step(step: Step, picture: Image.Image, language: str) -> str:
    took = say("kept_from_before", language) if step.cached else f"{step.seconds:.2f} s"
    title = say(TITLES[step.name], language) if step.name in TITLES else escape(step.name)
    note = "" if step.name in ASKED else f" <span>({took})</span>"
    boxes = step.details.get("boxes") or ()
    drawn = boxed(picture, boxes, step.output.splitlines()) if boxes else ""
    nothing = f'<p class="caption">{say("nothing", language)}</p>'
    text = f"<pre>{escape(step.output)}</pre>" if step.output else nothing
    return f"<h3>{title}{note}</h3>{drawn}{text}"


def boxed(picture: Image.Image, boxes: Sequence[Sequence[float]], lines: Sequence[str] = ()) -> str:
    """The picture with boxes on it, as HTML.

    Args:
        picture: Any size.
        boxes: ``[x, y, width, height]`` as shares of the picture.
        lines: What was read in each; shown when the pointer is over it.
    """
    frames = "".join(
        f'<rect x="{x:.4f}" y="{y:.4f}" width="{max(width, 0):.4f}" height="{max(height, 0):.4f}">'
        f"<title>{escape(line)}</title></rect>"
        for (x, y, width, height), line in _labelled(boxes, lines)
    )
    return (
        f'<div class="boxed"><img src="{_data_uri(picture)}" alt="The picture, with the text that was read framed">'
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{frames}</svg></div>'
    )


def _labelled(boxes: Sequence[Sequence[float]], lines: Sequence[str]) -> list[tuple[Sequence[float], str]]:
    said = lines if len(lines) == len(boxes) else [""] * len(boxes)
    return list(zip(boxes, said, strict=True))


def _data_uri(picture: Image.Image) -> str:
    stream = BytesIO()
    fitted(picture, SIDE).convert("RGB").save(stream, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
