"""Figures of rows that were made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from multimodal.compare import Figures, Results, Row, pairs_of, summarise
from multimodal.compare.results import SHUFFLED, paired
from multimodal.compare.summary import pairs_by_kind
from multimodal.pipelines import Answer, Step, Usage


def row(pipeline: str, number: int, right: float, *, picture: str = "", **changes: Any) -> Row:
    made = Row("slake", pipeline, str(number), "Q?", "yes", (Path(picture or f"{number}.png"),), Answer("yes"))
    return replace(made, **{"scores": {"exact": float(right), "f1": 0.5}, **changes})


def results(*rows: Row, metric: str = "exact", **changes: Any) -> Results:
    return Results(Path("run"), "multimodal compare", rows, {"slake": metric, "other": metric}, **changes)


def only(made: Results) -> Figures:
    (figures,) = summarise(made)
    return figures


def took(total: float, *, picture: str, number: int, **more: Any) -> Row:
    return row("native", number, 1, picture=picture, answer=Answer("yes", total=total, first_token=total / 2, **more))


def test_seconds_by_hand() -> None:
    figures = only(
        results(
            took(4.0, picture="a", number=1, steps=(Step("ocr", 2.0), Step("llm", 1.0))),
            took(1.0, picture="a", number=2, steps=(Step("ocr", 2.0, cached=True), Step("llm", 1.0))),
            took(2.0, picture="b", number=3, steps=(Step("ocr", 1.0), Step("llm", 4.0))),
            took(1.0, picture="b", number=4, steps=()),
        )
    )
    assert figures.latency is not None and figures.first_token is not None
    assert (figures.latency.p50, figures.latency.p95, figures.latency.p99) == (1.0, 4.0, 4.0)
    assert figures.first_token.p50 == 0.5
    assert figures.fresh_latency == 3.0  # of 4 and 2
    assert figures.steps == {"ocr": 2.0, "llm": 1.0}


def test_without_pictures_there_is_no_first_question_about_one() -> None:
    assert only(results(row("native", 1, 1, images=()))).fresh_latency is None


def test_tokens_and_money_by_hand() -> None:
    answers = [Answer("a", usage=Usage(100, 2), cost=0.01), Answer("b", usage=Usage(200, 5), cost=0.03)]
    rows = [row("native", number, 1, answer=answer) for number, answer in enumerate(answers)]
    figures = only(results(*rows, energy={("slake", "native"): 0.5}))
    assert (figures.prompt_tokens, figures.completion_tokens) == (150, 3.5)
    assert figures.cost_per_1000 == pytest.approx(20) and figures.energy_per_1000 == pytest.approx(250)
    unknown = row("native", 9, 1, answer=Answer("c", cost=None))
    assert only(results(*rows, unknown)).cost_per_1000 is None


def test_errors_are_in_no_figure_but_their_own() -> None:
    failed = row("native", 3, 0, answer=None, error="busy", scores={})
    figures = only(results(row("native", 1, 1), row("native", 2, 0), failed))
    assert figures.errors == 1 and figures.score is not None
    assert (figures.score.value, figures.score.count) == (0.5, 2)
    nothing = only(results(failed))
    assert (nothing.errors, nothing.score, nothing.latency, nothing.scores) == (1, None, None, {})


def test_the_controls_stand_beside_the_score() -> None:
    made = results(
        row("native", 1, 1), row("native", 2, 1), row("native", 1, 0, control=SHUFFLED),
        row("native", 2, 1, control=SHUFFLED), row("blind", 1, 0), row("blind", 2, 0),
    )  # fmt: skip
    native, blind = summarise(made)
    assert native.score is not None and native.shuffled is not None and native.blind is not None
    assert (native.score.value, native.shuffled.value, native.blind.value) == (1.0, 0.5, 0.0)
    assert blind.score == blind.blind == native.blind and blind.shuffled is None


def test_kinds_are_shown_apart() -> None:
    made = results(
        row("native", 1, 1, meta={"answer_type": "OPEN", "subsets": "printed fruit"}),
        row("native", 2, 0, meta={"answer_type": "closed"}),
        row("native", 3, 0, meta={"subsets": "fruit", "modality": "CT"}),
    )
    found = {kind: (each.value, each.count) for kind, each in only(made).by.items()}
    assert found == {"open": (1.0, 1), "printed": (1.0, 1), "fruit": (0.5, 2), "closed": (0.0, 1)}


def test_every_score_has_its_mean_over_the_rows_that_have_it() -> None:
    judged = row("native", 1, 1, scores={"exact": 1.0, "judged": 1.0})
    other = row("native", 2, 0, scores={"exact": 0.0, "judged": 0.0})
    assert only(results(judged, other, row("native", 3, 0))).scores == {
        "exact": pytest.approx(1 / 3),
        "judged": 0.5,
        "f1": 0.5,
    }


def test_calibration_is_of_right_and_wrong_alone() -> None:
    sure = [row("native", number, right, answer=Answer("a", confidence=0.8)) for number, right in enumerate((1, 1, 0))]
    assert only(results(*sure)).calibration_error == pytest.approx(0.8 - 2 / 3)
    assert only(results(*sure, row("native", 9, 0))).calibration_error == pytest.approx(0.8 - 2 / 3)
    long = [replace(each, scores={"rouge_l": 0.5}) for each in sure]
    assert only(results(*long, metric="rouge_l")).calibration_error is None
    assert only(results(row("native", 1, 1))).calibration_error is None


def test_pairs_are_of_what_both_answered() -> None:
    one = [row("native", number, 1) for number in range(4)]
    other = [row("blind", number, 0) for number in (3, 2, 1)]
    failed = row("blind", 0, 0, answer=None, error="busy", scores={})
    assert [(first.id, second.id) for first, second in paired(one, [failed, *other])] == [
        ("1", "1"),
        ("2", "2"),
        ("3", "3"),
    ]
    (pair,) = pairs_of(results(*one, failed, *other))
    assert (pair.first, pair.second, pair.difference.count, pair.difference.value) == ("native", "blind", 3, 1.0)
    assert pairs_of(results(*one, failed)) == []


def test_questions_about_one_picture_belong_together() -> None:
    rows = [row(name, number, name == "a", picture="same.png") for name in ("a", "b") for number in range(50)]
    (pair,) = pairs_of(results(*rows))
    assert pair.difference.detectable == 1.0  # one picture, however many questions
    assert {each.cluster for each in rows} == {"same.png"} and replace(rows[0], images=()).cluster == "0"


def test_each_task_is_corrected_for_its_own_pairs() -> None:
    rows = []
    for name, right in (("a", 1), ("b", 0), ("c", 1)):
        rows += [row(name, number, right) for number in range(6)]
    rows += [replace(each, task="other") for each in rows if each.pipeline in "ab"]
    pairs = pairs_of(results(*rows))
    found = {(pair.task, pair.first, pair.second): pair.difference for pair in pairs}
    p = 2 / 2**6
    assert {place: each.p for place, each in found.items()} == {
        ("slake", "a", "b"): pytest.approx(p),
        ("slake", "a", "c"): 1.0,
        ("slake", "b", "c"): pytest.approx(p),
        ("other", "a", "b"): pytest.approx(p),
    }
    assert found["slake", "a", "b"].adjusted_p == pytest.approx(3 * p)
    assert found["slake", "b", "c"].adjusted_p == pytest.approx(3 * p)
    assert found["other", "a", "b"].adjusted_p == pytest.approx(p)
    assert found["slake", "b", "c"].value == -1


def test_kinds_of_questions_have_pairs_of_their_own_with_the_first_pipeline() -> None:
    rows = [
        row(name, number, right if kind == "open" else 1, meta={"answer_type": kind})
        for name, right in (("a", 1), ("b", 0), ("c", 1))
        for number, kind in enumerate(["open"] * 6 + ["closed"] * 4)
    ]
    found = {(pair.kind, pair.first, pair.second): pair.difference for pair in pairs_by_kind(results(*rows))}
    assert {place: (each.value, each.count) for place, each in found.items()} == {
        ("open", "a", "b"): (1.0, 6),
        ("open", "a", "c"): (0.0, 6),
        ("closed", "a", "b"): (0.0, 4),
        ("closed", "a", "c"): (0.0, 4),
    }
    assert found["open", "a", "b"].adjusted_p == pytest.approx(4 * 2 / 2**6)
    assert pairs_by_kind(results(*[each for each in rows if each.meta["answer_type"] == "open"])) == []
