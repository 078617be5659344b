"""A run's folder: what goes in comes out, and a folder that is none is told so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from multimodal.compare import read_results
from multimodal.compare.store import Key, Record, Store
from multimodal.pipelines import Answer, Step, Usage

NOTED: dict[str, Any] = {
    "command": "multimodal compare",
    "settings": {"seed": 3},
    "machine": {"cpu": "one"},
    "controls": ["", "shuffled"],
    "pipelines": ["native", "text_only"],
    "remote": {"native": False, "text_only": True},
    "tasks": [
        {
            "name": name,
            "metric": metric,
            "questions": [
                {"id": "1", "question": "Which brand?", "target": "Arla milk", "images": ["a.png"], "meta": {}},
                {
                    "id": "2",
                    "question": "Which?",
                    "target": "An apple",
                    "images": ["b.png"],
                    "meta": {"subsets": "fruit"},
                },
            ],
        }
        for name, metric in (("shop", "exact"), ("captions", "rouge_l"))
    ],
}
ANSWER = Answer(
    "Arla milk", (Step("ocr", 0.5, "ARLA\n1 l", True, {"boxes": [[0.1, 0.2, 0.3, 0.4]]}), Step("llm", 1.5, "prompt")),
    Usage(100, 3, 1), first_token=0.75, total=2.0, cost=0.002, confidence=0.5, finished=False,
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "run")
    store.note(NOTED)
    return store


def key(pipeline: str = "native", id_: str = "1", task: str = "shop", control: str = "") -> Key:
    return Key(task, pipeline, control, id_)


def test_records_are_what_was_added(store: Store) -> None:
    added = {
        key(): Record("d1", ANSWER, judged=1.0),
        key(id_="2"): Record("d2", error="busy"),
        key(id_="2", control="shuffled"): Record("d3", Answer("苹果", cost=None)),
    }
    for place, record in added.items():
        store.add(place, record)
    assert Store(store.folder).records() == added


def test_the_last_record_counts(store: Store) -> None:
    store.add(key(), Record("d1", error="busy"))
    store.add(key(), Record("d1", ANSWER))
    assert store.records() == {key(): Record("d1", ANSWER)}
    assert [row.answer for row in read_results(store.folder).rows] == [ANSWER]


def test_rows_come_in_the_order_of_the_run_and_lack_what_was_not_asked(store: Store) -> None:
    for place in (key("text_only"), key(task="captions", id_="2"), key(control="shuffled"), key(id_="2"), key()):
        store.add(place, Record("d", ANSWER))
    results = read_results(store.folder)
    assert [(row.task, row.pipeline, row.control, row.id) for row in results.rows] == [
        ("shop", "native", "", "1"),
        ("shop", "native", "", "2"),
        ("shop", "native", "shuffled", "1"),
        ("shop", "text_only", "", "1"),
        ("captions", "native", "", "2"),
    ]
    assert results.rows[0].scores["exact"] == 1 and results.rows[1].scores["exact"] == 0
    assert "rouge_l" in results.rows[4].scores
    assert (results.command, results.settings, results.machine) == ("multimodal compare", {"seed": 3}, {"cpu": "one"})
    assert results.remote == {"native": False, "text_only": True}


def test_what_was_found_in_print_is_shown_apart_for_every_pipeline(store: Store) -> None:
    store.add(key("text_only"), Record("d", ANSWER))  # its OCR read the brand
    store.add(key("text_only", "2"), Record("d", ANSWER))  # and nothing of the second one's answer
    for id_ in ("1", "2"):
        store.add(key("native", id_), Record("d", Answer("milk")))
    subsets = {(row.pipeline, row.id): row.meta.get("subsets") for row in read_results(store.folder).rows}
    assert subsets == {
        ("native", "1"): "printed",
        ("native", "2"): "fruit",
        ("text_only", "1"): "printed",
        ("text_only", "2"): "fruit",
    }


def group(store: Store, **changes: Any) -> None:
    figures = {"task": "shop", "pipeline": "native", "control": "", "seconds": 4.0, "wall": 4.0, "answers": 2}
    store.add_group(**{**figures, "watt_hours": None, "model_seconds": 3.0, **changes})


def test_what_was_measured_is_added_up_over_the_parts_of_a_run(store: Store) -> None:
    group(store, watt_hours=0.5)
    group(store, seconds=6.0, answers=6, watt_hours=0.25)
    group(store, control="shuffled", seconds=100.0, answers=1, watt_hours=9.0)  # of no figure
    group(store, pipeline="text_only", answers=1)
    store.add_group(pipeline="native", peak_memory=5)
    store.add_group(pipeline="native", peak_memory=7)
    results = read_results(store.folder)
    assert results.throughput == {("shop", "native"): 8 / 10, ("shop", "text_only"): 1 / 4}
    assert results.energy == {("shop", "native"): 0.75}
    assert results.peak_memory == {"native": 7}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "it has no run.json"),
        ("{", "run.json: "),
        ("[1]", "run.json: "),
        ("{}", "run.json lacks command, settings"),
        (json.dumps({name: value for name, value in NOTED.items() if name != "tasks"}), "run.json lacks tasks"),
    ],
)
def test_a_folder_that_is_none(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=f"is not the folder of a comparison .*{said}"):
        read_results(tmp_path)


def test_a_folder_is_used_by_one_at_a_time(store: Store) -> None:
    with store.alone():
        with pytest.raises(ValueError, match="another process runs a comparison"), Store(store.folder).alone():
            pass
        assert read_results(store.folder).rows == ()  # reading is nobody's affair
    with Store(store.folder).alone():
        pass


def test_what_the_run_is_is_replaced_as_a_whole(store: Store) -> None:
    store.note({**NOTED, "command": "another"})
    assert store.noted() == {**NOTED, "command": "another"}
    assert sorted(path.name for path in store.folder.iterdir()) == ["run.json"]
