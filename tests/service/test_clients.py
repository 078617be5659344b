"""Other people's clients talk to the service unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from tests.service.conftest import NAME, QUESTION, asking
from tests.service.test_chat import ask
from tests.training.tiny import draw


def test_litellm(url: str, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks another host when it is imported
    litellm = pytest.importorskip("litellm")
    expected = ask(client, asking(QUESTION, draw("red", 0))).choices[0].message.content
    options = {
        "model": f"openai/{NAME}",
        "api_base": url,
        "api_key": "none",
        "messages": asking(QUESTION, draw("red", 0)),
        "max_tokens": 12,
    }
    assert litellm.completion(**options).choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True)]
    assert "".join(pieces) == expected and len(pieces) > 2


@pytest.mark.parametrize("stream", [True, False])
def test_llm(url: str, client: OpenAI, tmp_path: Path, stream: bool) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: {NAME}\n  model_name: {NAME}\n  api_base: {url}\n  vision: true\n"
    )
    draw("red", 0).save(tmp_path / "red.png")
    messages = asking(QUESTION, draw("red", 0))
    messages[0]["content"].reverse()  # it shows the picture behind the text
    expected = ask(client, messages).choices[0].message.content
    command = [sys.executable, "-m", "llm", "-m", NAME, "-a", "red.png", "-o", "max_tokens", "12", "--key", "none"]
    said = subprocess.run(
        [*command, *([] if stream else ["--no-stream"]), QUESTION],
        cwd=tmp_path,
        env={**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""},
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == expected
