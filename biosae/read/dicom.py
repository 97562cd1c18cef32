"""DICOM files, one row a frame: radiographs, CT, MR, ultrasound, nuclear medicine, photographs."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.data.failures import MAX_FAILURES
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, require
from biosae.read.dicom_file import DicomFile, looks_like_dicom, read_errors
from biosae.read.dicom_pixels import applied_window, groups, modality, not_padding, picture, window_setting
from biosae.read.dicom_tags import check_tags, tag_columns, tag_value
from biosae.read.handles import Handles
from biosae.read.scan import scan
from biosae.read.table import record_table

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
TEXT = {
    "modality": "Modality", "manufacturer": "Manufacturer", "model": "ManufacturerModelName",
    "body_part": "BodyPartExamined", "view_position": "ViewPosition", "laterality": "Laterality",
}  # fmt: skip
COLUMNS = (
    "frame", "n_frames", "photometric", "rows", "columns", "bits_stored", "transfer_syntax", "lossy", *TEXT, "voi",
    "window_center", "window_width", "spacing_row_mm", "spacing_col_mm", "spacing_source",
)  # fmt: skip
_STAGE = "read/dicom"


def dicom(
    source: str | os.PathLike | pd.DataFrame,
    *,
    patient: str | None = ...,
    slide: str | None = None,
    site: str | None = None,
    scanner: str | None = None,
    label: str | None = None,
    split: str | None = None,
    path: str = "path",
    id: str | None = None,
    root: str | os.PathLike | None = None,
    tags: Sequence[str] = (),
    frames: str | int = "all",
    window: str | tuple = "file",
    deidentify: bool = True,
    salt: str | None = None,
    force: bool = True,
    n_jobs: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Samples from DICOM files: one row a frame, ``uint8 (H, W, 3)``.

    The header of every file is read once, to list its frames and what cannot be read; pixels are decoded when a sample
    is asked for. They go through the modality LUT (or rescale), the VOI LUT or window, and the inversion of
    MONOCHROME1; palettes and YBR become RGB. Overlays, colour profiles and presentation states are not applied.

    Parameters
    ----------
    source
        CSV, TSV or Parquet file or DataFrame with a column of paths; a folder, which is searched with its subfolders
        for DICOM files of any name; or one DICOM file.
    patient
        Column of the patient. Must be given; ``None`` says that it is unknown. ``"tag:PatientID"`` makes pseudonyms
        of what the files say: a salted hash, equal for equal ids within one call.
    slide, site, scanner, label, split
        Columns of these roles, of the table or of those that this reader adds (``scanner="model"``). All but ``label``
        and ``split`` may be ``"tag:<keyword>"`` as well, ``slide="tag:SeriesInstanceUID"`` for example.
    path, id, root
        Column of the files' paths; column of unique ids (default: ``sample_id``, else the path); folder that relative
        paths start from. A file with several frames gives the ids ``<id>#<frame>``, counted from 0.
    tags
        Further DICOM keywords (top level of the header) to copy into columns of that name. Ages become years.
    frames
        ``"all"``, ``"first"``, ``"middle"``, or the number of one frame, from 0.
    window
        ``"file"``: the file's VOI LUT, else its first window, else as ``"full"``. ``("file", k)``: its k-th, from 0.
        ``"full"``: the whole range: of the stored bits up to 8 bits, else from the smallest to the largest value of the
        frame, padding left out. ``(center, width)`` in modality units (HU). ``("percentile", low, high)`` of the frame.
    deidentify
        Refuse ``tags`` that hold names, dates, unique identifiers, free text or places, and cap ages at 90 years.
    salt
        Secret that makes the pseudonyms of different calls agree; it is not stored. None draws one for this call.
    force
        Accept files without the preamble and its mark ``DICM``, if they state their transfer syntax.
    n_jobs, max_failures, failures
        Processes; largest share of files that may fail; ``failures.csv`` to write.

    Returns
    -------
    Samples whose ``obs`` has, besides the table's columns: ``frame, n_frames, modality, photometric, rows, columns``
    (pixels), ``bits_stored, transfer_syntax, lossy, manufacturer, model, body_part, view_position, laterality``,
    ``voi`` (what is applied: ``"window"``, ``"lut"``, ``"full"``, ``"percentile"``), ``window_center, window_width``
    (modality units), ``spacing_row_mm, spacing_col_mm, spacing_source``. ``samples.failures`` lists the files that were
    left out.

    Raises
    ------
    InputError
        For absent columns, repeated ids, unknown or identifying tags, or a folder without DICOM files.
    TooManyFailuresError
        If more files fail than ``max_failures`` allows.
    MissingExtraError
        If pydicom is not installed.

    Examples
    --------
    >>> samples = bs.read.dicom("exams.csv", patient="case", scanner="model")  # doctest: +SKIP
    >>> lung = bs.read.dicom("ct", patient="tag:PatientID", window=(-600, 1500))  # doctest: +SKIP
    """
    require("pydicom", extra="dicom")
    whole = isinstance(frames, int | np.integer) and not isinstance(frames, bool) and frames >= 0
    if not whole and frames not in ("all", "first", "middle"):
        raise InputError(f"frames={frames!r}; valid: 'all', 'first', 'middle', or the number of a frame, from 0")
    reader = DicomReader(window=window, force=force)
    tags = check_tags(tags, deidentify=deidentify)
    roles = {"patient": patient, "slide": slide, "site": site, "scanner": scanner}
    hashed = dict(tag_columns(roles.items()))
    roles |= dict.fromkeys(hashed) | {"label": label, "split": split, "path": path}
    table, root = _listed(source, root, force)
    obs, roles, root = record_table(table, roles=roles, id=id, root=root, suffixes=("",))
    clash = [c for c in (*COLUMNS, *tags, *hashed) if c in obs]
    if clash:
        raise InputError(f"the table has a column {clash[0]!r}, which this reader fills; rename it")
    files = Samples(obs[[path]], reader, roles={"patient": None, "path": path}, root=root)
    look = _Look(reader, frames, tags, hashed, salt or secrets.token_hex(16), deidentify)
    found, lost = scan(
        files, look, n_jobs=n_jobs, max_failures=max_failures, failures=failures, stage=_STAGE, unit="file"
    )
    _warn_of_decoders(lost)
    if not found:
        raise InputError(f"none of the {len(files)} files holds a picture, e.g. {lost[0][3]}")
    obs = _joined(obs, found)
    return Samples(obs, reader, roles=roles | {r: r for r in hashed}, root=root, meta={"failures": lost})


