"""Effect sizes of two or more groups, with intervals: AUROC (DeLong), Cliff's delta, Hedges g, odds ratio, eta
squared.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy.sparse as sp
from scipy import special, stats

from biosae.stats.correlation import Columns, dot, moments, rank_columns


def rows_of(V: Columns, rows: np.ndarray) -> Columns:
    """Rows of a column matrix, in the same container."""
    return sp.csc_matrix(V.tocsr()[rows]) if sp.issparse(V) else V[rows]


def auroc(ranks: Columns, positive: np.ndarray) -> np.ndarray:
    """``P(z1 > z0) + P(z1 = z0) / 2`` of every column from centred or zero-shifted ranks; 0.5 for constant columns."""
    n1 = int(positive.sum())
    n0 = len(positive) - n1
    centred = positive - n1 / len(positive)
    return 0.5 + dot(ranks, centred.astype(np.float64)) / (n1 * n0)


def delong_components(V: Columns, positive: np.ndarray) -> tuple[Columns, Columns]:
    """Structural components of DeLong et al. (Biometrics 44, 837, 1988) up to a constant a column.

    Returns
    -------
    tuple
        For the positives ``n0 V10`` (n1, m) and for the negatives ``-n1 V01`` (n0, m): the rank among all rows less the
        rank among rows of the same class.
    """
    ranks = rank_columns(V)
    out = []
    for rows in (positive, ~positive):
        own = rows_of(V, rows)
        out.append(rows_of(ranks, rows) - rank_columns(own))
    return out[0], out[1]


def delong_variance(V: Columns, positive: np.ndarray) -> np.ndarray:
    """``s^2(V10) / n1 + s^2(V01) / n0`` for every column; NaN if a class has one row."""
    n1 = int(positive.sum())
    n0 = len(positive) - n1
    if min(n0, n1) < 2:
        return np.full(V.shape[1], np.nan)
    d1, d0 = delong_components(V, positive)
    return moments(d1)[1] / (n1 - 1) / n0**2 / n1 + moments(d0)[1] / (n0 - 1) / n1**2 / n0


def delong_groups(V: Columns, positive: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Group sums (G, m) of the influence of each row on the AUROC (Obuchowski, Biometrics 53, 567, 1997)."""
    n1 = int(positive.sum())
    n0 = len(positive) - n1
    total = np.zeros((n_groups, V.shape[1]))
    for rows, component, sign in zip((positive, ~positive), delong_components(V, positive), (1.0, -1.0)):
        member = sp.csr_matrix(
            (np.ones(rows.sum()), (codes[rows], np.arange(rows.sum()))), shape=(n_groups, int(rows.sum()))
        )
        summed = member @ component
        summed = summed.toarray() if sp.issparse(summed) else summed
        size = np.asarray(member.sum(axis=1))
        total += sign * (summed - size * moments(component)[0]) / (n1 * n0)
    return total


