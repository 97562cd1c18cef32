"""Slides in TIFF of no particular vendor (plain, pyramidal, OME), tile by tile through tifffile."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import require
from biosae.read.slides import (
    LARGEST_TILE,
    decoding,
    level_downsamples,
    on_white,
    positive,
    stated_scales,
    stated_size,
    tag_scale,
)

_CACHED_BYTES = 2**25
_MOST_PAGES = 4096
_INCH, _CENTIMETRE = 2, 3
_TO_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6


def check_tiff(path: Path) -> None:
    """Refuse a TIFF whose directories are damaged or whose tiles do not all lie in the file, before anything decodes
    it.

    Raises
    ------
    ReadError
        ``truncated``, ``unreadable`` or ``unsupported``.
    """
    tiff = _opened(path)
    with tiff, decoding("TIFF directories"):
        for page in _pages(tiff):
            _check_page(page, path.stat().st_size, whole=not tiff.is_ndpi)


def _opened(path: Path) -> Any:
    tifffile = require("tifffile", extra="wsi")
    size = path.stat().st_size
    try:
        return tifffile.TiffFile(path)
    except Exception as error:  # tifffile raises many types on damaged files
        with open(path, "rb") as stream:
            head = stream.read(16)
        order = "little" if head[:2] == b"II" else "big"
        first = int.from_bytes(head[8:16] if head[2:4] in (b"+\0", b"\0+") else head[4:8], order)
        reason = "truncated" if first >= size else "unreadable"
        raise ReadError(reason, f"TIFF of {size} bytes, directory at byte {first}: {error}") from None


def _pages(tiff: Any) -> list[Any]:
    pages = []
    for page in tiff.pages:
        pages.append(page)
        if len(pages) > _MOST_PAGES:
            raise ReadError("unreadable", f"TIFF with more than {_MOST_PAGES} directories")
    if not pages:
        raise ReadError("no_image", "TIFF without an image")
    return pages


def _check_page(page: Any, size: int, *, whole: bool = True) -> None:
    """``whole=False`` looks only at where tiles begin: Hamamatsu's sizes of more than 4 GiB wrap around."""
    offsets, counts = np.asarray(page.dataoffsets, np.float64), np.asarray(page.databytecounts, np.float64)
    if len(offsets) != len(counts):
        raise ReadError("unreadable", f"TIFF with {len(offsets)} tile offsets and {len(counts)} tile sizes")
    missing = int((offsets + (counts if whole else 0) > size).sum())
    if missing:
        raise ReadError(
            "truncated",
            f"{missing} of {len(offsets)} tiles lie beyond the end of the file ({size} bytes); copy it again",
        )
    if not page.is_tiled:
        return
    width, height = page.tilewidth, page.tilelength
    if not 0 < width * height <= LARGEST_TILE // 4:
        raise ReadError("unreadable", f"TIFF with tiles of {width} x {height} pixels")
    needed = -(-page.imagewidth // width) * -(-page.imagelength // height)
    if len(offsets) < needed:
        raise ReadError(
            "unreadable",
            f"{page.imagewidth} x {page.imagelength} pixels need {needed} tiles, the TIFF has {len(offsets)}",
        )


class TiffSlide:
    """A TIFF of 8 or 16 bits, grey, palette or RGB, tiled or in strips.

    Level 0 is the first page; further levels are its SubIFDs, or the later pages that show the same at fewer pixels.
    Tiles that the file leaves out are white.
    """

    backend = "tifffile"
    origin = (0, 0)

    def __init__(self, path: Path) -> None:
        self._tiff = _opened(path)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached = 0
        try:
            with decoding("TIFF"):
                self._levels = _levels(self._tiff)
                for page in self._levels:
                    _check_kind(page)
                    _check_page(page, path.stat().st_size)
                self.scales = _scales(self._tiff, self._levels[0])
        except ReadError:
            self._tiff.close()
            raise
        self.levels = tuple((page.imagewidth, page.imagelength) for page in self._levels)
        self.downsamples = level_downsamples(self.levels)
        self.vendor, self.objective = "ome-tiff" if self._tiff.is_ome else "tiff", None

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See :class:`~biosae.read.slides.Slide`. Only the tiles that the region touches are decoded."""
        page = self._levels[level]
        tile_w, tile_h = _segment(page)
        across = -(-page.imagewidth // tile_w)
        out = np.full((height, width, 3), 255, np.uint8)
        for row in range(y // tile_h, -(-(y + height) // tile_h)):
            for column in range(x // tile_w, -(-(x + width) // tile_w)):
                tile = self._tile(level, row * across + column)
                if tile is None:
                    continue
                left, top = column * tile_w, row * tile_h
                x0, x1 = max(x, left), min(x + width, left + tile.shape[1])
                y0, y1 = max(y, top), min(y + height, top + tile.shape[0])
                if x0 < x1 and y0 < y1:
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _tile(self, level: int, index: int) -> np.ndarray | None:
        """One decoded tile or strip, ``uint8 (h, w, 3)``, or None where the file has none."""
        page, key = self._levels[level], (level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if page.databytecounts[index] == 0:
            return None
        with decoding(f"TIFF, level {level}, tile {index}"):
            with self._lock:
                self._tiff.filehandle.seek(page.dataoffsets[index])
                data = self._tiff.filehandle.read(page.databytecounts[index])
            size = stated_size(data)
            if size is not None and (size[0] > _segment(page)[0] or size[1] > page.imagelength + page.tilelength):
                raise ReadError("unreadable", f"TIFF, level {level}, tile {index}: states {size[0]} x {size[1]} pixels")
            tile = page.decode(data, index, jpegtables=page.jpegtables)[0]
            tile = None if tile is None else _rgb(page, tile[0])
        if tile is not None:
            self._cache[key] = tile
            self._cached += tile.nbytes
            while self._cached > _CACHED_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def close(self) -> None:
        """Let the file go."""
        self._tiff.close()


def _levels(tiff: Any) -> list[Any]:
    """The first page, and what shows the same at fewer pixels."""
    pages = _pages(tiff)
    base, levels = pages[0], [pages[0]]
    kind = ("imagewidth", "imagelength", "samplesperpixel", "bitspersample", "is_reduced")
    twins = [page for page in pages if all(getattr(page, k) == getattr(base, k) for k in kind)]
    if len(twins) > 1:
        raise ReadError(
            "unsupported",
            f"TIFF with {len(twins)} pages of {base.imagewidth} x {base.imagelength} pixels (channels, focal planes or "
            "times), of which only the first would be seen; export RGB, or one page to a file",
        )
    smaller = list(base.pages) if base.subifds else pages[1:]
    for page in sorted(smaller, key=lambda p: -p.imagewidth):
        alike = (page.samplesperpixel, page.bitspersample, page.is_tiled) == (
            base.samplesperpixel, base.bitspersample, base.is_tiled,
        )  # fmt: skip
        shape = abs(page.imagewidth * base.imagelength / base.imagewidth - page.imagelength) <= 2
        if alike and shape and page.imagewidth < levels[-1].imagewidth:
            levels.append(page)
    return levels


def _segment(page: Any) -> tuple[int, int]:
    """Width and height of a tile or strip in pixels."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)


def _check_kind(page: Any) -> None:
    photometric, samples = int(page.photometric), page.samplesperpixel
    if min(page.imagewidth, page.imagelength) < 1:
        raise ReadError("unreadable", f"TIFF that states {page.imagewidth} x {page.imagelength} pixels")
    grey = photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _PALETTE) and samples == 1
    colour = photometric in (_RGB, _YCBCR) and samples in (3, 4)
    if page.dtype not in (np.uint8, np.uint16) or page.bitspersample not in (8, 16) or not (grey or colour):
        raise ReadError(
            "unsupported",
            f"TIFF with {samples} channels of {page.bitspersample} bits ({page.dtype}, photometric {photometric}); "
            "store 8- or 16-bit grey or RGB",
        )
    tifffile = require("tifffile", extra="wsi")
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise ReadError("unsupported", f"TIFF compression {page.compression}; store it as JPEG or Deflate")
    turn = page.tags.valueof("Orientation", 1)
    if turn != 1:
        raise ReadError(
            "unsupported", f"TIFF stored turned or mirrored (Orientation {turn}); store its pixels as they are shown"
        )
    if page.planarconfig == 2 and samples > 1:
        raise ReadError("unsupported", "TIFF with separate colour planes; store it interleaved")
    if page.imagedepth > 1:
        raise ReadError("unsupported", "TIFF with volumes in one page")
    if photometric == _YCBCR and int(page.compression) not in (6, 7, 33003, 33005):
        raise ReadError("unsupported", "TIFF in YCbCr without JPEG compression; store RGB")
    width, height = _segment(page)
    if not 0 < width * height <= LARGEST_TILE:
        raise ReadError(
            "unsupported", f"TIFF in strips of {width} x {height} pixels, which must be decoded whole; store it tiled"
        )
    needed = -(-page.imagewidth // width) * -(-page.imagelength // height)
    if len(page.dataoffsets) < needed:
        raise ReadError("unreadable", f"TIFF with {len(page.dataoffsets)} tiles or strips instead of {needed}")


def _rgb(page: Any, tile: np.ndarray) -> np.ndarray:
    photometric = int(page.photometric)
    if photometric == _PALETTE:
        return (np.asarray(page.colormap)[:, tile[:, :, 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
    if tile.dtype == np.uint16:
        tile = ((tile.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if photometric == _MIN_IS_WHITE:
        tile = 255 - tile
    if tile.shape[2] == 1:
        return np.repeat(tile, 3, axis=2)
    if tile.shape[2] == 4:
        return on_white(tile) if page.extrasamples and int(page.extrasamples[0]) else tile[:, :, :3].copy()
    return np.ascontiguousarray(tile)


def _scales(tiff: Any, page: Any) -> tuple[tuple[str, tuple[float, float]], ...]:
    """OME's physical size or Aperio's MPP in the description, then the resolution tags."""
    text = page.description or ""
    aperio = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", text[:100_000])
    candidates = [("aperio.MPP", (aperio and aperio[1],) * 2)]
    if tiff.is_ome:
        pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", text[:1_000_000])
        found = dict(re.findall(r'(PhysicalSize[XY](?:Unit)?)="([^"]*)"', pixels[0] if pixels else ""))
        candidates.append(("ome.PhysicalSize", (_ome(found, "X"), _ome(found, "Y"))))
    tags = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    pair = [t[0] / t[1] if isinstance(t, tuple) and t[1] else t for t in tags]
    unit = {_INCH: "inch", _CENTIMETRE: "centimeter"}.get(int(page.tags.valueof("ResolutionUnit", _INCH)))
    return stated_scales([*candidates, ("tiff.Resolution", tag_scale(*pair, unit))])


def _ome(found: dict[str, str], axis: str) -> float | None:
    factor = _TO_MICROMETRES.get(found.get(f"PhysicalSize{axis}Unit", "µm"))
    size = positive(found.get(f"PhysicalSize{axis}"))
    return None if factor is None or size is None else size * factor
