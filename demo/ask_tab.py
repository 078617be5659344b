"""The tab "Ask": a conversation about pictures, and beside it what is known of an answer.

What it does: lays its parts out and joins them to `Asking`, which runs the models, to `explanation`, which shows what
is known of an answer, and to `Feedback`, which keeps what people say of one.

What it does not know: how models are loaded, the other tabs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape, unescape
from typing import Any

import gradio as gr

from demo.asking import Asking
from demo.conversation import MOST_PICTURES, Turn, Turns, about, asked, at, messages, settled
from demo.explanation import (
    ON_LOAD,
    WHOLE_ANSWER,
    attention_picture,
    doing,
    figures,
    unsure_notice,
    word_buttons,
)
from demo.shared import (
    AT_ONCE,
    QUICK,
    asks_nothing,
    opened,
    own_file,
    reason,
    sample_file,
    session_of,
    shown_file,
    thumbnails,
    warn,
)
from demo.wording import TEXT, language_of, say
from multimodal.drawing import answer_words
from multimodal.samples import sample_images
from multimodal.store import StoreError
from multimodal.store.feedback import Feedback, Rating

# Two answers share the cores well; more make everybody wait for everybody. The others queue, and see their place.
ANSWERS_AT_ONCE = 2
NEWEST = None  # in the place of an answer's number
EMPTY: dict[str, Any] = {"text": "", "files": []}
THUMBS = {"like": "Like", "dislike": "Dislike"}  # as Gradio's chat calls them


@dataclass(frozen=True)
class Choice:
    """Who can be asked.

    Attributes:
        label: For people to choose by.
        model: Which of the models.
        adapter: Which of its adapters; None for the model as it came.
    """

    label: str
    model: int = 0
    adapter: str | None = None


def ask_tab(asking: Asking, feedback: Feedback, *, choices: Sequence[Choice]) -> gr.State:
    """The tab's parts, made where it is to stand.

    Args:
        asking: Runs the models.
        feedback: Keeps what people say of answers.
        choices: Who can be asked; the first is asked where nobody chooses.

    Returns:
        The conversation, for tabs that go on with its picture and question.
    """
    conversation = gr.State(())
    number = gr.Number(0, precision=0, visible=False)  # bound to a question when it is asked, unlike a State
    gr.HTML(TEXT("ask_header"))
    with gr.Row(elem_id="main"):
        with gr.Column(scale=6, min_width=300, elem_id="talk", elem_classes="half"):
            chat = gr.Chatbot(
                label=TEXT("conversation"),
                show_label=False,
                placeholder=TEXT("conversation_empty"),
                height="31rem",
                buttons=["copy", "copy_all"],
                editable="user",
                group_consecutive_messages=False,  # Gradio cannot edit a question that is shown in one with a picture
                allow_file_downloads=False,
                render_markdown=False,
                latex_delimiters=[],
                allow_tags=False,
                feedback_options=tuple(THUMBS.values()),
                elem_id="chat",
            )
            box = gr.MultimodalTextbox(
                EMPTY,  # nothing at all is more than its script can bear
                label=TEXT("question"),
                placeholder=TEXT("question_hint"),
                file_count="multiple",
                max_plain_text_length=4000,
                max_lines=5,
                elem_id="prompt",
            )
            status = gr.HTML(elem_id="status")
            gr.HTML(TEXT("notice"))
            gr.HTML(TEXT("examples"))
            samples = gr.Gallery(
                thumbnails(),
                show_label=False,
                visible=bool(sample_images()),
                columns=3,
                height="auto",
                object_fit="cover",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="samples",
            )
            with gr.Accordion(TEXT("camera"), open=False, elem_id="camera-fold"):
                gr.HTML(TEXT("camera_about"))
                camera = gr.Image(show_label=False, sources=["webcam"], type="filepath", elem_id="camera")
        with gr.Column(scale=5, min_width=300, elem_id="look", elem_classes="half"):
            chosen = gr.Dropdown(
                [(choice.label, place) for place, choice in enumerate(choices)],
                value=0,
                label=TEXT("model"),
                info=TEXT("model_about"),
                elem_id="model",
            )
            with gr.Column(visible=False, elem_id="explanation") as explanation:
                which = gr.Dropdown([], label=TEXT("about_answer"), elem_id="which")
                facts = gr.HTML(elem_id="facts")
                with gr.Column(elem_id="attention") as attention:
                    gr.HTML(TEXT("explanation"))
                    overlay = gr.Image(
                        show_label=False,
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="overlay",
                        alt_text="The picture with the model's attention as heat over it",
                    )
                    legend = gr.HTML()
                    words = gr.HTML(js_on_load=ON_LOAD, apply_default_css=False, elem_id="words")
                with gr.Accordion(TEXT("feedback"), open=False, elem_id="feedback"):
                    gr.HTML(TEXT("feedback_about"))
                    corrected = gr.Textbox(label=TEXT("corrected"), max_length=4000, max_lines=6, elem_id="corrected")
                    comment = gr.Textbox(label=TEXT("comment"), max_length=4000, max_lines=6, elem_id="comment")
                    save = gr.Button(TEXT("save"), size="sm", elem_id="save")
                    kept = gr.HTML(elem_id="kept")
            with gr.Accordion(TEXT("options"), open=False, elem_id="options"):
                whole = gr.Checkbox(label=TEXT("memory"), info=TEXT("memory_about"), elem_id="whole")
                length = gr.Slider(8, 512, value=128, step=8, label=TEXT("longest"), elem_id="length")
                least = gr.Slider(0, 100, value=50, step=5, label=TEXT("least"), elem_id="least")

    panel = [explanation, which, facts, attention, overlay, legend, words, corrected, comment, kept]
    telling = [chat, box, status, *panel, conversation]

    def told(
        turns: Turns, language: str, *, said: str = "", running: bool = False, emptied: bool = False
    ) -> tuple[Any, ...]:
        """Values for the parts in ``telling``; the panel follows the newest answer."""
        entry = {"value": EMPTY} if emptied else {}
        return (
            _chat(turns, language, running=running),
            gr.MultimodalTextbox(stop_btn=say("stop", language) if running else False, submit_btn=not running, **entry),
            doing(said),
            *(_panel(turns, NEWEST, language) if not running else _hidden()),
            turns,
        )

    def opening(turns: Turns, request: gr.Request, *, emptied: bool = False) -> tuple[Any, ...]:
        """A question is asked: the last of these turns."""
        language = language_of(request)
        values = told(turns, language, said=say("waiting", language), running=True, emptied=emptied)
        return asking.new_question(session_of(request)), *values

    def nothing() -> tuple[Any, ...]:
        return 0, *(gr.skip() for _ in telling)  # no question has this number

    def begin(
        entry: dict[str, Any] | None, turns: Turns, who: int, whole: bool, request: gr.Request
    ) -> tuple[Any, ...]:
        text, files = (entry or {}).get("text") or "", (entry or {}).get("files") or []
        language = language_of(request)
        pictures = opened(files, language)
        shown = len(pictures) + sum(len(turn.pictures) for turn in turns)
        if shown > MOST_PICTURES:
            warn(say("too_many", language, most=MOST_PICTURES), title=say("too_many_title", language))
        elif not asks_nothing(text, bool(pictures or about(turns)), language) and len(pictures) == len(files):
            turns = settled(turns, asking.stop(session_of(request)))
            turns = asked(turns, text.strip(), pictures, model=choices[who].label, whole=whole)
            return opening(turns, request, emptied=True)
        unasked = list(nothing())
        if files:  # what was typed, and what can be used, stays
            rest = {"text": text, "files": [own_file(picture) for picture in pictures]}
            unasked[1 + telling.index(box)] = gr.MultimodalTextbox(value=rest)
        return tuple(unasked)

    def retry(turns: Turns, who: int, whole: bool, event: gr.RetryData, request: gr.Request) -> tuple[Any, ...]:
        return again(turns, at(turns, event.index), None, who, whole, request)

    def edit(turns: Turns, who: int, whole: bool, event: gr.EditData, request: gr.Request) -> tuple[Any, ...]:
        return again(turns, at(turns, event.index), unescape(event.value), who, whole, request)

    def again(
        turns: Turns, place: int, text: str | None, who: int, whole: bool, request: gr.Request
    ) -> tuple[Any, ...]:
        """Ask a question of before once more, perhaps in other words; what came after it goes."""
        if not 0 <= place < len(turns) or asks_nothing(text if text is not None else "?", True, language_of(request)):
            unasked = list(nothing())
            unasked[1 + telling.index(chat)] = _chat(turns, language_of(request))  # as it was before it was edited
            return tuple(unasked)
        old = turns[place]
        question = old.question if text is None else text.strip()
        turns = asked(turns[:place], question, old.pictures, model=choices[who].label, whole=whole)
        return opening(turns, request)

    def tell(
        number: float, turns: Turns, who: int, limit: float, least: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        yield nothing()[1:]  # or Gradio would empty all parts when nothing comes of the question
        if not turns:
            return
        language = language_of(request)
        steps = asking.ask(
            session_of(request),
            int(number),
            messages(turns),
            max_new_tokens=int(limit),
            min_confidence=least / 100,
            model=choices[who].model,
            adapter=choices[who].adapter,
        )
        *before, last = turns
        try:
            for step in steps:
                now = *before, replace(last, text=step.text, answer=step.answer)
                if step.answer is not None:
                    yield told(now, language)
                else:
                    said = doing(say(step.doing, language))
                    yield _chat(now, language, running=True), gr.skip(), said, *(gr.skip() for _ in panel), turns
        except Exception as error:
            warn(reason(error), title=say("no_answer_title", language))
            yield told(turns, language)
        finally:
            steps.close()  # Gradio closes this generator when the asker has gone

    def end(turns: Turns, request: gr.Request) -> tuple[Any, ...]:
        return told(settled(turns, asking.stop(session_of(request))), language_of(request))

    def clear(request: gr.Request) -> tuple[Any, ...]:
        asking.stop(session_of(request))
        return told((), language_of(request))

    def look(turns: Turns, place: int, request: gr.Request) -> tuple[Any, ...]:
        return tuple(_panel(turns, place, language_of(request)))

    def look_at_word(turns: Turns, place: int, event: gr.EventData, request: gr.Request) -> tuple[Any, Any]:
        if not _has_trace(turns, place):
            return gr.skip(), gr.skip()
        return _looked(turns[place], event.word, language_of(request))

    def like(turns: Turns, event: gr.LikeData, request: gr.Request) -> tuple[Any, Any]:
        place = at(turns, event.index)
        if not 0 <= place < len(turns) or turns[place].answer is None:
            return gr.skip(), gr.skip()
        verdict = {True: "like", "Like": "like", False: "dislike", "Dislike": "dislike"}.get(event.liked, "")
        judged = replace(turns[place], verdict=verdict)
        turns = *turns[:place], judged, *turns[place + 1 :]
        return turns, doing(_keep(feedback, judged, language_of(request)))

    def correct(turns: Turns, place: int, right: str, said: str, request: gr.Request) -> tuple[Any, ...]:
        language = language_of(request)
        if not 0 <= place < len(turns) or not (right.strip() or said.strip()):
            return gr.skip(), gr.skip(), doing(say("feedback_empty", language))
        thanks = _keep(feedback, turns[place], language, corrected=right.strip(), comment=said.strip())
        return ("", "", doing(thanks)) if thanks else (gr.skip(), gr.skip(), "")

    def take_sample(event: gr.SelectData) -> dict[str, Any]:
        return {"text": sample_images()[event.index].prompt, "files": [sample_file(event.index)]}

    def take_shot(shot: str | None, entry: dict[str, Any] | None) -> tuple[Any, Any]:
        if shot is None:
            return gr.skip(), gr.skip()
        entry = entry or EMPTY
        return {**entry, "files": [*entry["files"], shot]}, None

    choosing = [chosen, whole]
    begun = [
        box.submit(begin, [box, conversation, *choosing], [number, *telling], **QUICK),
        chat.retry(retry, [conversation, *choosing], [number, *telling], **QUICK),
        chat.edit(edit, [conversation, *choosing], [number, *telling], **QUICK),
    ]
    for asking_again in begun:
        asking_again.then(
            tell,
            [number, conversation, chosen, length, least],
            telling,
            show_progress="hidden",
            trigger_mode="multiple",  # a new question may come while the last one is being answered
            concurrency_limit=ANSWERS_AT_ONCE,
            concurrency_id="answers",
            api_visibility="private",
        )
    box.stop(end, conversation, telling, **AT_ONCE)
    chat.clear(clear, None, telling, **AT_ONCE)
    chat.like(like, conversation, [conversation, status], **QUICK)
    which.input(look, [conversation, which], panel, **QUICK)
    words.click(look_at_word, [conversation, which], [overlay, legend], trigger_mode="always_last", **QUICK)
    save.click(correct, [conversation, which, corrected, comment], [corrected, comment, kept], **QUICK)
    samples.select(take_sample, None, box, **QUICK)
    camera.input(take_shot, [camera, box], [box, camera], **QUICK)
    return conversation


def _chat(turns: Turns, language: str, *, running: bool = False) -> gr.Chatbot:
    """The conversation as people see it; a question that is being answered has no answer yet."""
    shown: list[dict[str, Any]] = []
    for turn in turns:
        shown += [{"role": "user", "content": {"path": shown_file(picture)}} for picture in turn.pictures]
        shown.append({"role": "user", "content": _plain(turn.question)})
        if running and turn is turns[-1] and not turn.text:
            break
        empty = "empty_answer" if turn.answer is not None else "stopped_early"
        shown.append({"role": "assistant", "content": _plain(turn.text) or say(empty, language)})
    return gr.Chatbot(shown, feedback_value=[THUMBS.get(turn.verdict) for turn in turns])


def _plain(text: str) -> str:
    """As Gradio's chat shows it: also what it does not take for Markdown it takes for HTML, and fetches pictures."""
    return escape(text, quote=False)


