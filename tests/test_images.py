"""`load_image` meets what people and attackers send: every source, every mode, every limit, and no leak."""

from __future__ import annotations

import base64
import logging
import pickle
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

from multimodal import download
from multimodal.images import MAX_SIDE, ImageError, load_image, to_eight_bits

SECRET = "Doe^Jane^Secret"
DICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"  # carried by the wheel: nothing is downloaded


def photograph(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    """A red left half, a blue right half, and a green square at the upper left."""
    image = Image.new("RGB", (width, height), (200, 10, 10))
    image.paste((10, 10, 200), (width // 2, 0, width, height))
    image.paste((10, 200, 10), (0, 0, width // 4, height // 4))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that say they are a picture of that size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def refused(source: Any, **options: Any) -> str:
    """The message of the ImageError that `source` must meet; checks what holds for every message."""
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    error = caught.value
    assert error.thing and error.problem and error.remedy
    assert len(str(error)) < 300 and str(error).isprintable()
    return str(error)


def assert_close(actual: Any, expected: Any, tolerance: int = 1) -> None:
    difference = np.abs(np.asarray(actual, dtype=int) - np.asarray(expected, dtype=int)).max()
    assert difference <= tolerance, f"largest difference {difference}"


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_every_format_from_path_bytes_and_data_uri(tmp_path: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(photograph(), kind, **options)
    path = tmp_path / "picture without a telling suffix"
    path.write_bytes(data)
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    results = [load_image(source) for source in (path, str(path), data, bytearray(data), memoryview(data), uri)]
    for result in results:
        assert result.mode == "RGB" and result.size == (48, 32) and result.info == {}
        assert type(result) is Image.Image and result.tobytes() == results[0].tobytes()
    if kind not in ("JPEG", "GIF"):  # GIF's palette moves colours a little, JPEG's edges a lot
        assert_close(results[0], photograph(), tolerance=0)
    else:
        assert_close(results[0].getpixel((40, 24)), (10, 10, 200), tolerance=6)


def test_data_uris_as_browsers_and_clients_write_them() -> None:
    data = encoded(photograph(), "PNG")
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for uri in (
        f"DATA:image/png;charset=utf-8;BASE64,{text}",
        f"data:;base64,{wrapped}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png,{quote(data)}",
    ):
        assert load_image(uri).tobytes() == photograph().tobytes()


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64", "data:image/png;base64,@@@@", "data:image/png;base64,iVBORw0"]
)
def test_bad_data_uris_are_named_not_shown(uri: str) -> None:
    message = refused(uri)
    assert message.startswith("data-URI can't be decoded") and uri[-4:] not in message.replace("base64", "")


def test_pil_images_are_left_as_they_were() -> None:
    source = photograph(mode="RGBA")
    source.info["note"] = SECRET
    result = load_image(source)
    assert result is not source and result.mode == "RGB" and result.info == {}
    assert source.mode == "RGBA" and source.info == {"note": SECRET}
    result.paste("black", (0, 0, 48, 32))
    assert source.getpixel((0, 0)) == (10, 200, 10, 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_pil_mode(mode: str) -> None:
    source = Image.new("L", (4, 4), 255).convert(mode) if mode in ("1", "PA") else None
    if source is None:
        through = {"La": "LA", "RGBa": "RGBA"}.get(mode)
        grey = Image.new("RGB", (4, 4), "white")
        source = grey.convert(through).convert(mode) if through else grey.convert(mode)
    assert_close(load_image(source), np.full((4, 4, 3), 255), tolerance=2)


def test_arrays_of_every_layout_and_type() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(ramp[..., None], 3, axis=2)
    for array in (
        ramp,
        ramp[..., None],
        expected,
        np.asfortranarray(expected),
        np.concatenate([expected, np.full((16, 16, 1), 255, np.uint8)], axis=2),
        ramp.astype(np.uint16) * 257,
        ramp.astype(np.int64),
        ramp / 255,
        (ramp / 255).astype(np.float16),
        ramp.astype(np.float32),
    ):
        assert_close(load_image(array), expected)
    see_through = np.zeros((4, 4, 4), np.uint8)
    assert load_image(see_through).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.eye(8, dtype=bool)).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 20, 20)), "not laid out as a picture"),
        (np.zeros(7), "not laid out as a picture"),
        (np.zeros((2, 4, 4, 3)), "not laid out as a picture"),
        (np.zeros((4, 4, 2)), "not laid out as a picture"),
        (np.zeros((4, 4), dtype=complex), "grey or colour values"),
        (np.full((4, 4), SECRET), "grey or colour values"),
        (np.zeros((0, 4)), "has no pixels"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4), np.inf), "not finite"),
        (np.broadcast_to(np.uint8(0), (9000, 9000)), "64,000,000"),  # 81 megapixels that take one byte
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray[Any, Any], words: str) -> None:
    message = refused(array)
    assert words in message and SECRET not in message


