"""Pictures that are decoded under a deadline, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from multimodal import decoding
from multimodal.images import Encoded, ImageError, load_image


def endless() -> bytes:
    """A JPEG of 16 megapixels, less than 1 MB, whose last scan is there 20,000 times: minutes of decoding."""
    file = BytesIO()
    Image.new("L", (4096, 4096)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    scan = whole.rindex(b"\xff\xda")
    return whole[:scan] + 20_000 * whole[scan:-2] + whole[-2:]


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = BytesIO()
    image.save(file, form)
    return file.getvalue()


def test_a_picture_that_takes_too_long_is_named_with_the_limit() -> None:
    source = endless()
    assert len(source) < 2**20
    before = time.monotonic()
    with pytest.raises(ImageError) as caught:
        load_image(Encoded("picture 2", source), max_seconds=0.5)
    assert str(caught.value) == (
        "picture 2 takes longer than 0.5 seconds to decode. Save it anew, as a plain PNG or JPEG."
    )
    assert time.monotonic() - before < 60
    with pytest.raises(ImageError, match="50 x 50 pixels; all in all 100"):  # and the next one is decoded as ever
        load_image(encoded(Image.new("RGB", (50, 50))), max_pixels=100, max_seconds=60)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_it_is_the_same_picture(form: str, tmp_path: Path) -> None:
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)]).crop((0, 0, 200, 90))
    path = tmp_path / "picture"
    path.write_bytes(encoded(image, form))
    here, there = load_image(path), load_image(path, max_seconds=60)
    assert there.mode == "RGB" and there.size == (200, 90) and ImageChops.difference(here, there).getbbox() is None


def test_errors_are_the_same_and_the_process_goes_on(tmp_path: Path) -> None:
    good = encoded(Image.new("RGB", (8, 8), "red"))
    load_image(good, max_seconds=60)
    (process,) = {its.pid for its in decoding._idle}
    for source, limits in (
        (b"", {}),
        (b"%PDF-1.7", {}),
        (good[:45], {}),
        (good, {"max_pixels": 9}),
        (good, {"frame": 4}),
    ):
        said = []
        for seconds in (None, 60):
            with pytest.raises(ImageError) as caught:
                load_image(source, max_seconds=seconds, **limits)
            said.append(caught.value.args)
        assert said[0] == said[1]
    assert {its.pid for its in decoding._idle} == {process}


def test_a_decoder_that_ended_is_replaced() -> None:
    good = encoded(Image.new("RGB", (8, 8), "red"))
    load_image(good, max_seconds=60)
    for process in decoding._idle:
        process.kill()
        process.wait()
    assert load_image(good, max_seconds=60).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("ends", [1, 2])
def test_a_picture_is_blamed_when_a_second_decoder_ends(ends: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of them end in the middle of it."""
    good, ask, asked = encoded(Image.new("RGB", (8, 8), "red")), decoding._ask, []

    def killing(process: decoding.Process, call: decoding.Call) -> Any:
        asked.append(process.pid)
        if len(asked) <= ends:
            process.kill()
            process.wait()
        return ask(process, call)

    monkeypatch.setattr(decoding, "_ask", killing)
    if ends == 1:
        assert load_image(good, max_seconds=60).getpixel((0, 0)) == (255, 0, 0)
    else:
        with pytest.raises(ImageError, match=r"picture 1 crashes its decoder\. Save it anew"):
            load_image(Encoded("picture 1", good), max_seconds=60)
    assert len(asked) == 2 and asked[0] not in {process.pid for process in decoding._idle}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks Linux who is there")
def test_it_ends_with_a_program_that_is_killed() -> None:
    code = (
        "import os, signal; from multimodal import decoding; from multimodal.images import load_image\n"
        f"load_image({encoded(Image.new('RGB', (8, 8)))!r}, max_seconds=60)\n"
        "print(decoding._idle[0].pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(decoding.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    process = Path("/proc") / done.stdout.strip()
    deadline = time.monotonic() + 60
    while process.exists() and "\nState:\tZ" not in (process / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_large_pipes_it_goes_on_with_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def begin(*args: Any, pipesize: int = -1, **options: Any) -> Any:
        begun.append(pipesize)
        if pipesize > 0:
            raise PermissionError("as Linux says above the limit of a user's pipes")
        return real(*args, **options)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setattr(decoding, "_idle", [])
    image = load_image(encoded(Image.linear_gradient("L").resize((900, 900))), max_seconds=60)
    assert image.size == (900, 900) and begun == [decoding.PIPE_BYTES, -1]
