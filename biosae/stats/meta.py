"""Estimates of strata or sites put together: inverse variance with fixed or random effects, many columns at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    from biosae.stats.inference import Inference

EFFECTS = ("fixed", "random")
_TOLERANCE = 1e-13
_MAX_STEPS = 2000


def combine(
    estimates: ArrayLike,
    variances: ArrayLike,
    *,
    effects: str = "fixed",
    method: str = "dl",
    hartung_knapp: bool = False,
    level: float = 0.95,
) -> dict[str, np.ndarray]:
    """Weighted mean of the estimates of k strata, for every column.

    Parameters
    ----------
    estimates
        (k, m), on a scale where errors are roughly normal (log odds ratios, Fisher z).
    variances
        (k, m) squared standard errors. A stratum whose estimate is NaN, or whose variance is NaN, infinite or 0, is
        left out of that column; ``n_strata`` counts the ones used.
    effects
        ``"fixed"``: weights ``1 / v``, one common effect. ``"random"``: weights ``1 / (v + tau2)``, the mean of effects
        that differ between strata.
    method
        Of ``tau2``: ``"dl"`` (DerSimonian and Laird, Control Clin Trials 7, 177, 1986), ``"reml"`` (restricted maximum
        likelihood; Raudenbush, 2009) or ``"pm"`` (Paule and Mandel, J Res NBS 87, 377, 1982).
    hartung_knapp
        Standard error ``sqrt(sum w (y - mean)^2 / ((k - 1) sum w))`` and t with k - 1 degrees of freedom instead of
        the normal (Hartung and Knapp, Stat Med 20, 3875, 2001). With few strata it holds its level where the normal
        does not, but may come out narrower than the normal where the estimates agree by chance.
    level
        Of the intervals.

    Returns
    -------
    dict
        Arrays (m,): ``estimate, se, ci_low, ci_high, df`` (inf for the normal), ``statistic, p, q`` (Cochran's Q),
        ``p_heterogeneity`` (chi-squared, n_strata - 1 df), ``i2`` (0 to 1), ``tau2`` (0 for fixed), ``n_strata,
        n_same_sign`` (strata on the side of the combined estimate) and, for random effects, ``prediction_low,
        prediction_high``: where the effect of a new stratum lies, t with n_strata - 2 df (Higgins, Thompson and
        Spiegelhalter, J R Stat Soc A 172, 137, 2009), NaN below 3 strata. ``p_heterogeneity, i2`` are NaN for one
        stratum; everything is for none.

    Raises
    ------
    InputError
        For unknown names, shapes that differ, or a negative variance.

    Notes
    -----
    ``i2`` is ``max(0, 1 - (k - 1) / Q)`` for fixed effects and ``tau2 / (tau2 + v~)`` with the typical variance
    ``v~ = (k - 1) / (sum 1/v - sum 1/v^2 / sum 1/v)`` for random effects; the two are the same for ``"dl"``.
    """
    y, v = (np.asarray(a, dtype=np.float64) for a in (estimates, variances))
    if y.shape != v.shape or y.ndim != 2:
        raise InputError(f"estimates {y.shape} and variances {v.shape} must both be (strata, columns)")
    if effects not in EFFECTS:
        raise InputError(f"effects={effects!r}; {nearest(effects, EFFECTS)}")
    if method not in TAU2:
        raise InputError(f"method={method!r}; {nearest(method, TAU2)}")
    if np.any(v < 0):
        raise InputError("variances must not be negative; give squared standard errors")
    used = np.isfinite(y) & np.isfinite(v) & (v > 0)
    k = used.sum(axis=0)
    y, v = np.where(used, y, 0.0), np.where(used, v, 1.0)
    one = used.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        w = one / v
        q = _spread(y, w)
        q = np.where(k > 1, q, np.where(k == 1, 0.0, np.nan))
        free = np.where(k > 1, k - 1.0, np.nan)
        tau2 = np.where(k > 0, 0.0, np.nan)
        i2 = np.where(q > 0, np.maximum(0.0, 1.0 - free / q), np.where(k > 1, 0.0, np.nan))
        if effects == "random":
            many = k > 1
            tau2[many] = TAU2[method](y[:, many], v[:, many], one[:, many])
            typical = free / _trace(w)
            i2 = tau2 / (tau2 + typical)
            w = one / (v + np.nan_to_num(tau2))
        total = np.where(k > 0, w.sum(axis=0), np.nan)
        mean = (w * y).sum(axis=0) / total
        se = np.sqrt(1.0 / total)
        df = np.full(mean.shape, np.inf)
        if hartung_knapp:
            se, df = se * np.sqrt(_spread(y, w) / free), np.where(k > 1, k - 1.0, np.nan)
        statistic = mean / se
        critical = _critical(df, level)
        out = {
            "estimate": mean, "se": se, "ci_low": mean - critical * se, "ci_high": mean + critical * se, "df": df,
            "statistic": statistic,
            "p": np.where(np.isinf(df), 2 * stats.norm.sf(np.abs(statistic)), 2 * stats.t.sf(np.abs(statistic), df)),
            "q": q, "p_heterogeneity": stats.chi2.sf(q, free), "i2": i2, "tau2": tau2, "n_strata": k,
            "n_same_sign": (used & (np.sign(y) == np.sign(mean))).sum(axis=0),
        }  # fmt: skip
        if effects == "random":
            half = stats.t.ppf(0.5 + level / 2, np.where(k > 2, k - 2.0, np.nan)) * np.sqrt(se**2 + tau2)
            out |= {"prediction_low": mean - half, "prediction_high": mean + half}
    return out


def _critical(df: np.ndarray, level: float) -> np.ndarray:
    return np.where(np.isinf(df), stats.norm.ppf(0.5 + level / 2), stats.t.ppf(0.5 + level / 2, df))


def _spread(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``sum w (y - mean)^2``."""
    return (w * (y - (w * y).sum(axis=0) / w.sum(axis=0)) ** 2).sum(axis=0)


def _trace(w: np.ndarray) -> np.ndarray:
    """``sum w - sum w^2 / sum w``, the trace of the projection that takes off the weighted mean."""
    return w.sum(axis=0) - (w**2).sum(axis=0) / w.sum(axis=0)


def _dersimonian_laird(y: np.ndarray, v: np.ndarray, one: np.ndarray) -> np.ndarray:
    w = one / v
    return np.maximum(0.0, (_spread(y, w) - (one.sum(axis=0) - 1)) / _trace(w))


def _paule_mandel(y: np.ndarray, v: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Root of ``Q(tau2) = k - 1`` by Newton steps; Q falls and is convex, so they rise from 0 without overshooting."""
    free = one.sum(axis=0) - 1
    tau2 = np.zeros(y.shape[1])
    for _ in range(_MAX_STEPS):
        w = one / (v + tau2)
        residual = y - (w * y).sum(axis=0) / w.sum(axis=0)
        gap = (w * residual**2).sum(axis=0) - free
        step = np.where(gap > 0, gap / np.maximum((w**2 * residual**2).sum(axis=0), 1e-300), 0.0)
        tau2 = tau2 + step
        if np.all(step <= _TOLERANCE * tau2):
            break
    return tau2


def _reml(y: np.ndarray, v: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Fisher scoring ``tau2 += (y'PPy - tr P) / tr PP`` from DerSimonian and Laird's value, kept at or above 0."""
    tau2 = _dersimonian_laird(y, v, one)
    active = np.ones(len(tau2), dtype=bool)
    for _ in range(_MAX_STEPS):
        ya, va, oa, old = y[:, active], v[:, active], one[:, active], tau2[active]
        w = oa / (va + old)
        total, w2 = w.sum(axis=0), (w**2).sum(axis=0)
        score = (w**2 * (ya - (w * ya).sum(axis=0) / total) ** 2).sum(axis=0) - (total - w2 / total)
        information = w2 - 2 * (w**3).sum(axis=0) / total + (w2 / total) ** 2
        new = np.maximum(0.0, old + score / information)
        tau2[active] = new
        still = np.abs(new - old) > _TOLERANCE * (new + 1.0 / total)
        active[active] = still
        if not active.any():
            break
    return tau2


TAU2: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "dl": _dersimonian_laird, "reml": _reml, "pm": _paule_mandel,
}  # fmt: skip
"""Estimators of the variance between strata, ``(y, v, used) -> tau2``."""


def heterogeneity(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of a result on how strata differ, from :func:`combine` and ``n_same_sign``."""
    return {
        "n_strata": found["n_strata"], "n_same_sign": found["n_same_sign"], "q_heterogeneity": found["q"],
        "p_heterogeneity": found["p_heterogeneity"], "i2": found["i2"], "tau2": found["tau2"],
    }  # fmt: skip


def not_below(inference: Inference, found: dict[str, np.ndarray]) -> None:
    """No p below that of the mean effect of strata whose effects differ."""
    inference.p, inference.p_maxt = np.maximum(inference.p, found["p"]), np.maximum(inference.p_maxt, found["p"])
    if inference.p_side is not None:
        inference.p_side = np.maximum(inference.p_side, found["p"] / 2)
    inference.how += ", not below random effects"
