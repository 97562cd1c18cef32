"""EEG and polysomnography: EDF, EDF+, BDF, GDF, EEGLAB, BrainVision and FIF."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from biosae.data.failures import MAX_FAILURES
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import nearest
from biosae.read.signals import SUFFIXES, Recording
from biosae.read.table import load_table
from biosae.read.windows import signal_samples

EDF_SUFFIXES = tuple(suffix for suffix, format in SUFFIXES.items() if format == "edf")


def edf(
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
    unit: str | None = None,
    units: str | Mapping[str, str] | None = None,
    reference: str | None = None,
    window: float | None = None,
    step: float | None = None,
    around: str | Sequence[str] | None = None,
    before: float = 0.0,
    after: float | None = None,
    quality: bool = True,
    artefact: float | None = None,
    n_jobs: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Windows of EEG recordings (EDF, EDF+, BDF, GDF, EEGLAB ``.set``, BrainVision ``.vhdr``, raw FIF) as samples.

    A sample is ``float32 (channels, time)`` in ``unit`` at ``rate``, NaN where nothing was recorded. Headers and
    annotations of all files are read here, and with ``quality`` every window once; only these columns are kept.

    Parameters
    ----------
    source
        CSV, TSV or Parquet file, DataFrame, or a folder, which is searched with its subfolders and gives the columns
        ``path`` and ``folder``; one row a recording (further parts of a split FIF are read with the first). Or one
        recording.
    patient
        Column of the patient: the unit that is independent of the others. Must be given; ``None`` says that it is
        unknown.
    recording, site, scanner, label, split
        Columns of these roles, if there are such. Without ``recording`` each file is one.
    path
        Column of the files' paths.
    id
        Column of unique ids of the recordings. Default: the column ``sample_id``, else the path. A window's id is the
        recording's, ``@`` and the start in seconds.
    root
        Folder that relative paths start from. Default: the table's own folder; the current one for a DataFrame.
    channels
        Names in the wanted order. Case, ``EEG`` in front, ``-REF`` behind, dots (``Fc5.``) and the older names
        T3 T4 T5 T6 do not matter; ``"Fp1-F7"`` is a channel of that name, else the difference of two. None takes the
        channels that all recordings share by exact name, without trigger channels.
    rate
        Samples a second (Hz); resampled with anti-aliasing. None keeps the files' own.
    unit
        Unit of the values, such as ``"uV"``. None takes that of the first channel.
    units
        Unit of channels whose file states none: one for all, or channel name to unit.
    reference
        None keeps the recording's; ``"average"`` takes the mean of the chosen channels from each.
    window, step
        Length of the windows and distance of their starts in seconds. ``step=None`` leaves no overlap;
        ``window=None`` with ``around=None`` makes one sample of each recording.
    around, before, after
        Labels of annotations: a window from ``before`` s before each onset to ``after`` s behind it (None: its own
        duration).
    quality
        Adds ``missing_share, flat_channels, bad_channels, artefact_share`` of each window; every window is read once.
    artefact
        Absolute value in ``unit`` above which a sample counts as artefact; 150 uV is usual for scalp EEG without a DC
        offset. None does not look.
    n_jobs
        Processes; None uses ``settings.n_jobs`` of them once it takes longer than seconds.
    max_failures
        Largest share of recordings that may fail, 0 to 1. They are listed in ``samples.failures``.
    failures
        ``failures.csv`` to write them to.

    Raises
    ------
    InputError
        For absent columns, missing patients, unknown units, or where no window is found.
    TooManyFailuresError
        If more recordings fail than ``max_failures`` allows: damaged, without a wanted channel, without a unit, or of
        several rates with no ``rate=``.

    Examples
    --------
    >>> samples = bs.read.edf("eeg.csv", patient="subject", channels=["O1", "Oz"], window=2.0)  # doctest: +SKIP
    """
    roles = {
        "patient": patient, "recording": recording, "site": site, "scanner": scanner, "label": label, "split": split,
        "path": path,
    }  # fmt: skip
    file = Path(source) if isinstance(source, str | os.PathLike) else None
    if file is not None and file.suffix.lower() in EDF_SUFFIXES and not file.is_dir():
        source, root = pd.DataFrame({path: [file.name]}), file.parent if root is None else root
    elif file is not None and file.is_dir():
        table, _ = load_table(file, text=[], suffixes=EDF_SUFFIXES)
        further = table["path"].isin(_further_parts(file, table["path"]))
        source, root = table[~further].rename(columns={"path": path}), file if root is None else root
    return signal_samples(
        source, "edf", suffixes=EDF_SUFFIXES, roles=roles, id=id, root=root, channels=channels, rate=rate, unit=unit,
        units=units, reference=reference, window=window, step=step, around=around, before=before, after=after,
        quality=quality, artefact=artefact, describe=None, n_jobs=n_jobs, max_failures=max_failures, failures=failures,
    )  # fmt: skip


def _further_parts(folder: Path, names: Iterable[str]) -> set[str]:
    """Parts of split FIF recordings (``x_raw-1.fif``, ``x_split-02_meg.fif``) that are read with their first file."""
    from biosae.read.edf_mne import open_fif

    present = set(names)
    found: set[str] = set()
    for name in sorted(present):
        plain, bids = re.fullmatch(r"(.+)-1\.fif", name), re.fullmatch(r"(.+_split-0*)2(_.+\.fif)", name)
        first = f"{plain[1]}.fif" if plain else f"{bids[1]}1{bids[2]}" if bids else None
        if first not in present:
            continue
        try:
            recording = open_fif(os.fspath(folder / first))
        except ReadError:  # it will be listed when it is looked at
            continue
        own = {(folder / first).resolve(), *(Path(f).resolve() for f in recording.files)}
        recording.close()
        found |= {other for other in present if (folder / other).resolve() in own and other != first}
    return found


def open_edf(path: str | os.PathLike) -> Recording:
    """Open an EDF, EDF+, BDF, GDF, EEGLAB, BrainVision or raw FIF file, by its ending.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable`` or ``unsupported``.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".edf", ".bdf"):
        from biosae.read.edf_records import open_edf_file

        return open_edf_file(path)
    if suffix == ".gdf":
        from biosae.read.edf_gdf import open_gdf

        return open_gdf(path)
    from biosae.read import edf_mne

    openers = {".set": edf_mne.open_set, ".vhdr": edf_mne.open_brainvision, ".fif": edf_mne.open_fif}
    if suffix not in openers:
        raise ReadError("unsupported", f"{os.path.basename(path)}: {nearest(suffix, EDF_SUFFIXES)}")
    return openers[suffix](path)
