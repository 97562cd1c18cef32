"""Sessions of the Empatica E4 wristband (folders or zip archives of CSV files) as windows of one state."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.failures import MAX_FAILURES
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, nearest
from biosae.read.e4_files import FILES, STREAM_OF, STREAMS, Session, open_e4
from biosae.read.wear import STATES, on_body, runs, sleep_wake
from biosae.read.windows import signal_samples

__all__ = ["e4", "open_e4"]

DEFAULT = ("ACC_x", "ACC_y", "ACC_z", "BVP", "EDA", "TEMP")


def e4(
    source: str | os.PathLike | pd.DataFrame,
    *,
    patient: str | None = ...,
    recording: str | None = None,
    site: str | None = None,
    label: str | None = None,
    split: str | None = None,
    path: str = "path",
    id: str | None = None,
    root: str | os.PathLike | None = None,
    channels: Sequence[str] = DEFAULT,
    rate: float | None = None,
    window: float = 512.0,
    step: float | None = None,
    states: Sequence[str] | None = ("wake",),
    trim: float = 10.0,
    min_session: float = 900.0,
    crop: bool = True,
    quality: bool = True,
    artefact: float | None = None,
    n_jobs: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Windows of Empatica E4 sessions, each within one state (awake, asleep, not worn).

    Each session loses its first seconds (``trim``), is cropped to the shortest of the channels in use, and is dropped
    if less than ``min_session`` is left. :func:`on_body` and :func:`sleep_wake` then tell the state of every second,
    and windows are cut inside the runs of the wanted states: none spans a change (Corponi, Li et al., JMIR mHealth
    2024;12:e55094). Values are in the channels' own units: g (``ACC_*``), uS (``EDA``), degC (``TEMP``), bpm (``HR``)
    and the device's arbitrary unit (``BVP``); ``samples.channel_units`` says so.

    Parameters
    ----------
    source
        Table with one row a session whose ``path`` is a folder of CSV files or a zip archive of one; or a folder,
        which is searched for such folders and archives; or one archive. Archives are read where they are.
    patient
        Column of the patient or subject. Must be given; ``None`` says that it is unknown.
    recording, site, label, split
        Columns of these roles, if there are such. ``recording`` defaults to the session's id.
    path, id, root
        Column of the sessions' paths; column of unique ids (default ``sample_id``, else the path); folder that
        relative paths start from.
    channels
        Of ``ACC_x ACC_y ACC_z BVP EDA TEMP HR``; ``"A-B"`` is a difference.
    rate
        Samples a second (Hz) to resample to; needed where the channels' rates differ (ACC 32, BVP 64, EDA and TEMP 4,
        HR 1).
    window, step
        Length of the windows and distance between their starts, in seconds; ``step=None`` leaves no overlap.
    states
        States to keep, of ``wake``, ``sleep`` and ``off``; they need ACC, EDA and TEMP. None, or an empty list, cuts
        the whole session without looking at states.
    trim
        Seconds dropped at the start of every channel except HR.
    min_session
        Sessions with fewer seconds left are dropped (listed in ``samples.failures``, not counted as failed).
    crop
        False keeps the session to the end of its longest channel in use; windows hold NaN where a channel is absent.
    quality, artefact
        Add ``missing_share, flat_channels, bad_channels, artefact_share``; ``artefact`` is the absolute value above
        which a sample is one.
    n_jobs, max_failures, failures
        Processes that look at the sessions; largest share that may fail, 0 to 1; ``failures.csv`` to write.

    Returns
    -------
    Samples
        One row a window, ``float32 (C, T)``, NaN where nothing was recorded. Columns: ``start, duration`` (s from the
        start of the earliest stream), ``channel_rates``, ``state``, ``worn_share`` (of the window's seconds),
        ``coverage`` (share of the samples, over channels, that the device recorded). No date is kept.

    Raises
    ------
    InputError
        For unknown channels or states, channels of several rates without ``rate``, or no window at all.
    TooManyFailuresError
        If more sessions cannot be read than ``max_failures`` allows.

    Examples
    --------
    >>> samples = bs.read.e4("sessions", patient=None, channels=["EDA", "TEMP"])  # doctest: +SKIP
    """
    if isinstance(channels, str) or not channels:
        raise InputError(f"channels={channels!r} must be a list of names, such as ['EDA', 'TEMP']")
    parts = [_parts(channel) for channel in channels]
    unknown = [s for s in states or () if s not in STATES]
    if isinstance(states, str) or unknown:
        raise InputError(
            f"states={states!r} must be None or a list of names; {nearest(str(unknown or states), STATES)}"
        )
    for name, value in (("trim", trim), ("min_session", min_session)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name}={value} must be a number of seconds, 0 or more")
    used = tuple(dict.fromkeys(STREAM_OF[c] for pair in parts for c in pair))
    rates = {STREAMS[name].rate for name in used}
    if rate is None and len(rates) > 1:
        shown = ", ".join(f"{name} {STREAMS[name].rate:g} Hz" for name in used)
        raise InputError(f"the channels' rates differ ({shown}); pass rate={max(rates):g}, or channels of one rate")
    roles = {
        "patient": patient, "recording": recording, "site": site, "label": label, "split": split, "path": path,
    }  # fmt: skip
    table, root = _sessions(source, root)
    segment = _Segments(used, float(window), step, tuple(states) if states else None, trim, min_session, crop)
    return signal_samples(
        table, "e4", suffixes=(".zip",), roles=roles, id=id, root=root, channels=channels, rate=rate,
        unit=[STREAMS[STREAM_OF[pair[0]]].unit for pair in parts], units=None, reference=None, window=window, step=step,
        around=None, before=0.0, after=None, quality=quality, artefact=artefact, describe=None, n_jobs=n_jobs,
        max_failures=max_failures, failures=failures, segment=segment,
    )  # fmt: skip


