"""Grades, stages and other ordered classes: proportional-odds regression and its score screen over all latents.

``logit P(y <= k) = theta_k - x' beta`` (McCullagh, J R Stat Soc B 42, 109, 1980), signs as in MASS::polr: a positive
``beta`` goes with higher classes, and ``exp(beta)`` is the odds ratio of every "above k" against "k or below".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy import linalg, optimize, special, stats

from biosae.errors import InputError
from biosae.stats.adjust import basis
from biosae.stats.correlation import dot
from biosae.stats.nested import indicator
from biosae.stats.problem import Problem, Result
from biosae.stats.score import finish, score_test

FAR = 10.0
"""A coefficient that moves the logit by more than this over the column's range may be infinite."""


def fit_ordinal(y: np.ndarray, X: np.ndarray) -> dict[str, Any]:
    """Proportional-odds regression by Newton steps (a concave problem: Pratt, J Am Stat Assoc 76, 103, 1981).

    Parameters
    ----------
    y
        Ordered classes (n,): numbers whose order is that of the classes; at least two distinct.
    X
        Design (n, k) without intercept (the thresholds stand for it), of full column rank with one.

    Returns
    -------
    dict
        ``coef`` (k,), ``thresholds`` (K - 1,), ``levels`` (K,), ``cov`` = ``bread`` (k, k; block of the inverse
        observed information), ``scores`` (n, k; less their regression on the scores of the thresholds, so that
        ``bread scores'scores bread`` is the sandwich of the full model), ``loglik``, ``aic``, ``converged``, ``note``,
        ``p_proportional`` and ``p_proportional_all``: :func:`proportional_odds` of the last and of all columns.

        Notes: ``"separated"``: some combination of columns orders the classes without a fault, and the estimate would
        be infinite; coefficients are penalised a standard deviation by log-F(1, 1) (Greenland and Mansournia, Stat Med
        34, 3133, 2015), a bound and not an estimate. ``"one_class"``: y has one value, and everything is NaN.

    Raises
    ------
    InputError
        For NaN, infinite values, shapes that do not match, or columns that are constant or collinear.
    """
    y, X = np.asarray(y, np.float64), np.asarray(X, np.float64)
    if X.ndim != 2 or len(X) != len(y):
        raise InputError(f"y has shape {y.shape} and X {X.shape}; they need one row a unit")
    if not (np.isfinite(y).all() and np.isfinite(X).all()):
        raise InputError("classes or design hold NaN or infinite values; leave those rows out")
    D = np.column_stack([np.ones(len(y)), X])
    if np.linalg.matrix_rank(D / np.maximum(np.sqrt((D**2).sum(axis=0)), 1e-300)) < D.shape[1]:
        raise InputError("columns of X are constant or collinear; thresholds stand for the intercept, so give none")
    levels, codes = np.unique(y, return_inverse=True)
    if len(levels) < 2:
        k = X.shape[1]
        none = np.full((k, k), np.nan)
        return {
            "coef": np.full(k, np.nan), "thresholds": np.empty(0), "levels": levels, "cov": none, "bread": none,
            "scores": np.full(X.shape, np.nan), "loglik": np.nan, "aic": np.nan, "converged": False,
            "note": "one_class", "p_proportional": np.nan, "p_proportional_all": np.nan,
        }  # fmt: skip
    out = _fit(codes, X)
    usable = out["note"] == "" and X.shape[1] > 0
    last = proportional_odds(codes, X, out, columns=[X.shape[1] - 1]) if usable else np.nan
    every = proportional_odds(codes, X, out) if usable else np.nan
    return {**out, "levels": levels, "p_proportional": last, "p_proportional_all": every}


class _Rows:
    """Probability of each row's class and its derivatives by the two thresholds around it."""

    def __init__(self, codes: np.ndarray, theta: np.ndarray, eta: np.ndarray) -> None:
        edge = np.r_[-np.inf, theta, np.inf]
        a, b = edge[codes + 1] - eta, edge[codes] - eta
        Fa, Fb = special.expit(a), special.expit(b)
        self.P = np.where(b > 0, special.expit(-b) - special.expit(-a), Fa - Fb)
        self.fine = bool((self.P > 0).all())
        with np.errstate(divide="ignore", invalid="ignore"):
            fa, fb = Fa * special.expit(-a), Fb * special.expit(-b)
            self.up, self.low = fa / self.P, fb / self.P
            self.aa = fa * (special.expit(-a) - Fa) / self.P - self.up**2
            self.bb = -fb * (special.expit(-b) - Fb) / self.P - self.low**2
        self.ab = self.up * self.low

    @property
    def residual(self) -> np.ndarray:
        """Derivative of the log-likelihood by the linear predictor."""
        return self.low - self.up


