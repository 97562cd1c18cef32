"""WFDB records: header and signal files, random access, one segment or many.

Follows the formats' descriptions header(5) and signal(5) of the WFDB Applications Guide. Only local files are opened.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import require
from biosae.read.channels import canonical_unit, factor
from biosae.read.signals import MAX_VALUES

MAX_HEADER = 16 * 2**20  # bytes
DEFAULT_GAIN, DEFAULT_RATE = 200.0, 250.0  # of header(5), where the header states none

# format -> samples and bytes of a block, value of a missing sample
BLOCKS: dict[int, tuple[int, int, int | None]] = {
    8: (1, 1, None), 16: (1, 2, -(2**15)), 24: (1, 3, -(2**23)), 32: (1, 4, -(2**31)), 61: (1, 2, -(2**15)),
    80: (1, 1, -(2**7)), 160: (1, 2, -(2**15)), 212: (2, 3, -(2**11)), 310: (3, 4, -(2**9)), 311: (3, 4, -(2**9)),
}  # fmt: skip
FLAC: dict[int, tuple[int, int]] = {508: (8, -(2**7)), 516: (16, -(2**15)), 524: (24, -(2**23))}  # bits, missing
_PLAIN = {8: "i1", 16: "<i2", 32: "<i4", 61: ">i2", 80: "u1", 160: "<u2"}
_SUBTYPES = {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24}

_RECORD = re.compile(
    r"(?P<name>[^\s/]+)(?:/(?P<segments>\d+))?\s+(?P<signals>\d+)(?:\s+(?P<rate>[\d.eE+-]+)\S*(?:\s+(?P<n>\d+))?)?"
)
_FORMAT = re.compile(r"(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?$")
_GAIN = re.compile(r"([-+\d.eE]+)(?:\((-?\d+)\))?(?:/(\S+))?$")
_SEGMENT = re.compile(r"(\S+)\s+(\d+)\s*$")


@dataclass(frozen=True)
class Signal:
    """A line of the header: where one signal lies and how its numbers become physical."""

    file: str
    format: int
    per_frame: int
    skew: int
    offset: int
    gain: float
    baseline: int
    unit: str | None
    initial: int
    name: str


@dataclass(frozen=True)
class HeaderFile:
    """Content of a ``.hea`` file. ``n`` is in frames, None if not stated; ``segments`` are (name, frames)."""

    path: Path
    rate: float
    n: int | None
    signals: tuple[Signal, ...]
    segments: tuple[tuple[str, int], ...]
    comments: tuple[str, ...]


def read_header(path: Path) -> HeaderFile:
    """Read a header file.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, or ``unreadable`` with the line that is wrong.
    """
    try:
        size = path.stat().st_size
        if size > MAX_HEADER:
            raise ReadError("unreadable", f"{path.name} has {size} bytes, too many for a header; give the .hea file")
        text = path.read_bytes().decode("latin-1")
    except (FileNotFoundError, NotADirectoryError):
        raise ReadError("missing", f"no header {path.name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise ReadError("unreadable", f"{path.name}: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    comments = tuple(line.lstrip("# \t") for line in lines if line.startswith("#"))
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ReadError("empty", f"{path.name} has no record line")
    match = _RECORD.match(lines[0])
    rate = _number(match["rate"]) if match and match["rate"] else DEFAULT_RATE
    if match is None or not 0 < rate < math.inf:
        raise ReadError("unreadable", f"{path.name} has no valid record line: {lines[0][:60]!r}")
    n_lines = int((match["segments"] or match["signals"])[:9])
    if len(lines) - 1 < n_lines:
        raise ReadError("truncated", f"{path.name} announces {n_lines} lines and has {len(lines) - 1}")
    n = int(match["n"]) if match["n"] and len(match["n"]) < 16 else 0
    segments, signals = [], []
    for i, line in enumerate(lines[1 : n_lines + 1]):
        if match["segments"]:
            found = _SEGMENT.match(line)
            if found is None or len(found[2]) > 15 or not _local(found[1]):
                raise ReadError("unreadable", f"{path.name} has no valid segment line: {line[:60]!r}")
            segments.append((found[1], int(found[2])))
        else:
            signals.append(_signal(path, line, i))
    return HeaderFile(path, rate, n or None, tuple(signals), tuple(segments), comments)


def _signal(path: Path, line: str, i: int) -> Signal:
    words = line.split(None, 8) + [""] * 8
    format = _FORMAT.match(words[1])
    gain = _GAIN.match(words[2])
    whole = [_whole(w) for w in words[3:8]]  # resolution, zero, initial value, checksum, block size
    value = _number(gain[1]) if gain else 0.0
    if format is None or not _local(words[0]) or not math.isfinite(value) or (words[2] and gain is None):
        raise ReadError("unreadable", f"{path.name} has no valid signal line: {line[:60]!r}")
    kind, per_frame, skew, offset = (int((g or "0")[:12]) for g in format.groups())
    if kind not in BLOCKS and kind not in FLAC and words[0] != "~":
        known = ", ".join(str(f) for f in (*BLOCKS, *FLAC))
        raise ReadError("unsupported", f"{path.name} names the signal format {kind}; readable are {known}")
    stated = None if not value else (gain[3] or "mV")  # header(5): mV unless stated; no gain means uncalibrated
    baseline = int(gain[2]) if gain and gain[2] else whole[1]
    name = words[8].strip() or f"signal {i}"
    gain_value = value or DEFAULT_GAIN
    return Signal(words[0], kind, per_frame or 1, skew, offset, gain_value, baseline, stated, whole[2], name)


def _local(name: str) -> bool:
    """A file below the header's own folder."""
    return not (os.path.isabs(name) or ":" in name or "\\" in name or "\0" in name or ".." in name.split("/"))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(text: str) -> int:
    try:
        return int(text[:20])
    except ValueError:
        return 0


