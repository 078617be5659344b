"""What a pipeline takes of memory, measured in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from multimodal.compare import compare
from multimodal.compare.memory import _settings, peak_memory
from multimodal.pipelines import PipelineSettings
from multimodal.pipelines.endpoint import Price
from tests.compare.runs import asked, settings, write

BALLAST = 400 * 2**20  # bytes
MORE = """
from own import Seeing

class Heavy(Seeing):
    name = "heavy"

    def answer(self, question):
        ballast = b"x" * {ballast}
        return super().answer(question)

class Broken(Seeing):
    name = "broken"

    def answer(self, question):
        raise ValueError("no")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (write(tmp_path) / "more.py").write_text(MORE.format(ballast=BALLAST))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent.parent}")
    return tmp_path


def peak(folder: Path, name: str) -> int | None:
    return peak_memory(f"{folder / 'more.py'}:{name}", PipelineSettings(), "What is it?", [str(folder / "red.png")])


def test_a_comparison_measures_each_pipeline_once_and_ballast_weighs(folder: Path) -> None:
    chosen = replace(settings(folder, "Seeing"), memory=True)
    (light,) = compare(chosen, progress=False).peak_memory.values()
    assert light > 50 * 2**20
    before = asked(folder)
    assert compare(chosen, progress=False).peak_memory == {"seeing": light}
    assert asked(folder) == before
    heavy = peak(folder, "Heavy")
    assert heavy is not None and 0.9 * BALLAST < heavy - light < 1.3 * BALLAST


def test_what_cannot_answer_has_no_figure(folder: Path) -> None:
    assert peak(folder, "Broken") is None


def test_settings_reach_the_other_process_as_they_are() -> None:
    import json

    made_of = PipelineSettings(
        model="m", adapter=Path("a"), tuned={"blind_tuned": Path("t")}, prices={"p": Price(1, 2)}, prompt=Path("p.j2")
    )
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(made_of).items()}
    said |= {"tuned": {"blind_tuned": "t"}, "prices": {"p": {"prompt": 1, "completion": 2}}}
    assert _settings(json.loads(json.dumps(said))) == made_of
