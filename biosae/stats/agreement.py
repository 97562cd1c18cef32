"""Do two parts agree on an effect: its sign, its size, how many of those carried replicate and how many could be
expected to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from biosae.errors import InputError
from biosae.stats.methods import EFFECT_NULL
from biosae.stats.scale import UNDIRECTED, natural, scale_of

N_DRAWS = 2000
_KEYS = ["estimate", "ci_low", "ci_high"]
AGREEMENT = [
    "difference", "difference_low", "difference_high", "shrinkage_low", "shrinkage_high", "prediction_low",
    "prediction_high", "consistent",
]  # fmt: skip


def size_agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the sizes of two independent estimates of one effect.

    Parameters
    ----------
    first, second
        ``effect, estimate, ci_low, ci_high`` of discovery and replication.

    Returns
    -------
    dict
        ``difference`` (replication - discovery; ratios: of logarithms) with ``difference_low, difference_high``;
        ``shrinkage_low, shrinkage_high``, the interval of replication over discovery effect (NaN where the discovery
        interval reaches no effect, so that the quotient has no bound); ``prediction_low, prediction_high``, where
        95 % of replication estimates would lie if both parts had the same effect and discovery had not been chosen for
        its size; ``consistent``: the replication estimate lies there. All NaN (NA) without both intervals.

    Notes
    -----
    From the bounds of each interval, not from a common standard error, so that a skewed interval keeps its shape:
    differences ``d - sqrt((e2 - l2)^2 + (u1 - e1)^2)``, ``d + sqrt((u2 - e2)^2 + (e1 - l1)^2)`` (Zou, Psychol Methods
    12, 399, 2007); quotients Donner and Zou (Stat Methods Med Res 21, 347, 2012), Fieller's for symmetric intervals;
    prediction after Patil, Peng and Leek (Perspect Psychol Sci 11, 539, 2016).
    """
    none = dict.fromkeys(AGREEMENT, np.nan) | {"consistent": pd.NA}
    effect = str(first["effect"])
    values = np.array([[row[k] for k in _KEYS] for row in (first, second)], dtype=np.float64)
    if effect != second["effect"] or effect in UNDIRECTED or not np.isfinite(values).all():
        return none
    ratio, null = effect.endswith("_ratio"), EFFECT_NULL.get(effect, 0.0)
    with np.errstate(divide="ignore"):
        values = np.log(values) if ratio else values - null
    if not np.isfinite(values).all():
        return none
    (e1, l1, u1), (e2, l2, u2) = values
    d = e2 - e1
    down, up = np.hypot(e2 - l2, u1 - e1), np.hypot(u2 - e2, e1 - l1)
    bounds = np.array([e1 - up, e1 + down])
    bounds = np.exp(bounds) if ratio else np.clip(bounds + null, *scale_of(effect)[2])
    low, high = _quotient(values)
    return {
        "difference": d, "difference_low": d - down, "difference_high": d + up,
        "shrinkage_low": low, "shrinkage_high": high,
        "prediction_low": bounds[0], "prediction_high": bounds[1], "consistent": bool(d - down <= 0 <= d + up),
    }  # fmt: skip


def _quotient(values: np.ndarray) -> tuple[float, float]:
    """Interval of second over first, each row ``estimate, low, high``."""
    (e1, l1, u1), (e2, l2, u2) = (row if values[0, 0] > 0 else -row[[0, 2, 1]] for row in values)
    if l1 <= 0:
        return np.nan, np.nan
    product = e1 * e2
    low = (product - np.sqrt(max(product**2 - l2 * u1 * (2 * e2 - l2) * (2 * e1 - u1), 0.0))) / (u1 * (2 * e1 - u1))
    high = (product + np.sqrt(max(product**2 - u2 * l1 * (2 * e2 - u2) * (2 * e1 - l1), 0.0))) / (l1 * (2 * e1 - l1))
    return (low, high) if 2 * e1 > u1 else (np.nan, np.nan)


def expected_power(table: pd.DataFrame, *, alpha: float) -> np.ndarray:
    """Probability that each row replicates if its corrected estimate is the truth, (rows,).

    One-sided z of independent features, ``z ~ N(|theta_c| / se, 1)``, with ``theta_c`` the estimate corrected for the
    winner's curse and ``se`` of the replication on the scale of the effect, through Holm's procedure over everything
    that the source carries: the share of 2,000 draws in which the row passes. One row alone has
    ``Phi(|theta_c| / se - z_(1 - alpha))``.
    """
    again = {"effect": table["effect"], "ci_low": table["ci_low"], "ci_high": table["ci_high"]}
    theta = natural(pd.DataFrame({**again, "estimate": table["estimate_corrected"]}))[0]
    se = natural(pd.DataFrame({**again, "estimate": table["estimate_replication"]}))[1]
    out = np.full(len(table), np.nan)
    for source in table["source"].unique():
        rows = np.flatnonzero((table["source"] == source) & table["p_replication"].notna())
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.abs(theta[rows]) / se[rows]
        out[rows] = _through_holm(mean, alpha)
    return out


