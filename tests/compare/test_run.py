"""A comparison against what one works out by hand; what is asked again, and what is not."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import EvalLog, read_eval_log

from multimodal.compare import BudgetError, Results, compare, pairs_of, read_results, run, summarise
from multimodal.compare.results import SHUFFLED
from multimodal.compare.store import Store
from multimodal.pipelines import PipelineError, PipelineSettings, patience
from multimodal.pipelines.endpoint import Price
from tests.compare.runs import QUESTIONS, asked, feel, said, settings, write
from tests.pipelines.endpoints import Reply, Scripted, refusing, saying, scripted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def go(folder: Path, *names: str, **changes: Any) -> Results:
    return compare(settings(folder, *names, **changes), progress=False)


def logs(folder: Path) -> list[EvalLog]:
    files = (folder / "run" / "logs").iterdir()
    return [read_eval_log(str(path)) for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]


def test_figures_are_those_worked_out_by_hand(folder: Path) -> None:
    results = go(folder)
    assert (results.tasks, results.pipelines, results.metric) == (
        ["colours"],
        ["seeing", "guessing"],
        {"colours": "exact"},
    )
    seeing, guessing = summarise(results)
    assert seeing.score is not None and guessing.score is not None
    assert (seeing.score.value, seeing.score.count) == (7 / 8, QUESTIONS)  # white is taken for red
    assert guessing.score.value == 4 / 8  # "red" once, "no" three times
    assert {kind: each.value for kind, each in seeing.by.items()} == {"open": 3 / 4, "closed": 1.0}
    assert {kind: each.value for kind, each in guessing.by.items()} == {"open": 1 / 4, "closed": 3 / 4}
    assert (seeing.prompt_tokens, seeing.completion_tokens, seeing.errors) == (10, 1, 0)
    assert seeing.cost_per_1000 == pytest.approx(10) and seeing.steps == {"look": 0.25}
    assert seeing.latency is not None and (seeing.latency.p50, seeing.fresh_latency) == (0.5, 0.5)
    assert seeing.calibration_error == pytest.approx(7 / 8 - 0.75)
    assert seeing.throughput is not None and seeing.throughput > 0
    (pair,) = pairs_of(results)
    assert pair.difference.value == pytest.approx(3 / 8)
    assert (pair.difference.only_first, pair.difference.only_second) == (3, 0)
    assert pair.difference.p == pytest.approx(2 / 2**3)


def test_rows_have_all_that_was_asked_and_said(folder: Path) -> None:
    row = go(folder).rows[7]
    assert (row.pipeline, row.id, row.question, row.target) == ("seeing", "colours:8", "Is it red?", "no")
    assert row.images == (folder / "white.png",) and row.meta["answer_type"] == "CLOSED"
    assert row.answer is not None and row.answer.text == "no" and not row.answer.cached
    assert row.scores == {"exact": 1.0, "contains": 1.0, "f1": 1.0, "refused": 0.0}


def test_the_same_command_again_asks_nothing(folder: Path) -> None:
    first = go(folder)
    assert len(asked(folder)) == 2 * QUESTIONS
    again = go(folder)
    assert len(asked(folder)) == 2 * QUESTIONS
    assert again.rows == first.rows == read_results(folder / "run").rows


def test_a_cached_answer_keeps_what_it_took_and_says_so_in_the_log(folder: Path) -> None:
    feel(folder, fail="green", kind="own")
    go(folder, "Seeing")
    feel(folder, cost=99.0)
    results = go(folder, "Seeing", retry_errors=True)
    kept = {row.id: row.answer for row in results.rows if "green" not in str(row.images)}
    assert len(kept) == 6
    assert all(answer is not None and (answer.cost, answer.total) == (0.01, 0.5) for answer in kept.values())
    *_, log = logs(folder)
    assert log.samples is not None
    found = {str(sample.id): sample.metadata["answer"] for sample in log.samples}
    assert {id_: answer["cached"] for id_, answer in found.items()} == {row.id: row.id in kept for row in results.rows}
    assert all(found[id_]["total"] == 0.5 for id_ in found)


def test_inspects_logs_have_every_question(folder: Path) -> None:
    go(folder)
    both = logs(folder)
    assert [log.status for log in both] == ["success", "success"]
    for log in both:
        assert log.samples is not None and len(log.samples) == QUESTIONS
        assert {str(sample.id) for sample in log.samples} == {f"colours:{number}" for number in range(1, 9)}
        assert all(sample.scores is not None and sample.scores["scores"].value for sample in log.samples)
    accuracy = {
        log.eval.task.partition("-")[2]: [
            score.metrics["mean"].value for score in log.results.scores if score.name == "exact"
        ]
        for log in both
        if log.results is not None
    }
    assert accuracy == {"seeing": [7 / 8], "guessing": [4 / 8]}


def test_it_runs_where_an_event_loop_runs(folder: Path) -> None:
    async def notebook() -> Results:
        return go(folder, "Seeing")

    assert len(asyncio.run(notebook()).rows) == QUESTIONS


def test_four_at_a_time_say_the_same(folder: Path) -> None:
    one = said(go(folder, output="one"))
    feel(folder, together=True)  # nobody answers before four are asked
    assert said(go(folder, output="four", concurrency=4)) == one


def test_the_control_shows_other_pictures(folder: Path) -> None:
    results = go(folder, shuffled=True)
    shown = Counter(line.split("|")[0] for line in asked(folder))
    assert shown == {"seeing": 2 * QUESTIONS, "guessing": QUESTIONS}  # nobody shuffles what is not looked at
    control = results.select(task="colours", pipeline="seeing", control=SHUFFLED)
    seen = [line.split("|")[1] for line in asked(folder) if line.startswith("seeing")][QUESTIONS:]
    assert len(control) == QUESTIONS
    assert [row.images[0].stem for row in control] == seen  # a row names what was shown
    own = {row.id: row.images for row in results.select(task="colours", pipeline="seeing")}
    assert all(row.images != own[row.id] for row in control)
    seeing, guessing = summarise(results)
    assert seeing.shuffled is not None and seeing.score is not None and guessing.shuffled is None
    assert seeing.shuffled.value < seeing.score.value


def test_the_control_is_a_draw_where_there_are_many_questions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.compare.run.SHUFFLED_MOST", 3)
    results = go(folder, "Seeing", shuffled=True)
    control = results.select(task="colours", pipeline="seeing", control=SHUFFLED)
    assert len(control) == 3 and len(asked(folder)) == QUESTIONS + 3
    assert go(folder, "Seeing", shuffled=True).rows == results.rows and len(asked(folder)) == QUESTIONS + 3


def test_a_pipeline_is_added_to_a_run(folder: Path) -> None:
    go(folder, "Seeing")
    before = asked(folder)
    results = go(folder)
    assert asked(folder)[: len(before)] == before
    assert Counter(line.split("|")[0] for line in asked(folder)[len(before) :]) == {"guessing": QUESTIONS}
    assert results.pipelines == ["seeing", "guessing"]
    assert go(folder, "Guessing").pipelines == ["seeing", "guessing"]  # what is not named now is not lost


def test_a_pipeline_that_changed_is_asked_again(folder: Path) -> None:
    go(folder)
    feel(folder, digest=2, cost=0.5)
    results = go(folder, "Seeing")
    assert Counter(line.split("|")[0] for line in asked(folder)) == {"seeing": 2 * QUESTIONS, "guessing": QUESTIONS}
    assert {row.answer.cost for row in results.rows if row.answer is not None and row.pipeline == "seeing"} == {0.5}


def test_another_right_answer_is_scored_and_another_question_is_asked(folder: Path) -> None:
    go(folder, "Seeing")
    file = folder / "colours.jsonl"
    file.write_text(file.read_text().replace('"content": "white"', '"content": "red"'))
    assert sum(row.scores["exact"] for row in go(folder, "Seeing").rows) == 8
    assert len(asked(folder)) == QUESTIONS
    file.write_text(file.read_text().replace("What colour is it?", "What colour?", 1))
    go(folder, "Seeing")
    assert asked(folder)[QUESTIONS:] == ["seeing|red|What colour?"]


@pytest.mark.parametrize(("kind", "text"), [("own", "no green today"), ("value", "ValueError: no green today")])
def test_an_error_counts_neither_as_right_nor_as_wrong(folder: Path, kind: str, text: str) -> None:
    feel(folder, fail="green", kind=kind)
    results = go(folder)
    failed = [row for row in results.rows if row.answer is None]
    assert [(row.pipeline, row.images[0].stem, row.error, row.scores) for row in failed] == [
        (name, "green", text, {}) for name in ("seeing", "seeing", "guessing", "guessing")
    ]
    seeing, guessing = summarise(results)
    assert (seeing.errors, guessing.errors) == (2, 2)
    assert seeing.score is not None and (seeing.score.value, seeing.score.count) == (5 / 6, 6)
    assert [log.status for log in logs(folder)] == ["success", "success"]


def test_a_broken_connection_is_an_error_of_its_question_and_ends_nothing(folder: Path) -> None:
    feel(folder, fail="green", kind="os")
    errors = [row.error for row in go(folder, "Seeing").rows]
    assert [error for error in errors if error] == ["ConnectionError: no green today"] * 2


def test_errors_are_kept_until_they_are_to_be_tried_again(folder: Path) -> None:
    feel(folder, fail="green", kind="own")
    go(folder, "Seeing")
    feel(folder)
    assert sum(row.answer is None for row in go(folder, "Seeing").rows) == 2
    assert len(asked(folder)) == QUESTIONS
    results = go(folder, "Seeing", retry_errors=True)
    assert asked(folder)[QUESTIONS:] == ["seeing|green|What colour is it?", "seeing|green|Is it red?"]
    assert said(results) == said(go(folder, "Seeing", output="other"))


def test_what_is_busy_is_asked_again_and_counted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)
    feel(folder, fail="green", kind="busy")
    results = go(folder, "Seeing", tries=3)
    assert Counter(asked(folder))["seeing|green|Is it red?"] == 3
    assert [row.error for row in results.rows if row.answer is None] == ["busy", "busy"]


def test_a_spending_cap_stops_before_the_next_call(folder: Path) -> None:
    feel(folder, cost=0.25)
    with pytest.raises(BudgetError, match=r"0\.7500 of 0\.6000 dollars are spent.*raise --max-cost"):
        go(folder, max_cost=0.6)
    assert len(asked(folder)) == 3
    with pytest.raises(BudgetError):
        go(folder, max_cost=0.75)
    assert len(asked(folder)) == 3
    results = go(folder, max_cost=4.01)
    assert len(asked(folder)) == len(set(asked(folder))) == 2 * QUESTIONS
    assert said(results) == said(go(folder, output="other"))


def test_the_judge_counts_against_the_cap_also_when_a_run_goes_on(folder: Path, judge: Scripted) -> None:
    judge.script(Reply(saying("yes", usage=(100_000, 0))))
    feel(folder, cost=0.0)
    priced = PipelineSettings(prices={"judge": Price(1.0, 1.0)})  # 0.1 dollars for each judgement
    for _ in range(2):
        with pytest.raises(BudgetError, match=r"0\.3000 of 0\.2500 dollars are spent"):
            go(folder, "Seeing", judge=judge.url, judge_model="judge", max_cost=0.25, made_of=priced)
        assert len(judge.chats) == 3


def test_another_picture_in_its_place_is_another_question(folder: Path) -> None:
    go(folder, "Seeing")
    run._content.cache_clear()  # kept as long as a process lives
    shutil.copy(folder / "red.png", folder / "green.png")
    go(folder, "Seeing")
    assert len(asked(folder)) == QUESTIONS + 2


def test_what_is_free_costs_nothing_of_the_cap(folder: Path) -> None:
    feel(folder, cost=None)
    assert len(go(folder, max_cost=0.01).rows) == 2 * QUESTIONS


def test_two_tasks_are_kept_apart(folder: Path) -> None:
    lines = (folder / "colours.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(lines[:2]))
    results = go(folder, tasks=[str(folder / "colours.jsonl"), str(folder / "few.jsonl")])
    assert results.tasks == ["colours", "few"]
    assert [each.score.count for each in summarise(results) if each.score] == [8, 8, 2, 2]


def test_two_tasks_of_one_name(folder: Path) -> None:
    (folder / "deep").mkdir()
    other = write(folder / "deep") / "colours.jsonl"
    with pytest.raises(ValueError, match="two tasks are called colours"):
        go(folder, tasks=[str(folder / "colours.jsonl"), str(other)])
    assert asked(folder) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"limit": 3}, "limit was None, is 3"),
        ({"seed": 1}, "seed was None, is 1"),
        ({"shuffled": True}, "shuffled was None, is True"),
        ({"split": "test"}, "split was validation, is test"),
    ],
)
def test_another_comparison_in_the_same_folder(folder: Path, changes: dict[str, Any], text: str) -> None:
    first = go(folder, "Seeing")
    with pytest.raises(ValueError, match=f"holds another comparison .*{text}.*give another folder"):
        go(folder, "Seeing", **changes)
    assert read_results(folder / "run") == first and len(asked(folder)) == QUESTIONS


def test_two_runs_in_one_folder(folder: Path) -> None:
    with (
        Store(folder / "run").alone(),
        pytest.raises(ValueError, match=r"another process runs a comparison in .*run: wait for it"),
    ):
        go(folder)
    assert asked(folder) == []
    assert len(go(folder).rows) == 2 * QUESTIONS


def test_a_wrong_pipeline_is_told_before_anything_is_asked(folder: Path) -> None:
    with pytest.raises(PipelineError, match="there is no pipeline 'sing'"):
        go(folder, pipelines=[f"{folder / 'own.py'}:Seeing", "sing"])
    assert asked(folder) == []


def test_a_broken_row_is_left_out_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "colours.jsonl").open("a") as file:
        file.write("{broken\n")
    assert len(go(folder, "Seeing", skip_bad=True).rows) == QUESTIONS
    assert "line 9" in capsys.readouterr().out


def test_what_a_run_is_stands_in_its_folder(folder: Path) -> None:
    results = go(folder, "Seeing", limit=5)
    noted = json.loads((folder / "run" / "run.json").read_text())
    assert noted["settings"]["limit"] == results.settings["limit"] == 5
    assert results.command.startswith("multimodal compare --tasks ") and "--limit 5" in results.command
    assert results.command.endswith(f"--output {folder / 'run'}")
    assert {"cpu", "cores", "python", "torch"} <= set(results.machine)


@pytest.fixture
def judge() -> Iterator[Scripted]:
    with scripted() as endpoint:
        yield endpoint


def test_a_judge_adds_a_score(folder: Path, judge: Scripted) -> None:
    judge.answer = lambda chat, number: "yes" if "Given answer: red" in chat["messages"][0]["content"] else "no"
    results = go(folder, "Seeing", judge=judge.url)
    assert len(judge.chats) == QUESTIONS
    assert [row.scores["judged"] for row in results.rows] == [1, 0, 0, 0, 0, 0, 1, 0]
    assert summarise(results)[0].scores["judged"] == 2 / 8


def test_a_judge_that_comes_later_judges_what_was_said(folder: Path, judge: Scripted) -> None:
    judge.script("yes")
    go(folder, "Seeing")
    results = go(folder, "Seeing", judge=judge.url)
    assert len(asked(folder)) == QUESTIONS == len(judge.chats)
    assert all(row.scores["judged"] == 1 for row in results.rows)
    go(folder, "Seeing", judge=judge.url)
    assert len(judge.chats) == QUESTIONS


def test_a_judge_that_fails_costs_no_answer(
    folder: Path, judge: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)
    judge.script(refusing(503, "busy"), "yes", "perhaps", "no")
    results = go(folder, "Seeing", judge=judge.url)
    assert all(row.answer is not None and not row.error for row in results.rows)
    assert [row.scores.get("judged") for row in results.rows] == [1, None, 0, 0, 0, 0, 0, 0]
    assert "neither yes nor no" in capsys.readouterr().out
    judge.script("yes")
    again = go(folder, "Seeing", judge=judge.url, retry_errors=True)
    assert [row.scores.get("judged") for row in again.rows] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert len(asked(folder)) == QUESTIONS
