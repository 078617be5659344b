"""Pictures to ask about, wherever they lie, in shards that are the same in every run.

A folder of pictures, Parquet, JSONL and WebDataset's tar files are read. A shard is known by its number, and says where
its rows are; reading happens where it is answered. What cannot be read becomes a row that says so.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow import parquet

from multimodal.images import Encoded

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
READ = "a folder of pictures, or .parquet, .jsonl or .tar files"


class BatchError(ValueError):
    """A batch that cannot be run: what is wrong, and the remedy."""


@dataclass(frozen=True)
class Row:
    """Something to answer.

    Attributes:
        id: What the answer is found by: a path in the folder, or a file and a number or key in it.
        picture: A file, the encoded bytes, or None.
        question: Its own, if it has one.
        problem: Why it cannot be answered, if so.
    """

    id: str
    picture: Path | Encoded | None = None
    question: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Shard:
    """Where some rows are.

    Attributes:
        number: Which one this is, from 0.
        path: The folder or file.
        files: Of a folder: the pictures, relative to it.
        start: Of a Parquet file the first row, of JSONL the first line's number.
        stop: The one after the last.
        offset: Of JSONL: the byte at which the first line begins.
    """

    number: int
    path: str
    files: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    offset: int = 0


def shards_of(source: Path, *, rows: int) -> list[Shard]:
    """Cut what there is to answer into shards; the same files give the same shards.

    Args:
        source: A folder of pictures, or a Parquet, JSONL or tar file, or a folder of such files of one kind.
        rows: In a shard, at most; a tar file is one, however many it has.

    Raises:
        BatchError: If there is nothing to read, or files of several kinds.
    """
    if not source.exists():
        raise BatchError(f"{source} is not there: give {READ}")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if _counts(path, source))
    kinds = {_kind(path) for path in files} - {None}
    if len(kinds) != 1:
        found = f"has files of several kinds ({', '.join(sorted(map(str, kinds)))})" if kinds else "has nothing to read"
        raise BatchError(f"{source} {found}: give {READ}")
    (kind,) = map(str, kinds)
    files = [path for path in files if _kind(path) == kind]
    pieces: list[dict[str, Any]]
    if kind == "pictures":
        root = source.parent if source.is_file() else source
        names = [path.relative_to(root).as_posix() for path in files]
        pieces = [{"path": str(root), "files": tuple(names[at : at + rows])} for at in range(0, len(names), rows)]
    else:
        pieces = [{"path": str(path), **piece} for path in files for piece in _CUTTERS[kind](path, rows)]
    return [Shard(number, **piece) for number, piece in enumerate(pieces)]


def rows_of(shard: Shard) -> Iterator[Row]:
    """Read a shard; where its file is broken, the last row says so."""
    path = Path(shard.path)
    if shard.files:
        yield from (Row(name, path / name) for name in shard.files)
        return
    try:
        yield from _READERS[str(_kind(path))](path, shard)
    except (OSError, ValueError, tarfile.TarError) as error:  # pyarrow's errors are among them
        yield Row(path.name, problem=f"{path.name} cannot be read any further: {error}")


def _counts(path: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
    return path.is_file() and not hidden


def _kind(path: Path) -> str | None:
    end = path.suffix.lower()
    return "pictures" if end in PICTURES else end[1:] if end[1:] in _READERS else None


# ---- Parquet: a column image with bytes, paths, or both as Hugging Face's data sets have them; maybe one question


def _cut_parquet(path: Path, rows: int) -> Iterator[dict[str, Any]]:
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise BatchError(f"{path}: not a Parquet file ({error}): give {READ}") from None
    with file:
        if "image" not in file.schema_arrow.names:
            raise BatchError(f"{path} has no column 'image': rename the one that holds pictures' bytes or paths")
        count = file.metadata.num_rows
    for start in range(0, count, rows):
        yield {"start": start, "stop": min(start + rows, count)}


def _read_parquet(path: Path, shard: Shard) -> Iterator[Row]:
    with parquet.ParquetFile(path) as file:
        wanted = [name for name in ("image", "question") if name in file.schema_arrow.names]
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            start, stop = max(shard.start - first, 0), min(shard.stop - first, count)
            if start < stop:
                table = file.read_row_group(group, columns=wanted).slice(start, stop - start)
                for number, said in enumerate(table.to_pylist(), start=first + start):
                    yield _row(f"{path.name}:{number}", said, folder=path.parent)
            first += count


# ---- JSONL: {"image": PATH, "question": TEXT}


def _cut_jsonl(path: Path, rows: int) -> Iterator[dict[str, Any]]:
    starts, number, offset = [(0, 0)], 0, 0
    with path.open("rb") as file:
        for line in file:
            number, offset = number + 1, offset + len(line)
            if number % rows == 0:
                starts.append((number, offset))
    if starts[-1][0] < number:
        starts.append((number, offset))
    for (start, offset), (stop, _) in pairwise(starts):
        yield {"start": start, "stop": stop, "offset": offset}


def _read_jsonl(path: Path, shard: Shard) -> Iterator[Row]:
    with path.open("rb") as file:
        file.seek(shard.offset)
        for number in range(shard.start, shard.stop):
            line = file.readline()
            name = f"{path.name}:{number + 1}"
            if not line.strip():
                continue
            try:
                said = json.loads(line)
            except ValueError as error:
                yield Row(name, problem=f"the line is not JSON: {error}")
                continue
            if isinstance(said, dict):
                yield _row(name, said, folder=path.parent)
            else:
                yield Row(name, problem="the line is not a JSON object: give one with image and question")


# ---- WebDataset: KEY.jpg, and KEY.json with a question, next to each other in a tar file


def _cut_tar(path: Path, rows: int) -> Iterator[dict[str, Any]]:
    yield {}


def _read_tar(path: Path, shard: Shard) -> Iterator[Row]:
    key = ""
    parts: dict[str, bytes] = {}
    with tarfile.open(path, mode="r|*") as archive:  # as a stream, in which nothing is read twice
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or name.name.startswith("."):
                continue
            stem, _, end = name.name.partition(".")
            now = str(name.parent / stem)
            if now != key and parts:
                yield _sample(key, parts)
                parts = {}
            key = now
            content = archive.extractfile(member)
            assert content is not None  # it is a file
            parts[end.lower()] = content.read()
    if parts:
        yield _sample(key, parts)


def _sample(key: str, parts: dict[str, bytes]) -> Row:
    picture = next((data for end, data in parts.items() if f".{end}" in PICTURES), None)
    try:
        said = json.loads(parts.get("json", b"{}"))
    except ValueError as error:
        return Row(key, problem=f"{key}.json is not JSON: {error}")
    if picture is None:
        return Row(key, problem=f"there is no picture beside {key}: give {key}.jpg or the like")
    return _row(key, {"image": picture, "question": said.get("question")}, folder=Path())


def _row(name: str, said: dict[str, Any], *, folder: Path) -> Row:
    image, question = said.get("image"), said.get("question")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if question is not None and not isinstance(question, str):
        return Row(name, problem="the question is not text")
    if isinstance(image, bytes):
        return Row(name, Encoded(name, image), question)
    if isinstance(image, str):
        return Row(name, folder / image, question)
    return Row(name, problem="there is no picture: image has to hold its bytes or its path")


_CUTTERS: dict[str, Callable[[Path, int], Iterator[dict[str, Any]]]] = {
    "parquet": _cut_parquet,
    "jsonl": _cut_jsonl,
    "tar": _cut_tar,
}
_READERS: dict[str, Callable[[Path, Shard], Iterator[Row]]] = {
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "tar": _read_tar,
}
