"""The page on the engine: its Python runs, its files are there, and its commands are known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multimodal.presets import trained_folder

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


@pytest.mark.skipif(trained_folder("embedded") is None, reason="no trained weights in assets/embedded")
def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), "engine.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 3 and all(said)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:tests|docs|benchmarks)/[\w/]+\.\w+)`", PAGE))))
def test_files_are_there(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", PAGE))))
def test_benchmarks_are_there(module: str) -> None:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
