"""The file for `serve deploy`, deployed on a real cluster: its router and Ray's proxy stand before the replicas."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from multimodal.model import MultiModalModel
from tests.cluster.conftest import NAME
from tests.service.conftest import QUESTION, asking, client_of
from tests.training.tiny import draw

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
    "RAY_USAGE_STATS_ENABLED": "0",
}
PATIENCE = 120  # seconds for Ray to start, and for a replica


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a cluster of this machine alone, and the one that files are deployed at."""
    port, dashboard = free_port(), free_port()
    options = ["--head", "--block", "--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "2"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--object-store-memory", "100000000"]
    with (tmp_path / "ray.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        try:
            yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        finally:
            process.terminate()  # it ends all that it has started
            process.wait(timeout=60)


def patiently(what: Any) -> Any:
    """What something returns, once it returns something."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if said := what():
            return said
        time.sleep(1)
    raise AssertionError(f"not within {PATIENCE} seconds")


def test_the_file_is_deployed_and_updated(
    cluster: tuple[str, str], endless: Path, endless_model: MultiModalModel, tmp_path: Path
) -> None:
    address, dashboard = cluster
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    changes = {"model": str(endless), "name": NAME, "precision": "float32", "replicas": 1, "num_cpus": 0.5}
    config["applications"][0]["args"].update(changes)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    deploy = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "--address", dashboard]
    patiently(lambda: subprocess.run(deploy, capture_output=True, env=ENVIRONMENT).returncode == 0)
    url = f"http://127.0.0.1:{port}/v1"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/models", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    patiently(ready)
    picture = draw("red", 1)
    expected = endless_model(QUESTION, picture, max_new_tokens=30).text

    def ask() -> None:
        with client_of(url).with_options(timeout=60) as client:
            options: Any = {"model": NAME, "messages": asking(QUESTION, picture), "max_tokens": 30}
            assert client.chat.completions.create(**options).choices[0].message.content == expected
            chunks = client.chat.completions.create(**options, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected

    ask()
    told = ["--model", str(endless), "--name", NAME, "--precision", "float32", "--num-cpus", "0.5"]
    update = [sys.executable, "-m", "multimodal.cli", "serve", "--ray", "--update", *told]
    environment = {**ENVIRONMENT, "RAY_ADDRESS": address}
    ran = subprocess.run(update, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert (ran.returncode, ran.stdout) == (0, f"{NAME} is updated on all replicas\n"), ran.stderr
    ask()  # the address stays, and with it router and proxy
