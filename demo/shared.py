"""What the tabs share: the picture that is chosen, what is told of errors, how events are run.

What always holds: an uploaded file meets `load_image` before anything else opens it, and is deleted right after.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from multimodal.images import MAX_BYTES, ImageError, load_image
from multimodal.samples import SamplePicture, sample_images

# A picture is kept for as long as its page is open: at most so many pixels a side, where the model sees about 260.
KEPT_SIDE, SHOWN_SIDE, THUMBNAIL_SIDE = 2048, 1024, 256
# For events that take next to no time: no spinner, no waiting for others. A full queue must not keep one from stopping.
QUICK: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
FORMATS = f"PNG, JPEG, WEBP, GIF, TIFF, BMP or DICOM, up to {MAX_BYTES >> 20} MB. Or try one of these:"
NOTICE = """
<p class="notice"><strong>Not a medical device.</strong> Answers can be wrong, also when they sound sure:
never use them for diagnosis or treatment.</p>
"""
INSTALL = "pip install 'multimodal[compare]'"


class PictureChooser:
    """The picture, a place to drop another one, and samples to click on; made where it is to stand.

    Args:
        prefix: Of the parts' ids on the page.
        samples: Whether the samples are there from the start; :meth:`thumbnails` shows them later.

    Attributes:
        picture: The state that holds what is asked about.
        shown: What people see of it.
        gallery: The samples.
    """

    def __init__(self, prefix: str = "", *, samples: bool = True) -> None:
        self.picture = gr.State(None)
        self.shown = gr.Image(
            show_label=False,
            interactive=False,
            visible=False,
            buttons=["fullscreen"],
            elem_id=f"{prefix}picture",
            elem_classes="chosen",
            alt_text="The picture to ask about",
        )
        self._upload = gr.File(show_label=False, elem_id=f"{prefix}upload", elem_classes="upload")
        gr.HTML(f'<p class="caption">{FORMATS}</p>')
        self.gallery = gr.Gallery(
            _thumbnails() if samples else None,
            show_label=False,
            visible=samples and bool(sample_images()),
            columns=3,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id=f"{prefix}samples",
            elem_classes="samples",
        )

    def on_open(
        self, prompt: gr.Textbox, others: Sequence[Any], cleared: Callable[[Image.Image, gr.Request], tuple[Any, ...]]
    ) -> None:
        """Say what happens when a picture is chosen.

        Args:
            prompt: Takes a sample's question.
            others: What else changes.
            cleared: Gives values for ``others``.
        """
        outputs = [*self.outputs, prompt, *others]

        def open_upload(path: str, request: gr.Request) -> tuple[Any, ...]:
            try:
                image = load_image(path)
            except ImageError as error:
                warn(str(error), title="This picture can't be used")
                return None, *(gr.skip() for _ in outputs)
            finally:
                Path(path).unlink(missing_ok=True)
            return None, *self.values(image), gr.skip(), *cleared(image, request)

        def open_sample(request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
            sample: SamplePicture = sample_images()[event.index]
            image = load_image(sample.path)
            return *self.values(image), sample.prompt, *cleared(image, request)

        self._upload.upload(open_upload, self._upload, [self._upload, *outputs], **QUICK)
        self.gallery.select(open_sample, None, outputs, **QUICK)

    @property
    def outputs(self) -> tuple[Any, Any]:
        """The parts that :meth:`values` are for."""
        return self.picture, self.shown

    @staticmethod
    def values(image: Image.Image) -> tuple[Any, Any]:
        """What a picture is kept as, and shown as."""
        return fitted(image, KEPT_SIDE), gr.Image(fitted(image, SHOWN_SIDE), visible=True)

    @staticmethod
    def thumbnails() -> gr.Gallery:
        """The samples, for :attr:`gallery`."""
        return gr.Gallery(_thumbnails(), visible=bool(sample_images()))


@lru_cache(maxsize=1)
def _thumbnails() -> list[tuple[Image.Image, str]]:
    return [(fitted(load_image(sample.path), THUMBNAIL_SIDE), sample.caption) for sample in sample_images()]


def fitted(image: Image.Image, side: int) -> Image.Image:
    """No larger than ``side``."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def asks_nothing(text: str, image: Image.Image | None) -> bool:
    """Whether the picture or the question is missing; the asker is told which."""
    if image is None:
        warn("Add a picture first, or choose one of the examples.", title="No picture yet")
    elif not text.strip():
        warn("Type what you want to know about the picture.", title="No question yet")
    return image is None or not text.strip()


def warn(message: str, *, title: str) -> None:
    """Tell whoever caused the event."""
    gr.Warning(escape(message), title=title)  # Gradio shows it as HTML


def reason(error: Exception) -> str:
    """What to tell the asker; what was not foreseen is printed in the terminal as well."""
    from multimodal.adapters import AdapterError
    from multimodal.model import ModelError
    from multimodal.weights import WeightsError

    if isinstance(error, ImageError | ModelError | AdapterError | WeightsError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: {INSTALL}"
    traceback.print_exception(error)
    return "Something went wrong. The terminal in which the demo runs says what."


def session_of(request: gr.Request) -> str:
    """Whose event it is."""
    assert request.session_hash is not None  # every event of a page carries one
    return request.session_hash
