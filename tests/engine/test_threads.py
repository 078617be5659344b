"""No other thread keeps OpenMP's threads from the engine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from multimodal.engine.threads import _openmp
from tests.training.tiny import save_checkpoint

# The threads of this process after each of the steps, as the system counts them.
STEPS = """
import os, time, torch
from PIL import Image
from tqdm import tqdm
from multimodal.model import MultiModalModel

def computed():
    torch.ones(2000, 2000).exp()  # by a team
    return count()

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
tqdm.monitor_interval = 0  # bars have a thread, too
alone = count()
print(computed() - alone)
model = MultiModalModel.from_pretrained({folder!r})
print(count() - alone)
computed()
model.engine.prepare()
print(count() - alone)
model.engine.linger = 0
model("What is it?", Image.new("RGB", (32, 32)), max_new_tokens=2, trace=True)
while model.engine._thread is not None:
    time.sleep(0.01)
time.sleep(0.2)  # of the engine's own, none is left
print(count() - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir() or _openmp() is None, reason="needs Linux and GNU's OpenMP")
def test_who_loads_a_model_or_traces_leaves_the_cores_to_the_engine(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", STEPS.format(folder=str(save_checkpoint(tmp_path)))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=True,
    )
    assert ran.stdout.split() == ["1", "0", "0", "0"]
