"""Adjusted p-values for a family of tests. NaN is no test: it stays NaN and is not counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from biosae.errors import InputError, nearest


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


CORRECTIONS: dict[str, Callable[[ArrayLike], np.ndarray]] = {"bh": bh, "by": by, "holm": holm, "bonferroni": bonferroni}


def correct(p: ArrayLike, *, correction: str) -> np.ndarray:
    """Adjust by the name of a correction (``bh by holm bonferroni``).

    Raises
    ------
    InputError
        For an unknown name.
    """
    if correction not in CORRECTIONS:
        raise InputError(f"unknown correction {correction!r}; {nearest(correction, CORRECTIONS)}")
    return CORRECTIONS[correction](p)