def _parts(channel: str) -> list[str]:
    """The one or two channels of a name."""
    parts = str(channel).split("-")
    wrong = [p for p in parts if p not in STREAM_OF]
    if wrong or len(parts) > 2:
        raise InputError(f"no channel {channel!r} of an E4; {nearest(channel, STREAM_OF)}")
    return parts


def _sessions(
    source: str | os.PathLike | pd.DataFrame, root: str | os.PathLike | None
) -> tuple[str | os.PathLike | pd.DataFrame, str | os.PathLike | None]:
    """A folder or an archive as a table of sessions with the root of its paths; a table as it is."""
    if not isinstance(source, (str, os.PathLike)):
        return source, root
    place = Path(source)
    if place.is_file() and place.suffix.lower() == ".zip":
        return pd.DataFrame({"path": [place.name]}), place.parent
    if not place.is_dir():
        return source, root
    place = place.absolute()
    found = []
    for parent, folders, names in os.walk(place):
        folders[:] = [f for f in folders if not f.startswith(".")]
        if any(FILES.get(n.lower()) in STREAMS for n in names):
            found.append(Path(parent))
        found += [Path(parent, n) for n in names if n.lower().endswith(".zip") and not n.startswith(".")]
    if not found:
        raise InputError(
            f"no E4 session in {place} or below it: neither a folder with {', '.join(STREAMS)} .csv nor a zip"
        )
    home = place.parent if place in found else place
    return pd.DataFrame({"path": sorted(f.relative_to(home).as_posix() for f in found)}), home


class _Segments:
    """Windows of one session inside runs of one state."""

    def __init__(
        self, used: Sequence[str], window: float, step: float | None, states: Sequence[str] | None,
        trim: float, min_session: float, crop: bool,
    ) -> None:  # fmt: skip
        self.used, self.window, self.step, self.states = tuple(used), window, step or window, states
        self.trim, self.min_session, self.crop = trim, min_session, crop

    def __call__(self, recording: Session) -> tuple[list[tuple[float, float, dict[str, Any]]], str | None]:
        needed = self.used if self.states is None else tuple(dict.fromkeys([*self.used, "ACC", "EDA", "TEMP"]))
        absent = [name for name in needed if name not in recording.spans]
        if absent:
            advice = "; pass states=None to do without" if absent[0] not in self.used else "; choose other channels"
            raise ReadError("no_channel", f"the session has no {absent[0]}.csv{advice}")
        spans = {name: recording.spans[name] for name in needed}
        begins = [a + (0.0 if name == "HR" else self.trim) for name, (a, _) in spans.items()]
        ends = [b for _, b in spans.values()]
        begin = math.ceil((max(begins) if self.crop else min(begins)) - 1e-9)
        end = min(ends) if self.crop else max(ends)
        if end - begin < max(self.min_session, self.window):
            shortest = min(spans, key=lambda name: spans[name][1])
            why = f"{max(end - begin, 0):g} s are left" + (f" up to the end of {shortest}" if self.crop else "")
            limit = "min_session" if end - begin < self.min_session else "window"
            return [], f"{why}, fewer than {limit}={getattr(self, limit):g}"
        if self.states is None:
            state, worn = np.full(int(end - begin), -1), np.full(int(end - begin), np.nan)
        else:
            state, worn = _states(recording, begin, end)
        wanted = {-1: ""} if self.states is None else {STATES.index(s): s for s in self.states}
        found = []
        for first, stop in runs(state):
            last = end - begin if stop == len(state) and self.states is None else stop
            if int(state[first]) not in wanted:
                continue
            for i in range(int(np.floor((last - first - self.window) / self.step + 1e-9)) + 1):
                at = first + i * self.step
                over = worn[int(at) : math.ceil(at + self.window - 1e-9)]
                more = {"state": wanted[int(state[first])] or None, "worn_share": float(over.mean())}
                start = round(begin + at, 6)
                found.append((start, self.window, more | {"coverage": self._coverage(spans, start)}))
        if found:
            return found, None
        if self.states is not None and not worn.any():
            return [], "it was never worn (EDA or TEMP out of range in every run of 5 minutes)"
        return [], f"no run of {' or '.join(self.states or ['it'])} lasts {self.window:g} s"

    def _coverage(self, spans: dict[str, tuple[float, float]], start: float) -> float:
        present = [
            (len(STREAMS[name].channels), min(spans[name][1], start + self.window) - max(spans[name][0], start))
            for name in self.used
        ]
        recorded = sum(n * max(seconds, 0.0) for n, seconds in present)
        return round(recorded / (self.window * sum(n for n, _ in present)), 6)


def _states(recording: Session, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """State of each whole second from ``begin``, and whether the device was worn."""
    parts = {name: recording.part(name, begin, end) for name in ("EDA", "TEMP", "ACC")}
    rates = {name: recording.rates[name] for name in parts}
    if rates["EDA"] != rates["TEMP"]:
        raise ReadError(
            "unsupported",
            f"EDA has {rates['EDA']:g} Hz and TEMP {rates['TEMP']:g} Hz; pass states=None for this session",
        )
    n = int(end - begin + 1e-9)
    worn = on_body(parts["EDA"][0], parts["TEMP"][0], rate=rates["EDA"])[:n]
    return sleep_wake(parts["ACC"] * STREAMS["ACC"].scale, rate=rates["ACC"], worn=worn), worn
