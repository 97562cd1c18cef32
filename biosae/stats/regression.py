"""Least squares and logistic regression, with what robust standard errors need."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize, special

RUNAWAY = 15.0
"""A linear predictor (logit) beyond this raises the question whether the classes are separated."""


def fit_ols(y: np.ndarray, X: np.ndarray) -> dict[str, Any]:
    """Least squares.

    Parameters
    ----------
    y
        Target (n,).
    X
        Design (n, k) of full column rank, with intercept.

    Returns
    -------
    dict
        ``coef`` (k,), ``cov`` (k, k), ``scores`` (n, k) and ``bread`` (k, k), ``residuals`` (n,), ``df`` = n - k,
        ``loglik``, ``sigma2``, ``r2``, ``converged``, ``note``.
    """
    n, k = X.shape
    bread = np.linalg.inv(X.T @ X)
    coef = np.linalg.lstsq(X, y, rcond=None)[0]
    e = y - X @ coef
    rss, total = float(e @ e), float(((y - y.mean()) ** 2).sum())
    sigma2 = rss / (n - k)
    return {
        "coef": coef, "cov": sigma2 * bread, "scores": X * e[:, None], "bread": bread, "residuals": e, "df": n - k,
        "loglik": -0.5 * n * (1.0 + np.log(2.0 * np.pi * rss / n)) if rss > 0 else np.inf, "sigma2": sigma2,
        "r2": 1.0 - rss / total if total > 0 else np.nan, "converged": True, "note": "",
    }  # fmt: skip


def fit_logistic(
    y: np.ndarray, X: np.ndarray, *, offset: np.ndarray | None = None, max_iter: int = 60
) -> dict[str, Any]:
    """Logistic regression by maximum likelihood (Newton-Raphson with halving).

    Where a plane separates the classes the likelihood rises for ever: the note is ``"separated"``, and coefficients
    are where the steps stopped, not estimates.

    Parameters
    ----------
    y
        0/1 (n,).
    X
        Design (n, k) of full column rank, with intercept.
    offset
        Fixed part of the linear predictor (n,).
    max_iter
        Most steps.

    Returns
    -------
    dict
        ``coef`` (k,), ``cov`` (k, k), ``scores`` (n, k), ``bread`` (k, k), ``loglik``, ``converged``, ``note``,
        ``residuals`` and ``weights`` (n,), y less its probability and the variance of y, ``aic``.
    """
    n, k = X.shape
    offset = np.zeros(n) if offset is None else offset
    coef, eta, converged = np.zeros(k), offset, False
    loglik = float((y * eta - np.logaddexp(0.0, eta)).sum())
    for _ in range(max_iter):
        mu = special.expit(eta)
        step = np.linalg.lstsq((X * (mu * (1.0 - mu))[:, None]).T @ X, X.T @ (y - mu), rcond=None)[0]
        size = min(1.0, 10.0 / max(np.abs(X @ step).max(), 1e-300))
        while size > 1e-6:
            trial = X @ (coef + size * step) + offset
            value = float((y * trial - np.logaddexp(0.0, trial)).sum())
            if value >= loglik - 1e-12 * (1.0 + abs(loglik)):
                break
            size /= 2.0
        coef, eta, loglik = coef + size * step, X @ (coef + size * step) + offset, value
        if np.abs(X @ step).max() < 1e-9:
            converged = True
            break
    mu = special.expit(eta)
    separated = (np.abs(eta - offset).max() > RUNAWAY or not converged) and separable(y, X)
    bread = np.linalg.pinv((X * (mu * (1.0 - mu))[:, None]).T @ X, hermitian=True)
    return {
        "coef": coef, "cov": bread, "scores": X * (y - mu)[:, None], "bread": bread, "loglik": loglik,
        "converged": converged, "note": "separated" if separated else "", "weights": mu * (1.0 - mu),
        "residuals": y - mu, "aic": 2.0 * (k - loglik),
    }  # fmt: skip


def separable(y: np.ndarray, X: np.ndarray) -> bool:
    """True if some ``d`` has ``X d >= 0`` wherever y is 1, ``X d <= 0`` wherever it is 0, and not 0 everywhere.

    Then, and only then, logistic regression has no finite estimate (Albert and Anderson, Biometrika 71, 1, 1984).
    Linear programme.
    """
    D = np.unique(np.where(y[:, None] > 0, X, -X), axis=0)
    D = D / np.maximum(np.abs(D).max(axis=0), 1e-300)
    found = optimize.linprog(-D.sum(axis=0), A_ub=-D, b_ub=np.zeros(len(D)), bounds=(-1, 1), method="highs")
    return bool(found.status == 0 and -found.fun > 1e-7)
