"""Decoding under a deadline: `load_image` in a process of its own, which is killed when a picture takes too long.

A small file may take hours: a progressive JPEG can paint the same pixels a million times. No thread can be ended in the
middle of a decoder, but a process can, and one that crashes takes nothing else with it. One that ends may also have
been killed, with a replica of a cluster say, so a picture is blamed when a second one ends, too.

What always holds: a process decodes one picture at a time, and ends with the program that began it, however that ends;
nothing that it says is taken for code.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from PIL import Image

from multimodal.images import Encoded, ImageError, load_image

Process = subprocess.Popen[bytes]
Call = tuple[Encoded, dict[str, Any]]

PIPE_BYTES = 2**20  # with the usual 64 KiB, two processes wait for each other 560 times in 12 megapixels
# With the modules of this process, wherever they come from.
BEGIN = "import sys; sys.path[:] = {path!r}; from multimodal.decoding import serve; serve()"
_idle: list[Process] = []  # a list's append and pop are atomic


def decode_within(seconds: float, source: Encoded, **limits: Any) -> Image.Image:
    """The picture in a file.

    Args:
        seconds: For which it is decoded, at most; twice, if a process ends in the middle of it.
        source: The file.
        limits: As `load_image` takes them.

    Raises:
        ImageError: As of `load_image`; or it takes longer, or a decoder crashed.
    """
    said, pixels, late = _try(seconds, (source, limits))
    if said is None and not late:  # a process can also be killed from outside: whose fault it is, the second one shows
        said, pixels, late = _try(seconds, (source, limits))
    if said is None:
        problem = f"takes longer than {seconds:g} seconds to decode" if late else "crashes its decoder"
        raise ImageError(source.name, problem, "Save it anew, as a plain PNG or JPEG")
    if "error" in said:
        raise ImageError(*said["error"])
    width, height = said["size"]
    return Image.frombytes("RGB", (width, height), pixels)


def _try(seconds: float, call: Call) -> tuple[dict[str, Any] | None, bytes, bool]:
    """What a process says of a call, and the pixels; None if it ended. And whether its time was over."""
    process, late = _take(), threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    said, pixels = _ask(process, call)
    timer.cancel()
    timer.join()  # so that no process is killed that decodes the next picture
    if late.is_set() or said is None:
        process.kill()
        with suppress(OSError), process:  # closes its pipes, one of which may hold what it did not read; and waits
            pass
    else:
        _idle.append(process)
    return said, pixels, late.is_set()


def serve() -> None:
    """What such a process does: a pickled call in; a line of JSON out, and the pixels, three bytes each."""
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a decoder prints
    answers.write(b"\n")
    while True:
        answers.flush()
        try:
            source, limits = pickle.load(calls)
        except (EOFError, pickle.UnpicklingError):  # the program ended
            return
        said: dict[str, Any]
        try:
            picture = load_image(source, **limits)
            said, pixels = {"size": picture.size}, picture.tobytes()
        except ImageError as error:
            said, pixels = {"error": error.args}, b""
        answers.write(json.dumps({**said, "bytes": len(pixels)}).encode() + b"\n")
        answers.write(pixels)


def _take() -> Process:
    """A process that is ready, and nobody else's."""
    with suppress(IndexError):
        while True:
            process = _idle.pop()
            if process.poll() is None:
                return process
    command = [sys.executable, "-c", BEGIN.format(path=sys.path)]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    options["start_new_session"] = True  # no Ctrl-C reaches it
    try:
        process = subprocess.Popen(command, pipesize=PIPE_BYTES, **options)
    except PermissionError:  # the system lets this user have no more of such pipes
        process = subprocess.Popen(command, **options)
    process.stdout.readline()  # type: ignore[union-attr]  # it is ready: what loading took is not the picture's
    return process


def _ask(process: Process, call: Call) -> tuple[dict[str, Any] | None, bytes]:
    """What a process says of a call, and the pixels; None if it ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        pickle.dump(call, process.stdin)
        process.stdin.flush()
        said = json.loads(process.stdout.readline())
        pixels = process.stdout.read(said["bytes"])
    except (OSError, ValueError):
        return None, b""
    return (said, pixels) if len(pixels) == said["bytes"] else (None, b"")