class Part:
    """Signals of a header without segments."""

    def __init__(self, header: HeaderFile) -> None:
        self.header, self.folder = header, header.path.parent
        self.groups: dict[str, list[int]] = {}
        for i, signal in enumerate(header.signals):
            self.groups.setdefault(signal.file, []).append(i)
        self.n = min((self._frames(file, members) for file, members in self.groups.items()), default=header.n or 0)

    def _frames(self, file: str, members: list[int]) -> int:
        """Frames of a signal file, after its size is compared with what the header says."""
        signals = [self.header.signals[i] for i in members]
        path = self.folder / file
        try:
            size = path.stat().st_size
        except (OSError, ValueError):
            raise ReadError("missing", f"no signal file {file} beside {self.header.path.name}") from None
        if not size:
            raise ReadError("empty", f"{file} has no bytes")
        if len({(s.format, s.offset) for s in signals}) > 1:
            raise ReadError("unreadable", f"{self.header.path.name} gives {file} several formats or offsets")
        format, offset, width = signals[0].format, signals[0].offset, sum(s.per_frame for s in signals)
        if format in FLAC:
            if len({s.per_frame for s in signals}) > 1:
                raise ReadError("unsupported", f"{file} is FLAC with signals of several rates; convert it with xform")
            with self._flac(file, format, len(members)) as stream:
                present = max(stream.frames - offset, 0) // signals[0].per_frame
                n = min(self.header.n or present, present)
                if n:  # the stated length may lie: look whether the last sample is there
                    _flac_samples(stream, file, offset + n * signals[0].per_frame - 1, 1)
        else:
            present = _samples(format, size - offset) // width
        n = self.header.n or present
        if n > present:
            raise ReadError("truncated", f"{file} holds {present} of {n} samples a signal; copy the file again")
        if not n:
            raise ReadError("empty", f"{file} holds no sample")
        return n

    def read(self, which: Sequence[int], first: int, end: int) -> list[np.ndarray]:
        """Physical values of signals in frames ``first`` to ``end``, NaN where a sample is missing."""
        found: dict[int, np.ndarray] = {}
        for file, members in self.groups.items():
            wanted = [i for i in members if i in which]
            if not wanted:
                continue
            signals = [self.header.signals[i] for i in members]
            late = min(end + max(self.header.signals[i].skew for i in wanted), self.n)
            columns = self._digital(file, signals, [members.index(i) for i in wanted], first, max(late, first))
            for i, digital in zip(wanted, columns):
                signal = self.header.signals[i]
                n = (end - first) * signal.per_frame
                part = digital[signal.skew * signal.per_frame :][:n]
                values = (part - float(signal.baseline)) / signal.gain
                missing = (BLOCKS.get(signal.format) or FLAC[signal.format])[-1]
                if missing is not None:
                    values[part == missing] = np.nan
                found[i] = np.concatenate([values, np.full(n - len(values), np.nan)]) if len(values) < n else values
        return [found[i] for i in which]

    def _digital(
        self, file: str, signals: list[Signal], wanted: list[int], first: int, end: int
    ) -> list[np.ndarray]:  # fmt: skip
        """Stored numbers of some signals of one file, as they lie in frames ``first`` to ``end``."""
        format, offset, width = signals[0].format, signals[0].offset, sum(s.per_frame for s in signals)
        edges = np.cumsum([0] + [s.per_frame for s in signals])
        if format in FLAC:
            per_frame = signals[0].per_frame
            with self._flac(file, format, len(signals)) as stream:
                data = _flac_samples(stream, file, offset + first * per_frame, (end - first) * per_frame)
            return [data[:, j] for j in wanted]
        begin = 0 if format == 8 else first  # format 8 holds differences from sample to sample
        data = _stream(self.folder / file, format, offset, begin * width, end * width).reshape(-1, width)
        columns = [data[:, edges[j] : edges[j + 1]].reshape(-1) for j in wanted]
        if format == 8:
            skip = [first * signals[j].per_frame for j in wanted]
            columns = [np.cumsum(c)[s:] + signals[j].initial for c, s, j in zip(columns, skip, wanted)]
        return columns

    def _flac(self, file: str, format: int, channels: int) -> object:
        soundfile = require("soundfile", extra="signals")
        path = self.folder / file
        try:
            with open(path, "rb") as raw:
                if raw.read(4) != b"fLaC":
                    raise ReadError("unreadable", f"{file} is no FLAC file, as {self.header.path.name} says")
            stream = soundfile.SoundFile(str(path))
        except (OSError, RuntimeError) as error:
            raise ReadError("unreadable", f"{file}: {error}") from None
        if stream.channels != channels or _SUBTYPES.get(stream.subtype, 99) > FLAC[format][0]:
            found = f"{stream.channels} channels of {stream.subtype}"
            stream.close()
            raise ReadError("unreadable", f"{file} has {found}, not {channels} of {FLAC[format][0]} bits")
        return stream


