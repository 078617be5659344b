"""A model behind an OpenAI-compatible endpoint, through the ``openai`` client: text and pictures in, an answer out.

Keys come from the environment, or from a ``.env`` file in the working directory, and appear in no message. What
always holds: a picture and a key leave this machine only for the endpoint that was named, not for where it redirects
to; every failure is a ``PipelineError`` that says whether asking again may help.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from multimodal.images import load_image
from multimodal.pipelines.chats import Said
from multimodal.pipelines.protocol import PipelineError, Usage

TIMEOUT = 120.0  # seconds for one answer
LONGEST_SIDE = 1536  # pixels that are sent: hosted models see no more, and charge for it
LOOPBACK = ("localhost", "127.0.0.1", "::1")
INSTALL = "pip install 'multimodal[compare]'"


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens, read and written."""

    prompt: float
    completion: float

    def of(self, usage: Usage) -> float:
        """What a call costs, in US dollars."""
        return (self.prompt * usage.prompt_tokens + self.completion * usage.completion_tokens) / 1e6


@dataclass(frozen=True)
class Provider:
    """Where a well-known endpoint is, and what it calls a model of it; empty takes the only one that it has.

    Attributes:
        url: Its address.
        model: A model of it, as the table of prices has it, too.
        key: The environment variable that holds the key; empty where none is needed, and nobody is paid.
    """

    url: str
    model: str
    key: str = ""


PROVIDERS: Mapping[str, Provider] = {
    "deepseek": Provider("https://api.deepseek.com", "deepseek-v4-flash", "DEEPSEEK_API_KEY"),
    "kimi": Provider("https://api.moonshot.ai/v1", "kimi-k2.6", "MOONSHOT_API_KEY"),
    "openai": Provider("https://api.openai.com/v1", "gpt-6-luna", "OPENAI_API_KEY"),
    "vllm": Provider("http://127.0.0.1:8000/v1", ""),
    "ollama": Provider("http://127.0.0.1:11434/v1", ""),
}


class PassingError(PipelineError):
    """An endpoint that does not answer now, and may a moment later.

    Attributes:
        problem: What happened, without the endpoint's name and the remedy.
    """

    def __init__(self, message: str, problem: str, *, retry_after: float | None = None) -> None:
        super().__init__(message, passing=True, retry_after=retry_after)
        self.problem = problem


