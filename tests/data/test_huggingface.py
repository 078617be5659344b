"""`load_samples`: the same samples as `read`, streamed or not, and never stale."""

import json
import os
import pickle
from pathlib import Path

import pytest

from multimodal.data import DataError, load_samples, read, sample_from

from .conftest import save_picture, slake_record, write_slake
from .test_boxes import write_boxes


@pytest.fixture
def slake(tmp_path: Path) -> str:
    write_slake(tmp_path, [slake_record(), slake_record(qid=8, question="Where is the liver?")])
    write_boxes(tmp_path / "imgs/xmlab1/source.jpg", [{"Liver": [1, 0, 1, 3]}])
    return f"slake:{tmp_path}"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Two good lines with a broken one between them, different keys in each."""
    save_picture(tmp_path / "a.png")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    lines = [{"messages": turns, "images": ["a.png"], "ward": "3"}, {}, {"messages": turns, "id": "q3"}]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "my.jsonl"


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_come_back_as_they_were(slake: str, streaming: bool) -> None:
    rows = load_samples(slake, streaming=streaming)
    assert [sample_from(row) for row in rows] == read(slake)
    assert [sample_from(row) for row in rows] == read(slake)
    assert list(rows.features) == ["question", "answer", "images", "id", "meta", "boxes"]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows(mine: Path, streaming: bool) -> None:
    skipped: list[DataError] = []
    rows = load_samples(mine, streaming=streaming, skip_bad=skipped)
    assert [sample_from(row) for row in rows] == read(mine, skip_bad=[])
    assert [error.line for error in skipped] == [2]
    with pytest.raises(DataError, match="line 2: no list of 'messages'"):
        list(load_samples(mine, streaming=streaming))


def test_streaming_reads_no_further_than_asked(mine: Path) -> None:
    assert next(iter(load_samples(mine, streaming=True)))["meta"] == {"ward": "3"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_file_is_never_served_stale(slake: str, tmp_path: Path, streaming: bool) -> None:
    assert len(list(load_samples(slake, streaming=streaming))) == 2
    write_slake(tmp_path, [slake_record(qid=9)])
    assert [row["id"] for row in load_samples(slake, streaming=streaming)] == ["slake/9"]


def test_nothing_is_cached_on_disk(
    mine: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home))
    for streaming in (False, True):
        list(load_samples(mine, streaming=streaming, skip_bad=[]))
    assert os.listdir(home) == []


def test_a_stream_can_go_to_another_process(mine: Path) -> None:
    rows = pickle.loads(pickle.dumps(load_samples(mine, streaming=True, skip_bad=[])))
    assert [row["id"] for row in rows] == ["my:1", "q3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_name_is_told_at_once(streaming: bool) -> None:
    with pytest.raises(DataError, match="no reader for this"):
        load_samples("coco:folder", streaming=streaming)
