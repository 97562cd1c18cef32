"""Compressed transfer syntaxes: which can be decoded here, what is missing, and streams that decoders must not see.

The module is also a decoding plugin of pydicom that hands lossless JPEG, 12-bit JPEG and JPEG-LS to imagecodecs.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from biosae.data.items import ReadError

JPEG_8 = "1.2.840.10008.1.2.4.50"
JPEG_12 = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
RLE = "1.2.840.10008.1.2.5"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", DEFLATED)
JPEG = (JPEG_8, JPEG_12, *JPEG_LOSSLESS, *JPEG_LS)

# pydicom's name of a plugin -> what to install; the order is the order of preference. pylibjpeg-libjpeg is GPL.
_PLUGINS: dict[str, tuple[tuple[str, str], ...]] = {
    JPEG_8: (("pillow", "pillow"), ("gdcm", "python-gdcm"), ("pylibjpeg", "pylibjpeg-libjpeg (GPL)")),
    **dict.fromkeys(
        (JPEG_12, *JPEG_LOSSLESS),
        (("imagecodecs", "imagecodecs"), ("gdcm", "python-gdcm"), ("pylibjpeg", "pylibjpeg-libjpeg (GPL)")),
    ),
    **dict.fromkeys(
        JPEG_LS,
        (
            ("imagecodecs", "imagecodecs"), ("pyjpegls", "pyjpegls"), ("gdcm", "python-gdcm"),
            ("pylibjpeg", "pylibjpeg-libjpeg (GPL)"),
        ),
    ),
    **dict.fromkeys(JPEG_2000, (("pylibjpeg", "pylibjpeg-openjpeg"), ("pillow", "pillow"), ("gdcm", "python-gdcm"))),
    **dict.fromkeys(HTJ2K, (("pylibjpeg", "pylibjpeg-openjpeg"),)),
    RLE: (("pydicom", "pydicom"), ("pylibjpeg", "pylibjpeg-rle"), ("gdcm", "python-gdcm")),
}  # fmt: skip

DECODER_DEPENDENCIES = dict.fromkeys((JPEG_12, *JPEG_LOSSLESS, *JPEG_LS), ("imagecodecs>=2024.1",))
_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}  # frames of baseline, extended, progressive, lossless JPEG, and JPEG-LS
_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length


def is_available(uid: str) -> bool:
    """Whether imagecodecs can decode a syntax here (what pydicom asks of a plugin)."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec("imagecodecs") is not None


def decode_frame(src: bytes, runner: Any) -> bytes:
    """Decode one frame with imagecodecs (what pydicom asks of a plugin): samples interleaved, in native words."""
    import imagecodecs

    syntax = runner.transfer_syntax
    image = imagecodecs.jpegls_decode(src) if syntax in JPEG_LS else imagecodecs.jpeg_decode(src)
    shape = (runner.rows, runner.columns) + ((runner.samples_per_pixel,) if runner.samples_per_pixel > 1 else ())
    if image.shape != shape:
        raise ValueError(f"decoded to {image.shape}")
    runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", 8 * image.dtype.itemsize)
    return np.ascontiguousarray(image).tobytes()


@cache
def decoder(syntax: str) -> tuple[Any, str]:
    """pydicom's decoder of a transfer syntax and the plugin that it shall use (empty for uncompressed data).

    Raises
    ------
    ReadError
        ``unsupported``, naming what to install, the packages of a free licence first.
    """
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    name = UID(syntax).name if UID(syntax).is_transfer_syntax else "its transfer syntax"
    if syntax in NATIVE:
        return get_decoder(syntax), ""
    if syntax not in _PLUGINS:
        raise ReadError(
            "unsupported", f"{name} is no still-image syntax that can be decoded; convert the file to JPEG 2000 or RLE"
        )
    found = get_decoder(syntax)
    if syntax in DECODER_DEPENDENCIES and "imagecodecs" not in found._available | found._unavailable:
        found.add_plugin("imagecodecs", (__name__, "decode_frame"))
    for plugin, _ in _PLUGINS[syntax]:
        if plugin in found.available_plugins:
            return found, plugin
    packages = [package for _, package in _PLUGINS[syntax]]
    raise ReadError(
        "unsupported",
        f"no installed decoder for {name}: pip install 'biosae[dicom]' brings {packages[0]}"
        + (f"; {' or '.join(packages[1:])} will do as well" if packages[1:] else ""),
    )


