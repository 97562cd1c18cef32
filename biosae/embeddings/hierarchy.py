"""HDF5 and zarr files of embeddings: TRIDENT and CLAM, AnnData, and the tables of WSIData and SpatialData.

AnnData are read by their published on-disk layout (``encoding-type`` of groups), in HDF5 and in zarr alike, so that no
row of the matrix is touched until it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.embeddings.described import IDS, Described, as_ids, checked, pick, with_coords
from biosae.errors import InputError, require

_DEFLATE = 1032  # no filter that HDF5 files of embeddings use packs more than deflate's 1032 to 1
_FACTS = (
    "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "level0_width",
    "level0_height",
)  # fmt: skip


@contextmanager
def open_hierarchy(path: Path) -> Iterator[Any]:
    """The root group of an HDF5 file or a zarr store, read-only."""
    if path.suffix.lower() == ".zarr":
        yield require("zarr", extra="data").open_group(str(path), mode="r")
        return
    with require("h5py", extra="data").File(path, "r") as root:
        yield root


def look_hierarchy(path: Path, key: str | None, id: str | None) -> Described:
    """Describe an HDF5 file or a zarr store; see :func:`biosae.embeddings.foreign.look`."""
    with open_hierarchy(path) as root:
        names = list(root)
        if "tables" in names and "obs" not in names:
            tables = list(root["tables"])
            table, _, inner = (key or "").partition("/")
            table = pick(tables, table or None, path, "table")
            found = _look_anndata(root[f"tables/{table}"], path, inner or None, id)
            found.where = f"tables/{table}/{found.where}"
            return _with_tiles(found, path)
        if "obs" in names and {"X", "obsm"} & set(names):
            return _look_anndata(root, path, key, id)
        return _look_plain(root, path, key, id)


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _stored(node: Any, name: str) -> None:
    """Refuse an array whose stated size its stored bytes cannot hold."""
    stated = int(np.prod([int(s) for s in node.shape], dtype=object)) * node.dtype.itemsize
    held = node.id.get_storage_size() if hasattr(node, "id") else node.nbytes_stored()
    if stated > _DEFLATE * held + 1024:
        raise ReadError("truncated", f"{name} states {stated} bytes, {held} are stored")


# -- TRIDENT, CLAM and the like ----------------------------------------------------------------------------------------


def _look_plain(root: Any, path: Path, key: str | None, id: str | None) -> Described:
    arrays = {name: root[name] for name in root if _is_array(root[name])}
    wide = [n for n, a in arrays.items() if n != "coords" and a.dtype.kind == "f" and len(a.shape) == 2]
    if key is None and "features" in arrays:
        key = "features"
    where = pick(list(arrays) if key is not None else wide, key, path, "data set")
    data, name = arrays[where], f"{path.name}[{where!r}]"
    n, dim, one = checked(data.shape, data.dtype, name)
    _stored(data, name)
    attributes = {**_attributes(data)}
    obs, ids = pd.DataFrame(index=range(n)), None
    if "coords" in arrays and not one:
        _stored(arrays["coords"], "coords")
        obs = with_coords(np.asarray(arrays["coords"][()]), n, path.name)
        attributes |= {k: v for k, v in _attributes(arrays["coords"]).items() if k in _FACTS}
    if id is not None and id not in arrays:
        raise InputError(f"{path.name} has no data set {id!r} of ids; it has {', '.join(map(repr, arrays))}")
    column = id or next((c for c in IDS if c in arrays), None)
    if column is not None:
        _stored(arrays[column], column)
        ids = as_ids(arrays[column][()], f"{path.name}[{column!r}]")
    facts = {k: v for k, v in attributes.items() if k in (*_FACTS, "encoder")}
    return Described(n, dim, data.dtype, where, ids, obs, one, facts)


def _attributes(node: Any) -> dict[str, Any]:
    """Text and single numbers among an array's attributes."""
    found = {}
    for name in (*_FACTS, "encoder"):
        if name in node.attrs:
            value = node.attrs[name]
            value = value.decode() if isinstance(value, bytes) else value
            value = value.item() if hasattr(value, "item") and np.size(value) == 1 else value
            if isinstance(value, str | int | float):
                found[name] = value
    return found


# -- AnnData -----------------------------------------------------------------------------------------------------------


