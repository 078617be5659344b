"""Samples and the error that readers raise."""

import pickle
from pathlib import Path

import pytest

from multimodal.data import Box, DataError, Sample, report_bad
from multimodal.data.sample import choose, read_lines, read_text


def test_a_sample_can_be_kept_in_a_set() -> None:
    made = [
        Sample("What?", "Liver", (Path("a.png"),), "1", {"language": "en"}, (Box("Liver", 0, 0, 0.5, 0.5),))
        for _ in range(2)
    ]
    assert len(set(made)) == 1


def test_the_error_names_file_line_reason_and_remedy() -> None:
    error = DataError("no answer", file=Path("a.jsonl"), line=3, remedy="Write it")
    assert str(error) == "a.jsonl, line 3: no answer. Write it."
    assert str(DataError("empty", file=Path("a.jsonl"), remedy="Fill it")) == "a.jsonl: empty. Fill it."


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Kök".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text .* byte 1\)"):
        read_text(tmp_path / "a.txt", remedy="")


def test_a_phrasing_depends_on_key_and_seed_alone() -> None:
    phrasings = ("a", "b", "c")
    drawn = [choose(phrasings, key=f"grocery/{number}", seed=0) for number in range(300)]
    assert drawn[:6] == ["a", "a", "b", "c", "a", "a"]
    assert min(map(drawn.count, phrasings)) > 60
    assert drawn != [choose(phrasings, key=f"grocery/{number}", seed=1) for number in range(300)]


def test_an_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(DataError("no answer", file=Path("a.jsonl"), line=3, remedy="Write it")))
    assert (str(error), error.line) == ("a.jsonl, line 3: no answer. Write it.", 3)


def test_a_report_counts_and_lists() -> None:
    errors = [
        DataError("no answer", file=Path("a.jsonl"), line=3, remedy=""),
        DataError("?", file=Path("b"), remedy=""),
    ]
    assert report_bad(errors) == "2 could not be read:\n  a.jsonl, line 3: no answer\n  b: ?"
    assert report_bad([]) == ""


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\xe2\x80\xa8still\r\n\nthree")
    assert list(read_lines(tmp_path / "a.txt", remedy="")) == ["one\u2028still\r\n", "\n", "three"]
    (tmp_path / "b.txt").write_bytes(b"one\nK\xf6k")
    with pytest.raises(DataError, match=r"b\.txt, line 2: not UTF-8 text .* byte 1 of the line"):
        list(read_lines(tmp_path / "b.txt", remedy=""))
