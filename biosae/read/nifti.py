"""NIfTI images as slices, as means of an atlas' regions, or as the connectivity between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.failures import MAX_FAILURES
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, nearest
from biosae.files import hash_file
from biosae.read.nifti_items import NiftiRegions, NiftiSlices
from biosae.read.scan import scan
from biosae.read.table import load_table, record_table, single_file
from biosae.read.volumes import PLANES, SUFFIXES, Volume, load_atlas, open_volume

_REGIONS = ("empty_regions", "constant_regions")
_COLUMNS = {  # kind -> columns that are filled, besides those of every image
    "slices": ("plane", "slice", "volume", "position_mm", "row_mm", "column_mm", "slice_mm", "limit_low", "limit_high",
               "foreground"),
    "scalars": ("volume", *_REGIONS), "regions": ("start", "duration", "tr", *_REGIONS),
    "connectivity": ("start", "duration", "tr", *_REGIONS),
}  # fmt: skip
KINDS = ("slices", "scalars", "regions", "connectivity")
_MODES = {  # option -> the kinds that it belongs to
    "plane": ("slices",), "limits": ("slices",), "percentiles": ("slices",), "volume": ("slices", "scalars"),
    "atlas": KINDS[1:], "regions": KINDS[1:], "tr": KINDS[2:], "window": KINDS[2:], "fisher": ("connectivity",),
    "step": ("slices", "regions", "connectivity"),
}  # fmt: skip


def nifti(
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
    as_: str = "slices",
    plane: str | None = None,
    volume: int | None = None,
    step: float | None = None,
    percentiles: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
    atlas: str | os.PathLike | None = None,
    regions: Mapping[int, str] | str | os.PathLike | pd.DataFrame | None = None,
    tr: float | None = None,
    window: float | None = None,
    fisher: bool | None = None,
    space_unit: str | None = None,
    n_jobs: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Samples of NIfTI-1 and NIfTI-2 images (``.nii``, ``.nii.gz``, ``.hdr`` with ``.img``).

    Volumes are turned to the axes closest to RAS+ by the header's affine, without resampling, and stored values become
    real ones by its slope and intercept. Every file is read once here, to its end.

    Parameters
    ----------
    source
        Table with one row an image, a folder (searched with its subfolders), or one image.
    patient
        Column of the patient or animal. Must be given; ``None`` says that it is unknown.
    recording, site, scanner, label, split
        Columns of these roles, if there are such. ``recording`` defaults to the image's id.
    path, id, root
        Column of the paths; column of unique ids (default ``sample_id``, else the path); folder that relative paths
        start from.
    as_
        ``"slices"``: an RGB image (grey, 8 bits) for each slice of a volume. ``"scalars"``: for each 3-D map (FA, ALFF,
        thickness) the means of the atlas' regions, a vector ``(R,)``. ``"regions"``: for each 4-D image the regions'
        mean series, a signal ``(R, T)`` at ``1 / tr`` Hz. ``"connectivity"``: Pearson correlations between those
        series, a vector ``(R (R - 1) / 2,)``.
    plane
        For slices: ``"axial"`` (default), ``"coronal"`` or ``"sagittal"``.
    volume
        For slices and scalars: which volume of a 4-D image, from 0.
    step
        For slices: every step-th slice (default 1). With ``window``: seconds between the starts of windows (default
        no overlap).
    percentiles, limits
        For slices: values shown as black and white, as percentiles of the volume's finite values (default 0.5 and
        99.5) or as values of the image (CT in HU, say). NaN is black.
    atlas
        3-D NIfTI of whole-numbered labels in the same space as the images; brought to each image's grid by nearest
        neighbour through both affines.
    regions
        Labels and names: a mapping, or a table (DataFrame, CSV, TSV, Parquet) with the columns ``value`` and ``name``.
        None takes all labels but 0 and names them by number.
    tr
        Seconds between volumes; None takes the header's.
    window
        Length of windows of the series in seconds; None takes the whole series.
    fisher
        For connectivity: give ``artanh(r)``.
    space_unit
        Unit of length where a header states none: ``"mm"``, ``"meter"`` or ``"micron"``.
    n_jobs, max_failures, failures
        Processes that look at the images; largest share that may fail, 0 to 1; ``failures.csv`` to write.

    Returns
    -------
    Samples
        Slices have the columns ``plane, slice, volume, position_mm`` (of the slice's centre, along its axis),
        ``row_mm, column_mm, slice_mm`` (spacings), ``limit_low, limit_high, foreground`` (share of pixels above
        ``limit_low``). The others have ``volume`` or ``start, duration, tr`` (s), and ``empty_regions`` and
        ``constant_regions`` (names, ``;`` between them). All have ``orientation`` (axes as stored), ``oblique``
        (degrees) and ``placed`` (``sform``, ``qform`` or ``none``). ``samples.meta["regions"]`` holds the names of the
        values of a vector.

    Raises
    ------
    InputError
        For absent columns, options that do not belong to ``as_``, or an atlas or a table of regions that is not one.
    TooManyFailuresError
        If more images cannot be read than ``max_failures`` allows.

    Examples
    --------
    >>> samples = bs.read.nifti("scans", patient=None, plane="coronal", step=2)  # doctest: +SKIP
    >>> samples = bs.read.nifti("fa.csv", patient="subject", as_="scalars", atlas="jhu.nii.gz",
    ...                         regions="jhu.csv")  # doctest: +SKIP
    """
    if as_ not in KINDS:
        raise InputError(f"as_={as_!r}; {nearest(as_, KINDS)}")
    given = {
        "plane": plane, "limits": limits, "percentiles": percentiles, "volume": volume, "atlas": atlas,
        "regions": regions, "tr": tr, "window": window, "fisher": fisher, "step": step,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and as_ not in _MODES[name]:
            raise InputError(f"{name}= belongs to as_={' or '.join(map(repr, _MODES[name]))}, not to {as_!r}")
    _check(given, as_)
    roles = {
        "patient": patient, "recording": recording, "site": site, "scanner": scanner, "label": label, "split": split,
        "path": path,
    }  # fmt: skip
    if isinstance(source, (str, os.PathLike)) and str(source).lower().endswith(SUFFIXES):
        source, root = single_file(source, path=path, root=root)
    obs, roles, root = record_table(source, roles=roles, id=id, root=root, suffixes=SUFFIXES)
    clash = [c for c in (*_COLUMNS[as_], "orientation", "oblique", "placed") if c in obs]
    if clash:
        raise InputError(f"the table has a column {clash[0]!r}, which this reader fills; rename it")
    reader: NiftiSlices | NiftiRegions
    if as_ == "slices":
        reader = NiftiSlices()
        look = _Slices(plane or "axial", volume, int(step or 1), percentiles or (0.5, 99.5), limits, space_unit)
    else:
        if atlas is None:
            raise InputError(f"as_={as_!r} needs atlas= (a 3-D NIfTI of labels) and takes regions= (their names)")
        reader = _regions_reader(atlas, regions, as_, bool(fisher), space_unit)
        look = _Series(reader, volume, tr, window, step)
    images = Samples(obs, reader, roles=roles, root=root)
    tables, lost = scan(
        images, look, n_jobs=n_jobs, max_failures=max_failures, failures=failures, stage="read/nifti", unit="image"
    )
    if not tables:
        raise InputError("no image could be read; see failures.csv (failures=) for the reasons")
    if isinstance(reader, NiftiRegions) and reader.item == "signal":
        seconds = {float(s) for table in tables.values() for s in table["tr"]}
        reader.rate = 1 / seconds.pop() if len(seconds) == 1 else None
    return _joined(images, tables, reader, lost, window is not None or as_ == "slices")


def _check(given: Mapping[str, Any], as_: str) -> None:
    if given["plane"] is not None and given["plane"] not in PLANES:
        raise InputError(f"plane={given['plane']!r}; {nearest(given['plane'], PLANES)}")
    for name in ("step", "tr", "window"):
        if given[name] is not None and not (_is_number(given[name]) and 0 < given[name] < np.inf):
            raise InputError(f"{name}={given[name]!r} must be a number above 0")
    if as_ == "slices" and given["step"] is not None and given["step"] != int(given["step"]):
        raise InputError(f"step={given['step']} must be a whole number of slices")
    if as_ != "slices" and given["step"] is not None and given["window"] is None:
        raise InputError("step= needs window= (the length of the windows, in seconds)")
    v = given["volume"]
    if v is not None and not (_is_number(v) and v >= 0 and v % 1 == 0):
        raise InputError(f"volume={v!r} must be a whole number from 0")
    if given["limits"] is not None and given["percentiles"] is not None:
        raise InputError("give limits= (values) or percentiles=, not both")
    for name, least, most in (("limits", -np.inf, np.inf), ("percentiles", 0, 100)):
        pair = given[name]
        if pair is None:
            continue
        two = isinstance(pair, list | tuple | np.ndarray) and len(pair) == 2 and all(map(_is_number, pair))
        if not (two and least <= pair[0] < pair[1] <= most and np.isfinite(pair).all()):
            raise InputError(f"{name}={pair!r} must be two rising numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _joined(
    images: Samples, tables: Mapping[str, pd.DataFrame], reader: Any, lost: list[list[str]], several: bool
) -> Samples:
    """One row an item, with the columns of its image."""
    items = pd.concat([table.assign(recording_id=name) for name, table in tables.items()], ignore_index=True)
    whole = images.obs.loc[items["recording_id"]].reset_index(drop=True)
    table = pd.concat([whole, items.drop(columns="recording_id")], axis=1)
    if several:
        column = "slice" if "slice" in items else "start"
        table.index = [f"{name}@{at:.10g}" for name, at in zip(items["recording_id"], items[column])]
    else:
        table.index = items["recording_id"].to_numpy()
    if "recording" not in table:
        table["recording"] = items["recording_id"].to_numpy()
    roles = images.roles | {"recording": images.roles.get("recording") or "recording"}
    meta: dict[str, Any] = {"failures": lost}
    if reader.item == "features":
        meta["regions"] = reader.value_names()
    return Samples(table, reader, roles=roles, root=images.root, meta=meta)


def _facts(volume: Volume) -> dict[str, Any]:
    return {"orientation": volume.orientation, "oblique": round(volume.oblique, 3), "placed": volume.placed}


def _chosen(volume: Volume, wanted: int | None) -> int:
    if wanted is None and volume.n_volumes > 1:
        raise ReadError(
            "unsupported", f"{volume.n_volumes} volumes; pass volume=0 for the first, or as_='regions' for their series"
        )
    if wanted is not None and wanted >= volume.n_volumes:
        raise ReadError("missing", f"no volume {wanted}; the image has {volume.n_volumes}")
    return wanted or 0


class _Slices:
    """Slices of one image, as a table."""

    def __init__(
        self, plane: str, volume: int | None, step: int, percentiles: tuple[float, float],
        limits: tuple[float, float] | None, space_unit: str | None,
    ) -> None:  # fmt: skip
        self.plane, self.volume, self.step = plane, volume, step
        self.percentiles, self.limits, self.space_unit = percentiles, limits, space_unit

    def __call__(self, row: Mapping[str, Any]) -> pd.DataFrame:
        with closing(open_volume(row["path"], space_unit=self.space_unit)) as volume:
            t = _chosen(volume, self.volume)
            values = volume.scaled(volume.raw(t))
            volume.check_end()
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ReadError("gaps", "the volume holds no finite value")
        low, high = self.limits or (float(v) for v in np.percentile(finite, self.percentiles))
        if not high > low:
            low, high = float(finite.min()), float(finite.max())
        axis = PLANES[self.plane]
        index = np.arange(0, volume.shape[axis], self.step)
        centres = np.tile((np.array(volume.shape) - 1) / 2, (len(index), 1))
        centres[:, axis] = index
        position = centres @ volume.affine[axis, :3] + volume.affine[axis, 3]
        down, across = sorted({0, 1, 2} - {axis}, reverse=True)
        others = tuple(a for a in range(3) if a != axis)
        with np.errstate(invalid="ignore"):
            foreground = (values > low).mean(axis=others)[index]
        return pd.DataFrame({
            "plane": self.plane, "slice": index, "volume": t, "position_mm": position,
            "row_mm": volume.spacing[down], "column_mm": volume.spacing[across], "slice_mm": volume.spacing[axis],
            "limit_low": float(low), "limit_high": float(high), "foreground": foreground, **_facts(volume),
        })  # fmt: skip


def _regions_reader(
    atlas: str | os.PathLike, regions: Any, as_: str, fisher: bool, space_unit: str | None
) -> NiftiRegions:
    place = os.path.abspath(atlas)
    if not os.path.isfile(place):
        raise InputError(f"no atlas {place}")
    sha256 = hash_file(place)
    try:
        labels, _ = load_atlas(place, sha256, space_unit)
    except ReadError as error:
        raise InputError(f"atlas {os.fspath(atlas)}: {error}") from None
    present = np.unique(labels[labels != 0])
    names = {int(v): str(int(v)) for v in present} if regions is None else _names(regions)
    if not names:
        raise InputError("the atlas holds no label but 0" if regions is None else "the table of regions is empty")
    if not set(names) & set(present.tolist()):
        raise InputError(f"none of the labels in regions= is in the atlas, which has {present[:5].tolist()} ...")
    if len(set(names.values())) < len(names):
        raise InputError("two regions have one name; give each its own")
    values = list(names)
    return NiftiRegions(
        as_=as_, atlas=place, atlas_sha256=sha256, values=values, names=[names[v] for v in values],
        fisher=fisher, space_unit=space_unit,
    )  # fmt: skip


def _names(regions: Any) -> dict[int, str]:
    """Label to name."""
    if isinstance(regions, Mapping):
        pairs = list(regions.items())
    else:
        table = load_table(regions, text=["name"])[0]
        for column in ("value", "name"):
            if column not in table:
                raise InputError(f"the table of regions has no column {column!r}; {nearest(column, table.columns)}")
        pairs = list(zip(table["value"], table["name"]))
    try:
        found = {int(value): str(name) for value, name in pairs}
        whole = all(float(value) == int(value) and abs(int(value)) < 2**31 for value, _ in pairs)
    except (TypeError, ValueError, OverflowError):
        raise InputError("the labels of the regions must be whole numbers, in the column 'value'") from None
    if not whole or len(found) < len(pairs):
        raise InputError("the labels of the regions must be whole numbers, each once")
    return found


class _Series:
    """Items of one image that regional means are taken of, as a table."""

    def __init__(
        self, reader: NiftiRegions, volume: int | None, tr: float | None, window: float | None, step: float | None
    ) -> None:
        self.reader, self.volume, self.tr, self.length, self.step = reader, volume, tr, window, step

    def __call__(self, row: Mapping[str, Any]) -> pd.DataFrame:
        reader = self.reader
        with closing(open_volume(row["path"], space_unit=reader.space_unit)) as volume:
            grid = reader.grid(volume)
            if reader.as_ == "scalars":
                t = _chosen(volume, self.volume)
                series = grid.means(volume, t)[:, None]
                items: dict[str, Any] = {"volume": [t]}
            else:
                items = self._windows(volume)
                series = grid.series(volume)
            volume.check_end()
        empty = grid.counts == 0
        constant = ~empty & (np.ptp(series, axis=1) == 0) if reader.as_ != "scalars" else np.zeros_like(empty)
        names = np.array(reader.names, dtype=object)
        items |= {"empty_regions": ";".join(names[empty]), "constant_regions": ";".join(names[constant])}
        return pd.DataFrame(items | _facts(volume))

    def _windows(self, volume: Volume) -> dict[str, Any]:
        if volume.n_volumes < 3:
            raise ReadError("too_short", f"{volume.n_volumes} volumes; a series needs 3, use as_='scalars' for a map")
        tr = self.tr or volume.tr
        if tr is None:
            raise ReadError("no_unit", f"the header states {volume.stated_tr} between volumes; pass tr= (seconds)")
        n = volume.n_volumes if self.length is None else round(self.length / tr)
        hop = n if self.step is None else round(self.step / tr)
        if not 3 <= n <= volume.n_volumes or hop < 1:
            raise ReadError(
                "too_short", f"windows of {n} volumes every {hop}, in {volume.n_volumes} volumes of {tr:g} s"
            )
        first = np.arange(0, volume.n_volumes - n + 1, hop)
        return {"start": first * tr, "duration": n * tr, "tr": tr}
