"""Kendall's tau-b of sparse columns with a target, for shortlists: exact with ties, ``O(n log n)`` a column.

All zeros of a column are one block of ties: pairs of two zeros count nothing, pairs of a zero and an active row are
counted from the sorted target, and only active rows are compared with each other.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError
from biosae.stats.correlation import Columns, as_columns, z_interval
from biosae.stats.inference import FEW, MIN_DRAWS, Inference, linear, rearrangement_skew, skewed_pvalue
from biosae.stats.permutation import null_counts, permutations
from biosae.stats.problem import Problem, Result

MAX_COLUMNS = 500
MAX_EXACT_ROWS = 33
"""Up to here the distribution without ties is listed, as scipy does."""


def _earlier_below(values: np.ndarray) -> np.ndarray:
    """For every place i of integers >= 0 the number of earlier places with a smaller value, ``O(n log max)``.

    From the highest bit down, places are kept sorted by the bits seen so far (stable); where two values first differ,
    the smaller has the 0.
    """
    n = len(values)
    out, order = np.zeros(n, dtype=np.int64), np.arange(n)
    for bit in range(int(values.max(initial=0)).bit_length() - 1, -1, -1):
        here = values[order]
        one = (here >> bit) & 1
        node = here >> (bit + 1)
        first = np.flatnonzero(np.r_[True, node[1:] != node[:-1]])
        length = np.diff(np.r_[first, n])
        start = np.repeat(first, length)
        zeros = np.r_[0, np.cumsum(1 - one)]
        before = zeros[:-1] - zeros[start]
        out[order] += one * before
        inside = np.repeat(zeros[first + length] - zeros[first], length)
        place = start + np.where(one, inside + np.arange(n) - start - before, before)
        order[place] = order.copy()
    return out


def concordance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``s_i = sum_j sign(x_i - x_j) sign(y_i - y_j)`` of every row, integers (n,)."""
    n = len(x)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    a = np.unique(x, return_inverse=True)[1].ravel()
    b = np.unique(y, return_inverse=True)[1].ravel()
    below = np.zeros(n, dtype=np.int64)  # of rows with smaller x: those with smaller y less those with larger y
    down, up = np.lexsort((-b, a)), np.lexsort((b, a))
    below[down] += _earlier_below(b[down])
    below[up] -= _earlier_below(b.max() - b[up])
    everywhere = (2 * stats.rankdata(b) - n - 1).astype(np.int64)
    tied = np.empty(n, dtype=np.int64)  # the same among rows with equal x
    start = np.flatnonzero(np.r_[True, a[up][1:] != a[up][:-1]])
    size = np.diff(np.r_[start, n])
    pair = a[up] * (b.max() + 1) + b[up]
    first = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]])
    count = np.diff(np.r_[first, n])
    middle = np.repeat(2 * first + count, count)  # twice the mean place, from 0, plus 1
    tied[up] = middle - np.repeat(2 * start + size, size)
    return 2 * below - everywhere + tied


