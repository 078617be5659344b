"""Distillation: a stronger model answers questions about a person's own pictures, and its answers become training data.

The teacher is a fused model of ours, any model of transformers' ``image-text-to-text`` pipeline, or a model behind an
OpenAI-compatible endpoint, asked as the pipelines ask (``multimodal.pipelines``). What always holds: each answer is on
disk before the next question is asked, so a labelling that was stopped, or killed, goes on without asking anything
twice; a picture leaves this machine only for an endpoint that was named; nothing is left out silently.

The file is what ``multimodal.data.read_jsonl`` reads: its learner sees the question, not the instruction that told the
teacher how to answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from multimodal.data import DataError
from multimodal.images import ImageError, load_image
from multimodal.journal import Journal
from multimodal.model import MultiModalModel, is_fused
from multimodal.pipelines.chats import Chat, FusedChat, TransformersChat
from multimodal.pipelines.endpoint import Endpoint, PassingError
from multimodal.pipelines.patience import patiently
from multimodal.pipelines.protocol import PipelineError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
MAX_NEW_TOKENS = 64
TRIES = 5
KEY = "OPENAI_API_KEY"


class TeacherError(RuntimeError):
    """A teacher that cannot be used; the message names it and the remedy."""


class Teacher:
    """Answers a question about a picture.

    Args:
        name: Stands in the file beside each answer.
        chat: The model.
        max_new_tokens: Length limit of an answer.
    """

    def __init__(self, name: str, chat: Chat, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        self.name, self.chat, self.max_new_tokens = name, chat, max_new_tokens

    def __call__(self, question: str, picture: Image.Image) -> str:
        """The answer, stripped; it may be empty. An endpoint that does not answer is asked again, after a while.

        Raises:
            TeacherError: If it refuses, or does not answer at all.
        """
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        try:
            return patiently(lambda: self.chat.ask(messages, max_new_tokens=self.max_new_tokens), tries=TRIES).text
        except PassingError as error:
            raise TeacherError(
                f"{self.name} did not answer in {TRIES} tries ({error.problem}): check the address and the network; "
                "the same command then goes on where it stopped"
            ) from None
        except PipelineError as error:
            raise TeacherError(str(error)) from error


def teacher_of(name: str, *, model: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> Teacher:
    """Find out what kind of teacher a name means, and load it.

    Args:
        name: ``"embedded"`` or another fused model, a folder or hub id for the pipeline, or an endpoint's URL. An
            endpoint is sent the key in ``OPENAI_API_KEY``, if there is one.
        model: The model's name at an endpoint.
        max_new_tokens: Length limit of an answer.

    Raises:
        TeacherError: If there is no such teacher.
        ModelError: If it is a fused model that cannot be loaded.
    """
    if name.startswith(("http://", "https://")):
        if not model:
            raise TeacherError(f"{name} may have many models: name one with --teacher-model")
        try:
            endpoint = Endpoint(name, model=model, key=KEY, needs_key=False)
        except PipelineError as error:
            raise TeacherError(str(error)) from None
        return Teacher(f"{model} at {endpoint.url}", endpoint, max_new_tokens=max_new_tokens)
    if "://" in name:
        raise TeacherError(f"{name!r} is not the URL of an endpoint: it begins with https:// or http://")
    if model is not None:
        raise TeacherError(f"--teacher-model belongs to an endpoint's URL, and {name!r} is none")
    if is_fused(name):
        return Teacher(name, FusedChat(MultiModalModel.from_pretrained(name)), max_new_tokens=max_new_tokens)
    chat = TransformersChat(name)
    try:
        chat.prepare()
    except PipelineError as error:
        raise TeacherError(f"{error}, or the URL of an OpenAI-compatible endpoint") from error
    return Teacher(name, chat, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class Labelling:
    """What a call did.

    Attributes:
        written: Answers that were added to the file.
        there: Answers that an earlier call had written.
        bad: Pictures that cannot be used, and questions that got no answer.
    """

    written: int
    there: int
    bad: tuple[DataError, ...]


def pictures_in(folder: Path) -> list[Path]:
    """All pictures in a folder and the folders in it, by their names' ends, in the order of their names.

    Raises:
        DataError: If there is none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES and path.is_file() and not path.name.startswith(".")
    )
    if not found:
        ends = ", ".join(PICTURES)
        raise DataError("no picture is here", file=folder, remedy=f"Give a folder with files that end in {ends}")
    return found


def label(
    pictures: Sequence[Path],
    questions: Sequence[str],
    teacher: Teacher,
    output: Path,
    *,
    instruction: str = "",
    progress: bool = True,
) -> Labelling:
    """Ask a teacher every question about every picture, and append its answers to a JSONL file.

    Args:
        pictures: Their paths.
        questions: What to ask about each.
        teacher: Who answers.
        output: The file; what it has already is not asked again.
        instruction: Told to the teacher in front of each question, and not written down: how to answer.
        progress: Show a bar.

    Raises:
        TeacherError: If the teacher fails.
        ValueError: If the file holds answers of another teacher, or is no file of this kind.
        JournalError: If the disk is full.
    """
    journal = Journal(output)
    done = _done(journal, teacher.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()  # where that cannot be written, nothing is asked
    bad: list[DataError] = []
    written = there = 0
    with tqdm(total=len(pictures) * len(questions), disable=not progress) as bar:
        for path in pictures:
            named = Path(os.path.relpath(path, output.parent)).as_posix()
            left = [question for question in questions if (named, question) not in done]
            there += len(questions) - len(left)
            bar.update(len(questions) - len(left))
            try:
                picture = load_image(path) if left else None
            except ImageError as error:
                bad.append(DataError(f"this picture {error.problem}", file=path, remedy=error.remedy))
                bar.update(len(left))
                continue
            for question in left:
                assert picture is not None
                bar.set_description(path.name[:24])
                answer = teacher(f"{instruction}\n{question}" if instruction else question, picture)
                if answer:
                    journal.append(_record(named, question, answer, teacher.name))
                    written += 1
                else:
                    bad.append(DataError(f"no answer to {question!r}", file=path, remedy="Ask it in other words"))
                bar.update()
    return Labelling(written, there, tuple(bad))


def _record(picture: str, question: str, answer: str, teacher: str) -> dict[str, Any]:
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "teacher": teacher}


def _done(journal: Journal, teacher: str) -> set[tuple[str, str]]:
    """Pictures and questions that the file has."""
    done = set()
    for number, record in enumerate(journal.read(), start=1):
        try:
            picture, text = record["messages"][0]["content"]
            before = record["teacher"]
            done.add((picture["path"], text["text"]))
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(
                f"{journal.path}, line {number}: not a line of this command: give another output file"
            ) from None
        if before != teacher:
            raise ValueError(f"{journal.path} holds answers of another teacher ({before}): give another output file")
    return done
