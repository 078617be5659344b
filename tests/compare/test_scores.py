# ruff: noqa: RUF001
"""Scores by hand, in English and Chinese, and a judge behind a real endpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from multimodal.compare.scores import Judge, attribute_recall, contains, has_refused, scores_of, token_f1
from multimodal.data.refusals import REFUSALS
from multimodal.pipelines.endpoint import Endpoint
from multimodal.pipelines.protocol import PipelineError
from tests.pipelines.endpoints import Scripted, refusing, scripted


@pytest.mark.parametrize(
    ("text", "target", "f1"),
    [
        ("Left lung.", "left lung", 1.0),
        ("the left lung", "left lung", 2 * 2 / 5),
        ("lung lung", "lung", 2 * 1 / 3),
        ("heart", "lung", 0.0),
        ("", "lung", 0.0),
        ("?!", "", 1.0),
        ("X-ray", "Xray", 1.0),
        ("左肺", "左肺叶", 2 * 2 / 5),
        ("肺左", "左肺", 1.0),
    ],
)
def test_f1_of_words_by_hand(text: str, target: str, f1: float) -> None:
    assert token_f1(text, target) == pytest.approx(f1) == token_f1(target, text)


@pytest.mark.parametrize(
    ("text", "target", "held"),
    [
        ("It is the Left lung.", "left lung", True),
        ("lung, left", "left lung", False),
        ("leftover lung", "left", False),
        ("no", "no", True),
        ("nothing", "no", False),
        ("这是左肺。", "左肺", True),
        ("", "left", False),
    ],
)
def test_whether_the_right_answer_is_in_what_was_said(text: str, target: str, held: bool) -> None:
    assert contains(text, target) is held


@pytest.mark.parametrize(
    ("text", "target", "recall"),
    [
        ("a sweet, juicy fruit", "This fruit is sweet and crisp with your tea.", 2 / 3),
        ("crisp sweet fruit", "This fruit is sweet and crisp with your tea.", 1.0),
        ("", "Sweet fruit.", 0.0),
        ("anything", "It is so.", 1.0),
        ("红苹果", "这是红的苹果", 1.0),
        ("这是的", "这是红的苹果", 0.0),
        ("红", "这是红的苹果", 1 / 3),
    ],
)
def test_what_of_the_description_is_said(text: str, target: str, recall: float) -> None:
    assert attribute_recall(text, target) == pytest.approx(recall)


@pytest.mark.parametrize(
    "text",
    [
        "I cannot tell from the text.",
        "I can't see the picture",
        "I can\u2019t see the picture",
        "I don\u2019t know.",
        "I'm sorry, but no.",
        "As an AI, I have no eyes",
        "Unable to determine the modality",
        "我无法判断",
        *REFUSALS.values(),
    ],
)
def test_a_refusal_is_seen(text: str) -> None:
    assert has_refused(text)


@pytest.mark.parametrize("text", ["no", "There is a can of peas", "The tumour cannot be resected", "unknown", "无", ""])
def test_an_answer_is_no_refusal(text: str) -> None:
    assert not has_refused(text)


def test_short_answers_have_the_scores_of_short_answers() -> None:
    assert scores_of("The left lung", "left lung", metric="exact") == {
        "exact": 0.0,
        "contains": 1.0,
        "f1": pytest.approx(0.8),
        "refused": 0.0,
    }
    assert scores_of("Left Lung!", "left lung", metric="exact")["exact"] == 1


@pytest.mark.parametrize(
    "target",
    ["A sweet and juicy apple with a thin red skin, from the south.", "这是一种又甜又多汁的红苹果，来自南方的果园。"],
)
def test_descriptions_have_the_scores_of_descriptions(target: str) -> None:
    same, other, half = (
        scores_of(text, target, metric="rouge_l")
        for text in (target, "Something else 12345", target[: len(target) // 2])
    )
    assert set(same) == {"exact", "contains", "f1", "rouge_l", "chrf", "attribute_recall", "refused"}
    assert all(same[name] == pytest.approx(1) for name in same if name != "refused")
    for name in ("rouge_l", "chrf", "attribute_recall", "f1"):
        assert 0 <= other[name] < half[name] < 1
    assert scores_of("", target, metric="rouge_l")["chrf"] == 0


@pytest.fixture
def endpoint() -> Iterator[Scripted]:
    with scripted() as endpoint:
        yield endpoint


def judged(endpoint: Scripted, answer: str = "the left one") -> float:
    return Judge(Endpoint(endpoint.url, model="judge")).score("Which lung {is} it?", answer, "left lung").score


@pytest.mark.parametrize(
    ("said", "score"), [("Yes.", 1.0), ("yes, it does", 1.0), ("**No**", 0.0), (" NO\n", 0.0), ("\nyes", 1.0)]
)
def test_a_judge_says_yes_or_no(endpoint: Scripted, said: str, score: float) -> None:
    endpoint.script(said)
    assert judged(endpoint) == score
    content = endpoint.chats[0]["messages"][0]["content"]
    assert "Which lung {is} it?" in content and "the left one" in content and "left lung" in content


@pytest.mark.parametrize("said", ["Maybe", "", "nope", "It is yes", "1"])
def test_a_judge_that_says_neither(endpoint: Scripted, said: str) -> None:
    endpoint.script(said)
    with pytest.raises(PipelineError, match=r"says neither yes nor no .*use a larger one"):
        judged(endpoint)


def test_a_judge_that_does_not_answer(endpoint: Scripted) -> None:
    endpoint.script(refusing(503, "busy"))
    with pytest.raises(PipelineError, match="503") as caught:
        judged(endpoint)
    assert caught.value.passing
