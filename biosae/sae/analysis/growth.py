"""How massive activations grow over training: the five-parameter curve, its peak, and simpler curves beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from biosae.errors import InputError

LEAST_POINTS = 6
NAMES = ("A", "decay", "gamma", "t0", "K")
SMALLEST = 1e-9
"""Lower bound of gamma and t0, whose logarithm is taken, in normalised units."""


def growth_curve(t: Any, *, A: float, decay: float, gamma: float, t0: float, K: float) -> np.ndarray:
    """f(t) = A exp(-decay x) log(x) + K with x = gamma t + t0.

    Raises
    ------
    InputError
        If x is not positive everywhere.
    """
    x = gamma * np.asarray(t, np.float64) + t0
    if not (x > 0).all():
        raise InputError("gamma t + t0 must be positive: its logarithm is taken; use t >= 0, gamma > 0 and t0 > 0")
    return A * np.exp(-decay * x) * np.log(x) + K


def growth_jacobian(t: Any, *, A: float, decay: float, gamma: float, t0: float, K: float) -> np.ndarray:
    """Derivatives of :func:`growth_curve` by A, decay, gamma, t0 and K, (len(t), 5)."""
    t = np.asarray(t, np.float64)
    x = gamma * t + t0
    fall, log = np.exp(-decay * x), np.log(x)
    by_x = A * fall * (1 / x - decay * log)
    return np.column_stack([fall * log, -A * x * fall * log, by_x * t, by_x, np.ones_like(t)])


def growth_peak(*, decay: float, gamma: float, t0: float) -> float | None:
    """Where the curve turns: t = (exp(W(1 / decay)) - t0) / gamma, W the Lambert function; None if before t = 0."""
    if decay <= 0:
        return None  # a logarithm has no peak
    w = float(scipy.special.lambertw(1 / decay).real)
    peak = (np.exp(w) - t0) / gamma
    return float(peak) if peak > 0 else None


@dataclass(frozen=True)
class GrowthFit:
    """The fitted curve, in the units of t and y; see :func:`fit_growth`."""

    A: float
    decay: float
    gamma: float
    t0: float
    K: float
    """Limit for large t (decay > 0)."""
    r2: float
    """About the mean of y."""
    peak: float | None
    """t at which the curve turns, where that is after 0."""
    aic: dict[str, float]
    """n log(SSE / n) + 2 p of ``growth`` and of ``logarithm`` (decay 0), ``first_order`` and ``second_order`` (step
    responses); the least describes the series best for its number of parameters."""

    def predict(self, t: Any) -> np.ndarray:
        """f(t)."""
        return growth_curve(t, A=self.A, decay=self.decay, gamma=self.gamma, t0=self.t0, K=self.K)


def fit_growth(t: Any, y: Any) -> GrowthFit:
    """Fit A exp(-decay x) log(x) + K, x = gamma t + t0, to a series over training.

    Parameters
    ----------
    t
        Steps or times >= 0, (n,), at least six.
    y
        The series, such as ``massive_activations(...)["ratio"]`` of one layer at each checkpoint, (n,).

    Raises
    ------
    InputError
        With fewer than six points, negative times, no spread in t, or numbers that are not finite.

    Notes
    -----
    Trust-region reflective least squares with the analytic derivatives, on t over its range and y over its range, with
    decay >= 0, gamma > 0, t0 > 0. One start may end in a local minimum: besides that of the paper, the fit starts from
    the best four of a grid of (decay, gamma, t0), each with the A and K that fit best there, which is linear.

    References
    ----------
    Gallego-Feliciano et al. 2025, arXiv 2508.03616.
    """
    t, y = np.asarray(t, np.float64), np.asarray(y, np.float64)
    if t.shape != y.shape or t.ndim != 1 or not (np.isfinite(t).all() and np.isfinite(y).all()) or (t < 0).any():
        raise InputError(f"t {t.shape} and y {y.shape} must be series of equal length, finite, with t >= 0")
    if len(t) < LEAST_POINTS or np.ptp(t) == 0:
        raise InputError(f"five numbers cannot be fitted to {len(t)} points; give at least {LEAST_POINTS} different t")
    width, low, height = np.ptp(t), y.min(), np.ptp(y) or 1.0
    u, v = t / width, (y - low) / height
    starts = [(1.0, 1 / max(float(np.std(u)), 1e-6), 1.0, 1.0, 0.5), *_grid(u, v)]

    def residual(p: np.ndarray) -> np.ndarray:
        return growth_curve(u, **dict(zip(NAMES, p))) - v

    def slopes(p: np.ndarray) -> np.ndarray:
        return growth_jacobian(u, **dict(zip(NAMES, p)))

    bounds = ([-np.inf, 0, SMALLEST, SMALLEST, -np.inf], np.inf)
    p, error = _best(residual, starts, bounds=bounds, jac=slopes)
    found = dict(zip(NAMES, (float(value) for value in p)))
    found |= {"A": found["A"] * height, "gamma": found["gamma"] / width, "K": found["K"] * height + low}
    total = np.square(v - v.mean()).sum()
    aic = {"growth": _aic(error, len(t), 5)} | _alternatives(u, v)
    where = growth_peak(decay=found["decay"], gamma=found["gamma"], t0=found["t0"])
    return GrowthFit(**found, r2=float(1 - error / total) if total > 0 else float("nan"), peak=where, aic=aic)


def _grid(u: np.ndarray, v: np.ndarray, *, kept: int = 4) -> list[tuple[float, ...]]:
    """The starts on a grid with the least sums of squares."""
    shape = np.geomspace(0.01, 30, 9), np.geomspace(0.1, 100, 7), np.geomspace(0.01, 10, 7)
    decay, gamma, t0 = (axis.ravel()[:, None] for axis in np.meshgrid(*shape))
    x = gamma * u + t0
    basis = np.exp(-decay * x) * np.log(x)
    centred = basis - basis.mean(1, keepdims=True)
    norm = np.square(centred).sum(1)
    usable = norm > 1e-300
    A = np.where(usable, centred @ (v - v.mean()) / np.where(usable, norm, 1), 0)
    K = v.mean() - A * basis.mean(1)
    error = np.square(A[:, None] * basis + K[:, None] - v).sum(1)
    return [(A[i], *decay[i], *gamma[i], *t0[i], K[i]) for i in np.argsort(error)[:kept]]


def _best(residual: Any, starts: Any, **options: Any) -> tuple[np.ndarray, float]:
    """Parameters of the least sum of squares over all starts, and that sum."""
    best, least = None, np.inf
    with np.errstate(over="ignore", invalid="ignore"):
        for start in starts:
            found = scipy.optimize.least_squares(residual, start, method="trf", x_scale="jac", max_nfev=300, **options)
            if best is None or 2 * found.cost < least:
                best, least = found.x, 2 * float(found.cost)
    return best, least


def _aic(error: float, n: int, p: int) -> float:
    return float(n * np.log(max(error, 1e-30) / n) + 2 * p)


def _alternatives(u: np.ndarray, v: np.ndarray) -> dict[str, float]:
    """AIC of simpler curves on normalised series; the scale of the series cancels between them."""

    def logarithm(p: np.ndarray) -> np.ndarray:
        return p[0] * np.log(u + p[1]) + p[2] - v

    def first(p: np.ndarray) -> np.ndarray:
        return p[1] + p[0] * (1 - np.exp(-p[2] * u)) - v

    def second(p: np.ndarray) -> np.ndarray:
        root = np.sqrt(complex(p[3] ** 2 - 1)) or 1e-6j  # equal roots are taken as nearly equal
        slow, fast = p[2] * (-p[3] + root), p[2] * (-p[3] - root)
        step = 1 + (fast * np.exp(slow * u) - slow * np.exp(fast * u)) / (slow - fast)
        return p[1] + p[0] * step.real - v

    small, big = SMALLEST, np.inf
    curves = {
        "logarithm": (logarithm, [(1, 1, 0.5), (-1, 1, 0.5), (0.3, 0.01, 0.5)], [-big, small, -big], 3),
        "first_order": (first, [(1, 0, 1), (1, 0, 10), (-1, 1, 3)], [-big, -big, small], 3),
        "second_order": (
            second, [(1, 0, w, z) for w in (3.0, 10.0, 30.0) for z in (0.3, 1.5)], [-big, -big, small, small], 4,
        ),
    }  # fmt: skip
    return {
        name: _aic(_best(curve, starts, bounds=(low, big))[1], len(u), p)
        for name, (curve, starts, low, p) in curves.items()
    }
