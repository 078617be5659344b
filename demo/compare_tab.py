"""The tab "Compare": one picture and one question, four ways of answering side by side, and a vote.

What it does: lays its parts out and joins them to `Comparing`, which asks, and to `cards`, which show what came.

What it does not know: how answers are made, the other tabs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from PIL import Image

from demo.cards import card, waiting
from demo.comparing import NAMES, Compared, Comparing, Reply
from demo.conversation import Turns, about
from demo.explanation import doing
from demo.picture_chooser import PictureChooser
from demo.shared import AT_ONCE, QUICK, asks_nothing, reason, session_of, warn
from demo.wording import TEXT, language_of, say
from multimodal.store import StoreError
from multimodal.store.feedback import EQUAL


def compare_tab(comparing: Comparing, tab: gr.Tab, conversation: gr.State) -> None:
    """The tab's parts, made where it is to stand.

    Args:
        comparing: Asks the pipelines.
        tab: The tab.
        conversation: That of the tab "Ask", to go on with its picture and question.
    """
    compared = gr.State(None)
    number = gr.Number(0, precision=0, visible=False)  # bound to a question when it is asked, unlike a State
    gr.HTML(TEXT("compare_header"))
    with gr.Row():
        with gr.Column(scale=5, min_width=300, elem_classes="half"):
            chooser = PictureChooser("compare")
        with gr.Column(scale=6, min_width=300, elem_classes="half"):
            prompt = gr.Textbox(
                label=TEXT("compare_question"),
                placeholder=TEXT("compare_hint"),
                max_lines=5,
                max_length=4000,
                elem_id="compare-prompt",
            )
            with gr.Row():
                ask = gr.Button(TEXT("compare"), variant="primary", elem_id="compare")
                stop = gr.Button(TEXT("stop"), variant="stop", visible=False, elem_id="compare-stop")
            status = gr.HTML(elem_id="compare-status")
            gr.HTML(TEXT("notice"))
            gr.HTML(TEXT("compare_time"))
            with gr.Accordion(TEXT("options"), open=False):
                length = gr.Slider(8, 256, value=64, step=8, label=TEXT("longest"), elem_id="compare-length")
    cards, buttons = [], []
    with gr.Row(elem_id="cards"):
        for name in NAMES:
            with gr.Column(min_width=240):
                cards.append(gr.HTML(waiting(name), apply_default_css=False, elem_id=f"card-{name}"))
                buttons.append(gr.Button(TEXT(f"{name}_better"), size="sm", visible=False, elem_id=f"vote-{name}"))
    with gr.Column(visible=False, elem_id="voting") as voting:
        gr.HTML(TEXT("compare_votes"))
        equal = gr.Button(TEXT("equal"), size="sm", elem_id="vote-equal")

    picture, choices = chooser.picture, [*buttons, voting]
    telling = [status, *cards, *choices, compared, ask, stop]

    def told(
        said: str, *, shown: dict[str, str] | None = None, running: bool, found: Compared | None = None
    ) -> tuple[Any, ...]:
        """Values for the parts in ``telling``: ``shown`` has the cards that change, by pipeline."""
        return (
            doing(said),
            *((shown or {}).get(name, gr.skip()) for name in NAMES),
            *_voting(found),
            found,
            gr.Button(visible=not running),
            gr.Button(visible=running),
        )

    def begin(text: str, image: Image.Image | None, request: gr.Request) -> tuple[Any, ...]:
        language = language_of(request)
        if asks_nothing(text, image is not None, language):
            return 0, *(gr.skip() for _ in telling)  # no comparison has this number
        number = comparing.new_question(session_of(request))
        return number, *told(say("waiting", language), shown=_blank(language), running=True)

    def tell(number: float, text: str, image: Image.Image, limit: float, request: gr.Request) -> Iterator[Any]:
        yield tuple(gr.skip() for _ in telling)  # or Gradio would empty all parts when nothing comes of the question
        replies: list[Reply] = []
        language = language_of(request)
        try:
            for step in comparing.ask(session_of(request), int(number), text, image, max_new_tokens=int(limit)):
                said = say(step.doing, language, pipeline=step.running) if step.doing != "done" else ""
                if step.reply is not None:
                    replies.append(step.reply)
                    yield told(said, shown={step.reply.pipeline: card(step.reply, image, language)}, running=True)
                elif said:
                    yield told(said, shown=_asked(step.running, language), running=True)
                else:
                    yield told("", running=False, found=Compared(text.strip(), image, tuple(replies)))
        except Exception as error:
            warn(reason(error), title=say("no_answer_title", language))
            yield told("", shown=_blank(language), running=False)

    def end(request: gr.Request) -> tuple[Any, ...]:
        running, language = comparing.stop(session_of(request)), language_of(request)
        return told(say("comparison_stopped", language), shown={running: waiting(running, "", language)}, running=False)

    def voter(better: str) -> Callable[..., tuple[Any, ...]]:
        def vote(found: Compared | None, request: gr.Request) -> tuple[Any, ...]:
            unchanged = tuple(gr.skip() for _ in range(len(choices) + 2))
            if found is None:
                return unchanged
            try:
                comparing.vote(found, better)
            except StoreError as error:
                warn(str(error), title=say("feedback_lost_title", language_of(request)))
                return unchanged
            return doing(say("vote_kept", language_of(request))), *_voting(None), None

        return vote

    def arrive(turns: Turns, mine: Image.Image | None, written: str, request: gr.Request) -> tuple[Any, ...]:
        """The samples; and what the tab "Ask" is about, where nothing was chosen here."""
        blank = _blank(language_of(request)).values() if mine is None else (gr.skip() for _ in NAMES)
        if mine is not None or not about(turns):
            return chooser.samples(), gr.skip(), gr.skip(), gr.skip(), *blank
        return chooser.samples(), *chooser.values(about(turns)[0]), written or turns[-1].question, *blank

    def cleared(request: gr.Request) -> tuple[Any, ...]:
        comparing.stop(session_of(request))
        return told("", shown=_blank(language_of(request)), running=False)

    begun = gr.on([ask.click, prompt.submit], begin, [prompt, picture], [number, *telling], **QUICK)
    begun.then(
        tell,
        [number, prompt, picture, length],
        telling,
        show_progress="hidden",
        trigger_mode="multiple",  # a new question may come while the last one is being answered
        concurrency_limit=1,
        api_visibility="private",
    )
    stop.click(end, None, telling, **AT_ONCE)
    for name, button in zip((*NAMES, EQUAL), (*buttons, equal), strict=True):
        button.click(voter(name), compared, [status, *choices, compared], **QUICK)
    arrived = [chooser.gallery, *chooser.outputs, prompt, *cards]
    tab.select(arrive, [conversation, picture, prompt], arrived, **QUICK)
    chooser.on_open(prompt, telling, cleared)


def _blank(language: str) -> dict[str, str]:
    return {name: waiting(name, "", language) for name in NAMES}


def _asked(pipeline: str, language: str) -> dict[str, str]:
    return {pipeline: waiting(pipeline, say("answering", language), language)} if pipeline else {}


def _voting(found: Compared | None) -> tuple[Any, ...]:
    """The buttons of those that answered, where two or more did."""
    answered = {reply.pipeline for reply in found.replies if reply.answer is not None} if found else set()
    enough = len(answered) > 1
    return *(gr.Button(visible=enough and name in answered) for name in NAMES), gr.Column(visible=enough)
