"""Adjusted p-values for a family of tests, or a family of families, and intervals of what was selected.

NaN is no test: it stays NaN and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import linalg, optimize, stats

from biosae.errors import InputError, nearest
from biosae.stats.scale import scale_of


def _over_tested(p: ArrayLike, rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    if np.any((p < 0) | (p > 1)):
        raise InputError("p-values must lie in [0, 1]")
    adjusted = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        adjusted[tested] = rule(p[tested])
    return adjusted


def _step_up(p: np.ndarray, scale: float) -> np.ndarray:
    m = len(p)
    order = np.argsort(p, kind="stable")[::-1]
    scaled = scale * m / np.arange(m, 0, -1) * p[order]
    out = np.empty(m)
    out[order] = np.minimum(1.0, np.minimum.accumulate(scaled))
    return out


def bh(p: ArrayLike) -> np.ndarray:
    """Benjamini-Hochberg q-values, ``q_(i) = min_{k >= i} m p_(k) / k``, for independent or positively dependent tests.

    Benjamini and Hochberg, J R Stat Soc B 57, 289 (1995).

    >>> bh([0.01, 0.04, float("nan")]).round(4).tolist()
    [0.02, 0.04, nan]
    """
    return _over_tested(p, lambda q: _step_up(q, 1.0))


def by(p: ArrayLike) -> np.ndarray:
    """Benjamini-Yekutieli q-values, for any dependence: BH times ``sum_{i <= m} 1/i``. Ann Stat 29, 1165 (2001)."""
    return _over_tested(p, lambda q: _step_up(q, float(np.sum(1.0 / np.arange(1, len(q) + 1)))))


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's step-down adjusted p-values (family-wise error, any dependence). Scand J Stat 6, 65 (1979)."""

    def rule(q: np.ndarray) -> np.ndarray:
        m = len(q)
        order = np.argsort(q, kind="stable")
        out = np.empty(m)
        out[order] = np.minimum(1.0, np.maximum.accumulate(np.arange(m, 0, -1) * q[order]))
        return out

    return _over_tested(p, rule)


def bonferroni(p: ArrayLike) -> np.ndarray:
    """Bonferroni adjusted p-values, ``min(1, m p)``."""
    return _over_tested(p, lambda q: np.minimum(1.0, len(q) * q))


def null_share(p: ArrayLike, *, pi0: float | str = 0.5) -> float:
    """Estimated share of true null hypotheses among the p-values, in [1/m, 1]; NaN where there are none.

    Parameters
    ----------
    p
        p-values, NaN left out.
    pi0
        A number lambda in (0, 1): ``#{p > lambda} / (m (1 - lambda))`` (Storey, J R Stat Soc B 64, 479, 2002).
        ``"spline"``: these estimates at lambda = 0.05, 0.10, ..., 0.95, smoothed by a natural cubic spline of 3 degrees
        of freedom and read at 0.95 (Storey and Tibshirani, PNAS 100, 9440, 2003); for hundreds of tests or more.

    Raises
    ------
    InputError
        For a lambda outside (0, 1), or another word.
    """
    p = np.asarray(p, dtype=np.float64)
    p = p[~np.isnan(p)]
    if not len(p):
        return float("nan")
    if pi0 == "spline":
        grid = np.arange(1, 20) * 0.05
        share = _smooth(np.array([(p > cut).mean() / (1 - cut) for cut in grid]), 0.05, df=3.0)[-1]
    elif isinstance(pi0, str) or not 0 < pi0 < 1:
        raise InputError(f"pi0={pi0!r}; give a lambda between 0 and 1, such as 0.5, or 'spline'")
    else:
        share = (p > pi0).mean() / (1 - pi0)
    return float(np.clip(share, 1.0 / len(p), 1.0))


