"""Untrusted picture in, one safe RGB image out, or one clear error.

What it does: takes a path, bytes, a PIL image, a NumPy array, a data-URI, an http(s) URL or a DICOM file and returns a
fully loaded PIL image in mode RGB, upright, on white where it was transparent.

What it does not know: models, the size a model likes, normalisation. Those belong to the image processor.

What always holds:
- The size is checked from the header, before any pixel is decoded.
- Only the decoders in `FORMATS` are reachable, whatever the bytes call themselves.
- The picture returned is a new one: nothing in `.info`, no EXIF, no header, no link to the caller's image.
- Whatever goes wrong is an `ImageError`; its text holds no content of the picture, the data-URI or the DICOM header.
"""

from __future__ import annotations

import base64
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy as np

# The formats people really upload. Pillow knows dozens more, each one a decoder that untrusted bytes could reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
# Above a phone's 50 megapixels and every plain film (a mammogram has 14); 192 MB once decoded to RGB.
MAX_PIXELS = 64_000_000
# A phone's panorama is 16,000 pixels wide; WebP ends at 16,383.
MAX_SIDE = 16_384
# An encoder sees about 256 pixels a side: beyond 32:1 fewer than 8 of them would be left for the short side.
MAX_ASPECT = 32
# Encoded size. A 16-bit mammogram takes 27 MB, a phone's largest JPEG about 25.
MAX_BYTES = 64 * 2**20

_SOURCES = "Pass a path, bytes, a PIL image, a NumPy array, a data-URI or an http(s) URL"
_READABLE = "Save it as PNG or JPEG; read are " + ", ".join(FORMATS) + " and DICOM"
_AGAIN = "Save or download the picture again"

# How the bytes begin that people upload by mistake, and last those that are readable in principle.
_SIGNATURES = (
    (rb"%PDF", "is a PDF document, not a picture"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "is a web page, not a picture"),
    (rb"(\xef\xbb\xbf)?\s*<(\?xml|!--|!doctype|svg)", "is SVG or XML: drawing instructions, not pixels"),
    (rb"....ftyp(heic|heix|mif1|msf1|avif|avis)", "is a HEIC or AVIF photograph, which is not read"),
    (rb"PK\x03\x04", "is a ZIP archive or an office document, not a picture"),
    (rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM", "is damaged or cut short"),
)

# Given the name and (width, height); raises where that is too large.
SizeCheck = Callable[[str, tuple[int, int]], None]


class ImageError(ValueError):
    """A picture that can't be used.

    Attributes:
        thing: what was refused, short and safe to show ("file 'scan.png'", "data-URI").
        problem: what is wrong with it, with the limit where there is one.
        remedy: what to do about it.
    """

    def __init__(self, thing: str, problem: str, remedy: str) -> None:
        super().__init__(thing, problem, remedy)  # all three in args, so that the error can be pickled
        self.thing, self.problem, self.remedy = thing, problem, remedy

    def __str__(self) -> str:
        return f"{self.thing} {self.problem}. {self.remedy}."


@dataclass(frozen=True)
class Encoded:
    """The bytes of a picture file, wherever they came from, and a name that is safe to show."""

    name: str
    data: bytes


def read_encoded(source: Any, *, allow_urls: bool = False, max_bytes: int = MAX_BYTES) -> Encoded | None:
    """The bytes behind what `load_image` takes, which takes them, too; `None` of a PIL image or an array.

    Raises:
        ImageError: there is no such file, it is over the limit, or it may not be fetched.
    """
    if isinstance(source, Encoded):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Encoded("image bytes", bytes(source))
    if isinstance(source, (str, os.PathLike)):
        return Encoded(*_read(source, allow_urls, max_bytes))
    return None


def load_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | Encoded | Image.Image | np.ndarray[Any, Any],
    *,
    allow_urls: bool = False,
    frame: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
    max_seconds: float | None = None,
) -> Image.Image:
    """Turns anything that holds a picture into an RGB image.

    Args:
        source: a path; the bytes of a picture file; a PIL image (left as it is); an array of shape (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), its numbers scaled as `to_eight_bits` says; a `data:` URI; an http(s) URL. Files,
            bytes, URIs and URLs may hold DICOM.
        allow_urls: whether URLs are fetched. Off, since with it a caller reaches every host that this machine
            reaches, its own network included.
        frame: which picture of an animation, of a TIFF with several pages or of a DICOM file with several frames,
            from 0. `None` takes the first or, of a PIL image, the one it stands at.
        max_pixels: most pixels in the picture. Pillow's own stop at about 179 million stays in force.
        max_side: most pixels along one side.
        max_bytes: most bytes in the encoded picture.
        max_seconds: for which an encoded picture is decoded; it then happens in a process of its own, which outlives
            the call for the next one. `None` sets no limit: whoever made the file can make it take hours.

    Returns:
        A new image, mode RGB, loaded, without metadata. What is drawn in the pixels themselves, such as a name
        burned into an ultrasound picture, stays.

    Raises:
        ImageError: the source is no picture, is damaged, is over a limit, or may not be fetched.
    """
    check = partial(_check_size, max_pixels=max_pixels, max_side=max_side)
    if frame is not None and (not isinstance(frame, int) or frame < 0):
        raise ImageError("frame", "is not a whole number from 0 up", "Count frames from 0")
    if isinstance(source, Image.Image):
        return _decode(f"PIL image of mode {source.mode}", source, frame, check)
    if "numpy" in sys.modules and isinstance(source, sys.modules["numpy"].ndarray):
        return _from_array(source, frame, check)
    encoded = read_encoded(source, allow_urls=allow_urls, max_bytes=max_bytes)
    if encoded is not None and max_seconds is not None:
        from multimodal.decoding import decode_within

        limits = {"frame": frame, "max_pixels": max_pixels, "max_side": max_side, "max_bytes": max_bytes}
        return decode_within(max_seconds, encoded, **limits)
    if encoded is not None:
        return _from_bytes(encoded.name, encoded.data, frame, check, max_bytes)
    raise ImageError(f"object of type {type(source).__name__}", "is not a picture", _SOURCES)


