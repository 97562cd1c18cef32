"""Tiles of whole slides, cut at a wanted physical scale where there is tissue."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.failures import MAX_FAILURES
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.errors import InputError, TooManyFailuresError, nearest
from biosae.read.handles import Handles
from biosae.read.scan import scan
from biosae.read.slides import SUFFIXES, Slide, open_slide, region, resolve_mpp
from biosae.read.table import record_table, single_file
from biosae.read.tissue import mask_of, tissue_share

TOLERANCE = 0.02  # a level whose scale differs by less is taken as it is, pixel by pixel
COLUMNS = ("x", "y", "x_um", "y_um", "level", "tissue_share", "mpp", "mpp_source", "slide_mpp_x", "slide_mpp_y")
_MOST_TILES = 50_000_000
_EMPTY = ("no_tissue", "wrong_size")  # reasons of slides that are sound but give no tile

_OPENED = Handles(open_slide)


class SlideTileReader:
    """Reader of tiles of slides.

    Parameters
    ----------
    tile
        Side of the tiles in pixels.
    mpp
        Micrometres per pixel of the tiles.
    """

    item = "image"
    columns = ("x", "y", "level", "slide_mpp_x", "slide_mpp_y")

    def __init__(self, *, tile: int, mpp: float) -> None:
        self.tile, self.mpp = int(tile), float(mpp)

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """The tile whose upper left corner is at ``x, y`` of level 0: ``uint8 (tile, tile, 3)``."""
        slide, level = _OPENED.get(row["path"]), int(row["level"])
        if level >= len(slide.levels):
            raise ReadError("wrong_size", f"the slide has no level {level} any more; read the table of slides again")
        return self.cut(slide, level, (row["slide_mpp_x"], row["slide_mpp_y"]), int(row["x"]), int(row["y"]))

    def cut(self, slide: Slide, level: int, scale: tuple[float, float], x: int, y: int) -> np.ndarray:
        """A tile of an open slide whose level 0 has ``scale`` micrometres per pixel."""
        down = slide.downsamples[level]
        fx, fy = pixels_of_level(slide, level, scale, self.mpp)
        left, top = x / down, y / down
        if fx == fy == 1:
            left, top = round(left), round(top)
        box = (left, top, left + self.tile * fx, top + self.tile * fy)
        return region(slide, level, box, (self.tile, self.tile))

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {"kind": "wsi", "tile": self.tile, "mpp": self.mpp}


def pixels_of_level(slide: Slide, level: int, scale: tuple[float, float], mpp: float) -> tuple[float, float]:
    """Pixels of a level (x, y) to one pixel of a tile; exactly 1 where the scales agree within ``TOLERANCE``."""
    factors = tuple(mpp / (s * slide.downsamples[level]) for s in scale)
    return (1.0, 1.0) if all(abs(f - 1) <= TOLERANCE for f in factors) else factors


def choose_level(slide: Slide, scale: tuple[float, float], mpp: float, *, upsample: bool) -> int:
    """The coarsest level that is not coarser than ``mpp`` by more than ``TOLERANCE``.

    Raises
    ------
    ReadError
        ``unsupported`` if even level 0 is coarser and ``upsample`` does not allow that.
    """
    fine = [i for i, down in enumerate(slide.downsamples) if max(scale) * down <= mpp * (1 + TOLERANCE)]
    if not fine and not upsample:
        raise ReadError(
            "unsupported",
            f"the finest level has {max(scale):g} um/px, coarser than mpp={mpp:g}; take mpp={max(scale):.4g} or more, "
            "or invent pixels with upsample=True",
        )
    return max(fine, key=lambda i: slide.downsamples[i], default=0)


def wsi(
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
    tile: int = 256,
    mpp: float = 0.5,
    overlap: int = 0,
    slide_mpp: float | str | None = None,
    tissue: str | None = "otsu",
    min_tissue: float = 0.5,
    edge: str = "drop",
    upsample: bool = False,
    root: str | os.PathLike | None = None,
    n_jobs: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Samples of the tiles of whole slides, one row a tile.

    Every slide is opened, its scale resolved and, unless ``tissue=None``, its tissue found at 8 um/px; the scale of all
    slides is settled before any pixel is read. Tiles themselves are read when their sample is asked for, from the
    coarsest level that is not coarser than ``mpp``, and resampled to exactly ``tile`` pixels (Lanczos, antialiased) on
    each axis by its own scale. A level within 2 % of ``mpp`` is taken pixel by pixel.

    Parameters
    ----------
    source
        CSV, TSV or Parquet file or DataFrame with a row a slide, a folder, which is searched with its subfolders, or
        one slide. The files of a DICOM series are one slide: name one of them, or their folder.
    patient
        Column of the patient. Must be given; ``None`` says that it is unknown.
    slide, site, scanner, label, split
        Columns of these roles, if there are such. Without ``slide`` the slide is called as its row's id.
    path
        Column of the slides' paths.
    id
        Column of unique ids of the rows. Default: the column ``sample_id``, else the path.
    tile
        Side of the tiles in pixels, at ``mpp``.
    mpp
        Micrometres per pixel of the tiles.
    overlap
        Pixels that neighbouring tiles share, at ``mpp``.
    slide_mpp
        Micrometres per pixel of the slides' level 0: a number, or the name of a column (missing values take what the
        file states). Default: the column ``mpp`` if there is one, then the file.
    tissue
        ``"otsu"``, or None to keep every tile.
    min_tissue
        Least share of a tile's area that is tissue, 0 to 1.
    edge
        What becomes of tiles that reach beyond the slide: ``"drop"``, or ``"pad"`` to fill them with white.
    upsample
        Allow tiles from slides whose finest level is coarser than ``mpp``.
    root
        Folder that relative paths start from. Default: the table's own folder; the current one for a DataFrame.
    n_jobs
        Processes that look at the slides.
    max_failures
        Largest share of slides that may be unusable, 0 to 1. Slides without tissue, or smaller than a tile, are listed
        too but do not count.
    failures
        ``failures.csv`` to write what could not be used to.

    Returns
    -------
    Samples
        ``obs`` has the slide's own columns and, for each tile, ``x, y`` (upper left corner in pixels of level 0),
        ``x_um, y_um`` (centre, micrometres from the slide's upper left corner), ``level``, ``tissue_share`` (missing
        with ``tissue=None``), ``mpp`` (of the tile), ``slide_mpp_x, slide_mpp_y`` (of level 0) and ``mpp_source``. Ids
        are ``<slide>_x<x>_y<y>``, with the row's id in place of the slide where ``id`` was given.
        ``meta["slides"]`` holds size, levels, vendor, objective and tissue of every slide, ``failures`` the rest.

    Raises
    ------
    InputError
        For absent or clashing columns, sizes that make no sense, or if no slide can be used.
    TooManyFailuresError
        If more slides are unusable than ``max_failures`` allows.

    Examples
    --------
    >>> samples = bs.read.wsi("slides.csv", patient="case", label="diagnosis", mpp=0.5)  # doctest: +SKIP
    >>> bs.pl.tissue("a.svs", tiles=samples)  # doctest: +SKIP
    """
    _check(tile, mpp, overlap, tissue, min_tissue, edge, max_failures)
    roles = {
        "patient": patient, "slide": slide, "site": site, "scanner": scanner, "label": label, "split": split,
        "path": path,
    }  # fmt: skip
    listed = not isinstance(source, pd.DataFrame) and Path(source).is_dir()
    if not isinstance(source, pd.DataFrame) and Path(source).suffix.lower() in SUFFIXES and not listed:
        source, root = single_file(source, path=path, root=root)
    obs, roles, root = record_table(source, roles=roles, id=id, root=root, suffixes=SUFFIXES)
    if listed:
        obs = obs[_first_of_series(obs[path], root)]
    clash = [c for c in COLUMNS if c != "mpp" and c in obs]
    if clash:
        raise InputError(f"the table has a column {clash[0]!r}, which this reader fills; rename it")
    look = _Look(*_stated(obs, slide_mpp), mpp, upsample)
    reader = SlideTileReader(tile=tile, mpp=mpp)
    records = Samples(obs.drop(columns="mpp", errors="ignore"), reader, roles=roles, root=root)
    names = _names(records, by_id=id is not None)
    options = {"n_jobs": n_jobs, "max_failures": 1.0, "failures": failures, "unit": "slide"}
    known, lost = scan(records, look, stage="read/wsi", **options)
    _enough(len(known), lost, len(records), max_failures, failures)
    cut = _Cut(look, tile, overlap, tissue, min_tissue, edge)
    cuts, more = scan(records.select(list(known)), cut, stage="tiles/wsi", **options)
    lost += more
    _enough(len(cuts), lost, len(records), max_failures, failures)
    empty = [r for r in lost if r[2] in _EMPTY]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(records)} slides give no tile (samples.failures), e.g. {empty[0][0]}: {empty[0][3]}",
            stacklevel=2,
        )
    table = pd.concat([tiles.assign(_record=record) for record, (tiles, _) in cuts.items()], ignore_index=True)
    if len(table) > _MOST_TILES:
        raise InputError(f"{len(table):,} tiles; take fewer slides, a larger tile or less overlap")
    prefix = names.loc[table["_record"]].to_numpy(object)
    whole = records.obs.loc[table["_record"]].reset_index(drop=True)
    if "slide" not in whole:
        whole["slide"] = prefix
    out = pd.concat([whole, table.drop(columns="_record").assign(mpp=float(mpp))], axis=1)
    out.index = [f"{name}_x{x}_y{y}" for name, x, y in zip(prefix, out["x"], out["y"])]
    meta = {"failures": lost, "slides": {names[record]: facts for record, (_, facts) in cuts.items()}}
    roles = {**records.roles, "slide": records.roles.get("slide") or "slide", "mpp": "mpp"}
    return Samples(out, reader, roles=roles, root=root, meta=meta)


