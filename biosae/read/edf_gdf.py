"""GDF 1 and 2: records as in EDF, with binary headers and an event table."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.read.edf_records import (
    LARGEST,
    MAX_CHANNELS,
    Layout,
    RecordFile,
    Stored,
    check_size,
    linear,
    number,
    opened,
    text,
)
from biosae.read.signals import marks_table

# GDF's type of values -> numpy type; "i3" and "u3" are 24 bits
_GDF_TYPES = {
    1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<i8", 8: "<u8", 16: "<f4", 17: "<f8",
    279: "i3", 535: "u3",
}  # fmt: skip
_GDF_UNITS = {4256: "V", 4274: "mV", 4275: "uV", 4276: "nV"}


def open_gdf(path: str) -> RecordFile:
    """Open GDF 1 or 2. Events become annotations whose label is the event's code.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` or ``unsupported``.
    """
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        fixed = stream.read(256)
        if not fixed.strip(b"\0"):
            raise ReadError("empty", f"{size} bytes, all zero" if fixed else "0 bytes")
        if fixed[:4] != b"GDF ":
            raise ReadError("unreadable", f"not a GDF file (begins with {fixed[:8]!r})")
        if len(fixed) < 256:
            raise ReadError("truncated", f"GDF of {size} bytes, less than its header")
        version = number(fixed[4:8], "GDF version")
        first = version < 1.9
        offset = _int(fixed[184:192]) if first else 256 * _int(fixed[184:186], signed=False)
        n_records = _int(fixed[236:244])
        above, below = _int(fixed[244:248], signed=False), _int(fixed[248:252], signed=False)
        n_channels = _int(fixed[252:256], signed=False) if first else _int(fixed[252:254], signed=False)
        if not 0 < n_channels <= MAX_CHANNELS or offset < 256 * (n_channels + 1):
            raise ReadError("unreadable", f"GDF header of {offset} bytes for {n_channels} channels")
        if not above or not below:
            raise ReadError("unreadable", f"GDF header states records of {above}/{below} s")
        if n_records < 1:
            raise ReadError("empty" if n_records == 0 else "unreadable", f"GDF header states {n_records} records")
        if size < offset:
            raise ReadError("truncated", f"GDF of {size} bytes, less than its header of {offset}")
        variable = stream.read(256 * n_channels)
        stored = _gdf_channels(variable, n_channels, first)
        layout = Layout(path, offset, n_records, above / below, stored, {"format": f"GDF {version:g}"})
        if size < offset + n_records * layout.n_bytes:
            check_size("GDF", size, offset, n_records, layout.n_bytes)
        stream.seek(offset + n_records * layout.n_bytes)
        behind = stream.read(size - stream.tell())
    annotations, used = _gdf_events(behind, version)
    check_size("GDF", size, offset, n_records, layout.n_bytes, used)
    return RecordFile(layout, annotations, None)


def _int(raw: bytes, *, signed: bool = True) -> int:
    return int.from_bytes(raw, "little", signed=signed)


def _gdf_channels(variable: bytes, n: int, first: bool) -> tuple[Stored, ...]:
    """Channels of the variable header; ``first`` is GDF 1."""
    at = 0

    def column(dtype: str, skip: int = 0) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(variable, dtype, n, at)
        at += found.nbytes + skip * n
        return found

    labels = column("S16", skip=80)
    units = [text(u) or None for u in column("S8")] if first else _gdf_units(column("S6"), column("<u2"))
    low, high = column("<f8"), column("<f8")
    bounds = "<i8" if first else "<f8"
    d_low, d_high = column(bounds), column(bounds, skip=80)  # filters, or obsolete fields and three cut-offs
    counts, types = column("<i4"), column("<i4")
    out = []
    for i, label in enumerate(labels):
        name = text(label)
        if counts[i] <= 0:
            raise ReadError("unreadable", f"GDF header states {counts[i]} samples a record of channel {name!r}")
        if int(types[i]) not in _GDF_TYPES:
            raise ReadError("unsupported", f"GDF channel {name!r} has values of type {types[i]}")
        scale, shift = linear(float(low[i]), float(high[i]), float(d_low[i]), float(d_high[i]))
        out.append(Stored(name, units[i], int(counts[i]), _GDF_TYPES[int(types[i])], scale, shift))
    return tuple(out)


def _gdf_units(texts: np.ndarray, codes: np.ndarray) -> list[str | None]:
    """Units of GDF 2: by code where it is a voltage, else the older text field."""
    return [_GDF_UNITS.get(int(code)) or text(older) or None for older, code in zip(texts, codes)]


def _gdf_events(behind: bytes, version: float) -> tuple[pd.DataFrame, int]:
    """Event table behind the records -> annotations, and its bytes."""
    if len(behind) < 8 or behind[0] not in (1, 3):
        return marks_table([]), 0
    if version < 1.94:
        rate, n = float(_int(behind[1:4], signed=False)), _int(behind[4:8], signed=False)
    else:
        rate, n = float(np.frombuffer(behind, "<f4", 1, 4)[0]), _int(behind[1:4], signed=False)
    each = 12 if behind[0] == 3 else 6
    if len(behind) < 8 + n * each:
        raise ReadError("truncated", f"GDF event table states {n} events, {len(behind) - 8} bytes are left")
    if not n:
        return marks_table([]), 8
    if not 0 < rate < LARGEST:
        raise ReadError("unreadable", f"GDF event table states {rate:g} events a second")
    onset = np.frombuffer(behind, "<u4", n, 8).astype(float) - 1
    codes = np.frombuffer(behind, "<u2", n, 8 + 4 * n)
    length = np.frombuffer(behind, "<u4", n, 8 + 8 * n).astype(float) if behind[0] == 3 else np.zeros(n)
    marks = zip((onset / rate).tolist(), (length / rate).tolist(), map(str, codes.tolist()))
    return marks_table(list(marks)), 8 + n * each