def check_stream(src: bytes, syntax: str, *, rows: int, columns: int, samples: int, bits: int) -> dict[str, Any]:
    """Look at a compressed frame before a decoder does: its size must be the header's, and its end must be there.

    Returns
    -------
    ``colour`` is ``"RGB"``, ``"YBR_FULL"`` or ``""`` (the stream does not say) of what decoders give for it.

    Raises
    ------
    ReadError
        ``truncated`` if the end of the stream is missing, ``unreadable`` if it is damaged.
    """
    if syntax == RLE:
        if len(src) > 2 * (rows * columns * samples * bits // 8) + 1024:
            raise ReadError("unreadable", "a run-length coded frame is longer than the picture")
        return {"colour": ""}
    if not src.rstrip(b"\0\xff").endswith(b"\xff\xd9"):  # fragments are filled up with either byte
        raise ReadError("truncated", "the compressed stream has no end")
    found = _jpeg(src) if syntax in JPEG else _jpeg_2000(src)
    stated = (rows, columns, samples)
    if found["size"] != stated:
        raise ReadError(
            "unreadable",
            "the compressed stream is of {} x {} pixels and {} samples, the header says {} x {} and {}".format(
                *found["size"], *stated
            ),
        )
    if found["precision"] > bits:
        raise ReadError("unreadable", f"the compressed stream is of {found['precision']} bits, the header says {bits}")
    return found


def _jpeg(src: bytes) -> dict[str, Any]:
    """Size, bits and colour of a JPEG or JPEG-LS stream, by its markers up to the first scan."""
    if src[:2] != b"\xff\xd8":
        raise ReadError("unreadable", "the compressed stream is no JPEG")
    at, size, kind, precision, ids, colour = 2, None, 0, 0, b"", ""
    while True:
        while src[at : at + 2] == b"\xff\xff":
            at += 1
        if at + 4 > len(src) or src[at] != 0xFF:
            raise ReadError("unreadable", "the JPEG's markers are damaged")
        marker, length = src[at + 1], int.from_bytes(src[at + 2 : at + 4], "big")
        if marker in _BARE:
            at += 2
            continue
        body = src[at + 4 : at + 2 + length]
        if marker in _SOF and len(body) >= 6:
            kind, precision = marker, body[0]
            size = (int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5])
            ids = body[6::3]
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            colour = "RGB"  # decoders turn what this marker describes into RGB
        elif marker == 0xE0 and body.startswith(b"JFIF") and not colour:
            colour = "YBR_FULL"
        elif marker == 0xDA:
            if size is None:
                raise ReadError("unreadable", "the JPEG has no frame header")
            if kind in (0xC0, 0xC1) and body[-3:-1] != b"\x00\x3f":
                raise ReadError("unreadable", "the JPEG's scan does not hold all coefficients, as its process demands")
            if ids[:3].lower() == b"rgb":
                colour = "RGB"
            return {"size": size, "precision": precision, "colour": colour if size[2] == 3 else ""}
        at += 2 + max(length, 2)


def _jpeg_2000(src: bytes) -> dict[str, Any]:
    """Size, bits and colour of a JPEG 2000 codestream, bare or in a JP2 file."""
    at = src.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or at + 44 > len(src):
        raise ReadError("unreadable", "the compressed stream is no JPEG 2000")
    x1, y1, x0, y0, tile_x, tile_y = (int.from_bytes(src[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(6))
    samples = int.from_bytes(src[at + 40 : at + 42], "big")
    if not tile_x or not tile_y or -(-x1 // tile_x) * -(-y1 // tile_y) > 65535:
        raise ReadError("unreadable", "the JPEG 2000 stream has impossible tiles")
    coding = src.find(b"\xff\x52", at, at + 4096)
    mixed = coding > 0 and coding + 9 < len(src) and src[coding + 8] == 1
    precision = (src[at + 42] & 0x7F) + 1
    colour = "RGB" if mixed and samples == 3 else ""
    return {"size": (y1 - y0, x1 - x0, samples), "precision": precision, "colour": colour}


_quiet = threading.local()


def _speaks(record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "on", False)


@contextmanager
def quiet() -> Any:
    """pydicom logs each decoder's traceback, although the error is reported as well; not within this thread's block."""
    logger = logging.getLogger("pydicom.pixels.decoders.base")
    if _speaks not in logger.filters:
        logger.addFilter(_speaks)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = False