def logit_interval(
    a: np.ndarray, variance: np.ndarray, *, critical: float, n_min: int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of an AUROC on the logit scale; where the variance is 0, the exact binomial bound of ``n_min`` trials.

    ``logit(A) -/+ c sqrt(Var) / (A (1 - A))``. Under perfect separation the free bound is ``(alpha/2)^(1/n_min)``
    (Clopper-Pearson with all of the smaller class, or its groups, on one side), never a zero-width interval.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        half = critical * np.sqrt(variance) / (a * (1 - a))
        low, high = special.expit(special.logit(a) - half), special.expit(special.logit(a) + half)
    flat = np.flatnonzero((variance <= 1e-15) | (a <= 0) | (a >= 1))
    if len(flat) and n_min > 0:
        hits, which = np.unique(np.round(a[flat] * n_min), return_inverse=True)  # dead columns all share one
        with np.errstate(invalid="ignore"):
            low[flat] = np.where(hits > 0, stats.beta.ppf((1 - level) / 2, hits, n_min - hits + 1), 0.0)[which]
            high[flat] = np.where(hits < n_min, stats.beta.ppf((1 + level) / 2, hits + 1, n_min - hits), 1.0)[which]
    return low, high


def score_interval(a: np.ndarray, error: np.ndarray, *, critical: float) -> tuple[np.ndarray, np.ndarray]:
    """Areas A0 that a test with ``error`` at 1/2 does not reject: it leaves 1/2 out exactly where that test does.

    ``|A - A0| <= c error sqrt(4 A0 (1 - A0))``: Wilson's interval of a share of ``1 / (4 error^2)`` independent items.
    """
    by = 4 * (critical * error) ** 2  # c^2 over the number of items
    half = np.sqrt(by * a * (1 - a) + by**2 / 4) / (1 + by)
    middle = (a + by / 2) / (1 + by)
    return middle - half, middle + half


@lru_cache(maxsize=64)
def _u_counts(n1: int, n0: int) -> np.ndarray:
    """Number of arrangements for each U = 0 .. n1 n0: coefficients of the Gaussian binomial."""
    counts = np.zeros(n1 * n0 + 1)
    counts[0] = 1.0
    for i in range(1, n1 + 1):  # multiply by (1 - q^(n0+i)) / (1 - q^i)
        up = counts.copy()
        up[n0 + i :] -= counts[: max(len(counts) - n0 - i, 0)]
        for j in range(i, len(up)):
            up[j] += up[j - i]
        counts = up
    return counts


def exact_u_pvalue(u: np.ndarray, n1: int, n0: int) -> np.ndarray:
    """Exact two-sided p of the Mann-Whitney U without ties, twice the smaller tail."""
    tail = np.cumsum(_u_counts(n1, n0)) / special.binom(n1 + n0, n1)
    low = np.minimum(u, n1 * n0 - u)
    return np.minimum(1.0, 2.0 * tail[np.round(low).astype(int)])


def class_moments(V: Columns, positive: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean and centred sum of squares of the positives, then of the negatives."""
    return (*moments(rows_of(V, positive)), *moments(rows_of(V, ~positive)))


def hedges_g(
    m1: np.ndarray, ss1: np.ndarray, n1: int, m0: np.ndarray, ss0: np.ndarray, n0: int, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hedges g, ``(mean1 - mean0) / s_p (1 - 3 / (4 n - 9))``, and its interval by inverting the noncentral t."""
    n = n1 + n0
    df = n - 2
    with np.errstate(divide="ignore", invalid="ignore"):
        d = (m1 - m0) / np.sqrt((ss1 + ss0) / df)
    d = np.where(ss1 + ss0 > 0, d, np.nan)
    correction = 1.0 - 3.0 / (4.0 * n - 9.0)
    scale = np.sqrt(1.0 / n1 + 1.0 / n0)
    t = d / scale
    low = _noncentrality(df, (1 + level) / 2, t) * scale * correction
    high = _noncentrality(df, (1 - level) / 2, t) * scale * correction
    bad = ~np.isfinite(t) | (np.abs(t) > 30)  # the inversion is not reliable there: large-sample form
    se = np.sqrt(1.0 / n1 + 1.0 / n0 + d * d / (2.0 * n)) * correction * special.ndtri((1 + level) / 2)
    g = d * correction
    return g, np.where(bad, g - se, low), np.where(bad, g + se, high)


def _noncentrality(df: float, p: float, t: np.ndarray) -> np.ndarray:
    """Noncentrality at which ``P(T <= t) = p``; two Newton steps on scipy's inverse, which is good to 1e-6 in p."""
    m, h = special.nctdtrinc(df, p, t), 1e-4
    for _ in range(2):
        slope = (special.nctdtr(df, m + h, t) - special.nctdtr(df, m - h, t)) / (2 * h)
        m = m - (special.nctdtr(df, m, t) - p) / slope
    return m


def odds_ratio(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``ad / (bc)`` of firing with Woolf's interval; 0.5 is added to all four cells where any is 0
    (Haldane-Anscombe).
    """
    shift = 0.5 * (np.minimum(np.minimum(a, b), np.minimum(c, d)) == 0)
    a, b, c, d = a + shift, b + shift, c + shift, d + shift
    log_or = np.log(a) + np.log(d) - np.log(b) - np.log(c)
    half = special.ndtri((1 + level) / 2) * np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return np.exp(log_or), np.exp(log_or - half), np.exp(log_or + half)


def fisher_pvalue(a: np.ndarray, n1: int, k: np.ndarray, n: int) -> np.ndarray:
    """Two-sided Fisher exact p: ``a`` firing positives of ``n1`` positives, ``k`` firing rows, ``n`` rows."""
    p = np.empty(len(a))
    for firing in np.unique(k):
        support = np.arange(max(0, firing - (n - n1)), min(firing, n1) + 1)
        pmf = stats.hypergeom.pmf(support, n, n1, firing)
        here = np.flatnonzero(k == firing)
        own = pmf[(a[here] - support[0]).astype(int)]
        order = np.sort(pmf)
        total = np.concatenate([[0.0], np.cumsum(order)])
        p[here] = np.minimum(1.0, total[np.searchsorted(order, own * (1 + 1e-7), side="right")])
    return p


def eta_squared(V: Columns, codes: np.ndarray) -> np.ndarray:
    """``SS_between / SS_total`` of every column for integer class codes; NaN for constant columns."""
    n = len(codes)
    size = np.bincount(codes).astype(np.float64)
    onehot = np.eye(len(size))[codes] - size / n
    ss = moments(V)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ss > 0, (dot(V, onehot) ** 2 / size).sum(axis=1) / ss, np.nan)


def omega_squared(V: Columns, codes: np.ndarray) -> np.ndarray:
    """``(SS_b - (C - 1) MS_w) / (SS_t + MS_w)`` of every column."""
    eta, ss, n, c = eta_squared(V, codes), moments(V)[1], len(codes), int(codes.max()) + 1
    msw = (1 - eta) * ss / (n - c)
    return (eta * ss - (c - 1) * msw) / (ss + msw)
