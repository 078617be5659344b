"""One fused model that answers questions about pictures, and tells you honestly whether it is worth it.

    from multimodal import MultiModalModel, load_image
    model = MultiModalModel.from_pretrained("embedded")
    answer = model("What is abnormal in this X-ray?", load_image("xray.png"))

Names are imported when they are first used: ``import multimodal`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.answer import Answer
    from multimodal.images import ImageError, load_image
    from multimodal.model import MultiModalModel

__all__ = ["Answer", "ImageError", "MultiModalModel", "load_image"]

_HOMES = {
    "Answer": "multimodal.answer",
    "MultiModalModel": "multimodal.model",
    "ImageError": "multimodal.images",
    "load_image": "multimodal.images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
