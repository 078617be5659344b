"""One question about pictures with its answer, and the error that every reader raises.

A reader turns a published layout or a user's own file into a plain list of `Sample`. It opens no picture: it only
makes sure that the file is there, so that a missing picture is found before training and not in the middle of it.
What always holds: no row disappears. A row that can't be read either raises a `DataError` or, where the caller passes
a list as `skip_bad`, puts that error into the list.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32


@dataclass(frozen=True)
class Sample:
    """A question, its answer and the pictures that it is about.

    Attributes:
        question: What is asked, in plain words, without any image placeholder.
        answer: What the model should say. Empty only where the publisher left it empty.
        images: The pictures, in the order in which they are shown. They stand before the question.
        id: Names the sample in messages and reports; the same in every run.
        meta: What the source says beside it (kind of answer, language, class, ...), as text.
    """

    question: str
    answer: str
    images: tuple[Path, ...] = ()
    id: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


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


class RowError(ValueError):
    """What is wrong with a row, raised where neither its file nor its line is known; `row` adds them."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@contextmanager
def row(file: Path, line: int, skip_bad: list[DataError] | None) -> Iterator[None]:
    """Gives a `RowError` raised inside its file and line, then raises it as a `DataError` or keeps it in the list."""
    try:
        yield
    except RowError as error:
        named = DataError(error.reason, file=file, line=line, remedy=error.remedy)
        if skip_bad is None:
            raise named from None
        skip_bad.append(named)


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


def tidy(text: str) -> str:
    """Removes white space at both ends and turns every run of it inside into one space."""
    return " ".join(text.split())


def choose(phrasings: Sequence[str], *, key: str, seed: int) -> str:
    """Picks a phrasing that depends on key and seed alone: the same on every machine and in every run."""
    return phrasings[crc32(f"{seed}/{key}".encode()) % len(phrasings)]