def dicom_values(path: str | os.PathLike, *, frame: int = 0, force: bool = True) -> tuple[np.ndarray, str | None]:
    """One frame in modality units, without any window.

    Parameters
    ----------
    path
        The DICOM file.
    frame
        Frame, from 0.
    force
        As in :func:`biosae.read.dicom`.

    Returns
    -------
    values
        ``float32 (H, W)``, NaN where the file says that a pixel is padding. Stored values that went through the
        modality LUT or ``value * RescaleSlope + RescaleIntercept``; dose grids are scaled by DoseGridScaling.
    unit
        ``"HU"``, ``"OD"``, ``"BQML"``, ``"GY"`` ...; None where the file names none.

    Raises
    ------
    ReadError
        If the frame cannot be read, or has colours instead of values.
    """
    file = DicomFile(path, force=force)
    try:
        with read_errors(path):
            if file.samples != 1 or file.photometric == "PALETTE COLOR":
                raise ReadError("unsupported", f"{file.photometric} has no values; read it with bs.read.dicom")
            stored, _ = file.stored(frame)
            to_units = modality(file, frame)
            values = to_units(stored).astype(np.float32)
            values[~not_padding(file, stored)] = math.nan
            return values, to_units.unit
    finally:
        file.close()


class DicomReader:
    """Reader of one frame of a DICOM file; files stay open between frames, a few in each thread.

    Parameters
    ----------
    window, force
        As in :func:`biosae.read.dicom`.
    """

    item = "image"
    columns = ("frame",)

    def __init__(self, *, window: Any = "file", force: bool = True) -> None:
        self.window, self.force = window_setting(window), bool(force)
        self._files = Handles(functools.partial(DicomFile, force=self.force))

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """Picture of ``row["path"]``, frame ``row["frame"]``: ``uint8 (H, W, 3)``."""
        file = self._files.get(row["path"])
        with read_errors(row["path"]):
            return picture(file, int(row["frame"]), self.window)

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {"kind": "dicom", "window": self.window, "force": self.force}


def _listed(source: Any, root: Any, force: bool) -> tuple[Any, Any]:
    """The source as :func:`record_table` takes it: a folder or one DICOM file becomes a table of paths."""
    import pandas as pd

    if not isinstance(source, str | os.PathLike):
        return source, root
    source = Path(source)
    if source.is_dir():
        paths = sorted(Path(parent, name).relative_to(source) for parent, _, names in os.walk(source) for name in names)
        dicoms = [p for p in paths if _is_dicom(source / p, force)]
        if not dicoms:
            raise InputError(f"no DICOM file in {source} or below it ({len(paths)} other files)")
        folders = [p.parent.name or np.nan for p in dicoms]
        return pd.DataFrame({"path": [p.as_posix() for p in dicoms], "folder": folders}), root or source
    if source.is_file() and (source.suffix.lower() in SUFFIXES or looks_like_dicom(source)):
        return pd.DataFrame({"path": [source.name]}), root or source.parent
    return source, root


