"""A pipeline of parts: what is read off the pictures, what the prompt makes of it, and which model answers.

All that come with the project are of this kind; one of a person's own may be anything that has the protocol's face.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from multimodal.pipelines.chats import Chat
from multimodal.pipelines.prompts import ReadingPrompt
from multimodal.pipelines.protocol import Answer, Question, Step


class ComposedPipeline:
    """Reads the pictures, fills in the prompt, asks the model.

    Args:
        name: Of the pipeline.
        chat: The model that answers.
        prompt: What it is told; None is the question alone.
        sees: Whether it gets the pictures.

    Attributes:
        digest: Changes with each part.
        remote: Whether what is asked leaves this machine.
        uses_pictures: Whether pictures have a part in its answers.
    """

    def __init__(self, name: str, chat: Chat, *, prompt: ReadingPrompt | None = None, sees: bool) -> None:
        self.name, self.chat, self.prompt, self.sees = name, chat, prompt, sees
        self.remote, self.uses_pictures = chat.remote, sees or prompt is not None
        self._met: set[tuple[str, str]] = set()  # readings of pictures that this pipeline has paid for

    @property
    def digest(self) -> str:
        """Of the model, the prompt, and whether pictures are sent."""
        return " ".join([self.chat.digest, "" if self.prompt is None else self.prompt.digest, str(self.sees)])

    def answer(self, question: Question) -> Answer:
        """Answer a question.

        What was read off a picture takes its time with the picture's first question to this pipeline, whoever had it
        read before, and none with later ones, as it is with the fused model's own cache of pictures.

        Raises:
            PipelineError: If the model does not answer.
            ImageError: If a picture cannot be used.
        """
        text = question.text
        steps: tuple[Step, ...] = ()
        if self.prompt is not None:
            text, steps = self.prompt.of(question.text, question.images)
            steps = tuple(replace(step, cached=_reading(step) in self._met) for step in steps)
        before = sum(step.seconds for step in steps if not step.cached)
        said = self.chat.ask(self._messages(question, text), max_new_tokens=question.max_new_tokens)
        self._met.update(map(_reading, steps))  # not before: after a failure, asking again is still the first time
        return Answer(
            said.text,
            (*steps, Step(self.chat.step, said.total, text)),
            said.usage,
            first_token=before + said.first_token,
            total=before + said.total,
            cost=said.cost,
            confidence=said.confidence,
            finished=said.finished,
        )

    def prepare(self) -> None:
        """Load what answering needs, so that no question waits for it."""
        for reader in () if self.prompt is None else self.prompt.readers:
            reader.prepare()
        self.chat.prepare()

    def forget(self) -> None:
        """Keep nothing: the next question about a picture is a first one."""
        self._met.clear()
        self.chat.forget()

    def _messages(self, question: Question, text: str) -> list[dict[str, Any]]:
        """What was said before, then the text with its pictures in front."""
        messages: list[dict[str, Any]] = []
        for turn in question.history:
            messages += [
                {"role": "user", "content": self._content(turn.question, turn.images)},
                {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
            ]
        return [*messages, {"role": "user", "content": self._content(text, question.images)}]

    def _content(self, text: str, images: tuple[Any, ...]) -> list[dict[str, Any]]:
        shown = [{"type": "image", "image": image} for image in images] if self.sees else []
        return [*shown, {"type": "text", "text": text}]


def _reading(step: Step) -> tuple[str, str]:
    """What was read, of which picture."""
    return step.name, step.details["picture"]
