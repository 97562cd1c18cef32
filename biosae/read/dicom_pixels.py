"""Stored DICOM values -> modality units -> 8 bits: modality LUT, VOI LUT or window, inversion, palettes, colour."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import InputError
from biosae.read.dicom_file import DicomFile
from biosae.read.dicom_tags import Header

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_UNSPECIFIED = {"US", "nan", "NORMALIZED"}


@dataclass(frozen=True)
class Table:
    """A lookup table: ``data[i]`` belongs to the input ``first + i``; inputs beyond it take its ends."""

    first: int
    data: np.ndarray
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        at = np.clip(np.rint(values - self.first), 0, len(self.data) - 1)
        return self.data[at.astype(np.intp)].astype(np.float64)


@dataclass(frozen=True)
class Modality:
    """Stored values to modality units: a table, or ``value * slope + intercept``."""

    slope: float = 1.0
    intercept: float = 0.0
    table: Table | None = None
    unit: str | None = None

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        values = stored.astype(np.float64)
        return self.table(values) if self.table is not None else values * self.slope + self.intercept


@dataclass(frozen=True)
class Voi:
    """Values of interest: ``kind`` is ``"lut"``, ``"window"``, ``"full"`` or ``"percentile"``."""

    kind: str
    center: float = math.nan
    width: float = math.nan
    function: str = "LINEAR"
    table: Table | None = None


def window_setting(window: Any) -> Any:
    """Check ``window=`` and give it a form that JSON can hold: text, or a list."""
    text = "'file' (its first), ('file', k) (its k-th, from 0), 'full', (center, width), ('percentile', low, high)"
    if isinstance(window, str):
        if window not in ("file", "full"):
            raise InputError(f"window={window!r}; valid: {text}")
        return window
    parts = list(window) if isinstance(window, list | tuple) else [window]
    numbers = parts[1:] if parts and isinstance(parts[0], str) else parts
    if parts and all(isinstance(n, int | float | np.number) and math.isfinite(n) for n in numbers):
        numbers = [float(n) for n in numbers]
        if parts[0] == "file" and len(numbers) == 1 and numbers[0] >= 0 and numbers[0] % 1 == 0:
            return ["file", int(numbers[0])]
        if parts[0] == "percentile" and len(numbers) == 2 and 0 <= numbers[0] < numbers[1] <= 100:
            return ["percentile", *numbers]
        if not isinstance(parts[0], str) and len(numbers) == 2 and numbers[1] > 0:
            return numbers
    raise InputError(f"window={window!r}; valid: {text}")


# -- what the header says ------------------------------------------------------------------------------------------


def groups(file: DicomFile, frame: int, keyword: str) -> list[Header]:
    """Where a frame's attributes lie, nearest first: its functional group, the shared one, the top of the header."""
    found = []
    for sequence, at in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        for group in file.header.items(sequence, at):
            found += group.items(keyword, 0)
    return [*found, file.header]


def modality(file: DicomFile, frame: int) -> Modality:
    """The frame's modality LUT or rescale, and the unit that they give."""
    header = file.header
    kind = header.text("Modality")
    tables = header.items("ModalityLUTSequence")
    if tables:
        return Modality(table=_table(tables[0], file.signed), unit=_unit(tables[0].text("ModalityLUTType")))
    for group in groups(file, frame, "PixelValueTransformationSequence"):
        slope, intercept = group.number("RescaleSlope"), group.number("RescaleIntercept")
        if math.isnan(slope) and math.isnan(intercept):
            continue
        if slope == 0:
            raise ReadError("unreadable", "RescaleSlope is 0, which would make every pixel equal")
        unit = _unit(group.text("RescaleType"))
        if unit is None and kind in ("CT", "PT"):
            unit = "HU" if kind == "CT" else _unit(header.text("Units"))
        return Modality(1.0 if math.isnan(slope) else slope, 0.0 if math.isnan(intercept) else intercept, None, unit)
    dose = header.number("DoseGridScaling")
    if kind == "RTDOSE" and dose > 0:
        return Modality(dose, 0.0, None, _unit(header.text("DoseUnits")))
    return Modality()


def _unit(text: str | float) -> str | None:
    return None if str(text) in _UNSPECIFIED else str(text)


