"""Every notebook runs, in its reduced form, and its committed outputs belong to its sources."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the notebooks need what `make setup` installs: pip install '.[notebooks]'")

import nbformat

from multimodal.data import read
from multimodal.notebook import LIMITS, data_set, limit, task_of
from multimodal.presets import trained_folder
from notebooks import execute
from notebooks.offline_kernel import REFUSED

NOTEBOOKS = execute.all_notebooks()
LONGEST = 600  # seconds of a notebook in its reduced form, on a machine that is busy
SLOW = {"05-adapt-with-100-examples"}  # training takes its time also in the reduced form
needs_weights = pytest.mark.skipif(trained_folder("embedded") is None, reason="no trained weights in assets/embedded")


def parameters() -> Iterator[object]:
    for path in NOTEBOOKS:
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


def run_quickly(path: Path, **environment: str) -> None:
    """In a process of its own: in one that had run other tests, a client was seen to wait for a kernel for ever."""
    command = [sys.executable, "-m", "notebooks.execute", path.stem]
    ran = subprocess.run(
        command,
        cwd=execute.ROOT,
        env={**os.environ, LIMITS: "quick", **environment},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert ran.returncode == 0, ran.stderr
    assert "(quick: not saved)" in ran.stdout


@needs_weights
@pytest.mark.parametrize("path", list(parameters()))
def test_runs_in_reduced_form(path: Path) -> None:
    run_quickly(path)


@needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_runs_without_the_public_data_sets(path: Path) -> None:
    run_quickly(path, MULTIMODAL_DATA="none")


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_is_as_the_conventions_say(path: Path) -> None:
    """Outputs belong to their sources; no long cell, no error, no path of a machine, no picture without alt text."""
    faults = execute.faults(path)
    assert not faults, "\n".join([f"{path.name}:", *faults, f"To renew: python -m notebooks.execute {path.stem}"])


def small(tmp_path: Path, *sources: str) -> Path:
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\n- **You will learn**: x.\n- **Takes**: x.\n- **Needs**: x."),
        *(nbformat.v4.new_code_cell(source) for source in sources),
        nbformat.v4.new_markdown_cell("## What to try next\n\n- x"),
    ]
    path = tmp_path / "00-small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def executed(path: Path) -> nbformat.NotebookNode:
    notebook, _ = execute.run(path)
    nbformat.write(notebook, path)
    return notebook


def test_a_changed_source_is_found(tmp_path: Path) -> None:
    path = small(tmp_path, "x = 1", "print(x)")
    assert "was changed and not executed" in " ".join(execute.faults(path))
    notebook = executed(path)
    assert execute.faults(path) == []
    notebook.cells[1].source = "x = 2"
    nbformat.write(notebook, path)
    assert "cell 2 was changed and not executed since" in execute.faults(path)


def test_a_cell_that_was_taken_away_is_found(tmp_path: Path) -> None:
    path = small(tmp_path, "x = 1", "print(x)")
    notebook = executed(path)
    del notebook.cells[1]
    nbformat.write(notebook, path)
    assert any("taken away" in fault for fault in execute.faults(path))


def test_what_changes_from_run_to_run_is_stripped(tmp_path: Path) -> None:
    source = "import ipywidgets\nfrom multimodal.presets import ASSETS\nprint(ASSETS)\nipywidgets.IntSlider()"
    notebook = executed(small(tmp_path, source))
    (cell,) = execute.code_cells(notebook)
    assert set(cell.metadata) == {"executed"}
    assert cell.outputs[0].text.strip() == "assets"
    assert cell.outputs[1].data == {"text/markdown": execute.WIDGET_LINE}
    assert "widgets" not in notebook.metadata
    assert execute.faults(tmp_path / "00-small.ipynb") == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("print('/ho' + 'me/me/secret.txt')", "a path of a machine"),
        ("import sys; print('careful', file=sys.stderr)", "stderr"),
        ("print(repr(object()))", "an object's address"),
        ("\n".join(["1"] * 31), "more than 30 lines"),
        ("from IPython.display import HTML\nHTML('<img src=\"x\">')", "no alt text"),
    ],
)
def test_what_must_not_be_committed_is_found(tmp_path: Path, source: str, fault: str) -> None:
    path = small(tmp_path, source)
    executed(path)
    assert any(fault in found for found in execute.faults(path))


STOPPED = """
import tempfile, torch
from transformers import TrainerCallback, TrainingArguments
from multimodal.training.checkpoints import ResumableTrainer

