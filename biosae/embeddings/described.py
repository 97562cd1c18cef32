"""What a file of embeddings made elsewhere turns out to hold, and the checks that all formats share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.errors import InputError

IDS = ("sample_id", "ids")  # where a file keeps the ids of its rows, if not told otherwise


@dataclass
class Described:
    """One file of embeddings: ``n`` rows of ``dim`` numbers.

    Attributes
    ----------
    where
        Array, data set or columns that hold the rows.
    ids
        Ids of the rows, None if the file has none.
    obs
        One row a row, without ids; ``x, y`` where the file has coordinates (pixels of level 0).
    one
        The file holds one vector of a whole slide (or patient) rather than rows.
    facts
        Plain facts that the file states.
    spatial
        ``obsm["spatial"]`` of AnnData, ``(n, 2)``; what it measures, and from where, no file states.
    """

    n: int
    dim: int
    dtype: np.dtype
    where: Any
    ids: list[str] | None
    obs: pd.DataFrame
    one: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    spatial: np.ndarray | None = None


def checked(shape: tuple[int, ...], dtype: np.dtype, name: str) -> tuple[int, int, bool]:
    """Rows, width, and whether it is a single vector.

    Raises
    ------
    InputError
        If these are no embeddings.
    ReadError
        ``unsupported`` for Python objects.
    """
    if dtype.hasobject:
        raise ReadError("unsupported", f"{name} holds Python objects (pickle), which are not read; save plain numbers")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(f"{name} holds {dtype}, not float16, float32 or float64; name another with key=")
    if len(shape) == 1:
        return 1, int(shape[0]), True
    if len(shape) != 2:
        raise InputError(f"{name} has {len(shape)} axes {tuple(shape)}; store one vector a row, (rows, width)")
    return int(shape[0]), int(shape[1]), False


def pick(candidates: list[str], key: str | None, path: Path, what: str) -> str:
    """The key if it is there, or the only candidate."""
    if key is not None:
        if key not in candidates:
            raise InputError(f"{path.name} has no {what} {key!r}; it has {', '.join(map(repr, candidates)) or 'none'}")
        return key
    if len(candidates) != 1:
        listed = ", ".join(map(repr, candidates)) or "none"
        raise InputError(f"which {what} of {path.name} holds the embeddings? Pass key=; it has {listed}")
    return candidates[0]


def as_ids(values: Any, name: str) -> list[str]:
    """Row ids as text; numbers that are no whole numbers are refused."""
    array = np.asarray(values)
    if array.dtype.hasobject or array.dtype.kind not in "USTiu" or array.ndim != 1:
        array = np.asarray([v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()])
        if array.dtype.kind not in "Uiu":
            raise InputError(f"{name} holds no ids (text or whole numbers)")
    return [v.decode() if isinstance(v, bytes) else str(v) for v in array.tolist()]


def with_coords(coords: np.ndarray, n: int, name: str) -> pd.DataFrame:
    """Columns ``x, y`` of an ``(n, 2)`` array."""
    if coords.shape != (n, 2):
        raise ReadError("wrong_size", f"{name} has coordinates of shape {coords.shape} for {n} rows")
    return pd.DataFrame({"x": coords[:, 0], "y": coords[:, 1]})
