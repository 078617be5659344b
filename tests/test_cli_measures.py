"""``evaluate``, ``calibrate`` and ``ask --min-confidence``, on a tiny untrained model: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multimodal.cli import main
from tests.test_cli import rows
from tests.training.tiny import draw, save_checkpoint, write_task


def line_of(question: str, answer: str, picture: Path) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "images": [str(picture)]}) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds data/ (the task in SLAKE's layout, a box around half of each picture), fused/ and picture.png."""
    folder = tmp_path_factory.mktemp("measures")
    write_task(folder / "data", train=24, validate=4)
    for picture in (folder / "data" / "imgs").iterdir():
        (picture / "detection.json").write_text(json.dumps([{"Heart": [0, 0, 20, 36]}]))
    records = json.loads((folder / "data" / "validate.json").read_text())
    heart = {"question": "Is the heart red?", "answer": "no", "content_type": "Organ", "answer_type": "CLOSED"}
    told = "a square of one colour on a grey ground, not in the middle"
    records += [{**records[0], **heart, "qid": 100}, {**records[2], **heart, "qid": 101}]
    (folder / "data" / "validate.json").write_text(json.dumps(records))
    (folder / "long.jsonl").write_text(
        "".join(line_of("Describe it.", told, path / "source.jpg") for path in (folder / "data" / "imgs").iterdir())
    )
    draw("red", 3).save(folder / "picture.png")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command on the tiny model and gives what it prints."""

    def run(*words: str, model: Path = folder / "fused", code: int = 0) -> str:
        capsys.readouterr()
        assert main([*words, "--model", str(model)]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def test_evaluate_by_and_floors(run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "answers.jsonl"
    data = f"slake:{folder / 'data'}"
    printed = run("evaluate", "--data", data, "--by", "content_type", "--floors", "--output", str(output))
    assert "expected calibration error" in printed
    for name in ("exact match", "95 % interval", "shuffled", "blind"):
        assert name in printed
    assert "ROUGE-L" not in printed
    table = rows(printed)
    counts = {name: table[name][0] for name in ("all", "OPEN", "CLOSED", "Colour", "Organ")}
    assert counts == {"all": "10", "OPEN": "4", "CLOSED": "6", "Colour": "8", "Organ": "2"}
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 10 and all(0 <= line["confidence"] <= 1 for line in lines)
    assert "says nothing of taste, but of answer_type" in run("evaluate", "--data", data, "--by", "taste", code=1)


def test_evaluate_blind(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    output = tmp_path / "answers.jsonl"
    command = ("evaluate", "--data", f"slake:{folder / 'data'}", "--blind", "--output", str(output), "--limit", "3")
    assert "validation, no pictures" in run(*command, "--max-new-tokens", "2")
    assert [json.loads(line)["images"] for line in output.read_text().splitlines()] == [[], [], []]


def test_evaluate_long_answers_and_broken_rows(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "long.jsonl"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = line_of("What?", "a", tmp_path / "broken.png")
    file.write_text((folder / "long.jsonl").read_text() + '{"question": "?"}\n' + broken)
    assert "long.jsonl, line 29" in run("evaluate", "--data", str(file), code=1)
    printed = run("evaluate", "--data", str(file), "--skip-bad", "--max-new-tokens", "3")
    assert "2 could not be read" in printed and "broken.png" in printed and "ROUGE-L" in printed
    assert rows(printed)["all"][0] == "28"


def test_evaluate_reports(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    output = tmp_path / "reports.jsonl"
    command = ("evaluate", "--reports", f"slake:{folder / 'data'}", "--output", str(output), "--max-new-tokens", "4")
    printed = run(*command, "--language", "zh")
    assert "4 descriptions, zh" in printed
    table = rows(printed)
    assert "another picture's report" in table and len(table["all"]) == 4
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 4 and lines[0].keys() >= {"right", "wrong", "found", "missed", "said"}
    assert lines[0]["question"] == "描述这张图片。" and "organ heart: present" in lines[0]["missed"]


def test_evaluate_pointing(run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "looks.jsonl"
    printed = run("evaluate", "--pointing", f"slake:{folder / 'data'}", "--output", str(output))
    assert rows(printed)["all"][0] == rows(printed)["Organ"][0] == "2"
    assert rows(printed)["all"][3] == "50.0 %", "anywhere: half of the picture is in the box"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 and all(0 < share < 1 for line in lines for share in line["peak"])
    assert "no question of the split has a box" in run("evaluate", "--pointing", str(folder / "long.jsonl"), code=1)


def test_evaluate_form(run) -> None:  # type: ignore[no-untyped-def]
    printed = run("evaluate", "--form", "--max-new-tokens", "3")
    assert " of 40 answers are badly formed" in printed and "Describe this X-ray" in printed


def test_evaluate_nothing(run) -> None:  # type: ignore[no-untyped-def]
    assert "nothing to evaluate: give --data" in run("evaluate", code=1)


def test_calibrate(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, _ = save_checkpoint(tmp_path), draw
    data = f"slake:{folder / 'data'}"
    printed = run("calibrate", "--data", data, "--no-held-out", model=model)
    assert "48 questions, " in printed and f"written into {model / 'config.json'}" in printed
    table = rows(printed)
    assert table["before"][:2] == ["1.000", "0.000"] and table["after"][:2] != ["1.000", "0.000"]
    config = json.loads((model / "config.json").read_text())
    assert f"{config['confidence_scale']:.3f}" == table["after"][0]
    again = rows(run("calibrate", "--data", data, "--split", "validation", model=model))
    assert again["before"] != table["before"] and again["before"][:2] == table["after"][:2]
    none = f"slake:{tmp_path / 'none'}"
    write_task(tmp_path / "none", train=1, validate=1)
    assert "--no-held-out takes all" in run("calibrate", "--data", none, model=model, code=1)


def test_ask_says_that_it_is_not_sure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ask", str(folder / "picture.png"), "Is it red?", "--model", str(folder / "fused")]
    command += ["--max-new-tokens", "3"]
    capsys.readouterr()
    assert main(command) == 0
    sure = capsys.readouterr()
    assert main([*command, "--min-confidence", "1"]) == 0
    unsure = capsys.readouterr()
    assert unsure.out == sure.out and "not sure" not in sure.err
    assert "not sure: the chance that this is right is about " in unsure.err and "less than 100 %" in unsure.err
    assert main([*command, "--min-confidence", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["unsure"] is True and "not sure" not in told.err
    with pytest.raises(SystemExit):
        main([*command, "--min-confidence", "50"])
    assert "50 is not 0 to 1" in capsys.readouterr().err
