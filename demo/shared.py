"""What the tabs share: how pictures are opened and shown, what is told of errors, how events are run.

What always holds: an uploaded file meets `load_image` before anything else opens it, and is deleted right after.
"""

from __future__ import annotations

import os
import secrets
import traceback
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from demo.wording import say
from multimodal.images import ImageError, load_image
from multimodal.samples import sample_images
from multimodal.store.feedback import picture_digest

# A picture is kept for as long as its page is open: at most so many pixels a side, where the model sees about 260.
KEPT_SIDE, SHOWN_SIDE, THUMBNAIL_SIDE = 1536, 1024, 256
DECODE_SECONDS = 10.0  # for which an uploaded picture is decoded
# For events that take next to no time: no spinner, no waiting for others. A full queue must not keep one from stopping.
QUICK: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
INSTALL = "pip install 'multimodal[compare]'"


def opened(paths: Sequence[str], language: str) -> list[Image.Image]:
    """Uploaded pictures, no larger than they are kept; the asker is told which cannot be used, and why."""
    pictures = []
    for path in paths:
        try:
            pictures.append(fitted(load_image(path, max_seconds=DECODE_SECONDS), KEPT_SIDE))
        except ImageError as error:
            warn(str(error), title=say("bad_picture_title", language))
        finally:
            Path(path).unlink(missing_ok=True)
    return pictures


def own_file(picture: Image.Image, name: str = "picture") -> str:
    """A picture as a file of its own, which the asker may send in and lose, and which any browser can show."""
    path = Path(get_upload_folder()) / f"{name}-{secrets.token_hex(8)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)
    return str(path)


def sample_file(index: int) -> str:
    """A sample, as :func:`own_file`."""
    sample = sample_images()[index]
    return own_file(fitted(load_image(sample.path), KEPT_SIDE), sample.name)


def shown_file(picture: Image.Image, side: int = SHOWN_SIDE) -> str:
    """A picture as a file that Gradio sends, and deletes when nobody has asked for it for a while.

    Once there, it is not written again. Gradio writes a picture that it gets as such with every time that it is shown,
    into the same file, which it may be sending: half a picture arrives then.
    """
    name = sha256(f"{picture_digest(picture)} {side}".encode()).hexdigest()[:32]
    path = Path(get_upload_folder()) / f"{name}.{'jpg' if picture.mode == 'RGB' else 'png'}"
    try:
        os.utime(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_stem(f"{name}-{secrets.token_hex(8)}")
        fitted(picture, side).save(unfinished, quality=90, compress_level=1)
        os.replace(unfinished, path)
    return str(path)


def thumbnails() -> list[tuple[str, str]]:
    """The samples, each with its caption, as a gallery takes them."""
    return [(shown_file(picture, THUMBNAIL_SIDE), caption) for picture, caption in _captioned()]


@lru_cache(maxsize=1)
def _captioned() -> list[tuple[Image.Image, str]]:
    return [(fitted(load_image(sample.path), THUMBNAIL_SIDE), sample.caption) for sample in sample_images()]


def fitted(image: Image.Image, side: int) -> Image.Image:
    """No larger than ``side``."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def asks_nothing(text: str, has_picture: bool, language: str) -> bool:
    """Whether the picture or the question is missing; the asker is told which."""
    lacking = "no_picture" if not has_picture else "" if text.strip() else "no_question"
    if lacking:
        warn(say(lacking, language), title=say(f"{lacking}_title", language))
    return bool(lacking)


def warn(message: str, *, title: str) -> None:
    """Tell whoever caused the event."""
    gr.Warning(escape(message), title=title)  # Gradio shows it as HTML


def reason(error: Exception) -> str:
    """What to tell the asker; what was not foreseen is printed in the terminal as well."""
    from multimodal.adapters import AdapterError
    from multimodal.engine import EngineError
    from multimodal.model import ModelError
    from multimodal.weights import WeightsError

    if isinstance(error, ImageError | ModelError | AdapterError | WeightsError | EngineError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: {INSTALL}"
    traceback.print_exception(error)
    return "Something went wrong. The terminal in which the demo runs says what."


def session_of(request: gr.Request) -> str:
    """Whose event it is."""
    assert request.session_hash is not None  # every event of a page carries one
    return request.session_hash