def _samples(format: int, size: int) -> int:
    """Whole samples in so many bytes."""
    per, width, _ = BLOCKS[format]
    blocks, rest = divmod(max(size, 0), width)
    whole = {212: (0, 0, 1), 310: (0, 0, 1, 1), 311: (0, 0, 1, 2)}.get(format, (0,) * width)
    return blocks * per + whole[rest]


def _stream(path: Path, format: int, offset: int, first: int, end: int) -> np.ndarray:
    """Stored numbers ``first`` to ``end`` of a signal file, ``int64``."""
    per, width, _ = BLOCKS[format]
    low, high = first // per, -(-end // per)
    try:
        with open(path, "rb") as stream:
            stream.seek(offset + low * width)
            data = stream.read((high - low) * width)
    except OSError as error:
        raise ReadError("unreadable", f"{path.name}: {error}") from None
    if low * per + _samples(format, len(data)) < end:
        raise ReadError("truncated", f"{path.name} ends before sample {end}; copy the file again")
    data += bytes(-len(data) % width)
    if format in _PLAIN:
        out = np.frombuffer(data, _PLAIN[format]).astype(np.int64)
        return out - {80: 2**7, 160: 2**15}.get(format, 0)
    b = np.frombuffer(data, np.uint8).astype(np.int64).reshape(-1, width)
    if format == 24:
        return _signed(b[:, 0] | b[:, 1] << 8 | b[:, 2] << 16, 24)
    if format == 212:
        columns, bits = (b[:, 0] | (b[:, 1] & 15) << 8, b[:, 2] | b[:, 1] >> 4 << 8), 12
    elif format == 310:
        columns = (b[:, 0] >> 1 | (b[:, 1] & 7) << 7, b[:, 2] >> 1 | (b[:, 3] & 7) << 7)
        columns, bits = (*columns, b[:, 1] >> 3 | b[:, 3] >> 3 << 5), 10
    else:
        columns = (b[:, 0] | (b[:, 1] & 3) << 8, b[:, 1] >> 2 | (b[:, 2] & 15) << 6)
        columns, bits = (*columns, b[:, 2] >> 4 | (b[:, 3] & 63) << 4), 10
    return _signed(np.stack(columns, axis=1).reshape(-1), bits)[first - low * per : end - low * per]


def _signed(values: np.ndarray, bits: int) -> np.ndarray:
    return values - (values >> (bits - 1) << bits)


def _flac_samples(stream: object, file: str, first: int, count: int) -> np.ndarray:
    """Stored numbers of a FLAC file ``int32 (count, channels)``; memory grows only with what is really there."""
    shift = 32 - _SUBTYPES[stream.subtype]
    parts, left = [], count
    try:
        stream.seek(first)
        while left:
            parts.append(stream.read(min(left, 2**20), dtype="int32", always_2d=True))
            if not len(parts[-1]):
                raise ReadError("truncated", f"{file} ends {left} samples too early; copy the file again")
            left -= len(parts[-1])
    except RuntimeError as error:
        raise ReadError("unreadable", f"{file} cannot be decoded from sample {first}: {error}") from None
    return np.concatenate(parts) >> shift if parts else np.zeros((0, stream.channels), np.int32)


