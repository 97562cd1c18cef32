"""The scale on which the error of an effect is roughly normal and no effect is 0: Fisher's z, logit, logarithm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import special

CRITICAL = float(special.ndtri(0.975))
_MEDIAN = float(np.log(0.5) / np.log(0.025))
Transform = Callable[[np.ndarray], np.ndarray]


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(x)


def _same(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


SCALES: dict[str, tuple[Transform, Transform, tuple[float, float]]] = {
    "auroc": (special.logit, special.expit, (0.0, 1.0)),
    "pearson_r": (np.arctanh, np.tanh, (-1.0, 1.0)),
    "spearman_rho": (np.arctanh, np.tanh, (-1.0, 1.0)),
    "kendall_tau": (np.arctanh, np.tanh, (-1.0, 1.0)),
    "cliffs_delta": (np.arctanh, np.tanh, (-1.0, 1.0)),
}
"""effect -> (to the scale, back, range of the effect). Ratios go by the logarithm; others stay as they are."""
UNDIRECTED = ("epsilon_squared",)
"""Effects that say how much classes differ and not which way."""


def scale_of(effect: str) -> tuple[Transform, Transform, tuple[float, float]]:
    """Transform, its inverse and the range of an effect."""
    if effect.endswith("_ratio"):
        return _log, np.exp, (0.0, np.inf)
    return SCALES.get(effect, (_same, _same, (-np.inf, np.inf)))


def natural(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and standard errors of rows of ``associate`` on the scale of each effect.

    Parameters
    ----------
    table
        Columns ``effect, estimate, ci_low, ci_high`` (95 %).

    Returns
    -------
    tuple
        ``theta`` and ``se``, each (rows,). ``se`` is half the width of the interval over 1.96 (so intervals by t count
        as wider normal ones); where one bound lies at the edge of the range, the other half. Effects without a
        direction or an interval have NaN.

    Notes
    -----
    An AUROC of 1 (or a Cliff's delta of 1) has no finite logit. Its interval is that of n hits in n trials
    (Clopper-Pearson), ``low = 0.025^(1/n)``, and the median-unbiased estimate that goes with it, ``0.5^(1/n)``, stands
    in.
    """
    theta, se = np.full(len(table), np.nan), np.full(len(table), np.nan)
    values = table[["estimate", "ci_low", "ci_high"]].to_numpy(np.float64)
    effects = table["effect"].astype(str).to_numpy()
    for effect in np.unique(effects):
        here = np.flatnonzero(effects == effect)
        if effect in UNDIRECTED:
            continue
        to, _, _ = scale_of(effect)
        own = values[here]
        with np.errstate(divide="ignore", invalid="ignore"):
            if effect in ("auroc", "cliffs_delta"):
                own = _inside(own, effect)
            e, low, high = to(own).T
            below, above = e - low, high - e
        below, above = (np.where(np.isfinite(half) & (half > 0), half, np.nan) for half in (below, above))
        half = np.where(np.isnan(below), above, np.where(np.isnan(above), below, (below + above) / 2))
        theta[here] = np.where(np.isfinite(e), e, np.nan)
        se[here] = np.where(np.isfinite(e), half / CRITICAL, np.nan)
    return theta, se


def _inside(values: np.ndarray, effect: str) -> np.ndarray:
    """Estimates of 0 and 1 (perfect separation) replaced by the median-unbiased ones of their exact interval."""
    A = values if effect == "auroc" else (values + 1) / 2
    e, low, high = A.T
    e = np.where(e >= 1, low**_MEDIAN, np.where(e <= 0, 1 - (1 - high) ** _MEDIAN, e))
    A = np.column_stack([e, low, high])
    return A if effect == "auroc" else 2 * A - 1


def back(theta: np.ndarray, effects: pd.Series | np.ndarray) -> np.ndarray:
    """Values of the scale turned back into effects, (rows,)."""
    theta, effects = np.asarray(theta, dtype=np.float64), np.asarray(effects).astype(str)
    out = np.full(len(theta), np.nan)
    for effect in np.unique(effects):
        here = effects == effect
        with np.errstate(over="ignore", invalid="ignore"):
            out[here] = scale_of(effect)[1](theta[here])
    return out
