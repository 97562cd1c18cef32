"""Reader of WFDB records (ECG and other signals of PhysioNet): windows, beats, rhythms."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.samples import Samples
from biosae.errors import InputError, nearest
from biosae.read.signals import Channel, Header, Recording
from biosae.read.table import load_table, single_file
from biosae.read.wfdb_marks import AAMI, BEATS, COLUMNS, read_marks
from biosae.read.wfdb_record import open_local, read_header
from biosae.read.windows import covering, signal_samples

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
"""The standard twelve leads, in their usual order."""
FACTS = ("age", "sex", "dx")
"""Columns that ``columns=`` can take from the comments of a header."""
_BEFORE, _AFTER = 0.3, 0.5  # s around a beat
_ANNOTATOR = re.compile(r"[A-Za-z0-9_]+")


class WfdbRecording:
    """An open record; see :class:`biosae.read.signals.Recording`. It keeps no file open."""

    def __init__(self, path: str | os.PathLike, annotator: str | None = None) -> None:
        found, self._signals = open_local(path)
        channels = tuple(
            Channel(name, found.rate * per_frame, unit, self._signals.n * per_frame)
            for name, per_frame, unit in self._signals.channels
        )
        seconds = self._signals.n / found.rate
        file = found.path.with_suffix("." + (annotator or "atr"))
        annotated = annotator is not None or file.is_file()
        marks = pd.DataFrame(columns=list(COLUMNS))
        if annotated:
            marks = read_marks(file, rate=found.rate, seconds=seconds)
        facts = {"annotated": annotated, "segments": max(len(found.segments), 1), **patient_facts(found.comments)}
        self.header = Header(channels, seconds, marks, facts)

    def read(self, channels: Sequence[int], first: int, count: int) -> np.ndarray:
        """Physical values, ``float64 (len(channels), count)``, NaN where a sample is missing."""
        return self._signals.read(list(channels), first, count)

    def close(self) -> None:
        """Nothing is open."""


def open_wfdb(path: str | os.PathLike, annotator: str | None = None) -> WfdbRecording:
    """Open a local WFDB record: ``.hea`` with ``.dat``, ``.mat`` (MATLAB version 4) or FLAC signal files.

    Parameters
    ----------
    path
        The ``.hea`` file, or the same path without that suffix.
    annotator
        Ending of the annotation file; None reads ``.atr`` where there is one.

    Returns
    -------
    :class:`~biosae.read.signals.Recording`. Each channel has its own rate (samples a frame times frames a second) and
    unit: mV where the header states a gain and no unit, as the format says, and None (unknown) where it states no gain.
    The facts ``age`` (years), ``sex`` and ``dx`` are those of the header's comments.

    Raises
    ------
    ReadError
        If a file is missing, empty, truncated, damaged, or of an unsupported format.
    """
    return WfdbRecording(path, annotator)


def patient_facts(comments: Sequence[str]) -> dict[str, Any]:
    """Age (years), sex and diagnoses from the comments of a header, where they are there.

    Known forms: ``Age: 74``, ``<age>: 25 <sex>: M``, ``Dx: 164889003``, ``Reason for admission: ...``, and the
    ``69 M ...`` of the MIT-BIH records. Ages above 90 are given as 90. Nothing else of the comments is kept.

    >>> patient_facts(["<age>: 25  <sex>: M  <diagnoses>: (none)"])
    {'age': 25.0, 'sex': 'male'}
    """
    found: dict[str, Any] = {}
    for comment in comments:
        keyed = re.findall(r"<?\b(age|sex|dx|diagnos[ei]s|reason for admission)>?\s*:\s*([^<]*)", comment, re.I)
        short = re.match(r"(\d{1,3})\s+([MF])\b", comment)
        for key, value in keyed or ([("age", short[1]), ("sex", short[2])] if short else []):
            key, value = key.lower(), value.strip()
            if key == "age":
                number = re.match(r"\d{1,3}(\.\d+)?", value)
                value = min(float(number[0]), 90.0) if number else None
            elif key == "sex":
                value = {"m": "male", "f": "female"}.get(value[:1].lower())
            else:
                key, value = "dx", None if value.lower() in ("", "(none)", "unknown", "n/a") else value
            if value is not None:
                found.setdefault(key, value)
    return found


def wfdb(
    source: str | os.PathLike | pd.DataFrame,
    *,
    patient: str | None = ...,
    recording: str | None = None,
    site: str | None = None,
    scanner: str | None = None,
    label: str | None = None,
    split: str | None = None,
    path: str = "path",
    id: str | None = None,
    root: str | os.PathLike | None = None,
    channels: Sequence[str] | None = None,
    rate: float | None = None,
    unit: str | Sequence[str] | None = "mV",
    units: str | Mapping[str, str] | None = None,
    window: float | None = None,
    step: float | None = None,
    around: str | Sequence[str] | None = None,
    beats: bool | str | Sequence[str] | None = None,
    before: float | None = None,
    after: float | None = None,
    annotator: str = "atr",
    columns: Sequence[str] = (),
    quality: bool = True,
    artefact: float | None = None,
    n_jobs: int | None = None,
    max_failures: float = 0.05,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Windows or beats of WFDB records, ``float32 (leads, time)``.

    Parameters
    ----------
    source
        Table with the paths of ``.hea`` files (or record names without the suffix), a folder (headers that are segments
        of another record are left out), or one ``.hea`` file.
    patient, recording, site, scanner, label, split, path
        Columns for the roles. ``patient`` must be given; None says that it is unknown.
    id, root
        Column of ids (``sample_id``, else the path); folder from which relative paths start.
    channels
        Leads by name, in order, such as ``bs.read.LEADS``; case does not matter, MLII is II, and ``"I-II"`` is a
        difference. None takes those that all records share.
    rate
        Samples a second (Hz) to resample to, with anti-aliasing; None keeps the records' own.
    unit
        Unit of the values: one for all leads or one for each; None takes that of the first lead.
    units
        Unit of leads whose header states none (an uncalibrated signal, gain 0): one, or lead to unit.
    window, step
        Length of windows and distance of their starts (s); without them and ``around``, ``beats`` a record is a sample.
    around
        Labels of annotations to cut around, such as ``["AFIB"]``: from ``before`` s (0) before the onset to ``after`` s
        behind it (the annotation's own end).
    beats
        True for one window at each beat, or the symbols of the wanted beats; ``before`` is .3 s and ``after`` .5 s
        unless given. Beats too near to an end of the record are left out.
    annotator
        Ending of the annotation files. Records may lack ``.atr``; another one must be there.
    columns
        Facts of the headers' comments to keep, among ``age`` (years), ``sex``, ``dx``. None is kept unless named.
    quality, artefact
        Columns ``missing_share, flat_channels, bad_channels, artefact_share``; absolute value (in ``unit``) above which
        a sample is artefact.
    n_jobs, max_failures, failures
        Processes; share of records that may fail; ``failures.csv`` to write.

    Returns
    -------
    Samples with ``start`` and ``duration`` (s), ``channel_rates``, ``annotation``, ``annotation_share``; for annotated
    records ``rhythm`` (which covers half of the window or more), ``rhythm_share``, ``n_beats``, ``rr_mean`` (s, between
    neighbouring beats within the window); for beats ``symbol``, ``aami`` (N S V F Q) and ``rr_previous`` (s since the
    beat before). Gaps and invalid samples are NaN.

    Raises
    ------
    InputError
        If the patient is not spoken of, options contradict each other, or no window is left.
    TooManyFailuresError
        If more than ``max_failures`` of the records cannot be read.

    Examples
    --------
    >>> import biosae as bs
    >>> beats = bs.read.wfdb("records.csv", patient="patient_id", channels=["II"], beats=True)  # doctest: +SKIP
    >>> beats.obs["aami"].value_counts()  # doctest: +SKIP
    """
    if _ANNOTATOR.fullmatch(annotator) is None:
        raise InputError(f"annotator={annotator!r} must be the ending of the annotation files, such as 'atr' or 'qrs'")
    unknown = [c for c in columns if c not in FACTS] if not isinstance(columns, str) else [columns]
    if unknown:
        raise InputError(f"columns={columns!r} must be a list; {nearest(str(unknown[0]), FACTS)}")
    segment = None
    if beats is not None and beats is not False:
        if window is not None or around is not None:
            raise InputError("give beats= (a window at each beat), window= or around=, one of them")
        symbols = BEATS if beats is True else tuple(beats)
        wrong = [s for s in symbols if s not in BEATS]
        if wrong or not symbols:
            raise InputError(f"beats={beats!r}: {wrong[:1]} marks no beat; {nearest(str(wrong[:1]), BEATS)}")
        segment = _Beats(symbols, _BEFORE if before is None else before, _AFTER if after is None else after)
    if isinstance(source, str | os.PathLike):
        if Path(source).suffix == ".hea":
            source, root = single_file(source, path=path, root=root)
        elif Path(source).is_dir():
            root = source if root is None else root
            source = _records(Path(source)).rename(columns={"path": path})
    roles = {
        "patient": patient, "recording": recording, "site": site, "scanner": scanner, "label": label, "split": split,
        "path": path,
    }  # fmt: skip
    return signal_samples(
        source, "wfdb" if annotator == "atr" else f"wfdb:{annotator}", suffixes=(".hea",), roles=roles, id=id,
        root=root, channels=channels, rate=rate, unit=unit, units=units, reference=None, window=window, step=step,
        around=around, before=before or 0.0, after=after, quality=quality, artefact=artefact,
        describe=_Describe(tuple(columns)), segment=segment, n_jobs=n_jobs, max_failures=max_failures,
        failures=failures,
    )  # fmt: skip


