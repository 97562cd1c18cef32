"""Codes larger than memory: rows of a backed or dask-chunked AnnData, read block by block.

Whatever needs every row of every latent at once asks for a block of latents at a time, so that what is held never
exceeds a budget; whatever needs sums over rows adds them up as the rows pass by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from biosae.stats.nested import indicator, is_chunked, largest, per_unit, pool

BUDGET = 2**29
"""Bytes of codes that may be held at once."""
_HELD = 5
"""Copies of a block that the tests make (columns, ranks, order)."""


def row_blocks(X: Any, *, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
    """Blocks of rows of X (n, m) as CSR float64 without stored zeros, with their places among ``rows`` (all by
    default).

    ``rows`` must ascend. Dask arrays come by their own chunks; files in steps far smaller than :data:`BUDGET`.
    """
    n = X.shape[0]
    wanted = None if rows is None else np.asarray(rows)
    for start, stop, block in _dask_rows(X) if hasattr(X, "dask") else _file_rows(X):
        if wanted is None:
            yield np.arange(start, stop), _plain(block())
            continue
        first, last = np.searchsorted(wanted, (start, min(stop, n)))
        if first < last:
            yield np.arange(first, last), _plain(block()[wanted[first:last] - start])


def _dask_rows(X: Any) -> Iterator[tuple[int, int, Any]]:
    if len(X.chunks[1]) > 1:
        X = X.rechunk({1: -1})
    start = 0
    for i, size in enumerate(X.chunks[0]):
        part = X.blocks[i]
        yield start, start + size, lambda part=part: part.compute(scheduler="synchronous")
        start += size


def _file_rows(X: Any) -> Iterator[tuple[int, int, Any]]:
    n, m = X.shape
    step = max(1, min(n, BUDGET // 8 // (12 * max(m // 8, 1))))  # as if an eighth of the latents were active
    for start in range(0, n, step):
        yield start, min(start + step, n), lambda a=start: X[a : min(a + step, n)]


def _plain(block: Any) -> sp.csr_matrix:
    block = sp.csr_matrix(block, dtype=np.float64)
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


def n_active(X: Any, *, rows: np.ndarray | None = None) -> np.ndarray:
    """Rows in which each latent is not zero, (m,)."""
    total = np.zeros(X.shape[1], dtype=np.int64)
    for _, block in row_blocks(X, rows=rows):
        total += np.bincount(block.indices, minlength=X.shape[1])
    return total


def column_blocks(count: np.ndarray, *, budget: int | None = None) -> list[slice]:
    """Ranges of latents whose codes fit into the budget, from the number of active rows of each (m,).

    >>> column_blocks(np.array([5, 5, 5, 5]), budget=10 * 12 * 5)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    most = (BUDGET if budget is None else budget) // (12 * _HELD)
    out, start, held = [], 0, 0
    for j, size in enumerate(count.tolist()):
        if j > start and held + size > most:
            out.append(slice(start, j))
            start, held = j, 0
        held += size
    return [*out, slice(start, len(count))]


def columns_of(X: Any, columns: slice, *, rows: np.ndarray | None = None) -> sp.csc_matrix:
    """A range of latents on all (or some) rows, CSC float64."""
    parts = [block[:, columns] for _, block in row_blocks(X, rows=rows)]
    if not parts:
        return sp.csc_matrix((0, columns.stop - columns.start))
    out = sp.csc_matrix(sp.vstack(parts, format="csr"))
    out.eliminate_zeros()
    return out


def pool_rows(X: Any, codes: np.ndarray, n_groups: int, *, how: str, rows: np.ndarray | None = None) -> sp.csr_matrix:
    """As :func:`biosae.stats.nested.pool`, block by block: holds one block and the units (n_groups, m)."""
    if largest(how):
        blocks = column_blocks(n_active(X, rows=rows))
        parts = [pool(columns_of(X, columns, rows=rows), codes, n_groups, how=how) for columns in blocks]
        return sp.csr_matrix(sp.hstack(parts, format="csr"))
    total = sp.csr_matrix((n_groups, X.shape[1]))
    for places, block in row_blocks(X, rows=rows):
        if how == "fraction_active":
            block.data = np.ones_like(block.data)
        total = total + indicator(codes[places], n_groups) @ block
    return per_unit(sp.csr_matrix(total), np.bincount(codes, minlength=n_groups))


def column_tables(adata: Any) -> Iterator[Any]:
    """The table a range of latents at a time, each in memory; a table in memory as it is."""
    import anndata

    if not is_chunked(adata.X):
        yield adata
        return
    for columns in column_blocks(n_active(adata.X)):
        X = sp.csr_matrix(columns_of(adata.X, columns))
        yield anndata.AnnData(X=X, obs=adata.obs.copy(), var=adata.var.iloc[columns].copy())
