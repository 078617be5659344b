"""A file of JSON lines that is only ever appended to, and that a kill at any moment leaves usable.

A record is on the way to the disk when :meth:`Journal.append` returns: killing the process then loses nothing. Half a
line, as a kill in the middle of a write leaves it, is not read, and is cut off before the next record is written.
Reading never writes: a report may be made of what another process is adding to.
"""

from __future__ import annotations

import json
import threading
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

BLOCK = 2**16  # bytes that are read at a time from the end


class JournalError(OSError):
    """What is to be kept cannot be written: which file, why, and the remedy."""


class Journal:
    """Records of one kind; used by one process at a time, from any of its threads.

    Args:
        path: The file. It, and the folders above it, are made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._whole = False  # whether half a line at its end was looked for

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first.

        Raises:
            ValueError: If a whole line is no JSON object.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        records = []
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}, line {number}: not a record of ours: move the file away")
            records.append(record)
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            JournalError: If the disk is full, or the file cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            try:
                self._write(line)
            except OSError as error:
                raise JournalError(
                    f"{self.path} cannot be written ({error.strerror or error}): make room or mend it, then start the "
                    "same command again: what was done is kept"
                ) from None

    def _write(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            if not self._whole:
                file.truncate(_end_of_lines(file))
                self._whole = True
            before = file.seek(0, SEEK_END)
            if file.write(line) != len(line):  # a full disk may take a part
                file.truncate(before)
                raise OSError("the disk is full")


def _end_of_lines(file: FileIO) -> int:
    """Where the last whole line ends; an answer's line is short, so a little is read."""
    place = file.seek(0, SEEK_END)
    while place:
        start = max(place - BLOCK, 0)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0