def _is_dicom(path: Path, force: bool) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    return path.suffix.lower() in SUFFIXES or (looks_like_dicom(path) and force) or _has_mark(path)


def _has_mark(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


class _Look:
    """What one file gives: a row a frame."""

    def __init__(
        self,
        reader: DicomReader,
        frames: str | int,
        tags: list[str],
        hashed: dict[str, str],
        salt: str,
        deidentify: bool,
    ) -> None:
        self.reader, self.frames, self.tags = reader, frames, tags
        self.hashed, self.salt, self.deidentify = hashed, salt, deidentify

    def __call__(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        path = row["path"]
        file = DicomFile(path, force=self.reader.force)
        try:
            with read_errors(path):
                whole = self._whole(file)
                return [{"frame": i, **whole, **self._frame(file, i)} for i in self._chosen(file)]
        finally:
            file.close()

    def _chosen(self, file: DicomFile) -> Sequence[int]:
        n = file.n_frames
        if isinstance(self.frames, str):
            return {"all": range(n), "first": [0], "middle": [n // 2]}[self.frames]
        if self.frames >= n:
            raise ReadError("missing", f"no frame {self.frames}; the file has {n}, counted from 0")
        return [int(self.frames)]

    def _whole(self, file: DicomFile) -> dict[str, Any]:
        header = file.header
        row: dict[str, Any] = {
            "n_frames": file.n_frames, "photometric": file.photometric, "rows": file.rows, "columns": file.columns,
            "bits_stored": file.bits_stored, "transfer_syntax": file.syntax_name,
            "lossy": header.text("LossyImageCompression") == "01",
        }  # fmt: skip
        row |= {column: header.text(keyword) for column, keyword in TEXT.items()}
        if not isinstance(row["laterality"], str):
            row["laterality"] = header.text("ImageLaterality")
        row |= {keyword: tag_value(header, keyword, deidentify=self.deidentify) for keyword in self.tags}
        for role, keyword in self.hashed.items():
            value = header.bytes(keyword)
            if role == "patient" and not value:
                raise ReadError("missing", f"the file has no {keyword}, by which patient='tag:{keyword}' groups")
            digest = hashlib.blake2b(value, key=self.salt.encode()[:64], digest_size=6).hexdigest()
            row[role] = digest if value else math.nan
        return row

    def _frame(self, file: DicomFile, frame: int) -> dict[str, Any]:
        row: dict[str, Any] = {"voi": math.nan, "window_center": math.nan, "window_width": math.nan}
        if file.photometric.startswith("MONOCHROME"):
            modality(file, frame)  # what is wrong with it is found now
            applied = applied_window(file, frame, self.reader.window)
            row = {"voi": applied.kind, "window_center": applied.center, "window_width": applied.width}
        return row | _spacing(file, frame)


def _spacing(file: DicomFile, frame: int) -> dict[str, Any]:
    """Distance between the centres of neighbouring pixels in mm, and the element that states it."""
    candidates = [(group, "PixelSpacing") for group in groups(file, frame, "PixelMeasuresSequence")]
    candidates += [(file.header, keyword) for keyword in ("ImagerPixelSpacing", "NominalScannedPixelSpacing")]
    for group, keyword in candidates:
        values = group.numbers_or_none(keyword)
        if len(values) == 2 and min(values) > 0:
            how = file.header.text("PixelSpacingCalibrationType")
            source = f"{keyword} ({how})" if keyword == "PixelSpacing" and isinstance(how, str) else keyword
            return {"spacing_row_mm": values[0], "spacing_col_mm": values[1], "spacing_source": source}
    return {"spacing_row_mm": math.nan, "spacing_col_mm": math.nan, "spacing_source": math.nan}


def _joined(obs: pd.DataFrame, found: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """The table's rows, one for each frame, with what the files say."""
    import pandas as pd

    rows = [{"file": name, **row} for name, frames in found.items() for row in frames]
    frames = pd.DataFrame(rows)
    whole = obs.loc[frames["file"]].reset_index(drop=True)
    table = pd.concat([whole, frames.drop(columns="file")], axis=1)
    table.index = [
        name if n == 1 else f"{name}#{frame}"
        for name, n, frame in zip(frames["file"], frames["n_frames"], frames["frame"])
    ]
    return table


def _warn_of_decoders(lost: list[list[str]]) -> None:
    """One warning for each missing decoder, with the number of files that need it."""
    needs: dict[str, int] = {}
    for _, _, _, detail in lost:
        at = detail.find("no installed decoder")
        if at >= 0:
            needs[detail[at:]] = needs.get(detail[at:], 0) + 1
    for detail, n in needs.items():
        warnings.warn(f"{n} {'file was' if n == 1 else 'files were'} left out: {detail}", stacklevel=3)
