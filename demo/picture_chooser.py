"""One picture to ask about: a place to drop it, what was dropped, and samples to click on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from demo.shared import KEPT_SIDE, QUICK, fitted, opened, shown_file, thumbnails
from demo.wording import TEXT, language_of
from multimodal.images import load_image
from multimodal.samples import sample_images


class PictureChooser:
    """The parts, made where they are to stand.

    Attributes:
        picture: The state that holds what is asked about.
        shown: What people see of it.
        gallery: The samples, empty until :meth:`samples` fills it.
    """

    def __init__(self, prefix: str) -> None:
        self.picture = gr.State(None)
        self.shown = gr.Image(
            show_label=False,
            interactive=False,
            visible=False,
            buttons=["fullscreen"],
            elem_id=f"{prefix}-picture",
            alt_text="The picture to ask about",
        )
        self._upload = gr.File(show_label=False, elem_id=f"{prefix}-upload")
        gr.HTML(TEXT("formats"))
        self.gallery = gr.Gallery(
            show_label=False,
            visible=False,
            columns=3,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id=f"{prefix}-samples",
        )

    def on_open(
        self, prompt: gr.Textbox, others: Sequence[Any], cleared: Callable[[gr.Request], tuple[Any, ...]]
    ) -> None:
        """Say what happens when a picture is chosen.

        Args:
            prompt: Takes a sample's question.
            others: What else changes.
            cleared: Gives values for ``others``.
        """
        outputs = [*self.outputs, prompt, *others]

        def open_upload(path: str, request: gr.Request) -> tuple[Any, ...]:
            pictures = opened([path], language_of(request))
            if not pictures:
                return None, *(gr.skip() for _ in outputs)
            return None, *self.values(pictures[0]), gr.skip(), *cleared(request)

        def open_sample(request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
            sample = sample_images()[event.index]
            return *self.values(fitted(load_image(sample.path), KEPT_SIDE)), sample.prompt, *cleared(request)

        self._upload.upload(open_upload, self._upload, [self._upload, *outputs], **QUICK)
        self.gallery.select(open_sample, None, outputs, **QUICK)

    @property
    def outputs(self) -> tuple[Any, Any]:
        """The parts that :meth:`values` are for."""
        return self.picture, self.shown

    @staticmethod
    def values(image: Image.Image) -> tuple[Any, Any]:
        """What a picture is kept as, and shown as."""
        return image, gr.Image(shown_file(image), visible=True)

    @staticmethod
    def samples() -> gr.Gallery:
        """The samples, for :attr:`gallery`."""
        return gr.Gallery(thumbnails(), visible=bool(sample_images()))
