"""Compiles the engine's C++ once for this processor, and finds what has been compiled.

What it does: one shared library in the cache folder, named after all that it hangs on (source, flags, processor,
compiler), so that machines that share the folder never take each other's. What always holds: nothing is compiled
unasked (:func:`build` takes seconds and says so; :func:`built` and :func:`state` only look), two processes never
compile the same twice, and a library is whole or not there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from filelock import FileLock

from multimodal.weights import cache_folder

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("g++", "clang++", "c++")
COMMON = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno")
# The first that the compiler takes. GCC and clang use half of a 512-bit register unless they are told to.
CHOICES = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp",),
    ("-fopenmp-simd",),
    (),
)
# What the code may count on. All but "native" are for tests, of what runs on other processors.
Instructions = Literal["native", "avx2", "any"]
FLAGS: dict[Instructions, tuple[str, ...]] = {
    "native": (),
    "avx2": ("-march=x86-64-v3",),
    "any": ("-DMULTIMODAL_PORTABLE",),
}
TIMEOUT = 300.0  # seconds for one try of the compiler


class BuildError(RuntimeError):
    """The engine's C++ cannot be compiled; the message ends in what the compiler said."""


@dataclass(frozen=True)
class Built:
    """A compiled library."""

    path: Path


@dataclass(frozen=True)
class _Compiler:
    command: tuple[str, ...]
    version: str


def state(*, instructions: Instructions = "native") -> Built | str:
    """Return what has been compiled, or why there is nothing; compiles nothing.

    Args:
        instructions: What the code may count on.
    """
    if (path := built(instructions=instructions)) is not None:
        return Built(path)
    if _compiler() is None:
        return _no_compiler()
    failure = _failure(instructions)
    if failure.is_file():
        return failure.read_text(encoding="utf-8", errors="replace")
    return "nothing has been compiled for this processor yet: run `multimodal pull`"


def built(*, instructions: Instructions = "native") -> Path | None:
    """Return the library for this source, processor and compiler, or None; compiles nothing.

    On a machine without a compiler, that is the newest of what another compiler made for the same processor.
    """
    compiler = _compiler()
    if compiler is not None:
        path = _target(compiler, instructions)
        return path if path.is_file() else None
    found = [path for path in _folder().glob(f"native-{_digest(instructions)}-*.so") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def build(progress: Callable[[str], object] = print, *, instructions: Instructions = "native") -> Path:
    """Return the library, compiled now if it was not: a few seconds.

    Args:
        progress: Called with one line before the compiler is.
        instructions: As for :func:`state`.

    Raises:
        BuildError: Without a compiler, or where it refuses the source with every choice of flags.
        OSError: If the cache folder cannot be written to.
    """
    if (path := built(instructions=instructions)) is not None:
        return path
    compiler = _compiler()
    if compiler is None:
        raise BuildError(_no_compiler())
    target = _target(compiler, instructions)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():  # another process was faster
            return target
        progress(f"Compiling the engine for this processor with {compiler.command[0]} (a few seconds)")
        failure = _failure(instructions)
        try:
            _compile(compiler, target, instructions)
        except BuildError as error:
            failure.write_text(str(error), encoding="utf-8")
            raise
        failure.unlink(missing_ok=True)
    return target


def _compile(compiler: _Compiler, target: Path, instructions: Instructions) -> None:
    said = ""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
        made = Path(folder) / "native.so"
        for choice in CHOICES:
            flags = [*COMMON, *choice, *FLAGS[instructions]]
            command = [*compiler.command, *flags, str(SOURCE), "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
            except (OSError, subprocess.TimeoutExpired) as error:
                said = said or str(error)
                continue
            if done.returncode == 0 and made.is_file():
                os.replace(made, target)
                return
            said = said or (done.stderr or done.stdout or f"it ended with status {done.returncode}").strip()
    name = shlex.join(compiler.command)
    raise BuildError(f"{name} ({compiler.version}) does not compile the engine; it says:\n{said[:4000]}")


def _no_compiler() -> str:
    named = os.environ.get("CXX")
    tried = f"$CXX is {named}, which does not run" if named else f"none of {', '.join(COMPILERS)} is here"
    return f"there is no C++ compiler: {tried}. Install g++ or clang++, or name one in $CXX"


def _compiler() -> _Compiler | None:
    """The compiler that ``$CXX`` names, and nothing else where it is set; else the first that runs."""
    named = os.environ.get("CXX")
    for command in [tuple(shlex.split(named))] if named else [(name,) for name in COMPILERS]:
        found = shutil.which(command[0]) if command else None
        if found is not None and (version := _version((found, *command[1:]), os.stat(found).st_mtime_ns)):
            return _Compiler((found, *command[1:]), version)
    return None


@cache
def _version(command: tuple[str, ...], changed: int) -> str | None:
    """The first line of what a compiler says about itself; ``changed`` is when its file did."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def _processor() -> str:
    """What tells processors apart for ``-march=native``: the instructions that they have, and their model."""
    lines = dict(_cpuinfo())
    if lines:
        return "\n".join(f"{name}: {lines[name]}" for name in sorted(lines))
    return " ".join((platform.machine(), platform.processor(), platform.platform()))


def _cpuinfo() -> Iterator[tuple[str, str]]:
    """What Linux says about the first processor."""
    wanted = {"vendor_id", "cpu family", "model", "flags", "features", "cpu implementer", "cpu part", "isa"}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if (name := name.strip().lower()) in wanted:
            yield name, " ".join(sorted(value.split()))


def _digest(instructions: Instructions) -> str:
    digest = hashlib.sha256(SOURCE.read_bytes())
    system = (platform.system(), platform.machine(), " ".join(platform.libc_ver()))
    flags = (*COMMON, *(flag for choice in CHOICES for flag in choice), *FLAGS[instructions])
    for part in (*flags, *system, _processor()):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:16]


def _folder() -> Path:
    return cache_folder() / "engine"


def _target(compiler: _Compiler, instructions: Instructions) -> Path:
    by = hashlib.sha256("\0".join((*compiler.command, compiler.version)).encode()).hexdigest()[:8]
    return _folder() / f"native-{_digest(instructions)}-{by}.so"


def _failure(instructions: Instructions) -> Path:
    """Where it stands why the compiler failed."""
    compiler = _compiler()
    return _folder() / "none" if compiler is None else _target(compiler, instructions).with_suffix(".failed.txt")
