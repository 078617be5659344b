"""`multimodal compare`, its report and `multimodal advise`, with a person's own pipelines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from multimodal.cli import main

OWN = '''
from multimodal.pipelines import Answer, Question


class Seeing:
    """Names the colour that the picture has."""

    name, digest = "seeing", "1"

    def answer(self, question: Question) -> Answer:
        from multimodal.images import load_image

        red, _, blue = load_image(question.images[0]).getpixel((0, 0))
        return Answer("red" if red > blue else "blue", total=0.01, first_token=0.005)


class Guessing(Seeing):
    """Says the same to everything."""

    name = "guessing"

    def answer(self, question: Question) -> Answer:
        return Answer("red", total=0.02, first_token=0.02)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, half of them red, a question about each, and two pipelines."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    with (folder / "colours.jsonl").open("w") as file:
        for number in range(20):
            colour = "red" if number % 2 else "blue"
            Image.new("RGB", (8 + number, 8), colour).save(folder / f"{number}.png")
            content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "What colour is this?"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": colour}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A comparison of the two."""
    own = folder / "own.py"
    words = ["compare", "--tasks", str(folder / "colours.jsonl"), "--pipelines", f"{own}:Seeing,{own}:Guessing"]
    assert main([*words, "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_a_comparison_ends_with_its_report(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert "seeing wins on colours: 100.0 %" in text and "guessing" in text
    with (run / "figures.csv").open() as file:
        figures = {row["pipeline"]: row for row in csv.DictReader(file)}
    assert set(figures) == {"seeing", "guessing"}
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 20 and "multimodal compare" in page


def test_the_report_again_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "report", str(run), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file() and str(tmp_path) in capsys.readouterr().out


def test_advice(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", str(run), "--daily-volume", "100", "--deploy", "guessing=deepseek-v4-flash"]
    assert main([*words, "--html", str(tmp_path / "advice.html")]) == 0
    assert "colours: use seeing" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "advice.html").read_text()
    assert main(["advise", str(run), "--data-stays-here", "--deploy", "seeing=deepseek-v4-flash"]) == 0
    assert "colours: use guessing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "give --tasks"),
        (["compare", "--tasks", "nothing"], "no reader for this"),
        (["compare", "--tasks", "TASK", "--pipelines", "mind"], "there is no pipeline 'mind'"),
        (["compare", "--tasks", "TASK", "--tuned", "folder"], "is not PIPELINE=VALUE"),
        (["compare", "report", "."], "is not the folder of a comparison"),
        (["advise", "."], "is not the folder of a comparison"),
        (["advise", "RUN", "--deploy", "mind=deepseek-v4-flash"], "the run has no pipeline mind"),
        (["advise", "RUN", "--deploy", "seeing=nothing"], "nothing"),
    ],
)
def test_mistakes(
    words: list[str], message: str, folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = {"TASK": str(folder / "colours.jsonl"), "RUN": str(run)}
    assert main([named.get(word, word) for word in words]) == 1
    assert message in capsys.readouterr().err
