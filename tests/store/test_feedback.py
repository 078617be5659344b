"""Feedback is kept, survives kills, and comes back as rows that the readers take."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import text

from multimodal.cli import main
from multimodal.data import read_jsonl
from multimodal.images import load_image
from multimodal.store import StoreError
from multimodal.store.feedback import EQUAL, FILE, PICTURES, Feedback, Rating, Verdict, Vote, data_folder

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")


@pytest.fixture
def feedback(tmp_path: Path) -> Feedback:
    return Feedback(tmp_path / "kept")


def rating(answer: str = "red", **said: Any) -> Rating:
    return Rating(**{"question": "What colour is this?", "answer": answer, "model": "tiny"} | said)


def test_a_picture_is_kept_once_and_as_it_was(feedback: Feedback) -> None:
    feedback.rate(rating(verdict=Verdict.LIKE), [RED])
    feedback.rate(rating("blue", comment="no"), [RED.copy()])
    feedback.vote(Vote(question="Which?", answers={"native": "a"}, model="tiny", better=EQUAL), [BLUE, RED])
    files = sorted((feedback.folder / PICTURES).iterdir())
    first, second = feedback.ratings()
    (vote,) = feedback.votes()
    assert len(files) == 2 and {path.stem for path in files} == {*first.pictures, *vote.pictures}
    assert first.pictures == second.pictures == vote.pictures[1:]
    kept = load_image(feedback.folder / PICTURES / f"{first.pictures[0]}.png")
    assert kept.tobytes() == RED.tobytes() and kept.size == RED.size
    assert (first.verdict, second.comment, vote.answers) == ("like", "no", {"native": "a"})


def test_export_has_what_can_be_learnt_from_and_the_reader_takes_it(feedback: Feedback, tmp_path: Path) -> None:
    feedback.rate(rating("liked", verdict=Verdict.LIKE), [RED])
    feedback.rate(rating("wrong", verdict=Verdict.DISLIKE), [BLUE])
    feedback.rate(rating("wrong", verdict=Verdict.DISLIKE, corrected="it is <image>blue"), [BLUE])
    feedback.rate(rating("two", question="Compare <image>these", verdict=Verdict.LIKE), [RED, BLUE])
    feedback.rate(rating("bad", verdict=Verdict.DISLIKE), [RED])
    feedback.rate(rating("so so", comment="hm"), [RED])
    feedback.rate(rating("later", verdict=Verdict.LIKE, follows=True), [RED])
    output = tmp_path / "elsewhere" / "out.jsonl"
    done = feedback.export(output)
    samples = read_jsonl(output)
    assert [(sample.question, sample.answer) for sample in samples] == [
        ("What colour is this?", "liked"),
        ("What colour is this?", "it is blue"),
        ("Compare these", "two"),
    ]
    assert [[load_image(path).getpixel((0, 0)) for path in sample.images] for sample in samples] == [
        [(255, 0, 0)],
        [(0, 0, 255)],
        [(255, 0, 0), (0, 0, 255)],
    ]
    assert [sample.meta["feedback"] for sample in samples] == ["liked", "corrected", "liked"]
    assert done.written == 3
    assert done.left_out == {
        "disliked, and not corrected": 1,
        "neither liked nor corrected": 1,
        "asked within a conversation": 1,
    }


def test_the_last_word_counts_and_a_correction_stays(feedback: Feedback, tmp_path: Path) -> None:
    def exported() -> list[str]:
        feedback.export(tmp_path / "out.jsonl")
        return [sample.answer for sample in read_jsonl(tmp_path / "out.jsonl")]

    for verdict, answers in (
        (Verdict.LIKE, ["red"]),
        (Verdict.DISLIKE, []),
        (Verdict.LIKE, ["red"]),
        (Verdict.NONE, []),
    ):
        feedback.rate(rating(verdict=verdict), [RED])
        assert exported() == answers
    feedback.rate(rating(verdict=Verdict.DISLIKE, corrected="crimson"), [RED])
    feedback.rate(rating(verdict=Verdict.DISLIKE, comment="by a shade"), [RED])
    assert exported() == ["crimson"]


def test_a_picture_that_is_gone_takes_its_rows_along(feedback: Feedback, tmp_path: Path) -> None:
    feedback.rate(rating(verdict=Verdict.LIKE), [RED])
    for path in (feedback.folder / PICTURES).iterdir():
        path.unlink()
    assert feedback.export(tmp_path / "out.jsonl").left_out == {"its picture is gone": 1}


def test_preferences_are_pairs_of_a_better_and_a_worse_answer(feedback: Feedback, tmp_path: Path) -> None:
    feedback.rate(rating("red", corrected="crimson"), [RED])
    feedback.rate(rating("blue", verdict=Verdict.LIKE), [BLUE])
    answers = {"native": "Chest", "text_only": "Label", "hybrid": "Chest", "blind": "Label"}
    for better in ("native", EQUAL):
        feedback.vote(Vote(question="Which part?", answers=answers, model="tiny", better=better), [BLUE])
    done = feedback.export_preferences(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(row["chosen"][0]["content"][0]["text"], row["rejected"][0]["content"][0]["text"]) for row in rows] == [
        ("crimson", "red"),
        ("Chest", "Label"),
    ]
    assert done.written == 2 and done.left_out == {"no better and worse answer": 2}
    row = rows[1]
    assert row["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "Which part?"}]
    assert load_image(tmp_path / row["images"][0]).getpixel((0, 0)) == (0, 0, 255)


def test_the_command_says_what_it_wrote_and_what_it_left(
    feedback: Feedback, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feedback.rate(rating(verdict=Verdict.LIKE), [RED])
    feedback.rate(rating("bad", verdict=Verdict.DISLIKE), [RED])
    words = ["feedback", "export", str(tmp_path / "out.jsonl"), "--folder", str(feedback.folder)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "1 rows written" in said and "left out: 1 disliked, and not corrected" in said
    assert "multimodal adapt" in said and len(read_jsonl(tmp_path / "out.jsonl")) == 1
    assert main([*words, "--preferences"]) == 0
    assert "0 rows written" in capsys.readouterr().out


def test_the_command_says_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["feedback", "export", str(tmp_path / "out.jsonl"), "--folder", str(tmp_path)]) == 1
    assert f"there is no {FILE}" in capsys.readouterr().err
    assert not (tmp_path / FILE).exists() and not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_written_says_so(feedback: Feedback) -> None:
    (feedback.folder / PICTURES).write_text("in the way")
    with pytest.raises(StoreError, match="feedback cannot be written"):
        feedback.rate(rating(), [RED])
    assert feedback.ratings() == []


def test_feedback_lies_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Feedback().folder == tmp_path / "multimodal" == data_folder()
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_folder() == Path.home() / ".local" / "share" / "multimodal"


WRITER = """
import sys
from pathlib import Path
from PIL import Image
from multimodal.store.feedback import Feedback, Rating
feedback = Feedback(Path(sys.argv[1]))
for number in range(10**6):
    name = f"{sys.argv[2]}-{number}"
    picture = Image.new("L", (64, 64 + number % 50))
    feedback.rate(Rating(question=name, answer="a", model="m", verdict="like"), [picture])
    print(name, flush=True)
"""


def test_a_kill_in_the_middle_of_writes_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for start in range(3):
        log = tmp_path / f"log-{start}"
        with log.open("w") as output:
            writers = [
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, str(tmp_path / "kept"), f"{start}{name}"], stdout=output
                )
                for name in "ab"
            ]
            deadline = time.monotonic() + 60
            while len(log.read_text().splitlines()) < 20 * (start + 1):
                assert time.monotonic() < deadline, "nothing is written"
                time.sleep(0.01)
            for writer in writers:
                os.kill(writer.pid, signal.SIGKILL)
                writer.wait()
        lines = log.read_text().splitlines(keepends=True)
        acknowledged += [line.strip() for line in lines if line.endswith("\n")]
    feedback = Feedback(tmp_path / "kept")
    rows = {row.question: row for row in feedback.ratings()}
    assert not set(acknowledged) - set(rows)
    assert all(load_image(feedback.folder / PICTURES / f"{row.pictures[0]}.png") for row in rows.values())
    with feedback._engine.connect() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    assert feedback.export(tmp_path / "out.jsonl").written == len(read_jsonl(tmp_path / "out.jsonl")) == len(rows)