class Endpoint:
    """A chat model at an address.

    Args:
        url: Such as ``https://host/v1``.
        model: What the endpoint calls the model; empty takes the only one that it has.
        key: The environment variable that holds the key.
        needs_key: Whether nothing is asked without one; else an endpoint that wants one says so itself.
        price: What it charges; None where that is not known.
        digest: Tells the model behind it from others; by default its address and name.
        timeout: Seconds for one answer.

    Attributes:
        step: ``"llm"``.
        remote: Whether what is asked leaves this machine.

    Raises:
        PipelineError: If the address is none.
    """

    step = "llm"

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        key: str = "",
        needs_key: bool = True,
        price: Price | None = None,
        digest: str = "",
        timeout: float = TIMEOUT,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PipelineError(f"{url!r} is not the address of an endpoint: it begins with https:// or http://")
        self.url, self.named, self.key, self.price, self.timeout = url.rstrip("/"), model, key, price, timeout
        self.needs_key, self.remote = needs_key, parts.hostname not in LOOPBACK
        self.digest = digest or f"{self.url} {model}"
        self._length, self._greedy = "max_tokens", True  # how this model is told the length, and to be greedy

    @cached_property
    def _client(self) -> Any:
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError:
            raise PipelineError(f"endpoints are asked through openai, which is not installed: {INSTALL}") from None
        if self.key and self.needs_key and not self._secret:
            raise PipelineError(f"{self.url} needs a key: set {self.key} in the environment or in a .env file")
        if not all("!" <= character <= "~" for character in self._secret):  # the client's own complaint would show it
            raise PipelineError(
                f"{self.key} holds a space, a line end or another character that no key has: set it again"
            )
        # Whoever runs many questions decides about asking again (PipelineError.passing): one place counts and pays.
        key, http = self._secret or "none", DefaultHttpxClient(follow_redirects=False)
        return OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=0, http_client=http)

    @property
    def _headers(self) -> dict[str, Any]:
        """Without a key: the one that the client wants to have is not sent."""
        from openai import Omit

        return {} if self._secret else {"Authorization": Omit()}

    @cached_property
    def _secret(self) -> str:
        return _environment().get(self.key, "").strip() if self.key else ""

    def without_key(self, text: str) -> str:
        """A message in a line, short, and without the key: some endpoints repeat what they were sent, or its ends."""
        parts = {self._secret[at : at + 4] for at in range(max(1, len(self._secret) - 3))} if self._secret else set()
        hidden = re.sub(
            r"[^\s\"'`<>()\[\]{},;]+",
            lambda word: "(the key)" if any(part in word[0] for part in parts) else word[0],
            text,
        )
        return _shortened(hidden)

    @cached_property
    def model(self) -> str:
        """What the endpoint calls the model.

        Raises:
            PipelineError: If it has not exactly one and none was named.
        """
        if self.named:
            return self.named
        with _told(self):
            found = [each.id for each in self._client.models.list(extra_headers=self._headers)]
        if len(found) != 1:
            raise PipelineError(f"{self.url} has {', '.join(found) or 'no model'}: name the model that is meant")
        return found[0]

    def ask(self, messages: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> Said:
        """Have the model answer a chat, greedily where it can be told to.

        Raises:
            PipelineError: If it does not answer, or not as such an endpoint does.
            ImageError: If a picture cannot be used.
        """
        sent = _with_data_uris(messages)
        model, started, first, pieces, usage, reason = self.model, time.perf_counter(), None, [], None, None
        whole: str | None = None
        with _told(self), self._begin(model, sent, max_new_tokens) as stream:
            if "event-stream" not in stream.response.headers.get("content-type", ""):
                whole = stream.response.read().decode(errors="replace")
            for chunk in stream:
                whole = None  # it streams all the same
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if choice.delta.content:
                        first = first or time.perf_counter()
                        pieces.append(choice.delta.content)
                    reason = choice.finish_reason or reason
            if whole is not None:
                text, usage, reason = _in_one_piece(whole)
                pieces = [text]
        ended = time.perf_counter()
        if reason is None:
            problem = "broke off in the middle of an answer"
            raise PassingError(f"{self.url} {problem}: ask again", f"it {problem}")
        images = sum(part["type"] == "image_url" for each in sent for part in each["content"] if isinstance(part, dict))
        took = Usage(images=images)
        if usage is not None:
            took = Usage(usage.prompt_tokens, usage.completion_tokens, images)
        return Said(
            text="".join(pieces).strip(),
            usage=took,
            first_token=(first or ended) - started,
            total=ended - started,
            cost=None if self.price is None or usage is None else self.price.of(took),
            finished=reason == "stop",
        )

    def _begin(self, model: str, messages: Sequence[Mapping[str, Any]], max_new_tokens: int) -> Any:
        """Ask, in words that the model takes: newer ones of OpenAI's refuse ``max_tokens`` and a temperature."""
        from openai import BadRequestError

        while True:
            how = {self._length: max_new_tokens, **({"temperature": 0} if self._greedy else {})}
            try:
                return self._client.chat.completions.create(
                    model=model,
                    messages=messages,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_headers=self._headers,
                    **how,
                )
            except BadRequestError as error:
                if error.code not in ("unsupported_parameter", "unsupported_value") or error.param not in how:
                    raise
                if error.param == "max_tokens":
                    self._length = "max_completion_tokens"
                elif error.param == "temperature":
                    self._greedy = False
                else:
                    raise

    def prepare(self) -> None:
        """Find out what the model is called: the endpoint must answer."""
        _ = self.model

    def forget(self) -> None:
        """What an endpoint keeps is its own affair."""


class _told:
    """Turns what the client raises into a ``PipelineError`` that names the endpoint and the remedy."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """End, with another error than the client's."""
        import openai

        url, timeout = self.endpoint.url, self.endpoint.timeout
        below = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]  # of openai 2, and of 3
        slow: tuple[type[Exception], ...] = (openai.APITimeoutError, *(each.TimeoutException for each in below))
        away: tuple[type[Exception], ...] = (openai.APIConnectionError, *(each.RequestError for each in below))
        if isinstance(error, slow):
            problem = f"more than {timeout:.0f} seconds"
            raise PassingError(f"{url} took {problem}: try again later", problem) from None
        if isinstance(error, openai.APIStatusError):
            raise self._refusal(error) from None
        if isinstance(error, away):
            problem = self.endpoint.without_key(str(error.__cause__ or error))
            message = f"{url} does not answer ({problem}): check the address, and that the endpoint runs"
            raise PassingError(message, problem) from None
        odd = (openai.OpenAIError, ValueError, AttributeError, TypeError, KeyError)
        if isinstance(error, odd):  # no JSON, or another one
            problem = self.endpoint.without_key(str(error))
            raise PipelineError(
                f"{url} answers, but not as an OpenAI-compatible endpoint does: check the address; most end in /v1 "
                f"({problem})"
            ) from None

    def _refusal(self, error: Any) -> PipelineError:
        code, endpoint, response = error.status_code, self.endpoint, error.response
        problem = f"{code}: {endpoint.without_key(response.text) or response.reason_phrase}"
        refusal, remedy = f"{endpoint.url} refuses ({problem})", "check what the message says"
        if code in (408, 409, 425, 429) or code >= 500:
            asked = response.headers.get("retry-after", "")
            wait = float(asked) if asked.replace(".", "", 1).isdecimal() else None
            return PassingError(f"{refusal}: try again later", problem, retry_after=wait)
        if code in (401, 403):
            remedy = f"set {endpoint.key or 'the key of this endpoint'} to a key that it knows"
        elif code == 404:
            remedy = "check the address (most end in /v1)"
            remedy += f" and the model's name: whether it has a model {endpoint.named!r}" if endpoint.named else ""
        elif 300 <= code < 400:
            remedy = "give the address that it leads to: a key is not sent along"
        return PipelineError(f"{refusal}: {remedy}")


