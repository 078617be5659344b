"""What people say of answers: liked or not, what is right, a comment, which is better; and the way back to training.

What it does: keeps ratings and votes as rows that are only ever added, and each picture that they are about once, as a
PNG file that is named by its digest; writes them as the JSONL that ``multimodal train`` and ``multimodal adapt`` read.

What it does not know: the demo, the model.

What always holds: a row that was acknowledged, and its pictures, survive a killed process: pictures are on the disk
before the row is. The last rating of an answer counts; those before it stay in the database.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from sqlalchemy import JSON, Column
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Field, Session, SQLModel, select

from multimodal.store.database import StoreError, open_database
from multimodal.store.keys import now

FILE, PICTURES = "feedback.sqlite", "pictures"
EQUAL = "equal"  # a vote: no answer is better than the others


class Verdict(StrEnum):
    """What a person thinks of an answer."""

    LIKE = "like"
    DISLIKE = "dislike"
    NONE = ""  # nothing, or not any more


class Rating(SQLModel, table=True):
    """What a person said of one answer.

    Attributes:
        at: When, in UTC.
        question: What was asked.
        pictures: Digests of the pictures that it was about, in order.
        answer: What the model said.
        model: Which one, with its adapter.
        verdict: A :class:`Verdict`.
        corrected: What would have been right; empty if the person did not say.
        comment: Whatever else they said.
        follows: Whether earlier turns of a conversation were read, too. The row does not hold them.
    """

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(default_factory=now)
    question: str
    pictures: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    answer: str
    model: str
    verdict: str = Verdict.NONE
    corrected: str = ""
    comment: str = ""
    follows: bool = False


class Vote(SQLModel, table=True):
    """Which of several answers to one question a person found better.

    Attributes:
        at: When, in UTC.
        question: What was asked.
        pictures: Digests of the pictures that it was about, in order.
        answers: What each pipeline said, by its name.
        model: What the pipelines are made of.
        better: Name of a pipeline, or ``EQUAL``.
    """

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(default_factory=now)
    question: str
    pictures: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    answers: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    model: str
    better: str


@dataclass(frozen=True)
class Exported:
    """What became of the feedback.

    Attributes:
        written: Rows in the file.
        left_out: How many answers or votes are not in it, by reason.
    """

    written: int
    left_out: Mapping[str, int]


class Feedback:
    """The feedback of one place.

    Args:
        folder: Holds the database and the pictures; made when it is not there. None takes :func:`data_folder`.

    Raises:
        StoreError: If the database cannot be opened.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or data_folder()
        self._engine = open_database(self.folder / FILE)

    def rate(self, rating: Rating, pictures: Sequence[Image.Image]) -> None:
        """Keep what was said of an answer.

        Args:
            rating: Its ``pictures`` are filled in.
            pictures: What the question was about, in order.

        Raises:
            StoreError: If it cannot be written.
        """
        self._add(rating, pictures)

    def vote(self, vote: Vote, pictures: Sequence[Image.Image]) -> None:
        """Keep a vote; as :meth:`rate`."""
        self._add(vote, pictures)

    def ratings(self) -> list[Rating]:
        """All of them, oldest first."""
        with Session(self._engine) as session:
            return list(session.exec(select(Rating).order_by(Rating.id)))  # type: ignore[arg-type]

    def votes(self) -> list[Vote]:
        """All of them, oldest first."""
        with Session(self._engine) as session:
            return list(session.exec(select(Vote).order_by(Vote.id)))  # type: ignore[arg-type]

    def export(self, output: Path) -> Exported:
        """Write corrected and liked answers as rows to train on.

        Args:
            output: The JSONL file, as ``multimodal.data.read_jsonl`` reads it. Paths of pictures are relative to its
                folder.

        Raises:
            StoreError: If it cannot be written.
        """
        left: dict[str, int] = {}
        rows = []
        for rating in self._last_ratings():
            answer = rating.corrected or (rating.answer if rating.verdict == Verdict.LIKE else "")
            if why := self._unusable(rating) or ("" if answer.strip() else _without_answer(rating)):
                left[why] = left.get(why, 0) + 1
                continue
            rows.append(
                {
                    "id": f"feedback-{rating.id}",
                    "messages": [
                        {"role": "user", "content": _plain(rating.question)},
                        {"role": "assistant", "content": _plain(answer)},
                    ],
                    "images": self._paths(rating.pictures, output),
                    "feedback": "corrected" if rating.corrected else "liked",
                }
            )
        return Exported(_write(output, rows), left)

    def export_preferences(self, output: Path) -> Exported:
        """Write pairs of a better and a worse answer, as preference optimisation (TRL's ``DPOTrainer``) reads them.

        A vote gives a pair with each other answer that differs, a corrected answer one with what it corrects.

        Args:
            output: The JSONL file. Paths of pictures are relative to its folder.

        Raises:
            StoreError: If it cannot be written.
        """
        left: dict[str, int] = {}
        rows = []
        everything: list[Rating | Vote] = [*self._last_ratings(), *self.votes()]
        for said in everything:
            pairs = list(_pairs(said))
            if why := self._unusable(said) or ("" if pairs else "no better and worse answer"):
                left[why] = left.get(why, 0) + 1
                continue
            content = [*({"type": "image"} for _ in said.pictures), {"type": "text", "text": said.question}]
            rows += [
                {
                    "images": self._paths(said.pictures, output),
                    "prompt": [{"role": "user", "content": content}],
                    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": better}]}],
                    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": worse}]}],
                }
                for better, worse in pairs
            ]
        return Exported(_write(output, rows), left)

    def _add(self, row: Rating | Vote, pictures: Sequence[Image.Image]) -> None:
        try:
            row.pictures = [self._keep(picture) for picture in pictures]
            with Session(self._engine) as session:
                session.add(row)
                session.commit()
        except (OSError, SQLAlchemyError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise StoreError(f"{self.folder}: feedback cannot be written: {reason}. Make room, or mend it") from error

    def _keep(self, picture: Image.Image) -> str:
        """Write a picture down, once, and give its digest."""
        digest = picture_digest(picture)
        path = self._path(digest)
        if path.exists():
            return digest
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = BytesIO()
        picture.convert("RGB").save(stream, format="PNG")
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(stream.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(path.parent)
        return digest

    def _path(self, digest: str) -> Path:
        return self.folder / PICTURES / f"{digest}.png"

    def _paths(self, digests: Sequence[str], output: Path) -> list[str]:
        start = output.resolve().parent
        return [os.path.relpath(self._path(digest).resolve(), start) for digest in digests]

    def _last_ratings(self) -> list[Rating]:
        """The last one of each answer; what it does not correct any more, an earlier one may."""
        last: dict[tuple[Any, ...], Rating] = {}
        for rating in self.ratings():
            key = (rating.question, tuple(rating.pictures), rating.answer)
            before = last.pop(key, None)
            if before is not None and before.corrected and not rating.corrected:
                rating.corrected = before.corrected
            last[key] = rating
        return list(last.values())

    def _unusable(self, said: Rating | Vote) -> str:
        """Why nothing can be learnt from it alone; empty if something can."""
        if isinstance(said, Rating) and said.follows:
            return "asked within a conversation"
        if not all(self._path(digest).is_file() for digest in said.pictures):
            return "its picture is gone"
        return ""


def data_folder() -> Path:
    """Where this user's programs keep what they are told."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "multimodal"


def picture_digest(picture: Image.Image) -> str:
    """What tells pictures apart: SHA-256 of their size and pixels, 32 hexadecimal digits of it."""
    picture = picture.convert("RGB")
    return hashlib.sha256(f"{picture.size} ".encode() + picture.tobytes()).hexdigest()[:32]


def _without_answer(rating: Rating) -> str:
    return "disliked, and not corrected" if rating.verdict == Verdict.DISLIKE else "neither liked nor corrected"


def _plain(text: str) -> str:
    """Without what would stand for a picture in a row."""
    return text.replace("<image>", "")


def _pairs(said: Rating | Vote) -> Iterator[tuple[str, str]]:
    """A better and a worse answer, each."""
    if isinstance(said, Rating):
        better, others = said.corrected, [said.answer]
    else:
        better, others = said.answers.get(said.better, ""), list(said.answers.values())
    if better.strip():
        yield from ((better, worse) for worse in dict.fromkeys(others) if worse.strip() != better.strip())


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{output}: cannot be written: {error.strerror}. Name another file") from error
    return len(rows)


def _sync(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
