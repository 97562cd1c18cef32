"""Recordings of signals (EEG, ECG, wearables): what a format must offer, and the reader of windows."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.errors import InputError, nearest
from biosae.read.channels import canonical_unit, factor, find_channels
from biosae.read.handles import Handles
from biosae.read.resample import piece, ratio

MAX_VALUES = 2**28
"""Most values of one window, in the file or resampled (2 GiB in memory)."""
FORMATS: dict[str, str] = {
    "edf": "biosae.read.edf:open_edf",
    "wfdb": "biosae.read.wfdb:open_wfdb",
    "e4": "biosae.read.e4:open_e4",
}
"""Format -> ``module:function`` that opens a path as a :class:`Recording`."""
SUFFIXES: dict[str, str] = {
    ".edf": "edf", ".bdf": "edf", ".gdf": "edf", ".set": "edf", ".vhdr": "edf", ".fif": "edf",
    ".hea": "wfdb", ".zip": "e4",
}  # fmt: skip
"""Ending of a file -> its format; a folder is an E4 session."""
NATIVE = "native"  # unit of signals whose channels have units of their own


class Channel(NamedTuple):
    """One channel as the file has it: name, rate in Hz, physical unit (None if the file does not say), samples."""

    name: str
    rate: float
    unit: str | None
    n: int


def marks_table(marks: Sequence[tuple[float, float, str]]) -> pd.DataFrame:
    """Annotations in the order of their onsets, from ``(onset, duration, label)``."""
    table = pd.DataFrame(marks, columns=["onset", "duration", "label"])
    table = table.astype({"onset": float, "duration": float, "label": object})
    return table.sort_values("onset", kind="stable", ignore_index=True)


@dataclass(frozen=True, repr=False)
class Header:
    """What a recording says of itself, read without its signals.

    Attributes
    ----------
    channels
        Channels in file order.
    seconds
        Length of the longest channel.
    annotations
        One row a mark: ``onset`` and ``duration`` in seconds from the start, ``label``; further columns by format.
    facts
        Other plain facts of the file (device, filters, comments); names, dates and record numbers of patients are not
        among them.
    """

    channels: tuple[Channel, ...]
    seconds: float
    annotations: pd.DataFrame = field(default_factory=lambda: marks_table([]))
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"Header: {len(self.channels)} channels, {self.seconds:g} s, {len(self.annotations)} annotations"]
        kinds: dict[tuple[float, str | None], list[str]] = {}
        for channel in self.channels:
            kinds.setdefault((channel.rate, channel.unit), []).append(channel.name)
        lines += [
            f"  {len(names)} at {rate:g} Hz in {unit or 'no stated unit'}: {_few(names, 8)}"
            for (rate, unit), names in kinds.items()
        ]
        labels = Counter(self.annotations["label"])
        if labels:
            lines.append("  annotations: " + _few([f"{label!r} x {n}" for label, n in labels.most_common()], 8))
        plain = {k: v for k, v in self.facts.items() if isinstance(v, str | int | float)}
        if plain:
            lines.append("  " + _few([f"{k}: {v}" for k, v in plain.items()], 8))
        return "\n".join(lines)


def _few(names: Sequence[str], n: int) -> str:
    return ", ".join(names[:n]) + (f" ... ({len(names) - n} more)" if len(names) > n else "")


class Recording(Protocol):
    """An open file. ``read`` gives physical values in the channels' own units, NaN where nothing was recorded."""

    header: Header

    def read(self, channels: Sequence[int], first: int, count: int) -> np.ndarray:
        """Samples ``first`` to ``first + count`` of channels of one rate, ``float64 (len(channels), count)``."""

    def close(self) -> None:
        """Let the file go."""


def open_recording(format: str, path: str) -> Recording:
    """Open a recording. ``format`` is a key of ``FORMATS``, with an option of it behind a colon if it takes one.

    Raises
    ------
    ReadError
        If the file is missing, empty, truncated, damaged or of an unsupported kind.
    """
    name, _, option = format.partition(":")
    if name not in FORMATS:
        raise InputError(f"no signal format {name!r}; {nearest(name, FORMATS)}")
    module, function = FORMATS[name].split(":")
    return getattr(importlib.import_module(module), function)(path, *([option] if option else []))


