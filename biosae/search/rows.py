"""What is searched: rows of a table, made comparable, and the values of ``obs`` that say whom not to find."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import IdentityError, InputError, nearest

BLOCK = 16_384
"""Dense rows whose squares are added up at a time."""


def unpack(data: Any, use_rep: str, obs: pd.DataFrame | None = None) -> tuple[Any, pd.DataFrame]:
    """Matrix and table of an AnnData, of Embeddings, or of a matrix with ``obs``."""
    from biosae.stats.nested import in_memory

    if hasattr(data, "obsm"):
        if use_rep != "X" and use_rep not in data.obsm:
            raise InputError(f"use_rep={use_rep!r} is unknown; {nearest(use_rep, ['X', *data.obsm])}")
        return in_memory(data).X if use_rep == "X" else data.obsm[use_rep], data.obs
    if hasattr(data, "tokens_per_sample"):
        if data.tokens_per_sample != 1:
            raise InputError("these embeddings hold tokens; embed with a pool, or compare bags of tokens")
        return data.array(), data.obs
    if isinstance(data, pd.DataFrame):
        data, obs = data.to_numpy(), pd.DataFrame(index=data.index) if obs is None else obs.loc[data.index]
    if getattr(data, "ndim", 0) != 2:
        raise InputError(f"expected AnnData, Embeddings or a matrix (rows, columns), found {type(data).__name__}")
    if obs is not None and len(obs) != data.shape[0]:
        raise InputError(f"obs has {len(obs)} rows, the matrix {data.shape[0]}")
    return data, pd.DataFrame(index=pd.RangeIndex(data.shape[0])) if obs is None else obs


def space(data: Any, use_rep: str) -> Any:
    """What makes numbers of two tables comparable: the dictionary of codes, the encoder of embeddings; None unknown."""
    if use_rep == "X" and "decoder" in getattr(data, "varm", ()):
        return np.asarray(data.varm["decoder"])
    if use_rep == "X":
        return getattr(data, "fingerprint", None)
    return data.uns.get("biosae", {}).get("fingerprint") if hasattr(data, "uns") else None


def same_space(a: Any, b: Any) -> None:
    """Raise IdentityError if both are known and differ."""
    if a is None or b is None or isinstance(a, str) != isinstance(b, str) or np.array_equal(a, b):
        return
    what = "embeddings of different encoders or layers" if isinstance(a, str) else "codes of different dictionaries"
    raise IdentityError(f"queries and index hold {what}, whose columns mean different things; encode both alike")


def group_names(values: pd.Series) -> np.ndarray:
    """Values as text, the same for 3, 3.0 and "3": a column that once had a gap names whole numbers with a point."""
    codes, levels = pd.factorize(values.astype(object))
    return np.array([re.sub(r"\.0+$", "", str(level)) for level in levels] or [""], dtype=object)[codes]


def unnamed(values: pd.Series) -> np.ndarray:
    """Rows without a value, or with an empty text."""
    return (values.isna() | (values.astype(str).str.strip() == "")).to_numpy(bool)


def sorted_csr(matrix: sp.csr_matrix) -> sp.csr_matrix:
    matrix = sp.csr_matrix(matrix, copy=True)
    matrix.sum_duplicates()  # also sorts columns
    matrix.eliminate_zeros()
    return matrix


def prepared(matrix: Any, metric: str) -> Any:
    """Float32 or float64 rows, finite, sparse ones in order; for Jaccard 1 where a value is not 0."""
    sparse = sp.issparse(matrix)
    matrix = sorted_csr(matrix.tocsr()) if sparse else np.ascontiguousarray(matrix)
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float32 if matrix.dtype == np.float16 else np.float64)
    if not np.isfinite(matrix.data if sparse else matrix).all():
        raise InputError("rows hold values that are not finite; leave such rows out")
    if metric != "jaccard":
        return matrix
    if sparse:
        matrix.data[:] = 1
        return matrix
    return (matrix != 0).astype(np.float32)


def sides(matrix: Any, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Norm of every row, and what the score needs of it: norm, square or count; sums in order of columns."""
    if sp.issparse(matrix):
        wide = matrix.astype(np.float64)
        square = np.asarray((wide.multiply(wide)).tocsr() @ np.ones(wide.shape[1]))
    else:
        square = np.zeros(len(matrix))
        for start in range(0, len(matrix), BLOCK):
            for column in matrix[start : start + BLOCK].T:
                square[start : start + BLOCK] += np.square(column, dtype=np.float64)
    norm = np.sqrt(square)
    return norm, norm if metric == "cosine" else square