def _scores(rows: _Rows, A: sp.csr_matrix, X: np.ndarray) -> np.ndarray:
    """Derivatives (n, K - 1 + k); ``A`` (K, n) the indicator of classes."""
    theta = A[:-1].T.multiply(rows.up[:, None]) - A[1:].T.multiply(rows.low[:, None])
    return np.hstack([theta.toarray(), X * rows.residual[:, None]])


def _information(rows: _Rows, A: sp.csr_matrix, X: np.ndarray) -> np.ndarray:
    """Observed information of thresholds and coefficients."""
    diagonal, cross = (A @ rows.aa)[:-1] + (A @ rows.bb)[1:], (A @ rows.ab)[1:-1]
    H = np.diag(diagonal) + np.diag(cross, 1) + np.diag(cross, -1)
    side = -(A @ ((rows.aa + rows.ab)[:, None] * X))[:-1] - (A @ ((rows.bb + rows.ab)[:, None] * X))[1:]
    both = X.T @ ((rows.aa + rows.bb + 2 * rows.ab)[:, None] * X)
    return -np.block([[H, side], [side.T, both]])


def _fit(codes: np.ndarray, X: np.ndarray, *, penalised: bool = False) -> dict[str, Any]:
    n, k = X.shape
    K = int(codes.max()) + 1
    A = indicator(codes, K)
    centre, scale = X.mean(axis=0), X.std(axis=0)
    D = (X - centre) / scale
    share = np.cumsum(np.bincount(codes, minlength=K))[:-1] / n
    p = np.r_[special.logit(share), np.zeros(k)]

    def value(p: np.ndarray) -> tuple[float, _Rows]:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = _Rows(codes, p[: K - 1], D @ p[K - 1 :])
        if not rows.fine or (np.diff(p[: K - 1]) <= 0).any():
            return -np.inf, rows
        prior = (0.5 * p[K - 1 :] + special.log_expit(-p[K - 1 :])).sum() if penalised else 0.0
        return float(np.log(rows.P).sum() + prior), rows

    at, rows = value(p)
    fine = False
    for _ in range(100):
        g, H = _scores(rows, A, D).sum(axis=0), _information(rows, A, D)
        if penalised:
            q = special.expit(p[K - 1 :])
            g[K - 1 :] += 0.5 - q
            H[range(K - 1, K - 1 + k), range(K - 1, K - 1 + k)] += q * (1 - q)
        try:
            step = linalg.cho_solve(linalg.cho_factor(H), g)
        except (linalg.LinAlgError, ValueError):
            break
        decrement, size = float(g @ step), 1.0
        if decrement < 1e-22 * n:
            fine = True
            break
        while size > 1e-6:
            after, rows_after = value(p + size * step)
            if after >= at - 1e-13 * abs(at):
                break
            size /= 2
        if size <= 1e-6:
            fine = decrement < 1e-8
            break
        p, at, rows = p + size * step, after, rows_after
        if decrement < 1e-15 * n and size == 1.0:
            fine = True
            break
    if not penalised and k and (not fine or (np.abs(p[K - 1 :]) * np.ptp(D, axis=0)).max() > FAR) and recedes(codes, D):
        return _fit(codes, X, penalised=True)
    H = _information(rows, A, D)
    if penalised:
        q = special.expit(p[K - 1 :])
        H[range(K - 1, K - 1 + k), range(K - 1, K - 1 + k)] += q * (1 - q)
    inverse = np.linalg.inv(H)
    inverse = (inverse + inverse.T) / 2
    bread = inverse[K - 1 :, K - 1 :] / np.outer(scale, scale)
    S = _scores(rows, A, D)
    influence = S @ inverse[:, K - 1 :] / scale
    beta = p[K - 1 :] / scale
    return {
        "coef": beta, "thresholds": p[: K - 1] + centre @ beta, "cov": bread, "bread": bread,
        "scores": np.linalg.solve(bread, influence.T).T if k else influence,
        "loglik": float(np.log(rows.P).sum()), "aic": 2.0 * (K - 1 + k) - 2.0 * float(np.log(rows.P).sum()),
        "converged": fine, "note": "separated" if penalised else "",
    }  # fmt: skip


def recedes(codes: np.ndarray, X: np.ndarray) -> bool:
    """True if thresholds and coefficients can grow for ever without a row becoming less likely: linear programme."""
    K = int(codes.max()) + 1
    upper, lower = np.flatnonzero(codes < K - 1), np.flatnonzero(codes > 0)
    up = np.hstack([np.eye(K - 1)[codes[upper]], -X[upper]])
    down = np.hstack([-np.eye(K - 1)[codes[lower] - 1], X[lower]])
    rows = np.unique(np.round(np.vstack([up, down]), 10), axis=0)
    found = optimize.linprog(-rows.sum(axis=0), A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=(-1, 1), method="highs")
    return bool(found.status == 0 and found.fun < -1e-7)


