"""Whole slides: what a slide offers, which library opens it, where its scale comes from, and reading a region of it."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import require

SUFFIXES = (
    ".svs", ".ndpi", ".tif", ".tiff", ".btf", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".qptiff",
    ".dcm",
)  # fmt: skip
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LARGEST_REGION = 2**26  # pixels of a level that are read at once: 192 MiB of RGB
LARGEST_TILE = 2**26  # pixels of one tile or strip of a file, which can only be decoded as a whole
PLAUSIBLE_TAG = (0.02, 12.0)  # um/px; 72 to 1200 dots an inch, the defaults of drawing programs, are 353 to 21 um/px
_BLOCK = 2048  # pixels of a level, each way, that a thumbnail is made from at a time
_RESOLUTION = ("XResolution", "YResolution", "ResolutionUnit")
_GENERIC = ("generic-tiff", "dicom")  # OpenSlide's names of what is read here without it


class Slide(Protocol):
    """An open slide. Pixels are counted from the upper left corner; nothing here identifies a patient.

    Attributes
    ----------
    backend
        Library that reads it: ``"openslide"``, ``"tifffile"`` or ``"pydicom"``.
    vendor
        Maker or format, in lower case.
    objective
        Power of the objective, if the file states one.
    levels
        ``(width, height)`` of each level in pixels, the finest first.
    downsamples
        Pixels of level 0 to one of each level.
    scales
        ``(source, (x, y))``: micrometres per pixel of level 0 that the file states, the most reliable first; see
        :func:`resolve_mpp`.
    origin
        Pixel (x, y) of level 0 at which the scanned part begins; viewers that show only that part count from there.
    """

    backend: str
    vendor: str
    objective: float | None
    levels: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    scales: tuple[tuple[str, tuple[float, float]], ...]
    origin: tuple[int, int]

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """Pixels of a level, ``uint8 (height, width, 3)`` RGB, transparency on white; within the level."""

    def close(self) -> None:
        """Let the file go."""


def open_slide(path: str | os.PathLike) -> Slide:
    """Open a slide by its content, whatever its name.

    DICOM (a file, or a folder with the files of one series) is read through pydicom; a format that OpenSlide knows by
    its vendor (Aperio, Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss) through OpenSlide; any other
    TIFF through tifffile. A TIFF is checked before OpenSlide sees it: every tile must lie in the file.

    Raises
    ------
    ReadError
        If the file is missing, empty, truncated, damaged or of an unsupported kind.
    """
    path = Path(path)
    if path.is_dir():
        return _dicom(path)
    try:
        with open(path, "rb") as stream:
            head = stream.read(132)
    except FileNotFoundError:
        raise ReadError("missing", f"no file {path}") from None
    except OSError as error:
        raise ReadError("unreadable", f"{error.strerror or error}: {path}") from None
    if not head.strip(b"\0") and b"DICM" not in head:
        raise ReadError("empty", f"begins with {len(head)} zero bytes" if head else "0 bytes")
    if head[128:] == b"DICM":
        return _dicom(path)
    is_tiff = head[:4] in TIFF_MAGIC
    if is_tiff:
        from biosae.read.slide_tiff import check_tiff

        check_tiff(path)
    openslide = require("openslide", extra="wsi")
    vendor = openslide.OpenSlide.detect_format(str(path))
    if vendor is not None and vendor not in _GENERIC:
        return OpenSlideFile(path, vendor)
    if is_tiff:
        from biosae.read.slide_tiff import TiffSlide

        return TiffSlide(path)
    raise ReadError("unsupported", f"no slide that OpenSlide, tifffile or pydicom knows (begins with {head[:8]!r})")


def _dicom(path: Path) -> Slide:
    from biosae.read.slide_dicom import DicomSlide

    return DicomSlide(path)


class OpenSlideFile:
    """A slide that OpenSlide reads."""

    backend = "openslide"

    def __init__(self, path: Path, vendor: str) -> None:
        self._path, self.vendor = str(path), vendor
        self._slide = self._open()
        self.levels = tuple(tuple(size) for size in self._slide.level_dimensions)
        self.downsamples = level_downsamples(self.levels)
        properties = self._slide.properties
        self.objective = positive(properties.get("openslide.objective-power"))
        stated = [
            ("openslide.mpp", (properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))),
            ("aperio.MPP", (properties.get("aperio.MPP"),) * 2),
            ("tiff.Resolution", tag_scale(*(properties.get(f"tiff.{k}") for k in _RESOLUTION))),
        ]
        self.scales = stated_scales(stated)
        bounds = [properties.get(f"openslide.bounds-{side}") for side in ("x", "y", "width", "height")]
        self.origin = (0, 0) if None in bounds else (int(bounds[0]), int(bounds[1]))

    def _open(self) -> Any:
        openslide = require("openslide", extra="wsi")
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            raise ReadError("unreadable", f"{self.vendor} slide: {error}; copy or export it again") from None

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See :class:`Slide`. Where OpenSlide's factor between levels is no whole number, it interpolates between
        pixels of a level, by less than half a pixel of level 0."""
        import openslide

        factor = self._slide.level_downsamples[level]
        try:
            image = self._slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        except openslide.OpenSlideError as error:  # after an error a handle of OpenSlide gives nothing more
            self._slide.close()
            self._slide = self._open()
            raise ReadError("unreadable", f"{self.vendor} slide, level {level}, ({x}, {y}): {error}") from None
        return on_white(np.asarray(image))

    def close(self) -> None:
        """Let the file go."""
        self._slide.close()


