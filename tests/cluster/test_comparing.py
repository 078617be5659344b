"""A comparison on Ray says what one process says, and a replica that dies takes no question with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.cluster.comparing import TRIES, Failure, Replica, compare_on_ray
from multimodal.compare import Results, compare
from multimodal.pipelines import Answer, PipelineError, PipelineSettings, Question
from tests.compare.runs import QUESTIONS, asked, feel, said, settings, write

# Like ``Seeing``, but it dies: the first time that it sees green, and each time that it is asked whether blue is red.
MORTAL = """

import signal


class Mortal(Seeing):
    name = "mortal"

    def answer(self, question: Question) -> Answer:
        answer = super().answer(question)
        picture, died = Path(question.images[0]).stem, HERE / "died.txt"
        asked = (HERE / "processes.txt").open("a")
        asked.write(f"{os.getpid()}\\n")
        asked.close()
        if (HERE / "immortal").exists():
            return answer
        if picture == "green" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if picture == "blue" and question.text.startswith("Is"):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    with (tmp_path / "own.py").open("a") as file:
        file.write(MORTAL)
    return tmp_path


def processes(folder: Path) -> list[int]:
    """Which process was asked, each time."""
    return [int(line) for line in (folder / "processes.txt").read_text().split()]


class TestReplica:
    """What Ray keeps in a process, without Ray around it."""

    @pytest.fixture(autouse=True)
    def stay(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)  # a replica changes its folder

    def test_has_the_folder_and_the_pipelines_of_the_command(self, folder: Path) -> None:
        replica = Replica(["own.py:Seeing", "own.py:Guessing"], PipelineSettings(), str(folder))
        faces = replica.open()
        assert isinstance(faces, list)
        assert [(face.name, face.digest, face.remote, face.uses_pictures) for face in faces] == [
            ("seeing", "seeing 1", False, True),
            ("guessing", "guessing 1", False, False),
        ]
        question = Question("What colour is it?", (folder / "green.png",))
        answers = [replica.answer(name, question) for name in ("seeing", "guessing")]
        assert [answer if isinstance(answer, Failure) else Answer.from_dict(answer).text for answer in answers] == [
            "green",
            "red",
        ]

    def test_errors_are_those_that_a_run_would_tell(self, folder: Path) -> None:
        replica = Replica(["own.py:Seeing"], PipelineSettings(), str(folder))
        question = Question("What colour is it?", (folder / "green.png",))
        for mood, failure in (
            ({"kind": "value"}, Failure("ValueError: no green today")),
            ({"kind": "own"}, Failure("no green today")),
            ({"kind": "busy", "wait": 7.0}, Failure("busy", passing=True, retry_after=7.0)),
        ):
            feel(folder, fail="green", **mood)
            assert replica.answer("seeing", question) == failure
        error = failure.error()
        assert (type(error), str(error), error.passing, error.retry_after) == (PipelineError, "busy", True, 7.0)

    def test_cannot_be_opened(self, folder: Path) -> None:
        missing = Replica([], PipelineSettings(), str(folder / "missing")).open()
        assert isinstance(missing, Failure) and "has no folder" in missing.message
        unknown = Replica(["nonsense"], PipelineSettings(), str(folder)).open()
        assert isinstance(unknown, Failure) and "there is no pipeline 'nonsense'" in unknown.message


def test_needs_ray(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "multimodal.cluster.connection", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["compare", "--ray", "--tasks", str(folder / "colours.jsonl"), "--output", str(folder / "run")]) == 1
    assert "pip install 'multimodal[cluster]'" in capsys.readouterr().err
    assert not (folder / "run").exists()


def figures(results: Results) -> list[tuple[object, ...]]:
    """All that does not hang on the clock."""
    return [
        (
            *(row.task, row.pipeline, row.control, row.id, row.images, row.error, row.scores),
            None if row.answer is None else (row.answer.text, row.answer.usage, row.answer.finished),
        )
        for row in results.rows
    ]


@pytest.mark.slow
class TestOnRay:
    @pytest.fixture(autouse=True)
    def ray(self) -> None:
        pytest.importorskip("ray")

    def test_says_what_one_process_says(self, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        (folder / "immortal").touch()
        feel(folder, fail="white", kind="value", pause=0.2)
        chosen = {
            "pipelines": ["native", "blind", "own.py:Mortal"],
            "made_of": PipelineSettings(model=str(checkpoint), precision="float32"),
            "shuffled": True,
        }
        one = compare(settings(folder, output="alone", **chosen), progress=False)
        alone = len(processes(folder))
        wanted = settings(folder, output="spread", **chosen)
        spread = compare_on_ray(wanted, replicas=2, num_cpus=0.5, progress=False)
        assert len(one.rows) == 5 * QUESTIONS  # two of three are also asked about other pictures
        assert figures(spread) == figures(one)
        assert {row.error for row in spread.rows} == {"", "ValueError: no white today"}
        answered = processes(folder)
        assert set(answered[:alone]) == {os.getpid()}
        assert len(set(answered[alone:])) == 2 and os.getpid() not in answered[alone:]
        assert spread.machine["answered by"] == "2 replicas on Ray, 0.5 cores and 0 GPUs each"
        assert spread.pipelines == one.pipelines and not spread.energy
        assert len(list((folder / "spread" / "logs").iterdir())) == 5

        times = len(asked(folder))
        again = compare(wanted, progress=False)  # without Ray it goes on, and finds nothing left to ask
        assert len(asked(folder)) == times and figures(again) == figures(one)

    def test_what_is_wrong_there_is_told_here(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["compare", "--tasks", str(folder / "colours.jsonl"), "--pipelines", "nonsense", "--output"]
        assert main([*words, str(folder / "run"), "--ray", "--replicas", "2", "--num-cpus", "0.5"]) == 1
        assert "there is no pipeline 'nonsense'" in capsys.readouterr().err

    def test_a_killed_replica_takes_no_question_with_it(self, folder: Path) -> None:
        results = compare_on_ray(settings(folder, "Mortal"), replicas=2, num_cpus=0.5, progress=False)
        assert (folder / "died.txt").exists()
        errors = {row.id: row.error for row in results.rows if row.error}
        (killer,) = [row.id for row in results.rows if row.question == "Is it red?" and row.images[0].stem == "blue"]
        assert errors == {killer: f"{TRIES} replicas died while they answered this; Ray's logs say why"}
        died = 1 + TRIES
        assert len(processes(folder)) == QUESTIONS - 1 + died and len(set(processes(folder))) > 2

        (folder / "immortal").touch()
        assert said(results) == {**said(compare(settings(folder, "Mortal", output="alone"))), ("mortal", killer): None}
