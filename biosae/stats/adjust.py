"""Covariates: design matrix, rank-revealing QR, partial correlation, and what adjustment cannot separate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import interpolate, linalg

from biosae.errors import InputError, StatisticsError
from biosae.stats.correlation import (
    Columns,
    as_columns,
    dot,
    fisher_interval,
    moments,
    rank_columns,
    rank_target,
    ratio,
    t_from_r,
    t_pvalue,
)  # fmt: skip

MAX_R2 = 0.95
MAX_VIF = 10.0


def is_categorical(column: pd.Series) -> bool:
    """True for text, categories and booleans; False for numbers."""
    return not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)


def refuse_dates(column: pd.Series, name: str, *, role: str) -> None:
    """Dates are neither labels nor numbers, and numbers kept as objects would pass for labels.

    Raises
    ------
    InputError
        For dates and durations, and for more than two different numbers in a column of objects.
    """
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period"):
        raise InputError(f"{role} {name!r} holds dates or durations; give a number, such as days since a start")
    if column.dtype == object and kind in ("integer", "floating", "mixed-integer-float") and column.nunique() > 2:
        raise InputError(f"{role} {name!r} holds numbers as objects; convert it with pandas.to_numeric")


_SPLINE = re.compile(r"spline\(\s*(?P<name>.+?)\s*(?:,\s*df\s*=\s*(?P<df>\d+)\s*)?\)")
SPLINE_DF = 3
"""Degrees of freedom of ``spline(age)``: 4 knots."""


def column_of(covariate: str) -> str:
    """The column of obs that a covariate is made of: ``age`` of ``spline(age, df=4)``."""
    found = _SPLINE.fullmatch(covariate.strip())
    return found["name"] if found else covariate


def design(obs: pd.DataFrame, covariates: Sequence[str], *, rank: bool = False) -> np.ndarray:
    """Columns of the covariates without intercept, (n, k).

    Numbers are centred; text, categories (ordered or not) and booleans become dummies, the first level left out;
    ``"spline(age)"`` and ``"spline(age, df=4)"`` become a natural cubic spline (:func:`natural_spline`).

    Parameters
    ----------
    obs
        Table of units.
    covariates
        Names of columns, or splines of them.
    rank
        True puts the ranks of a number in its place first, as rank correlation needs it.

    Raises
    ------
    InputError
        If a covariate is not a column, has missing or infinite values, or is a spline of labels.
    """
    parts = [_columns(obs, name, rank) for name in covariates]
    return np.hstack(parts) if parts else np.empty((len(obs), 0))


def _columns(obs: pd.DataFrame, covariate: str, rank: bool) -> np.ndarray:
    name = column_of(covariate)
    if name not in obs:
        raise InputError(f"covariate {name!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
    column = obs[name]
    if column.isna().any():
        raise InputError(f"covariate {name!r} is missing in {int(column.isna().sum())} rows; leave them out first")
    if is_categorical(column):
        if name != covariate:
            raise InputError(f"covariate {covariate!r}: {name!r} holds labels; give it as {name!r} (dummies)")
        return pd.get_dummies(column.astype(str), drop_first=True).to_numpy(np.float64)
    values = column.to_numpy(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"covariate {name!r} holds infinite values")
    values = rank_target(values) if rank else values - values.mean()
    if name == covariate:
        return values[:, None]
    return natural_spline(values, df=int(_SPLINE.fullmatch(covariate.strip())["df"] or SPLINE_DF))


def natural_spline(x: np.ndarray, *, df: int = SPLINE_DF) -> np.ndarray:
    """Basis (n, df) of natural cubic splines of x (n,), without intercept: linear beyond the outer knots.

    ``df - 1`` knots at quantiles of x and two at its ends, as ``splines::ns(x, df)`` of R; knots that coincide (ties)
    are merged, and the basis has as many columns fewer. Column j is the spline that is 1 at knot j + 1 and 0 at the
    others.

    Raises
    ------
    InputError
        For ``df < 1``.
    """
    if df < 1:
        raise InputError(f"spline with df={df}; give at least 1 (a straight line)")
    x = np.asarray(x, dtype=np.float64)
    knots = np.quantile(x, np.linspace(0, 1, df + 1))
    knots = knots[np.r_[True, np.diff(knots) > 1e-9 * np.ptp(knots)]]  # rounding parts quantiles of ties
    if len(knots) < 2:
        return np.zeros((len(x), 1))
    return interpolate.CubicSpline(knots, np.eye(len(knots)), bc_type="natural")(x)[:, 1:]


def basis(C: np.ndarray | None, n: int) -> np.ndarray:
    """Orthonormal basis (n, 1 + k) of the intercept and the columns of ``C`` that are not collinear.

    Pivoted QR after centring and scaling; columns below 1e-10 of the largest pivot are dropped.
    """
    intercept = np.full((n, 1), 1.0 / np.sqrt(n))
    if C is None or C.shape[1] == 0:
        return intercept
    C = C - C.mean(axis=0)
    norm = np.sqrt((C**2).sum(axis=0))
    C = C[:, norm > 0] / norm[norm > 0]
    if C.shape[1] == 0:
        return intercept
    q, r, _ = linalg.qr(C, mode="economic", pivoting=True)
    keep = np.abs(np.diag(r)) > 1e-10 * abs(r[0, 0])
    return np.hstack([intercept, q[:, keep]])


def log_volume(C: np.ndarray) -> float:
    """``log sqrt(det D'D)`` of ``D``, the intercept and the columns of C (n, k) that :func:`basis` keeps, less that of
    the basis times ``sqrt(n)``.
    """  # fmt: skip
    C = C - C.mean(axis=0)
    norm = np.sqrt((C**2).sum(axis=0))
    C, norm = C[:, norm > 0], norm[norm > 0]
    if C.shape[1] == 0:
        return 0.0
    r, order = linalg.qr(C / norm, mode="r", pivoting=True)
    size = np.abs(np.diag(r))
    keep = size > 1e-10 * size[0]
    return float(np.log(size[keep] * norm[order[: len(size)]][keep] / np.sqrt(len(C))).sum())


def residual(y: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """``y`` (n,) or (n, b) less its projection on the orthonormal columns of ``Q``, twice for accuracy."""
    for _ in range(2):
        y = y - Q @ (Q.T @ y)
    return y


def projected(V: Columns, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``Q'V`` (1 + k, m), sums of squares of V about its mean, and about the whole basis (both (m,))."""
    coefficient = dot(V, Q).T
    ss = moments(V)[1]
    return coefficient, ss, np.maximum(ss - (coefficient[1:] ** 2).sum(axis=0), 0.0)


def partial_correlation(
    X: Any, y: np.ndarray, C: np.ndarray, *, method: str = "pearson", semi: bool = False, level: float = 0.95
) -> pd.DataFrame:
    """Partial or semi-partial correlation of every column of X (n, m) with y (n,) given C (n, k).

    ``r = cor(M x, M y)`` with ``M`` the projection off ``[1, C]``; t with ``n - k - 2`` degrees of freedom, k the rank
    of C; interval by Fisher's z with standard error ``1 / sqrt(n - k - 3)``. The Spearman form ranks x, y and the
    columns of C first. Rows are taken as independent.

    Parameters
    ----------
    X, y, C
        Columns, target, adjusting columns.
    method
        ``pearson`` or ``spearman``.
    semi
        True gives ``cor(M x, y) = r sqrt(1 - R2(y | C))``: its square is what the column adds to the share of y
        explained. It is 0 where the partial correlation is, so ``t`` and ``p`` are those of the partial correlation and
        the interval is scaled by the same factor.
    level
        Of the interval.

    Returns
    -------
    DataFrame
        ``r, ci_low, ci_high, t, p, df``.
    """
    V, y, C = as_columns(X), np.asarray(y, np.float64), np.asarray(C, np.float64)
    if method == "spearman":
        V, y, C = rank_columns(V), rank_target(y), np.column_stack([rank_target(c) for c in C.T])
    Q = basis(C, len(y))
    e = residual(y, Q)
    r = ratio(dot(V, e), np.sqrt(projected(V, Q)[2] * (e @ e)))
    df = len(y) - Q.shape[1] - 1
    t = t_from_r(r, df)
    low, high = fisher_interval(r, n_effective=len(y) - Q.shape[1] + 1, rank=method == "spearman", level=level)
    scale = np.sqrt(max(1.0 - share_explained(y, Q), 0.0)) if semi else 1.0
    return pd.DataFrame(
        {"r": scale * r, "ci_low": scale * low, "ci_high": scale * high, "t": t, "p": t_pvalue(t, df), "df": df}
    )


def share_explained(y: np.ndarray, Q: np.ndarray) -> float:
    """R2 of y on the basis, about the mean: 1 if nothing is left."""
    y = y - y.mean()
    total = float(y @ y)
    return float(np.sum((Q[:, 1:].T @ y) ** 2) / total) if total > 0 else float("nan")


def determined(y: np.ndarray, obs: pd.DataFrame, covariates: Sequence[str], *, target: str, rank: bool = False) -> str:
    """Why no adjustment can tell a target from the covariates, in words; empty where it can.

    Parameters
    ----------
    y
        Target of every unit (n,), or class codes.
    obs, covariates
        As for :func:`design`.
    target
        Its name, for the sentence.
    rank
        Of ranks.
    """
    y = rank_target(y) if rank else np.asarray(y, np.float64)
    share = {name: share_explained(y, basis(design(obs, [name], rank=rank), len(y))) for name in covariates}
    together = share_explained(y, basis(design(obs, covariates, rank=rank), len(y)))
    if not together > MAX_R2:
        return ""
    alone = [name for name, r2 in share.items() if r2 > MAX_R2]
    who = " and ".join(map(repr, alone)) if alone else " and ".join(map(repr, covariates)) + " together"
    verb = "each determine" if len(alone) > 1 else "determine" if not alone and len(covariates) > 1 else "determines"
    r2 = max([share[name] for name in alone], default=together)
    return (
        f"{who} {verb} target {target!r} (R2 {r2:.2f} > {MAX_R2}): no adjustment can tell them apart. Leave it out of "
        "covariates and call the association confounded, or find samples in which the two differ"
    )


def overlap(obs: pd.DataFrame, label: str, *, by: str, unit: str | None = None) -> pd.DataFrame:
    """Counts of each label in each level of a confounder: look before adjusting.

    Parameters
    ----------
    obs
        Sample table.
    label, by
        Categorical columns.
    unit
        Column whose distinct values are counted (patients); None counts rows.

    Returns
    -------
    DataFrame
        Levels of ``by`` as rows, labels as columns. ``attrs["separable"]`` is False if every level of ``by`` holds a
        single label, so that no adjustment can tell the two apart, and ``attrs["empty_cells"]`` counts the gaps.
        ``attrs["verdict"]``: ``"crossed"`` (every label in every level), ``"gaps"``, or ``"determined"`` (inseparable,
        or the levels explain more than 95 % of a label, ``attrs["r2"]``); ``attrs["reason"]`` says it in a sentence.

    Raises
    ------
    StatisticsError
        If a column is absent, both are the same, or no row has both.
    """
    for name in [label, by] + ([unit] if unit else []):
        if name not in obs:
            raise StatisticsError(f"{name!r} is not a column of obs")
    if label == by:
        raise StatisticsError(f"{label!r} cannot confound itself; name another column with by=")
    rows = obs[list(dict.fromkeys([label, by] + ([unit] if unit else [])))].dropna()
    if not len(rows):
        raise StatisticsError(f"no row has both {label!r} and {by!r}")
    if unit:
        rows = rows.drop_duplicates([label, by, unit])
    table = pd.crosstab(rows[by].astype(str), rows[label].astype(str))
    filled = (table > 0).to_numpy()
    r2 = _explained(table.to_numpy(np.float64))
    separable, empty = bool((filled.sum(axis=1) > 1).any()), int((~filled).sum())
    if not separable or r2 > MAX_R2:
        verdict = "determined"
        reason = (
            f"{by!r} determines {label!r} (R2 {r2:.2f}): no adjustment can tell them apart. Report the association as "
            "confounded, or find samples in which the two differ"
        )
    elif empty:
        verdict = "gaps"
        reason = (
            f"{empty} of {filled.size} combinations of {by!r} and {label!r} are empty: adjustment leans on the rest"
        )
    else:
        verdict, reason = "crossed", f"every {label!r} occurs in every {by!r}"
    table.attrs = {"separable": separable, "empty_cells": empty, "verdict": verdict, "r2": r2, "reason": reason}
    return table


def _explained(counts: np.ndarray) -> float:
    """Largest share of the variance of a label (in it or not) between the levels (rows of ``counts``)."""
    n, size, of_label = counts.sum(), counts.sum(axis=1, keepdims=True), counts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = of_label / n
        between = (size * (counts / size - p) ** 2).sum(axis=0)
        r2 = between / (n * p * (1 - p))
    return float(np.nanmax(r2)) if np.isfinite(r2).any() else float("nan")
