"""Kernels on sparse columns in numpy and scipy: what each computes, and where numba is absent.

Columns are a ``csc_matrix`` (n, m) in float64 with sorted rows and without stored zeros (:func:`as_columns`).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def _column_of(V: sp.csc_matrix) -> np.ndarray:
    return np.repeat(np.arange(V.shape[1]), np.diff(V.indptr))


def members(codes: np.ndarray, n_groups: int) -> sp.csr_matrix:
    """Membership (n_groups, n): 1 where row i belongs to group g."""
    n = len(codes)
    return sp.csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(n_groups, n))


def order(V: sp.csc_matrix) -> np.ndarray:
    """Places of the entries, column by column, from the smallest value to the largest (nnz,)."""
    return np.lexsort((V.data, _column_of(V))).astype(np.int32)


def ranks(V: sp.csc_matrix, order: np.ndarray) -> np.ndarray:
    """Average ranks of the entries (nnz,), all zeros one tie, shifted so that the rank of zero is 0."""
    n, m = V.shape
    out = np.empty(V.nnz)
    if V.nnz == 0:
        return out
    column = _column_of(V)
    nnz = np.diff(V.indptr)
    value, where = V.data[order], column[order]
    starts = np.flatnonzero(np.r_[True, (value[1:] != value[:-1]) | (where[1:] != where[:-1])])
    length = np.diff(np.r_[starts, len(value)])
    average = np.repeat(starts + (length + 1) / 2.0 - V.indptr[where[starts]], length)
    zeros = n - nnz
    negative = np.bincount(column, weights=V.data < 0, minlength=m)
    average += np.where(value > 0, zeros[where], 0)
    out[order] = average - (negative + (zeros + 1) / 2.0)[where]
    return out


def moments(V: sp.csc_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column means, and sums of squares and of cubes about them; 0 for a column that has one value in all rows."""
    n, m = V.shape
    nnz, column = np.diff(V.indptr), _column_of(V)
    mean = np.bincount(column, weights=V.data, minlength=m) / n
    centred = V.data - mean[column]
    second = np.bincount(column, weights=centred**2, minlength=m) + (n - nnz) * mean**2
    third = np.bincount(column, weights=centred**3, minlength=m) - (n - nnz) * mean**3
    for j in np.flatnonzero((nnz == n) & (nnz > 0)):
        values = V.data[V.indptr[j] : V.indptr[j + 1]]
        if (values == values[0]).all():
            second[j] = third[j] = 0.0
    return mean, second, third


def product(V: sp.csc_matrix, Y: np.ndarray) -> np.ndarray:
    """``V'Y`` (m, b) in the type of Y (n, b)."""
    return np.asarray(V.T.astype(Y.dtype, copy=False) @ Y)


