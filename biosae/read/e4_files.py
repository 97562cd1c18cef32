"""Files of an Empatica E4 session: CSV streams in a folder or a zip archive, on one axis of time."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence
from contextlib import closing
from typing import IO, Any, NamedTuple

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.read.signals import Channel, Header, Recording


class Stream(NamedTuple):
    """One CSV file of a session: its channels, their unit, the device's rate (Hz) and the factor to the unit."""

    channels: tuple[str, ...]
    unit: str
    rate: float
    scale: float = 1.0


STREAMS = {
    "ACC": Stream(("ACC_x", "ACC_y", "ACC_z"), "g", 32.0, 1 / 64),
    "BVP": Stream(("BVP",), "au", 64.0),
    "EDA": Stream(("EDA",), "uS", 4.0),
    "TEMP": Stream(("TEMP",), "degC", 4.0),
    "HR": Stream(("HR",), "bpm", 1.0),
}
STREAM_OF = {channel: name for name, stream in STREAMS.items() for channel in stream.channels}
FILES = {f"{name}.csv".lower(): name for name in (*STREAMS, "IBI", "tags")}

MAX_SECONDS = 4 * 86400  # the device's memory holds 60 hours
MAX_RATE = 64  # Hz
MAX_APART = 3600.0  # s between the starts of two streams
MAX_EVENTS = 5 * MAX_SECONDS
_BLOCK = 4 * 2**20  # bytes of text parsed at once
_LINE = 400  # bytes


class Session:
    """An E4 session in memory, on one axis of time that begins with its earliest stream.

    Attributes
    ----------
    header : Header
    spans : dict
        Stream to its first and last moment, in seconds.
    rates : dict
        Stream to its rate (Hz).
    """

    def __init__(self, streams: dict[str, _Values], ibi: _Values | None, tags: _Values | None) -> None:
        zero = min(s.start for s in streams.values())
        self._values, self._first = {}, {}
        self.spans: dict[str, tuple[float, float]] = {}
        self.rates = {name: s.rate for name, s in streams.items()}
        channels, self._place = [], []
        for name, s in streams.items():
            first = round((s.start - zero) * s.rate)
            self._values[name], self._first[name] = s.values, first
            self.spans[name] = (first / s.rate, (first + s.values.shape[1]) / s.rate)
            for i, channel in enumerate(STREAMS[name].channels):
                channels.append(Channel(channel, s.rate, STREAMS[name].unit, first + s.values.shape[1]))
                self._place.append((name, i))
        self.header = Header(
            channels=tuple(channels),
            seconds=max(stop for _, stop in self.spans.values()),
            annotations=_annotations(ibi, tags, zero),
            facts={"device": "Empatica E4", "gaps": {n: [0.0, a] for n, (a, _) in self.spans.items() if a > 0}},
        )

    def read(self, channels: Sequence[int], first: int, count: int) -> np.ndarray:
        """Samples in the channels' units, ``float64 (len(channels), count)``; NaN before a stream's start."""
        out = np.empty((len(channels), count))
        for row, channel in zip(out, channels):
            name, axis = self._place[channel]
            row[:] = self._samples(name, first, count)[axis] * STREAMS[name].scale
        return out

    def part(self, name: str, begin: float, end: float) -> np.ndarray:
        """Values of a stream as the file has them between two moments (s), ``(channels, n)``, NaN outside its span."""
        rate = self.rates[name]
        first = round(begin * rate)
        return self._samples(name, first, max(int(end * rate + 1e-9) - first, 0))

    def _samples(self, name: str, first: int, count: int) -> np.ndarray:
        values, at = self._values[name], first - self._first[name]
        if at >= 0 and at + count <= values.shape[1]:
            return values[:, at : at + count]
        out = np.full((len(values), count), np.nan, dtype=np.float32)
        low, high = max(at, 0), min(at + count, values.shape[1])
        if low < high:
            out[:, low - at : high - at] = values[:, low:high]
        return out

    def close(self) -> None:
        """Let the arrays go."""
        self._values = {}