def _check(
    tile: int, mpp: float, overlap: int, tissue: str | None, min_tissue: float, edge: str, max_failures: float
) -> None:
    if int(tile) != tile or not 1 <= tile <= 8192:
        raise InputError(f"tile={tile!r} must be a whole number of pixels, 1 to 8192")
    if int(overlap) != overlap or not 0 <= overlap < tile:
        raise InputError(f"overlap={overlap!r} must be a whole number of pixels from 0 and below tile={tile}")
    if isinstance(mpp, str) or not 0 < mpp < math.inf:
        raise InputError(f"mpp={mpp!r} is the wanted scale of the tiles, micrometres per pixel; name a column of the "
                         "slides' own scale in slide_mpp=")  # fmt: skip
    if tissue not in ("otsu", None):
        raise InputError(f"tissue={tissue!r}; {nearest(str(tissue), ['otsu'])}, or None for every tile")
    if edge not in ("drop", "pad"):
        raise InputError(f"edge={edge!r}; {nearest(str(edge), ['drop', 'pad'])}")
    if not 0 <= min_tissue <= 1 or not 0 <= max_failures <= 1:
        raise InputError(f"min_tissue={min_tissue} and max_failures={max_failures} are shares, 0 to 1")


def _first_of_series(paths: pd.Series, root: Path) -> list[bool]:
    """Which rows to keep of a folder's files: of each DICOM series in one folder only the first file."""
    from biosae.read.slide_dicom import series

    seen, keep = set(), []
    for name in paths:
        uid = series(root / name) if name.lower().endswith(".dcm") else None
        key = (Path(name).parent, uid)
        keep.append(uid is None or key not in seen)
        seen.add(key)
    return keep


