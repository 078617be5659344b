"""The tab "Compare": one picture and one question, four ways of answering side by side, and a vote.

What it does: lays its parts out and joins them to `Comparing`, which asks, and to `cards`, which show what came.

What it does not know: how answers are made, the other tabs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from demo.cards import card, waiting
from demo.comparing import EQUAL, NAMES, Compared, Comparing, Reply, digest
from demo.explanation import doing
from demo.shared import AT_ONCE, NOTICE, QUICK, PictureChooser, asks_nothing, reason, session_of, warn
from multimodal.journal import JournalError

HEADER = """
<header><h1>Four ways to answer</h1>
<p>The same question to the model that sees, to language alone that is told what programs read off the picture, to both
together, and to language alone that is told nothing. Nothing leaves this machine.</p></header>
"""
ABOUT_TIME = (
    "One answers after another, so that its seconds are its own. What a pipeline keeps of a picture that it met before "
    "takes no time again."
)
ABOUT_VOTES = (
    "Which answer is better? A vote is kept on this machine, with the question, the answers and a digest of the "
    "picture, never the picture."
)
THANKS = "Thank you: your vote is kept."


def compare_tab(comparing: Comparing, tab: gr.Tab, asked_about: gr.State, asked: gr.Textbox) -> None:
    """The tab's parts, made where it is to stand.

    Args:
        comparing: Asks the pipelines.
        tab: The tab.
        asked_about: The picture of the tab "Ask", to go on with.
        asked: Its question.
    """
    compared = gr.State(None)
    number = gr.Number(0, precision=0, visible=False)  # bound to a question when it is asked, unlike a State
    gr.HTML(HEADER)
    with gr.Row():
        with gr.Column(scale=5, min_width=300, elem_classes="half"):
            chooser = PictureChooser("compare-", samples=False)
        with gr.Column(scale=6, min_width=300, elem_classes="half"):
            prompt = gr.Textbox(
                label="The question",
                placeholder="What do you want to know about the picture? Enter asks all four.",
                max_lines=5,
                max_length=4000,
                elem_id="compare-prompt",
            )
            with gr.Row():
                ask = gr.Button("Compare", variant="primary", elem_id="compare")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="compare-stop", elem_classes="stop")
            status = gr.HTML(elem_id="compare-status")
            gr.HTML(NOTICE)
            gr.HTML(f'<p class="caption">{ABOUT_TIME}</p>')
            with gr.Accordion("Options", open=False):
                length = gr.Slider(
                    8, 256, value=64, step=8, label="Longest answer, in tokens", elem_id="compare-length"
                )
    cards, buttons = [], []
    with gr.Row(elem_id="cards"):
        for name in NAMES:
            with gr.Column(min_width=240):
                cards.append(gr.HTML(waiting(name), apply_default_css=False, elem_id=f"card-{name}"))
                buttons.append(gr.Button(f"{name} is better", size="sm", visible=False, elem_id=f"vote-{name}"))
    with gr.Column(visible=False, elem_id="voting") as voting:
        gr.HTML(f'<p class="caption">{ABOUT_VOTES}</p>')
        equal = gr.Button("None is better than the others", size="sm", elem_id="vote-equal")

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
        if asks_nothing(text, image):
            return 0, *(gr.skip() for _ in telling)  # no comparison has this number
        said = "Waiting for its turn \N{HORIZONTAL ELLIPSIS}"
        return comparing.new_question(session_of(request)), *told(said, shown=_blank(), running=True)

    def tell(number: float, text: str, image: Image.Image, limit: float, request: gr.Request) -> Iterator[Any]:
        replies: list[Reply] = []
        try:
            for step in comparing.ask(session_of(request), int(number), text, image, max_new_tokens=int(limit)):
                if step.reply is not None:
                    replies.append(step.reply)
                    yield told(step.doing, shown={step.reply.pipeline: card(step.reply, image)}, running=True)
                elif step.doing:
                    yield told(step.doing, shown=_asked(step.running), running=True)
                else:
                    yield told("", running=False, found=Compared(text.strip(), digest(image), tuple(replies)))
        except Exception as error:
            warn(reason(error), title="No answer")
            yield told("", shown=_blank(), running=False)

    def end(request: gr.Request) -> tuple[Any, ...]:
        running = comparing.stop(session_of(request))
        return told("Stopped.", shown={running: waiting(running)}, running=False)

    def vote(better: str, found: Compared | None) -> tuple[Any, ...]:
        if found is None:
            return tuple(gr.skip() for _ in range(len(choices) + 2))
        try:
            comparing.vote(found, better)
        except JournalError as error:
            warn(str(error), title="The vote is not kept")
            return tuple(gr.skip() for _ in range(len(choices) + 2))
        return doing(THANKS), *_voting(None), None

    def arrive(image: Image.Image | None, text: str, mine: Image.Image | None, written: str) -> tuple[Any, ...]:
        """The samples; and what the tab "Ask" is about, where nothing was chosen here."""
        if mine is not None or image is None:
            return chooser.thumbnails(), gr.skip(), gr.skip(), gr.skip()
        return chooser.thumbnails(), *chooser.values(image), written or text

    def cleared(image: Image.Image, request: gr.Request) -> tuple[Any, ...]:
        comparing.stop(session_of(request))
        return told("", shown=_blank(), running=False)

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
        button.click(partial(vote, name), compared, [status, *choices, compared], **QUICK)
    tab.select(arrive, [asked_about, asked, picture, prompt], [chooser.gallery, *chooser.outputs, prompt], **QUICK)
    chooser.on_open(prompt, telling, cleared)


def _blank() -> dict[str, str]:
    return {name: waiting(name) for name in NAMES}


def _asked(pipeline: str) -> dict[str, str]:
    return {pipeline: waiting(pipeline, "Answering \N{HORIZONTAL ELLIPSIS}")} if pipeline else {}


def _voting(found: Compared | None) -> tuple[Any, ...]:
    """The buttons of those that answered, where two or more did."""
    answered = {reply.pipeline for reply in found.replies if reply.answer is not None} if found else set()
    enough = len(answered) > 1
    return *(gr.Button(visible=enough and name in answered) for name in NAMES), gr.Column(visible=enough)
