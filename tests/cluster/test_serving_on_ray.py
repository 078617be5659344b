"""The service on Ray Serve says what one process says, and loses no request when a replica dies.

The tests of the chat are those of the single process: only the endpoint is another one.
"""

from __future__ import annotations

import json
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
from PIL import Image

from multimodal.model import MultiModalModel
from tests.cluster.conftest import LONGEST, NAME
from tests.service.conftest import QUESTION, asking, client_of, wait_for
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
SERVE = [sys.executable, "-m", "multimodal.cli", "serve", "--ray"]
LONG = 400  # tokens of an answer that takes a while

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


def command(folder: Path, replicas: int, *options: str) -> list[str]:
    """The command that serves a model, whatever its folder is called, under the same name."""
    given = ["--model", str(folder), "--name", NAME, "--precision", "float32", "--num-cpus", "0.5"]
    return [*SERVE, "--replicas", str(replicas), *given, *options]


@contextmanager
def serving(folder: Path, replicas: int, *options: str) -> Iterator[str]:
    process = subprocess.Popen(
        command(folder, replicas, "--port", "0", *options),
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


def figures(url: str, picture: Image.Image) -> dict[str, float]:
    """``/metrics`` of the replica that a picture belongs to: what is asked about it goes there, whatever it is."""
    body = json.dumps({"messages": asking(QUESTION, picture)})
    page = httpx.request("GET", url.removesuffix("/v1") + "/metrics", content=body).text
    rows = (line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def test_who_leaves_frees_the_replica(client: OpenAI, url: str) -> None:
    """Nobody writes to the end what nobody reads: the replica counts the tokens that it wrote."""
    running, written = "multimodal_queue_running", 'multimodal_tokens_total{kind="completion"}'
    callers, picture = 4, draw("red", 0)
    before = figures(url, picture).get(written, 0.0)
    for _ in range(callers):
        stream: Any = client.chat.completions.create(
            model=NAME, messages=asking(QUESTION, picture), stream=True, max_tokens=LONGEST
        )
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert figures(url, picture)[running] >= 1
        stream.close()
    wait_for(lambda: figures(url, picture)[running] == 0)
    assert callers <= figures(url, picture)[written] - before < callers * LONGEST / 2


def test_no_request_is_lost_when_a_replica_dies(url: str, client: OpenAI, endless_model: MultiModalModel) -> None:
    """Half of them are streams; one that had begun may end with an event that says why, all others are answered."""
    from multimodal.cluster.serving import SLOTS

    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    pictures = [draw("red", seed) for seed in range(50)]
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda picture: endless_model(QUESTION, picture, max_new_tokens=LONG).text, pictures)
    expected = list(texts)
    sent: list[int] = []
    begun: list[int] = []
    broken: list[int] = []

    def ask(number: int) -> str:
        options: Any = {"model": NAME, "messages": asking(QUESTION, pictures[number]), "max_tokens": LONG}
        patient = client.with_options(timeout=300)
        sent.append(number)
        if number % 2:
            return patient.chat.completions.create(**options).choices[0].message.content or ""
        stream: Any = patient.chat.completions.create(**options, stream=True)
        text = ""
        try:
            for chunk in stream:
                if not text:
                    begun.append(number)
                text += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            assert (error.code, error.message) == ("replica_lost", "the replica that answered is gone: ask again")
            assert number in begun and expected[number].startswith(text.strip())
            broken.append(number)
            return expected[number]
        return text

    try:
        assert killer.stdout is not None and killer.stdin is not None
        replicas = int(killer.stdout.readline())
        assert replicas >= 1
        enough = max(4, SLOTS * (replicas - 1) + 1)  # then each replica has begun one, whichever is killed
        with ThreadPoolExecutor(50) as pool:
            asked = {
                number: pool.submit(ask, number) for number in [*range(0, 50, 2), *range(1, 50, 2)]
            }  # streams first
            wait_for(lambda: len(sent) == 50 and len(set(begun)) >= enough)
            assert not any(future.done() for future in asked.values())  # all 50 are in flight
            killer.stdin.write("\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "killed\n"
            assert [asked[number].result() for number in range(50)] == expected
        assert broken
    finally:
        killer.kill()
        killer.communicate()
