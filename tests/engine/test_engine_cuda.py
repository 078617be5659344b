"""The benchmark for GPUs runs, on a CPU and in tiny sizes: nobody can try it out where there is no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import engine_cuda


def test_every_part_but_compiling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "cuda.json"
    parts = [part for part in engine_cuda.PARTS if part != "compiled"]
    arguments = ["--device", "cpu", "--tiny", "--only", ",".join(parts), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["engine_cuda", *arguments])
    assert engine_cuda.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == json.loads(output.read_text())
    (exact,) = (line for line in lines if line.get("dtype") == "float32")
    assert exact["agree"] == exact["of"] and exact["different"] > 20
    for part, variants in (("decode", 6), ("prefill", 2), ("requests", 2)):
        assert len({line["variant"] for line in lines if line["part"] == part and "turns" in line}) == variants


def test_a_part_that_fails_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_cuda", "--device", "cpu", "--tiny", "--only", "nothing,prefill"])
    assert engine_cuda.main() == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and '"part": "nothing", "error": "AttributeError' in captured.out
    assert '"part": "prefill", "variant": "engine"' in captured.out
