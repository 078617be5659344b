"""A comparison that can be worked out by hand: eight questions about four drawn pictures, and two pipelines.

``Seeing`` looks at the colour, and takes white for red; ``Guessing`` says the same to everything. Both write down what
they are asked, and behave as the file ``mood.json`` beside them says: slowly, badly, or expensively.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from multimodal.compare import CompareSettings, Results

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}
QUESTIONS = 8
PIPELINES = """
import json
import os
import threading
import time
from pathlib import Path

from multimodal.images import load_image
from multimodal.pipelines import Answer, PipelineError, Question, Step, Usage

HERE = Path(__file__).parent
FOUR = threading.Barrier(4)


class Seeing:
    name = "seeing"

    @property
    def mood(self):
        return json.loads((HERE / "mood.json").read_text())

    @property
    def digest(self):
        return f"{self.name} {self.mood.get('digest', 1)}"

    def answer(self, question: Question) -> Answer:
        mood, picture = self.mood, Path(question.images[0]).stem
        begun = os.open(HERE / "asked.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(begun, f"{self.name}|{picture}|{question.text}\\n".encode())
        os.close(begun)
        time.sleep(mood.get("pause", 0))
        if mood.get("together"):
            FOUR.wait(60)
        if picture == mood.get("fail"):
            kinds = {"own": PipelineError, "value": ValueError, "os": ConnectionError}
            if mood["kind"] == "busy":
                raise PipelineError("busy", passing=True, retry_after=mood.get("wait"))
            raise kinds[mood["kind"]](f"no {picture}\\n today")
        return Answer(
            self.say(question),
            (Step("look", 0.25, "x" * mood.get("padding", 0)),),
            Usage(10, 1, 1),
            first_token=0.25,
            total=0.5,
            cost=mood.get("cost", 0.01),
            confidence=0.75,
        )

    def say(self, question):
        red, green, blue = load_image(question.images[0]).getpixel((0, 0))
        if question.text.startswith("Is"):
            return "yes" if red > 200 and green < 100 else "no"
        return "red" if red > 200 else "green" if green > 200 else "blue"


class Guessing(Seeing):
    name = "guessing"
    uses_pictures = False

    def say(self, question):
        return "no" if question.text.startswith("Is") else "red"
"""


def write(folder: Path, **mood: Any) -> Path:
    """Pictures, questions and pipelines."""
    lines = []
    for colour, pixel in COLOURS.items():
        Image.new("RGB", (8, 8), pixel).save(folder / f"{colour}.png")
        asked = {"What colour is it?": (colour, "OPEN"), "Is it red?": ("yes" if colour == "red" else "no", "CLOSED")}
        for question, (answer, kind) in asked.items():
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns, "images": [f"{colour}.png"], "answer_type": kind}))
    (folder / "colours.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "own.py").write_text(PIPELINES)
    feel(folder, **mood)
    return folder


def feel(folder: Path, **mood: Any) -> None:
    """Say how pipelines behave from now on."""
    (folder / "mood.json").write_text(json.dumps(mood))


def settings(folder: Path, *names: str, output: str = "run", **changes: Any) -> CompareSettings:
    chosen: dict[str, Any] = {
        "tasks": [str(folder / "colours.jsonl")],
        "pipelines": [f"{folder / 'own.py'}:{name}" for name in names or ("Seeing", "Guessing")],
        "shuffled": False,
        "memory": False,
    }
    return CompareSettings(folder / output, **{**chosen, **changes})


def asked(folder: Path) -> list[str]:
    """What pipelines were asked so far: ``pipeline|picture|question``."""
    file = folder / "asked.txt"
    return file.read_text().splitlines() if file.exists() else []


def said(results: Results, control: str = "") -> dict[tuple[str, str], str | None]:
    """What was answered, by pipeline and question; None is an error."""
    return {
        (row.pipeline, row.id): None if row.answer is None else row.answer.text
        for row in results.rows
        if row.control == control
    }