def _through_holm(mean: np.ndarray, alpha: float) -> np.ndarray:
    """Share of draws in which Holm's procedure rejects each of n one-sided z; NaN counts in n and has no share."""
    known, n = np.isfinite(mean), len(mean)
    if n == 1:
        return special.ndtr(mean - special.ndtri(1 - alpha))
    limits = -special.ndtri(alpha / np.arange(n, 0, -1))
    rng = np.random.default_rng(0)
    total = np.zeros(n)
    for _ in range(N_DRAWS):
        z = np.where(known, mean, 0.0) + rng.standard_normal(n)
        order = np.argsort(-z)
        passed = np.logical_and.accumulate(z[order] >= limits)
        total[order] += passed
    return np.where(known, total / N_DRAWS, np.nan)


def replication_rate(result: pd.DataFrame) -> pd.DataFrame:
    """How many of the features carried replicate, how many could be expected to, and how their effects compare.

    Parameters
    ----------
    result
        Table of :func:`biosae.stats.replicate`.

    Returns
    -------
    DataFrame
        One row a target and source (and repeat): ``n_carried, n_tested`` (with a p in the replication),
        ``n_replicated``, ``rate`` with ``rate_low, rate_high`` (Clopper and Pearson, as if latents were independent),
        ``rate_expected`` (mean of ``power_expected`` over the tested), ``n_same_sign``, ``n_consistent``, and over
        tested rows on the scale of the effect (Fisher's z, logit, logarithm): ``slope`` of replication on discovery
        effects through no effect (1: same size; below 1: discovery was too large), ``slope_corrected`` on the
        corrected ones, ``correlation`` of the two (3 rows or more).

    Raises
    ------
    InputError
        If the table is not of :func:`biosae.stats.replicate`.
    """
    needed = {"estimate_discovery", "estimate_replication", "power_expected", "replicated"}
    if not needed <= set(result):
        raise InputError(f"the table has no column {sorted(needed - set(result))[0]!r}; pass the one of replicate")
    keys = ["target", "source"] + [k for k in ("repeat",) if k in result]
    rows = []
    for key, part in result.groupby(keys, sort=False):
        carried = part[part["latent"] != ""]
        tested = carried[carried["p_replication"].notna()]
        n, k = len(tested), int(tested["replicated"].astype("boolean").sum())
        row = dict(zip(keys, key)) | {"n_carried": len(carried), "n_tested": n, "n_replicated": k}
        row["rate"] = k / n if n else np.nan
        row["rate_low"] = (stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0) if n else np.nan
        row["rate_high"] = (stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0) if n else np.nan
        row["rate_expected"] = tested["power_expected"].astype(float).mean() if n else np.nan
        row["n_same_sign"] = int(tested["sign_agrees"].astype("boolean").sum())
        row["n_consistent"] = int(tested["consistent"].astype("boolean").sum())
        rows.append(row | _slopes(tested))
    return pd.DataFrame(rows)


def _slopes(tested: pd.DataFrame) -> dict[str, float]:
    low, high = tested["ci_low"], tested["ci_high"]
    before_low, before_high = tested["ci_low_discovery"], tested["ci_high_discovery"]
    sides = {"discovery": (before_low, before_high), "replication": (low, high), "corrected": (before_low, before_high)}
    theta = {}
    for name, (lower, upper) in sides.items():
        column = "estimate_corrected" if name == "corrected" else f"estimate_{name}"
        frame = {"effect": tested["effect"], "estimate": tested[column], "ci_low": lower, "ci_high": upper}
        theta[name] = natural(pd.DataFrame(frame))[0]
    out = {}
    for name, column in (("slope", "discovery"), ("slope_corrected", "corrected")):
        use = np.isfinite(theta[column]) & np.isfinite(theta["replication"])
        x, y = theta[column][use], theta["replication"][use]
        out[name] = float(x @ y / (x @ x)) if len(x) and x @ x > 0 else np.nan
    use = np.isfinite(theta["discovery"]) & np.isfinite(theta["replication"])
    x, y = theta["discovery"][use], theta["replication"][use]
    varied = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return out | {"correlation": float(np.corrcoef(x, y)[0, 1]) if varied else np.nan}