class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).square().mean()}

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step == 2

arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=9, use_cpu=True, report_to=[], save_strategy="no")
trainer = ResumableTrainer(model=Square(), args=arguments, train_dataset=[{"x": torch.ones(1)}], callbacks=[Stop()])
trainer.train()
print("steps:", trainer.state.global_step)
"""


@pytest.mark.slow
def test_training_in_a_notebook_may_be_stopped_early(tmp_path: Path) -> None:
    notebook, _ = execute.run(small(tmp_path, STOPPED))
    assert any("steps: 2" in output.get("text", "") for cell in execute.code_cells(notebook) for output in cell.outputs)


def test_an_error_is_told_with_the_notebook(tmp_path: Path) -> None:
    with pytest.raises(execute.NotebookError, match=r"00-small\.ipynb does not run.*ZeroDivisionError"):
        execute.run(small(tmp_path, "1 / 0"))


def test_a_cell_that_does_not_end_is_told_with_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "TIMEOUT", 1)
    with pytest.raises(execute.NotebookError, match=r"00-small\.ipynb does not end within 1 seconds"):
        execute.run(small(tmp_path, "import time\ntime.sleep(600)"))


def test_the_network_is_shut_even_if_the_refusal_is_swallowed(tmp_path: Path) -> None:
    source = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError:\n    pass"
    with pytest.raises(execute.NotebookError, match="reaches for the network"):
        execute.run(small(tmp_path, source))
    assert REFUSED not in os.environ


def test_limits_and_data_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MULTIMODAL_NOTEBOOKS", "quick")
    assert limit(100, 3) == 3
    monkeypatch.delenv("MULTIMODAL_NOTEBOOKS")
    assert limit(100, 3) == 100
    monkeypatch.setenv("MULTIMODAL_DATA", str(tmp_path))
    (tmp_path / "slake").mkdir()
    assert data_set("slake") is None  # empty
    (tmp_path / "slake" / "train.json").touch()
    assert data_set("slake") == tmp_path / "slake"


def test_what_is_shown_has_words_and_no_picture_of_others(tmp_path: Path) -> None:
    path = small(
        tmp_path,
        "from PIL import Image\nfrom multimodal.notebook import quiet, show, table\npicture = Image.new('RGB', (8, 8))",
        "show(picture, 'A <black> square.', width=20)",
        "import matplotlib.pyplot as plt\nshow(plt.figure(), 'Nothing.')",
        "show(picture, 'A scan.', source='SLAKE')",
        "show(plt.figure(), 'A plot of scans.', source='SLAKE')",
        "table([{'name': 'a', 'share': '12 %'}, {'name': 'b', 'share': '\u2013'}], caption='Shares')",
        "import warnings\nwith quiet():\n    print('chatter')\n    warnings.warn('chatter')",
    )
    _, square, plot, scan, plot_of_scans, shares, chatter = (
        [output.data for output in cell.outputs] for cell in execute.code_cells(executed(path))
    )
    assert 'alt="A &lt;black&gt; square." width="20"' in square[0]["text/html"]
    assert 'alt="Nothing."' in plot[0]["text/html"]
    assert len(scan) == len(plot_of_scans) == 1
    assert all(set(data) == {"text/markdown"} and "SLAKE" in data["text/markdown"] for data in (*scan, *plot_of_scans))
    assert '<td style="text-align: left">a</td><td style="text-align: right">12 %</td>' in shares[0]["text/html"]
    assert shares[0]["text/plain"] == "Shares\nname\tshare\na\t12 %\nb\t\u2013"
    assert chatter == []
    assert execute.faults(path) == []


@pytest.mark.parametrize("name", ["slake", "grocery"])
def test_without_a_data_set_the_sample_pictures_are_asked_about(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MULTIMODAL_DATA", "none")
    samples = read(task_of(name, tmp_path))
    told = capsys.readouterr().out
    assert f"Data: {len(samples)} questions" in told and "MULTIMODAL_DATA" in told
    assert all(sample.answer and sample.images[0].is_file() for sample in samples)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(SystemExit, match="no notebook is called 99-none"):
        execute.main(["99-none", "--check"])
