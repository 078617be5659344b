"""One frame of a DICOM file as an 8-bit picture; nothing else of the file leaves this module.

What it does: pixel data (native, RLE, JPEG, JPEG 2000 where Pillow reads it), modality transform, VOI (look-up table or
window), photometric interpretation, in the order of DICOM PS3.3 C.7.6.16.2.9.1.

What it does not know: overlays, presentation states, several frames at once.

What always holds: pydicom is asked for the pixel tags only, so the patient module is never parsed; no pydicom message,
warning or exception gets out, since those quote values; sizes are checked before pixels are decoded.
"""

from __future__ import annotations

import logging
import math
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from PIL import Image

from multimodal.images import ImageError, SizeCheck, no_such_frame, to_eight_bits

if TYPE_CHECKING:
    import numpy as np
    from pydicom import Dataset

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_COLOURS = ("Red", "Green", "Blue")
_TAGS: list[Any] = [
    *_PIXELS,
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in _COLOURS),
    *(f"{colour}PaletteColorLookupTableData" for colour in _COLOURS),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _COLOURS),
]
# pydicom inflates a deflated file whole, whatever it grows to.
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_CONVERT = "Convert it to uncompressed DICOM (for example gdcmconv --raw) or to PNG"
# What _quiet() sets is the process's, not the thread's: one reader at a time.
_ONE_READER = threading.Lock()


def read_dicom(name: str, data: bytes, *, frame: int, check: SizeCheck) -> Image.Image:
    """Reads one frame.

    Args:
        name: what error messages call the file.
        data: the file's bytes, preamble included.
        frame: which frame, from 0.
        check: called before pixels are decoded.

    Returns:
        Mode L or RGB.

    Raises:
        ImageError: no pixels, no such frame, too large, damaged, or compressed in a way that nothing here decodes.
    """
    if find_spec("pydicom") is None:
        raise ImageError(name, "is a DICOM file, which takes pydicom to read", "Run: pip install pydicom")
    problem = ImageError(name, "is a DICOM file that can't be decoded", _CONVERT)
    try:
        with _quiet():
            return _read(name, data, frame, check)
    except ImageError as error:
        problem = ImageError(*error.args)
    except Exception:  # pydicom raises many kinds, and quotes values of the header in them
        pass
    raise problem  # out here, so that neither cause nor context of the error holds what pydicom said


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences pydicom, which quotes values it finds odd both as a warning and in its log."""
    log = logging.getLogger("pydicom")
    with _ONE_READER, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = log.level
        log.setLevel(logging.CRITICAL + 1)  # its children's too, which inherit the level
        try:
            yield
        finally:
            log.setLevel(before)


def _read(name: str, data: bytes, frame: int, check: SizeCheck) -> Image.Image:
    from pydicom import dcmread
    from pydicom.pixels import get_decoder
    from pydicom.pixels.processing import apply_color_lut

    if _DEFLATED in data:
        raise ImageError(name, "is a deflated DICOM file, which may inflate without bound", _CONVERT)
    ds = dcmread(BytesIO(data), specific_tags=_TAGS)
    if not any(keyword in ds for keyword in _PIXELS):
        raise ImageError(name, "is a DICOM file without a picture", "Pass an image object, not a report or a plan")
    check(name, (int(ds.Columns), int(ds.Rows)))
    frames = int(ds.get("NumberOfFrames") or 1)
    if frame >= frames:
        raise no_such_frame(name, frame, frames)
    syntax = ds.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    if not decoder.is_available:
        raise ImageError(name, "is compressed in a way for which no decoder is installed", _CONVERT)
    if syntax.is_encapsulated:
        _check_frame(name, ds, frame, frames)
    pixels, properties = decoder.as_array(ds, index=frame)

    photometric = properties["photometric_interpretation"]
    if photometric == "PALETTE COLOR":
        return Image.fromarray(to_eight_bits(apply_color_lut(pixels, ds)))
    if photometric == "RGB":
        bits = int(properties["bits_stored"])
        return Image.fromarray((pixels.astype("float32") * (255 / (2**bits - 1))).round().clip(0, 255).astype("uint8"))
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(name, "has a photometric interpretation that is not read", _CONVERT)
    grey = _grey(pixels, _with_functional_groups(ds, frame))
    return Image.fromarray(255 - grey if photometric == "MONOCHROME1" else grey)


def _check_frame(name: str, ds: Dataset, frame: int, frames: int) -> None:
    """Refuses a compressed frame that decodes to another size than the header says, which `check` has seen."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    encoded = get_frame(ds.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)
    lie = ImageError(name, "is a DICOM file whose compressed picture is not of the size it says", _CONVERT)
    if ds.file_meta.TransferSyntaxUID == RLELossless:
        count, *starts = struct.unpack("<16L", encoded[:64])
        segments = (encoded[start:end] for start, end in pairwise([*starts[:count], len(encoded)]))
        if any(_unpacks_to_more(segment, 2 * ds.Rows * ds.Columns) for segment in segments):
            raise lie
    elif encoded.startswith((b"\xff\xd8", b"\xff\x4f", b"\0\0\0\x0cjP")):  # JPEG, JPEG 2000 codestream and file
        with Image.open(BytesIO(encoded), formats=("JPEG", "JPEG2000")) as image:
            if image.size != (ds.Columns, ds.Rows):
                raise lie


