"""Two proportions: difference, interval and tests, of independent groups and of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from biosae.errors import InputError

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def proportion_difference(a: int, n_a: int, b: int, n_b: int) -> dict[str, float]:
    """Difference of two independent proportions, ``a / n_a - b / n_b``, with interval and test.

    Returns
    -------
    dict
        ``difference, ci_low, ci_high`` (95 %, Newcombe 1998, method 10: Wilson's limits of each), ``z`` and ``p``
        of the pooled normal test.

    Raises
    ------
    InputError
        For counts that are negative or above their totals.
    """
    from scipy.stats import norm

    if not (0 <= a <= n_a and 0 <= b <= n_b and n_a > 0 and n_b > 0):
        raise InputError(f"{a} of {n_a} and {b} of {n_b} are no proportions")
    low, high = newcombe(np.array([a / n_a]), n_a, np.array([b / n_b]), n_b)
    pooled = (a + b) / (n_a + n_b)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    z = (a / n_a - b / n_b) / error if error > 0 else np.nan
    return {
        "difference": a / n_a - b / n_b, "ci_low": float(low[0]), "ci_high": float(high[0]), "z": float(z),
        "p": float(2 * norm.sf(abs(z))),
    }  # fmt: skip


def mcnemar(only_a: Any, only_b: Any) -> np.ndarray:
    """Exact two-sided p of McNemar's test: as many pairs with A alone as with B alone, binomial with 1/2.

    Parameters
    ----------
    only_a, only_b
        Numbers of discordant pairs, any shape. Where there are none p is 1.
    """
    from scipy.stats import binom

    only_a, only_b = np.asarray(only_a, int), np.asarray(only_b, int)
    n = only_a + only_b
    return np.minimum(1.0, 2.0 * binom.cdf(np.minimum(only_a, only_b), n, 0.5))


def effective_n(mean: Any, variance: Any, df: Any, n: Any) -> np.ndarray:
    """How many independent yes-or-no answers know a mean of values in [0, 1] as well as its variance says.

    ``(z / t)^2 m (1 - m) / V`` (Korn and Graubard 1998), t with the degrees of freedom of V; never below ``n``, the
    number of independent groups, since values in [0, 1] vary no more than yes and no. With it Wilson's limits hold
    where a mean is near 0 or 1, or groups happen to agree, and t limits do not.
    """
    from scipy.special import stdtrit

    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    spread = (Z / stdtrit(np.maximum(df, 1.0), 0.975)) ** 2 * mean * (1 - mean)
    return np.maximum(np.divide(spread, variance, out=np.zeros_like(spread), where=variance > 0), n)


def wilson(p: Any, n: Any) -> tuple[np.ndarray, np.ndarray]:
    """95 % limits of a proportion (Wilson 1927)."""
    centre, half = p + Z**2 / (2 * n), Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return (centre - half) / (1 + Z**2 / n), (centre + half) / (1 + Z**2 / n)


def newcombe(
    a: np.ndarray, n_a: Any, b: np.ndarray, n_b: Any, phi: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Limits of ``a - b`` from Wilson's limits of both, with the correlation ``phi`` of pairs (Newcombe 1998)."""
    (low_a, high_a), (low_b, high_b) = wilson(a, n_a), wilson(b, n_b)
    below = (a - low_a) ** 2 + (high_b - b) ** 2 - 2 * phi * (a - low_a) * (high_b - b)
    above = (high_a - a) ** 2 + (b - low_b) ** 2 - 2 * phi * (high_a - a) * (b - low_b)
    return a - b - np.sqrt(np.maximum(below, 0)), a - b + np.sqrt(np.maximum(above, 0))
