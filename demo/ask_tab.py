"""The tab "Ask": one question to the model, its answer word by word, and where it looked.

What it does: lays its parts out and joins them to `Asking`, which runs the model, and to `explanation` and
`multimodal.drawing`, which show what is known of an answer.

What it does not know: how the model is loaded, the other tabs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from demo.asking import Asking, Step
from demo.explanation import ON_LOAD, WHOLE_ANSWER, doing, figures, heat_legend, unsure_notice, word_buttons
from demo.shared import (
    AT_ONCE,
    NOTICE,
    QUICK,
    SHOWN_SIDE,
    PictureChooser,
    asks_nothing,
    fitted,
    reason,
    session_of,
    warn,
)
from multimodal.drawing import Word, answer_words, attention_maps, attention_overlay, heat_top

if TYPE_CHECKING:
    from multimodal.model import Answer

# Two answers share the cores well; more make everybody wait for everybody. The others queue, and see their place.
ANSWERS_AT_ONCE = 2
NO_ADAPTER = ""  # a name that none has
HEADER = """
<header><h1>Ask about a picture</h1>
<p>One model reads your picture and your question together, answers from both, and shows where it looked.
Nothing you upload leaves this machine, and it is deleted within an hour of your closing the page.</p></header>
"""


@dataclass(frozen=True)
class Explained:
    """A finished answer, kept with the picture so that its words can be chosen."""

    picture: Image.Image
    answer: Answer
    words: list[Word]


def ask_tab(asking: Asking, *, adapters: Sequence[str] = ()) -> tuple[gr.State, gr.Textbox]:
    """The tab's parts, made where it is to stand.

    Args:
        asking: Runs the model.
        adapters: Names of the model's adapters, to choose from.

    Returns:
        The picture and the question, for tabs that go on with them.
    """
    explained = gr.State(None)
    number = gr.Number(0, precision=0, visible=False)  # bound to a question when it is asked, unlike a State
    gr.HTML(HEADER)
    with gr.Row(elem_id="main"):
        with gr.Column(scale=5, min_width=300, elem_id="look", elem_classes="half"):
            chooser = PictureChooser()
        with gr.Column(scale=6, min_width=300, elem_id="talk", elem_classes="half"):
            prompt = gr.Textbox(
                label="Your question",
                placeholder="What do you want to know about the picture? Enter asks.",
                max_lines=5,
                max_length=4000,
                elem_id="prompt",
            )
            adapter = gr.Dropdown(
                [("none", NO_ADAPTER), *((name, name) for name in adapters)],
                value=NO_ADAPTER,
                label="Adapter",
                info="What the model was adapted to; none is the model as it came.",
                visible=bool(adapters),
                elem_id="adapter",
            )
            with gr.Row(elem_id="buttons"):
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop", elem_classes="stop")
            answer = gr.Textbox(
                label="Answer",
                placeholder="The answer appears here, word by word.",
                lines=3,
                max_lines=12,
                interactive=False,
                buttons=["copy"],
                elem_id="answer",
            )
            status = gr.HTML(elem_id="status")
            gr.HTML(NOTICE)
            with gr.Column(visible=False, elem_id="explanation") as explanation:
                gr.HTML("<h2>Where the model looked</h2>")
                overlay = gr.Image(
                    show_label=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="overlay",
                    alt_text="The picture with the model's attention as heat over it",
                )
                legend = gr.HTML()
                words = gr.HTML(js_on_load=ON_LOAD, apply_default_css=False, elem_id="words")
            with gr.Accordion("Options", open=False):
                length = gr.Slider(8, 512, value=128, step=8, label="Longest answer, in tokens", elem_id="length")
                least = gr.Slider(0, 100, value=50, step=5, label="Say so when less sure than, in %", elem_id="least")

    picture = chooser.picture
    telling = [answer, status, explanation, overlay, legend, words, explained, ask, stop]

    def begin(text: str, image: Image.Image | None, request: gr.Request) -> tuple[int, Any, *tuple[Any, ...]]:
        if asks_nothing(text, image):
            return 0, *(gr.skip() for _ in telling)  # no question has this number
        waiting = Step("Waiting for its turn \N{HORIZONTAL ELLIPSIS}")
        return asking.new_question(session_of(request)), *_told(waiting, image)

    def tell(
        number: float,
        text: str,
        image: Image.Image,
        limit: float,
        least: float,
        chosen: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        steps = asking.ask(
            session_of(request),
            int(number),
            text,
            image,
            max_new_tokens=int(limit),
            min_confidence=least / 100,
            adapter=chosen or None,
        )
        try:
            for step in steps:
                yield _told(step, image)
        except Exception as error:
            warn(reason(error), title="No answer")
            yield _told(Step(""), image, running=False)
        finally:
            steps.close()  # Gradio closes this generator when the asker has gone

    def end(image: Image.Image | None, request: gr.Request) -> tuple[Any, ...]:
        written = asking.stop(session_of(request))
        return _told(Step("Stopped before the first word.", answer=written), image, running=False)

    def choose_word(found: Explained | None, event: gr.EventData) -> tuple[Any, Any]:
        return _looked(found, event.word) if found else (gr.skip(), gr.skip())

    def cleared(image: Image.Image, request: gr.Request) -> tuple[Any, ...]:
        asking.stop(session_of(request))
        return _told(Step(""), image, running=False)

    begun = gr.on([ask.click, prompt.submit], begin, [prompt, picture], [number, *telling], **QUICK)
    begun.then(
        tell,
        [number, prompt, picture, length, least, adapter],
        telling,
        show_progress_on=status,
        show_progress="minimal",
        trigger_mode="multiple",  # a new question may come while the last one is being answered
        concurrency_limit=ANSWERS_AT_ONCE,
        api_visibility="private",
    )
    stop.click(end, picture, telling, **AT_ONCE)
    words.click(choose_word, explained, [overlay, legend], **AT_ONCE)
    chooser.on_open(prompt, telling, cleared)
    return picture, prompt


def _told(step: Step, image: Image.Image | None, *, running: bool = True) -> tuple[Any, ...]:
    """A step as values for the parts in ``telling``."""
    if step.answer is None or image is None:
        return step.text, doing(step.doing), gr.Group(visible=False), None, "", "", None, *_buttons(running=running)
    found = Explained(fitted(image, SHOWN_SIDE), step.answer, answer_words(step.answer))
    return (
        step.answer.text or "(The model gave an empty answer.)",
        unsure_notice(step.answer) + figures(step.answer),
        gr.Group(visible=bool(found.words)),
        *_looked(found, WHOLE_ANSWER),
        word_buttons(found.words),
        found,
        *_buttons(running=False),
    )


def _looked(found: Explained, index: int) -> tuple[Image.Image, str]:
    """The attention picture of a word, or of the whole answer, and its legend."""
    word = found.words[index] if 0 <= index < len(found.words) else None
    heat = attention_maps(found.answer, word)[0]
    top = heat_top(heat)
    return attention_overlay(found.picture, heat, top=top), heat_legend(float(heat.max()), top)


def _buttons(*, running: bool) -> tuple[Any, Any]:
    return gr.Button(visible=not running), gr.Button(visible=running)
