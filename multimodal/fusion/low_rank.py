"""Low-rank additions to linear layers: how they lie on disk, and how they are added to the weights for good.

``W + B A``, of rank ``r``, in the place of the weight ``W`` of some linear layers (Hu et al., "LoRA", 2021, section
4.1). The files are PEFT's own (``adapter_config.json``, ``adapter_model.safetensors``), so PEFT loads them too, but
nothing here needs PEFT. A trained decoder's addition lies in the folder ``decoder_adapter`` of a checkpoint, which so
stays small, and is added when the checkpoint is loaded: such a decoder costs nothing more at run time.

Axes: r rank, D_in and D_out widths of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

DECODER_ADAPTER = "decoder_adapter"  # folder, in that of a checkpoint
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of modules
A, B = ".lora_A.weight", ".lora_B.weight"
# What changes the meaning of the two matrices, or adds others.
OTHER_KINDS = (
    "use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save"
)  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """Additions to the weights of linear layers.

    Attributes:
        pairs: For each layer's name ``A`` ``(r, D_in)`` and ``B`` ``(D_out, r)``; the rank is the same in all of them.
        scale: What ``B A`` is multiplied by.
    """

    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @property
    def rank(self) -> int:
        """``r``."""
        return len(next(iter(self.pairs.values()))[0])

    def delta(self, name: str) -> torch.Tensor:
        """What is added to a layer's weight: ``(D_out, D_in)``, float32."""
        a, b = self.pairs[name]
        return self.scale * (b.float() @ a.float())

    def and_then(self, later: LowRank) -> LowRank:
        """The sum of this and another one on the same layers, as one of the sum of their ranks."""
        pairs = {}
        for name, (a, b) in self.pairs.items():
            later_a, later_b = later.pairs[name]
            b, later_b = self.scale * b.float(), later.scale * later_b.float()
            pairs[name] = torch.cat([a.float(), later_a.float()]), torch.cat([b, later_b], dim=1)
        return LowRank(pairs, 1.0)

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, **config: Any) -> None:
        """Write PEFT's two files.

        Args:
            folder: Made if needed.
            dtype: Of the weights; None leaves them as they are.
            **config: Further entries of ``adapter_config.json``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (a, b) in self.pairs.items():
            tensors[PREFIX + name + A] = a.detach().to("cpu", dtype).contiguous()
            tensors[PREFIX + name + B] = b.detach().to("cpu", dtype).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.scale * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.pairs),
            **config,
        }
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_low_rank(folder: Any, **hub: Any) -> LowRank | None:
    """Read PEFT's two files; None if there are none.

    Args:
        folder: Folder or hub id.
        **hub: ``revision``, ``cache_dir``, ``token``, ``subfolder``, as in transformers.

    Raises:
        ValueError: If they are broken, or hold anything but LoRA of one rank on linear layers.
    """
    hub["_raise_exceptions_for_missing_entries"] = False
    files = [cached_file(folder, name, **hub) for name in (CONFIG, WEIGHTS)]
    if None in files:
        return None
    where = Path(files[0]).parent
    try:
        config, tensors = json.loads(Path(files[0]).read_text(encoding="utf-8")), load_file(files[1])
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter in {where} cannot be read ({error}): copy it again") from None
    return low_rank_of(config, tensors, where)


def remove_low_rank(folder: Path) -> None:
    """Delete what :meth:`LowRank.save` wrote, if it is there."""
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def low_rank_of(config: Any, tensors: Mapping[str, torch.Tensor], where: Path) -> LowRank:
    """Make sense of the content of PEFT's two files.

    Raises:
        ValueError: If it is anything but LoRA of one rank on linear layers.
    """
    problem = _problem(config, tensors)
    if problem is not None:
        raise ValueError(f"the adapter in {where} is none that can be used here ({problem}): only plain LoRA can")
    pairs = {name: (tensors[PREFIX + name + A], tensors[PREFIX + name + B]) for name in _layers(tensors)}
    return LowRank(pairs, config["lora_alpha"] / config["r"])


def _layers(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted({name.removeprefix(PREFIX).removesuffix(A).removesuffix(B) for name in tensors})


def _problem(config: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return f"{config.get('peft_type') if isinstance(config, dict) else type(config).__name__} instead of LORA"
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            return f"{key} is {value!r}"
    if used := [key for key in OTHER_KINDS if config.get(key)]:
        return f"it uses {', '.join(used)}"
    names = _layers(tensors)
    if not names or set(tensors) != {PREFIX + name + end for name in names for end in (A, B)}:
        return "not one pair of matrices for each layer"
    shapes = [(tensors[PREFIX + name + A].shape, tensors[PREFIX + name + B].shape) for name in names]
    if any(len(a) != 2 or len(b) != 2 or a[0] != config["r"] or b[1] != config["r"] for a, b in shapes):
        return f"rank {config['r']} in its configuration, another one in its weights"
    return None


def fold(state_dict: dict[str, torch.Tensor], low_rank: LowRank) -> None:
    """Add to the weights of a state dict, in float32, in place.

    Raises:
        ValueError: If a layer is not there, or has another size.
    """
    for name in low_rank.pairs:
        weight, delta = state_dict.get(f"{name}.weight"), low_rank.delta(name)
        if weight is None or weight.shape != delta.shape:
            found = "no such layer" if weight is None else f"one of {tuple(weight.shape)}"
            raise ValueError(f"this adapter adds {tuple(delta.shape)} to {name}, and the model has {found}")
        state_dict[f"{name}.weight"] = weight.float() + delta.to(weight.device)
