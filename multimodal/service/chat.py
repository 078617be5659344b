"""From a request's messages to a chat of ours.

What always holds: a picture comes with the request. No address is fetched and no file is opened for a caller, since
this machine may reach what the caller may not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from multimodal.images import Encoded, ImageError, read_encoded
from multimodal.service.errors import ApiError
from multimodal.service.schema import Message

DATA_URI = "send the picture itself, as a data-URI: data:image/png;base64, and the encoded bytes"


def chat_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The chat that ``MultiModalModel.reply`` takes.

    Raises:
        ApiError: 400, if a picture is not a data-URI.
        ImageError: If a data-URI cannot be decoded.
    """
    chat: list[dict[str, Any]] = []
    pictures = 0
    for place, message in enumerate(messages):
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(message.content):
            if part.image_url is not None and part.type == "image_url":
                pictures += 1
                where = f"messages[{place}].content[{number}].image_url.url"
                parts.append({"type": "image", "image": _picture(part.image_url.url, f"picture {pictures}", where)})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        chat.append({"role": role, "content": parts})
    return chat


def _picture(url: str, name: str, where: str) -> Encoded:
    if url[:5].lower() != "data:":
        web = re.match(r"https?://", url, re.IGNORECASE)
        problem = "is on the web, and nothing is fetched from there" if web else "is not a data-URI"
        raise ApiError(400, f"{name} {problem}: {DATA_URI}", param=where, code="invalid_image_url")
    try:
        encoded = read_encoded(url)
    except ImageError as error:
        raise ImageError(name, error.problem, error.remedy) from None
    assert encoded is not None  # text always has bytes
    return Encoded(name, encoded.data)
