"""What a pipeline takes of memory, alone in a process of its own: ``python -m multimodal.compare.memory < request``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from multimodal.pipelines import Parts, PipelineSettings, Question, make_pipelines
from multimodal.pipelines.endpoint import Price

TIMEOUT = 300  # seconds


def peak_memory(pipeline: str, made_of: PipelineSettings, question: str, images: Sequence[str]) -> int | None:
    """Bytes that a process takes at most to load a pipeline and answer a question with it; None where it cannot.

    Args:
        pipeline: As :func:`~multimodal.pipelines.make_pipelines` takes it.
        made_of: What it is made of.
        question: What is asked.
        images: The pictures' files.
    """
    # Nothing that was read before is taken over: reading is a part of what the pipeline takes.
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(made_of).items()}
    settings |= {"readings": None, "tuned": {name: str(folder) for name, folder in made_of.tuned.items()}}
    request = {"pipeline": pipeline, "settings": settings, "question": question, "images": list(images)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT
        )
        return int(done.stdout.split()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def _settings(said: dict[str, object]) -> PipelineSettings:
    paths = {key: Path(str(said[key])) for key in ("adapter", "prompt") if said[key] is not None}
    tuned = {name: Path(folder) for name, folder in said["tuned"].items()}  # type: ignore[attr-defined]
    prices = {name: Price(**price) for name, price in said["prices"].items()}  # type: ignore[attr-defined]
    return PipelineSettings(**{**said, **paths, "tuned": tuned, "prices": prices})  # type: ignore[arg-type]


def _main() -> None:
    request = json.load(sys.stdin)
    with Parts(_settings(request["settings"])) as parts:
        (pipeline,) = make_pipelines([request["pipeline"]], parts)
        pipeline.answer(Question(request["question"], tuple(request["images"])))
    status = Path("/proc/self/status")
    if status.exists():
        print(next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak if sys.platform == "darwin" else 1024 * peak)


if __name__ == "__main__":
    _main()
