"""A comparison that is killed, interrupted, or out of room: what was finished stays, and nothing is asked twice."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from multimodal.compare import compare, read_results
from multimodal.journal import Journal
from tests.compare.runs import QUESTIONS, asked, feel, said, settings, write

ROOT = Path(__file__).parent.parent.parent
ALL = 2 * QUESTIONS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def command(folder: Path) -> list[str]:
    own = folder / "own.py"
    words = ["compare", "--tasks", str(folder / "colours.jsonl"), "--pipelines", f"{own}:Seeing,{own}:Guessing"]
    return [sys.executable, "-m", "multimodal.cli", *words, "--no-shuffled", "--output", str(folder / "run")]


def begin(folder: Path, *, until: int) -> subprocess.Popen[str]:
    """Start the command in a process of its own, and wait until so many questions are asked."""
    process = subprocess.Popen(
        command(folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what is started in the background ignores it
    )  # fmt: skip
    while len(asked(folder)) < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str | None]:
    return said(compare(settings(write(tmp_path_factory.mktemp("whole"))), progress=False))


def test_after_a_kill_nothing_finished_is_asked_again(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    feel(folder, pause=0.2)
    process = begin(folder, until=QUESTIONS + 3)  # in the middle of the second pipeline
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = asked(folder)
    kept = Journal(folder / "run" / "answers.jsonl").read()
    assert len(before) - 1 <= len(kept) <= len(before) < ALL
    partial = read_results(folder / "run")
    assert len(partial.rows) == len(kept)

    feel(folder)
    results = compare(settings(folder), progress=False)
    again = asked(folder)[len(before) :]
    assert len(again) == ALL - len(kept)
    finished = {f"{each['pipeline']}|{each['id']}" for each in kept}
    names = {row.question + row.images[0].stem: row.id for row in results.rows}
    repeated = {f"{name}|{names[question + picture]}" for name, picture, question in (x.split("|") for x in again)}
    assert not finished & repeated
    assert said(results) == uninterrupted(folder, tmp_path_factory)
    assert [(row.answer.cost, row.answer.total) for row in results.rows if row.answer] == [(0.01, 0.5)] * ALL


def test_half_an_answer_in_the_file_is_asked_again(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    compare(settings(folder), progress=False)
    file = folder / "run" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    assert len(read_results(folder / "run").rows) == ALL - 1
    results = compare(settings(folder), progress=False)
    assert asked(folder)[ALL:] == ["guessing|white|Is it red?"]
    assert said(results) == uninterrupted(folder, tmp_path_factory)


def test_an_interruption_ends_quickly_and_says_how_to_go_on(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    feel(folder, pause=0.2)
    process = begin(folder, until=3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "multimodal: interrupted: the same command goes on where it stopped"
    assert "Traceback" not in error
    before = asked(folder)
    kept = Journal(folder / "run" / "answers.jsonl").read()
    assert len(kept) == len(before) < QUESTIONS  # what was being asked came to its end, and nothing more was asked

    feel(folder)
    results = compare(settings(folder), progress=False)
    assert len(asked(folder)) == ALL
    assert said(results) == uninterrupted(folder, tmp_path_factory)


def test_nobody_waits_for_a_busy_endpoint_after_an_interruption(folder: Path) -> None:
    feel(folder, fail="red", kind="busy", wait=1000)  # a minute is waited at most
    process = begin(folder, until=1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130 and time.monotonic() - started < 50
    assert len(asked(folder)) == 1


def test_a_full_disk_is_one_clear_message_and_the_run_goes_on(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    feel(folder, padding=2000)
    most = 9000  # bytes of a file: four answers, and more than run.json takes

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("multimodal: ")]
    assert "answers.jsonl cannot be written" in message and "make room" in message
    kept = Journal(folder / "run" / "answers.jsonl").read()
    assert 0 < len(kept) < QUESTIONS

    before = asked(folder)
    results = compare(settings(folder), progress=False)
    assert len(asked(folder)) - len(before) == ALL - len(kept)
    assert said(results) == uninterrupted(folder, tmp_path_factory)
