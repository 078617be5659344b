"""A tiny model on disk, and pictures in every form that a batch reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from multimodal import MultiModalModel
from tests.training.tiny import COLOURS, draw, save_checkpoint

PROMPT = "What colour is this?"
QUESTION = "Is it red?"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("cluster"))


NAME = "tiny"  # what callers call the endless model
LONGEST = 2000  # tokens that it can say: it takes seconds


def save_endless(folder: Path, *, seed: int = 1) -> Path:
    """Random weights, open gates; it says nonsense and never ends by itself."""
    fused = save_checkpoint(folder, seed=seed)
    path = fused / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    path = fused / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = LONGEST + 100
    path.write_text(json.dumps(config))
    return fused


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    return save_endless(folder).rename(folder / NAME)


@pytest.fixture(scope="session")
def endless_model(endless: Path) -> MultiModalModel:
    return MultiModalModel.from_pretrained(endless, precision="float32")


def write_pictures(folder: Path, count: int) -> list[str]:
    """Pictures of four colours, in folders in the folder; returns their names, in order."""
    names = [f"{number // 4}/{number:03}.png" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(list(COLOURS)[number % len(COLOURS)], seed=number).save(folder / name)
    return names


def write_parquet(path: Path, pictures: Path, names: list[str]) -> None:
    """As Hugging Face's data sets have them: bytes for one half, paths for the other; every second has a question."""
    rows = [
        {
            "image": {"bytes": (pictures / name).read_bytes() if number % 2 else None, "path": str(pictures / name)},
            "question": QUESTION if number % 2 else None,
        }
        for number, name in enumerate(names)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


def write_jsonl(path: Path, pictures: Path, names: list[str]) -> None:
    lines = [json.dumps({"image": str(pictures / name), "question": QUESTION}) for name in names]
    path.write_text("\n".join(lines) + "\n")


def write_tar(path: Path, pictures: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            key = f"{number:03}"
            add(archive, f"{key}.png", (pictures / name).read_bytes())
            add(archive, f"{key}.json", json.dumps({"question": QUESTION}).encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
