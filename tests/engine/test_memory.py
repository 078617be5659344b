"""Giving memory back changes nothing that can be read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from multimodal.engine.memory import give_back


def test_tensors_are_as_they_were(tmp_path: Path) -> None:
    values = torch.arange(300_000, dtype=torch.float32)
    save_file({"values": values}, tmp_path / "values.safetensors")
    mapped = load_file(tmp_path / "values.safetensors")["values"]
    own, part = values.clone(), values.clone()[1001:]
    give_back([mapped, own, part, values[::2], torch.empty(0)])
    assert torch.equal(mapped, values) and torch.equal(own, values) and torch.equal(part, values[1001:])