def rearranged(V: sp.csc_matrix, e: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``V'Y`` (m, b) of the rearranged target ``Y_it = e[index_it]``, ``index`` (n, b), in the type of e (n,)."""
    return product(V, e[index])


def group_sums(V: sp.csc_matrix, weight: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """``sum_{i in g} w_i x_ij`` (G, m)."""
    n = len(codes)
    A = sp.csr_matrix((weight, (codes, np.arange(n))), shape=(n_groups, n))
    return np.asarray((A @ V).todense())


def groups_firing(V: sp.csc_matrix, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Number of groups with an entry in each column (m,)."""
    fired = members(codes, n_groups) @ (V != 0).astype(np.float64)
    return np.asarray((fired > 0).sum(axis=0)).ravel()


def group_products(
    E: np.ndarray, codes: np.ndarray, n_groups: int, Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Within every group ``sum Q_ik E_it`` (G, K, T), ``sum Q_ik Q_il`` (G, K, K) and ``sum E_it^2`` (G, T)."""
    A = members(codes, n_groups)
    EQ = np.stack([A @ (E * Q[:, [k]]) for k in range(Q.shape[1])], axis=1)
    QQ = np.stack([A @ (Q * Q[:, [k]]) for k in range(Q.shape[1])], axis=1)
    return np.ascontiguousarray(EQ), np.ascontiguousarray(QQ), np.ascontiguousarray(A @ E**2)


def scores(
    V: sp.csc_matrix, E: np.ndarray, codes: np.ndarray, n_groups: int, Q: np.ndarray, coefficient: np.ndarray
) -> dict[str, np.ndarray]:
    """Sums over groups of the scores ``s_g = sum_{i in g} x~_i e_i``, x~ the column less its part in the basis Q.

    With ``x2_g = sum_{i in g} x~_i^2`` and ``e2_g = sum_{i in g} e_i^2``, each (m, T): ``total`` sum s, ``squares`` sum
    s^2, ``about`` sum (s - mean)^2, ``with_x`` sum s x2, ``with_e`` sum s e2, ``xe`` sum x2 e2; ``xx`` sum x2^2 (m,)
    and ``ee`` sum e2^2 (T,). The scores themselves (G, m, T) are never held.

    Parameters
    ----------
    V, E
        Columns (n, m) and residual targets (n, T).
    codes
        Group of every row.
    Q, coefficient
        Orthonormal basis (n, K) of what was adjusted for, and ``Q'V`` (K, m).
    """
    EQ, QQ, share = group_products(E, codes, n_groups, Q)
    A = members(codes, n_groups)
    X2 = np.asarray((A @ V.multiply(V)).todense()) + np.einsum(
        "gkl,km,lm->gm", QQ, coefficient, coefficient, optimize=True
    )
    for k in range(Q.shape[1]):
        X2 -= 2.0 * group_sums(V, Q[:, k], codes, n_groups) * coefficient[k]
    X2 = np.maximum(X2, 0.0)
    m, T = V.shape[1], E.shape[1]
    out = {name: np.empty((m, T)) for name in ("total", "squares", "about", "with_x", "with_e", "xe")}
    for t in range(T):
        S = group_sums(V, E[:, t], codes, n_groups) - EQ[:, :, t] @ coefficient
        out["total"][:, t] = S.sum(axis=0)
        out["squares"][:, t] = (S**2).sum(axis=0)
        out["about"][:, t] = ((S - S.mean(axis=0)) ** 2).sum(axis=0)
        out["with_x"][:, t] = (S * X2).sum(axis=0)
        out["with_e"][:, t] = share[:, t] @ S
        out["xe"][:, t] = share[:, t] @ X2
    return out | {"xx": (X2**2).sum(axis=0), "ee": (share**2).sum(axis=0)}


def _components(V: sp.csc_matrix, label: np.ndarray) -> tuple[sp.csc_matrix, sp.csc_matrix]:
    """Of positives and of negatives: rank among all rows less rank among rows of the class, 0 where the code is 0."""

    def ranked(W: sp.csc_matrix) -> sp.csc_matrix:
        return sp.csc_matrix((ranks(W, order(W)), W.indices, W.indptr), shape=W.shape)

    every, rows = ranked(V).tocsr(), V.tocsr()
    out = []
    for own in (label, ~label):
        mine = sp.csc_matrix(rows[own])
        mine.sort_indices()
        out.append(sp.csc_matrix(every[own]) - ranked(mine))
    return out[0], out[1]


def delong(V: sp.csc_matrix, order: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of squares about their mean of ``n0 V10`` over positives and of ``n1 V01`` over negatives, (m, T) each.

    ``V10`` and ``V01`` are the structural components of the AUROC (DeLong et al., Biometrics 44, 837, 1988): shares of
    the other class below a positive, and above a negative. ``labels`` (n, T) is 1 for positives, else 0.
    """
    out = np.empty((2, V.shape[1], labels.shape[1]))
    for t, label in enumerate(labels.T.astype(bool)):
        for side, component in enumerate(_components(V, label)):
            out[side, :, t] = moments(component)[1]
    return out[0], out[1]


def delong_groups(
    V: sp.csc_matrix, order: np.ndarray, labels: np.ndarray, codes: np.ndarray, n_groups: int
) -> np.ndarray:
    """Sum over groups of squared influence on the AUROC (m, T) (Obuchowski, Biometrics 53, 567, 1997)."""
    out = np.empty((V.shape[1], labels.shape[1]))
    for t, label in enumerate(labels.T.astype(bool)):
        n1 = int(label.sum())
        influence = 0.0
        for own, component, sign in zip((label, ~label), _components(V, label), (1.0, -1.0)):
            A = members(codes[own], n_groups)
            size = np.asarray(A.sum(axis=1))
            influence = influence + sign * (np.asarray((A @ component).todense()) - size * moments(component)[0])
        out[:, t] = ((influence / (n1 * (len(label) - n1))) ** 2).sum(axis=0)
    return out


def exceed(
    null: np.ndarray, order: np.ndarray, threshold: np.ndarray, sign: np.ndarray, step_down: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many draws reach the observed statistic: of the column itself, in the maximum, and in its direction.

    Parameters
    ----------
    null
        Statistics of the draws (m, b).
    order, threshold, sign
        Tested columns from the largest observed statistic down, its size, and its sign.
    step_down
        True takes the maximum over the column and those after it in ``order``; False over all of ``order``.
    """
    signed = np.nan_to_num(null)[order]
    side = (signed * sign[:, None] >= threshold[:, None]).sum(axis=1)
    size = np.abs(signed)
    own = (size >= threshold[:, None]).sum(axis=1)
    if step_down:
        top = np.maximum.accumulate(size[::-1], axis=0)[::-1]
        return own, (top >= threshold[:, None]).sum(axis=1), side
    top = np.sort(size.max(axis=0))
    return own, len(top) - np.searchsorted(top, threshold, side="left"), side


def shuffle(rows: np.ndarray, starts: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Rearrangements (n, b) of row numbers, each row among those of its part, by Fisher and Yates.

    Parameters
    ----------
    rows, starts
        Row numbers part by part, and where each part starts (with the end).
    uniform
        Random numbers in [0, 1), (b, n).
    """
    b = len(uniform)
    place = np.repeat(rows.astype(np.int32)[:, None], b, axis=1)
    size, draw = np.diff(starts), np.arange(b)
    for last in range(int(size.max(initial=0)) - 1, 0, -1):
        first = starts[:-1][size > last][:, None]
        k = first + (uniform[:, first[:, 0] + last].T * (last + 1)).astype(np.int64)
        here, there = place[first + last, draw], place[k, draw]
        place[k, draw], place[first + last, draw] = here, there
    out = np.empty_like(place)
    out[rows] = place
    return out
