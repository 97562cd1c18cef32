"""EDF, EDF+ and BDF: files of data records, each with some seconds of every channel at its own rate."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.read.signals import Channel, Header, marks_table

MAX_CHANNELS = 10_000
_BLOCK = 2**25  # bytes read at once
_MARK = re.compile(rb"([+-]\d{1,12}(?:\.\d{0,12})?)(?:\x15(\d{1,12}(?:\.\d{0,12})?))?\x14(.*)", re.DOTALL)
_NOTES = ("EDF Annotations", "BDF Annotations")
LARGEST = 1e30  # physical values beyond it come from damage and would not fit float32


@dataclass(frozen=True)
class Stored:
    """How a channel lies in a data record: name, unit, values a record, numpy type, and ``value * scale + shift``."""

    name: str
    unit: str | None
    count: int
    kind: str
    scale: float
    shift: float

    @property
    def n_bytes(self) -> int:
        """Bytes in one record."""
        return self.count * int(self.kind[-1])


@dataclass(frozen=True)
class Layout:
    """What a header says of where things lie."""

    path: str
    offset: int
    n_records: int
    seconds: float
    stored: tuple[Stored, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of one record."""
        return sum(s.n_bytes for s in self.stored)


class RecordFile:
    """An open EDF, BDF or GDF file; see :class:`~biosae.read.signals.Recording`.

    The file is opened for each read and for no longer, so threads and forks do not matter.
    """

    def __init__(self, layout: Layout, annotations: pd.DataFrame, onsets: np.ndarray | None) -> None:
        self._layout, self._onsets = layout, onsets
        self._starts: dict[int, np.ndarray] = {}
        sums = np.cumsum([0, *(s.n_bytes for s in layout.stored)])
        self._places = [i for i, s in enumerate(layout.stored) if s.name not in _NOTES]
        self._from = sums
        names = unique_names([layout.stored[i].name for i in self._places])
        channels = []
        for name, i in zip(names, self._places):
            stored = layout.stored[i]
            rate = float(f"{stored.count / layout.seconds:.12g}")  # 100, where 3 / 0.03 is not
            channels.append(Channel(name, rate, stored.unit, int(self._first(stored.count)[-1]) + stored.count))
        span = layout.seconds * layout.n_records if onsets is None else onsets[-1] + layout.seconds
        facts = layout.facts | {"records": layout.n_records, "record_seconds": layout.seconds}
        unscaled = [n for n, c in zip(names, self._places) if not math.isfinite(layout.stored[c].scale)]
        self.header = Header(
            tuple(channels), float(span), annotations, facts | ({"unscaled": unscaled} if unscaled else {})
        )

    def _first(self, count: int) -> np.ndarray:
        """Number of the first sample of every record, for channels with ``count`` samples a record."""
        if self._onsets is None:
            return np.arange(self._layout.n_records, dtype=np.int64) * count
        if count not in self._starts:
            self._starts[count] = _placed(self._onsets * (count / self._layout.seconds), count)
        return self._starts[count]

    def read(self, channels: Sequence[int], first: int, count: int) -> np.ndarray:
        """Samples ``first`` to ``first + count``, ``float64 (len(channels), count)``; NaN between records."""
        stored = [self._layout.stored[self._places[c]] for c in channels]
        out = np.full((len(channels), count), np.nan)
        size = stored[0].count
        starts = self._first(size)
        low = int(np.searchsorted(starts, first - size, side="right"))
        high = int(np.searchsorted(starts, first + count, side="left"))
        kinds = {kind: [r for r, s in enumerate(stored) if s.kind == kind] for kind in {s.kind for s in stored}}
        for begin, block in _blocks(self._layout, low, high):
            runs = _runs(starts[begin : begin + len(block)], size)
            for kind, rows in kinds.items():
                scale, shift = np.array([(stored[r].scale, stored[r].shift) for r in rows]).T[:, :, None, None]
                at = self._from[[self._places[channels[r]] for r in rows]]
                columns = (at[:, None] + np.arange(stored[rows[0]].n_bytes)).reshape(-1)
                numbers = _decoded(block[:, columns], kind).reshape(len(block), len(rows), size).transpose(1, 0, 2)
                values = numbers * scale + shift
                for part, start in runs:
                    joined = values[:, part].reshape(len(rows), -1)
                    a, b = max(start, first), min(start + joined.shape[1], first + count)
                    out[rows, a - first : b - first] = joined[:, a - start : b - start]
        out[~(np.abs(out) < LARGEST)] = np.nan
        return out

    def close(self) -> None:
        """Nothing is held open."""