def voi(file: DicomFile, frame: int, k: int = 0) -> Voi:
    """The frame's ``k``-th VOI LUT, else its ``k``-th window, else ``"full"``.

    Raises
    ------
    ReadError
        ``unsupported`` for a window without width, ``missing`` if there is no ``k``-th one.
    """
    for group in groups(file, frame, "FrameVOILUTSequence"):
        tables = group.items("VOILUTSequence")
        centers, widths = group.numbers("WindowCenter"), group.numbers("WindowWidth")
        n = len(tables) or min(len(centers), len(widths))
        if not n:
            continue
        if k >= n:
            raise ReadError("missing", f"no window {k}; the file has {n}, counted from 0")
        if tables:
            return Voi("lut", table=_table(tables[k], file.signed or group.number("RescaleIntercept", 0) < 0))
        function = str(group.text("VOILUTFunction"))
        function = "LINEAR" if function == "nan" else function.upper()
        if widths[k] <= 0 or function not in FUNCTIONS:
            raise ReadError("unsupported", "a window without width, or of an unknown function; pass window='full'")
        if widths[k] < 1 and function == "LINEAR":  # the standard forbids it, files of small real values have it
            function = "LINEAR_EXACT"
        return Voi("window", centers[k], widths[k], function)
    return Voi("full")


def applied_window(file: DicomFile, frame: int, window: Any) -> Voi:
    """What ``window`` (of :func:`window_setting`) means for a frame."""
    asked = window[0] if isinstance(window, list) else window
    if asked == "file":
        return voi(file, frame, window[1] if isinstance(window, list) else 0)
    return Voi(asked) if isinstance(asked, str) else Voi("window", window[0], window[1])


def _table(item: Header, signed: bool) -> Table:
    described = item.numbers("LUTDescriptor", signed=signed)
    if len(described) != 3:
        raise ReadError("unreadable", "a lookup table without its description")
    n, first, bits = (int(v) for v in described)
    n = n % 65536 or 65536
    if not 8 <= bits <= 16:
        raise ReadError("unreadable", f"a lookup table of {bits} bits")
    length = len(item.raw("LUTData")[0] or b"")
    data = item.data("LUTData", width=8 if bits == 8 and length < 2 * n else 16)[:n]
    if len(data) < n:
        raise ReadError("truncated", f"a lookup table of {len(data)} instead of {n} entries")
    return Table(first, data, bits)


# -- numbers -------------------------------------------------------------------------------------------------------


def apply_window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Window of DICOM PS3.3 C.11.2.1: ``float64`` between 0 and 1.

    LINEAR is ``(x - (c - 0.5)) / (w - 1) + 0.5``, LINEAR_EXACT ``(x - c) / w + 0.5``, both cut at 0 and 1; SIGMOID is
    ``1 / (1 + exp(-4 (x - c) / w))``.
    """
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


def not_padding(file: DicomFile, stored: np.ndarray) -> np.ndarray:
    """Where the stored values are picture: finite, and not in the range of PixelPaddingValue."""
    if file.is_float:
        keywords = ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit")
        if file.keyword == "DoubleFloatPixelData":
            keywords = ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit")
    else:
        keywords = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    a = file.header.number(keywords[0], signed=file.signed)
    b = file.header.number(keywords[1], a, signed=file.signed)
    picture = np.isfinite(stored)
    if not math.isnan(a):
        picture &= (stored < min(a, b)) | (stored > max(a, b))
    return picture


def _mapping(file: DicomFile, frame: int, stored: np.ndarray, window: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Function from stored values to 0..1."""
    to_units, applied = modality(file, frame), applied_window(file, frame, window)
    if applied.kind == "lut":
        top = 2**applied.table.bits - 1
        return lambda v: np.clip(applied.table(to_units(v)) / top, 0, 1)
    if applied.kind == "window":
        return lambda v: apply_window(to_units(v), applied.center, applied.width, applied.function)
    if applied.kind == "percentile":
        picture = stored[not_padding(file, stored)]
        low, high = np.percentile(to_units(picture), window[1:]) if picture.size else (0.0, 0.0)
    elif file.bits_stored <= 8:
        whole = to_units(np.arange(2**file.bits_stored) - (2 ** (file.bits_stored - 1) if file.signed else 0))
        low, high = whole.min(), whole.max()
    else:
        picture = stored[not_padding(file, stored)]
        ends = to_units(np.unique(picture) if to_units.table is not None else _ends(picture))
        low, high = (ends.min(), ends.max()) if ends.size else (0.0, 0.0)
    if not high > low:
        return lambda v: np.zeros(v.shape)
    return lambda v: np.clip((to_units(v) - low) / (high - low), 0, 1)