def _read(source: str | os.PathLike[str], allow_urls: bool, max_bytes: int) -> tuple[str, bytes]:
    """The name (safe to show) and the bytes behind a data-URI, a URL or a path."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "data-URI", _read_data_uri(source, max_bytes)
    if isinstance(source, str) and re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        if not allow_urls:
            raise ImageError("URL", "may not be fetched here", "Download the picture first, or pass allow_urls=True")
        from multimodal.download import download

        return download(source, max_bytes=max_bytes)
    return _read_file(os.fsdecode(source), max_bytes)


def _read_data_uri(uri: str, max_bytes: int) -> bytes:
    if len(uri) > 3 * max_bytes + 1024:  # a byte takes 3 characters when percent-encoded; 1024 for the media type
        raise _too_many_bytes("data-URI", max_bytes)
    header, comma, payload = uri.partition(",")
    data = unquote_to_bytes(payload)
    if comma and header.lower().endswith(";base64"):
        with suppress(ValueError):
            return base64.b64decode(b"".join(data.split()), validate=True)
        comma = ""
    if not comma:
        raise ImageError("data-URI", "can't be decoded", "Write it as data:image/png;base64, and the encoded bytes")
    return data


def _read_file(text: str, max_bytes: int) -> tuple[str, bytes]:
    if len(text) > 4096:  # Linux ends paths there; this is most likely base64 without its prefix
        raise ImageError(f"text of {len(text)} characters", "is not a path", _SOURCES)
    path = Path(text)
    name = f"file '{printable(path.name or text)}'"
    try:
        if not (text and path.exists()):
            raise ImageError(name, "does not exist", "Check the path")
        if path.is_dir():
            raise ImageError(name, "is a directory", "Pass the path of one picture in it")
        if not path.is_file():  # a pipe or a device would block, or never end
            raise ImageError(name, "is not a regular file", "Copy the picture into a file first")
        with path.open("rb") as file:
            return name, file.read(max_bytes + 1)
    except OSError as error:
        raise ImageError(name, f"can't be opened ({type(error).__name__})", "Check the path and its rights") from error


def _from_bytes(name: str, data: bytes, frame: int | None, check: SizeCheck, max_bytes: int) -> Image.Image:
    if not data:
        raise ImageError(name, "is empty", _AGAIN)
    if len(data) > max_bytes:
        raise _too_many_bytes(name, max_bytes)
    if data[128:132] == b"DICM":
        from multimodal.dicom import read_dicom

        return _to_rgb(read_dicom(name, data, frame=frame or 0, check=check))
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, "has more pixels than Pillow reads at all", "Make the picture smaller") from error
    except UnidentifiedImageError as error:
        problem = next((words for start, words in _SIGNATURES if re.match(start, data, re.I | re.S)), None)
        raise ImageError(name, problem or _guess(data), _READABLE) from error
    except Exception as error:  # a parser may raise anything on bytes made to hurt it
        raise _damaged(name, error) from error
    with image:
        return _decode(name, image, frame or 0, check)


def _decode(name: str, image: Image.Image, frame: int | None, check: SizeCheck) -> Image.Image:
    """Checks, picks the frame, decodes and cleans; leaves `image` at the frame where it stood."""
    check(name, image.size)
    try:
        before = image.tell()
        if frame is not None and frame != before:
            if frame >= (frames := getattr(image, "n_frames", 1)):
                raise no_such_frame(name, frame, frames)
            image.seek(frame)
            check(name, image.size)  # a GIF's later frames may enlarge its canvas
        image.load()
        picture = _to_rgb(_upright(image))
        if image.tell() != before:
            image.seek(before)
        return picture
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError and more
        raise _damaged(name, error) from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a picture with broken EXIF stays as it lies."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image on white, with nothing of the old one but its pixels."""
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, floats: convert() would clip them
        import numpy as np

        image = Image.fromarray(to_eight_bits(np.asarray(image)))
    if image.mode == "La":  # premultiplied: convert() knows one way out
        image = image.convert("LA")
    clean = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        clean.paste(image.convert("RGB"), mask=image.getchannel("A"))
    else:
        clean.paste(image.convert("RGB"))
    return clean


