"""EDF, BDF and GDF files written byte by byte, with known content, for the tests of their readers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_edf(
    path: Path,
    signals: dict[str, tuple[np.ndarray, float]],
    *,
    unit: str = "uV",
    units: dict[str, str] | None = None,
    limit: float = 1000.0,
    seconds: float = 1.0,
    kind: str = "",
    onsets: Sequence[float] | None = None,
    marks: Sequence[tuple[float, float, str]] = (),
    n_records: int | None = None,
    patient: str = "MCH-0234567 F 02-MAY-1951 Haagse_Harry",
) -> Path:
    """Write ``{name: (values, rate)}``. ``kind`` is "", "EDF+C", "EDF+D", "BDF" or "BDF+C"; a plus brings annotations.

    Values are rounded to steps of ``2 * limit / 65535`` (``/ (2**24 - 1)`` for BDF).
    """
    bdf = kind.startswith("BDF")
    top = 2**23 - 1 if bdf else 2**15 - 1
    counts = {name: round(rate * seconds) for name, (_, rate) in signals.items()}
    first = next(iter(signals), None)
    n = n_records or (len(signals[first][0]) // counts[first] if first else 1)
    onsets = [k * seconds for k in range(n)] if onsets is None else list(onsets)
    notes = [_tal(onsets[k]) + b"".join(_mark(m) for m in (marks if k == 0 else ())) for k in range(n)]
    width = 3 if bdf else 2
    n_notes = -(-max(len(t) for t in notes) // width)
    plus = "+" in kind
    rows = [(name, (units or {}).get(name, unit), -limit, limit, -top - 1, top, counts[name]) for name in signals]
    if plus:
        rows.append((f"{kind[:3]} Annotations", "", -1, 1, -top - 1, top, n_notes))
    head = (
        (b"\xffBIOSEMI" if bdf else b"0       ") + _pad(patient, 80) + _pad("Startdate 02-MAR-2002 EMG561 BK/JOP", 80)
    )
    head += _pad("16.09.87", 8) + _pad("20.35.00", 8) + _pad(256 * (len(rows) + 1), 8)
    head += _pad(kind if plus else ("24BIT" if bdf else ""), 44) + _pad(n, 8) + _pad(seconds, 8) + _pad(len(rows), 4)
    for place, size in ((0, 16), (None, 80), (1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (None, 80), (6, 8), (None, 32)):
        head += b"".join(_pad("" if place is None else row[place], size) for row in rows)
    body = []
    for k in range(n):
        for name, (values, _) in signals.items():
            part = np.asarray(values, float)[k * counts[name] : (k + 1) * counts[name]]
            digital = np.rint((part + limit) / (2 * limit) * (2 * top + 1) - top - 1).astype("<i4")
            raw = digital.view(np.uint8).reshape(-1, 4)[:, :width]
            body.append(raw.tobytes())
        if plus:
            body.append(notes[k].ljust(n_notes * width, b"\0"))
    path.write_bytes(head + b"".join(body))
    return path


def _pad(value: object, size: int) -> bytes:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.encode("latin-1")[:size].ljust(size)


def _tal(onset: float) -> bytes:
    return f"{onset:+.6g}".encode() + b"\x14\x14\0"


def _mark(mark: tuple[float, float, str]) -> bytes:
    onset, duration, label = mark
    return f"{onset:+.6g}".encode() + b"\x15" + f"{duration:.6g}".encode() + b"\x14" + label.encode() + b"\x14\0"


def write_gdf(
    path: Path,
    signals: dict[str, tuple[np.ndarray, int]],
    *,
    version: str = "2.10",
    events: Sequence[tuple[int, int, int]] = (),
    event_rate: int = 100,
    dtype: str = "<i2",
) -> Path:
    """Write GDF 1 or 2 with records of one second: ``{name: (numbers, rate)}``; physical is a tenth of digital, in uV.

    ``events``: (position counted from 0, code, duration), both in samples of ``event_rate``.
    """
    code = {"<i2": 3, "<i4": 5, "<f4": 16, "i3": 279}[dtype]
    first = float(version) < 1.9
    m, n = len(signals), min(len(x) // rate for x, rate in signals.values())
    fixed = bytearray(256)
    fixed[:8] = f"GDF {version}".encode().ljust(8)
    if first:
        fixed[184:192] = struct.pack("<q", 256 * (m + 1))
        fixed[252:256] = struct.pack("<I", m)
    else:
        fixed[184:186] = struct.pack("<H", m + 1)
        fixed[252:254] = struct.pack("<H", m)
    fixed[236:252] = struct.pack("<qII", n, 1, 1)
    bound = "<q" if first else "<d"
    head = b"".join(name.encode().ljust(16, b"\0") for name in signals) + bytes(80 * m)
    head += b"uV\0\0\0\0\0\0" * m if first else bytes(6 * m) + struct.pack("<H", 4275) * m
    head += struct.pack("<d", -3276.8) * m + struct.pack("<d", 3276.7) * m
    head += struct.pack(bound, -32768) * m + struct.pack(bound, 32767) * m + bytes(80 * m)
    head += b"".join(struct.pack("<i", rate) for _, rate in signals.values()) + struct.pack("<i", code) * m
    head += bytes(32 * m)
    body = []
    for k in range(n):
        for x, rate in signals.values():
            part = np.asarray(x)[k * rate : (k + 1) * rate]
            if dtype == "i3":
                body.append(part.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
            else:
                body.append(part.astype(dtype).tobytes())
    count = struct.pack("<I", len(events))
    rate = struct.pack("<I", event_rate)[:3] if first else struct.pack("<f", event_rate)
    table = b"\x03" + (rate + count if first else count[:3] + rate)
    table += b"".join(struct.pack("<I", at + 1) for at, _, _ in events)
    table += b"".join(struct.pack("<H", code) for _, code, _ in events) + bytes(2 * len(events))
    table += b"".join(struct.pack("<I", length) for _, _, length in events)
    path.write_bytes(bytes(fixed) + head + b"".join(body) + (table if events else b""))
    return path