@pytest.mark.parametrize("source", [None, 3, 2.5, ["a.png"], BytesIO(b""), object()])
def test_other_objects_are_named_by_their_type(source: Any) -> None:
    assert type(source).__name__ in refused(source)


# ---------------------------------------------------------------- what is inside


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = photograph()
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRET
    result = load_image(encoded(stored, kind, exif=exif, **({"quality": 100} if kind in ("JPEG", "WEBP") else {})))
    assert result.size == upright.size and result.info == {} and not result.getexif()
    for corner in ((2, 2), (2, 29), (45, 2), (45, 29)):
        assert_close(result.getpixel(corner), upright.getpixel(corner), tolerance=12)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encoded(photograph(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert load_image(data).tobytes() == photograph().tobytes()


def test_metadata_stays_behind() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Patient", SECRET)
    notes.add_itxt("XML:com.adobe.xmp", f"<x>{SECRET}</x>")
    result = load_image(encoded(photograph(), "PNG", pnginfo=notes, icc_profile=b"profile", dpi=(72, 72)))
    assert result.info == {} and SECRET.encode() not in encoded(result, "PNG")


def test_cmyk_jpeg_and_tiff() -> None:
    for kind in ("JPEG", "TIFF"):
        result = load_image(encoded(photograph(mode="CMYK"), kind))
        assert_close(result.getpixel((40, 24)), (10, 10, 200), tolerance=6)


def test_transparency_falls_on_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert_close(load_image(encoded(half, "PNG")).getpixel((0, 0)), (127, 127, 127))
    grey = Image.new("LA", (4, 4), (0, 0))
    assert load_image(encoded(grey, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert load_image(encoded(palette, "PNG")).getpixel((0, 0)) == (255, 0, 0)
    assert load_image(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert_close(load_image(encoded(palette, "PNG", transparency=b"\xff\x80")).getpixel((0, 0)), (255, 127, 127))
    assert load_image(encoded(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0))).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_use_all_of_the_eight(kind: str) -> None:
    full = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    result = np.asarray(load_image(encoded(Image.fromarray(full), kind)))
    assert_close(result[..., 0], full / 257)
    twelve = (full >> 4).astype(np.uint16)  # what a scanner of 12 bits writes into a file of 16
    assert_close(np.asarray(load_image(encoded(Image.fromarray(twelve), kind)))[..., 0], full / 257)


def test_wide_integers_and_floats_from_tiff() -> None:
    signed = np.array([[-1000, 0], [1000, 3000]], dtype=np.int32)
    assert np.asarray(load_image(encoded(Image.fromarray(signed), "TIFF")))[..., 0].tolist() == [[0, 64], [128, 255]]
    floats = np.array([[0.0, 0.5], [0.25, 1.0]], dtype=np.float32)
    assert np.asarray(load_image(encoded(Image.fromarray(floats), "TIFF")))[..., 0].tolist() == [[0, 128], [64, 255]]
    big_endian = Image.frombytes("I;16B", (2, 1), b"\x00\x00\xff\xff")
    assert np.asarray(load_image(big_endian))[0, :, 0].tolist() == [0, 255]


def test_scaling_table() -> None:
    cases: list[tuple[Any, str, list[int]]] = [
        ([0, 255], "uint16", [0, 255]),
        ([0, 1023], "uint16", [0, 255]),
        ([0, 16383], "int32", [0, 255]),
        ([0, 65535], "int32", [0, 255]),
        ([0, 2**32 - 1], "uint32", [0, 255]),
        ([7, 7], "uint16", [7, 7]),
        ([-7, -7], "int16", [0, 0]),
        ([0.0, 1.0], "float64", [0, 255]),
        ([0.0, 200.0], "float64", [0, 200]),
        ([-1.0, 1.0], "float64", [0, 255]),
        ([0.0, 4000.0], "float32", [0, 255]),
    ]
    for values, kind, expected in cases:
        assert to_eight_bits(np.array(values, dtype=kind)).tolist() == expected, (values, kind)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_frames_of_animations_and_pages(kind: str) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *others = [Image.new("RGB", (16, 16), colour) for colour in colours]
    data = encoded(first, kind, save_all=True, append_images=others, **({"lossless": True} if kind == "WEBP" else {}))
    assert_close(load_image(data).getpixel((8, 8)), colours[0], tolerance=4)
    for index, colour in enumerate(colours):
        assert_close(load_image(data, frame=index).getpixel((8, 8)), colour, tolerance=4)
    assert "has no frame 3: it holds 3" in refused(data, frame=3)
    with Image.open(BytesIO(data)) as opened:
        opened.seek(1)
        assert_close(load_image(opened).getpixel((8, 8)), colours[1], tolerance=4)
        assert_close(load_image(opened, frame=2).getpixel((8, 8)), colours[2], tolerance=4)
        assert opened.tell() == 1


@pytest.mark.parametrize("source", [encoded(photograph(), "PNG"), photograph(), np.zeros((4, 4))])
def test_still_pictures_have_one_frame(source: Any) -> None:
    load_image(source, frame=0)
    assert "it holds 1" in refused(source, frame=1)
    assert "whole number" in refused(source, frame=-1)
    assert "whole number" in refused(source, frame="first")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (png_claiming(17_000, 1_000), "17,000 x 1,000 pixels; a side may have 16,384"),
        (png_claiming(12_000, 6_000), "all in all 64,000,000 are read. Make it smaller, or pass max_pixels="),
        (png_claiming(100_000, 100_000), "more pixels than Pillow reads"),
        (png_claiming(3300, 100), "one side may be 32 times the other"),
        (png_claiming(1, 33), "one side may be 32 times the other"),
        (Image.new("1", (MAX_SIDE + 1, 600)), "a side may have 16,384"),
    ],
    ids=["side", "pixels", "Pillow", "wide", "tall", "PIL"],
)
def test_bombs_are_refused_before_they_are_decoded(
    source: Any, words: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def no_decoding(*_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", no_decoding)
    assert words in refused(source)


def test_a_bomb_is_refused_where_pillow_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "more pixels than" in refused(png_claiming(10_000, 10_000))


def test_limits_can_be_moved() -> None:
    data = encoded(photograph(), "PNG")
    assert load_image(data, max_pixels=48 * 32, max_side=48, max_bytes=len(data)).size == (48, 32)
    assert "1,535" in refused(data, max_pixels=48 * 32 - 1)
    assert "a side may have 47" in refused(photograph(), max_side=47)
    assert f"over {len(data) - 1:,} bytes" in refused(data, max_bytes=len(data) - 1)


def test_too_many_bytes_from_file_and_data_uri(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    path.write_bytes(b"\x89PNG" + bytes(5000))
    assert "over 1,000 bytes" in refused(path, max_bytes=1000)
    assert "over 1,000 bytes" in refused("data:image/png;base64," + "A" * 2000, max_bytes=1000)
    assert "over 1,000 bytes" in refused("data:image/png;base64," + "A" * 9000, max_bytes=1000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for keep in (12, 30, len(data) // 3, len(data) // 2, int(len(data) * 0.9)):
        path = tmp_path / "cut"
        path.write_bytes(data[:keep])
        message = refused(path)
        assert "file 'cut'" in message and "damaged or cut short" in message, (keep, message)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_flipped_bytes_give_a_picture_or_an_image_error(kind: str) -> None:
    data = bytearray(encoded(photograph(), kind))
    random = np.random.default_rng(1)
    for _ in range(150):
        hurt = data.copy()
        for position in random.integers(0, min(len(data), 400), 4):
            hurt[position] = random.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_image(bytes(hurt))
            except ImageError:
                continue


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"Dear doctor,\r\nplease find attached\r\n", "is text"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "is SVG"),
        (b"  <!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04\x14\0", "is a ZIP"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC"),
        (b"\x00\x01\x02\x03" * 50, "is not a picture known here"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut short"),
    ],
)
def test_other_files_are_recognised(data: bytes, words: str) -> None:
    assert words in refused(data)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "JPEG2000", "PPM", "SGI", "DDS", "ICNS", "PDF"])
def test_decoders_off_the_list_are_out_of_reach(kind: str) -> None:
    refused(encoded(photograph(64, 64), kind))


def test_paths_that_hold_no_picture(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)
    assert "'missing.png' does not exist" in refused(tmp_path / "missing.png")
    assert "does not exist" in refused("bell\x07\n" + "x" * 180 + ".png")
    assert "can't be opened" in refused("x" * 300)
    assert "does not exist" in refused("null\0byte.png") and "does not exist" in refused("")
    assert "not a regular file" in refused("/dev/zero")
    assert "is not a path" in refused(base64.b64encode(bytes(6000)).decode())


def test_the_error_is_a_value_error_that_travels_between_processes() -> None:
    error = ImageError("file 'a.png'", "is empty", "Save it again")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ValueError) and (copy.thing, copy.problem, copy.remedy) == error.args
    assert str(copy) == "file 'a.png' is empty. Save it again."


# ---------------------------------------------------------------- URLs


@pytest.fixture
def site() -> Iterator[str]:
    """A web server with every habit that a picture's host may have."""
    png = encoded(photograph(), "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, rest = self.path.lstrip("/").partition("/")
            if kind == "to":
                self.send_response(302)
                self.send_header("Location", rest)
                self.end_headers()
                self.wfile.write(b"x" * 10)
                return
            self.send_response(404 if kind == "missing" else 200)
            self.end_headers()
            try:
                if kind == "picture":
                    self.wfile.write(png)
                elif kind == "page":
                    self.wfile.write(b"<!doctype html><html>")
                elif kind == "endless":
                    while True:
                        self.wfile.write(bytes(65536))
                elif kind == "drip":
                    for byte in png[:40]:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.05)
            except OSError:  # the reader hung up, as it should
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_urls_are_off_unless_allowed(site: str) -> None:
    message = refused(f"{site}/picture?token={SECRET}")
    assert "allow_urls=True" in message and SECRET not in message
    assert load_image(f"{site}/picture", allow_urls=True).tobytes() == photograph().tobytes()
    assert load_image(f"{site}/to/{site}/to//picture", allow_urls=True).size == (48, 32)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/page", "is a web page"),
        ("/empty", "is empty"),
        ("/missing", "status 404"),
        ("/endless", "sends over 1,000,000 bytes"),
        ("/to/file:///etc/hostname", "scheme 'file'; only http and https"),
        ("/to/ftp://127.0.0.1/a.png", "scheme 'ftp'; only http and https"),
        ("/to/data:image/png;base64,AAAA", "scheme 'data'; only http and https"),
        ("/to//to//to//to//to//picture", "redirects more than 3 times"),
    ],
)
def test_hosts_that_misbehave(site: str, path: str, words: str) -> None:
    message = refused(site + path, allow_urls=True, max_bytes=1_000_000)
    assert "URL at 127.0.0.1" in message and words in message


def test_a_host_that_drips_is_left(site: str) -> None:
    began = time.monotonic()
    with pytest.raises(ImageError, match="takes too long"):
        download.download(f"{site}/drip", max_bytes=1000, seconds=0.3)
    assert time.monotonic() - began < 1.5


def test_dead_ports_and_bad_addresses() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    message = refused(f"http://127.0.0.1:{port}/{SECRET}.png?{SECRET}", allow_urls=True)
    assert "URL at 127.0.0.1 can't be fetched (ConnectionRefusedError)" in message and SECRET not in message
    message = refused(f"http://user:{SECRET}@127.0.0.1:{port}/", allow_urls=True)
    assert "user name or password" in message and SECRET not in message
    for url in ("http://", "http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://127.0.0.1/\n a"):
        assert "can't be fetched" in refused(url, allow_urls=True)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a.png", "gopher://x/", "javascript://x"])
def test_other_schemes_are_refused(url: str) -> None:
    refused(url)
    assert "only http and https" in refused(url, allow_urls=True)


# ---------------------------------------------------------------- DICOM


def dicom(pixels: np.ndarray[Any, Any], *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """A DICOM file full of patient data, with `pixels` of shape (H, W) or (H, W, 3), or frames of them first."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PatientName, ds.PatientID, ds.InstitutionName = SECRET, SECRET, SECRET
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, "1.2.3"
    colour = pixels.ndim > 2 and pixels.shape[-1] == 3
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def grey_of(data: bytes, **options: Any) -> list[list[int]]:
    result = np.asarray(load_image(data, **options))
    assert (result[..., 0] == result[..., 2]).all()
    return result[..., 0].tolist()


HOUNSFIELD = np.array([[-1024, -160, 40], [90, 240, 3000]], dtype=np.int16)


def test_dicom_window_and_rescale() -> None:
    stored = (HOUNSFIELD + 1024).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    exact = dicom(stored, **rescale, WindowCenter=40, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    assert grey_of(exact) == [[0, 0, 128], [159, 255, 255]]
    two_windows = dicom(stored, **rescale, WindowCenter=[40, 500], WindowWidth=[400, 1000])
    assert_close(grey_of(two_windows), [[0, 0, 128], [160, 255, 255]])
    no_window = dicom(stored, **rescale)
    assert_close(grey_of(no_window), (HOUNSFIELD + 1024) / 4024 * 255)
    for width in (0, -5, 0.5):
        assert grey_of(dicom(stored, **rescale, WindowCenter=40, WindowWidth=width)) == grey_of(no_window)
    assert grey_of(dicom(np.array([[9, 10, 11]], np.uint8), WindowCenter=10, WindowWidth=1)) == [[0, 255, 255]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_dicom_window_agrees_with_pydicom(function: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32), dtype=np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1500, "WindowWidth": 2500}
    data = dicom(pixels, BitsStored=12, HighBit=11, VOILUTFunction=function, **tags)
    ds = pydicom.dcmread(BytesIO(data))
    theirs = apply_voi_lut(apply_modality_lut(pixels, ds), ds)
    low, high = -1000, 4095 * 2 - 1000  # the range to which pydicom scales
    assert_close(grey_of(data), (theirs - low) / (high - low) * 255)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_dicom_voi_and_modality_tables(as_bytes: bool) -> None:
    table = [0, 40, 160, 255]
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 100, 8])
    values = struct.pack("<4H", *table)
    item.add_new("LUTData", "OW" if as_bytes else "US", values if as_bytes else table)
    pixels = np.array([[0, 100, 101], [102, 103, 4000]], dtype=np.uint16)
    assert grey_of(dicom(pixels, VOILUTSequence=[item])) == [[0, 0, 40], [160, 255, 255]]
    modality = Dataset()
    modality.add_new("LUTDescriptor", "US", [4, 0, 16])
    modality.add_new("LUTData", "US", [0, 100, 200, 400])
    modality.ModalityLUTType = "US"
    pixels = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    assert_close(grey_of(dicom(pixels, ModalityLUTSequence=[modality])), [[0, 64, 128, 255]])


def test_dicom_monochrome1_is_inverted() -> None:
    pixels = np.array([[0, 100, 255]], dtype=np.uint8)
    assert grey_of(dicom(pixels)) == [[0, 100, 255]]
    assert grey_of(dicom(pixels, PhotometricInterpretation="MONOCHROME1")) == [[255, 155, 0]]


def test_dicom_padding_does_not_spoil_the_contrast() -> None:
    pixels = np.array([[-2000, 0, 50, 100]], dtype=np.int16)
    assert grey_of(dicom(pixels, PixelPaddingValue=-2000)) == [[0, 0, 128, 255]]
    assert grey_of(dicom(np.full((4, 4), 7, np.int16), PixelPaddingValue=7)) == [[0] * 4] * 4


def test_dicom_colour() -> None:
    picture = np.asarray(photograph())
    assert_close(load_image(dicom(picture)), picture, tolerance=0)
    assert_close(load_image(dicom(picture.astype(np.uint16) * 16, BitsStored=12, HighBit=11)), picture)
    ybr = np.asarray(photograph().convert("YCbCr"))
    assert_close(load_image(dicom(ybr, PhotometricInterpretation="YBR_FULL")), picture, tolerance=2)
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in (("Red", [0, 65535]), ("Green", [0, 32896]), ("Blue", [65535, 0])):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = struct.pack("<2H", *entries)
    result = load_image(dicom(np.array([[0, 1]], dtype=np.uint8), **palette))
    assert [result.getpixel((0, 0)), result.getpixel((1, 0))] == [(0, 0, 255), (255, 128, 0)]


def test_dicom_frames_and_their_own_windows() -> None:
    frames = np.stack([np.full((4, 4), value, np.uint8) for value in (10, 20, 30)])
    groups = []
    for centre in (10, 20, 1000):
        window = Dataset()
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = centre, 20, "LINEAR_EXACT"
        group = Dataset()
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    slope = Dataset()
    slope.RescaleSlope, slope.RescaleIntercept = 1, 5
    shared = Dataset()
    shared.PixelValueTransformationSequence = [slope]
    data = dicom(
        frames,
        NumberOfFrames=3,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
    )
    assert [grey_of(data, frame=index)[0][0] for index in range(3)] == [191, 191, 0]
    assert grey_of(data) == grey_of(data, frame=0)
    assert "has no frame 3: it holds 3" in refused(data, frame=3)


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ("CT_small.dcm", (128, 128)),
        ("MR_small.dcm", (64, 64)),
        ("MR_small_bigendian.dcm", (64, 64)),
        ("MR_small_implicit.dcm", (64, 64)),
        ("MR_small_RLE.dcm", (64, 64)),
        ("MR_small_jp2klossless.dcm", (64, 64)),
        ("examples_palette.dcm", (800, 350)),
        ("examples_rgb_color.dcm", (320, 240)),
        ("examples_ybr_color.dcm", (320, 240)),
        ("examples_jpeg2k.dcm", (640, 480)),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100)),
        ("SC_rgb_rle_16bit_2frame.dcm", (100, 100)),
        ("SC_rgb_jpeg_dcmtk.dcm", (100, 100)),
        ("liver_1frame.dcm", (512, 512)),
    ],
)
def test_dicom_files_of_pydicom(file: str, size: tuple[int, int]) -> None:
    result = load_image(DICOM_FILES / file)
    assert result.size == size and result.mode == "RGB" and result.info == {}
    assert np.asarray(result).std() > 5  # there is something to see


def test_dicom_encodings_of_one_picture_agree() -> None:
    plain = load_image(DICOM_FILES / "MR_small.dcm")
    for other in ("bigendian", "implicit", "RLE", "jp2klossless"):
        assert load_image(DICOM_FILES / f"MR_small_{other}.dcm").tobytes() == plain.tobytes(), other


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("test-SR.dcm", "without a picture"),
        ("rtplan.dcm", "without a picture"),
        ("MR_truncated.dcm", "can't be decoded"),
        ("MR_small_jpeg_ls_lossless.dcm", "no decoder is installed"),
        ("JPEG-lossy.dcm", "can't be decoded"),
        ("image_dfl.dcm", "deflated"),
        ("no_meta.dcm", "not a picture known here"),
    ],
)
def test_dicom_files_that_are_refused(file: str, words: str) -> None:
    assert words in refused(DICOM_FILES / file)


def test_dicom_without_pydicom_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.dicom.find_spec", lambda package: None)
    assert "pip install pydicom" in refused(DICOM_FILES / "CT_small.dcm")


def test_dicom_size_is_checked_before_decoding() -> None:
    bomb = dicom(np.zeros((4, 4), np.uint8), Rows=60_000, Columns=60_000)
    assert "60,000 x 60,000" in refused(bomb)
    assert "max_side=" in refused(dicom(np.zeros((4, 40), np.uint8)), max_side=20)


def test_dicom_whose_compressed_frame_is_larger_than_it_says() -> None:
    jpeg = encoded(Image.new("L", (3000, 3000)), "JPEG")
    lie = partial(dicom, np.zeros((4, 4), np.uint8))
    assert "not of the size it says" in refused(lie(syntax=JPEGBaseline8Bit, PixelData=encapsulate([jpeg])))
    runs = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\x00" * 100_000  # each pair grows to 128 bytes
    assert "not of the size it says" in refused(lie(syntax=RLELossless, PixelData=encapsulate([runs])))
    assert "deflated" in refused(lie(syntax=DeflatedExplicitVRLittleEndian))


def everything_reachable(error: BaseException | None) -> str:
    """What a logger could write of an error: message, attributes, cause and context all the way down."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {error.__dict__} {error.__cause__!r} {error.__context__!r}"
        error = error.__cause__ or error.__context__
    return text


@pytest.mark.parametrize(
    "hurt",
    [
        lambda data: data,
        lambda data: data[:-3],
        lambda data: data[:400],
        lambda data: data.replace(b"MONOCHROME2", b"Jane Secret"),
        lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"Doe^Jane^Secret\0\0\0\0\0"),
        lambda data: data.replace(b"US\x02\x00", b"PN\x02\x00"),
        lambda data: data.replace(b"1.2.3\0", b"Secret"),
        lambda data: data.replace(b"DS\x02\x0040", b"DS\x02\x00^^"),
    ],
)
def test_patient_data_never_leaves_the_reader(
    hurt: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = hurt(dicom(np.zeros((4, 4), np.uint8), WindowCenter="40", WindowWidth="80"))
    assert b"Secret" in data
    path = tmp_path / "scan.dcm"
    path.write_bytes(data)
    seen = ""
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for source in (data, path):
            try:
                result = load_image(source)
                seen += f"{result.info} {vars(result)}" + repr(encoded(result, "PNG"))
            except ImageError as error:
                assert error.__cause__ is None and error.__context__ is None
                seen += everything_reachable(error)
    seen += caplog.text + "".join(capfd.readouterr()) + "".join(str(warning.message) for warning in heard)
    for word in ("Doe", "Jane", "Secret"):
        assert word not in seen
    assert not heard
