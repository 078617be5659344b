"""A file of JSON lines that is only ever appended to, and that a kill at any moment leaves usable.

A record is on the way to the disk when :meth:`Journal.append` returns: killing the process then loses nothing. Half a
line, as a kill in the middle of a write leaves it, is cut off when the file is read next.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any


class Journal:
    """Records of one kind; used by one process at a time, from any of its threads.

    Args:
        path: The file. It, and the folders above it, are made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first.

        Raises:
            ValueError: If a whole line is no JSON object.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("ab") as file:
                file.truncate(len(whole))
        records = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
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
            OSError: If the disk is full, or the file cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(line) != len(line):  # a full disk may take a part
                    file.truncate(before)
                    raise OSError(f"{self.path}: the disk is full: make room, then start the same command again")
