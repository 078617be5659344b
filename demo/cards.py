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

if TYPE_CHECKING:
    from multimodal.pipelines import Answer, Step

SIDE = 640  # pixels of the picture on which boxes are drawn
ABOUT = {
    "native": "The fused model, which sees the picture.",
    "text_only": "The language model alone. Programs have read the picture for it.",
    "hybrid": "The fused model, which sees the picture and is told the text in it.",
    "blind": "The language model alone. It is told nothing of the picture.",
}
TITLES = {
    "ocr": "Text that was read",
    "tags": "What it may show",
    "caption": "Caption",
    "model": "The exact prompt",
    "llm": "The exact prompt",
}
ASKED = ("model", "llm")  # the step that the answer comes from: its output is what was sent


def waiting(pipeline: str, text: str = "") -> str:
    """A card without an answer yet, as HTML."""
    return _card(pipeline, f'<p class="doing" role="status">{escape(text)}</p>' if text else "")


def card(reply: Reply, picture: Image.Image) -> str:
    """A card, as HTML.

    Args:
        reply: With the answer, or why there is none.
        picture: Boxes are drawn on it.
    """
    answer = reply.answer
    if answer is None:
        return _card(reply.pipeline, f'<p class="notice" role="status">{escape(reply.error)}</p>')
    text = escape(answer.text) or "<em>(an empty answer)</em>"
    end = "" if answer.finished else '<p class="caption">Cut short at the length limit.</p>'
    return _card(reply.pipeline, f'<p class="said">{text}</p>{end}{_figures(answer)}{_saw(answer, picture)}')


def dollars(cost: float | None) -> str:
    """What a call cost, for people."""
    if cost is None:
        return "not known"
    return f"${cost:.5f}" if cost else "$0"


def _card(pipeline: str, inside: str) -> str:
    return (
        f'<article class="card" data-pipeline="{escape(pipeline)}"><h3>{escape(pipeline)}</h3>'
        f'<p class="caption">{escape(ABOUT.get(pipeline, ""))}</p>{inside}</article>'
    )


def _figures(answer: Answer) -> str:
    sure = "not known" if answer.confidence is None else f"{100 * answer.confidence:.0f} %"
    facts = [
        ("Confidence", sure),
        ("First token", f"{answer.first_token:.2f} s"),
        ("In all", f"{answer.total:.2f} s"),
        ("Tokens read", f"{answer.usage.prompt_tokens}"),
        ("Tokens written", f"{answer.usage.completion_tokens}"),
        ("Cost", dollars(answer.cost)),
    ]
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="figures">{rows}</dl>'


def _saw(answer: Answer, picture: Image.Image) -> str:
    seen = "The picture itself." if answer.usage.images else "Not the picture."
    steps = "".join(_step(step, picture) for step in answer.steps)
    return f'<details class="saw"><summary>What it saw</summary><p class="caption">{seen}</p>{steps}</details>'


def _step(step: Step, picture: Image.Image) -> str:
    took = "kept from before" if step.cached else f"{step.seconds:.2f} s"
    title = TITLES.get(step.name, step.name)
    note = "" if step.name in ASKED else f" <span>({escape(took)})</span>"
    boxes = step.details.get("boxes") or ()
    drawn = boxed(picture, boxes, step.output.splitlines()) if boxes else ""
    text = f"<pre>{escape(step.output)}</pre>" if step.output else '<p class="caption">Nothing.</p>'
    return f"<h4>{escape(title)}{note}</h4>{drawn}{text}"


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