def record(path: str | os.PathLike) -> Header:
    """Header of one recording of any signal format: channels with rates and units, length, annotations.

    Parameters
    ----------
    path
        EDF, BDF, GDF, EEGLAB ``.set``, BrainVision ``.vhdr``, FIF, WFDB ``.hea``, or an Empatica E4 folder or ``.zip``.

    Raises
    ------
    ReadError
        If the file cannot be read.
    InputError
        If its ending is none of these.

    Examples
    --------
    >>> bs.read.record("S001R02.edf")  # doctest: +SKIP
    Header: 64 channels, 60 s, 1 annotations
      64 at 160 Hz in uV: Fc5., Fc3., Fc1., Fcz., Fc2., Fc4., Fc6., C5.. ... (56 more)
      annotations: 'T0' x 1
      format: EDF+C, records: 60, record_seconds: 1.0
    """
    path = Path(path)
    format = "e4" if path.is_dir() else SUFFIXES.get(path.suffix.lower())
    if format is None:
        raise InputError(f"{path.name} is no recording that can be read; {nearest(path.suffix, SUFFIXES)}, or a folder")
    recording = open_recording(format, os.fspath(path))
    recording.close()
    return recording.header


_OPENED: dict[str, Handles] = {}


class _Opener:
    """``open_recording`` of one format, picklable."""

    def __init__(self, format: str) -> None:
        self.format = format

    def __call__(self, path: str) -> Recording:
        return open_recording(self.format, path)


def _handles(format: str) -> Handles:
    return _OPENED.setdefault(format, Handles(_Opener(format)))