def resolve_mpp(slide: Slide, stated: float | None, source: str) -> tuple[tuple[float, float], str]:
    """Micrometres per pixel (x, y) of level 0 and where they come from; the first that is there of

    1. ``stated``: the number or the column that the user named (``source`` is ``"argument"`` or ``"column <name>"``),
    2. the vendor's own key (``openslide.mpp``, ``aperio.MPP``, OME ``PhysicalSizeX``, DICOM ``PixelSpacing``),
    3. the TIFF resolution tags in inches or centimetres, between 0.02 and 12 um/px.

    Raises
    ------
    ReadError
        ``no_unit`` if there is none, ``unsupported`` if pixels are more than twice as long as wide.
    """
    if stated is not None:
        return (stated, stated), source
    if not slide.scales:
        raise ReadError(
            "no_unit",
            "the file does not state micrometres per pixel (or only the default of a drawing program); pass "
            "slide_mpp= a number, or the name of a column of the table",
        )
    source, (x, y) = slide.scales[0]
    if max(x, y) > 2 * min(x, y):
        raise ReadError("unsupported", f"pixels of {x:g} x {y:g} um ({source}) are implausible; pass slide_mpp=")
    return (x, y), source


def stated_scales(candidates: list[tuple[str, tuple[Any, Any]]]) -> tuple[tuple[str, tuple[float, float]], ...]:
    """The candidates whose two values are positive numbers."""
    numbers = [(source, (positive(x), positive(y))) for source, (x, y) in candidates]
    return tuple((source, pair) for source, pair in numbers if None not in pair)


def tag_scale(x: Any, y: Any, unit: str | None) -> tuple[float | None, float | None]:
    """Micrometres per pixel (x, y) of TIFF resolution tags (pixels to an ``"inch"`` or a ``"centimeter"``); None where
    that is no scale of a slide."""
    length = {"inch": 25_400.0, "centimeter": 10_000.0}.get(unit)
    pair = tuple(length / v if length and v else None for v in (positive(x), positive(y)))
    low, high = PLAUSIBLE_TAG
    return pair if all(v and low <= v <= high for v in pair) else (None, None)


