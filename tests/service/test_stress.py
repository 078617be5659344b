"""Strangers: damaged pictures, nonsense in the API's own form, and more clients than there is room for.

Here in a short form; ``make stress`` runs the long one. The server is a process of its own, started by the command, so
that its memory is its own, too.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image

from multimodal.images import FORMATS
from tests.service.conftest import QUESTION, asking
from tests.training.tiny import draw

PICTURES = int(os.environ.get("STRESS_PICTURES", 70))
REQUESTS = int(os.environ.get("STRESS_REQUESTS", 60))
CLIENTS = int(os.environ.get("STRESS_CLIENTS", 40))
SECONDS = float(os.environ.get("STRESS_SECONDS", 2))
LEVEL = 64 * 2**20  # bytes by which memory may differ: what the allocator keeps of a few decoded pictures
DICOM = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"


class Server:
    """A server in a process of its own."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "multimodal.cli", "serve", "--port", "0", "--no-demo", *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", self.process.stdout.readline())
        assert found is not None
        self.url = found[0]

    @property
    def memory(self) -> int:
        """Bytes that lie in memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024

    def figures(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics").text
        return {name: float(value) for name, value in re.findall(r"^([a-z].*) (\S+)$", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("stress")
    files = ["--store", f"{folder}/store.sqlite", "--log", f"{folder}/log.jsonl", "--audit", f"{folder}/audit.jsonl"]
    server = Server("--model", str(checkpoint), *files, "--waiting", "64", "--allow-host", "localhost")
    yield server
    server.process.terminate()
    server.process.wait()
    lines = [json.loads(line) for name in ("log", "audit") for line in (folder / f"{name}.jsonl").open()]
    assert lines and QUESTION not in str(lines)
    shutil.rmtree(folder)


def whole_pictures() -> list[bytes]:
    """One of each format that is read."""
    found = [DICOM.read_bytes()]
    for name in FORMATS:
        file = BytesIO()
        draw("red", 0).save(file, name)
        found.append(file.getvalue())
    for mode, name in (("P", "GIF"), ("LA", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"), ("1", "TIFF")):
        file = BytesIO()
        Image.new(mode, (30, 20)).save(file, name)
        found.append(file.getvalue())
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The same file with a few faults."""
    broken = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        place = chance.randrange(len(broken))
        # Heads decide what a decoder does: half of the faults lie there.
        place = place if chance.random() < 0.5 else place % min(len(broken), 128)
        match chance.choice(["flip", "set", "insert", "delete", "cut", "repeat", "number"]):
            case "flip":
                broken[place] ^= 1 << chance.randrange(8)
            case "set":
                broken[place] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
            case "insert":
                broken[place:place] = chance.randbytes(chance.randrange(1, 9))
            case "delete":
                del broken[place : place + chance.randrange(1, 9)]
            case "cut" if place > 0:
                del broken[place:]
            case "repeat":
                broken[place:place] = broken[place : place + 64]
            case "number":  # such as a width of four billion
                broken[place : place + 4] = chance.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4])
        if not broken:
            return b"\0"
    return bytes(broken)


def test_damaged_pictures(server: Server) -> None:
    """None of them is answered with a 5xx, takes long, or leaves anything in memory."""
    chance, originals, found = random.Random(0), whole_pictures(), Counter[int]()
    level = 0
    with httpx.Client(timeout=30) as client:  # a picture that takes longer hangs
        for number in range(PICTURES):
            data = mutated(originals[number % len(originals)], chance)
            uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            body = {"model": "fused", "messages": asking(QUESTION, uri), "max_tokens": 1}
            said = client.post(f"{server.url}/v1/chat/completions", json=body)
            assert said.status_code in (200, 400), (number, said.text)
            found[said.status_code] += 1
            if number == PICTURES // 2:
                level = server.memory
    print(
        f"pictures: {PICTURES}, by status {dict(found)}, memory {level / 2**20:.0f} -> {server.memory / 2**20:.0f} MB"
    )
    assert server.process.poll() is None and min(found.values()) > PICTURES / 20
    assert server.memory - level < LEVEL


def test_nonsense_in_the_apis_own_form(server: Server) -> None:
    """Schemathesis sends what the OpenAPI description allows, and what it forbids."""
    schemathesis: Any = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    found = Counter[int]()
    chance = random.Random(0)
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @settings(
                # The address that takes a body is where there is something to vary.
                max_examples=REQUESTS // 2 if operation.method == "post" else REQUESTS // 50,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body and chance.random() < 0.7:
                    case.body["model"] = "fused"  # beyond the first refusal
                    case.body["max_tokens"] = 2
                    if chance.random() < 0.5:
                        case.body["messages"] = asking(QUESTION)  # to the answer
                said = case.call(timeout=30)
                found[said.status_code] += 1
                assert said.status_code < 500, said.text

            with suppress(Unsatisfiable):  # nothing can be wrong with what has no parameter
                send()
    print(f"schemathesis: {found.total()} requests to {len(operations)} addresses, by status {dict(found)}")
    assert server.process.poll() is None and httpx.get(f"{server.url}/ready").status_code == 200


def test_more_clients_than_there_is_room_for(server: Server) -> None:
    """Each request is answered or refused in order; none is lost."""
    found = Counter[int]()
    sent = 0

    async def client(number: int, http: httpx.AsyncClient, until: float) -> None:
        nonlocal sent
        chance = random.Random(number)
        while asyncio.get_running_loop().time() < until:
            stream = chance.random() < 0.5
            body = {
                "model": "fused",
                "messages": asking(QUESTION, *([draw("red", number % 5)] if chance.random() < 0.5 else [])),
                "max_tokens": chance.randrange(1, 20),
                "stream": stream,
            }
            sent += 1
            said = await http.post(f"{server.url}/v1/chat/completions", json=body)
            found[said.status_code] += 1
            if said.status_code == 200:
                assert said.text.endswith("data: [DONE]\n\n") if stream else said.json()["choices"]
            else:
                assert said.status_code in (429, 503), said.text
                assert int(said.headers["Retry-After"]) >= 1
                await asyncio.sleep(0.2)

    async def load() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            until = asyncio.get_running_loop().time() + SECONDS
            await asyncio.gather(*(client(number, http, until) for number in range(CLIENTS)))

    before = server.figures()
    asyncio.run(load())
    after = server.figures()
    print(f"load: {CLIENTS} clients, {SECONDS:g} seconds, {sent} requests, by status {dict(found)}")
    counted = {
        status: after.get(name := f'multimodal_requests_total{{endpoint="/v1/chat/completions",status="{status}"}}', 0)
        - before.get(name, 0)
        for status in found
    }
    assert found.total() == sent and counted == found and found[200] > 0
    assert after["multimodal_queue_waiting"] == after["multimodal_queue_running"] == 0
    assert server.process.poll() is None