def _stated(obs: pd.DataFrame, slide_mpp: float | str | None) -> tuple[dict[str, float], str]:
    """Scale of level 0 by row id, where it is stated, and how to call the source."""
    if slide_mpp is None and "mpp" not in obs:
        return {}, ""
    if slide_mpp is not None and not isinstance(slide_mpp, str):
        if isinstance(slide_mpp, bool) or not 0 < slide_mpp < math.inf:
            raise InputError(f"slide_mpp={slide_mpp!r} must be a positive number of micrometres per pixel, or a column")
        return dict.fromkeys(map(str, obs.index), float(slide_mpp)), "argument"
    column = slide_mpp or "mpp"
    if column not in obs:
        raise InputError(f"no column {column!r} for slide_mpp; {nearest(column, obs.columns)}")
    numbers = pd.to_numeric(obs[column], errors="coerce").astype(float)
    bad = obs[column].notna() & ~((numbers > 0) & np.isfinite(numbers))
    if bad.any():
        raise InputError(
            f"column {column!r} (micrometres per pixel of the slides) holds {obs[column][bad].iloc[0]!r}; it must hold "
            "positive numbers, or nothing where the file states the scale"
        )
    return {str(i): v for i, v in numbers.dropna().items()}, f"column {column}"


def _names(records: Samples, *, by_id: bool) -> pd.Series:
    """Record id to the name that its tiles' ids begin with."""
    if by_id or "slide" not in records.obs:
        return pd.Series(records.ids, index=records.ids)
    names = records.obs["slide"].fillna(records.ids.to_series())
    if not names.is_unique:
        twice = names[names.duplicated()].iloc[0]
        raise InputError(f"several files are of slide {twice!r}; pass id= a column that tells the files apart")
    return names