def _expected(theta: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected information of a row's thresholds: diagonals (n, K - 1) and their neighbours (n, K - 2)."""
    F = special.expit(theta[None, :] - eta[:, None])
    f = F * (1 - F)
    P = np.maximum(np.diff(np.hstack([np.zeros((len(eta), 1)), F, np.ones((len(eta), 1))]), axis=1), 1e-300)
    return f**2 * (1 / P[:, :-1] + 1 / P[:, 1:]), -f[:, :-1] * f[:, 1:] / P[:, 1:-1]


def _sums(diagonal: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Row sums of the tridiagonal matrices, (n, K - 1)."""
    out = diagonal.copy()
    out[:, :-1] += cross
    out[:, 1:] += cross
    return out


def proportional_odds(
    y: np.ndarray, X: np.ndarray, fit: dict[str, Any], *, columns: list[int] | None = None
) -> float:  # fmt: skip
    """p of the score test that the coefficients of ``columns`` (None: all) are the same at every threshold.

    The alternative gives each of the K - 1 thresholds a coefficient of its own; expected information at the
    proportional-odds ``fit``; chi-squared with (K - 2) q degrees of freedom (Peterson and Harrell, Appl Stat 39, 205,
    1990). It rejects too often where classes are small; NaN for two classes. Rows count as independent.
    """
    codes = np.unique(np.asarray(y, np.float64), return_inverse=True)[1]
    X = np.asarray(X, np.float64)
    columns = list(range(X.shape[1])) if columns is None else [c % X.shape[1] for c in columns]
    others = [c for c in range(X.shape[1]) if c not in columns]
    theta = fit["thresholds"] - X.mean(axis=0) @ fit["coef"]
    D = (X - X.mean(axis=0)) / X.std(axis=0)
    eta = D @ (fit["coef"] * X.std(axis=0))
    T, q = len(theta), len(columns)
    if T < 2 or q == 0:
        return float("nan")
    rows, A = _Rows(codes, theta, eta), indicator(codes, T + 1)
    t = _scores(rows, A, D[:, :0])
    M, other = np.column_stack([np.ones(len(D)), D[:, columns]]), D[:, others]
    diagonal, cross = _expected(theta, eta)
    total = _sums(diagonal, cross)
    w, size = 1 + q, T * (1 + q)
    J = np.zeros((size + len(others), size + len(others)))
    for s in range(T):
        here = slice(s * w, (s + 1) * w)
        J[here, here] = M.T @ (diagonal[:, [s]] * M)
        J[here, size:] = M.T @ (total[:, [s]] * other)
        J[size:, here] = J[here, size:].T
        if s + 1 < T:
            after = slice((s + 1) * w, (s + 2) * w)
            J[here, after] = M.T @ (cross[:, [s]] * M)
            J[after, here] = J[here, after].T
    J[size:, size:] = other.T @ (total.sum(axis=1)[:, None] * other)
    g = np.r_[(t.T @ M).ravel(), other.T @ t.sum(axis=1)]
    return float(stats.chi2.sf(g @ np.linalg.lstsq(J, g, rcond=None)[0], (T - 1) * q))


def ordinal(problem: Problem) -> Result:
    """Score test of proportional odds for every column; cumulative odds ratio of higher classes a SD of the latent.

    Without covariates the score is the covariance of the latent with the mid-ranks (ridits) of the classes, so that the
    p is that of their correlation; a latent of two values gives the Wilcoxon test. With covariates the variance is the
    efficient one, less what thresholds and covariates explain.
    """
    n = len(problem.y)
    codes = np.unique(problem.y, return_inverse=True)[1]
    B = basis(problem.C, n)[:, 1:] * np.sqrt(n)
    null = _fit(codes, B)
    eta = B @ null["coef"]
    rows = _Rows(codes, null["thresholds"], eta)
    total = _sums(*_expected(null["thresholds"], eta))
    w = total.sum(axis=1)
    variance = None
    if B.shape[1]:
        A = np.hstack([total, -w[:, None] * B])
        diagonal, cross = (part.sum(axis=0) for part in _expected(null["thresholds"], eta))
        theta = np.diag(diagonal) + np.diag(cross, 1) + np.diag(cross, -1)
        side = -total.T @ B
        J = np.block([[theta, side], [side.T, B.T @ (w[:, None] * B)]])
        known = linalg.solve_triangular(np.linalg.cholesky(J), dot(problem.V, A).T, lower=True)
        square = problem.V.multiply(problem.V) if sp.issparse(problem.V) else problem.V**2
        variance = dot(square, w) - (known**2).sum(axis=0)
    score = score_test(problem, residual=rows.residual, weight=w, robust=False, variance=variance)

    def full(x: np.ndarray) -> dict[str, Any]:
        return _fit(codes, np.column_stack([B, x]))

    result = finish(problem, score, full, k=B.shape[1] + int(codes.max()) + 1)
    result.inference.how = f"score test of proportional odds ({int(codes.max()) + 1} classes), {result.inference.how}"
    return result
