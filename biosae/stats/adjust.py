"""Covariates: design matrix, rank-revealing QR, partial correlation, and what adjustment cannot separate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import linalg

from biosae.errors import InputError, StatisticsError
from biosae.stats.correlation import (
    Columns,
    as_columns,
    dot,
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


def design(obs: pd.DataFrame, covariates: Sequence[str]) -> np.ndarray:
    """Columns of the covariates without intercept, (n, k): numbers centred, categories as dummies.

    Raises
    ------
    InputError
        If a covariate is not a column, or has missing values.
    """
    parts: list[np.ndarray] = []
    for name in covariates:
        if name not in obs:
            raise InputError(f"covariate {name!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
        column = obs[name]
        if column.isna().any():
            raise InputError(f"covariate {name!r} is missing in {int(column.isna().sum())} rows; leave them out first")
        if is_categorical(column):
            parts.append(pd.get_dummies(column.astype(str), drop_first=True).to_numpy(np.float64))
        else:
            values = column.to_numpy(np.float64)
            if not np.isfinite(values).all():
                raise InputError(f"covariate {name!r} holds infinite values")
            parts.append((values - values.mean())[:, None])
    return np.hstack(parts) if parts else np.empty((len(obs), 0))


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


def partial_correlation(X: Any, y: np.ndarray, C: np.ndarray, *, method: str = "pearson") -> pd.DataFrame:
    """Partial correlation of every column of X (n, m) with y (n,) given C (n, k): r, t, p, df.

    ``r = cor(M x, M y)`` with ``M`` the projection off ``[1, C]``; t with ``n - k - 2`` degrees of freedom, k the rank
    of C. The Spearman form ranks x, y and the columns of C first.
    """
    V, y, C = as_columns(X), np.asarray(y, np.float64), np.asarray(C, np.float64)
    if method == "spearman":
        V, y, C = rank_columns(V), rank_target(y), np.column_stack([rank_target(c) for c in C.T])
    Q = basis(C, len(y))
    e = residual(y, Q)
    r = ratio(dot(V, e), np.sqrt(projected(V, Q)[2] * (e @ e)))
    df = len(y) - Q.shape[1] - 1
    t = t_from_r(r, df)
    return pd.DataFrame({"r": r, "t": t, "p": t_pvalue(t, df), "df": df})


def share_explained(y: np.ndarray, Q: np.ndarray) -> float:
    """R2 of y on the basis, about the mean: 1 if nothing is left."""
    y = y - y.mean()
    total = float(y @ y)
    return float(np.sum((Q[:, 1:].T @ y) ** 2) / total) if total > 0 else float("nan")


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
        Levels of ``by`` as rows, labels as columns; ``attrs["separable"]`` is False if every level of ``by`` holds a
        single label, so that no adjustment can tell the two apart, and ``attrs["empty_cells"]`` counts the gaps.

    Raises
    ------
    StatisticsError
        If a column is absent.
    """
    for name in [label, by] + ([unit] if unit else []):
        if name not in obs:
            raise StatisticsError(f"{name!r} is not a column of obs")
    rows = obs[[label, by] + ([unit] if unit else [])].dropna()
    if unit:
        rows = rows.drop_duplicates([label, by, unit])
    table = pd.crosstab(rows[by].astype(str), rows[label].astype(str))
    filled = (table > 0).to_numpy()
    table.attrs = {"separable": bool((filled.sum(axis=1) > 1).any()), "empty_cells": int((~filled).sum())}
    return table
