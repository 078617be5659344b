"""`read`: the names that the command line takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from multimodal.data import DataError, read, read_grocery, read_slake

from .conftest import slake_record, write_slake


def test_slake(tmp_path: Path) -> None:
    write_slake(tmp_path, [slake_record()], split="validate")
    for split in ("validation", "validate", "val"):
        assert read(f"slake:{tmp_path}", split) == read_slake(tmp_path, "validate")


def test_grocery(grocery: Path) -> None:
    assert read(f"grocery:{grocery}") == read_grocery(grocery)
    for split in ("validation", "validate", "val"):
        assert read(f"grocery:{grocery}", split) == read_grocery(grocery, "val")


def test_jsonl_and_skip_bad(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{}\n")
    skipped: list[DataError] = []
    assert read(tmp_path / "my.jsonl", skip_bad=skipped) == []
    assert len(skipped) == 1


@pytest.mark.parametrize("name", ["my.csv", "slake:", "slake", "coco:folder"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(DataError, match=r"no reader for this.*Give slake:FOLDER, grocery:FOLDER"):
        read(name)


def test_reading_needs_no_torch() -> None:
    code = "import sys, multimodal.data; sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