def _smooth(values: np.ndarray, step: float, *, df: float) -> np.ndarray:
    """Cubic smoothing spline at equal steps, ``df`` the trace of the smoother (Green and Silverman 1994)."""
    n = len(values)
    Q = (np.eye(n, n - 2) - 2 * np.eye(n, n - 2, k=-1) + np.eye(n, n - 2, k=-2)) / step
    R = step * (np.eye(n - 2) * 2 / 3 + (np.eye(n - 2, k=1) + np.eye(n - 2, k=-1)) / 6)
    roughness, vectors = linalg.eigh(Q @ linalg.solve(R, Q.T))
    roughness = np.maximum(roughness, 0.0)
    roughness[:2] = 0.0  # straight lines
    log_penalty = optimize.brentq(lambda a: (1 / (1 + np.exp(a) * roughness)).sum() - df, -60, 60, xtol=1e-12)
    return vectors @ ((vectors.T @ values) / (1 + np.exp(log_penalty) * roughness))


def storey(p: ArrayLike, *, pi0: float | str = 0.5) -> np.ndarray:
    """Storey's q-values: BH times the estimated share of true nulls (:func:`null_share`).

    Holds the false discovery rate for independent tests and for many small groups of correlated ones. Where a large
    part of all latents goes together the share of nulls is itself uncertain and the rate is exceeded: 10 % at a nominal
    5 % for two halves of 1,000 tests correlated 0.9 (``"spline"``: 21 %), where BH has 2 %.
    """
    return _over_tested(p, lambda q: _step_up(q, null_share(q, pi0=pi0)))


def hierarchical(p: ArrayLike, families: ArrayLike, *, alpha: float = 0.05) -> pd.DataFrame:
    """Two stages: which families hold anything, then which members of those (targets, then latents of a target).

    Each family has its Simes p, ``min_i n p_(i) / i``. Benjamini-Hochberg over the T families selects R of them; within
    a selected family Benjamini-Hochberg runs at ``alpha R / T``. This holds the false discovery rate of families and
    the expected false discovery proportion, averaged over the selected families, at ``alpha`` (Benjamini and Bogomolov,
    J R Stat Soc B 76, 297, 2014; Yekutieli, JASA 103, 309, 2008). With one family it is Benjamini-Hochberg.

    Parameters
    ----------
    p, families
        p-values and the family that each belongs to, of equal length.
    alpha
        Level of the flags.

    Returns
    -------
    DataFrame
        ``q``: the smallest level at which this test is rejected; ``q_family``: that at which its family is selected;
        ``selected`` (``q_family <= alpha``) and ``rejected`` (``q <= alpha``).

    Raises
    ------
    InputError
        If the lengths differ, or a family has no name.
    """
    p, names = np.asarray(p, dtype=np.float64), pd.Series(np.asarray(families, dtype=object))
    if p.shape != names.shape or names.isna().any():
        raise InputError("families must name the family of every p-value")
    within = np.full(len(p), np.nan)
    codes = pd.factorize(names)[0]
    simes = np.full(codes.max(initial=-1) + 1, np.nan)
    for f in range(len(simes)):
        within[codes == f] = bh(p[codes == f])
        simes[f] = np.fmin.reduce(within[codes == f])  # the smallest BH value is the Simes p
    of_family = bh(simes)
    T = int((~np.isnan(simes)).sum())
    starts = np.unique(of_family[~np.isnan(of_family)])
    q = np.full(len(p), np.nan)
    tested, own = ~np.isnan(p), of_family[codes]
    for start in starts:  # from this level on R families are selected
        R = int((of_family <= start).sum())
        level = np.maximum(start, within * (T / R))
        q = np.where(tested & (own <= start), np.fmin(q, level), q)
    q = np.minimum(q, 1.0)
    return pd.DataFrame({"q": q, "q_family": own, "selected": own <= alpha, "rejected": q <= alpha})


CORRECTIONS: dict[str, Callable[..., np.ndarray]] = {
    "bh": bh, "by": by, "holm": holm, "bonferroni": bonferroni, "storey": storey, "hierarchical": hierarchical,
}  # fmt: skip


