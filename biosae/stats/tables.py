"""Tables of two by two: the conditional odds ratio with exact and mid-p intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

from biosae.errors import InputError

MAX_STEPS = 200


def odds_ratio_exact(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, *, level: float = 0.95, mid_p: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Odds ratio given the margins, and its exact interval, for many tables at once.

    Given its margins the cell ``a`` has Fisher's noncentral hypergeometric distribution ``P(k) ~ C(n1, k) C(n0, K - k)
    psi^k``. The estimate is the ``psi`` with mean ``a``; the lower bound the one with ``P(A >= a) = alpha / 2``, the
    upper with ``P(A <= a) = alpha / 2`` (Cornfield 1956; as ``fisher.test`` of R). ``mid_p`` counts half of ``P(A =
    a)``, which makes the interval shorter and its coverage near, not above, the level (Berry and Armitage, The
    Statistician 44, 417, 1995).

    Parameters
    ----------
    a, b, c, d
        Counts (m,), rows of the tables ``[[a, b], [c, d]]``.
    level
        Of the interval.
    mid_p
        Half of the observed table's probability.

    Returns
    -------
    tuple
        Estimate (0 or infinite where a cell of its diagonal is 0), lower and upper bound, each (m,); NaN where a margin
        is 0.

    Raises
    ------
    InputError
        For counts that are negative or not whole.
    """
    counts = np.stack([np.asarray(x, dtype=np.float64) for x in (a, b, c, d)], axis=-1)
    if not ((counts >= 0) & (counts == np.floor(counts)) & np.isfinite(counts)).all():
        raise InputError("the cells of a table must be whole counts of 0 or more")
    tables = counts.astype(np.int64)
    unique, place = np.unique(tables.reshape(-1, 4), axis=0, return_inverse=True)
    out = np.full((3, len(unique)), np.nan)
    margins = np.column_stack([unique[:, :2].sum(axis=1), unique[:, 2:].sum(axis=1), unique[:, [0, 2]].sum(axis=1)])
    for margin in np.unique(margins, axis=0):
        here = np.flatnonzero((margins == margin).all(axis=1))
        n1, n0, K = (int(x) for x in margin)
        support = np.arange(max(0, K - n0), min(n1, K) + 1)
        if len(support) < 2:
            continue
        weight = -special.gammaln(support + 1) - special.gammaln(n1 - support + 1)
        weight = weight - special.gammaln(K - support + 1) - special.gammaln(n0 - K + support + 1)
        for chunk in np.array_split(here, max(1, len(here) * len(support) // 2_000_000)):
            out[:, chunk] = _solve(unique[chunk], support, weight - weight.max(), (1 - level) / 2, mid_p)
    shape = tables.shape[:-1]
    return tuple(row[place.ravel()].reshape(shape) for row in out)


def conditional_pvalue(both: np.ndarray, first: np.ndarray, second: np.ndarray, size: np.ndarray) -> float:
    """Exact test that two things are independent within strata, given the margins of every stratum.

    Without association the cell of stratum s is hypergeometric, and the sum of the cells has the convolution of these
    distributions. p is the probability of all sums that are not likelier than the observed one: Fisher's test for one
    stratum, the exact Mantel-Haenszel test for several (``mantelhaen.test(exact=TRUE)`` of R).

    Parameters
    ----------
    both, first, second, size
        Samples of every stratum (k,) with both, with the first, with the second, and all.

    Returns
    -------
    float
    """
    of_sum, lowest = np.ones(1), 0
    for a, b, n in zip(first, second, size):
        k = np.arange(max(0, a + b - n), min(a, b) + 1)
        lowest += k[0]
        log = _log_choose(a, k) + _log_choose(n - a, b - k) - _log_choose(n, b)
        of_sum = np.convolve(of_sum, np.exp(log))
    observed = of_sum[int(np.sum(both)) - lowest]
    return float(min(1.0, of_sum[of_sum <= observed * (1 + 1e-7)].sum()))


def _log_choose(n: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _solve(tables: np.ndarray, support: np.ndarray, weight: np.ndarray, tail: float, mid_p: bool) -> np.ndarray:
    """Estimate and bounds (3, t) of tables (t, 4) with the same margins."""
    a = tables[:, 0]
    lowest, highest = a == support[0], a == support[-1]
    inner = ~lowest & ~highest
    filled = tables + 0.5
    near = np.log(filled[:, 0] * filled[:, 3] / filled[:, 1] / filled[:, 2])
    half = -special.ndtri(tail) * np.sqrt((1 / filled).sum(axis=1))
    theta = np.where(lowest, -np.inf, np.inf)
    theta[inner] = _root(lambda t, own: _mean_gap(t, own, support, weight), a[inner], near[inner])
    own = 0.5 if mid_p else 1.0
    low, high = np.full(len(a), -np.inf), np.full(len(a), np.inf)
    kept = np.where(support == a[:, None], own, support > a[:, None])
    low[~lowest] = _root(
        lambda t, k: _tail_gap(t, k, support, weight, tail), kept[~lowest], (near - half)[~lowest]
    )  # fmt: skip
    kept = np.where(support == a[:, None], own, support < a[:, None])[:, ::-1]  # the same with the columns exchanged
    high[~highest] = -_root(
        lambda t, k: _tail_gap(t, k, -support[::-1], weight[::-1], tail), kept[~highest], -(near + half)[~highest]
    )  # fmt: skip
    return np.exp(np.stack([theta, low, high]))


def _tilted(theta: np.ndarray, support: np.ndarray, weight: np.ndarray) -> np.ndarray:
    log = theta[:, None] * support
    log += weight
    log -= log.max(axis=1, keepdims=True)
    return np.exp(log, out=log)


def _mean_gap(theta: np.ndarray, a: np.ndarray, support: np.ndarray, weight: np.ndarray) -> tuple:
    """Mean less ``a`` and its slope, the variance."""
    p = _tilted(theta, support, weight)
    total, centred = p.sum(axis=1), support - support.mean()
    mean = p @ centred / total
    return mean - (a - support.mean()), p @ centred**2 / total - mean**2


def _tail_gap(theta: np.ndarray, kept: np.ndarray, support: np.ndarray, weight: np.ndarray, tail: float) -> tuple:
    """``log P(kept) - log tail`` and its slope, the mean of what is kept less the mean of all."""
    p = _tilted(theta, support, weight)
    total, centred = p.sum(axis=1), support - support.mean()
    mean = p @ centred / total
    p *= kept
    inside = np.maximum(p.sum(axis=1), 1e-300)
    return np.log(inside / total / tail), p @ centred / inside - mean


def _root(gap: Callable[[np.ndarray, np.ndarray], tuple], own: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Roots of increasing functions by Newton steps kept within a bracket that shrinks."""
    theta = start.astype(np.float64)
    low, high = np.full(len(own), -np.inf), np.full(len(own), np.inf)
    active = np.arange(len(own))
    for _ in range(MAX_STEPS):
        if not len(active):
            break
        t = theta[active]
        value, slope = gap(t, own[active])
        low[active] = np.where(value < 0, t, low[active])
        high[active] = np.where(value > 0, t, high[active])
        with np.errstate(divide="ignore", invalid="ignore"):
            new = t + np.clip(np.nan_to_num(-value / slope), -4.0, 4.0)
        a, b = low[active], high[active]
        outside = np.isfinite(a) & np.isfinite(b) & ((new <= a) | (new >= b))
        with np.errstate(invalid="ignore"):
            new = np.where(outside, (a + b) / 2, new)
        theta[active] = new
        active = active[np.abs(new - t) > 1e-12 * np.maximum(1.0, np.abs(t))]
    return theta
