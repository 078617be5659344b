"""Compiling once: who asks, what is kept, and what is said where it does not work."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from multimodal.engine import build
from multimodal.engine.build import BuildError, Built

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a source that compiles in no time."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "engine"


@pytest.fixture
def compiler() -> None:
    if build._compiler() is None:
        pytest.skip("there is no C++ compiler here")


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, *, body: str, name: str = "fake-cxx") -> Path:
    """A compiler that counts how often it is asked to compile, as ``$CXX``."""
    path, calls = folder / name, folder / f"{name}.calls"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "fake 1.0"; exit 0; }}\necho "$@" >> {calls}\n{body}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return calls


WRITES = 'while [ "$1" != -o ]; do shift; done; sleep 0.3; echo library > "$2"'


def test_compiles_once(compiler: None, cache: Path) -> None:
    said: list[str] = []
    assert build.built() is None
    assert "multimodal pull" in str(build.state())
    assert not cache.exists(), "looking leaves nothing behind"
    path = build.build(said.append)
    assert path.parent == cache
    assert len(said) == 1
    assert build.build(said.append) == path == build.built()
    assert build.state() == Built(path)
    assert len(said) == 1, "what is there is not compiled again"
    assert not list(cache.glob("building-*"))


def test_other_instructions_another_library(compiler: None) -> None:
    assert build.build() != build.build(instructions="any")


def test_another_source_another_library(compiler: None) -> None:
    path = build.build()
    build.SOURCE.write_text(SMALL.replace("42", "43"))
    assert build.built() is None
    assert build.build() != path


def test_another_processor_another_library(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be that of two machines."""
    build.build()
    monkeypatch.setattr(build, "_processor", lambda: "one that knows nothing of AVX-512")
    assert build.built() is None


def test_two_at_once_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(tmp_path, monkeypatch, body=WRITES)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(lambda line: None), range(4)))
    assert len(paths) == 1
    assert len(calls.read_text().splitlines()) == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler-1", "no-such-compiler-2"))
    assert "no C++ compiler" in str(build.state())
    assert "no-such-compiler-1" in str(build.state())
    assert build.built() is None
    with pytest.raises(BuildError, match="Install"):
        build.build()


def test_named_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not silently replaced by another."""
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    assert "/nowhere/c++" in str(build.state())
    with pytest.raises(BuildError, match="nowhere"):
        build.build()


def test_built_elsewhere_without_a_compiler_here(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build()
    monkeypatch.setattr(build, "COMPILERS", ())
    assert build.state() == Built(path)
    assert build.build() == path


def test_failing_compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(tmp_path, monkeypatch, body='echo "the machine is out of steam" >&2; exit 1')
    with pytest.raises(BuildError, match="out of steam"):
        build.build()
    assert len(calls.read_text().splitlines()) == len(build.CHOICES), "every choice of flags is tried"
    assert build.built() is None
    assert "out of steam" in str(build.state())
    assert not list(cache.glob("*.so"))
    fake(tmp_path, monkeypatch, body=WRITES)  # the same compiler, repaired
    path = build.build()
    assert build.state() == Built(path)


def test_flags_that_are_refused_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(
        tmp_path, monkeypatch, body=f'case "$*" in *-fopenmp\\ *) echo "no OpenMP" >&2; exit 1;; esac\n{WRITES}'
    )
    assert build.build().read_text() == "library\n"
    assert "-fopenmp-simd" in calls.read_text().splitlines()[-1]


def test_source_that_does_not_compile(compiler: None) -> None:
    build.SOURCE.write_text("this is not C++\n")
    with pytest.raises(BuildError, match="error"):
        build.build()


def test_cache_that_cannot_be_written(compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "file"))
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        build.build()