def correct(p: ArrayLike, *, correction: str, families: ArrayLike | None = None) -> np.ndarray:
    """Adjust by the name of a correction (``bh by holm bonferroni storey hierarchical``).

    Parameters
    ----------
    p
        All p-values of one question.
    correction
        Name.
    families
        What each belongs to (targets), for ``hierarchical``; the others take all as one family.

    Raises
    ------
    InputError
        For an unknown name, or ``hierarchical`` without families.
    """
    if correction not in CORRECTIONS:
        raise InputError(f"unknown correction {correction!r}; {nearest(correction, CORRECTIONS)}")
    if correction != "hierarchical":
        return CORRECTIONS[correction](p)
    if families is None:
        raise InputError("correction='hierarchical' needs families, the target of every p-value")
    return hierarchical(p, families)["q"].to_numpy()


def fcr_intervals(table: pd.DataFrame, *, q: float = 0.05) -> pd.DataFrame:
    """Intervals of the rows that a screen selected, wide enough for having been selected.

    Of m tested rows the R with ``table["q"] <= q`` get intervals of level ``1 - R q / m``, so that of the intervals
    shown a share of at most q misses on average (Benjamini and Yekutieli, JASA 100, 71, 2005). Ordinary 95 % intervals
    of the best of many miss far more often.

    Parameters
    ----------
    table
        Table of :func:`biosae.stats.associate`; each ``source`` is a family of its own.
    q
        False coverage rate, and the bound on ``table["q"]``.

    Returns
    -------
    DataFrame
        The selected rows with ``fcr_level, fcr_low, fcr_high``. The 95 % interval is stretched on the scale on which it
        is symmetric (Fisher z, logit, logarithm) by the ratio of t quantiles with ``df`` degrees of freedom (column
        ``df`` if there, else ``n_groups - 1``); the binomial bound of a perfect separation is taken at the new level.
        NaN where the table has no interval.

    Raises
    ------
    InputError
        For q outside (0, 1).
    """
    if not 0 < q < 1:
        raise InputError(f"q={q}; give a rate between 0 and 1")
    source = table["source"] if "source" in table else pd.Series("", index=table.index)
    selected = table["q"] <= q
    m = table["p"].notna().groupby(source).transform("sum")
    R = selected.groupby(source).transform("sum")
    out = table[selected].copy()
    out["fcr_level"] = (1 - R * q / m)[selected]
    df = (out["df"] if "df" in out else out["n_groups"] - 1).to_numpy(np.float64)
    tail = (1 - out["fcr_level"].to_numpy()) / 2
    stretch = stats.t.isf(tail, df) / stats.t.isf(0.025, df)
    exact = np.log(tail) / np.log(0.025)  # (alpha / 2)^(1 / n) of perfect separation, at another alpha
    low, high = np.full(len(out), np.nan), np.full(len(out), np.nan)
    for effect in out["effect"].unique():
        there, back, _ = scale_of(effect)
        rows = np.flatnonzero(out["effect"] == effect)
        e, a, b = (out[c].to_numpy(np.float64)[rows] for c in ("estimate", "ci_low", "ci_high"))
        with np.errstate(divide="ignore", invalid="ignore"):
            z = there(e)
            new_low = back(z - stretch[rows] * (z - there(a)))
            new_high = back(z + stretch[rows] * (there(b) - z))
        if effect in ("auroc", "cliffs_delta"):
            scale, shift = (1.0, 0.0) if effect == "auroc" else (2.0, 1.0)
            share, a, b = ((x + shift) / scale for x in (e, a, b))
            new_low = np.where(share == 1, scale * a ** exact[rows] - shift, np.where(share == 0, e, new_low))
            new_high = np.where(share == 0, scale * (1 - (1 - b) ** exact[rows]) - shift, new_high)
            new_high = np.where(share == 1, e, new_high)
        low[rows], high[rows] = new_low, new_high
    out["fcr_low"], out["fcr_high"] = low, high
    return out
