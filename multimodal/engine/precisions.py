"""Which way a model is run: in which precision, compiled or by torch, as graphs, flat or through its own modules."""

from __future__ import annotations

from typing import Any

import torch

from multimodal.engine.graphs import GraphRunner
from multimodal.engine.modules import ModuleRunner
from multimodal.engine.native import NativeRunner
from multimodal.engine.native import obstacle as native_obstacle
from multimodal.engine.requests import EngineError
from multimodal.engine.runner import Runner, TorchRunner
from multimodal.engine.weights import obstacle
from multimodal.fusion import FusionForConditionalGeneration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISIONS = ("auto", *DTYPES, "int8", "int4")
PICTURES = 64  # that a request may hold


def make_runner(
    model: FusionForConditionalGeneration,
    *,
    precision: str = "auto",
    slots: int = 8,
    positions: int | None = None,
    pictures: int = PICTURES,
) -> Runner:
    """The way to run a model in a precision.

    Args:
        model: The fused model.
        precision: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``; ``"auto"`` is the model's own dtype, but
            for bfloat16 int8 where its step has been compiled. On a CPU int8 and int4 are compiled code, elsewhere they
            are what weights are kept in, and the model's own dtype what is computed in.
        slots: How many requests are answered at once.
        positions: Tokens of a slot; None for as many as the decoder knows. On a CPU memory is taken as it is filled.
        pictures: Pictures of a slot.

    Raises:
        EngineError: If there is no such precision, or none here.
    """
    sizes: dict[str, Any] = {
        "slots": slots,
        "positions": positions or model.config.text_config.max_position_embeddings,
        "pictures": pictures,
    }
    if precision not in PRECISIONS:
        raise EngineError(f"there is no precision {precision!r}: use {', '.join(PRECISIONS)}")
    quantised = {"int8": "int8", "int4": "int4", "auto": "int8" if model.dtype == torch.bfloat16 else None}
    kind: Any = quantised.get(precision)
    if kind is not None:
        why_not = native_obstacle(model)
        if why_not is None:
            dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32  # of prompts
            return NativeRunner(model, kind, dtype=dtype, **sizes)
        if precision == "auto":
            kind = None
        elif model.device.type == "cpu" or obstacle(model) is not None:
            raise EngineError(f"{precision} does not run here: {why_not}; use {' or '.join(DTYPES)}")
    if obstacle(model) is not None:
        return ModuleRunner(model, **sizes)
    own: Any = model.dtype
    flat = GraphRunner if model.device.type == "cuda" else TorchRunner
    return flat(model, DTYPES.get(precision, own), **sizes, quantised=kind)
