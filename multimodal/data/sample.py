"""One question about pictures with its answer, and the error that every reader raises.

A reader turns a published layout or a user's own file into a plain list of `Sample`. It opens no picture: it only
makes sure that the file is there, so that a missing picture is found before training and not in the middle of it.
What always holds: no row disappears. A row that can't be read either raises a `DataError` or, where the caller passes
a list as `skip_bad`, puts that error into the list.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32


@dataclass(frozen=True)
class Box:
    """Where something lies in a picture: what a person would point at.

    Attributes:
        label: What lies there, as the publisher names it.
        left: Left edge, as a share of the picture's width, 0 to 1.
        top: Upper edge, as a share of the picture's height, 0 to 1.
        width: As a share of the picture's width.
        height: As a share of the picture's height.
        image: Which of the sample's pictures, counted from 0.
    """

    label: str
    left: float
    top: float
    width: float
    height: float
    image: int = 0


@dataclass(frozen=True)
class Sample:
    """A question, its answer and the pictures that it is about.

    Attributes:
        question: What is asked, in plain words, without any image placeholder.
        answer: What the model should say. Empty only where the publisher left it empty.
        images: The pictures, in the order in which they are shown. They stand before the question.
        id: Names the sample in messages and reports; the same in every run.
        meta: What the source says beside it (kind of answer, language, class, ...), as text.
        boxes: Where to look for what is asked about; empty where the source doesn't say.
    """

    question: str
    answer: str
    images: tuple[Path, ...] = ()
    id: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    boxes: tuple[Box, ...] = ()


class DataError(ValueError):
    """A data file or one of its rows can't be used.

    Attributes:
        file: The file or folder that is at fault.
        line: Its line, counted from 1, or `None` where the file as a whole is meant.
        reason: What is wrong.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, *, file: Path, line: int | None = None, remedy: str) -> None:
        super().__init__(f"{file}{f', line {line}' if line else ''}: {reason}. {remedy}.")
        self.reason, self.file, self.line, self.remedy = reason, file, line, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(DataError, file=self.file, line=self.line, remedy=self.remedy), (self.reason,)


def report_bad(errors: Sequence[DataError]) -> str:
    """Counts and lists what `skip_bad` collected, for a command to print: nothing is left out silently.

    Returns:
        A line with the number, then one for each: file, line and reason. Empty where there are no errors.
    """
    if not errors:
        return ""
    lines = [f"{error.file}{f', line {error.line}' if error.line else ''}: {error.reason}" for error in errors]
    return "\n  ".join([f"{len(errors):,} could not be read:", *lines])


class RowError(ValueError):
    """What is wrong with a row, raised where neither its file nor its line is known; `row` adds them."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@contextmanager
def row(file: Path, line: int | None, skip_bad: list[DataError] | None) -> Iterator[None]:
    """Gives a `RowError` raised inside its file and line, then raises it as a `DataError` or keeps it in the list."""
    try:
        yield
    except RowError as error:
        named = DataError(error.reason, file=file, line=line, remedy=error.remedy)
        if skip_bad is None:
            raise named from None
        skip_bad.append(named)


def read_lines(path: Path, *, remedy: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their ends, one at a time, so that its size doesn't matter.

    A line ends at a line feed alone: other separators of Unicode stand inside strings.

    Args:
        path: The file, with or without a byte order mark.
        remedy: What to tell the user where the file isn't there.

    Raises:
        DataError: There is no such file, or a line isn't UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                try:
                    yield content.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                    raise DataError(reason, file=path, line=number, remedy="Save it as UTF-8") from None
    except OSError as error:
        raise DataError(error.strerror or str(error), file=path, remedy=remedy) from None


def read_text(path: Path, *, remedy: str) -> str:
    """Reads a UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        remedy: What to tell the user where the file isn't there.

    Raises:
        DataError: There is no such file, or it isn't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise DataError(reason, file=path, remedy="Save it as UTF-8") from None
    except OSError as error:
        raise DataError(error.strerror or str(error), file=path, remedy=remedy) from None


def picture(path: Path, *, remedy: str) -> Path:
    """Returns the path of a picture that is there.

    Raises:
        RowError: No file stands at this path.
    """
    if not path.is_file():
        raise RowError(f"the picture {path} is missing", remedy)
    return path


def local_picture(source: str, folder: Path) -> Path:
    """Returns the file of a picture that a user's file names, relative to a folder; it must be on this machine.

    Raises:
        RowError: It is a URL, or no file stands at this path.
    """
    if source.startswith(("http://", "https://", "file://", "data:")):
        raise RowError(f"the picture {source[:60]!r} is not a path", "Save the picture as a file and give its path")
    remedy = "Put it there, correct the path, or give the folder that paths are relative to (image_folder)"
    return picture(folder / source, remedy=remedy)


def tidy(text: str) -> str:
    """Removes white space at both ends and turns every run of it inside into one space."""
    return " ".join(text.split())


def choose(phrasings: Sequence[str], *, key: str, seed: int) -> str:
    """Picks a phrasing that depends on key and seed alone: the same on every machine and in every run."""
    return phrasings[crc32(f"{seed}/{key}".encode()) % len(phrasings)]
