"""The service on Ray Serve says what one process says, and loses no request when a replica dies.

The tests of the chat are those of the single process: only the endpoint is another one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from multimodal.model import MultiModalModel
from tests.cluster.conftest import NAME
from tests.service.conftest import QUESTION, asking, client_of
from tests.service.test_chat import (  # noqa: F401
    TestAnswer,
    TestOptions,
    TestStream,
    test_a_picture_may_be_in_any_case_of_letters,
    test_many_at_once_answer_as_alone,
)
from tests.training.tiny import draw

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
LONG = 180  # tokens of an answer that takes a while

# Kills a replica when told to. Its process is Ray's, so that Ray is asked.
KILLER = """
import os, ray
ray.init(os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
named = ray.util.list_named_actors(all_namespaces=True)
replicas = [ray.get_actor(**actor) for actor in named if "multimodal#Replica" in actor["name"]]
print(len(replicas), flush=True)
input()
ray.kill(replicas[0])
print("killed", flush=True)
"""


@contextmanager
def serving(folder: Path, replicas: int) -> Iterator[str]:
    command = [sys.executable, "-m", "multimodal.cli", "serve", "--ray", "--replicas", str(replicas), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", str(folder), "--precision", "float32", "--num-cpus", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"{NAME} answers at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C ends it\)\n", line)
        assert found, line
        yield found[1]
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0


@pytest.fixture(scope="module", params=[1, 2], ids=["1 replica", "2 replicas"])
def url(request: pytest.FixtureRequest, endless: Path) -> Iterator[str]:
    with serving(endless, request.param) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as client:
        yield client


@pytest.fixture
def model(endless_model: MultiModalModel, request: pytest.FixtureRequest) -> MultiModalModel:
    if "its_own_end" in request.node.name:
        pytest.skip("it changes the model that answers, which is in another process here")
    return endless_model


def test_models_and_health(client: OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    said = httpx.get(url.removesuffix("/v1") + "/health")
    assert said.status_code == 200 and said.json()["status"] == "ok"


def test_errors_are_the_applications(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'nonsense'"):
        client.chat.completions.create(model="nonsense", messages=asking(QUESTION))
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model=NAME, messages=asking(QUESTION), top_p=2)


def test_who_leaves_frees_the_replica(client: OpenAI) -> None:
    """More leave than the replicas take at a time: if their answers went on, these would stand in the way."""
    for _ in range(40):
        stream: Any = client.chat.completions.create(
            model=NAME, messages=asking(QUESTION), stream=True, max_tokens=LONG
        )
        next(iter(stream))
        stream.close()
    said = client.chat.completions.create(model=NAME, messages=asking(QUESTION), max_tokens=3)
    assert said.usage is not None and said.usage.completion_tokens == 3


def test_no_request_is_lost_when_a_replica_dies(url: str, client: OpenAI, endless_model: MultiModalModel) -> None:
    """Half of them are streams, which may end with an error that says what happened; the others all get an answer."""
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    pictures = [draw("red", seed) for seed in range(50)]
    expected = [endless_model(QUESTION, picture, max_new_tokens=LONG).text for picture in pictures]
    broken: list[str] = []

    def ask(number: int) -> str:
        options: Any = {"model": NAME, "messages": asking(QUESTION, pictures[number]), "max_tokens": LONG}
        if number % 2:
            return client.with_options(timeout=300).chat.completions.create(**options).choices[0].message.content or ""
        try:
            stream: Any = client.with_options(timeout=300).chat.completions.create(**options, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        except openai.APIError as error:
            broken.append(error.message)
            return expected[number]

    try:
        assert killer.stdout is not None and killer.stdin is not None
        assert int(killer.stdout.readline()) >= 1
        with ThreadPoolExecutor(50) as pool:
            asked = [pool.submit(ask, number) for number in range(50)]
            asked[1].result()  # the replicas are at work
            killer.stdin.write("\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "killed\n"
            assert [future.result() for future in asked] == expected
        assert all("the replica that answered is gone: ask again" in message for message in broken)
    finally:
        killer.kill()
        killer.communicate()
