"""New weights are rolled out on Ray Serve while it answers.

In a file of its own: a command that updates takes the one cluster of this machine, so that there has to be one alone.
"""

from __future__ import annotations

import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from multimodal.adapters import digest_of
from multimodal.model import MultiModalModel
from tests.cluster.conftest import NAME, save_endless
from tests.cluster.test_serving_on_ray import ENVIRONMENT, ROOT, command, serving
from tests.service.conftest import QUESTION, asking, client_of
from tests.training.tiny import draw

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("replicas", [1, 2])
def test_new_weights_are_rolled_out_under_load(
    endless: Path, endless_model: MultiModalModel, tmp_path: Path, replicas: int
) -> None:
    """Every request is answered, by the old weights or by the new ones; after the command by the new ones alone."""
    newer = save_endless(tmp_path, seed=2)
    new_model = MultiModalModel.from_pretrained(newer, precision="float32")
    pictures = [draw("red", seed) for seed in range(8)]
    old, new = (f"fp_{digest_of(model.model)[:12]}" for model in (endless_model, new_model))
    expected = {
        fingerprint: [model(QUESTION, picture, max_new_tokens=50).text for picture in pictures]
        for fingerprint, model in ((old, endless_model), (new, new_model))
    }
    over = threading.Event()

    def load(number: int, url: str) -> list[tuple[float, str]]:
        """When requests began, and the fingerprint of the weights that answered."""
        said: list[tuple[float, str]] = []
        with client_of(url).with_options(timeout=300) as client:
            while not over.is_set():
                began = time.monotonic()
                options: Any = {"model": NAME, "messages": asking(QUESTION, pictures[number]), "max_tokens": 50}
                if len(said) % 2:
                    chunks: list[Any] = list(client.chat.completions.create(**options, stream=True))
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                    fingerprint = chunks[0].system_fingerprint
                else:
                    whole: Any = client.chat.completions.create(**options)
                    text, fingerprint = whole.choices[0].message.content, whole.system_fingerprint
                assert text == expected[fingerprint][number]
                said.append((began, fingerprint))
        return said

    with serving(endless, replicas) as url, ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load, number, url) for number in range(8)]
        try:
            update = command(newer, replicas, "--update")
            ran = subprocess.run(update, capture_output=True, text=True, timeout=300, cwd=ROOT, env=ENVIRONMENT)
            updated = time.monotonic()
            assert (ran.returncode, ran.stdout) == (0, f"{NAME} is updated on all replicas\n"), ran.stderr
            time.sleep(2)
        finally:
            over.set()
        said = [request for future in loads for request in future.result()]
    assert {fingerprint for began, fingerprint in said if began < updated} >= {old}
    assert {fingerprint for began, fingerprint in said if began > updated} == {new}
