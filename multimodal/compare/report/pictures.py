"""The pictures of a report: each once, small, as a data-URI, until they would make the file too large to send.

What always holds: a file that is missing, broken or no picture costs its own place only, and says why.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from multimodal.images import load_image

SIDE = 320  # pixels of the longest side: twice the width that it is shown in on a phone
QUALITY = 80
CAP = 25 * 2**20  # characters of all data-URIs; mail servers and chats commonly refuse files above 25 MB
_FULL = "left out: the pictures before it fill the 25 MB that a report may hold"


@dataclass(frozen=True)
class Thumbnail:
    """A picture, or why there is none.

    Attributes:
        uri: ``data:image/jpeg;base64,...``; empty if there is none.
        problem: Why there is none; empty if there is.
    """

    uri: str = ""
    problem: str = ""


class Album:
    """Thumbnails by number, each made once.

    Args:
        cap: At most so many characters in all.
    """

    def __init__(self, cap: int = CAP) -> None:
        self._left = cap
        self._full = False
        self._numbers: dict[Path, int] = {}
        self.thumbnails: list[Thumbnail] = []

    @property
    def left_out(self) -> int:
        """How many pictures had no room any more."""
        return sum(each.problem == _FULL for each in self.thumbnails)

    def number(self, path: Path) -> int:
        """The number of a picture; it is read when it is first asked for."""
        if path not in self._numbers:
            self._numbers[path] = len(self.thumbnails)
            self.thumbnails.append(self._make(path))
        return self._numbers[path]

    def _make(self, path: Path) -> Thumbnail:
        if self._full:  # no smaller ones later on either: a reader should know where pictures end
            return Thumbnail(problem=_FULL)
        try:
            uri = thumbnail(path)
        except ValueError as error:  # ImageError, or a path that no system takes
            return Thumbnail(problem=str(error))
        if len(uri) > self._left:
            self._full = True
            return Thumbnail(problem=_FULL)
        self._left -= len(uri)
        return Thumbnail(uri)


def thumbnail(path: Path) -> str:
    """A small JPEG of a picture file as a data-URI.

    Raises:
        ImageError: If it cannot be read.
    """
    picture = load_image(path)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = BytesIO()
    picture.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
