"""From a table of recordings to samples, one row a window; shared by the readers of signals."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError
from biosae.read.channels import canonical_unit, is_trigger
from biosae.read.scan import scan
from biosae.read.signals import Header, Recording, SignalReader, open_recording
from biosae.read.table import record_table

HALF = 0.5 - 1e-9  # share of a window that its label must cover; rounding of onsets does not matter
_EDGE = 1e-6  # s; windows that end this much behind the recording still fit
FLAT = 1e-6  # a channel whose range in a window is below this share of its unit's scale (1 uV for volts) is flat
FILLED = ("start", "duration", "channel_rates", "annotation", "annotation_share")
QUALITY = ("missing_share", "flat_channels", "bad_channels", "artefact_share")

Segment = Callable[[Recording], tuple[list[tuple[float, float, dict[str, Any]]], str | None]]
"""``segment(recording)``: windows as (start, duration, further columns), and why there is none."""

Describe = Callable[[Header, float, float], dict[str, Any]]
"""``describe(header, start, duration)``: further columns of a window."""


def signal_samples(
    source: str | os.PathLike | pd.DataFrame,
    format: str,
    *,
    suffixes: Sequence[str],
    roles: Mapping[str, str | None],
    id: str | None,
    root: str | os.PathLike | None,
    channels: Sequence[str] | None,
    rate: float | None,
    unit: str | Sequence[str] | None,
    units: str | Mapping[str, str] | None,
    reference: str | None,
    window: float | None,
    step: float | None,
    around: str | Sequence[str] | None,
    before: float,
    after: float | None,
    quality: bool,
    artefact: float | None,
    describe: Describe | None,
    n_jobs: int | None,
    max_failures: float,
    failures: str | os.PathLike | None,
    segment: Segment | None = None,
) -> Samples:
    """Windows of recordings as samples; what the readers of EDF, WFDB and E4 share.

    One row a window, with the columns of its recording's row and ``start, duration`` (s), ``channel_rates`` (Hz, of the
    file), ``annotation`` (label of the marks that cover half of the window or more, or around which it was cut) and
    ``annotation_share``. With ``quality``: ``missing_share``, ``flat_channels``, ``bad_channels``, ``artefact_share``.

    Parameters
    ----------
    channels
        None takes the channels that all recordings share (by exact name), in the order of the first, without triggers.
    unit
        Unit of the values, one for all or one a channel; None takes the unit of the first chosen channel, which all
        must be convertible to.
    window, step
        Length of the windows and distance between their starts in seconds; ``window=None`` with ``around=None`` makes
        one sample of each recording; ``step=None`` leaves no overlap. What is left over at the end is not used.
    around, before, after
        Labels of annotations: a window from ``before`` s before each onset to ``after`` s behind it (None: its own
        duration).
    artefact
        Absolute value, in ``unit``, above which a sample counts as artefact; None does not look (NaN in the column).
    segment
        Picklable; gives each recording's windows in place of ``window``, ``step`` and ``around``.

    Windows that hold a break of the recording (``header.facts["breaks"]``, s) are left out, except whole recordings.
    Recordings that give no window are listed in ``samples.failures`` (``too_short``) and do not count as failed.
    """
    if window is not None and around is not None:
        raise InputError("give window= (windows of one length) or around= (windows at annotations), not both")
    if step is not None and window is None:
        raise InputError("step= needs window= (the length of the windows, in seconds)")
    for name, value in (("window", window), ("step", step), ("after", after), ("rate", rate)):
        if value is not None and not (isinstance(value, Real) and 0 < value < np.inf):
            raise InputError(f"{name}={value!r} must be a number above 0")
    if not (isinstance(before, Real) and np.isfinite(before)):
        raise InputError(f"before={before!r} must be a number of seconds")
    if around is None and segment is None and (before or after is not None):
        raise InputError("before= and after= are for windows at annotations; name these with around=")
    if artefact is not None and unit is None:
        raise InputError(f"artefact={artefact} is an amplitude; say in which unit, such as unit='uV'")
    obs, roles, root = record_table(source, roles=roles, id=id, root=root, suffixes=suffixes)
    _refuse_filled(obs, (*FILLED, *QUALITY) if quality else FILLED)  # before the files are looked at, which takes long
    recordings = Samples(obs, _Unread(format), roles=roles, root=root)
    with_headers, lost = scan(
        recordings, _Look(format), n_jobs=n_jobs, max_failures=max_failures, failures=failures,
        stage=f"read/{format}", unit="recording",
    )  # fmt: skip
    reader = _reader(format, with_headers, channels, rate, unit, units, reference)
    if reader.rate is None:
        native = {reader.plan(h)[2] for h in with_headers.values() if _fits(reader, h)}
        reader.rate = native.pop() if len(native) == 1 else None
    labels = [around] if isinstance(around, str) else around
    cut = _Cut(reader, window, step, labels, before, after, quality, artefact, describe, segment)
    usable = recordings.select(list(with_headers))
    cuts, more = scan(
        usable, cut, n_jobs=n_jobs, max_failures=max_failures, failures=failures,
        stage=f"windows/{format}", unit="recording",
    )  # fmt: skip
    rows = [table.assign(recording_id=name) for name, (table, _) in cuts.items() if len(table)]
    none = [[name, f"windows/{format}", "too_short", why] for name, (table, why) in cuts.items() if not len(table)]
    if not rows:
        raise InputError(f"there is no window: {none[0][3]}" if none else "no recording could be cut into windows")
    if none:
        warnings.warn(
            f"{len(none)} of {len(cuts)} recordings give no window (samples.failures), e.g. {none[0][0]}: {none[0][3]}",
            stacklevel=3,
        )
    windows = pd.concat(rows, ignore_index=True)
    whole = usable.obs.loc[windows["recording_id"]].reset_index(drop=True)
    _refuse_filled(whole, windows.columns.drop("recording_id"))
    table = pd.concat([whole, windows.drop(columns="recording_id")], axis=1)
    one_each = window is None and labels is None and segment is None
    starts = [f"{s:.6f}".rstrip("0").rstrip(".") for s in windows["start"]]
    ids = pd.Series([r if one_each else f"{r}@{s}" for r, s in zip(windows["recording_id"], starts)])
    again = ids.groupby(ids).cumcount()  # marks with one onset
    table.index = ids.where(again == 0, ids + "#" + (again + 1).astype(str)).to_numpy()
    if "recording" not in table:
        table["recording"] = windows["recording_id"].to_numpy()
    used = usable.roles | {"recording": usable.roles.get("recording") or "recording"}
    return Samples(table, reader, roles=used, root=root, meta={"failures": lost + more + none})


def _refuse_filled(table: pd.DataFrame, filled: Iterable[str]) -> None:
    clash = [c for c in filled if c in table]
    if clash:
        raise InputError(f"the table has a column {clash[0]!r}, which this reader fills; rename it")


class _Unread:
    """Stand-in reader while recordings are only looked at."""

    item = "signal"

    def __init__(self, format: str) -> None:
        self.format = format

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        raise TypeError("a recording has no window yet")

    def spec(self) -> dict[str, Any]:
        return {"kind": "signal", "format": self.format}


class _Look:
    """Header of one recording."""

    def __init__(self, format: str) -> None:
        self.format = format

    def __call__(self, row: Mapping[str, Any]) -> Header:
        recording = open_recording(self.format, row["path"])
        recording.close()
        if not recording.header.channels:
            raise ReadError("no_channel", "the file holds annotations and no signal; bs.read.record shows them")
        return recording.header


def _fits(reader: SignalReader, header: Header) -> bool:
    try:
        reader.plan(header)
    except ReadError:
        return False
    return True


def _reader(
    format: str, headers: Mapping[str, Header], channels: Sequence[str] | None, rate: float | None,
    unit: str | Sequence[str] | None, units: str | Mapping[str, str] | None, reference: str | None,
) -> SignalReader:  # fmt: skip
    """The reader, with channels and unit taken from the recordings where the user names none."""
    found = list(headers.values())
    if not found:
        raise InputError("no recording could be read; see failures.csv (failures=) for the reasons")
    if channels is None:
        signals = [{c.name for c in h.channels if not is_trigger(c.name)} for h in found]
        common = set.intersection(*signals)
        channels = [c.name for c in found[0].channels if c.name in common]
        if not channels:
            raise InputError(
                "the recordings share no channel name; pass channels= (case, 'EEG ' and '-REF' do not matter)"
            )
        left = sorted(set.union(*signals) - common)
        if left:
            warnings.warn(
                f"{len(channels)} channels are in every recording and are used; {len(left)} are not (such as "
                f"{left[0]!r}); pass channels= to choose",
                stacklevel=4,
            )
    if isinstance(channels, str) or not channels:
        raise InputError(f"channels={channels!r} must be a list of names")
    wanted = canonical_unit(unit) if unit is None or isinstance(unit, str) else [canonical_unit(u) for u in unit]
    if unit is not None and (wanted is None or (not isinstance(wanted, str) and None in wanted)):
        raise InputError(f"unit={unit!r} is no known unit, such as 'uV' or 'mV'")
    options = {"format": format, "channels": channels, "rate": rate, "units": units, "reference": reference}
    return SignalReader(unit=wanted or _first_unit(SignalReader(unit="au", **options), found), **options)


def _first_unit(reader: SignalReader, headers: Sequence[Header]) -> str:
    """Unit of the first chosen channel in the first recording that has it."""
    from biosae.read.channels import find_channels

    error: Exception | None = None
    for header in headers:
        try:
            place = find_channels(reader.channels[:1], [c.name for c in header.channels])[0][0]
            return reader._unit(header.channels[place])
        except (InputError, ReadError) as found:
            error = error or found
    raise InputError(str(error))


class _Cut:
    """Windows of one recording, as a table."""

    def __init__(
        self, reader: SignalReader, window: float | None, step: float | None, labels: Sequence[str] | None,
        before: float, after: float | None, quality: bool, artefact: float | None, describe: Describe | None,
        segment: Segment | None,
    ) -> None:  # fmt: skip
        self.reader, self.window, self.step, self.labels = reader, window, step, labels
        self.before, self.after = before, after
        self.quality, self.artefact, self.describe, self.segment = quality, artefact, describe, segment

    def __call__(self, row: Mapping[str, Any]) -> tuple[pd.DataFrame, str | None]:
        recording = open_recording(self.reader.format, row["path"])
        try:
            places, _, rate = self.reader.plan(recording.header)
            used = [recording.header.channels[i] for place in places for i in place if i is not None]
            seconds = max(c.n / c.rate for c in used)
            if self.segment is not None:
                found, why = self.segment(recording)
                rows = [self._row(recording, start, length, None) | more for start, length, more in found]
            else:
                why = f"it has {seconds:g} s" if self.labels is None else self._no_mark(recording.header.annotations)
                if self.window is not None and min(self.window, self.step or self.window) * rate < 0.5:
                    raise ReadError("too_short", f"a window or step of less than one sample at {rate:g} Hz")
                spans = self._spans(recording.header, seconds)
                breaks = () if self.window is None and self.labels is None else recording.header.facts.get("breaks", ())
                whole = [span for span in spans if not torn(breaks, span[0], span[1], rate)]
                why = "its parts (boundaries, epochs) are shorter than the windows" if spans and not whole else why
                rows = [self._row(recording, *span) for span in whole]
        finally:
            recording.close()
        table = pd.DataFrame(rows)
        if len(table):
            table.insert(2, "channel_rates", ",".join(f"{r:g}" for r in sorted({c.rate for c in used})))
        return table, why

    def _spans(self, header: Header, seconds: float) -> list[tuple[float, float, str | None]]:
        if self.labels is not None:
            marks = header.annotations[header.annotations["label"].isin(self.labels)]
            spans = [
                (m.onset - self.before, self.before + (m.duration if self.after is None else self.after), m.label)
                for m in marks.itertuples()
            ]
            return [s for s in spans if s[0] >= -_EDGE and s[1] > 0 and s[0] + s[1] <= seconds + _EDGE]
        if self.window is None:
            return [(0.0, seconds, None)]
        step = self.step or self.window
        n = int(np.floor((seconds - self.window + _EDGE) / step)) + 1
        return [(round(i * step, 6), self.window, None) for i in range(max(n, 0))]

    def _no_mark(self, annotations: pd.DataFrame) -> str:
        """Why no window could be cut around annotations."""
        there = annotations["label"].value_counts()
        if not there.index.isin(self.labels).any():
            return f"no annotation {', '.join(map(repr, self.labels))}; " + (
                "there are " + ", ".join(f"{label!r} x {n}" for label, n in there.head(10).items())
                if len(there)
                else "there is none at all"
            )
        return "its annotations have no duration (pass after=), or windows around them leave the recording"

    def _row(self, recording: Recording, start: float, duration: float, label: str | None) -> dict[str, Any]:
        header = recording.header
        row: dict[str, Any] = {"start": max(start, 0.0), "duration": duration}
        if label is None:
            row["annotation"], row["annotation_share"] = covering(header.annotations, start, duration)
        else:
            row["annotation"], row["annotation_share"] = label, 1.0
        if self.describe is not None:
            row |= self.describe(header, start, duration)
        if self.quality:
            row |= quality(self.reader.window(recording, row["start"], duration), self.reader, self.artefact)
        return row


def torn(breaks: Sequence[float], start: float, duration: float, rate: float) -> bool:
    """Whether a recording was interrupted within a window: a break (s, in order) lies over half a sample inside."""
    edge = 0.5 / rate + _EDGE
    first = bisect_right(breaks, start + edge)
    return first < len(breaks) and breaks[first] < start + duration - edge


def covering(annotations: pd.DataFrame, start: float, duration: float) -> tuple[str | None, float]:
    """Label of the annotations that cover at least half of a window (of the longest, where several do), and the share
    that they cover; ``(None, 0.0)`` where none does."""
    if not len(annotations) or not duration > 0:
        return None, 0.0
    onset, length = annotations["onset"].to_numpy(float), annotations["duration"].to_numpy(float)
    overlap = np.minimum(onset + length, start + duration) - np.maximum(onset, start)
    some = np.flatnonzero(overlap > 0)
    if not len(some):
        return None, 0.0
    covered: dict[str, float] = {}
    for label, seconds in zip(annotations["label"].to_numpy()[some], overlap[some]):
        covered[str(label)] = covered.get(str(label), 0.0) + float(seconds)
    most = max(sorted(covered), key=covered.__getitem__)
    share = min(covered[most] / duration, 1.0)
    return (most, share) if share >= HALF else (None, 0.0)


def quality(x: np.ndarray, reader: SignalReader, artefact: float | None) -> dict[str, Any]:
    """Quality of a window ``(C, T)``: share missing, flat and bad channels, share beyond ``artefact``.

    A channel is flat where all its values lie within ``FLAT`` of the base unit (1 uV of a voltage), and bad where it is
    flat, or more than half of it is missing or artefact. The share beyond ``artefact`` is NaN where that is None.
    """
    from biosae.read.channels import UNITS

    voltage = np.array([UNITS[u][0] == "voltage" for u in reader.channel_units])
    scale = np.array([UNITS[u][1] for u in reader.channel_units])
    known = np.isfinite(x)
    high = np.where(known, x, -np.inf).max(axis=1, initial=-np.inf)
    low = np.where(known, x, np.inf).min(axis=1, initial=np.inf)
    flat = known.any(axis=1) & np.where(voltage, (high - low) * scale < FLAT, high == low)
    wrong = known & (np.abs(np.where(known, x, 0.0)) > (np.inf if artefact is None else artefact))
    bad = flat | ((~known | wrong).mean(axis=1) > 0.5)
    names = np.array(reader.channels, dtype=object)
    return {
        "missing_share": float(1 - known.mean()),
        "flat_channels": ", ".join(names[flat]),
        "bad_channels": ", ".join(names[bad]),
        "artefact_share": np.nan if artefact is None else float(wrong.sum() / max(known.sum(), 1)),
    }
