"""How errors fall with the width of the dictionary: of the whole table, and of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

from biosae.errors import InputError

STEEPEST = 10.0
"""Largest exponent m: a steeper law is one point that lies apart."""


@dataclass(frozen=True)
class WidthLaw:
    """FVU(W) = c + a W^-m."""

    c: float
    """What remains at infinite width."""
    a: float
    m: float
    r2: float
    """About the mean of the given values."""
    c_error: float
    """Standard error of c by linearisation; inf where the points do not determine it."""

    def predict(self, widths: Any) -> np.ndarray:
        """FVU at these widths."""
        return self.c + self.a * np.asarray(widths, np.float64) ** -self.m


def width_law(widths: Any, values: Any) -> WidthLaw:
    """Fit c + a W^-m with c, a >= 0 and m from 0 to 10 to FVU (or another error) over the number of latents.

    Parameters
    ----------
    widths
        Numbers of latents, (p,), at least four different ones.
    values
        FVU at each, (p,); at equal L0, else sparsity and width are mixed.

    Raises
    ------
    InputError
        With fewer than four different widths, or numbers that are not positive and finite.

    Notes
    -----
    Engels et al. 2024 (arXiv 2410.14670) fit the same curve by Adam on |c|, |a|, |m|. Here: for each m of a grid the
    non-negative least squares in (c, a), then trust-region refinement from the best.
    """
    w, y = np.asarray(widths, np.float64), np.asarray(values, np.float64)
    if w.shape != y.shape or w.ndim != 1 or not (np.isfinite(w).all() and np.isfinite(y).all() and (w > 0).all()):
        raise InputError(f"widths {w.shape} and values {y.shape} must be finite, widths positive, one value a width")
    if len(np.unique(w)) < 4:
        raise InputError(f"three numbers cannot be fitted to {len(np.unique(w))} widths; give at least four")
    u, unit = w / np.exp(np.log(w).mean()), float(np.abs(y).max()) or 1.0
    best = None
    for m in np.geomspace(0.02, 4, 60):
        (c, a), residual = scipy.optimize.nnls(np.column_stack([np.ones_like(u), u**-m]), y / unit)
        if best is None or residual < best[0]:
            best = (residual, np.array([c, a, m]))

    def curve(u: np.ndarray, c: float, a: float, m: float) -> np.ndarray:
        return c + a * u**-m

    found, covariance = scipy.optimize.curve_fit(
        curve,
        u,
        y / unit,
        p0=best[1],
        bounds=(0, (np.inf, np.inf, STEEPEST)),
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
        max_nfev=10_000,
    )
    if np.square(curve(u, *found) - y / unit).sum() > best[0] ** 2:
        found = best[1]
    c, a, m = (float(v) for v in found)
    spread = np.square(y - y.mean()).sum()
    error = np.square(curve(u, c, a, m) * unit - y).sum()
    r2 = float(1 - error / spread) if spread > 0 else float("nan")
    scale = float(np.exp(np.log(w).mean()))
    with np.errstate(invalid="ignore"):
        spread_of_c = float(np.sqrt(covariance[0, 0]))
    return WidthLaw(c * unit, a * unit * scale**m, m, r2, spread_of_c * unit)


@dataclass(frozen=True)
class RowScaling:
    """Power laws of the squared errors of single rows over width; see :func:`row_scaling`."""

    slope: np.ndarray
    """s of log ||e_i||^2 = log a_i - s log W, (n,); NaN where an error is zero."""
    level: np.ndarray
    """log a_i, (n,)."""
    r2: np.ndarray
    """Of each row's line, (n,); NaN where its errors are all equal."""
    persistence: np.ndarray
    """R2 of predicting ||e_i|| at one width (row) from that at another (column), with an intercept, (p, p)."""
    zero_rows: int
    """Rows left out because an error is zero."""


def row_scaling(widths: Any, errors: Any) -> RowScaling:
    """Does the error of every row fall with width, or do some rows stay?

    Parameters
    ----------
    widths
        Numbers of latents, (p,), at least two different ones, rising.
    errors
        ||x_i - x_hat_i||^2 of the same rows in each dictionary, (n, p).

    Returns
    -------
    RowScaling
        A slope near zero says that width does not help the row; ``persistence`` near 1 that the same rows are badly
        reconstructed whatever the width (the measure of Engels et al. 2024, arXiv 2410.14670).

    Raises
    ------
    InputError
        If shapes do not fit or widths do not rise.
    """
    w, e = np.asarray(widths, np.float64), np.asarray(errors, np.float64)
    if w.ndim != 1 or len(w) < 2 or not (np.diff(w) > 0).all() or w[0] <= 0 or e.ndim != 2 or e.shape[1] != len(w):
        raise InputError(f"widths (p,) must rise and errors be (n, p), found {w.shape} and {e.shape}")
    if not (np.isfinite(e).all() and (e >= 0).all()):
        raise InputError("errors are squared norms: finite and not negative")
    good = (e > 0).all(1)
    log_w, y = np.log(w), np.full(e.shape, np.nan)
    y[good] = np.log(e[good])
    t = log_w - log_w.mean()
    gradient = y @ t / (t @ t)
    centred = y - y.mean(1, keepdims=True)
    spread = np.square(centred).sum(1)
    off = np.square(centred - gradient[:, None] * t).sum(1)
    r2 = np.where(spread > 0, 1 - off / np.where(spread > 0, spread, 1), np.nan)
    r2[~good] = np.nan
    varies = np.ptp(e, axis=0) > 0
    persistence = np.full((len(w), len(w)), np.nan)
    persistence[np.ix_(varies, varies)] = np.corrcoef(np.sqrt(e[:, varies]), rowvar=False) ** 2
    return RowScaling(-gradient, y.mean(1) - gradient * log_w.mean(), r2, persistence, int((~good).sum()))
