"""Models that answer a chat: the fused one in this process, and any of transformers'. Others are in ``endpoint.py``.

Without a picture a fused model is its decoder, bit for bit: the pipelines that see nothing need no second one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from multimodal.adapters import AdapterError, digest_of, weights_of
from multimodal.engine import EngineError
from multimodal.images import load_image
from multimodal.model import ModelError, MultiModalModel
from multimodal.pipelines.protocol import PipelineError, Usage

Messages = Sequence[
    Mapping[str, Any]
]  # with content parts ``{"type": "image", "image": ...}``, as transformers has them


@dataclass(frozen=True)
class Said:
    """What a chat model gave back.

    Attributes:
        text: The answer, stripped.
        usage: What it took.
        first_token: Seconds from the request to the first piece of text.
        total: Seconds from the request to its end.
        cost: US dollars, None where no price is known.
        confidence: The chance that the answer is right; None where the model does not say.
        finished: Whether it came to its own end.
    """

    text: str
    usage: Usage
    first_token: float
    total: float
    cost: float | None = 0.0
    confidence: float | None = None
    finished: bool = True


class Chat(Protocol):
    """A model that answers a chat; it may be asked from several threads at once.

    Attributes:
        step: What an answer's step is called.
        digest: Changes when its answers may change.
        remote: Whether what is asked leaves this machine.
    """

    step: str
    remote: bool

    @property
    def digest(self) -> str:
        """Of all that decides the answers."""
        ...

    def ask(self, messages: Messages, *, max_new_tokens: int) -> Said:
        """Answer greedily.

        Raises:
            PipelineError: If it cannot.
            ImageError: If a picture cannot be used.
        """
        ...

    def prepare(self) -> None:
        """Load what answering needs."""
        ...

    def forget(self) -> None:
        """Keep nothing of earlier questions."""
        ...


class FusedChat:
    """A fused model.

    Args:
        model: The model.
        adapter: Which of its adapters answers, None for none.
    """

    step, remote = "model", False

    def __init__(self, model: MultiModalModel, *, adapter: str | None = None) -> None:
        self.model, self.adapter = model, adapter

    @cached_property
    def digest(self) -> str:
        """Of its weights, its precision and its adapter."""
        model, digest = self.model, hashlib.sha256()
        if self.adapter is not None:
            added = weights_of(model.model, str(model.switch.inner_name(self.adapter)))
            for _, pair in sorted(added.pairs.items()):
                for part in pair:
                    digest.update(part.detach().float().cpu().numpy().tobytes())
        run = f"{type(model.engine.runner).__name__} {model.precision} {model.model.dtype}"
        return f"{digest_of(model.model)[:16]} {digest.hexdigest()[:16]} {run}"

    def ask(self, messages: Messages, *, max_new_tokens: int) -> Said:
        """Answer greedily."""
        try:
            with self.model.reply(messages, max_new_tokens=max_new_tokens, adapter=self.adapter) as stream:
                for _ in stream:
                    pass
        except (ModelError, AdapterError, EngineError) as error:
            raise PipelineError(str(error)) from error
        answer = stream.answer
        assert answer is not None  # an error of the model was raised by the loop
        return Said(
            answer.text,
            Usage(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.images),
            first_token=answer.timings.first_token,
            total=answer.timings.total,
            confidence=answer.confidence,
            finished=answer.finished,
        )

    def prepare(self) -> None:
        """Pack the weights."""
        self.model.engine.prepare()

    def forget(self) -> None:
        """Keep no picture."""
        self.model.forget()


class TransformersChat:
    """Any model that transformers' ``image-text-to-text`` pipeline runs, one question at a time.

    Args:
        name: A folder or a hub id.
    """

    step, remote = "model", False

    def __init__(self, name: str) -> None:
        self.name = self.digest = name

    @cached_property
    def _pipeline(self) -> Any:
        from transformers import pipeline

        try:
            return pipeline("image-text-to-text", model=self.name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PipelineError(
                f"the model {self.name!r} cannot be loaded: {reason}: give a fused model, a folder or hub id that "
                "transformers' image-text-to-text pipeline runs"
            ) from error

    def ask(self, messages: Messages, *, max_new_tokens: int) -> Said:
        """Answer greedily; the first token is known only with the last."""
        pipeline = self._pipeline
        chat = [
            {
                **message,
                "content": [
                    {"type": "image", "image": load_image(part["image"])} if part["type"] == "image" else dict(part)
                    for part in _parts(message["content"])
                ],
            }
            for message in messages
        ]
        images = sum(part["type"] == "image" for message in chat for part in message["content"])
        started = time.perf_counter()
        said = pipeline(
            text=chat,
            return_full_text=False,
            generate_kwargs={"max_new_tokens": max_new_tokens, "do_sample": False},
        )
        took = time.perf_counter() - started
        text = str(said[0]["generated_text"]).strip()
        written = len(pipeline.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Said(text, Usage(0, written, images), first_token=took, total=took, finished=written < max_new_tokens)

    def prepare(self) -> None:
        """Load the model."""
        _ = self._pipeline

    def forget(self) -> None:
        """It keeps nothing."""


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