def _records(folder: Path) -> pd.DataFrame:
    """Records of a folder; headers that another header names as its segments are left out."""
    from biosae.data.items import ReadError

    table, _ = load_table(folder, text=[], suffixes=(".hea",))
    inner = set()
    for name in table["path"]:
        try:
            header = read_header(folder / name)
        except ReadError:  # it will be listed when it is looked at
            continue
        inner |= {(Path(name).parent / f"{segment}.hea").as_posix() for segment, _ in header.segments}
    return table[~table["path"].isin(inner)].reset_index(drop=True)


class _Describe:
    """Rhythm and beats of a window."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self._last: tuple[Header, pd.DataFrame, np.ndarray] | None = None

    def __call__(self, header: Header, start: float, duration: float) -> dict[str, Any]:
        row: dict[str, Any] = {c: header.facts.get(c) for c in self.columns}
        if not header.facts["annotated"]:
            return row
        if self._last is None or self._last[0] is not header:
            marks = header.annotations
            beats = marks.loc[marks["symbol"].isin(BEATS), "onset"].to_numpy(float)
            self._last = header, marks[(marks["symbol"] == "+") & (marks["duration"] > 0)], beats
        _, rhythms, beats = self._last
        row["rhythm"], row["rhythm_share"] = covering(rhythms, start, duration)
        within = beats[np.searchsorted(beats, start) : np.searchsorted(beats, start + duration)]
        rr = float(np.diff(within).mean()) if len(within) > 1 else np.nan
        return row | {"n_beats": len(within), "rr_mean": rr}


class _Beats:
    """A window at each beat of some kinds."""

    def __init__(self, symbols: tuple[str, ...], before: float, after: float) -> None:
        if before < 0 or not after > -before:
            raise InputError(f"before={before} must not be negative and after={after} must lie behind it")
        self.symbols, self.before, self.after = symbols, before, after

    def __call__(self, recording: Recording) -> tuple[list[tuple[float, float, dict[str, Any]]], str | None]:
        marks = recording.header.annotations
        beats = marks[marks["symbol"].isin(BEATS)].drop_duplicates("onset")
        onset, symbol = beats["onset"].to_numpy(float), beats["symbol"].to_numpy()
        previous = np.diff(onset, prepend=np.nan)
        windows = []
        for at, kind, rr in zip(onset, symbol, previous):
            start = round(at - self.before, 9)
            if kind in self.symbols and start >= 0 and at + self.after <= recording.header.seconds:
                windows.append(
                    (start, self.before + self.after, {"symbol": kind, "aami": AAMI[kind], "rr_previous": float(rr)})
                )
        return windows, "it has no annotated beat of the wanted kinds"
