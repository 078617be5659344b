"""The page on serving: its Python runs, its commands are known, its limits and metrics are those of the code."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from multimodal import cli, cli_service
from multimodal.model import MultiModalModel
from multimodal.service import ServiceSettings, serving
from multimodal.store import open_database
from tests.service.conftest import NAME

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^multimodal (.*)$", PAGE, flags=re.MULTILINE)


def test_its_python_runs(model: MultiModalModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    with serving(model, name=NAME, database=open_database(tmp_path / "store.sqlite")) as url:
        exec(compile(code.replace("http://127.0.0.1:8000/v1", url), "serving.md", "exec"), {})
        (session,) = httpx.get(f"{url}/sessions").json()["data"]
    assert session["id"] == "patient-17" and session["messages"] == 4
    assert len(capsys.readouterr().out) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_known(command: str) -> None:
    options = cli._parser().parse_args(shlex.split(command))
    assert options.run.__module__ == cli_service.__name__


def test_limits_are_those_of_the_code() -> None:
    named = set(re.findall(r"^\| `(\w+)`", PAGE, flags=re.MULTILINE))
    rest = {"allowed_hosts", "cached_answers", "keep_days", "kept_picture_bytes"}
    assert named == {field.name for field in fields(ServiceSettings)} - rest
    settings = ServiceSettings()
    for number in (settings.pixels // 10**6, settings.characters, settings.answer_tokens, settings.waiting):
        assert f"{number:,}" in PAGE
    assert settings.body_bytes == 32 * 2**20 and settings.held_bytes == 2**30 and settings.keep_days == 30


def test_addresses_and_metrics_are_those_of_the_code(url: str) -> None:
    place = url.removesuffix("/v1")
    known = httpx.get(f"{place}/openapi.json").json()["paths"]
    named = set(re.findall(r"^\| `(?:GET|POST) (\S+)`", PAGE, flags=re.MULTILINE))
    assert set(known) - {"/v1/models/{called}"} == named - {"/", "/docs", "/v1/sessions"}
    metrics = httpx.get(f"{place}/metrics").text
    for name in set(re.findall(r"`(multimodal_\w+)`", PAGE)):
        assert f"# TYPE {name.removesuffix('_total')}" in metrics or f"# TYPE {name} " in metrics


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", PAGE))))
def test_benchmarks_are_there(module: str) -> None:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", PAGE, flags=re.MULTILINE)) <= targets
