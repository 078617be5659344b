"""A request for a chat completion, read strictly.

What cannot be done is refused by name, never left out in silence: a caller who asks for tools and gets prose has been
misled. Parameters that change nothing about an answer (``user``, ``store``, ...) are taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from multimodal.service.errors import ApiError

IGNORED = {
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# What it would take to give anything else is not here; these values mean: as usual.
NEUTRAL: dict[str, list[Any]] = {
    "audio": [],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "web_search_options": [],
}


class ImageUrl(BaseModel):
    """Where a picture is; ``detail`` is ignored, since the model sees every picture in one size."""

    model_config = ConfigDict(strict=True)
    url: str


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _is_there(self) -> Part:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type!r}")
        return self


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Metadata(BaseModel):
    """What a caller says beside its request; all but the session's name is ignored."""

    model_config = ConfigDict(strict=True)
    session_id: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")] | None = None


class ChatRequest(BaseModel):
    """A request for a chat completion. Without a temperature it is greedy, as everywhere in this project."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    metadata: Metadata = Metadata()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] = 128
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[str],
        Field(max_length=16),
        BeforeValidator(lambda s: [s] if isinstance(s, str) else s, json_schema_input_type=str | list[str]),
    ] = []
    n: Annotated[int, Field(ge=1)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def most_tokens(self) -> int:
        """How long an answer may be."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: 400, if it is no JSON, or asks for what is not there.
    """
    try:
        said = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(said, dict):
        raise ApiError(400, "the body is not a JSON object: send one with model and messages", code="invalid_json")
    said = {key: value for key, value in said.items() if value is not None and key not in IGNORED}
    for key in list(said):
        if key in NEUTRAL:
            if said.pop(key) not in NEUTRAL[key]:
                usual = " or ".join(map(str, NEUTRAL[key])) or "left out"
                raise ApiError(400, f"{key} can only be {usual} here", param=key, code="unsupported_parameter")
        elif key not in ChatRequest.model_fields:
            raise ApiError(400, f"{key!r:.60} is unknown here: leave it out", param=key[:60], code="unknown_parameter")
    try:
        return ChatRequest.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _param(first["loc"])
        raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


def _param(place: tuple[int | str, ...]) -> str:
    """As OpenAI writes it: ``messages[0].content[1].text``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".") or "body"
