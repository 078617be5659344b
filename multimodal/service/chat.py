"""From a request's messages to a chat of ours, and between such a chat and what a session stores.

What always holds: no file is opened for a caller, and no address is fetched but of a host that was allowed, since this
machine may reach what the caller may not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from multimodal.images import Encoded, ImageError, read_encoded
from multimodal.service.errors import ApiError
from multimodal.service.schema import Message

DATA_URI = "send the picture itself, as a data-URI: data:image/png;base64, and the encoded bytes"
MAX_FETCHED = 24 * 2**20  # bytes of a picture from the web: as large as one that fits into a request


def chat_of(messages: Sequence[Message], *, hosts: Collection[str] = ()) -> list[dict[str, Any]]:
    """The chat that ``MultiModalModel.reply`` takes.

    Args:
        messages: Of the request.
        hosts: From which pictures are fetched.

    Raises:
        ApiError: 400, if a picture is neither a data-URI nor at one of these hosts.
        ImageError: If a data-URI cannot be decoded, or an address cannot be fetched.
    """
    chat: list[dict[str, Any]] = []
    pictures = 0
    for place, message in enumerate(messages):
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(message.content):
            if part.image_url is not None and part.type == "image_url":
                pictures += 1
                where = f"messages[{place}].content[{number}].image_url.url"
                image = _picture(part.image_url.url, f"picture {pictures}", where, hosts)
                parts.append({"type": "image", "image": image})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        chat.append({"role": role, "content": parts})
    return chat


def stored(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chat as a session stores it."""
    return _with_parts(chat, lambda part: {"type": "image", "data": part["image"].data})


def unstored(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat that a session stored."""
    return _with_parts(
        messages, lambda part: {"type": "image", "image": Encoded("picture of the session", part["data"])}
    )


def _with_parts(messages: Sequence[Mapping[str, Any]], image: Any) -> list[dict[str, Any]]:
    return [
        {
            "role": message["role"],
            "content": [image(part) if part["type"] == "image" else part for part in message["content"]],
        }
        for message in messages
    ]


def _picture(url: str, name: str, where: str, hosts: Collection[str]) -> Encoded:
    web = re.match(r"https?://", url, re.IGNORECASE)
    if web and hosts:
        from multimodal.download import download

        return _named(name, lambda: download(url, max_bytes=MAX_FETCHED, hosts=hosts)[1])
    if url[:5].lower() != "data:":
        problem = "is on the web, and nothing is fetched from there" if web else "is not a data-URI"
        raise ApiError(400, f"{name} {problem}: {DATA_URI}", param=where, code="invalid_image_url")
    return _named(name, lambda: read_encoded(url).data)  # type: ignore[union-attr]  # text always has bytes


def _named(name: str, read: Any) -> Encoded:
    try:
        return Encoded(name, read())
    except ImageError as error:
        raise ImageError(name, error.problem, error.remedy) from None