def _ends(values: np.ndarray) -> np.ndarray:
    return np.array([values.min(), values.max()]) if values.size else values


def to_uint8(values: np.ndarray) -> np.ndarray:
    """0..1 to 0..255, halves rounded up; NaN becomes 0."""
    return np.floor(np.nan_to_num(values) * 255 + 0.5).astype(np.uint8)


def picture(file: DicomFile, frame: int, window: Any) -> np.ndarray:
    """One frame for the eye: ``uint8 (H, W, 3)``."""
    stored, is_rgb = file.stored(frame)
    if file.photometric == "PALETTE COLOR":
        return _palette(file, stored)
    if file.samples == 3:
        return _colour(file, stored, is_rgb)
    inverted = file.photometric == "MONOCHROME1"
    mapping = _mapping(file, frame, stored, window)
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2:  # few distinct values: a table of them
        low = int(stored.min())
        table = to_uint8(mapping(np.arange(low, int(stored.max()) + 1)))
        grey = (255 - table if inverted else table)[stored.astype(np.int32) - low]
    else:
        grey = to_uint8(mapping(stored))
        grey = 255 - grey if inverted else grey
    return np.repeat(grey[:, :, None], 3, axis=2)


def _colour(file: DicomFile, stored: np.ndarray, is_rgb: bool) -> np.ndarray:
    top = 2**file.bits_stored - 1
    if is_rgb:
        if top == 255:
            return np.ascontiguousarray(stored.astype(np.uint8))
        return to_uint8(np.clip(stored / top, 0, 1))
    y, blue, red = np.moveaxis(stored.astype(np.float64), 2, 0)  # PS3.3 C.7.6.3.1.2, ITU-R BT.601 in full range
    blue, red = blue - (top + 1) / 2, red - (top + 1) / 2
    rgb = [y + 1.402 * red, y - 0.114 * 1.772 / 0.587 * blue - 0.299 * 1.402 / 0.587 * red, y + 1.772 * blue]
    return to_uint8(np.clip(np.stack(rgb, axis=2) / top, 0, 1))


def _palette(file: DicomFile, stored: np.ndarray) -> np.ndarray:
    """PALETTE COLOR through its three tables; 16-bit tables are scaled to 8."""
    out = np.empty((*stored.shape, 3), np.uint8)
    for i, colour in enumerate(("Red", "Green", "Blue")):
        described = file.header.numbers(f"{colour}PaletteColorLookupTableDescriptor", signed=file.signed)
        if len(described) != 3:
            raise ReadError("unreadable", "PALETTE COLOR without its tables")
        n, first, bits = (int(v) for v in described)
        n = n % 65536 or 65536
        data = _entries(file.header, colour, n, bits)
        if len(data) < n:
            raise ReadError("truncated", f"a palette of {len(data)} instead of {n} entries")
        top = 65535 if bits > 8 and data.max() > 255 else 255
        data = to_uint8(data.astype(np.float64) / top)
        out[:, :, i] = data[np.clip(stored.astype(np.int64) - first, 0, n - 1)]
    return out


def _entries(header: Header, colour: str, n: int, bits: int) -> np.ndarray:
    keyword = f"{colour}PaletteColorLookupTableData"
    value = header.raw(keyword)[0]
    if value is not None:
        return header.data(keyword, width=8 if len(value) < 2 * n else 16)[:n]
    words = (
        header.data(f"Segmented{colour}PaletteColorLookupTableData", width=8 if bits == 8 else 16).astype(int).tolist()
    )
    entries: list[float] = []
    at = 0
    while at + 2 <= len(words) and len(entries) < n:
        kind, length = words[at : at + 2]
        if kind == 0 and length:
            entries += words[at + 2 : at + 2 + length]
            at += 2 + length
        elif kind == 1 and entries and at + 2 < len(words):
            start, stop = entries[-1], words[at + 2]
            entries += [round(start + (stop - start) * (j + 1) / length) for j in range(length)]
            at += 3
        else:
            raise ReadError("unsupported", "a segmented palette with indirect or damaged segments")
    return np.array(entries[:n])
