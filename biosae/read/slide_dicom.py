"""Whole slides in DICOM (VL Whole Slide Microscopy Image), frame by frame."""

from __future__ import annotations

import io
import itertools
import math
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import require
from biosae.read.dicom_file import WHOLE_SLIDE, Bounded
from biosae.read.slides import LARGEST_TILE, decoding, level_downsamples, positive, stated_scales, stated_size

_NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"}  # implicit and explicit little endian
_JPEG = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}
_JPEG2000 = {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"}
_PIXEL_DATA, _ITEM = b"\xe0\x7f\x10\x00", b"\xfe\xff\x00\xe0"
_OTHER_FLAVOURS = {"LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER"}
_HEADER_TAGS = ["SOPClassUID", "SeriesInstanceUID"]


class Frames(NamedTuple):
    """One file, which is one level: sizes in pixels, and what lies where.

    ``grid`` is (row, column) of the tiles to the number of the frame; ``at`` the number of the frame to its parts, as
    (first byte, number of bytes).
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    grid: dict[tuple[int, int], int]
    at: list[list[tuple[int, int]]]
    decode: Callable[[bytes], np.ndarray]
    stream: Bounded


def series(path: str | os.PathLike) -> str | None:
    """UID of the series of a DICOM whole slide; None if the file is none, or states no series."""
    pydicom = require("pydicom", extra="wsi")
    try:
        stream = Bounded(open(path, "rb"))  # noqa: SIM115 -- closed below
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
                return str(header.SeriesInstanceUID) if header.SOPClassUID == WHOLE_SLIDE else None
        finally:
            stream.close()
    except Exception:  # pydicom raises many types on what is no DICOM; the caller opens the file and reports
        return None


class DicomSlide:
    """A DICOM series of one slide, each level a file; labels, overviews and thumbnails are left aside.

    Frames may lie in rows (``TILED_FULL``) or state their places (``TILED_SPARSE``); what no frame covers is white.
    Uncompressed, JPEG and JPEG 2000 frames of 8 bits, grey or RGB.

    Parameters
    ----------
    path
        A file, which is read with the files beside it that are of its series; or a folder with one such series.
    """

    backend = "pydicom"
    origin = (0, 0)

    def __init__(self, path: Path) -> None:
        self.vendor, self.objective, self.scales = "dicom", None, ()
        self._lock = threading.Lock()
        opened: list[tuple[Frames, Any]] = []
        try:
            for file in _files(path):
                level = _open_level(file)
                if level is not None:
                    opened.append(level)
            if not opened:
                raise ReadError("no_image", f"DICOM with a label or an overview but no slide: {path.name}")
        except ReadError:
            for frames, _ in opened:
                frames.stream.close()
            raise
        opened.sort(key=lambda level: -level[0].size[0])
        self._levels = [frames for frames, _ in opened]
        header = opened[0][1]
        self.levels = tuple(frames.size for frames in self._levels)
        if len(set(self.levels)) < len(self.levels):
            self.close()
            raise ReadError(
                "unsupported", "DICOM series with two images of one size (focal planes, or one level in several files)"
            )
        self.downsamples = level_downsamples(self.levels)
        with decoding("DICOM header"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scales = stated_scales([("dicom.PixelSpacing", _spacing(header))])
            path_items = header.get("OpticalPathSequence") or []
            self.objective = positive(path_items[0].get("ObjectiveLensPower")) if len(path_items) else None
            self.vendor = str(header.get("Manufacturer") or "dicom").lower()

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See :class:`~biosae.read.slides.Slide`. Only the frames that the region touches are decoded."""
        frames = self._levels[level]
        tile_w, tile_h = frames.tile
        out = np.full((height, width, 3), 255, np.uint8)
        for row in range(y // tile_h, -(-(y + height) // tile_h)):
            for column in range(x // tile_w, -(-(x + width) // tile_w)):
                number = frames.grid.get((row, column))
                if number is None:
                    continue
                left, top = column * tile_w, row * tile_h
                tile = self._frame(frames, number)
                x0, x1, y0, y1 = max(x, left), min(x + width, left + tile_w), max(y, top), min(y + height, top + tile_h)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _frame(self, frames: Frames, number: int) -> np.ndarray:
        with decoding(f"DICOM frame {number + 1}"):
            with self._lock:
                parts = []
                for first, count in frames.at[number]:
                    frames.stream.seek(first)
                    parts.append(frames.stream.read(count))
            tile = frames.decode(b"".join(parts))
            if tile.shape != (frames.tile[1], frames.tile[0], 3):
                raise ReadError("unreadable", f"DICOM frame {number + 1} has shape {tile.shape}")
        return tile

    def close(self) -> None:
        """Let the files go."""
        for frames in self._levels:
            frames.stream.close()


def _files(path: Path) -> list[Path]:
    """The files of the slide at a path."""
    if not path.is_dir():
        uid = series(path)
        beside = sorted(p for p in path.parent.glob("*.dcm") if p != path) if uid is not None else []
        return [path, *(p for p in beside if series(p) == uid)]
    found = {p: series(p) for p in sorted(path.glob("*.dcm"))}
    slides = {p: uid for p, uid in found.items() if uid is not None}
    if not slides:
        raise ReadError("no_image", f"no DICOM whole slide among the {len(found)} .dcm files of {path}")
    if len(set(slides.values())) > 1:
        raise ReadError(
            "unsupported", f"{len(set(slides.values()))} DICOM series in {path}; name one file of the slide"
        )
    return list(slides)


def _open_level(file: Path) -> tuple[Frames, Any] | None:
    """One file opened, with its header; None for a label, overview or thumbnail."""
    pydicom = require("pydicom", extra="wsi")
    stream = Bounded(open(file, "rb"))  # noqa: SIM115 -- closed below, or with the slide
    keep = False
    try:
        with decoding("DICOM header"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(stream, stop_before_pixels=True)
            if header.get("SOPClassUID") != WHOLE_SLIDE:
                what = getattr(header.get("SOPClassUID"), "name", None) or "no stated class"
                raise ReadError("unsupported", f"DICOM of {what} is no whole slide; bs.read.dicom reads radiology")
            if set(header.get("ImageType") or ()) & _OTHER_FLAVOURS:
                return None
            frames = _frames(header, stream)
        keep = True
        return frames, header
    finally:
        if not keep:
            stream.close()


def _frames(header: Any, stream: Bounded) -> Frames:
    width, height = int(header.TotalPixelMatrixColumns), int(header.TotalPixelMatrixRows)
    tile_w, tile_h, n = int(header.Columns), int(header.Rows), int(header.get("NumberOfFrames") or 1)
    samples, bits = int(header.SamplesPerPixel), int(header.BitsAllocated)
    if min(width, height, tile_w, tile_h, n) < 1 or tile_w * tile_h > LARGEST_TILE // 4 or n > stream.size:
        raise ReadError("unreadable", f"DICOM of {width} x {height} pixels in {n} frames of {tile_w} x {tile_h}")
    if samples not in (1, 3) or bits != 8:
        raise ReadError("unsupported", f"DICOM slide with {samples} channels of {bits} bits; store 8-bit grey or RGB")
    across, down = -(-width // tile_w), -(-height // tile_h)
    grid = _grid(header, n, across, down, (tile_w, tile_h))
    syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
    start, length = _pixel_data(stream, implicit=syntax == "1.2.840.10008.1.2")
    photometric = str(header.PhotometricInterpretation)
    n_bytes = tile_w * tile_h * samples
    if syntax in _NATIVE:
        if length is None or start + n * n_bytes > stream.size:
            raise ReadError("truncated", f"DICOM of {n} frames of {n_bytes} bytes in a file of {stream.size}")
        at = [[(start + i * n_bytes, n_bytes)] for i in range(n)]
    elif syntax in _JPEG | _JPEG2000:
        at = _encapsulated(stream, start, n, header)
    else:
        raise ReadError("unsupported", f"DICOM transfer syntax {syntax}; store the slide as JPEG or JPEG 2000")

    def decode(data: bytes) -> np.ndarray:
        return _decode(data, syntax, photometric, (tile_h, tile_w, samples), planar=header.get("PlanarConfiguration"))

    return Frames((width, height), (tile_w, tile_h), grid, at, decode, stream)


def _grid(header: Any, n: int, across: int, down: int, tile: tuple[int, int]) -> dict[tuple[int, int], int]:
    """(row, column) of tiles to the number of their frame."""
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) == n and "PlanePositionSlideSequence" in groups[0]:
        grid = {}
        for i, group in enumerate(groups):
            place = group.PlanePositionSlideSequence[0]
            x, y = (
                int(place.ColumnPositionInTotalImagePixelMatrix) - 1,
                int(place.RowPositionInTotalImagePixelMatrix) - 1,
            )
            if x % tile[0] or y % tile[1] or (y // tile[1], x // tile[0]) in grid:
                raise ReadError("unsupported", "DICOM slide whose frames overlap or lie off the grid of tiles")
            grid[y // tile[1], x // tile[0]] = i
        return grid
    if header.get("DimensionOrganizationType") != "TILED_FULL" and n > 1:
        raise ReadError(
            "unsupported",
            "DICOM slide that does not state where its frames lie (neither TILED_FULL nor positions); convert it again",
        )
    if n != across * down:
        raise ReadError(
            "unreadable", f"DICOM slide of {across} x {down} tiles with {n} frames (truncated, or several focal planes)"
        )
    return {(i // across, i % across): i for i in range(n)}


def _pixel_data(stream: Bounded, *, implicit: bool) -> tuple[int, int | None]:
    """First byte of the pixels' value and its length (None: undefined). The stream stands at the element, where
    pydicom stopped."""
    element = stream.read(8)
    if element[:4] != _PIXEL_DATA:
        raise ReadError("truncated" if not element else "no_image", "DICOM slide without pixel data; copy it again")
    length = element[4:8] if implicit else stream.read(4)
    value = int.from_bytes(length, "little")
    return stream.tell(), None if value == 0xFFFFFFFF else value


def _encapsulated(stream: Bounded, start: int, n: int, header: Any) -> list[list[tuple[int, int]]]:
    """Places of the compressed frames: one fragment a frame, or by the table of offsets."""
    items, at = [], start
    while at + 8 <= stream.size:
        stream.seek(at)
        head = stream.read(8)
        if head[:4] != _ITEM:
            break
        length = int.from_bytes(head[4:], "little")
        if at + 8 + length > stream.size:
            raise ReadError("truncated", f"DICOM slide that ends in frame {len(items)} of {n}; copy it again")
        items.append((at + 8, length))
        at += 8 + length
    fragments = items[1:]
    if len(fragments) == n:
        return [[f] for f in fragments]
    if not items or len(fragments) < n:
        raise ReadError("truncated", f"DICOM slide with {len(fragments)} of {n} frames; copy it again")
    stream.seek(items[0][0])
    table = stream.read(items[0][1])
    size, base = 4, fragments[0][0] - 8
    if not table and "ExtendedOffsetTable" in header:
        table, size = header.ExtendedOffsetTable, 8
    offsets = [base + int.from_bytes(table[i : i + size], "little") for i in range(0, len(table), size)]
    if len(offsets) != n:
        raise ReadError("unreadable", f"DICOM slide whose table of offsets has {len(offsets)} of {n} frames")
    bounds = [*offsets, math.inf]
    return [[f for f in fragments if low <= f[0] - 8 < high] for low, high in itertools.pairwise(bounds)]


def _decode(
    data: bytes, syntax: str, photometric: str, shape: tuple[int, int, int], *, planar: int | None
) -> np.ndarray:
    """One frame, ``uint8 (H, W, 3)`` RGB."""
    height, width, samples = shape
    if syntax in _NATIVE:
        tile = np.frombuffer(data, np.uint8)
        tile = tile.reshape(samples, height, width).transpose(1, 2, 0) if planar == 1 else tile.reshape(shape)
        if photometric.startswith("YBR"):
            raise ReadError("unsupported", f"uncompressed DICOM slide in {photometric}; store RGB")
    else:
        if stated_size(data) != (width, height):
            raise ReadError("unreadable", f"a frame states {stated_size(data)} pixels instead of {(width, height)}")
        tile = _jpeg(data, photometric) if syntax in _JPEG else _jpeg2000(data)
    if photometric == "MONOCHROME1":
        tile = 255 - tile
    return np.repeat(tile.reshape(height, width, 1), 3, axis=2) if tile.size == height * width else tile


def _jpeg(data: bytes, photometric: str) -> np.ndarray:
    """The markers of the JPEG say whether it is YCbCr (a JFIF always is); where there is none, the header does."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        unmarked = "jfif" not in image.info and "adobe" not in image.info
        if unmarked and photometric == "RGB" and image.mode == "RGB":
            imagecodecs = require("imagecodecs", extra="wsi")
            return imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB")
        return np.asarray(image.convert("RGB"))


def _jpeg2000(data: bytes) -> np.ndarray:
    tile = require("imagecodecs", extra="wsi").jpeg2k_decode(data)
    if tile.dtype != np.uint8:
        raise ReadError("unsupported", f"DICOM slide with JPEG 2000 of {tile.dtype}; store 8 bits")
    return tile


def _spacing(header: Any) -> tuple[float | None, float | None]:
    """Micrometres per pixel (x, y) of the shared, else the first frame's, pixel measures."""
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (header.get(name) or [])[:1]:
            for measures in group.get("PixelMeasuresSequence") or []:
                rows, columns = (positive(v) for v in (measures.get("PixelSpacing") or (None, None)))
                return columns and columns * 1000, rows and rows * 1000
    rows, columns = (positive(v) for v in (header.get("PixelSpacing") or (None, None)))
    return columns and columns * 1000, rows and rows * 1000