def open_e4(path: str) -> Recording:
    """Open a session: a folder, or a zip archive with the files of one session (read in place, never unpacked).

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` (with the file and the line) or ``unsupported``.
    """
    if os.path.isdir(path):
        files = sorted(n for n in os.listdir(path) if n.lower() in FILES and os.path.isfile(os.path.join(path, n)))
        if len({n.lower() for n in files}) < len(files):
            raise ReadError("unsupported", f"two files of one name but for case ({', '.join(files)}); keep one")
        return _session({FILES[n.lower()]: lambda n=n: open(os.path.join(path, n), "rb") for n in files})
    if not os.path.isfile(path):
        raise ReadError("missing", f"no folder or zip archive {path}")
    if not os.path.getsize(path):
        raise ReadError("empty", "0 bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            return _session({name: lambda i=info: _member(archive, i) for name, info in _members(archive).items()})
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # zipfile and zlib raise many types on damaged archives
        raise ReadError("unreadable", f"not a sound zip archive ({type(error).__name__}: {error})") from None


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Stream to its entry; folders inside the archive do not matter, but there may be one session only."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        folder, _, file = info.filename.rpartition("/")
        name = FILES.get(file.lower())
        if name is None or folder.startswith("__MACOSX"):
            continue
        if name in found:
            raise ReadError("unsupported", f"the archive has {file} twice; unpack it and give a row to each session")
        found[name] = info
    return found


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.flag_bits & 1:
        raise ReadError("unsupported", f"{info.filename} is encrypted; unpack the archive with its password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ReadError("unsupported", f"{info.filename}: zip compression {info.compress_type}; pack with deflate")
    return archive.open(info)


def _session(files: dict[str, Any]) -> Session:
    """Parse the streams; ``files`` is stream to a function that opens it."""
    if not any(name in STREAMS for name in files):
        raise ReadError("missing", f"none of {', '.join(f'{n}.csv' for n in STREAMS)}; is it an E4 export?")
    parsed = {}
    for name, opened in files.items():
        try:
            with closing(opened()) as stream:
                values = _Parser(name, stream).parse()
        except OSError as error:
            raise ReadError("unreadable", f"{name}.csv: {error.strerror or error}") from None
        if values is not None:
            parsed[name] = values
    streams = {name: parsed[name] for name in STREAMS if name in parsed}
    if not streams:
        raise ReadError("empty", "no stream holds a sample")
    starts = {name: values.start for name, values in streams.items()}
    early, late = min(starts, key=starts.get), max(starts, key=starts.get)
    if starts[late] - starts[early] > MAX_APART:
        raise ReadError(
            "unreadable",
            f"{late}.csv starts {starts[late] - starts[early]:g} s after {early}.csv; are they one session?",
        )
    return Session(streams, parsed.get("IBI"), parsed.get("tags"))


class _Values(NamedTuple):
    """A parsed file: start (s since 1970, NaN for tags), rate (Hz, NaN for events), values (columns, rows)."""

    start: float
    rate: float
    values: np.ndarray


class _Parser:
    """One CSV file, in blocks of bounded size."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        self.file, self.stream = f"{name}.csv", stream
        self.name, self.line = name, 0
        self.columns = len(STREAMS[name].channels) if name in STREAMS else {"IBI": 2, "tags": 1}[name]

    def parse(self) -> _Values | None:
        """The file's values; None for an HR, IBI or tags file without a byte, which short sessions have."""
        if self.name == "tags":
            return _Values(math.nan, math.nan, self._values(MAX_EVENTS, np.float64))
        head = self._line()
        if not head:
            if self.name in ("HR", "IBI"):
                return None
            raise ReadError("empty", f"{self.file} has no line; was the session too short to record?")
        if self.name == "IBI":
            start = self._number(head.split(b",")[:1], "a start time")
            return _Values(start, math.nan, self._values(MAX_EVENTS, np.float64))
        start = self._number(head.split(b","), "a start time")
        rate = self._number(self._line().split(b","), "a rate")
        if not (1 <= rate <= MAX_RATE and rate == int(rate)):
            raise ReadError(
                "unreadable", f"{self.file}, line 2: a rate of {rate:g} Hz; an E4 has whole rates from 1 to {MAX_RATE}"
            )
        values = self._values(int(rate) * MAX_SECONDS, np.float32)
        if not values.shape[1]:
            raise ReadError("empty", f"{self.file} has a header and no sample")
        return _Values(start, rate, values)

    def _line(self) -> bytes:
        self.line += 1
        text = self.stream.readline(_LINE)
        if len(text) == _LINE:
            raise ReadError("unreadable", f"{self.file}, line {self.line}: {_LINE} bytes and more")
        return text.strip()

    def _number(self, fields: Sequence[bytes], what: str) -> float:
        """The one number that a header line holds, once for each column."""
        try:
            found = {float(f) for f in fields}
        except ValueError:
            found = set()
        columns = 1 if self.name == "IBI" else self.columns
        if len(found) != 1 or len(fields) != columns or not math.isfinite(next(iter(found))):
            shown = b",".join(fields)[:60].decode(errors="replace")
            raise ReadError(
                "unreadable", f"{self.file}, line {self.line}: {shown!r} is not {what} for {columns} columns"
            )
        return found.pop()

    def _values(self, most: int, dtype: type) -> np.ndarray:
        """The rest of the file, ``(columns, rows)``."""
        blocks: list[np.ndarray] = []
        rows, rest = 0, b""
        while True:
            text = self.stream.read(_BLOCK)
            ended = len(text) < _BLOCK
            cut = len(text) if ended else text.rfind(b"\n") + 1
            if not (ended or cut):
                raise ReadError("unreadable", f"{self.file}, line {self.line + 1}: {_BLOCK} bytes, no end of a line")
            block, rest = rest + text[:cut], text[cut:]
            if ended:
                block = block.rstrip()
            if block:
                blocks.append(self._block(block, dtype))
                rows += blocks[-1].shape[1]
            if rows > most:
                raise ReadError("unsupported", f"{self.file} has more than {most} rows, {MAX_SECONDS / 3600:g} hours")
            if ended:
                break
        return np.concatenate(blocks, axis=1) if blocks else np.empty((self.columns, 0), dtype)

    def _block(self, text: bytes, dtype: type) -> np.ndarray:
        text = text if text.endswith(b"\n") else text + b"\n"
        n = text.count(b"\n")
        try:
            table = pd.read_csv(
                io.BytesIO(text), header=None, dtype=np.float64, engine="c", quoting=3, na_filter=False,
                skip_blank_lines=False,
            )  # fmt: skip
            with np.errstate(over="ignore"):
                values = table.to_numpy().T.astype(dtype)
        except (ValueError, pd.errors.ParserError, UnicodeDecodeError):
            values = None
        if values is None or values.shape != (self.columns, n) or not np.isfinite(values).all():
            raise ReadError("unreadable", self._fault(text, dtype))
        self.line += n
        return values

    def _fault(self, text: bytes, dtype: type) -> str:
        """Which line of a block is wrong."""
        largest = float(np.finfo(dtype).max)
        for i, line in enumerate(text.split(b"\n")[:-1], start=1):
            fields = line.split(b",")
            try:
                fine = len(fields) == self.columns and all(abs(float(f)) <= largest for f in fields)
            except ValueError:
                fine = False
            if not fine:
                shown = line[:60].decode(errors="replace")
                return f"{self.file}, line {self.line + i}: {shown!r} is not {self.columns} finite numbers"
        last = self.line + text.count(b"\n")
        return f"{self.file}, lines {self.line + 1} to {last}: not plain numbers"


def _annotations(ibi: _Values | None, tags: _Values | None, zero: float) -> pd.DataFrame:
    """Beats (``IBI``, the interval to the beat before in ``value``, seconds) and presses of the button (``tag``)."""
    parts = []
    if ibi is not None:
        onset, value = ibi.values[0] + (ibi.start - zero), ibi.values[1]
        parts.append(pd.DataFrame({"onset": onset, "duration": 0.0, "label": "IBI", "value": value}))
    if tags is not None and tags.values.shape[1]:
        parts.append(pd.DataFrame({"onset": tags.values[0] - zero, "duration": 0.0, "label": "tag", "value": np.nan}))
    if not parts:
        return pd.DataFrame({"onset": [], "duration": [], "label": [], "value": []}).astype({"label": object})
    return pd.concat(parts, ignore_index=True).sort_values("onset", kind="stable", ignore_index=True)
