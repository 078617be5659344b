"""The page: its parts, and what happens when somebody uses them.

What it does: lays the parts out and joins them to `Asking`, which runs the model, and to `explanation` and
`multimodal.drawing`, which show what is known of an answer.

What it does not know: how the model is loaded, where the server listens.

What always holds: an uploaded file meets `load_image` before anything else opens it, and is deleted right after; the
page asks no host but its own for anything.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from demo.asking import Asking, Step
from demo.explanation import ON_LOAD, WHOLE_ANSWER, doing, figures, heat_legend, unsure_notice, word_buttons
from multimodal.drawing import Word, answer_words, attention_maps, attention_overlay, heat_top
from multimodal.images import MAX_BYTES, ImageError, load_image
from multimodal.samples import SamplePicture, sample_images

if TYPE_CHECKING:
    from multimodal.model import Answer

CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
# A picture is kept for as long as its page is open: at most so many pixels a side, where the model sees about 260.
KEPT_SIDE, SHOWN_SIDE, THUMBNAIL_SIDE = 2048, 1024, 256
# Two answers share the cores well; more make everybody wait for everybody. The others queue, and see their place.
ANSWERS_AT_ONCE, QUEUE = 2, 32
# Seconds. Pictures that were shown lie in files of the server until the browser has fetched them.
SWEEP_EVERY, SHOWN_FOR = 300, 1800
NO_ADAPTER = ""  # a name that none has

HEADER = """
<header><h1>Ask about a picture</h1>
<p>One model reads your picture and your question together, answers from both, and shows where it looked.
Nothing you upload leaves this machine, and it is deleted within an hour of your closing the page.</p></header>
"""
FORMATS = f"PNG, JPEG, WEBP, GIF, TIFF, BMP or DICOM, up to {MAX_BYTES >> 20} MB. Or try one of these:"
NOTICE = """
<p class="notice"><strong>Not a medical device.</strong> Answers can be wrong, also when they sound sure:
never use them for diagnosis or treatment.</p>
"""


@dataclass(frozen=True)
class Explained:
    """A finished answer, kept with the picture so that its words can be chosen."""

    picture: Image.Image
    answer: Answer
    words: list[Word]


def build(asking: Asking, *, model_name: str, adapters: Sequence[str] = ()) -> gr.Blocks:
    """The page.

    Args:
        asking: Runs the model.
        model_name: Shown to the reader.
        adapters: Names of the model's adapters, to choose from.
    """
    samples = sample_images()
    with gr.Blocks(title="Ask about a picture", delete_cache=(SWEEP_EVERY, SHOWN_FOR), analytics_enabled=False) as page:
        picture, explained = gr.State(None), gr.State(None)
        number = gr.Number(0, precision=0, visible=False)  # bound to a question when it is asked, unlike a State
        gr.HTML(HEADER)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=300, elem_id="look"):
                shown = gr.Image(
                    show_label=False,
                    interactive=False,
                    visible=False,
                    buttons=["fullscreen"],
                    elem_id="picture",
                    alt_text="The picture to ask about",
                )
                upload = gr.File(show_label=False, elem_id="upload")
                gr.HTML(f'<p class="caption">{FORMATS}</p>')
                gallery = gr.Gallery(
                    [(_fitted(load_image(sample.path), THUMBNAIL_SIDE), sample.caption) for sample in samples],
                    show_label=False,
                    visible=bool(samples),
                    columns=3,
                    height="auto",
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="samples",
                )
            with gr.Column(scale=6, min_width=300, elem_id="talk"):
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
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
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
                    least = gr.Slider(
                        0, 100, value=50, step=5, label="Say so when less sure than, in %", elem_id="least"
                    )
        gr.HTML(f'<p class="caption">Model: {escape(model_name)}</p>')

        telling = [answer, status, explanation, overlay, legend, words, explained, ask, stop]

        def begin(text: str, image: Image.Image | None, request: gr.Request) -> tuple[int, Any, *tuple[Any, ...]]:
            if image is None:
                _warn("Add a picture first, or choose one of the examples.", title="No picture yet")
            elif not text.strip():
                _warn("Type what you want to know about the picture.", title="No question yet")
            if image is None or not text.strip():
                return 0, *(gr.skip() for _ in telling)  # no question has this number
            waiting = Step("Waiting for its turn \N{HORIZONTAL ELLIPSIS}")
            return asking.new_question(_session(request)), *_told(waiting, image)

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
                _session(request),
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
                _warn(_reason(error), title="No answer")
                yield _told(Step(""), image, running=False)
            finally:
                steps.close()  # Gradio closes this generator when the asker has gone

        def end(image: Image.Image | None, request: gr.Request) -> tuple[Any, ...]:
            written = asking.stop(_session(request))
            return _told(Step("Stopped before the first word.", answer=written), image, running=False)

        def leave(request: gr.Request) -> None:
            asking.stop(_session(request))

        def choose_word(found: Explained | None, event: gr.EventData) -> tuple[Any, Any]:
            return _looked(found, event.word) if found else (gr.skip(), gr.skip())

        def open_upload(path: str, request: gr.Request) -> tuple[Any, ...]:
            try:
                image = load_image(path)
            except ImageError as error:
                _warn(str(error), title="This picture can't be used")
                return None, *(gr.skip() for _ in opened)
            finally:
                Path(path).unlink(missing_ok=True)
            return None, *_opened(image, gr.skip(), request)

        def open_sample(request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
            sample: SamplePicture = samples[event.index]
            return _opened(load_image(sample.path), sample.prompt, request)

        def _opened(image: Image.Image, text: Any, request: gr.Request) -> tuple[Any, ...]:
            asking.stop(_session(request))
            cleared = _told(Step(""), image, running=False)
            return _fitted(image, KEPT_SIDE), gr.Image(_fitted(image, SHOWN_SIDE), visible=True), text, *cleared

        begun = gr.on([ask.click, prompt.submit], begin, [prompt, picture], [number, *telling], **_QUICK)
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
        stop.click(end, picture, telling, **_AT_ONCE)
        words.click(choose_word, explained, [overlay, legend], **_AT_ONCE)
        opened = [picture, shown, prompt, *telling]
        upload.upload(open_upload, upload, [upload, *opened], **_QUICK)
        gallery.select(open_sample, None, opened, **_QUICK)
        page.unload(leave)
    return page.queue(max_size=QUEUE)


def launch_options() -> dict[str, Any]:
    """What the page needs of ``launch``: its looks, its limits, and that it keeps nothing."""
    return {
        "theme": gr.themes.Soft(primary_hue="violet", font=["sans-serif"], font_mono=["monospace"]).set(
            block_label_background_fill="transparent",
            block_label_background_fill_dark="transparent",
            block_label_text_color="*body_text_color",
            block_label_text_color_dark="*body_text_color",
            block_title_background_fill="transparent",
            block_title_background_fill_dark="transparent",
            block_title_text_color="*body_text_color",
            block_title_text_color_dark="*body_text_color",
            block_title_padding="0",
            block_shadow="none",
            input_border_width="1px",
            input_border_color="*neutral_300",
        ),
        "css": CSS,
        "max_file_size": MAX_BYTES,
        "state_session_capacity": 100,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "share": False,
        "quiet": True,
    }


# For events that take next to no time: no spinner, no waiting for others. A full queue must not keep one from stopping.
_QUICK: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
_AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def _told(step: Step, image: Image.Image | None, *, running: bool = True) -> tuple[Any, ...]:
    """A step as values for the parts in ``telling``."""
    if step.answer is None or image is None:
        return step.text, doing(step.doing), gr.Group(visible=False), None, "", "", None, *_buttons(running=running)
    found = Explained(_fitted(image, SHOWN_SIDE), step.answer, answer_words(step.answer))
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


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """No larger than ``side``."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _warn(message: str, *, title: str) -> None:
    gr.Warning(escape(message), title=title)  # Gradio shows it as HTML


def _reason(error: Exception) -> str:
    """What to tell the asker; what was not foreseen is printed in the terminal as well."""
    from multimodal.adapters import AdapterError
    from multimodal.model import ModelError
    from multimodal.weights import WeightsError

    if isinstance(error, ImageError | ModelError | AdapterError | WeightsError):
        return str(error)
    traceback.print_exception(error)
    return "Something went wrong. The terminal in which the demo runs says what."


def _session(request: gr.Request) -> str:
    assert request.session_hash is not None  # every event of a page carries one
    return request.session_hash
