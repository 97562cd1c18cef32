"""Regression of counts in an area or a time: Poisson and negative binomial fits.

``log mu_i = x_i' beta + offset_i``, the offset the logarithm of the exposure; ``Var y = mu + alpha mu^2`` (NB2, Hilbe,
Negative Binomial Regression, 2011; ``alpha = 0`` is Poisson). Zero inflation: :mod:`biosae.stats.zeros`.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
from scipy import linalg, optimize, special, stats

from biosae.errors import InputError

MIN_ALPHA = 1e-6
"""A dispersion below this is that of Poisson."""
FAR = 12.0
"""A linear predictor this far below its weighted mean raises the question whether the estimate is finite."""


class NonIntegerCountsWarning(UserWarning):
    """Counts are not whole numbers: variances are scaled by the dispersion, and there is no likelihood."""


def fit_poisson(y: np.ndarray, X: np.ndarray, *, offset: np.ndarray | None = None) -> dict[str, Any]:
    """Poisson regression by Newton steps.

    Parameters
    ----------
    y
        Counts (n,).
    X
        Design (n, k) with intercept, of full column rank.
    offset
        Logarithm of the exposure (n,); None is 0.

    Returns
    -------
    dict
        ``coef`` (k,), ``cov`` and ``bread`` (k, k; the inverse expected information), ``scores`` (n, k; rows sum to 0
        at the optimum), ``loglik``, ``aic``, ``converged``, ``mu`` (n,), ``alpha`` 0, ``pearson_chi2_df`` and ``note``:

        * ``"separated"``: some combination of columns is silent wherever there is a count, and the estimate would be
          infinite; coefficients are those of the likelihood penalised by Jeffreys' prior (Firth, Biometrika 80, 27,
          1993) and a bound, not an estimate;
        * ``"quasi"``: counts are not whole numbers; ``cov`` is multiplied by ``pearson_chi2_df``, no likelihood;
        * ``"one_class"``: all counts are zero, and everything is NaN.

    Raises
    ------
    InputError
        For negative or non-finite counts, shapes that do not match, or collinear columns.

    Warns
    -----
    NonIntegerCountsWarning
        For counts that are not whole numbers.
    """
    y, X, offset = checked(y, X, offset)
    if not y.any():
        return _nothing(X)
    return described(y, X, offset, *coefficients(y, X, offset, 0.0), 0.0)


def fit_negbin(y: np.ndarray, X: np.ndarray, *, offset: np.ndarray | None = None) -> dict[str, Any]:
    """Negative binomial (NB2) regression, ``alpha`` (``1 / theta`` of MASS::glm.nb) by maximum likelihood.

    Coefficients (Newton) and ``alpha`` (root of its score) in turn until neither changes; their information is
    block-diagonal, so that ``cov`` is that of known ``alpha`` (Lawless, Can J Stat 15, 209, 1987).

    Returns
    -------
    dict
        As :func:`fit_poisson`, and ``alpha``, ``alpha_se`` (observed information), ``p_overdispersion``: half the
        chi-squared(1) p of the likelihood ratio against Poisson, whose null lies on the boundary (Self and Liang, J Am
        Stat Assoc 82, 605, 1987). Where no ``alpha > 0`` is better than Poisson the fit is Poisson's, ``alpha`` 0,
        p 1 and note ``"boundary"``.

    Raises
    ------
    InputError
        As :func:`fit_poisson`.
    """  # fmt: skip
    y, X, offset = checked(y, X, offset)
    if not y.any():
        return {**_nothing(X), "alpha_se": np.nan, "p_overdispersion": np.nan}
    return fit_dispersed(y, X, offset)


def fit_dispersed(y: np.ndarray, X: np.ndarray, offset: np.ndarray, start: tuple | None = None) -> dict[str, Any]:
    """``start``: coefficients and ``alpha`` near the optimum."""
    beta, fine, separated = coefficients(y, X, offset, 0.0)
    poisson = described(y, X, offset, beta, fine, separated, 0.0)
    boundary = {**poisson, "alpha_se": np.nan, "p_overdispersion": 1.0}
    boundary["note"] = poisson["note"] or "boundary"
    mu = poisson["mu"]
    excess = float(((y - mu) ** 2 - y).sum())
    if excess <= 0:
        return boundary
    u, count = np.unique(y, return_counts=True)
    beta, alpha = start or (beta, max(excess / float((mu**2).sum()), 10 * MIN_ALPHA))
    change, fine = 0.5, False
    for _ in range(100):
        beta, settled, separated = coefficients(y, X, offset, alpha, start=beta, firth=separated)
        mu = np.exp(X @ beta + offset)
        found = _alpha(y, mu, u, count, np.log(alpha), change)
        if found <= MIN_ALPHA:
            return boundary
        change, alpha = abs(np.log(found / alpha)), found
        if change < 1e-11:
            fine = settled
            break
    out = described(y, X, offset, beta, fine, separated, alpha)
    out["alpha_se"] = float(alpha / np.sqrt(-_alpha_slope(np.log(alpha), y, mu, u, count)))
    ratio = 2.0 * (out["loglik"] - poisson["loglik"])
    out["p_overdispersion"] = float(0.5 * stats.chi2.sf(max(ratio, 0.0), 1)) if np.isfinite(ratio) else np.nan
    return out


def checked(y: Any, X: Any, offset: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, design and offset as float64 arrays that fit together; warns of counts that are not whole."""
    y, X = np.asarray(y, np.float64), np.asarray(X, np.float64)
    offset = np.zeros(len(y)) if offset is None else np.asarray(offset, np.float64)
    if X.ndim != 2 or len(X) != len(y) or len(offset) != len(y):
        raise InputError(f"y has shape {y.shape}, X {X.shape} and offset {offset.shape}; they need one row a unit")
    if not (np.isfinite(y).all() and np.isfinite(X).all() and np.isfinite(offset).all()):
        raise InputError("counts, design or offset hold NaN or infinite values; leave those rows out")
    if (y < 0).any():
        raise InputError(f"{int((y < 0).sum())} counts are negative; counts are 0 or more")
    if np.linalg.matrix_rank(X / np.maximum(np.sqrt((X**2).sum(axis=0)), 1e-300)) < X.shape[1]:
        raise InputError("columns of X are collinear; leave one of them out")
    if (y != np.round(y)).any():
        warnings.warn(
            "counts are not whole numbers (a mean, or the sum of a detector's probabilities): variances are scaled by "
            "the dispersion and there is no likelihood or AIC; round them if they are counts",
            NonIntegerCountsWarning,
            stacklevel=3,
        )
    return y, X, offset


