"""From generations to what OpenAI's endpoint says of them: a chat completion, whole or in chunks.

It waits in the event loop and computes nothing. What always holds: a stream's pieces join to the whole answer's text,
and usage and logprobs are the same.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from tokenizers.decoders import DecodeStream

from multimodal.answer import Strip
from multimodal.engine import Generation, Token
from multimodal.model import MultiModalModel
from multimodal.service.flights import Flight, stopping
from multimodal.service.schema import ChatRequest

LEAST_LOGPROB = -9999.0  # of what cannot be said: OpenAI's own number, since JSON has no infinity


async def _nothing() -> None:
    pass


class Completion:
    """An answer in the making, or several of the same question.

    Args:
        model: What answers.
        flight: Its generations, which have begun.
        asked: The request.
        fingerprint: Of the model's weights.
        on_end: Awaited when everything was said, before the caller is told that this was all.
    """

    def __init__(
        self,
        model: MultiModalModel,
        flight: Flight,
        asked: ChatRequest,
        *,
        fingerprint: str,
        on_end: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        self._flight, self._asked, self._on_end = flight, asked, on_end
        self._image_token = model.model.config.image_token_id
        self._choices = [_Choice(model, asked, generation) for generation in flight.generations]
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer when it is there."""
        async with aclosing(self._tokens()) as tokens:
            async for _ in tokens:
                pass
        await self._on_end()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.generation.text.strip(), "refusal": None},
                "logprobs": choice.logprobs(choice.generation.tokens),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer piece by piece."""
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async with aclosing(self._tokens()) as tokens:
            async for index, token in tokens:
                choice = self._choices[index]
                piece, logprobs = choice.strip.add(token.text), choice.logprobs([token])
                if piece or (logprobs and logprobs["content"]):
                    yield self._chunk(index, {"content": piece}, logprobs=logprobs)
        await self._on_end()
        for index, choice in enumerate(self._choices):
            yield self._chunk(index, {}, finish_reason=choice.reason)
        if self._asked.stream_options.include_usage:
            yield {**self._chunk(0, {}), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens read and written. Each picture is one token of the prompt, whatever its size."""
        prompt = self._choices[0].generation.request.tokens
        written = sum(len(choice.generation.tokens) for choice in self._choices)
        return {
            "prompt_tokens": len(prompt),
            "completion_tokens": written,
            "total_tokens": len(prompt) + written,
            "prompt_tokens_details": {"image_tokens": prompt.count(self._image_token)},
        }

    async def _tokens(self) -> AsyncGenerator[tuple[int, Token]]:
        """The tokens of all choices as they come, with their choice's index; an error of the model is raised here."""
        with _merged([choice.generation for choice in self._choices]) as news:
            for _ in self._choices:
                while not isinstance(said := await news.get(), _End):
                    yield said
                if said.error is not None:
                    raise said.error
        if any(choice.generation.reason == "cancelled" for choice in self._choices):
            raise self._flight.error or stopping()

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._asked.stream_options.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}


class _Choice:
    """One of the answers."""

    def __init__(self, model: MultiModalModel, asked: ChatRequest, generation: Generation) -> None:
        self.generation, self.strip = generation, Strip()
        self._tokenizer, self._ends = model.processor.tokenizer.backend_tokenizer, model.end_tokens
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._wanted = asked.logprobs

    @property
    def reason(self) -> str:
        return "length" if self.generation.reason == "length" else "stop"

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of what was said; the token that ends an answer says nothing. To be asked once for each token, in order."""
        if not self._wanted:
            return None
        content = []
        for token in tokens:
            text = self._decoder.step(self._tokenizer, token.id) or ""  # "" within a character of several tokens
            if token.id not in self._ends:
                top = [
                    self._entry(self._tokenizer.decode([other], skip_special_tokens=False), logprob)
                    for other, logprob in token.top_logprobs
                ]
                content.append({**self._entry(text, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    @staticmethod
    def _entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}


class _End:
    """Of a generation."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


@contextmanager
def _merged(generations: Sequence[Generation]) -> Iterator[asyncio.Queue[tuple[int, Token] | _End]]:
    """The news of several generations in one queue."""
    news: asyncio.Queue[tuple[int, Token] | _End] = asyncio.Queue()

    async def follow(index: int, generation: Generation) -> None:
        try:
            async for token in generation:
                news.put_nowait((index, token))
        except Exception as error:
            news.put_nowait(_End(error))
        else:
            news.put_nowait(_End())

    tasks = [asyncio.ensure_future(follow(*numbered)) for numbered in enumerate(generations)]
    try:
        yield news
    finally:
        for task in tasks:
            task.cancel()
