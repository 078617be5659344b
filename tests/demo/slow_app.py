"""The demo as it is, but its model takes so many seconds over each token and prints a line for it.

With a model of one's own in a folder, its comparisons read the same off every picture.

``python -m tests.demo.slow_app 0.1 --model FOLDER --port PORT``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import demo.app
import demo.comparing
from multimodal.model import MultiModalModel
from tests.demo.tiny import parts_of_tiny

SECONDS = float(sys.argv[1])
load = demo.app._load


def load_slow(name: str, adapters: Mapping[str, Path]) -> MultiModalModel:
    model = load(name, adapters)
    runner: Any = model.engine.runner
    for step in ("read", "step"):  # each gives a token
        setattr(runner, step, partial(pause, getattr(runner, step)))
    return model


def pause(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    print("token", flush=True)
    time.sleep(SECONDS)
    return run(*args, **options)


if __name__ == "__main__":
    demo.app._load = load_slow
    if "embedded" not in sys.argv:
        demo.comparing.parts_of = parts_of_tiny
    sys.exit(demo.app.main(sys.argv[2:]))