def _from_array(array: np.ndarray[Any, Any], frame: int | None, check: SizeCheck) -> Image.Image:
    name = f"array of shape {array.shape} and type {array.dtype.name}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        remedy = "Pass height x width, with 1, 3 or 4 channels last"
        raise ImageError(name, "is not laid out as a picture", remedy)
    if array.dtype.kind not in "buif":
        raise ImageError(name, "does not hold grey or colour values", "Pass uint8, uint16 or floats from 0 to 1")
    if frame:
        raise no_such_frame(name, frame, 1)
    check(name, (array.shape[1], array.shape[0]))
    try:
        return _to_rgb(Image.fromarray(to_eight_bits(array)))
    except ValueError as error:
        raise ImageError(name, "holds values that are not finite", "Replace NaN and infinity first") from error


def to_eight_bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scales grey or colour values of any type to 0..255, keeping their order.

    | values | black, white |
    |---|---|
    | uint8 | as they are |
    | other integers, none negative | 0, 2**n - 1 for the least n of 8, 10, 12, 14, 16, 32, 64 that holds all of them |
    | floats within 0..1 (booleans too), or within 0..255 | 0, 1 or 0, 255 |
    | all others | the smallest value, the largest value |

    n is looked for since scanners write 10 to 14 of them into files of 16, which would come out nearly black.

    Raises:
        ValueError: a value is not finite.
    """
    import numpy as np

    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("values must be finite")
    if array.dtype.kind in "iu" and low >= 0:
        low, high = 0.0, next(2.0**bits - 1 for bits in (8, 10, 12, 14, 16, 32, 64) if high <= 2.0**bits - 1)
    elif array.dtype.kind in "bf" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scaled = (array.astype(np.float32) - low) * (255 / ((high - low) or 1.0))
    return scaled.round().clip(0, 255).astype(np.uint8)


def _check_size(name: str, size: tuple[int, int], *, max_pixels: int, max_side: int) -> None:
    width, height = size
    problem = f"is {width:,} x {height:,} pixels; "
    if min(size) < 1:
        raise ImageError(name, "has no pixels", _AGAIN)
    if max(size) > max_side:
        raise ImageError(name, f"{problem}a side may have {max_side:,}", "Make it smaller, or pass max_side=")
    if width * height > max_pixels:
        raise ImageError(name, f"{problem}all in all {max_pixels:,} are read", "Make it smaller, or pass max_pixels=")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(name, f"{problem}one side may be {MAX_ASPECT} times the other", "Cut it into pieces")


def printable(text: str, length: int = 60) -> str:
    """`text` as an error or a log line may show it: no control characters, at most about `length` long."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def no_such_frame(name: str, frame: int, frames: int) -> ImageError:
    """The error for a frame that is not there."""
    return ImageError(name, f"has no frame {frame}: it holds {frames}, counted from 0", "Ask for an earlier frame")


def _too_many_bytes(name: str, max_bytes: int) -> ImageError:
    return ImageError(name, f"is over {max_bytes:,} bytes, the most that is read", "Shrink it, or pass max_bytes=")


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(name, f"is damaged or cut short ({type(error).__name__})", _AGAIN)


def _guess(data: bytes) -> str:
    text = data[:512].replace(b"\r", b"").replace(b"\n", b"").replace(b"\t", b"")
    return "is text, not a picture" if text.isascii() and text.decode().isprintable() else "is not a picture known here"
