"""EEGLAB, BrainVision and FIF files through MNE, in the units of the field."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.errors import BiosaeError, require
from biosae.read.channels import UNITS, canonical_unit
from biosae.read.edf_records import LARGEST, MAX_CHANNELS, check_span, opened, unique_names
from biosae.read.mat5 import check_mat5
from biosae.read.signals import Channel, Header, marks_table

_GAP = "BAD_ACQ_SKIP"  # MNE's mark of a span that was not recorded
_BREAK = re.compile(r"(bad[ _]|edge )?boundary|new segment/.*", re.IGNORECASE)  # what follows was recorded later
_STIM = 3  # FIFFV_STIM_CH
# FIFF's unit of a channel -> the unit given, and its number in one of MNE's (SI)
_FIFF_UNITS = {107: ("uV", 1e6), 112: ("fT", 1e15), 201: ("fT/cm", 1e13)}


def _mne() -> Any:
    return require("mne", extra="eeg")


def _quietly(read: Callable[[], Any], path: str) -> Any:
    """What ``read()`` gives; whatever MNE and its helpers raise on damaged files becomes a ReadError."""
    try:
        return read()
    except BiosaeError:
        raise
    except MemoryError:
        raise ReadError("unreadable", "the file states sizes that do not fit into memory") from None
    except FileNotFoundError as error:
        raise ReadError("missing", f"a file that belongs to {Path(path).name} is missing ({_short(error)})") from None
    except NotImplementedError as error:
        raise ReadError("unsupported", _short(error)) from None
    except Exception as error:
        raise ReadError("unreadable", f"{type(error).__name__}: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class MneFile:
    """A raw recording of MNE; see :class:`~biosae.read.signals.Recording`."""

    def __init__(self, raw: Any, path: str, format: str) -> None:
        self._raw, self._path, self.files = raw, path, [str(f) for f in raw.filenames if f is not None]
        rate, n = float(raw.info["sfreq"]), int(raw.n_times)
        if not 0 < rate < 1e9 or n < 1:
            raise ReadError("unreadable", f"{n} samples at {rate:g} Hz")
        said = getattr(raw, "_orig_units", None) or {}
        found = [_unit(channel, said.get(channel["ch_name"])) for channel in raw.info["chs"]]
        self._factors = np.array([factor for _, factor in found])
        names = unique_names([c["ch_name"] for c in raw.info["chs"]])
        channels = tuple(Channel(name, rate, unit, n) for name, (unit, _) in zip(names, found))
        annotations = _annotations(raw)
        gaps = annotations[annotations["label"] == _GAP]
        self._gaps = [(round(g.onset * rate), round((g.onset + g.duration) * rate)) for g in gaps.itertuples()]
        check_span(n / rate, (n - sum(b - a for a, b in self._gaps)) / rate)
        facts = {"format": format}
        facts |= {k: float(raw.info[k]) for k in ("highpass", "lowpass") if np.isfinite(raw.info.get(k) or np.nan)}
        breaks = [
            o for o, label in zip(annotations["onset"], annotations["label"]) if o > 0 and _BREAK.fullmatch(label)
        ]
        facts |= {"breaks": breaks} if breaks else {}
        self.header = Header(channels, n / rate, annotations, facts)

    def read(self, channels: Sequence[int], first: int, count: int) -> np.ndarray:
        """Samples ``first`` to ``first + count``, ``float64 (len(channels), count)``; NaN in skipped spans."""
        order = sorted(set(channels))
        data = _quietly(lambda: self._raw[order, first : first + count][0], self._path)
        if data.shape != (len(order), count):
            raise ReadError("truncated", f"{data.shape[-1]} of {count} samples could be read")
        out = data[[order.index(c) for c in channels]] * self._factors[list(channels), None]
        for a, b in self._gaps:
            out[:, max(a - first, 0) : max(b - first, 0)] = np.nan
        out[~(np.abs(out) < LARGEST)] = np.nan
        return out

    def close(self) -> None:
        """Let the file go."""
        self._raw.close()


def _unit(channel: Any, said: str | None) -> tuple[str | None, float]:
    """Unit in which a channel is given, and its number in one of MNE's; None where the file states none."""
    if int(channel["kind"]) == _STIM:
        return None, 1.0
    unit = canonical_unit(said)
    if said is not None and said != "n/a" and (unit is None or UNITS[unit][0] != "voltage"):
        return unit or said, 1e6 if unit == "uS" else 1.0  # MNE scales this one besides voltages
    if unit is not None:
        return unit, 1 / UNITS[unit][1]
    return _FIFF_UNITS.get(int(channel["unit"]), (None, 1.0))


def _annotations(raw: Any) -> pd.DataFrame:
    """Marks with onsets from the first sample of the file."""
    marks = raw.annotations
    # MNE counts from the clock's zero, which lies first_time before the first sample, with and without a date
    onsets, durations = np.round(np.asarray(marks.onset, float) - raw.first_time, 9), np.asarray(marks.duration, float)
    if not np.isfinite([onsets, durations]).all():
        raise ReadError("unreadable", "an annotation has no time")
    return marks_table(list(zip(onsets.tolist(), durations.tolist(), map(str, marks.description))))


# -- EEGLAB --------------------------------------------------------------------------------------------------------