def _placed(exact: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the first samples of records that begin at ``exact`` (in samples).

    Times are printed with few decimals: records that follow each other within less than a sample are one stretch,
    without a gap and without an overlap, as long as times and samples have not come apart by a whole sample since the
    stretch began.
    """
    starts, begun, first = [], 0.0, 0
    for k, at in enumerate(exact.tolist()):
        due = starts[-1] + count if k else 0
        if not k or abs((at - begun) - (due - first)) >= 1 - 1e-6:
            begun, first = at, round(at)
            due = first
        starts.append(due)
    return np.array(starts, dtype=np.int64)


def _runs(starts: np.ndarray, size: int) -> list[tuple[slice, int]]:
    """Records that follow each other without a gap: (which, number of the first sample)."""
    cuts = [0, *(np.flatnonzero(np.diff(starts) != size) + 1).tolist(), len(starts)]
    return [(slice(a, b), int(starts[a])) for a, b in pairwise(cuts)]


def _blocks(layout: Layout, low: int, high: int) -> Iterator[tuple[int, np.ndarray]]:
    """Records ``low`` to ``high`` as bytes ``(records, bytes of one)``, a bounded number at a time."""
    step = max(1, _BLOCK // max(layout.n_bytes, 1))
    with opened(layout.path) as stream:
        for begin in range(low, high, step):
            n = min(step, high - begin)
            stream.seek(layout.offset + begin * layout.n_bytes)
            data = stream.read(n * layout.n_bytes)
            if len(data) < n * layout.n_bytes:
                raise ReadError("truncated", "the file became shorter than when it was opened; copy it again")
            yield begin, np.frombuffer(data, np.uint8).reshape(n, layout.n_bytes)


def _decoded(part: np.ndarray, kind: str) -> np.ndarray:
    """Bytes ``(records, n)`` -> numbers ``float64 (records, values)``."""
    part = np.ascontiguousarray(part)
    if kind not in ("i3", "u3"):
        return part.view(kind).astype(np.float64)
    wide = np.zeros((*part.shape[:1], part.shape[1] // 3, 4), np.uint8)
    wide[:, :, 1:] = part.reshape(len(part), -1, 3)  # in the upper three bytes, so that a shift brings the sign
    return (wide.reshape(len(part), -1).view("<i4" if kind == "i3" else "<u4") >> 8).astype(np.float64)


def opened(path: str) -> Any:
    """The file, open for reading bytes; missing and forbidden files are ReadErrors."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise ReadError("missing", f"no file {path}") from None
    except OSError as error:
        raise ReadError("unreadable", f"{error.strerror or error}: {path}") from None


def unique_names(names: Sequence[str]) -> list[str]:
    """Names that occur more than once get ``-0``, ``-1`` ... behind them, as MNE does."""
    taken, counts, out, seen = set(names), Counter(names), [], {}
    for name in names:
        if counts[name] == 1:
            out.append(name)
            continue
        k = seen.get(name, 0)
        while f"{name}-{k}" in taken:
            k += 1
        seen[name] = k + 1
        out.append(f"{name}-{k}")
    return out


# -- EDF, EDF+ and BDF ---------------------------------------------------------------------------------------------


def open_edf_file(path: str) -> RecordFile:
    """Open EDF, EDF+C, EDF+D, BDF or BDF+.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` or ``unsupported``.
    """
    layout = _edf_layout(path)
    onsets, annotations, odd = _edf_annotations(layout)
    if odd:
        layout.facts["unreadable_annotations"] = odd
    discontinuous = layout.facts["format"].endswith("+D") and layout.n_records > 0
    if discontinuous:
        _check_onsets(onsets, layout)
    return RecordFile(layout, annotations, onsets if discontinuous else None)


def _edf_layout(path: str) -> Layout:
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        fixed = stream.read(256)
        if not fixed.strip(b"\0"):
            raise ReadError("empty", f"{size} bytes, all zero" if fixed else "0 bytes")
        bdf = fixed[:8] == b"\xffBIOSEMI"
        if not bdf and fixed[:8] != b"0       ":
            raise ReadError("unreadable", f"neither an EDF nor a BDF file (begins with {fixed[:8]!r})")
        name = "BDF" if bdf else "EDF"
        if len(fixed) < 256:
            raise ReadError("truncated", f"{name} of {size} bytes, less than its header")
        n_channels = _whole(fixed[252:256], "number of channels")
        if not 0 < n_channels <= MAX_CHANNELS:
            raise ReadError("unreadable", f"{name} header states {n_channels} channels")
        offset = _whole(fixed[184:192], "header length")
        if offset != 256 * (n_channels + 1):
            raise ReadError("unreadable", f"{name} header of {offset} bytes for {n_channels} channels")
        if size < offset:
            raise ReadError("truncated", f"{name} of {size} bytes, less than its header of {offset}")
        variable = stream.read(offset - 256)
    widths = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)
    starts = np.cumsum([0, *widths]) * n_channels
    fields = [
        [variable[s + i * w : s + (i + 1) * w] for i in range(n_channels)] for s, w in zip(starts.tolist(), widths)
    ]
    labels, sensors, units, p_low, p_high, d_low, d_high, filters, counts, _ = fields
    labels = [text(x) for x in labels]
    stored = []
    for i, label in enumerate(labels):
        count = _whole(counts[i], f"samples a record of channel {label!r}")
        if count <= 0:
            raise ReadError("unreadable", f"{name} header states {count} samples a record of channel {label!r}")
        scale, shift = (1.0, 0.0) if label in _NOTES else _scaling(p_low[i], p_high[i], d_low[i], d_high[i])
        stored.append(Stored(label, text(units[i]) or None, count, "i3" if bdf else "<i2", scale, shift))
    plus = text(fixed[192:236])[:5]
    kind = plus if plus in ("EDF+C", "EDF+D", "BDF+C", "BDF+D") else name
    facts = {"format": kind}
    for key, values in (("filters", filters), ("sensors", sensors)):
        said = {label: text(v) for label, v in zip(labels, values) if label not in _NOTES and text(v)}
        facts |= {key: said} if said else {}
    seconds = number(fixed[244:252], "record duration")
    if not 0 <= seconds <= 1e6 or (seconds == 0 and any(label not in _NOTES for label in labels)):
        raise ReadError("unreadable", f"{name} header states records of {seconds:g} s")
    n_records = _whole(fixed[236:244], "number of records")
    n_bytes = sum(s.n_bytes for s in stored)
    if n_records == -1:  # a recorder that did not finish
        n_records = (size - offset) // n_bytes
    if n_records < 1:
        raise ReadError("empty" if n_records == 0 else "unreadable", f"{name} header states {n_records} records")
    check_size(name, size, offset, n_records, n_bytes)
    return Layout(path, offset, n_records, seconds, tuple(stored), facts)


