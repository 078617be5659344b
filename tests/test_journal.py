"""A journal survives a kill at any byte, says what is wrong, and is left alone by those who only read it."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from multimodal import journal
from multimodal.journal import Journal, JournalError

RECORDS = [{"id": 1, "text": "an apple"}, {"id": 2, "text": "苹果\nred"}, {"id": 3, "deep": {"a": [1, None]}}]


def written(path: Path) -> Path:
    for record in RECORDS:
        Journal(path).append(record)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "some" / "folder" / "a.jsonl")
    assert Journal(path).read() == RECORDS
    assert len(path.read_bytes().splitlines()) == 3  # a line end in a text is none in the file


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    assert Journal(tmp_path / "none" / "a.jsonl").read() == []
    assert not (tmp_path / "none").exists()


def test_a_kill_at_any_byte_leaves_whole_records_and_room_for_more(tmp_path: Path) -> None:
    content = written(tmp_path / "a.jsonl").read_bytes()
    for size in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        whole = RECORDS[: content[:size].count(b"\n")]
        cut = Journal(path)
        assert cut.read() == whole
        cut.append({"id": 9})
        assert Journal(path).read() == [*whole, {"id": 9}]


def test_half_a_line_longer_than_what_is_read_at_a_time_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "BLOCK", 16)
    path = written(tmp_path / "a.jsonl")
    with path.open("ab") as file:
        file.write(b'{"text": "' + b"x" * 100)
    Journal(path).append({"id": 9})
    assert Journal(path).read() == [*RECORDS, {"id": 9}]


def test_reading_writes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    with path.open("ab") as file:
        file.write(b'{"half": ')
    before = path.read_bytes()
    assert Journal(path).read() == RECORDS
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["no json", "[1, 2]", "3", "", "\0\0\0"])
def test_a_line_of_somebody_else_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: not a record of ours: move the file away"):
        Journal(path).read()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    shared = Journal(tmp_path / "a.jsonl")

    def add(number: int) -> None:
        for place in range(20):
            shared.append({"who": number, "place": place, "text": "x" * 500})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Journal(shared.path).read()
    assert len(found) == 100
    assert all([each["place"] for each in found if each["who"] == number] == list(range(20)) for number in range(5))


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    script = (
        "import sys; from pathlib import Path; from multimodal.journal import Journal, JournalError\n"
        "try: Journal(Path(sys.argv[1])).append({'text': 'x' * 500})\n"
        "except JournalError as error: print(error)"
    )
    most = path.stat().st_size + 100  # a part of the record still fits

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, preexec_fn=limit, check=True
    )
    assert done.stdout.startswith(f"{path} cannot be written (the disk is full): make room")
    assert Journal(path).read() == RECORDS
    assert path.read_bytes().endswith(b"\n")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"file/a\.jsonl cannot be written \(.+\)"):
        Journal(tmp_path / "file" / "a.jsonl").append({})