class Epochs:
    """Epochs of an EEGLAB file laid one behind the other; one annotation each, with the epoch's event as label."""

    def __init__(self, epochs: Any) -> None:
        data = np.asarray(epochs.get_data(verbose="ERROR"), float)  # (epochs, channels, time), volts
        n_epochs, n_channels, length = data.shape
        rate = float(epochs.info["sfreq"])
        if not data.size or not 0 < rate < 1e9:
            raise ReadError("unreadable", f"{n_epochs} epochs of {length} samples at {rate:g} Hz")
        self._data = data.transpose(1, 0, 2).reshape(n_channels, -1) * 1e6
        channels = tuple(Channel(name, rate, "uV", n_epochs * length) for name in unique_names(epochs.ch_names))
        names = {code: name for name, code in epochs.event_id.items()}
        length_s = length / rate
        codes = epochs.events[:, 2].tolist()
        marks = marks_table([(k * length_s, length_s, str(names.get(code, code))) for k, code in enumerate(codes)])
        facts: dict[str, Any] = {"format": "EEGLAB epochs", "epochs": n_epochs, "epoch_seconds": length_s}
        facts["breaks"] = [k * length_s for k in range(1, n_epochs)]
        self.header = Header(channels, n_epochs * length / rate, marks, facts)

    def read(self, channels: Sequence[int], first: int, count: int) -> np.ndarray:
        """Samples ``first`` to ``first + count``, ``float64 (len(channels), count)``."""
        out = self._data[list(channels), first : first + count].copy()
        out[~(np.abs(out) < LARGEST)] = np.nan
        return out

    def close(self) -> None:
        """Nothing is held open."""


def open_set(path: str) -> MneFile | Epochs:
    """Open an EEGLAB ``.set`` (MATLAB 5 to 7.2) with its data inside or in a ``.fdt``; microvolts, as EEGLAB has it.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` or ``unsupported``.
    """
    check_mat5(path)
    eeglab = _mne().io.read_raw_eeglab
    try:
        raw = _quietly(lambda: eeglab(path, preload=False, verbose="ERROR"), path)
    except ReadError as error:
        if "number of trials" not in error.detail:
            raise
        epochs = _quietly(lambda: _mne().read_epochs_eeglab(path, verbose="ERROR"), path)
        return _quietly(lambda: Epochs(epochs), path)
    if not raw.preload:
        needed = 4 * len(raw.ch_names) * raw.n_times
        present = sum(os.path.getsize(f) for f in raw.filenames)
        if present < needed:
            raise ReadError("truncated", f".fdt of {present} bytes, the .set states {needed}")
    return _quietly(lambda: MneFile(raw, path, "EEGLAB"), path)


# -- BrainVision ---------------------------------------------------------------------------------------------------


def open_brainvision(path: str) -> MneFile:
    """Open a BrainVision ``.vhdr`` with the ``.eeg`` and ``.vmrk`` that it names.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` or ``unsupported``.
    """
    with opened(path) as stream:
        text = stream.read(2**24).decode("latin-1")
    if not text.strip("\0 \r\n"):
        raise ReadError("empty", f"{len(text)} bytes")
    stated = re.search(r"(?im)^\s*NumberOfChannels\s*=\s*(\d+)\s*$", text)
    if stated is None or not 0 < int(stated[1][:9]) <= min(MAX_CHANNELS, len(text)):
        raise ReadError("unreadable", "the BrainVision header states no usable NumberOfChannels")
    read = _mne().io.read_raw_brainvision
    raw = _quietly(lambda: read(path, preload=False, verbose="ERROR"), path)
    points = re.search(r"(?im)^\s*DataPoints\s*=\s*(\d+)\s*$", text)
    if points is not None and int(points[1][:15]) > raw.n_times:
        raise ReadError("truncated", f"{raw.n_times} of {points[1]} samples are there")
    for number in re.findall(r"(?m)^\s*Ch(\d{1,9})\s*=[^,\n]*,[^,\n]*,[^,\n]*,\s*uS\s*(?:,.*)?$", text):
        if 0 < int(number) <= len(raw.ch_names):  # MNE scales them to S and drops the unit
            raw._orig_units[raw.ch_names[int(number) - 1]] = "uS"
    return _quietly(lambda: MneFile(raw, path, "BrainVision"), path)


# -- FIF -----------------------------------------------------------------------------------------------------------


def open_fif(path: str) -> MneFile:
    """Open a raw FIF file; EEG in uV, magnetometers in fT, gradiometers in fT/cm.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` or ``unsupported``.
    """
    _check_tags(path)
    read = _mne().io.read_raw_fif
    raw = _quietly(lambda: read(path, preload=False, verbose="ERROR"), path)
    return _quietly(lambda: MneFile(raw, path, "FIF"), path)


def _check_tags(path: str) -> None:
    """Walk the tags of a FIF file: each lies within it, behind the one before, as do those listed."""
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(16)
        if not head.strip(b"\0"):
            raise ReadError("empty", f"{size} bytes, all zero" if head else "0 bytes")
        if len(head) < 16 or struct.unpack(">ii", head[:8]) != (100, 31):
            raise ReadError("unreadable", f"not a FIF file (begins with {head[:8]!r})")
        found: set[tuple[int, int, int, int]] = set()
        directory = b""
        at = 0
        while at < size:
            stream.seek(at)
            tag = stream.read(16)
            if len(tag) < 16:
                raise ReadError("truncated", f"the file ends within a tag, at byte {size}")
            kind, type_, length, following = struct.unpack(">iiii", tag)
            end = at + 16 + length
            if length < 0 or end > size:
                raise ReadError("truncated", f"a tag of {length} bytes at byte {at} of {size}")
            found.add((kind, type_, length, at))
            if kind == 102 and length:  # FIFF_DIR
                directory = stream.read(length)
            if following == -1:
                break
            if following and following < end:
                raise ReadError("unreadable", f"the tag at byte {at} points back to byte {following}")
            at = following or end
    entries = struct.iter_unpack(">iiii", directory[: len(directory) // 16 * 16])
    odd = [e for e in entries if e not in found and e[0] != -1]
    if odd:
        raise ReadError("unreadable", f"the directory lists a tag at byte {odd[0][3]} that is not there")
