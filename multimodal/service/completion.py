"""From a generation to what OpenAI's endpoint says of it: a chat completion, whole or in chunks.

It waits in the event loop and computes nothing. What always holds: a stream's pieces join to the whole answer's text,
and usage and logprobs are the same.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from tokenizers.decoders import DecodeStream

from multimodal.engine import Generation, Token
from multimodal.model import MultiModalModel, Strip
from multimodal.service.errors import ApiError


class Completion:
    """An answer in the making.

    Args:
        model: What answers.
        generation: Its answer.
        name: What the caller called the model.
        logprobs: Whether to tell them.
        include_usage: Whether a stream ends with it.
    """

    def __init__(
        self, model: MultiModalModel, generation: Generation, *, name: str, logprobs: bool, include_usage: bool
    ) -> None:
        self.generation = generation
        self._tokenizer, self._ends = model.processor.tokenizer.backend_tokenizer, model.end_tokens
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._logprobs, self._include_usage = logprobs, include_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def whole(self) -> dict[str, Any]:
        """The answer when it is there."""
        async for _ in self._tokens():
            pass
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.generation.text.strip(), "refusal": None},
            "logprobs": self._logprobs_of(self.generation.tokens),
            "finish_reason": self._reason(),
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer piece by piece."""
        yield self._chunk({"role": "assistant", "content": "", "refusal": None})
        strip = Strip()
        async with aclosing(self._tokens()) as tokens:
            async for token in tokens:
                piece = strip.add(token.text)
                logprobs = self._logprobs_of([token])
                if piece or (logprobs and logprobs["content"]):
                    yield self._chunk({"content": piece}, logprobs=logprobs)
        yield self._chunk({}, finish_reason=self._reason())
        if self._include_usage:
            yield {**self._chunk({}), "choices": [], "usage": self._usage()}

    async def _tokens(self) -> AsyncGenerator[Token]:
        """The generation's tokens; an error of the model is raised here."""
        tokens: Any = aiter(self.generation)  # declared an iterator; it is a generator
        async with aclosing(tokens):
            async for token in tokens:
                yield token
        if self.generation.reason == "cancelled":
            raise ApiError(503, "the server is shutting down: ask again when it is back", code="shutting_down")

    def _chunk(
        self, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _reason(self) -> str:
        return "length" if self.generation.reason == "length" else "stop"

    def _usage(self) -> dict[str, int]:
        read, written = len(self.generation.request.tokens), len(self.generation.tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _logprobs_of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of what was said; the token that ends an answer says nothing. To be asked once for each token, in order."""
        if not self._logprobs:
            return None
        content = []
        for token in tokens:
            text = self._decoder.step(self._tokenizer, token.id) or ""  # "" within a character of several tokens
            if token.id not in self._ends:
                content.append(
                    {"token": text, "logprob": token.logprob, "bytes": list(text.encode()), "top_logprobs": []}
                )
        return {"content": content, "refusal": None}