def _looked(turn: Turn, index: int, language: str) -> tuple[str, str]:
    """As :func:`attention_picture`, the picture as a file."""
    drawn, legend = attention_picture(turn, index, language)
    return shown_file(drawn, max(drawn.size)), legend


def _panel(turns: Turns, place: int | None, language: str) -> Iterator[Any]:
    """What is known of an answer, for the parts in ``panel``: that of a number, or the newest."""
    answered = [index for index, turn in enumerate(turns) if turn.answer is not None]
    if not answered:
        yield from _hidden()
        return
    place = place if place in answered else answered[-1]
    turn = turns[place]
    assert turn.answer is not None
    names = [(f"{index + 1}. {_shortened(turns[index].text)}", index) for index in answered]
    yield gr.Column(visible=True)
    yield gr.Dropdown(names, value=place)
    yield unsure_notice(turn.answer, language) + figures(turn.answer, language)
    if _has_trace(turns, place):
        yield gr.Column(visible=True)
        yield from _looked(turn, WHOLE_ANSWER, language)
        yield word_buttons(answer_words(turn.answer), language)
    else:
        yield from (gr.Column(visible=False), None, "", "")
    yield from ("", "", "")


def _hidden() -> Iterator[Any]:
    """The panel while there is nothing to tell."""
    yield gr.Column(visible=False)
    yield gr.skip()
    yield ""
    yield gr.Column(visible=False)
    yield from (None, "", "", "", "", "")


def _has_trace(turns: Turns, place: int | None) -> bool:
    """Whether there is a picture to show attention on, and a word to show it for."""
    answer = turns[place].answer if place is not None and 0 <= place < len(turns) else None
    return answer is not None and answer.trace is not None and bool(answer.text)


def _keep(feedback: Feedback, turn: Turn, language: str, *, corrected: str = "", comment: str = "") -> str:
    """Write feedback down and give what to say; empty if it could not be kept, which the person was told."""
    rating = Rating(
        question=turn.question,
        answer=turn.text,
        model=turn.model,
        verdict=turn.verdict,
        corrected=corrected,
        comment=comment,
        follows=turn.follows,
    )
    try:
        feedback.rate(rating, turn.seen)
    except StoreError as error:
        warn(str(error), title=say("feedback_lost_title", language))
        return ""
    return say("feedback_kept", language)


def _shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
