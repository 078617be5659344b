"""Samples and the error that readers raise."""

from pathlib import Path

import pytest

from multimodal.data import DataError, Sample
from multimodal.data.sample import choose, read_text


def test_a_sample_can_be_kept_in_a_set() -> None:
    first = Sample("What?", "Liver", (Path("a.png"),), "1", {"language": "en"})
    assert len({first, Sample("What?", "Liver", (Path("a.png"),), "1", {"language": "en"})}) == 1


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