class SignalReader:
    """Reader of windows of recordings: chosen channels, in one unit, at one rate.

    Parameters
    ----------
    format
        Key of ``FORMATS``.
    channels
        Names in the wanted order. ``"Fp1-F7"`` is a channel of that name, else the difference of two channels.
    unit
        Physical unit of the values given: one for all channels, or one for each. Where they differ ``reader.unit`` is
        ``"native"``, and ``reader.channel_units`` says each.
    rate
        Samples a second (Hz) to resample to; None keeps the rate of the file.
    units
        Unit of channels whose file states none: one for all, or channel name to unit.
    reference
        None, or ``"average"``: the mean of the chosen channels is taken from each.
    """

    item = "signal"
    columns = ("start", "duration")

    def __init__(
        self,
        *,
        format: str,
        channels: Sequence[str],
        unit: str | Sequence[str],
        rate: float | None = None,
        units: str | Mapping[str, str] | None = None,
        reference: str | None = None,
    ) -> None:
        if reference not in (None, "average"):
            raise InputError(f"reference={reference!r}; valid: None, 'average' (or name differences as channels)")
        self.format, self.channels = format, tuple(channels)
        self.channel_units = (unit,) * len(self.channels) if isinstance(unit, str) else tuple(unit)
        if len(self.channel_units) != len(self.channels):
            raise InputError(f"{len(self.channel_units)} units for {len(self.channels)} channels")
        self.unit = self.channel_units[0] if len(set(self.channel_units)) == 1 else NATIVE
        if self.unit == NATIVE and reference is not None:
            raise InputError(f"reference={reference!r} needs channels of one unit, not {', '.join(self.channel_units)}")
        self.rate = None if rate is None else float(rate)
        self.units = dict(units) if isinstance(units, Mapping) else units
        self.reference = reference

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """Window of ``row["duration"]`` seconds from ``row["start"]``: ``float32 (C, T)``, NaN where nothing was
        recorded."""
        recording = _handles(self.format).get(row["path"])
        return self.window(recording, float(row["start"]), float(row["duration"]))

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {
            "kind": "signal", "format": self.format, "channels": list(self.channels),
            "unit": list(self.channel_units) if self.unit == NATIVE else self.unit,
            "rate": self.rate, "units": self.units, "reference": self.reference,
        }  # fmt: skip

    def window(self, recording: Recording, start: float, duration: float) -> np.ndarray:
        """A window of an open recording, ``float32 (C, T)``; ``T = round(duration * rate)``.

        Raises
        ------
        ReadError
            ``no_channel``, ``no_unit``, ``too_short`` (the window ends behind the recording, or holds no sample) or
            ``unsupported`` (the channels' rates differ and none was asked for, or have no small ratio to it), or what
            the file's own format raises.
        """
        places, scales, rate = self.plan(recording.header)
        used = sorted({i for place in places for i in place if i is not None})
        seconds = max(recording.header.channels[i].n / recording.header.channels[i].rate for i in used)
        if start < 0 or start + duration > seconds + 0.5 / rate:
            raise ReadError("too_short", f"a window from {start:g} to {start + duration:g} s of {seconds:g} s")
        n_out = round(duration * rate)
        if n_out < 1:
            raise ReadError("too_short", f"a window of {duration:g} s holds no sample at {rate:g} Hz")
        native = sum(duration * recording.header.channels[i].rate for i in used)
        if max(native, n_out * len(places)) > MAX_VALUES:
            why = f"{duration:g} s of {len(places)} channels are too many values at once; pass window="
            raise ReadError("unsupported", why)
        values = self._channels(recording, used, rate, start, n_out)
        rows = []
        for (plus, minus), scale in zip(places, scales):
            row = values[plus] * scale[0]
            rows.append(row if minus is None else row - values[minus] * scale[1])
        out = np.stack(rows)
        if self.reference == "average":
            known = np.isfinite(out)
            out -= np.where(known, out, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        return out.astype(np.float32)

    def plan(self, header: Header) -> tuple[list[tuple[int, int | None]], list[tuple[float, float]], float]:
        """Channels to take (as :func:`~biosae.read.channels.find_channels`), factors to the wanted unit, and the rate.

        Raises
        ------
        ReadError
            As :meth:`window`.
        """
        names = [c.name for c in header.channels]
        try:
            places = find_channels(self.channels, names)
        except InputError as error:
            raise ReadError("no_channel", str(error)) from None
        try:
            scales = [
                (factor(self._unit(header.channels[p]), unit),
                 1.0 if m is None else factor(self._unit(header.channels[m]), unit))
                for (p, m), unit in zip(places, self.channel_units)
            ]  # fmt: skip
        except InputError as error:
            raise ReadError("no_unit", f"{error}; choose channels= of one kind, or another unit=") from None
        rates = {header.channels[i].rate for place in places for i in place if i is not None}
        if self.rate is None and len(rates) > 1:
            shown = ", ".join(f"{r:g}" for r in sorted(rates))
            raise ReadError("unsupported", f"channels of {shown} Hz; pass rate= to resample, or channels= of one rate")
        rate = self.rate or next(iter(rates))
        try:
            for native in rates:
                ratio(native, rate)
        except InputError as error:
            raise ReadError("unsupported", str(error)) from None
        return places, scales, rate

    def _unit(self, channel: Channel) -> str:
        stated = canonical_unit(channel.unit)
        if stated is not None:
            return stated
        given = self.units.get(channel.name) if isinstance(self.units, dict) else self.units
        if given is None:
            said = f"states the unit {channel.unit!r}, which is unknown" if channel.unit else "states no unit"
            raise ReadError(
                "no_unit",
                f"channel {channel.name!r} {said}; pass units={{{channel.name!r}: '...'}} if "
                "you know it, or channels= without it",
            )
        return given

    @staticmethod
    def _channels(
        recording: Recording, used: Sequence[int], rate: float, start: float, n_out: int
    ) -> dict[int, np.ndarray]:
        """Channel number to its window at the wanted rate; channels of one native rate are read together."""
        groups: dict[tuple[float, int], list[int]] = {}
        for i in used:
            channel = recording.header.channels[i]
            groups.setdefault((channel.rate, channel.n), []).append(i)
        found: dict[int, np.ndarray] = {}
        for (native, n), members in groups.items():

            def read(first: int, count: int, members: list[int] = members) -> np.ndarray:
                return recording.read(members, first, count) if count else np.empty((len(members), 0))

            out = piece(read, n, rate=native, target=rate, start=start, n_out=n_out)
            found.update(zip(members, out))
        return found
