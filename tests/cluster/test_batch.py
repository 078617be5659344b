"""Batches: the same answers whatever the pictures lie in, errors in rows, and a killed job that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from multimodal import MultiModalModel
from multimodal.cli import main
from multimodal.cluster.batch import Answerer, BatchSettings, file_of, run_batch
from multimodal.cluster.shards import BatchError, rows_of, shards_of
from tests.cluster.conftest import (
    PROMPT,
    QUESTION,
    write_jsonl,
    write_parquet,
    write_pictures,
    write_tar,
)

ROOT = Path(__file__).parent.parent.parent


def ids(source: Path, *, rows: int) -> list[list[str]]:
    return [[row.id for row in rows_of(shard)] for shard in shards_of(source, rows=rows)]


def answers(settings: BatchSettings, output: Path) -> list[dict[str, Any]]:
    """What a replica writes, without Ray around it."""
    output.mkdir(exist_ok=True)
    answerer = Answerer(settings, str(output))
    shards = shards_of(Path(settings.source), rows=settings.rows)
    for shard in shards:
        answerer({**vars(shard), "files": list(shard.files)})
    return [record for shard in shards for record in parquet.read_table(output / file_of(shard)).to_pylist()]


class TestShards:
    def test_folder(self, tmp_path: Path) -> None:
        names = write_pictures(tmp_path, 7)
        (tmp_path / "notes.txt").touch()
        (tmp_path / ".hidden.png").touch()
        assert ids(tmp_path, rows=3) == [names[:3], names[3:6], names[6:]]
        assert shards_of(tmp_path, rows=3) == shards_of(tmp_path, rows=3)
        assert ids(tmp_path / names[0], rows=3) == [[Path(names[0]).name]]

    def test_parquet_across_row_groups(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "mine.parquet", tmp_path / "p", write_pictures(tmp_path / "p", 8))
        shards = shards_of(tmp_path / "mine.parquet", rows=5)
        assert [[row.id for row in rows_of(shard)] for shard in shards] == [
            [f"mine.parquet:{number}" for number in numbers] for numbers in (range(5), range(5, 8))
        ]
        assert [row.question for row in rows_of(shards[1])] == [QUESTION, None, QUESTION]

    @pytest.mark.parametrize("end", ["\n", ""])
    def test_jsonl_is_cut_at_lines(self, end: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(f'{{"image": "{number}.png", "question": "é"}}' for number in range(5)) + end)
        assert ids(path, rows=2) == [
            ["mine.jsonl:1", "mine.jsonl:2"],
            ["mine.jsonl:3", "mine.jsonl:4"],
            ["mine.jsonl:5"],
        ]

    def test_every_tar_is_one(self, tmp_path: Path) -> None:
        names = write_pictures(tmp_path / "p", 5)
        (tmp_path / "t").mkdir()
        write_tar(tmp_path / "t" / "0.tar", tmp_path / "p", names[:3])
        write_tar(tmp_path / "t" / "1.tar", tmp_path / "p", names[3:])
        assert ids(tmp_path / "t", rows=1) == [["000", "001", "002"], ["000", "001"]]

    def test_what_is_not_read(self, tmp_path: Path) -> None:
        with pytest.raises(BatchError, match="missing is not there: give a folder of pictures"):
            shards_of(tmp_path / "missing", rows=2)
        with pytest.raises(BatchError, match="has nothing to read"):
            shards_of(tmp_path, rows=2)
        write_pictures(tmp_path, 1)
        (tmp_path / "a.jsonl").touch()
        with pytest.raises(BatchError, match=r"files of several kinds \(jsonl, pictures\)"):
            shards_of(tmp_path, rows=2)
        (tmp_path / "a.parquet").write_text("no")
        with pytest.raises(BatchError, match=r"a\.parquet: not a Parquet file"):
            shards_of(tmp_path / "a.parquet", rows=2)


class TestAnswers:
    def test_are_the_models_from_every_kind_of_file(self, checkpoint: Path, tmp_path: Path) -> None:
        names = write_pictures(tmp_path / "p", 6)
        write_parquet(tmp_path / "mine.parquet", tmp_path / "p", names)
        write_jsonl(tmp_path / "mine.jsonl", tmp_path / "p", names)
        write_tar(tmp_path / "mine.tar", tmp_path / "p", names)
        model = MultiModalModel.from_pretrained(checkpoint)
        expected = {
            question: [model(question, tmp_path / "p" / name, max_new_tokens=5).text for name in names]
            for question in (PROMPT, QUESTION)
        }
        for source, questions in (
            ("p", [PROMPT] * 6),
            ("mine.parquet", [PROMPT, QUESTION] * 3),
            ("mine.jsonl", [QUESTION] * 6),
            ("mine.tar", [QUESTION] * 6),
        ):
            settings = BatchSettings(
                str(tmp_path / source), prompt=PROMPT, model=str(checkpoint), max_new_tokens=5, rows=4
            )
            said = answers(settings, tmp_path / f"{source}-out")
            assert [record["question"] for record in said] == questions
            assert [record["answer"] for record in said] == [
                expected[question][at] for at, question in enumerate(questions)
            ]
            assert all(record["error"] is None and record["completion_tokens"] <= 5 for record in said)

    def test_errors_are_rows(self, checkpoint: Path, tmp_path: Path) -> None:
        names = write_pictures(tmp_path / "p", 2)
        (tmp_path / "p" / "0" / "001.png").write_bytes(b"no picture")
        path = tmp_path / "mine.jsonl"
        lines = (
            f'{{"image": "p/{names[0]}", "question": "{PROMPT}"}}',
            f'{{"image": "p/{names[1]}", "question": "{PROMPT}"}}',
            '{"image": "p/missing.png", "question": "Why?"}',
            '{"question": "Why?"}',
            "{",
            "[]",
            f'{{"image": "p/{names[0]}"}}',
            f'{{"image": "p/{names[0]}", "question": 5}}',
            f'{{"image": "p/{names[0]}", "question": "{"why " * 300}"}}',
            '{"image": "https://example.org/a.png", "question": "Why?"}',
            f'{{"image": "p/{names[0]}", "question": "{PROMPT}"}}',
        )
        path.write_text("\n".join(lines))
        said = answers(BatchSettings(str(path), model=str(checkpoint), max_new_tokens=5), tmp_path / "out")
        assert [record["id"] for record in said] == [f"mine.jsonl:{number}" for number in range(1, 12)]
        assert said[0]["answer"] == said[-1]["answer"] != "" and said[0]["error"] is said[-1]["error"] is None
        for record, expected in zip(
            said[1:-1],
            (
                "001.png",
                "missing.png",
                "there is no picture",
                "not JSON",
                "not a JSON object",
                "there is no question",
                "the question is not text",
                "shorten it",
                "a.png",
            ),
            strict=True,
        ):
            assert record["answer"] is None and expected in record["error"], record

    def test_a_tar_that_is_cut_short(self, checkpoint: Path, tmp_path: Path) -> None:
        names = write_pictures(tmp_path / "p", 4)
        path = tmp_path / "mine.tar"
        write_tar(path, tmp_path / "p", names)
        with tarfile.open(path) as archive:
            third = archive.getmember("002.png").offset_data
        path.write_bytes(path.read_bytes()[: third + 20])
        said = answers(BatchSettings(str(path), model=str(checkpoint), max_new_tokens=5), tmp_path / "out")
        assert [record["error"] for record in said[:-1]] == [None, None]
        assert "mine.tar cannot be read any further" in said[-1]["error"]


def batch(source: Path, output: Path, checkpoint: Path, *more: str) -> list[str]:
    return ["batch", str(source), str(output), "--prompt", PROMPT, "--model", str(checkpoint), "--rows", "2", *more]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "multimodal.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_folder_with_other_answers_is_left_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", 2)
    settings = BatchSettings(str(tmp_path / "p"), prompt=PROMPT, rows=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.parquet").touch()
    done = run_batch(settings, tmp_path / "out")
    assert (done.shards, done.skipped) == (0, 1)
    with pytest.raises(BatchError, match="holds answers to other pictures or questions"):
        run_batch(BatchSettings(str(tmp_path / "p"), prompt="Another?", rows=2), tmp_path / "out")


def test_needs_ray(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "p", 2)
    monkeypatch.delitem(sys.modules, "multimodal.cluster.connection", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(batch(tmp_path / "p", tmp_path / "out", checkpoint)) == 1
    assert "pip install 'multimodal[cluster]'" in capsys.readouterr().err


@pytest.mark.slow
class TestOnRay:
    def test_killed_it_goes_on_where_it_stopped(self, tmp_path: Path, checkpoint: Path) -> None:
        pytest.importorskip("ray")
        names = write_pictures(tmp_path / "p", 24)
        words = batch(tmp_path / "p", tmp_path / "out", checkpoint, "--max-new-tokens", "200")
        process = start(words)
        try:
            deadline = time.monotonic() + 300
            while len(list((tmp_path / "out").glob("shard-*"))) < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.communicate()
        time.sleep(2)  # Ray's own processes see that and end
        there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
        assert 2 <= len(there) < 12
        process = start(words)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
        assert f"{12 - len(there)} of 12 shards to answer" in said and f"{len(there)} were there" in said
        for name, at in there.items():
            assert (tmp_path / "out" / name).stat().st_mtime_ns == at
        records = parquet.read_table(tmp_path / "out").to_pylist()
        assert sorted(record["id"] for record in records) == names
        assert all(record["error"] is None for record in records)
        assert not list((tmp_path / "out").glob(".shard-*"))
