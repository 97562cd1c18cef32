"""Pearson and Spearman correlation of many columns with one target, on sparse codes, in float64.

A column is never centred in memory: zeros stay zeros. Ranks are stored shifted, so that the rank of zero is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy import special, stats

from biosae.errors import InputError
from biosae.stats.kernels import kernels

Columns = Any
"""``scipy.sparse.csc_matrix`` without stored zeros, or a centred ``numpy.ndarray``; float64, (n, m)."""


def as_columns(X: Any) -> Columns:
    """Codes or dense features (n, m) as float64 columns that the kernels accept.

    Sparse input becomes CSC without stored zeros (a stored zero would form a tie block of its own); dense input is
    centred, which no statistic here depends on and which keeps products accurate when the mean is far from zero.

    Raises
    ------
    InputError
        If a value is NaN or infinite.
    """
    if sp.issparse(X):
        V = sp.csc_matrix(X, dtype=np.float64, copy=True)
        V.sum_duplicates()
        V.eliminate_zeros()
        V.sort_indices()
        values = V.data
    else:
        V = np.array(X, dtype=np.float64)
        values = V
    if not np.isfinite(values).all():
        raise InputError("the codes or embeddings hold NaN or infinite values; leave those samples out")
    if isinstance(V, np.ndarray) and len(V):
        spread = V.max(axis=0) - V.min(axis=0)
        V -= V.mean(axis=0)
        V[:, spread == 0] = 0.0
    return V


def rank_columns(V: Columns) -> Columns:
    """Average ranks down each column, ties exact; sparse columns come back shifted so that zero has rank zero.

    For a sparse column with ``n0`` zeros and ``n_neg`` negative entries all zeros share the rank
    ``n_neg + (n0 + 1) / 2``; cost is ``O(nnz log nnz)``. Dense columns come back centred.
    """
    if not sp.issparse(V):
        return stats.rankdata(V, axis=0) - (V.shape[0] + 1) / 2.0
    use = kernels()
    return sp.csc_matrix((use.ranks(V, use.order(V)), V.indices, V.indptr), shape=V.shape)


def moments3(V: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column means, and sums of squares and of cubes about them, two passes (raw formulas cancel if mean >> sd)."""
    if sp.issparse(V):
        return kernels().moments(V)
    mean = V.mean(axis=0)
    centred = V - mean
    square = centred * centred
    return mean, square.sum(axis=0), np.einsum("ij,ij->j", square, centred)


def moments(V: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Column means and centred sums of squares."""
    return moments3(V)[:2]


def skewness(V: Columns) -> np.ndarray:
    """``sum (x - mean)^3 / (sum (x - mean)^2)^(3/2)`` of every column; NaN for constant columns."""
    _, ss, third = moments3(V)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ss > 0, third / ss**1.5, np.nan)


def n_active(V: Columns) -> np.ndarray:
    """Rows in which each sparse column is not zero; all rows for dense columns."""
    return np.diff(V.indptr) if sp.issparse(V) else np.full(V.shape[1], V.shape[0])


def dot(V: Columns, Y: np.ndarray) -> np.ndarray:
    """``V' Y`` as a dense array (m,) or (m, q)."""
    return np.asarray(V.T @ Y)


def rank_target(y: np.ndarray) -> np.ndarray:
    """Average ranks of a vector, centred."""
    high = y == y.max() if len(y) else np.zeros(0, bool)
    if len(y) and (high | (y == y.min())).all():
        n1 = int(high.sum()) if not high.all() else 0
        return np.where(high, (len(y) - n1) / 2.0, -n1 / 2.0) if n1 else np.zeros(len(y))
    place = np.argsort(y)
    ordered = y[place]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    length = np.diff(np.r_[starts, len(y)])
    out = np.empty(len(y))
    out[place] = np.repeat(starts + (length - 1) / 2.0 - (len(y) - 1) / 2.0, length)
    return out


def correlate(X: Any, y: np.ndarray, *, method: str = "spearman") -> np.ndarray:
    """Correlation of every column of ``X`` (n, m) with ``y`` (n,); NaN for constant columns.

    ``method`` is ``"pearson"`` or ``"spearman"`` (Pearson of average ranks). No inference; see
    :func:`biosae.stats.associate`.
    """
    V, y = as_columns(X), np.asarray(y, dtype=np.float64)
    if method == "spearman":
        V, y = rank_columns(V), rank_target(y)
    y = y - y.mean()
    return ratio(dot(V, y), np.sqrt(moments(V)[1] * (y @ y)))


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a / b`` with NaN where ``b`` is 0, clipped to [-1, 1]: for correlations."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.where(b > 0, a / b, np.nan), -1.0, 1.0)


def t_from_r(r: np.ndarray, df: float) -> np.ndarray:
    """``t = r sqrt(df / (1 - r^2))``; infinite where ``|r| = 1``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return r * np.sqrt(df / (1.0 - r * r))


def t_pvalue(t: np.ndarray, df: float) -> np.ndarray:
    """Two-sided p of Student's t; NaN where ``df < 1``."""
    if df < 1:
        return np.full(np.shape(t), np.nan)
    return 2.0 * special.stdtr(df, -np.abs(t))


def fisher_interval(
    r: np.ndarray, *, n_effective: float, rank: bool, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a correlation by Fisher's z, ``se = 1 / sqrt(n - k - 3)``.

    Parameters
    ----------
    r
        Correlations.
    n_effective
        ``n - k`` (rows less adjusting columns). NaN interval where it is 3 or less.
    rank
        True multiplies the standard error by ``sqrt(1 + r^2 / 2)`` for Spearman (Bonett and Wright, Psychometrika
        65, 23, 2000).
    """
    if n_effective <= 3:
        return np.full_like(r, np.nan), np.full_like(r, np.nan)
    se = np.sqrt((1.0 + r * r / 2.0) if rank else 1.0) / np.sqrt(n_effective - 3.0)
    return z_interval(r, se * special.ndtri(0.5 + level / 2.0))


def z_interval(r: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``tanh(atanh(r) -/+ half)``; where ``|r| = 1`` the interval is that point."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.arctanh(r)
        return np.tanh(z - half), np.tanh(z + half)
