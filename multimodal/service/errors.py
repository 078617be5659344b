"""Errors as OpenAI's endpoint tells them: a status, and ``{"error": {"message", "type", "param", "code"}}``.

What always holds: what a caller can mend says how; anything else says its kind only, no stack trace and no content.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from multimodal.adapters import AdapterError
from multimodal.engine import EngineClosed, EngineError, EngineFull
from multimodal.images import ImageError
from multimodal.model import ModelError
from multimodal.store import PictureGone
from multimodal.store.database import UNAVAILABLE

RETRY_AFTER = 1  # seconds; an answer takes about as long
MENDABLE = (ImageError, ModelError, AdapterError, EngineError)  # their messages name the remedy

log = logging.getLogger("multimodal.service")


class ApiError(Exception):
    """What goes wrong with a request, as the caller is told.

    Attributes:
        status: Of HTTP.
        message: What is wrong, and the remedy.
        param: The parameter that is, such as ``messages[0].content``.
        code: For programs.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response that tells it."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a caller is told of an error; one that no caller can mend goes into the log, too."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # an address or a method that is not there
        message = f"{error.detail}: there are POST /v1/chat/completions, GET /v1/models and what GET /docs lists"
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, EngineFull):
        headers = {"Retry-After": str(RETRY_AFTER)}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
    if isinstance(error, EngineClosed):
        return ApiError(503, "the model is not there any more: ask again when the server is back", code="closed")
    if isinstance(error, UNAVAILABLE):
        log.error("the database does not answer: %s", getattr(error, "orig", None) or error)
        message = "the database of keys and sessions does not answer: ask again in a moment"
        return ApiError(503, message, code="store_unavailable", headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, PictureGone):
        return ApiError(400, str(error), param="metadata.session_id", code="picture_gone")
    if isinstance(error, ImageError):
        said = re.sub(r",? or pass max_\w+=", "", str(error))  # which a caller cannot
        return ApiError(400, said, param="messages", code="invalid_image")
    if isinstance(error, MENDABLE):
        return ApiError(400, str(error).replace("max_new_tokens", "max_tokens"), code="invalid_value")
    log.error("a request failed", exc_info=error)
    return ApiError(
        500, f"the server failed while it answered ({type(error).__name__}): its log says more", code="internal_error"
    )
