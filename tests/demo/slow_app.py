"""The demo as it is, but its model takes so many seconds over each token and prints a line for it.

``python -m tests.demo.slow_app 0.1 --model FOLDER --port PORT``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo.app
from multimodal.model import MultiModalModel

SECONDS = float(sys.argv[1])
load = demo.app._load


def load_slow(name: str, adapters: Mapping[str, Path]) -> MultiModalModel:
    model = load(name, adapters)
    model.model.lm_head.register_forward_hook(pause)
    return model


def pause(*_: Any) -> None:
    print("token", flush=True)
    time.sleep(SECONDS)


if __name__ == "__main__":
    demo.app._load = load_slow
    sys.exit(demo.app.main(sys.argv[2:]))
