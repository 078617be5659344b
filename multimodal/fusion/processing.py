"""FusionProcessor: text with image placeholders and pictures become the model's inputs.

It checks that every row has one picture for each placeholder, and says which row has not. It knows nothing about files
or the network: pictures come as PIL images, arrays or tensors.

Axes: B batch, T text tokens, I images.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import is_valid_image
from transformers.processing_utils import ProcessingKwargs, Unpack

from multimodal.fusion.bases import load_image_processor, locate_base
from multimodal.fusion.vision import VisionEncoder

IMAGE_TOKEN = "<image>"

# Rewrites messages whose content is a list of typed parts into plain strings, then hands over to the decoder's own
# template.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='', images='') -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set content.PLACE = content.PLACE + 'IMAGE_TOKEN' -%}
      {%- elif part['type'] == 'text' -%}
        {%- set content.text = content.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content.text + content.images}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] + ': ' + message['content'] + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'assistant:' }}
{%- endif -%}
"""


def template_with_images(template: str, image_token: str = IMAGE_TOKEN, images_last: bool = False) -> str:
    """A decoder's own chat template, made to understand ``{"type": "image"}`` parts.

    Args:
        template: Jinja template for messages of plain text.
        image_token: The placeholder.
        images_last: Put a message's pictures behind its text, whatever the order of its parts.
    """
    flatten = _FLATTEN.replace("PLACE", "images" if images_last else "text")
    return flatten.replace("IMAGE_TOKEN", image_token) + template


class FusionProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Defaults of a call: rows are padded to the longest."""

    _defaults = {"text_kwargs": {"padding": True}}  # noqa: RUF012


class FusionProcessor(ProcessorMixin):
    """Tokenizer and image processor as one.

    Args:
        image_processor: The encoder's image processor.
        tokenizer: The decoder's tokenizer; it pads on the left, as generation needs.
        chat_template: Jinja template of a conversation; see :func:`template_with_images`.
        image_token: The placeholder, one token of the tokenizer's vocabulary.

    Raises:
        ValueError: If the placeholder is not one token.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, chat_template: str | None = None, image_token: str = IMAGE_TOKEN
    ) -> None:
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"{image_token!r} is not one token of this tokenizer: name a spare special token with image_token=..."
            )
        self.image_token, self.image_token_id = image_token, ids[0]
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def fuse(
        cls,
        *,
        text: str,
        vision: str | VisionEncoder,
        image_token: str | None = None,
        chat_template: str | None = None,
        images_last: bool = False,
    ) -> FusionProcessor:
        """The processor of a freshly fused model.

        Args:
            text: As in ``FusionForConditionalGeneration.fuse``.
            vision: Likewise.
            image_token: A spare token of the tokenizer. None takes ``<image>`` where the tokenizer has it, or adds it
                where the decoder's embedding has a row to spare.
            chat_template: Jinja template for messages of plain text; None takes the tokenizer's own.
            images_last: As in :func:`template_with_images`.

        Raises:
            ValueError: If the decoder's vocabulary has no place for the placeholder.
        """
        folder = locate_base(text)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if image_token is None:
            image_token = _spare_token(tokenizer, folder)
        if isinstance(vision, VisionEncoder):
            image_processor = vision.image_processor()
        else:
            image_processor = load_image_processor(vision)
        template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE
        return cls(image_processor, tokenizer, template_with_images(template, image_token, images_last), image_token)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[FusionProcessorKwargs],
    ) -> BatchFeature:
        """Prepare rows of text and their pictures.

        Args:
            images: One picture; a flat list, which is dealt out to the placeholders in order; or one list for each row.
            text: A row or a list of rows, with one placeholder for each picture.
            **kwargs: As in transformers (``return_tensors``, ``padding``, ...).

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, T)``, and, if there are pictures, ``pixel_values``
            ``(B, I, 3, height, width)``, rows with fewer pictures padded with zeros at the end.

        Raises:
            ValueError: If there is no text, or a row's pictures are not as many as its placeholders.
        """
        if not text:
            raise ValueError("text is missing: a picture needs a prompt with its placeholder")
        texts = [text] if isinstance(text, str) else list(text)
        merged = self._merge_kwargs(FusionProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        inputs = self.tokenizer(texts, **merged["text_kwargs"])
        counts = [list(ids).count(self.image_token_id) for ids in inputs["input_ids"]]
        rows = _deal_out(images, counts)
        data = dict(inputs)
        if any(rows):
            flat = [image for row in rows for image in row]
            pixels = self.image_processor(flat, **{**merged["images_kwargs"], "return_tensors": "pt"})["pixel_values"]
            pixel_values = pixels.new_zeros(len(rows), max(counts), *pixels.shape[1:])  # (B, I, 3, height, width)
            filled = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            pixel_values[filled] = pixels
            data["pixel_values"] = pixel_values
        return BatchFeature(data, tensor_type=return_tensors)


def _spare_token(tokenizer: Any, folder: str) -> str:
    from transformers import AutoConfig

    if IMAGE_TOKEN in tokenizer.get_vocab():
        return IMAGE_TOKEN
    config = AutoConfig.from_pretrained(folder).get_text_config()
    if len(tokenizer) < config.vocab_size:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        return IMAGE_TOKEN
    raise ValueError(
        f"the decoder's vocabulary of {config.vocab_size} has no row to spare for {IMAGE_TOKEN}: "
        "name one of the tokenizer's unused special tokens with image_token=..."
    )


def _deal_out(images: Any, counts: list[int]) -> list[list[Any]]:
    """One list of pictures for each row, as many as the row has placeholders."""
    if images is None:
        images = []
    elif not isinstance(images, list | tuple):
        images = [images]
    if any(isinstance(row, list | tuple) or row is None for row in images):
        rows = [list(row) if isinstance(row, list | tuple) else [] if row is None else [row] for row in images]
        if len(rows) != len(counts):
            raise ValueError(f"{len(rows)} lists of pictures were given for {len(counts)} rows of text")
    else:
        rows = _deal_flat(list(images), counts)
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        for image in row:
            if not is_valid_image(image):
                raise ValueError(f"row {index}: {image!r:.80} is no picture: give PIL images, arrays or tensors")
        if len(row) != count:
            raise ValueError(
                f"row {index} has {count} image placeholders but {len(row)} pictures: "
                "give one picture for each placeholder"
            )
    return rows


def _deal_flat(images: list[Any], counts: list[int]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    start = 0
    for count in counts:
        rows.append(images[start : start + count])
        start += count
    rows[-1] += images[start:]  # too many pictures: the last row is told
    return rows
