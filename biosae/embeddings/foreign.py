"""Files of embeddings made elsewhere, one function a format: what is in them, and their rows block by block.

A file is first described (:func:`look`), which reads no row, and then read (:func:`blocks`). Stated sizes are held
against the size of the file before anything is allocated.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.embeddings.described import IDS, Described, as_ids, checked, pick, with_coords
from biosae.embeddings.hierarchy import look_hierarchy, open_hierarchy
from biosae.errors import BiosaeError, InputError

HDF5 = (".h5", ".hdf5", ".h5ad")
SUFFIXES = (*HDF5, ".npy", ".npz", ".parquet", ".pq", ".zarr")


def look(path: str | os.PathLike, *, key: str | None = None, id: str | None = None) -> Described:
    """Describe a file without reading its rows.

    Parameters
    ----------
    path
        HDF5, AnnData, ``.npy``, ``.npz``, Parquet or zarr, by its ending.
    key
        Data set, ``obsm`` entry, array or column(s) that hold the embeddings; None takes the only candidate.
    id
        Data set, array or column of the row ids.

    Raises
    ------
    InputError
        If the file offers several candidates, or none of that name.
    ReadError
        If the file is missing, damaged, or of a kind that is not read (pickled objects).
    """
    path = Path(path)
    return _call(path, lambda: _format(path)[0](path, key, id))


def blocks(path: str | os.PathLike, described: Described, rows: int) -> Iterator[np.ndarray]:
    """Rows in order, ``(up to rows, dim)`` in the dtype of the file.

    Raises
    ------
    ReadError
        If the file is damaged.
    """
    path = Path(path)
    stream = _call(path, lambda: _format(path)[1](path, described, rows))
    while True:
        block = _call(path, lambda: next(stream, None))
        if block is None:
            return
        if block.shape[1] != described.dim:
            raise ReadError("wrong_size", f"{path.name} holds vectors of {block.shape[1]} and of {described.dim}")
        yield block


def _call(path: Path, do: Callable[[], Any]) -> Any:
    """Whatever a library raises on a damaged file becomes a ReadError."""
    try:
        return do()
    except BiosaeError:
        raise
    except FileNotFoundError:
        raise ReadError("missing", f"no file {path}") from None
    except MemoryError:
        raise ReadError("unreadable", f"{path.name} states sizes that do not fit into memory") from None
    except Exception as error:  # h5py, numpy, zipfile, pyarrow and zarr have many
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        short = any(word in why.lower() for word in ("truncated", "eof", "too small", "larger than", "not a zip"))
        raise ReadError("truncated" if short else "unreadable", f"{path.name}: {why}") from None


def _format(path: Path) -> tuple[Callable, Callable]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise ReadError("missing", f"no file {path}")
    if path.is_file() and path.stat().st_size == 0:
        raise ReadError("empty", f"{path.name} has 0 bytes")
    found = {
        ".npy": (_look_npy, _npy), ".npz": (_look_npz, _npz),
        ".parquet": (_look_parquet, _parquet), ".pq": (_look_parquet, _parquet), ".zarr": (_look_tree, _tree),
        **dict.fromkeys(HDF5, (_look_tree, _tree)),
    }.get(suffix)  # fmt: skip
    if found is None:
        raise InputError(f"{path.name} is none of {', '.join(SUFFIXES)}; write the embeddings in one of these formats")
    return found


# -- numpy -------------------------------------------------------------------------------------------------------------


def _look_npy(path: Path, key: str | None, id: str | None) -> Described:
    data = np.load(path, mmap_mode="r", allow_pickle=False)
    n, dim, one = checked(data.shape, data.dtype, path.name)
    return Described(n, dim, data.dtype, None, None, pd.DataFrame(index=range(n)), one)


def _npy(path: Path, described: Described, rows: int) -> Iterator[np.ndarray]:
    data = np.atleast_2d(np.load(path, mmap_mode="r", allow_pickle=False))
    for start in range(0, described.n, rows):
        yield np.asarray(data[start : start + rows])


def _member(archive: zipfile.ZipFile, name: str) -> tuple[Any, tuple[int, ...], bool, np.dtype]:
    """Stream at the first value of an array in an ``.npz``, with its shape, order and dtype, held against its size."""
    entry = archive.getinfo(f"{name}.npy")
    stream = archive.open(entry)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(stream)
    size = int(np.prod([int(s) for s in shape], dtype=object)) * dtype.itemsize
    if not dtype.hasobject and size + stream.tell() != entry.file_size:
        raise ReadError("truncated", f"{name} states {size} bytes, its entry holds {entry.file_size - stream.tell()}")
    if entry.file_size > 1032 * max(entry.compress_size, 1) + 1024:  # more than deflate can
        raise ReadError("unreadable", f"{name} states {entry.file_size} bytes of {entry.compress_size}")
    return stream, shape, fortran, dtype


def _whole(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    stream, shape, fortran, dtype = _member(archive, name)
    with stream:
        if dtype.hasobject:
            raise ReadError(
                "unsupported", f"{name} holds Python objects (pickle); save ids as text: np.array(ids, str)"
            )
        data = np.frombuffer(stream.read(), dtype)
    return data.reshape(shape, order="F" if fortran else "C")


def _look_npz(path: Path, key: str | None, id: str | None) -> Described:
    with zipfile.ZipFile(path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        heads = {}
        for name in names:
            stream, *head = _member(archive, name)
            stream.close()
            heads[name] = head
        wide = [n for n, (shape, _, dtype) in heads.items() if n != "coords" and len(shape) == 2 and dtype.kind == "f"]
        if key is None and "features" in wide:
            key = "features"
        where = pick(names if key is not None else wide, key, path, "array")
        n, dim, one = checked(heads[where][0], heads[where][2], f"{path.name}[{where!r}]")
        ids = next((name for name in ([id] if id else IDS) if name in names), None)
        if id is not None and ids is None:
            raise InputError(f"{path.name} has no array {id!r} of ids; it has {', '.join(map(repr, names))}")
        found = None if ids is None else as_ids(_whole(archive, ids), f"{path.name}[{ids!r}]")
        obs = pd.DataFrame(index=range(n))
        if "coords" in names and not one:
            obs = with_coords(_whole(archive, "coords"), n, path.name)
    return Described(n, dim, heads[where][2], where, found, obs, one)


def _npz(path: Path, described: Described, rows: int) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        stream, shape, fortran, dtype = _member(archive, described.where)
        with stream:
            if fortran:
                data = np.frombuffer(stream.read(), dtype).reshape(shape, order="F")
                yield from (data[a : a + rows] for a in range(0, described.n, rows))
                return
            for start in range(0, described.n, rows):
                count = min(rows, described.n - start)
                raw = stream.read(count * described.dim * dtype.itemsize)
                yield np.frombuffer(raw, dtype).reshape(count, described.dim)


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _look_parquet(path: Path, key: str | None, id: str | None) -> Described:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        lists = [f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_fixed_size_list(f.type)]
        where: Any = _numbered(schema, key)
        if key in lists or (key is None and len(lists) == 1):
            where = key or lists[0]
            first = next(file.iter_batches(batch_size=1, columns=[where]), None)
            if first is None or first.num_rows == 0:
                raise InputError(f"{path.name} has no rows")
            vector = first.column(0).flatten()
            dim, dtype = len(vector), np.dtype(vector.type.to_pandas_dtype())
        elif where:
            dim = len(where)
            dtype = np.result_type(*{schema.field(c).type.to_pandas_dtype() for c in where})
        else:
            floats = [f.name for f in schema if pa.types.is_floating(f.type)]
            raise InputError(
                f"which columns of {path.name} hold the embeddings? Pass key= a list column or the part of the names "
                f"in front of the numbers; it has list columns {lists}, numbers {floats[:8]}"
            )
        checked((n, dim), dtype, f"{path.name}[{where!r}]")
        used = set(where) if isinstance(where, list) else {where}
        others = [c for c in schema.names if c not in used and c not in lists]
        obs = file.read(columns=others).to_pandas().reset_index()
    obs = obs.drop(columns=[c for c in ("index", "level_0", "__index_level_0__") if c in obs and c != id])
    column = id or next((c for c in IDS if c in obs), None)
    if id is not None and id not in obs:
        raise InputError(f"{path.name} has no column {id!r} of ids; it has {', '.join(map(repr, obs.columns))}")
    ids = None if column is None else as_ids(obs.pop(column).to_numpy(object), f"{path.name}[{column!r}]")
    return Described(n, dim, dtype, where, ids, obs)


def _numbered(schema: Any, key: str | None) -> list[str]:
    """Float columns that share a beginning and end in a number, in order of the numbers; [] if that is not one set."""
    import pyarrow as pa

    sets: dict[str, list[tuple[int, str]]] = {}
    for column in schema:
        stem = column.name.rstrip("0123456789")
        if pa.types.is_floating(column.type) and stem != column.name:
            sets.setdefault(stem, []).append((int(column.name[len(stem) :]), column.name))
    if key is None:
        wide = [s for s, members in sets.items() if len(members) > 1]
        key = wide[0] if len(wide) == 1 else None
    return [name for _, name in sorted(sets.get(key, []))]


def _parquet(path: Path, described: Described, rows: int) -> Iterator[np.ndarray]:
    import pyarrow.parquet as pq

    columns = described.where if isinstance(described.where, list) else [described.where]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            if isinstance(described.where, list):
                yield np.column_stack([batch.column(c).to_numpy(zero_copy_only=False) for c in columns])
                continue
            column = batch.column(0)
            lengths = np.unique(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
            if column.null_count or lengths.tolist() != [described.dim]:
                raise ReadError("wrong_size", f"{path.name}: vectors of {lengths.tolist()} numbers in one column")
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, described.dim)


# -- HDF5 and zarr -----------------------------------------------------------------------------------------------------


def _look_tree(path: Path, key: str | None, id: str | None) -> Described:
    return look_hierarchy(path, key, id)


def _tree(path: Path, described: Described, rows: int) -> Iterator[np.ndarray]:
    with open_hierarchy(path) as root:
        data = root[described.where]
        if described.one:
            yield np.asarray(data[()])[None, :]
            return
        for start in range(0, described.n, rows):
            yield np.asarray(data[start : start + rows])
