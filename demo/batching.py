"""Batches: the same question about every picture of some files and zip files, and the table that comes of it.

What it does: finds the pictures, asks about one after another, and writes the table as CSV and JSONL.

What it does not know: the page.

What always holds: nothing is unpacked onto the disk, so no name in a zip file leads anywhere; sizes are those of the
bytes that come out, whatever a zip file says of itself; a picture that cannot be used is a row with its error.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from demo.asking import Asking
from demo.shared import DECODE_SECONDS, reason
from multimodal.images import MAX_BYTES, Encoded, ImageError, load_image, printable

MOST_PICTURES = 1000
MOST_UNPACKED = 2 * 2**30  # bytes that may come out of all zip files of a batch
LARGEST_LISTING = 4 * 2**20  # bytes; a file's entry takes about a hundred
CHUNK = 2**16
# What systems leave in folders beside the pictures; names that begin with a dot are theirs, too.
LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"})
# How the end of a zip file begins, and what is read of it: the number of entries, and bytes of their listing.
END, END_SIZE = b"PK\x05\x06", 22


class BatchError(ValueError):
    """Files that make no batch: which, why, and the remedy."""


@dataclass(frozen=True)
class Entry:
    """A file that may hold a picture.

    Attributes:
        name: Its path in the folder or zip file, safe to show.
        read: Gives its bytes.
    """

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Row:
    """What came of one picture.

    Attributes:
        picture: Its name.
        question: What was asked.
        answer: Empty if there is none.
        confidence: Of the answer, 0 to 1; None if there is none.
        seconds: From the question to the end of the answer; None if there is none.
        error: Why there is none.
    """

    picture: str
    question: str
    answer: str = ""
    confidence: float | None = None
    seconds: float | None = None
    error: str = ""


class Batch:
    """The entries of some files, which are open until it is closed; use it as a context manager.

    Args:
        paths: Pictures and zip files of pictures, folders in them included.
        most: How many pictures there may be.
        unpacked: How many bytes may come out of the zip files.

    Raises:
        BatchError: If a zip file is broken, there are too many pictures, or none.
    """

    def __init__(self, paths: Sequence[Path], *, most: int = MOST_PICTURES, unpacked: int = MOST_UNPACKED) -> None:
        self._left, self._allowed = unpacked, unpacked
        self._open = ExitStack()
        self.entries: list[Entry] = []
        try:
            for path in paths:
                self.entries += self._of_zip(path) if is_zip(path) else self._of_file(path)
                if len(self.entries) > most:
                    raise BatchError(f"There are more than {most:,} files: make batches of at most so many.")
            if not self.entries:
                raise BatchError("There is no picture in these files: choose others.")
        except FileNotFoundError as error:  # it was swept up
            self._open.close()
            raise BatchError(f"{printable(Path(error.filename).name)} is here no more: choose it again.") from None
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Batch:
        """Use as a context manager: files are closed when the block is left."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        self._open.close()

    def _of_file(self, path: Path) -> list[Entry]:
        return [] if _is_litter(path.name) else [Entry(printable(path.name), lambda: _limited(path.open("rb")))]

    def _of_zip(self, path: Path) -> list[Entry]:
        name = printable(path.name)
        try:
            check_listing(path)
            archive = self._open.enter_context(zipfile.ZipFile(path))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise BatchError(f"{name} cannot be read as a zip file ({error}): pack it again.") from None
        return [
            Entry(shown_name(info.filename), partial(self._unpack, archive, info))
            for info in archive.infolist()
            if not info.is_dir() and not _is_litter(info.filename)
        ]

    def _unpack(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
        name = f"file '{shown_name(info.filename)}'"
        if self._left <= 0:
            problem = f"is not unpacked: over {self._allowed:,} bytes came out of the zip files already"
            raise ImageError(name, problem, "Make smaller batches")
        try:
            data = _limited(archive.open(info))
        except RuntimeError as error:  # encrypted
            raise ImageError(name, f"cannot be unpacked ({error})", "Pack it without a password") from None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, ValueError) as error:
            raise ImageError(name, f"cannot be unpacked ({error})", "Pack it again") from None
        self._left -= len(data)
        return data


def is_zip(path: Path) -> bool:
    """Whether a file is meant as a zip file: by its name, or its first bytes."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".zip" or file.read(4) == b"PK\x03\x04"


def check_listing(path: Path) -> None:
    """Look how long the listing of a zip file is before all of it is read into memory.

    Raises:
        BatchError: If it is longer than that of a thousand pictures can be.
        zipfile.BadZipFile: If it has none.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(size - END_SIZE - 2**16, 0))  # a comment of at most so many bytes may follow
        tail = file.read()
    place = tail.rfind(END)
    if place < 0 or len(tail) < place + END_SIZE:
        raise zipfile.BadZipFile("it has no listing of its files")
    (length,) = struct.unpack_from("<I", tail, place + 12)
    if length > LARGEST_LISTING:
        raise BatchError(f"{printable(path.name)} lists too many files: make batches of at most {MOST_PICTURES:,}.")


def shown_name(name: str) -> str:
    """A path in a zip file, as it may be shown: no way up or to a root, no control characters."""
    return printable("/".join(_parts(name)) or "?", 120)


def run(
    asking: Asking, session: str, number: int, entries: Sequence[Entry], question: str, *, max_new_tokens: int
) -> Iterator[Row | None]:
    """Ask about one picture after another.

    Args:
        asking: Has the model.
        session: Who asks, as `Asking` has it.
        number: From ``Asking.new_question``: when the session asks something else or stops, the batch ends.
        entries: The pictures.
        question: What to ask about each.
        max_new_tokens: Of each answer at most.

    Yields:
        A row for each entry, in order; None while the model is still loading.

    Raises:
        ModelError: If there is no model.
    """
    while asking.model_within(seconds=1) is None:
        if not asking.wants(session, number):
            return
        yield None
    for entry in entries:
        if not asking.wants(session, number):
            return
        try:
            picture = load_image(Encoded(f"file '{entry.name}'", entry.read()), max_seconds=DECODE_SECONDS)
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            steps = list(asking.ask(session, number, chat, max_new_tokens=max_new_tokens, trace=False))
        except Exception as error:
            yield Row(entry.name, question, error=reason(error))
            continue
        answer = steps[-1].answer if steps else None
        if answer is None:  # stopped
            return
        yield Row(entry.name, question, answer.text, round(answer.confidence, 4), round(answer.timings.total, 3))


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV; what a spreadsheet would take for a formula gets an apostrophe in front."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        writer.writerow([_cell(value) for value in asdict(row).values()])
    return stream.getvalue()


def to_jsonl(rows: Sequence[Row]) -> str:
    """The table as JSON lines."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _cell(value: str | float | None) -> str | float | None:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _is_litter(name: str) -> bool:
    return any(part in LITTER or part.startswith(".") for part in _parts(name))


def _parts(name: str) -> list[str]:
    return [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]


def _limited(stream: IO[bytes]) -> bytes:
    """What a stream holds, no farther than `load_image` takes it: one byte more tells it that it is too much."""
    with stream:
        chunks, left = [], MAX_BYTES + 1
        while left > 0 and (chunk := stream.read(min(CHUNK, left))):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)
