"""The demo at ``/`` of the service: the API beside it, and who is let in."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import Engine

import demo
from multimodal.model import MultiModalModel
from multimodal.service import ServiceSettings, serving
from multimodal.store import open_database
from multimodal.store.keys import KeyStore

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")
ROOT = Path(demo.__file__).parent.parent
ASKED = [{"role": "user", "content": "What is this?"}]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> MultiModalModel:
    return MultiModalModel.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_database(tmp_path_factory.mktemp("keys") / "store.sqlite")


@pytest.fixture(scope="module")
def place(model: MultiModalModel, database: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service with the demo, at first without a key."""
    from demo.mounted import mounted

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.setenv("GRADIO_TEMP_DIR", "")  # set back after the demo has set it
        settings = ServiceSettings(grace_seconds=0)
        with (
            mounted(model, name="tiny", anywhere=False) as front,
            serving(model, name="tiny", settings=settings, database=database, front=front) as url,
        ):
            yield url.removesuffix("/v1")


def test_the_page_is_there_with_a_policy_of_its_own(place: str) -> None:
    page = httpx.get(place)
    assert page.status_code == 200 and "gradio" in page.text and "Ask about pictures" in page.text
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'") and "frame-ancestors 'none'" in policy and "http" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff" and len(page.headers["X-Request-Id"]) == 32
    assert httpx.get(f"{place}/config").json()["title"] == "Ask about pictures"


def test_the_api_comes_first(place: str) -> None:
    for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 200), ("/docs", 200), ("/v1/models", 200)):
        said = httpx.get(place + path)
        assert said.status_code == status and said.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "/v1/chat/completions" in httpx.get(f"{place}/openapi.json").json()["paths"]
    assert "multimodal" in httpx.get(f"{place}/docs").text
    for path, status in (("/v1", 404), ("/v1/nothing", 404), ("/v1/chat/completions", 405)):
        said = httpx.get(place + path)
        assert said.status_code == status and "POST /v1/chat/completions" in said.json()["error"]["message"]
    with openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=4).choices[0].message.content


@pytest.mark.parametrize("header", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_without_keys_it_is_for_this_machine_alone(place: str, header: dict[str, str]) -> None:
    said = httpx.get(place, headers=header)
    assert said.status_code == 403 and said.json()["error"]["code"] == "not_local"


def test_behind_keys_it_asks_for_one(place: str, database: Engine) -> None:
    keys = KeyStore(database)
    secret, made = keys.create("Ann", scopes=["demo"])
    other, _ = keys.create("a program")
    for path in ("/", "/config", "/gradio_api/info", "/nothing"):
        for login in (None, ("Ann", "wrong"), ("Ann", other)):
            said = httpx.get(place + path, auth=login)
            assert said.status_code == 401 and said.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert httpx.get(place + path, headers={"Authorization": f"Bearer {secret}"}).status_code == 401
        assert httpx.get(place + path, headers={"Authorization": "Basic ?"}).status_code == 401
    assert "Ask about pictures" in httpx.get(place, auth=("anybody", secret)).text
    assert httpx.get(f"{place}/v1/models", auth=("Ann", other)).status_code == 401, "programs send no password"
    assert httpx.get(f"{place}/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 403
    assert httpx.get(f"{place}/health").status_code == 200

    join = {"url": f"{place}/gradio_api/queue/join", "auth": ("Ann", secret), "json": {}}
    foreign = httpx.post(**join, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "other_origin"
    assert httpx.post(**join, headers={"Origin": place}).status_code == 422, "Gradio's own answer"

    keys.revoke(made.id)
    assert httpx.get(place, auth=("Ann", secret)).status_code == 401


@pytest.mark.slow
def test_the_command_serves_it_and_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "multimodal.cli", "serve", "--model", str(tiny_folder), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,  # the demo is found from anywhere
        env={**os.environ, "TMPDIR": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        found = re.fullmatch(r"the demo is at (http://127\.0\.0\.1:\d+/)\n", lines[1])
        assert found and f"answers at {found[1]}v1" in lines[0]
        assert "Ask about pictures" in httpx.get(found[1]).text
        with httpx.stream("GET", f"{found[1]}gradio_api/heartbeat/somebody", timeout=60) as looking:
            next(looking.iter_lines())
            process.send_signal(signal.SIGTERM)  # while somebody looks at the page
            rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, *rest) == (0, "", "")
    assert not list(tmp_path.glob("multimodal-demo-*"))
