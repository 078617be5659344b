"""What a request may ask for, checked before anything is decoded or tokenised."""

from __future__ import annotations

from multimodal.service.errors import ApiError
from multimodal.service.schema import ChatRequest
from multimodal.service.settings import ServiceSettings


def check(asked: ChatRequest, settings: ServiceSettings) -> None:
    """Make sure that a request is within the limits.

    Raises:
        ApiError: 400, naming the limit.
    """
    parts = [part for message in asked.messages for part in message.content]
    characters = sum(len(part.text or "") for part in parts)
    pictures = sum(part.type == "image_url" for part in parts)
    field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    for value, most, param, message in (
        (characters, settings.characters, "messages", "characters exceed the server's {most}: shorten the prompt"),
        (pictures, settings.pictures, "messages", "pictures exceed the server's {most}: send fewer at a time"),
        (asked.most_tokens, settings.answer_tokens, field, "tokens exceed the server's {most}: lower " + field),
        (asked.n, settings.choices, "n", "choices exceed the server's {most}: lower n"),
    ):
        if value > most:
            said = f"{value:,} {message.format(most=format(most, ','))}"
            raise ApiError(400, said, param=param, code="limit_exceeded")