def check_size(name: str, size: int, offset: int, n_records: int, n_bytes: int, behind: int = 0) -> None:
    stated = offset + n_records * n_bytes + behind
    if size < stated:
        raise ReadError("truncated", f"{name} of {size} bytes, its header states {stated} ({n_records} records)")
    if size >= stated + n_bytes:
        raise ReadError(
            "unreadable", f"{name} of {size} bytes, its header states {stated} ({n_records} records); one is damaged"
        )


def text(raw: bytes) -> str:
    raw = raw.split(b"\0")[0]
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip()


def number(raw: bytes, what: str) -> float:
    found = text(raw).replace(",", ".")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", found):
        raise ReadError("unreadable", f"{what} in the header is {found!r}")
    return float(found)


def _whole(raw: bytes, what: str) -> int:
    found = number(raw, what)
    if found != int(min(max(found, -1e15), 1e15)):
        raise ReadError("unreadable", f"{what} in the header is {found:g}")
    return int(found)


def _scaling(p_low: bytes, p_high: bytes, d_low: bytes, d_high: bytes) -> tuple[float, float]:
    """``scale, shift`` from the ranges in the header; NaN where they give none."""
    low, high = number(p_low, "physical minimum"), number(p_high, "physical maximum")
    first, last = number(d_low, "digital minimum"), number(d_high, "digital maximum")
    return linear(low, high, first, last)