def log_density(y: np.ndarray, mu: np.ndarray, alpha: float) -> np.ndarray:
    """Logarithm of the Poisson (``alpha`` 0) or NB2 probability of each count."""
    if alpha == 0:
        return special.xlogy(y, mu) - mu - special.gammaln(y + 1)
    theta = 1.0 / alpha
    kernel = special.gammaln(y + theta) - special.gammaln(theta) - special.gammaln(y + 1)
    return kernel + special.xlogy(y, alpha * mu) - (y + theta) * np.log1p(alpha * mu)


def _information(X: np.ndarray, mu: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    w = mu / (1.0 + alpha * mu)
    return X.T @ (X * w[:, None]), w


def coefficients(
    y: np.ndarray, X: np.ndarray, offset: np.ndarray, alpha: float, *, start: np.ndarray | None = None,
    firth: bool = False,
) -> tuple[np.ndarray, bool, bool]:  # fmt: skip
    """Coefficients at given ``alpha``, whether they converged, and whether they are penalised for separation."""
    scale = np.sqrt((X**2).mean(axis=0))
    Z = X / scale

    def objective(b: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            mu = np.exp(Z @ b + offset)
            if alpha == 0:
                value = y @ (Z @ b) - mu.sum()
            else:
                value = y @ (Z @ b) - ((y + 1.0 / alpha) * np.log1p(alpha * mu)).sum()
        if firth and np.isfinite(value):
            value += 0.5 * np.linalg.slogdet(_information(Z, mu, alpha)[0])[1]
        return (value if np.isfinite(value) else -np.inf), mu

    if start is None:
        mu = 0.5 * (y + np.exp(offset) * y.sum() / np.exp(offset).sum())
        root = np.sqrt(mu)
        b = np.linalg.lstsq(Z * root[:, None], root * (np.log(mu) - offset + (y - mu) / mu), rcond=None)[0]
    else:
        b = start * scale
    value, mu = objective(b)
    if not np.isfinite(value):
        b = np.linalg.lstsq(Z, np.full(len(y), np.log(y.sum() / np.exp(offset).sum())), rcond=None)[0]
        value, mu = objective(b)
    fine = False
    for _ in range(60):
        r = (y - mu) / (1.0 + alpha * mu)
        if firth:
            H, w = _information(Z, mu, alpha)
            h = np.einsum("ij,ij->i", Z, np.linalg.solve(H, Z.T).T) * w
            r = r + 0.5 * h / (1.0 + alpha * mu)
        else:
            w = mu * (1.0 + alpha * y) / (1.0 + alpha * mu) ** 2
            H = Z.T @ (Z * w[:, None])
        g = Z.T @ r
        try:
            step = linalg.cho_solve(linalg.cho_factor(H), g)
        except (linalg.LinAlgError, ValueError):
            break
        decrement, size = float(g @ step), 1.0
        if decrement < 1e-22 * max(float(y.sum()), 1.0) or not np.isfinite(decrement):
            fine = np.isfinite(decrement)
            break
        while size > 1e-6:
            after, mu_after = objective(b + size * step)
            if after >= value - 1e-12 * abs(value):
                break
            size /= 2
        if size <= 1e-6:
            fine = decrement < 1e-8
            break
        b, value, mu = b + size * step, after, mu_after
        if decrement < 1e-16 * max(float(y.sum()), 1.0):  # quadratic convergence: this step was the last that counts
            fine = True
            break
    beta = b / scale
    if not firth:
        eta = Z @ b
        far = (eta < np.average(eta, weights=mu) - FAR).any() if np.isfinite(eta).all() and mu.any() else True
        if (far or not fine) and recedes(y, Z):
            return coefficients(y, X, offset, alpha, firth=True)
    return beta, bool(fine), firth


def recedes(y: np.ndarray, X: np.ndarray) -> bool:
    """True if some ``d`` has ``X d = 0`` wherever ``y > 0``, ``X d <= 0`` elsewhere and somewhere below 0.

    The likelihood of a log-linear count model then grows without end along ``d`` (Correia, Guimaraes and Zylkin, arXiv
    1903.01633, 2019). Linear programme on the null space of the rows with a count.
    """
    null = linalg.null_space(X[y > 0], rcond=1e-10)
    if null.shape[1] == 0:
        return False
    A = np.unique(np.round(X[y == 0] @ null, 10), axis=0)
    found = optimize.linprog(A.sum(axis=0), A_ub=A, b_ub=np.zeros(len(A)), bounds=(-1, 1), method="highs")
    return bool(found.status == 0 and found.fun < -1e-7)


def _alpha_score(tau: float, y: np.ndarray, mu: np.ndarray, u: np.ndarray, count: np.ndarray) -> float:
    """Derivative of the log-likelihood by ``tau = log alpha``; ``u``, ``count``: distinct counts and how often."""
    theta = np.exp(-tau)
    g = count @ (special.psi(u + theta) - special.psi(theta))
    return -theta * float(g + (-np.log1p(mu / theta) + (mu - y) / (mu + theta)).sum())


def _alpha_slope(tau: float, y: np.ndarray, mu: np.ndarray, u: np.ndarray, count: np.ndarray) -> float:
    """Second derivative by ``tau``, at a root of the first."""
    theta = np.exp(-tau)
    h = count @ (special.polygamma(1, u + theta) - special.polygamma(1, theta))
    return theta**2 * float(h + (mu / (theta * (mu + theta)) - (mu - y) / (mu + theta) ** 2).sum())


def _alpha(y, mu, u, count, tau: float, width: float) -> float:
    """Root of the score of ``log alpha`` near ``tau``; 0 where it lies below :data:`MIN_ALPHA`."""
    score = partial(_alpha_score, y=y, mu=mu, u=u, count=count)
    width = min(max(2.0 * width, 1e-6), 1.0)
    low = high = tau
    step = width
    while score(low) <= 0:
        low, step = low - step, 2 * step
        if low < np.log(MIN_ALPHA):
            return 0.0
    step = width
    while score(high) >= 0 and high < 20:
        high, step = high + step, 2 * step
    return float(np.exp(optimize.brentq(score, low, high, xtol=1e-13, rtol=1e-14))) if high < 20 else float(np.exp(20))


def _nothing(X: np.ndarray) -> dict[str, Any]:
    k = X.shape[1]
    none = np.full((k, k), np.nan)
    return {
        "coef": np.full(k, np.nan), "cov": none, "bread": none, "scores": np.full(X.shape, np.nan), "loglik": np.nan,
        "aic": np.nan, "converged": False, "note": "one_class", "mu": np.zeros(len(X)), "alpha": np.nan,
        "pearson_chi2_df": np.nan,
    }  # fmt: skip


def described(y, X, offset, beta, fine: bool, separated: bool, alpha: float) -> dict[str, Any]:
    """What is reported of coefficients and ``alpha``."""
    mu = np.exp(X @ beta + offset)
    H, w = _information(X, mu, alpha)
    bread = np.linalg.inv(H)
    bread = (bread + bread.T) / 2
    r = (y - mu) / (1.0 + alpha * mu)
    if separated:
        r = r + 0.5 * np.einsum("ij,jk,ik->i", X, bread, X) * w / (1.0 + alpha * mu)
    df = len(y) - X.shape[1]
    pearson = float(((y - mu) ** 2 / (mu * (1.0 + alpha * mu))).sum() / df) if df > 0 else np.nan
    quasi = bool((y != np.round(y)).any())
    loglik = np.nan if quasi else float(log_density(y, mu, alpha).sum())
    return {
        "coef": beta, "cov": bread * pearson if quasi else bread, "bread": bread, "scores": X * r[:, None],
        "loglik": loglik, "aic": 2.0 * (X.shape[1] + (alpha > 0)) - 2.0 * loglik, "converged": fine,
        "note": "separated" if separated else "quasi" if quasi else "", "mu": mu, "alpha": float(alpha),
        "pearson_chi2_df": pearson,
    }  # fmt: skip