def _column(V: Columns, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and values of column j; the other rows are zero."""
    if sp.issparse(V):
        part = slice(V.indptr[j], V.indptr[j + 1])
        return V.indices[part], V.data[part]
    return np.arange(V.shape[0]), V[:, j]


class _Target:
    """A target sorted once for all columns."""

    def __init__(self, y: np.ndarray) -> None:
        self.y = np.unique(y, return_inverse=True)[1].ravel()
        self.count = np.bincount(self.y)
        self.pairs = len(y) - self.count[self.y].astype(np.float64)

    def against(self, rows: np.ndarray) -> np.ndarray:
        """``sum_{j in rows} sign(y_i - y_j)`` of every row i."""
        count = np.bincount(self.y[rows], minlength=len(self.count))
        upto = np.cumsum(count)
        return (2 * upto - count - len(rows))[self.y]

    def scores(self, rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``s_i`` of a column, and sizes of its blocks of ties."""
        n = len(self.y)
        s = np.zeros(n, dtype=np.int64)
        s[rows] = concordance(values, self.y[rows])
        ties = np.unique(values, return_counts=True)[1]
        if len(rows) < n:
            zero = np.ones(n, dtype=bool)
            zero[rows] = False
            s[rows] += (np.sign(values) * self.against(np.flatnonzero(zero))[rows]).astype(np.int64)
            s[zero] -= (self.against(rows[values > 0]) - self.against(rows[values < 0]))[zero]
            ties = np.r_[n - len(rows), ties]
        return s, ties.astype(np.float64)


def _variance(n: int, t: np.ndarray, u: np.ndarray) -> float:
    """Variance of S over all rearrangements, for ties of sizes t and u (Kendall, Rank Correlation Methods, 1970)."""
    one = (n * (n - 1) * (2 * n + 5) - sum((k * (k - 1) * (2 * k + 5)).sum() for k in (t, u))) / 18
    two = (t * (t - 1)).sum() * (u * (u - 1)).sum() / (2 * n * (n - 1))
    three = (t * (t - 1) * (t - 2)).sum() * (u * (u - 1) * (u - 2)).sum() / (9 * n * (n - 1) * (n - 2)) if n > 2 else 0
    return float(one + two + three)


@lru_cache(maxsize=32)
def _inversion_tail(n: int) -> np.ndarray:
    """``P(inversions <= k)`` of a random permutation of n."""
    share = np.ones(1)
    for k in range(2, n + 1):
        share = np.convolve(share, np.full(k, 1.0 / k))
    return np.cumsum(share)


def exact_pvalue(S: np.ndarray, n: int) -> np.ndarray:
    """Two-sided p of S = concordant less discordant pairs without ties, over all ``n!`` orders."""
    discordant = np.round((n * (n - 1) / 2 - np.abs(S)) / 2).astype(int)
    return np.minimum(1.0, 2.0 * _inversion_tail(n)[discordant])


def kendall_columns(V: Columns, y: np.ndarray, codes: np.ndarray | None = None, n_groups: int = 0) -> dict:
    """tau-b, S, its rearrangement variance and the projection error of every column.

    Parameters
    ----------
    V
        Columns (n, m), at most :data:`MAX_COLUMNS`.
    y
        Target (n,).
    codes, n_groups
        Groups of dependent rows; None takes rows as independent.

    Returns
    -------
    dict
        Arrays (m,): ``tau, S, variance, untied`` (no ties at all) and ``se``, the standard error of tau-b from its
        first-order projection on rows (added up within groups), ``phi_i = 2 (s_i/(n-1) - A) / sqrt(B C) - tau ((b_i -
        B) / B + (c_i - C) / C)`` for ``tau = A / sqrt(B C)`` with A, B, C the means over pairs of the product, of x
        unequal and of y unequal.

    Raises
    ------
    InputError
        For more columns.
    """
    n, m = V.shape
    if m > MAX_COLUMNS:
        raise InputError(
            f"Kendall's tau is for shortlists of at most {MAX_COLUMNS} columns and there are {m}; take a part of the "
            "latents, such as adata[:, names], with controls=False, or method='spearman' for all"
        )
    target = _Target(np.asarray(y))
    u = target.count.astype(np.float64)
    all_pairs = n * (n - 1.0)
    C = target.pairs.sum() / all_pairs
    out = {name: np.full(m, np.nan) for name in ("tau", "S", "variance", "se")}
    out["untied"] = np.zeros(m, dtype=bool)
    for j in range(m):
        rows, values = _column(V, j)
        s, t = target.scores(rows, values)
        S = s.sum() / 2
        B = 1 - (t * (t - 1)).sum() / all_pairs
        out["S"][j], out["variance"][j] = S, _variance(n, t, u)
        out["untied"][j] = (t <= 1).all() and (u <= 1).all()
        if not (B > 0 and C > 0):
            continue
        tau = float(np.clip(2 * S / all_pairs / np.sqrt(B * C), -1, 1))
        unequal = np.full(n, n - (t[0] if len(rows) < n else 0.0))
        unequal[rows] = n - _sizes(values)
        influence = 2 * (s / (n - 1) - 2 * S / all_pairs) / np.sqrt(B * C)
        influence -= tau * ((unequal / (n - 1) - B) / B + (target.pairs / (n - 1) - C) / C)
        if codes is not None:
            influence = np.bincount(codes, weights=influence, minlength=n_groups)
        k = len(influence)
        out["tau"][j], out["se"][j] = tau, np.sqrt(k / max(k - 1, 1) * (influence**2).sum()) / n
    return out


def _sizes(values: np.ndarray) -> np.ndarray:
    """Rows that share the value of each row."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return count[place.ravel()]


def kendall_tau(X: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """tau-b of every column of X (n, m) with y (n,), and its asymptotic p for independent rows.

    As ``scipy.stats.kendalltau(method="asymptotic")``: ``z = S / sqrt(Var S)``, ties corrected, no continuity.

    Returns
    -------
    dict
        ``tau, statistic`` (z), ``p``, each (m,); NaN for constant columns.
    """
    found = kendall_columns(as_columns(X), np.asarray(y, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(np.isnan(found["tau"]), np.nan, found["S"] / np.sqrt(found["variance"]))
    return {"tau": found["tau"], "statistic": z, "p": 2 * stats.norm.sf(np.abs(z))}


def kendall(problem: Problem) -> Result:
    """Method ``kendall`` of ``associate``: tau-b of a number, or of two classes coded 0 and 1.

    Independent units: permutation below 20 units; exact up to 33 without ties; else normal with ties corrected, not
    below the tail that the skewness of the rank score gives. Dependent units: the p of the group score of the product
    of ranks, which is the first-order projection of S where there is no association, and not below the free p. Interval
    on Fisher's z from the projection error, not narrower than that of independent pairs, ``sqrt(0.437 / (n - 4))``
    (Fieller, Hartley and Pearson, Biometrika 44, 470, 1957).
    """
    groups, n = problem.groups, len(problem.y)
    found = kendall_columns(problem.V, problem.y, groups.codes, groups.n)
    tau = found["tau"]
    blocks = problem.blocks(rank=True)
    inference = linear(blocks, groups, rank_sum=True, **problem.options())
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(problem.testable, found["S"] / np.sqrt(found["variance"]), np.nan)
    skew = rearrangement_skew(blocks)
    free = skewed_pvalue(2 * stats.norm.sf(np.abs(z)), z, skew, normal=True)
    side = skewed_pvalue(stats.norm.sf(np.abs(z)), z, skew, normal=True, sides=1)
    if groups.codes is not None:
        inference.p, inference.p_side = np.maximum(inference.p, free), np.maximum(inference.p_side, side)
        inference.how += "; not below the free p of tau"
    elif n < FEW:
        _permuted(problem, found, inference)
    else:
        inference.statistic, inference.p, inference.p_side = z, free, side
        inference.how = "normal, ties corrected, skewness corrected"
        untied = found["untied"] & problem.testable
        if n <= MAX_EXACT_ROWS and untied.any() and problem.units_blocks is None:
            inference.p[untied] = exact_pvalue(found["S"][untied], n)
            inference.p_side[untied] = inference.p[untied] / 2
            inference.how += "; exact where untied"
    inference.p_maxt = np.maximum(inference.p_maxt, inference.p)
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.fmax(found["se"] / (1 - tau**2), np.sqrt(0.437 / (n - 4)) if n > 4 else np.nan)
    critical = stats.t.ppf(0.975, max(groups.n - 1, 1)) if groups.codes is not None else stats.norm.ppf(0.975)
    low, high = z_interval(tau, critical * se)
    return Result(tau, low, high, inference)


def _permuted(problem: Problem, found: dict, inference: Inference) -> None:
    """p of fewer than 20 units from rearrangements of the target, counted on tau itself."""
    n, V = len(problem.y), problem.V
    dense = V.toarray() if sp.issparse(V) else V
    draws = permutations(
        problem.y, blocks=problem.units_blocks, n_draws=max(problem.n_permutations, MIN_DRAWS),
        random_state=problem.random_state,
    )  # fmt: skip
    i, j = np.triu_indices(n, 1)
    A = np.sign(dense[i] - dense[j])
    scale = np.where(found["variance"] > 0, np.sqrt(found["variance"]), np.inf)
    observed = np.where(problem.testable, found["S"] / scale, np.nan)
    p, joint, side = null_counts(observed, draws, lambda Y: A.T @ np.sign(Y[i] - Y[j]) / scale[:, None])
    inference.statistic, inference.p, inference.p_side = observed, p, side
    inference.p_maxt = joint if problem.n_permutations else np.full_like(p, np.nan)
    inference.how = f"permutation, {draws.describe}"
