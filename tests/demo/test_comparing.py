"""The tab "Compare" without a browser: who is asked, what is shown of the replies, and what a vote keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.model import ModelError, MultiModalModel
from multimodal.pipelines import Answer, PipelineError, Usage
from multimodal.pipelines import Step as Did
from multimodal.store import StoreError
from multimodal.store.feedback import EQUAL, PICTURES, Feedback, picture_digest

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")

from demo import comparing as module
from demo.asking import Asking
from demo.cards import boxed, card, dollars, waiting
from demo.compare_tab import _voting
from demo.comparing import NAMES, Compared, Comparing, Progress, Reply, parts_of
from tests.demo.tiny import parts_of_tiny

TOKENS = 6


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> MultiModalModel:
    return MultiModalModel.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def comparing(
    model: MultiModalModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Comparing]:
    monkeypatch.setattr(module, "parts_of", parts_of_tiny)
    asking = Asking(lambda: model)
    asking.start()
    comparing = Comparing(asking, model_name=str(tiny_folder), feedback=Feedback(tmp_path / "kept"))
    yield comparing
    comparing.close()


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


def ask(comparing: Comparing, picture: Image.Image, *, session: str = "me") -> Iterator[Progress]:
    number = comparing.new_question(session)
    return comparing.ask(session, number, "What is <this>?", picture, max_new_tokens=TOKENS)


def replies_of(steps: Iterator[Progress]) -> dict[str, Reply]:
    return {step.reply.pipeline: step.reply for step in steps if step.reply is not None}


def answer_of(reply: Reply) -> Answer:
    assert reply.answer is not None, reply.error
    return reply.answer


# ---- asking


def test_four_pipelines_of_the_loaded_model_answer(comparing: Comparing, picture: Image.Image) -> None:
    steps = list(ask(comparing, picture))
    replies = replies_of(iter(steps))
    assert tuple(replies) == NAMES and not any(reply.error for reply in replies.values())
    assert steps[-1] == Progress("done") and [step.running for step in steps if step.running] == list(NAMES)
    answers = {name: answer_of(reply) for name, reply in replies.items()}
    assert all(answer.usage.completion_tokens == TOKENS and answer.total > 0 for answer in answers.values())
    assert {name for name, answer in answers.items() if answer.usage.images} == {"native", "hybrid"}
    assert "packet 61%" in answers["text_only"].steps[-1].output, "the exact prompt"
    assert [step.name for step in answers["hybrid"].steps] == ["ocr", "model"]
    assert answers["native"].text != answers["blind"].text, "one of them sees"


def test_the_model_is_not_loaded_again(model: MultiModalModel) -> None:
    with parts_of(model, "embedded") as parts:
        assert parts.model is model


def test_one_that_cannot_answer_says_why_and_the_others_answer(
    comparing: Comparing, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(model: Any, name: str) -> Any:
        def read(picture: Image.Image) -> Did:
            raise PipelineError("reading text needs RapidOCR, which is not installed: pip install it")

        parts = parts_of_tiny(model, name)
        parts.readers["ocr"].reader.read = read
        return parts

    monkeypatch.setattr(module, "parts_of", lacking)
    replies = replies_of(ask(comparing, picture))
    assert {name for name, reply in replies.items() if reply.answer is None} == {"text_only", "hybrid"}
    assert "RapidOCR, which is not installed" in card(replies["hybrid"], picture)


def test_a_lacking_extra_is_told_in_one_line(
    comparing: Comparing, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(model: Any, name: str) -> Any:
        raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")

    monkeypatch.setattr(module, "parts_of", lacking)
    replies = replies_of(ask(comparing, picture))
    assert replies["blind"].error == "jinja2 is not installed: pip install 'multimodal[compare]'"


def test_stop_ends_a_comparison_after_the_pipeline_that_is_asked(comparing: Comparing, picture: Image.Image) -> None:
    steps = ask(comparing, picture)
    assert next(steps).running == "native"
    assert comparing.stop("me") == "native"
    assert list(steps) == []
    assert comparing.stop("me") == ""


def test_a_new_comparison_withdraws_the_one_before_and_no_one_elses(comparing: Comparing, picture: Image.Image) -> None:
    mine, yours = ask(comparing, picture), ask(comparing, picture, session="you")
    next(mine)
    next(yours)
    again = ask(comparing, picture)
    assert list(mine) == []
    assert len(replies_of(yours)) == len(replies_of(again)) == len(NAMES)


def test_without_a_model_there_is_an_error(picture: Image.Image, tmp_path: Path) -> None:
    def fail() -> MultiModalModel:
        raise ModelError("there is no such model")

    asking = Asking(fail)
    comparing = Comparing(asking, model_name="none", feedback=Feedback(tmp_path))
    steps = ask(comparing, picture)
    assert next(steps).doing == "loading"
    asking.start()
    with pytest.raises(ModelError, match="no such model"):
        list(steps)
    comparing.close()


# ---- votes


def test_a_vote_keeps_the_answers_and_the_picture(comparing: Comparing, picture: Image.Image) -> None:
    replies = (
        Reply("native", Answer("oats", confidence=0.5, first_token=0.1234, total=0.5)),
        Reply("hybrid", Answer("rye")),
        Reply("blind", error="broken"),
    )
    comparing.vote(Compared("What?", picture, replies), "native")
    comparing.vote(Compared("What?", picture, replies), EQUAL)
    feedback = comparing._feedback
    first, second = feedback.votes()
    assert first.better == "native" and second.better == "equal"
    assert first.answers == {"native": "oats", "hybrid": "rye"} and first.question == "What?"
    assert first.pictures == second.pictures == [picture_digest(picture)]
    assert len(list((feedback.folder / PICTURES).iterdir())) == 1
    assert "/" not in first.model, "nor where the model lies"


def test_a_vote_that_cannot_be_kept_says_so(comparing: Comparing, picture: Image.Image) -> None:
    (comparing._feedback.folder / PICTURES).write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        comparing.vote(Compared("What?", picture, ()), EQUAL)


def test_only_what_answered_can_be_voted_for() -> None:
    def shown(*answered: str) -> list[bool]:
        replies = tuple(Reply(name, Answer("x") if name in answered else None) for name in NAMES)
        return [update.visible for update in _voting(Compared("?", Image.new("L", (4, 4)), replies))]

    assert shown(*NAMES) == [True] * 5
    assert shown("native", "blind") == [True, False, False, True, True]
    assert shown("native") == [False] * 5, "better than what?"
    assert [update.visible for update in _voting(None)] == [False] * 5


# ---- cards


ANSWER = Answer(
    "21 g",
    (
        Did("ocr", 0.8, "OATS\nSugar", details={"boxes": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.1, 0.1]]}),
        Did("tags", 0.2, "packet 61%", cached=True),
        Did("llm", 1.0, "It may show: packet 61%\nHow much?"),
    ),
    Usage(40, 3, 0),
    first_token=1.25,
    total=2.5,
    confidence=0.625,
)


def test_a_card_has_the_answer_its_figures_and_what_was_seen(picture: Image.Image) -> None:
    text = card(Reply("text_only", ANSWER), picture)
    for said in ("21 g", "62 %", "1.25 s", "2.50 s", "<dd>40</dd>", "<dd>3</dd>", "$0", "Not the picture"):
        assert said in text, said
    assert "Text that was read <span>(0.80 s)" in text and "What it may show <span>(kept from before)" in text
    assert "<h3>The exact prompt</h3>" in text and "packet 61%\nHow much?" in text
    assert text.count("<rect") == 2 and text.count("<img") == 1
    assert "Cut short" not in text and "Cut short" in card(Reply("blind", replace(ANSWER, finished=False)), picture)
    assert "not known" in card(Reply("text_only", replace(ANSWER, confidence=None)), picture)
    assert "The picture itself" in card(Reply("native", replace(ANSWER, usage=Usage(9, 3, 1))), picture)
    assert "empty answer" in card(Reply("native", replace(ANSWER, text="")), picture)


def test_what_a_call_costs() -> None:
    assert [dollars(cost) for cost in (None, 0.0, 0.00123)] == ["not known", "$0", "$0.00123"]


def test_boxes_lie_where_they_are(picture: Image.Image) -> None:
    text = boxed(picture, [[0.1, 0.2, 0.3, 0.4]], ["OATS"])
    assert 'x="0.1000" y="0.2000" width="0.3000" height="0.4000"><title>OATS</title>' in text
    assert "data:image/jpeg;base64," in text
    assert "<title></title>" in boxed(picture, [[0, 0, 1, 1]], ["two", "lines"]), "no line is said of a wrong box"


def test_nothing_that_was_read_or_said_becomes_html(picture: Image.Image) -> None:
    evil = "<script>alert(1)</script>\"'"
    steps = (Did("ocr", 0.1, evil, details={"boxes": [[0, 0, 1, 1]]}), Did(evil, 0, evil), Did("llm", 0, evil))
    texts = (card(Reply("native", replace(ANSWER, text=evil, steps=steps)), picture), waiting("native", evil))
    for text in (*texts, card(Reply("native", error=evil), picture)):
        assert "<script" not in text and "&lt;script" in text and "\"'" not in text