def _enough(n_good: int, lost: list[list[str]], total: int, max_failures: float, failures: Any) -> None:
    """Raise if no slide is left, or too many are unusable."""
    if not n_good:
        item, _, reason, detail = lost[0]
        raise InputError(f"none of {total} slides can be used; {item}: {reason}: {detail}")
    bad = [r for r in lost if r[2] not in _EMPTY]
    if len(bad) > max_failures * total:
        shown = "; ".join(f"{item}: {reason}: {detail}" for item, _, reason, detail in bad[:3])
        where = f" They are listed in {failures}." if failures is not None else " failures= writes a list."
        raise TooManyFailuresError(
            f"{len(bad)} of {total} slides cannot be used, more than max_failures={max_failures:g} allows ({shown})."
            f"{where} Repair or drop them, or raise max_failures if this loss is acceptable"
        )


class _Look:
    """Scale and level of a slide; reads no pixel."""

    def __init__(self, stated: Mapping[str, float], said: str, mpp: float, upsample: bool) -> None:
        self.stated, self.said, self.mpp, self.upsample = stated, said, mpp, upsample

    def __call__(self, row: Mapping[str, Any]) -> tuple[tuple[float, float], str, int]:
        slide = _OPENED.get(row["path"])
        scale, source = resolve_mpp(slide, self.stated.get(row["sample_id"]), self.said)
        return scale, source, choose_level(slide, scale, self.mpp, upsample=self.upsample)


class _Cut:
    """Table of the tiles of a slide, and facts of the slide."""

    def __init__(self, look: _Look, tile: int, overlap: int, tissue: str | None, min_tissue: float, edge: str) -> None:
        self.look, self.tile, self.overlap = look, tile, overlap
        self.tissue, self.min_tissue, self.edge = tissue, min_tissue, edge

    def __call__(self, row: Mapping[str, Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
        scale, source, level = self.look(row)
        slide = _OPENED.get(row["path"])
        down, factors = slide.downsamples[level], pixels_of_level(slide, level, scale, self.look.mpp)
        columns, rows = (self._starts(n, f) for n, f in zip(slide.levels[level], factors))
        if not len(columns) or not len(rows):
            needed = " x ".join(f"{math.ceil(self.tile * f * down)}" for f in factors)
            raise ReadError(
                "wrong_size",
                f"{slide.levels[0][0]} x {slide.levels[0][1]} pixels are less than a tile ({needed}); take a smaller "
                "tile or edge='pad'",
            )
        if len(columns) * len(rows) > _MOST_TILES:
            raise ReadError("unsupported", f"{len(columns)} x {len(rows)} tiles; take a larger tile or a coarser mpp")
        y, x = (v.ravel() for v in np.meshgrid(np.rint(rows * down), np.rint(columns * down), indexing="ij"))
        width, height = (self.tile * f * down for f in factors)
        (w, h), share, facts = slide.levels[0], np.full(len(x), np.nan), {}
        if self.tissue is not None:
            found = mask_of(slide, scale, row["path"])
            share = tissue_share(found, x, y, width, height)
            kept = share >= self.min_tissue
            if not kept.any():
                raise ReadError(
                    "no_tissue",
                    f"{found.area:.3g} mm2 of tissue, and no tile with a share of {self.min_tissue:g}; look at "
                    "bs.pl.tissue, lower min_tissue, or pass tissue=None",
                )
            x, y, share = x[kept], y[kept], share[kept]
            facts = {"tissue_mm2": found.area, "threshold": found.threshold}
        SlideTileReader(tile=self.tile, mpp=self.look.mpp).cut(slide, level, scale, int(x[0]), int(y[0]))
        table = pd.DataFrame({
            "x": x.astype(np.int64), "y": y.astype(np.int64),
            "x_um": (x + width / 2) * scale[0], "y_um": (y + height / 2) * scale[1],
            "level": level, "tissue_share": share, "mpp_source": source,
            "slide_mpp_x": scale[0], "slide_mpp_y": scale[1],
        })  # fmt: skip
        facts |= {
            "width": w, "height": h, "downsamples": list(slide.downsamples), "vendor": slide.vendor,
            "objective": slide.objective, "backend": slide.backend,
        }  # fmt: skip
        return table, facts

    def _starts(self, length: int, factor: float) -> np.ndarray:
        """Where tiles begin along an axis, in pixels of the level."""
        step, size = (self.tile - self.overlap) * factor, self.tile * factor
        if self.edge == "drop":
            n = math.floor((length - size) / step + 1e-6) + 1
        else:
            n = max(1, math.ceil((length - self.overlap * factor) / step - 1e-6))
        return np.arange(max(0, min(n, _MOST_TILES))) * step