def _unpacks_to_more(segment: bytes, limit: int) -> bool:
    """Whether PackBits data (PS3.5 annex G) would grow past `limit` bytes; walks its headers only."""
    position = total = 0
    while position < len(segment) and total <= limit:
        header = segment[position]
        if header > 128:  # one byte, repeated
            total, position = total + 257 - header, position + 2
        elif header < 128:  # that many bytes and one, as they are
            total, position = total + header + 1, position + header + 2
        else:
            position += 1
    return total > limit


def _with_functional_groups(ds: Dataset, frame: int) -> Dataset:
    """Enhanced objects keep rescale and window per frame, or once for all: brings this frame's to the top level."""
    shared, per_frame = ds.get("SharedFunctionalGroupsSequence"), ds.get("PerFrameFunctionalGroupsSequence")
    for group in [*(shared[:1] if shared else ()), *(per_frame[frame : frame + 1] if per_frame else ())]:
        for keyword in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for macro in group.get(keyword) or ():
                for element in macro:
                    ds.add(element)
    return ds


def _grey(pixels: np.ndarray[Any, Any], ds: Dataset) -> np.ndarray[Any, Any]:
    """Stored values to 0..255: modality transform, then VOI look-up table, window or, with neither, full range."""
    import numpy as np
    from pydicom.pixels.processing import apply_modality_lut

    padding = _number(ds.get("PixelPaddingValue"))
    inside = pixels != padding if padding is not None else np.ones(pixels.shape, dtype=bool)
    values = np.nan_to_num(apply_modality_lut(pixels, ds).astype(np.float32))
    if ds.get("VOILUTSequence"):
        shown = _voi_table(values, ds.VOILUTSequence[0])
    else:
        window = _window(values, ds)
        if window is None:
            known = values[inside] if inside.any() else values
            low, high = float(known.min()), float(known.max())
            window = (values - low) * (255 / ((high - low) or 1.0))
        shown = window
    return shown.round().clip(0, 255).astype(np.uint8)


def _voi_table(values: np.ndarray[Any, Any], item: Dataset) -> np.ndarray[Any, Any]:
    """VOI LUT (PS3.3 C.11.2.1.1): values before the first entry take it, those after the last take that."""
    import numpy as np

    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    order = "<" if item.is_little_endian is not False else ">"
    table = np.frombuffer(data, f"{order}u2") if isinstance(data, bytes) else np.atleast_1d(np.asarray(data))
    index = (values.astype(np.int64) - first).clip(0, (entries or 2**16) - 1)
    return table[index].astype(np.float32) * (255 / (2**bits - 1))


def _window(values: np.ndarray[Any, Any], ds: Dataset) -> np.ndarray[Any, Any] | None:
    """The first window (PS3.3 C.11.2.1.2 and C.11.2.1.3), to 0..255; None without a valid one."""
    import numpy as np

    centre, width = _number(ds.get("WindowCenter")), _number(ds.get("WindowWidth"))
    function = ds.get("VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return 255 / (1 + np.exp((-4 * (values - centre) / width).clip(-80, 80)))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-6)  # a width of 1 is a step at the centre
    return ((values - centre) / width + 0.5).clip(0, 1) * 255


def _number(value: Any) -> float | None:
    """The first of one or several decimal strings; None where there is none or it is not finite."""
    if value is None or isinstance(value, str):
        return None
    first = next(iter(value), None) if hasattr(value, "__iter__") else value
    return None if first is None or not math.isfinite(first) else float(first)