class Segments:
    """Signals of a record, of one or of many parts: ``channels`` as (name, per frame, unit), ``n`` frames."""

    def __init__(self, header: HeaderFile) -> None:
        self.starts: list[int] = []
        self.parts: list[tuple[int, Part | None, list[int | None], list[float]]] = []
        if not header.segments:
            part = Part(header)
            self.channels = [(s.name, s.per_frame, s.unit) for s in header.signals]
            self.n, self.starts = part.n, [0]
            self.parts = [(part.n, part, list(range(len(header.signals))), [1.0] * len(header.signals))]
            return
        total = sum(n for _, n in header.segments)
        if header.n is not None and header.n != total:
            raise ReadError("unreadable", f"{header.path.name} says {header.n} samples, its segments {total}")
        opened = [None if s == "~" else self._segment(header, s) for s, _ in header.segments]
        variable = header.segments[0][1] == 0 and opened[0] is not None
        model = opened[0] if variable else next((h for h in opened if h is not None), None)
        if model is None:
            raise ReadError("empty", f"{header.path.name} has no segment with signals")
        self.channels = [(s.name, s.per_frame, s.unit) for s in model.signals]
        self.n = 0
        for (name, n), segment in zip(header.segments, opened):
            if not n:
                continue
            self.starts.append(self.n)
            self.n += n
            if segment is None:
                self.parts.append((n, None, [], []))
                continue
            part = Part(segment)
            if part.n != n:
                raise ReadError("truncated", f"segment {name} has {part.n} samples, {header.path.name} says {n}")
            names = [s.name for s in segment.signals]
            if variable:
                places = [names.index(c[0]) if c[0] in names else None for c in self.channels]
            else:
                places = list(range(len(self.channels)))
            self.parts.append((n, part, places, self._scales(name, segment, places)))

    @staticmethod
    def _segment(header: HeaderFile, name: str) -> HeaderFile:
        found = read_header(header.path.parent / f"{name}.hea")
        if found.segments:
            raise ReadError("unreadable", f"{header.path.name}: segment {name} is itself of several segments")
        if found.rate != header.rate:
            raise ReadError("unsupported", f"segment {name} has {found.rate:g} Hz, the record {header.rate:g} Hz")
        return found

    def _scales(self, name: str, segment: HeaderFile, places: list[int | None]) -> list[float]:
        """Factors from a segment's units to the record's."""
        scales = []
        for (channel, per_frame, unit), i in zip(self.channels, places):
            if i is not None and i >= len(segment.signals):
                raise ReadError("unreadable", f"segment {name} lacks signals of the record")
            signal = None if i is None else segment.signals[i]
            same = signal is None or signal.unit == unit
            have, want = (None, None) if same else (canonical_unit(signal.unit), canonical_unit(unit))
            if (not same and (have is None or want is None)) or (signal and signal.per_frame != per_frame):
                raise ReadError("unsupported", f"{channel!r} changes its unit or rate in segment {name}")
            scales.append(1.0 if same else factor(have, want))
        return scales

    def read(self, which: Sequence[int], first: int, count: int) -> np.ndarray:
        """Samples of signals that have equally many a frame; see :class:`biosae.read.signals.Recording`."""
        if count * max(len(which), 1) > MAX_VALUES:
            raise ReadError(
                "unsupported", f"{count} samples of {len(which)} signals are too many at once; pass window="
            )
        per_frame = self.channels[which[0]][1]
        low, high = first // per_frame, -(-(first + count) // per_frame)
        out = np.full((len(which), (high - low) * per_frame), np.nan)
        at = max(bisect_right(self.starts, low) - 1, 0)
        while at < len(self.parts) and self.starts[at] < high:
            start, (n, part, places, scales) = self.starts[at], self.parts[at]
            a, b = max(low, start), min(high, start + n)
            rows = [] if part is None else [r for r, i in enumerate(which) if places[i] is not None]
            if rows and a < b:
                values = part.read([places[which[r]] for r in rows], a - start, b - start)
                for r, value in zip(rows, values):
                    out[r, (a - low) * per_frame : (b - low) * per_frame] = value * scales[which[r]]
            at += 1
        return out[:, first - low * per_frame :][:, :count]


def open_local(path: str | os.PathLike) -> tuple[HeaderFile, Segments]:
    """Header and signals of a record named by its ``.hea`` file, or by that path without the suffix."""
    place = Path(path)
    header = read_header(place if place.suffix == ".hea" else Path(f"{place}.hea"))
    return header, Segments(header)
