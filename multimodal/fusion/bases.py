"""The pretrained parts of a fused model: a name goes in, a model or its tensors come out.

A name is a folder or a hub id. Other names belong to locators: functions of installed packages (entry points of the
group ``multimodal.locators``, such as that of ``multimodal.weights``) or registered ones. Only safetensors files are
read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from multimodal.fusion.vision import VisionConfig, VisionEncoder

TORCHVISION_PREFIX = "torchvision/"

ENTRY_POINTS = "multimodal.locators"

Locator = Callable[[str], Path | None]


@cache
def _locators() -> list[Locator]:
    return [point.load() for point in entry_points(group=ENTRY_POINTS)]


def register_locator(locator: Locator) -> None:
    """Ask ``locator`` for a part's folder before the hub is asked; it returns None for names it does not know."""
    if locator not in _locators():
        _locators().append(locator)


def locate_base(name: str) -> str:
    """The folder that a locator gives for ``name``, or the name itself: a folder or hub id."""
    for locator in _locators():
        folder = locator(name)
        if folder is not None:
            return str(folder)
    return name


def load_decoder(name: str) -> PreTrainedModel:
    """Load a causal language model by folder, hub id or known name.

    Raises:
        ValueError: If it is not built like Llama: ``model.layers``, ``model.embed_tokens`` and ``lm_head``.
    """
    decoder = AutoModelForCausalLM.from_pretrained(locate_base(name))
    if not hasattr(getattr(decoder, "model", None), "layers") or not hasattr(decoder, "lm_head"):
        raise ValueError(f"{name!r} is a {type(decoder).__name__}; a decoder that is built like Llama is needed")
    return decoder


def load_encoder(name: str) -> VisionEncoder:
    """Load an image encoder by folder, hub id, known name or ``"torchvision/NAME"``."""
    if name.startswith(TORCHVISION_PREFIX):
        return _load_torchvision(name.removeprefix(TORCHVISION_PREFIX))
    folder = locate_base(name)
    if _model_type(folder) == VisionConfig.model_type:
        return VisionEncoder.from_pretrained(folder)
    return VisionEncoder.wrap(AutoModel.from_pretrained(folder))


def _torchvision_encoder(name: str) -> VisionEncoder:
    """A torchvision trunk with random weights, for pictures of the published size."""
    from torchvision.models import get_model_weights

    image_size = get_model_weights(name).DEFAULT.transforms().crop_size[0]
    return VisionEncoder.create(backend="torchvision", name=name, image_size=image_size)


def _load_torchvision(name: str) -> VisionEncoder:
    from torchvision.models import get_model_weights

    encoder, weights = _torchvision_encoder(name), get_model_weights(name).DEFAULT
    published = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    trunk = encoder.trunk.state_dict()
    encoder.trunk.load_state_dict({key: published[key] for key in trunk})
    return encoder


def load_image_processor(name: str) -> Any:
    """Load the image processor of an encoder; names as in :func:`load_encoder`."""
    if name.startswith(TORCHVISION_PREFIX):
        return _torchvision_encoder(name.removeprefix(TORCHVISION_PREFIX)).image_processor()
    folder = locate_base(name)
    stored = cached_file(folder, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    if stored is None and _model_type(folder) == VisionConfig.model_type:
        return VisionEncoder(VisionConfig.from_pretrained(folder)).image_processor()
    return AutoImageProcessor.from_pretrained(folder)


def decoder_state_dict(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a decoder under the names that they have in the fused model."""
    tensors = read_tensors(locate_base(name))
    renamed = {f"model.language_{key}" if key.startswith("model.") else key: value for key, value in tensors.items()}
    renamed.setdefault("lm_head.weight", renamed["model.language_model.embed_tokens.weight"])  # tied
    return renamed


def encoder_state_dict(name: str) -> dict[str, torch.Tensor]:
    """The tensors of an encoder under the names that they have in the fused model."""
    config = None if name.startswith(TORCHVISION_PREFIX) else AutoConfig.from_pretrained(locate_base(name))
    if isinstance(config, VisionConfig) and config.backend != "transformers":
        tensors = read_tensors(locate_base(name))
    else:  # transformers stores some models under other names than their modules'
        tensors = load_encoder(name).state_dict()
    return {f"model.vision_encoder.{key}": value for key, value in tensors.items()}


def _model_type(folder: str) -> str:
    return AutoConfig.from_pretrained(folder).model_type


def read_tensors(folder: Any, **hub: Any) -> dict[str, torch.Tensor]:
    """Read the safetensors of a model, in one file or in shards.

    Args:
        folder: Folder or hub id.
        **hub: ``revision``, ``cache_dir``, ``token``, ``subfolder``, as in transformers.

    Raises:
        OSError: If there are none.
    """
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        return load_file(cached_file(folder, SAFE_WEIGHTS_NAME, **hub))
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= load_file(cached_file(folder, shard, **hub))
    return tensors