def _look_anndata(group: Any, path: Path, key: str | None, id: str | None) -> Described:
    places = {"X": "X"} if "X" in group else {}
    if "obsm" in group:
        places |= {name: f"obsm/{name}" for name in group["obsm"]}
    wide = [name for name in places if name not in ("spatial", "X_pca", "X_umap", "X_tsne")]
    chosen = pick(list(places) if key is not None else wide, key, path, "matrix")
    data, name = group[places[chosen]], f"{path.name}[{chosen!r}]"
    if not _is_array(data):
        raise InputError(f"{name} is sparse or a table; embeddings are dense arrays: store its .toarray()")
    n, dim, one = checked(data.shape, data.dtype, name)
    _stored(data, name)
    obs = frame(group["obs"], n, path.name)
    if id is not None and id not in obs:
        raise InputError(f"obs of {path.name} has no column {id!r} of ids; {', '.join(map(repr, obs.columns))}")
    ids = as_ids(obs.index.to_numpy(object) if id is None else obs[id].to_numpy(object), f"the ids of {path.name}")
    obs = obs.reset_index(drop=True)
    spatial = None
    if "obsm" in group and "spatial" in group["obsm"] and _is_array(group["obsm/spatial"]):
        stored = group["obsm/spatial"]
        if tuple(stored.shape) == (n, 2) and stored.dtype.kind in "fiu":
            _stored(stored, "spatial")
            spatial = np.asarray(stored[()], np.float64)
    facts = {}
    if "uns" in group and "spatialdata_attrs" in group["uns"]:
        stated = group["uns/spatialdata_attrs"]
        for name in ("region", "region_key", "instance_key"):
            if name in stated and _is_array(stated[name]):
                value = np.asarray(stated[name][()]).ravel()
                if value.size == 1:
                    facts[name] = as_ids(value, name)[0]
    return Described(n, dim, data.dtype, places[chosen], ids, obs, one, facts, spatial)


def frame(group: Any, n: int, name: str) -> pd.DataFrame:
    """A data frame of AnnData's on-disk layout: plain and text columns, categories (those of anndata 0.7 too), and
    numbers with gaps."""
    index = group.attrs["_index"]
    columns = {}
    for column in [index, *(c for c in group if c != index)]:
        values = _column(group[column], f"{name}: {column}")
        if _is_array(group[column]) and "categories" in group[column].attrs:  # anndata 0.7: codes that refer to names
            levels = group[group[column].attrs["categories"]]
            values = _categories(values, _column(levels, name), levels.attrs)
        if values is not None:
            if len(values) != n:
                raise ReadError("wrong_size", f"{name}: the column {column!r} has {len(values)} values for {n} rows")
            columns[column] = values
    return pd.DataFrame(columns).set_index(index)


def _column(node: Any, name: str) -> Any:
    if _is_array(node):
        _stored(node, name)
        values = np.asarray(node[()])
        return _text(values) if values.dtype.kind in "OST" else values if values.ndim == 1 else None
    kind = node.attrs.get("encoding-type")
    if kind == "categorical":
        return _categories(_column(node["codes"], name), _column(node["categories"], name), node.attrs)
    if kind in ("nullable-integer", "nullable-boolean", "nullable-string-array"):
        values, gaps = np.asarray(node["values"][()]), np.asarray(node["mask"][()], bool)
        values = pd.Series(_text(values) if values.dtype.kind in "OST" else values).convert_dtypes()
        return values.mask(gaps).to_numpy(object) if kind == "nullable-string-array" else values.mask(gaps).array
    return None


def _categories(codes: np.ndarray, levels: Any, attributes: Any) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, pd.Index(levels), ordered=bool(attributes.get("ordered", False)))


def _text(values: np.ndarray) -> np.ndarray:
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()], dtype=object)


# -- WSIData, SpatialData ----------------------------------------------------------------------------------------------


def _with_tiles(found: Described, path: Path) -> Described:
    """Add ``x, y`` of the tiles that a table speaks of, joined by their ids, where the store keeps them as columns."""
    import pyarrow.parquet as pq

    region, key = found.facts.get("region"), found.facts.get("instance_key")
    shapes = path / "shapes" / str(region) / "shapes.parquet"
    if {"x", "y"} & set(found.obs) or key not in found.obs or not shapes.is_file():
        return found
    with pq.ParquetFile(shapes) as file:
        names = file.schema_arrow.names
        if not {key, "x", "y"} <= set(names):
            return found
        tiles = file.read(columns=[key, "x", "y"]).to_pandas().set_index(key)
    if not tiles.index.is_unique:
        raise ReadError("unreadable", f"{shapes} has several tiles of one id")
    here = tiles.reindex(found.obs[key].to_numpy())
    found.obs = found.obs.assign(x=here["x"].to_numpy(), y=here["y"].to_numpy())
    return found