def _in_one_piece(body: str) -> tuple[str, Any, str]:
    """Text, usage and reason to end of an answer of an endpoint that does not stream.

    Raises:
        ValueError: If it is none.
    """
    from openai.types import CompletionUsage

    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        usage = None
        if counted := answer.get("usage"):
            usage = CompletionUsage.construct(**{"prompt_tokens": 0, "completion_tokens": 0, **counted})
        return str(text), usage, choice.get("finish_reason") or "stop"
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(body or "nothing") from None


def _with_data_uris(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chat as OpenAI's API takes it: pictures as text, and no list where there is none."""

    def part(given: Mapping[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return dict(given)
        return {"type": "image_url", "image_url": {"url": data_uri(load_image(given["image"]))}}

    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = [part(each) for each in content]
            content = parts[0]["text"] if [each["type"] for each in parts] == ["text"] else parts
        found.append({"role": message["role"], "content": content})
    return found


def data_uri(picture: Image.Image) -> str:
    """A picture as text, made smaller where it is larger than hosted models look at."""
    picture = picture.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = BytesIO()
    picture.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _environment() -> dict[str, str]:
    try:
        from dotenv import dotenv_values
    except ImportError:
        return dict(os.environ)
    return {**{key: value for key, value in dotenv_values(".env").items() if value}, **os.environ}


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."