def positive(value: Any) -> float | None:
    """A finite number above 0, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def level_downsamples(levels: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """Factor of each level: a power of two or else a whole number that explains its size up to rounding, or else the
    mean of both ratios."""
    (width, height), out = levels[0], []
    for w, h in levels:
        mean = (width / w + height / h) / 2
        whole = (2.0 ** round(math.log2(mean)), max(1.0, float(round(mean))))
        out.append(next((f for f in whole if abs(width / f - w) < 1 and abs(height / f - h) < 1), mean))
    return tuple(out)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """``uint8 (H, W, 4)`` with straight alpha on white, ``(H, W, 3)``."""
    alpha = pixels[:, :, 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(pixels[:, :, :3])
    a = alpha.astype(np.uint32)
    return ((pixels[:, :, :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def region(
    slide: Slide, level: int, box: tuple[float, float, float, float], size: tuple[int, int], *, smooth: bool = True
) -> np.ndarray:
    """A box of a level, resampled to ``size``.

    Parameters
    ----------
    box
        ``(left, upper, right, lower)`` in pixels of the level; fractions are allowed. Beyond the slide it is white.
    size
        ``(width, height)`` of the answer in pixels.
    smooth
        Lanczos windowed sinc of Pillow, stretched over the source so that nothing is aliased; else the mean over the
        area of each pixel.

    Returns
    -------
    ``uint8 (height, width, 3)``; the same as the crop of the resampled whole level. A box of whole pixels of the wanted
    size is not resampled.

    Raises
    ------
    ReadError
        ``unsupported`` if more than ``LARGEST_REGION`` pixels would be read, or what :meth:`Slide.read` raises.
    """
    from PIL import Image

    (x0, y0, x1, y1), (width, height) = box, size
    exact = (round(x0), round(y0), round(x0) + width, round(y0) + height)
    if max(abs(a - b) for a, b in zip(box, exact)) < 1e-3:
        return _padded(slide, level, *exact)
    left, right = _reach(x0, x1, width, slide.levels[level][0], smooth)
    upper, lower = _reach(y0, y1, height, slide.levels[level][1], smooth)
    pixels = _padded(slide, level, left, upper, right, lower)
    kind = Image.Resampling.LANCZOS if smooth else Image.Resampling.BOX
    inside = (max(x0 - left, 0), max(y0 - upper, 0), min(x1, right) - left, min(y1, lower) - upper)
    return np.asarray(Image.fromarray(pixels).resize(size, kind, box=inside))


def _reach(start: float, stop: float, n: int, length: int, smooth: bool) -> tuple[int, int]:
    """Whole pixels that the filter needs; as far as the slide goes, unless the box itself goes further."""
    margin = math.ceil((3 if smooth else 1) * max(1.0, (stop - start) / n)) + 1
    low, high = math.floor(start) - margin, math.ceil(stop) + margin
    return low if start < -1 else max(low, 0), high if stop > length + 1 else min(high, length)


def _padded(slide: Slide, level: int, left: int, upper: int, right: int, lower: int) -> np.ndarray:
    """Pixels of a level, white beyond it."""
    width, height = slide.levels[level]
    if (right - left) * (lower - upper) > LARGEST_REGION:
        raise ReadError(
            "unsupported",
            f"{right - left} x {lower - upper} pixels would be read at once: the slide has no level near the wanted "
            "scale; take a smaller tile or a finer mpp, or write a pyramid into the file",
        )
    x, y = max(left, 0), max(upper, 0)
    w, h = min(right, width) - x, min(lower, height) - y
    if (x, y, w, h) == (left, upper, right - left, lower - upper):
        return slide.read(x, y, level, w, h)
    out = np.full((lower - upper, right - left, 3), 255, np.uint8)
    if w > 0 and h > 0:
        out[y - upper : y - upper + h, x - left : x - left + w] = slide.read(x, y, level, w, h)
    return out


def thumbnail(slide: Slide, size: tuple[int, int]) -> np.ndarray:
    """The whole slide at ``size`` (width, height), ``uint8 (height, width, 3)``: means over area, block by block, of
    the coarsest level that has at least so many pixels."""
    width, height = size
    fine = [i for i, (w, h) in enumerate(slide.levels) if w >= width and h >= height]
    level = fine[-1] if fine else 0
    sx, sy = (a / b for a, b in zip(slide.levels[level], size))
    step_x, step_y = max(1, int(_BLOCK / sx)), max(1, int(_BLOCK / sy))
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, step_y):
        for left in range(0, width, step_x):
            w, h = min(step_x, width - left), min(step_y, height - top)
            box = (left * sx, top * sy, (left + w) * sx, (top + h) * sy)
            out[top : top + h, left : left + w] = region(slide, level, box, (w, h), smooth=False)
    return out


def stated_size(data: bytes) -> tuple[int, int] | None:
    """``(width, height)`` in the header of a JPEG or JPEG 2000 stream, None if there is none to see."""
    if data[:4] == b"\xff\x4f\xff\x51" and len(data) >= 24:
        right, lower, left, upper = (int.from_bytes(data[i : i + 4], "big") for i in range(8, 24, 4))
        return right - left, lower - upper
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


@contextlib.contextmanager
def decoding(what: str) -> Any:
    """Turns whatever a library raises on damaged bytes into a ReadError."""
    try:
        yield
    except ReadError:
        raise
    except MemoryError:
        raise ReadError("unreadable", f"{what}: states more pixels than memory can hold") from None
    except Exception as error:  # decoders and parsers raise many types; none may end a long run
        text = " ".join(str(error).split())[:200]
        raise ReadError("unreadable", f"{what}: {type(error).__name__}: {text}") from None