def linear(low: float, high: float, first: float, last: float) -> tuple[float, float]:
    """``scale, shift`` that take ``first, last`` to ``low, high``; NaN where there is no such line."""
    usable = all(abs(v) < LARGEST for v in (low, high, first, last)) and low != high and first < last
    if not usable:
        return math.nan, math.nan
    scale = (high - low) / (last - first)
    return scale, low - first * scale


def _edf_annotations(layout: Layout) -> tuple[np.ndarray, pd.DataFrame, int]:
    """Onset of every record (s from the first), annotations, and how many could not be read."""
    places = [i for i, s in enumerate(layout.stored) if s.name in _NOTES]
    sums = np.cumsum([0, *(s.n_bytes for s in layout.stored)]).tolist()
    onsets = np.full(layout.n_records, np.nan)
    marks, odd = [], 0
    with opened(layout.path) as stream:
        for record in range(layout.n_records if places else 0):
            for place in places:
                stream.seek(layout.offset + record * layout.n_bytes + sums[place])
                data = stream.read(sums[place + 1] - sums[place])
                for order, entry in enumerate(e for e in data.split(b"\0") if e):
                    found = _MARK.fullmatch(entry)
                    if found is None:
                        odd += 1
                        continue
                    onset, duration = float(found[1]), float(found[2] or 0)
                    texts = found[3].split(b"\x14")
                    if place == places[0] and order == 0 and texts[0] == b"":
                        onsets[record] = onset
                    marks += [(onset, duration, text(t)) for t in texts if text(t)]
    begin = onsets[0] if np.isfinite(onsets[0]) else 0.0
    return onsets - begin, marks_table([(round(a - begin, 9), b, label) for a, b, label in marks]), odd


def _check_onsets(onsets: np.ndarray, layout: Layout) -> None:
    """Times of the records of a discontinuous file must be there, and in order."""
    if not np.isfinite(onsets).all():
        raise ReadError(
            "unreadable", f"record {int(np.argmin(np.isfinite(onsets)))} of a discontinuous file has no time"
        )
    fastest = max((s.count for s in layout.stored if s.name not in _NOTES), default=1)
    early = np.diff(onsets) < layout.seconds * (1 - max(0.001, 1 / fastest))  # times are printed with few decimals
    if early.any():
        where = int(np.argmax(early)) + 1
        raise ReadError("unreadable", f"record {where} of a discontinuous file begins before the one before it ends")
    check_span(float(onsets[-1]) + layout.seconds, len(onsets) * layout.seconds)


def check_span(seconds: float, recorded: float) -> None:
    """Refuse a time axis that is nearly all gap; a damaged time would make windows without end.

    Raises
    ------
    ReadError
        ``unsupported`` where the file spans more than a day and ten times what was recorded.
    """
    if seconds > 86_400 + 10 * recorded:
        raise ReadError(
            "unsupported",
            f"{recorded:g} s recorded over {seconds:g} s; split the file at its gaps, or repair its times",
        )
