"""Embeddings made elsewhere, as :class:`biosae.Embeddings`: ``bs.read.features``."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.failures import MAX_FAILURES, FailureLog
from biosae.data.items import ReadError
from biosae.data.roles import ID_ROLES, canonical_obs
from biosae.data.samples import Samples
from biosae.embeddings.described import Described, as_ids
from biosae.embeddings.foreign import HDF5, SUFFIXES, look
from biosae.embeddings.guard import crashing
from biosae.embeddings.ingest import Chosen, in_memory, to_folder
from biosae.embeddings.store import Embeddings
from biosae.errors import InputError, TooManyFailuresError, nearest
from biosae.read.table import load_table, need_patient
from biosae.settings import settings

STAGE = "read/features"
COORDINATES = ("corner", "centre", "um")


def features(
    source: str | os.PathLike | pd.DataFrame,
    *,
    encoder: str,
    patient: str | None = ...,
    samples: Samples | pd.DataFrame | str | os.PathLike | None = None,
    join: str = "id",
    id: str | None = None,
    row_id: str | None = None,
    ids: Sequence | str | os.PathLike | None = None,
    prefix: bool = False,
    key: str | None = None,
    path: str = "path",
    root: str | os.PathLike | None = None,
    slide: str | None = None,
    recording: str | None = None,
    sequence: str | None = None,
    site: str | None = None,
    location: str | None = None,
    scanner: str | None = None,
    collector: str | None = None,
    label: str | None = None,
    split: str | None = None,
    layer: str = "final",
    pool: str | None = None,
    licence: str | None = None,
    mpp: float | None = None,
    slide_mpp: float | str | None = None,
    tile_px: float | None = None,
    coordinates: str | None = None,
    out: str | os.PathLike | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Embeddings:
    """Embeddings that another programme made.

    Read are HDF5 of TRIDENT and CLAM (data sets ``features`` and ``coords``, one file a slide), AnnData (``.h5ad`` or
    zarr: ``X`` or an ``obsm`` matrix), tables of WSIData and SpatialData stores (zarr), ``.npy``, ``.npz``, and Parquet
    (a list column, or numbered columns). Nothing is unpickled. HDF5 files are opened in another process first.

    Parameters
    ----------
    source
        One such file, a folder of them, or a table (CSV, TSV, DataFrame) with a column ``path`` and one row a file,
        whose other columns (patient, site ...) then hold for every row of the file.
    encoder
        Name of the encoder that made them. A name of the catalogue brings licence and width, and vectors of another
        width are refused; any other name needs ``licence=``.
    patient
        Column of the patient, or None if unknown. Must be said unless ``samples`` is a :class:`biosae.Samples`.
    samples
        What is known of the rows, joined by id: :class:`biosae.Samples`, whose roles then hold, or a table. Its columns
        go before columns of the files. Rows that it does not have are left out; rows that only it has are failures.
    join
        ``"id"``: ids of ``samples`` are ids of rows. ``"file"``: they are names of files without ending (slides).
    id
        Column of the ids in the tables ``samples`` and ``ids``. Default: ``sample_id``.
    row_id
        Data set, array or column of the ids in the files. Default: the index of AnnData, else ``sample_id`` or ``ids``.
    ids
        Ids of the rows of one file that holds none, in its order: a sequence, or a table (CSV, TSV, Parquet) whose row
        *k* describes row *k* of the file. Arrays without ids are refused.
    prefix
        Put ``<file>/`` before the ids that files state, where they recur from file to file (numbers of tiles).
    key
        What holds the vectors: data set, ``X`` or ``obsm`` entry, array, list column, or the common beginning of
        numbered columns; for stores with several tables ``"<table>"``. None takes the only candidate.
    path, root
        Column of the files in a table, and the folder that its relative paths start from (default: the table's own).
    slide, recording, sequence, site, location, scanner, collector, label, split
        Columns of these roles. Files with coordinates are slides of their own name unless ``slide`` is named.
    layer, pool
        Layer and pooling, as far as known; recorded in the identity. Pooling defaults to the catalogue's.
    licence
        Licence of the encoder's weights, for encoders that the catalogue does not have.
    mpp
        Micrometres per pixel of the tiles that were embedded.
    slide_mpp
        Micrometres per pixel of the coordinates (level 0): a number or a column. Gives ``x_um, y_um``, the tiles'
        centres.
    tile_px
        Side of a tile in pixels of the coordinates; needed for ``x_um, y_um`` where files do not state it (TRIDENT's
        do).
    coordinates
        What ``obsm["spatial"]`` of AnnData is: ``"corner"`` (tiles' upper left corners, pixels of level 0: ``x, y``),
        ``"centre"`` (centres of tiles or spots, pixels of level 0, as squidpy and Visium have; needs ``slide_mpp``) or
        ``"um"`` (centres in micrometres, as biosae writes). It goes before such columns of ``obs``. None leaves
        ``spatial`` aside: no file says what it measures.
    out
        Folder to write the embeddings to, ``out/<encoder>/<layer>``, block by block; a killed call goes on. None holds
        them in memory.
    max_failures
        Largest share of files, and of rows, that may fail, 0 to 1.
    failures
        ``failures.csv``; default ``out/failures.csv``, none without ``out``. ``emb.provenance["failures"]`` lists them
        too.

    Returns
    -------
    Embeddings
        float16 or float32 as stored (float64 becomes float32); ``obs`` with ``file``, the files' columns, and ``x, y``
        (pixels of level 0) where there are coordinates. Ids: those of the file; else ``<file>_x<x>_y<y>`` by
        coordinates, as :func:`biosae.read.wsi` names tiles; else the file's name for files of a single vector. Rows
        with NaN or infinity are left out and listed.

    Raises
    ------
    InputError
        For rows without ids, ids that repeat or match nothing, widths that differ, unknown encoders, ambiguous files.
    TooManyFailuresError
        If more than ``max_failures`` of the files or rows fail.

    Examples
    --------
    >>> emb = bs.read.features(  # doctest: +SKIP
    ...     "trident/20x_256px/features_uni_v1", encoder="uni", samples="slides.csv", id="slide_id", join="file",
    ...     patient="case_id", mpp=0.5, out="runs/uni",
    ... )
    """
    if join not in ("id", "file"):
        raise InputError(f"join={join!r}; {nearest(join, ('id', 'file'))}")
    if coordinates is not None and coordinates not in COORDINATES:
        raise InputError(f"coordinates={coordinates!r}; {nearest(str(coordinates), COORDINATES)}")
    if (coordinates == "centre") > (slide_mpp is not None):
        raise InputError("coordinates='centre' needs slide_mpp= (micrometres per pixel of level 0) to give x_um, y_um")
    if coordinates == "um" and slide_mpp is not None:
        raise InputError("coordinates='um' are micrometres already; drop slide_mpp=")
    roles: dict[str, Any] = {
        "patient": patient, "slide": slide, "recording": recording, "sequence": sequence, "site": site,
        "location": location, "scanner": scanner, "collector": collector, "label": label, "split": split,
    }  # fmt: skip
    inside = out is not None and isinstance(source, str | os.PathLike) and Path(source).is_dir()
    if inside and Path(source).resolve() in (Path(out) / "x").resolve().parents:
        raise InputError("out= lies in the folder of the files, which would be read as such; choose another folder")
    known, roles, mpp = _known(samples, roles, id, mpp)
    table, home = _files(source, path, root, _text_columns(roles))
    log = _Log(failures if failures is not None or out is None else Path(out) / "failures.csv", max_failures)
    found = _described(table, home, path, key, row_id, log)
    if ids is not None:
        _name_rows(found, ids, id)
    obs, dim, dtype = _rows(found, prefix, coordinates)
    identity = _identity(encoder, licence, dim, layer, pool, mpp)
    obs, at = _joined(obs, known, join, log)
    if roles.get("slide") is None and "slide" not in obs and ("x" in obs or coordinates is not None):
        obs["slide"] = _stems(obs).to_numpy()
    obs, roles = canonical_obs(_micrometres(obs, slide_mpp, tile_px, coordinates), roles)
    stated = sorted({d.facts["encoder"] for _, d, _ in found if "encoder" in d.facts})
    chosen = Chosen(obs, roles, mpp, [(file, d) for file, d, _ in found], at, dtype)
    emb = in_memory(chosen, identity, log) if out is None else to_folder(chosen, identity, Path(out), log)
    log.close(len(at))
    emb.provenance |= {"stated_encoder": stated, "failures": log.rows}
    if log.rows:
        warnings.warn(f"{len(log.rows)} files or rows are not used, e.g. {': '.join(log.rows[0])}", stacklevel=2)
    return emb


class _Log:
    """What could not be used, counted against the share that may fail once a step is done."""

    def __init__(self, path: str | os.PathLike | None, max_failures: float) -> None:
        self.path, self.max_failures, self.rows = path, max_failures, []
        self._closed = 0

    def add(self, item: str, reason: str, detail: str) -> None:
        """List a file or row."""
        self.rows.append([str(item), STAGE, reason, detail])

    def close(self, total: int) -> None:
        """End a step of ``total`` items: raise if too many of them failed; write everything to ``failures.csv``."""
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "failures.csv" if self.path is None else self.path
            step = self.rows[self._closed :]
            if self.rows or Path(place).is_file():
                log = FailureLog(place, stage=STAGE, total=max(total, len(step)), max_failures=1)
                for item, _, reason, detail in self.rows:
                    log.add(item, reason, detail)
            self._closed = len(self.rows)
            if len(step) > self.max_failures * max(total, 1):
                raise TooManyFailuresError(
                    f"{len(step)} of {total} files or rows cannot be used, more than max_failures="
                    f"{self.max_failures:g} allows, e.g. {': '.join(step[0])}"
                )


# -- what is where -----------------------------------------------------------------------------------------------------


def _known(
    samples: Any, roles: dict[str, Any], id: str | None, mpp: float | None
) -> tuple[pd.DataFrame | None, dict[str, Any], float | None]:
    """Table of what is known of the rows (index: ids), the roles, and the scale."""
    if isinstance(samples, Samples):
        named = [r for r, c in roles.items() if c not in (None, ...)]
        if named:
            raise InputError(f"samples knows its roles; drop {named[0]}=, or pass samples.obs")
        return samples.obs, dict(samples.roles), samples.mpp if mpp is None else mpp
    need_patient(roles)
    if samples is None:
        return None, roles, mpp
    table, _ = load_table(samples, text=[id or "sample_id", *_text_columns(roles)])
    column = id or "sample_id"
    if column not in table:
        raise InputError(f"no column {column!r} with the ids in samples; pass id=. {nearest(column, table.columns)}")
    table.index = pd.Index(as_ids(table.pop(column).to_numpy(object), f"column {column!r}"))
    if not table.index.is_unique:
        raise InputError(f"id {table.index[table.index.duplicated()][0]!r} occurs twice in samples")
    return table, roles, mpp


def _text_columns(roles: Mapping[str, Any]) -> list[str]:
    return [c for role, c in roles.items() if role in ID_ROLES and isinstance(c, str)]


def _files(source: Any, path: str, root: Any, columns: list[str]) -> tuple[pd.DataFrame, Path]:
    """One row a file, and the folder that the paths start from."""
    if isinstance(source, str | os.PathLike) and Path(source).suffix.lower() in SUFFIXES:
        return pd.DataFrame({path: [Path(source).absolute()]}), Path()
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        stores = sorted(p for p in Path(source).iterdir() if p.suffix.lower() == ".zarr")
        if stores:
            return pd.DataFrame({path: [p.absolute() for p in stores]}), Path()
    table, home = load_table(source, text=[path, *columns], suffixes=[s for s in SUFFIXES if s != ".zarr"])
    if path not in table:
        raise InputError(
            f"no column {path!r} with the files' paths; pass path= its name. {nearest(path, table.columns)}"
        )
    table.columns = table.columns.map(str)
    if "file" in table and path != "file":
        raise InputError("the table has a column 'file', which this reader fills; rename it")
    return table.drop(columns="folder", errors="ignore"), Path(home if root is None else root).absolute()


_Found = list[tuple[Path, Described, Mapping[str, Any]]]


def _described(table: pd.DataFrame, home: Path, path: str, key: str | None, row_id: str | None, log: _Log) -> _Found:
    """Each readable file, what is in it, and the other columns of its row."""
    from tqdm.auto import tqdm

    files = [home / str(p) for p in table[path]]
    native = [i for i, f in enumerate(files) if f.suffix.lower() in HDF5 and f.is_file()]
    crashed = {native[i]: why for i, why in crashing([files[i] for i in native]).items()}
    found: _Found = []
    rest = table.drop(columns=path)
    for i, file in enumerate(tqdm(files, desc=STAGE, unit="file", disable=not settings.progress)):
        try:
            if i in crashed:
                raise ReadError("unreadable", f"{file.name}: {crashed[i]}; the file is damaged, make it again")
            described = look(file, key=key, id=row_id)
            if described.n == 0 or described.dim == 0:
                raise ReadError("empty", f"{file.name} holds no vector")
        except ReadError as error:
            log.add(file.name, error.reason, error.detail)
        else:
            found.append((file, described, rest.iloc[i].to_dict()))
    log.close(len(files))
    if not found:
        raise InputError(f"no file could be read: {': '.join(log.rows[0])}")
    return found


def _name_rows(found: _Found, ids: Any, id: str | None) -> None:
    """Give the rows of one file the ids (and the columns) that came with it."""
    if len(found) > 1:
        raise InputError("ids= is for one file; for several, store the ids in the files")
    described = found[0][1]
    if isinstance(ids, str | os.PathLike):
        table, _ = load_table(ids, text=[id or "sample_id"])
        column = id or ("sample_id" if "sample_id" in table else table.columns[0])
        if column not in table:
            raise InputError(f"no column {column!r} in {ids}; {nearest(column, table.columns)}")
        ids = table.pop(column).to_numpy(object)
        described.obs = pd.concat([described.obs.drop(columns=table.columns, errors="ignore"), table], axis=1)
    described.ids = as_ids(ids, "ids")
    if len(described.ids) != described.n:
        raise InputError(f"ids= has {len(described.ids)} entries, {found[0][0].name} has {described.n} rows")


def _rows(found: _Found, prefix: bool, coordinates: str | None) -> tuple[pd.DataFrame, int, np.dtype]:
    """All rows of all files with their ids, the width, and the dtype that holds them."""
    widths = {d.dim: file.name for file, d, _ in found}
    if len(widths) > 1:
        shown = ", ".join(f"{w} ({name})" for w, name in widths.items())
        raise InputError(f"the files hold vectors of different widths: {shown}; read those of one encoder at a time")
    stated = {d.facts["encoder"]: file.name for file, d, _ in found if "encoder" in d.facts}
    if len(stated) > 1:
        raise InputError(f"the files state different encoders: {stated}; read those of one encoder at a time")
    frames = []
    for file, described, columns in found:
        frame = described.obs.drop(columns=[c for c in columns if c in described.obs])
        if coordinates is not None:
            if described.spatial is None:
                raise InputError(f"{file.name} has no obsm['spatial'] of two columns; leave out coordinates=")
            x, y = described.spatial.T
            frame = frame.assign(x_um=x, y_um=y) if coordinates == "um" else frame.assign(x=x, y=y)
        frame.index = pd.Index(_row_ids(file, described, prefix), dtype=object)
        frame = frame.assign(file=file.name, **columns)
        if "patch_size_level0" in described.facts and "tile_px" not in frame:
            frame["tile_px"] = float(described.facts["patch_size_level0"])
        frames.append(frame)
    obs = pd.concat(frames)
    if not obs.index.is_unique:
        twice = obs.index[obs.index.duplicated()][0]
        several = " in several files; pass prefix=True" if len(set(obs.loc[twice, "file"])) > 1 else ""
        raise InputError(f"the id {twice!r} occurs more than once{several}; ids must be unique")
    half = all(d.dtype == np.float16 for _, d, _ in found)
    return obs, next(iter(widths)), np.dtype("float16" if half else "float32")


def _row_ids(file: Path, described: Described, prefix: bool) -> list[str]:
    if described.ids is not None:
        if len(described.ids) != described.n:
            raise InputError(f"{file.name} holds {len(described.ids)} ids for {described.n} rows")
        return [f"{file.stem}/{i}" for i in described.ids] if prefix else described.ids
    if described.one:
        return [file.stem]
    if {"x", "y"} <= set(described.obs):
        return [f"{file.stem}_x{x:g}_y{y:g}" for x, y in zip(described.obs["x"], described.obs["y"])]
    raise InputError(
        f"{file.name} has no ids of its rows, and rows are not joined by position: pass ids= (a sequence or a table in "
        "the order of the rows), or row_id= what holds them in the file"
    )


def _identity(
    encoder: str, licence: str | None, dim: int, layer: str, pool: str | None, mpp: float | None
) -> dict[str, Any]:
    """Identity of embeddings made elsewhere, held against the catalogue."""
    from biosae.encoders.catalog import canonical, catalogue

    facts = catalogue().get(canonical(encoder))
    if facts is None and licence is None:
        raise InputError(
            f"no encoder of the catalogue is named {encoder!r}; {nearest(canonical(encoder), catalogue())}. For "
            "another one also pass licence= (of its weights; 'unknown' if nobody knows)"
        )
    pool = pool or (facts.pool if facts is not None else "unknown")
    if facts is not None and facts.width is not None and layer == "final" and pool in ("cls", "mean", "cls+mean"):
        width = facts.width * (2 if pool == "cls+mean" else 1)
        if dim != width:
            raise InputError(
                f"{facts.name} with pool={pool!r} gives {width} numbers, these vectors have {dim}: they come from "
                "another encoder, layer= or pool="
            )
    return {
        "encoder": encoder if facts is None else facts.name,
        "library": None if facts is None else facts.library,
        "source": "made elsewhere",
        "weights_sha256": None,
        "precomputed": True,
        "layer": layer,
        "pool": pool,
        "dim": dim,
        "mpp": None,
        "tile_mpp": mpp,
        "licence": licence or facts.licence,
        "derivatives_restricted": None if facts is None else facts.derivatives_restricted,
    }


def _stems(obs: pd.DataFrame) -> pd.Series:
    """Names of the files without their ending."""
    return obs["file"].map({f: Path(f).stem for f in obs["file"].unique()})


def _joined(obs: pd.DataFrame, known: pd.DataFrame | None, join: str, log: _Log) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows that are known, with what is known of them, and their positions among all rows."""
    if known is None:
        return obs, np.arange(len(obs))
    keys = obs.index if join == "id" else pd.Index(_stems(obs))
    at = np.flatnonzero(keys.isin(known.index))
    if not len(at):
        hint = "; join='file' joins by file" if join == "id" and set(_stems(obs)) & set(known.index) else ""
        raise InputError(
            f"no row of the files is among samples: rows are {keys[0]!r} ..., samples {str(known.index[0])!r} ...{hint}"
        )
    for name in known.index.difference(keys[at], sort=False):
        log.add(name, "missing", "no file holds it")
    log.close(len(known))
    rows = known.loc[keys[at]].set_axis(obs.index[at])
    mine = obs.iloc[at].drop(columns=[c for c in obs if c in rows])
    return pd.concat([mine, rows], axis=1), at


def _micrometres(
    obs: pd.DataFrame, slide_mpp: float | str | None, tile_px: float | None, coordinates: str | None
) -> pd.DataFrame:
    """Add ``x_um, y_um``, the centres of the tiles; where ``x, y`` are centres, they become corners or go."""
    if slide_mpp is None:
        return obs
    for column in ("x", "y", *([slide_mpp] if isinstance(slide_mpp, str) else [])):
        if column not in obs:
            raise InputError(f"slide_mpp= needs a column {column!r}; {nearest(column, obs.columns)}")
    side = tile_px if tile_px is not None or "tile_px" not in obs else obs["tile_px"]
    scale = obs[slide_mpp].astype(float) if isinstance(slide_mpp, str) else float(slide_mpp)
    if coordinates == "centre":
        obs = obs.assign(x_um=obs["x"] * scale, y_um=obs["y"] * scale)
        return (
            obs.drop(columns=["x", "y"]) if side is None else obs.assign(x=obs["x"] - side / 2, y=obs["y"] - side / 2)
        )
    if side is None:
        raise InputError("the files do not state the size of their tiles; pass tile_px= (pixels of the coordinates)")
    return obs.assign(x_um=(obs["x"] + side / 2) * scale, y_um=(obs["y"] + side / 2) * scale)
