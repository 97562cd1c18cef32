"""Counts with more zeros than Poisson or negative binomial: zero-inflated fits, and what decides whether one is needed.

``P(0) = pi + (1 - pi) f(0)``, ``P(y) = (1 - pi) f(y)``, ``logit pi_i = z_i' gamma`` (Lambert, Technometrics 34, 1,
1992). Vuong's test does not apply, as the models are nested on the boundary (Wilson, Econ Lett 127, 51, 2015): compare
AIC and rootograms, and ask whether some units cannot have the event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from biosae.errors import InputError
from biosae.stats.loglinear import MIN_ALPHA, checked, fit_negbin, fit_poisson, log_density

NO_INFLATION = 1e-5
"""A largest share of structural zeros below this is none."""


def fit_zip(
    y: np.ndarray, X: np.ndarray, *, offset: np.ndarray | None = None, inflation: np.ndarray | None = None
) -> dict[str, Any]:
    """Zero-inflated Poisson regression by maximum likelihood.

    Parameters
    ----------
    y, X, offset
        As :func:`biosae.stats.loglinear.fit_poisson`; the offset belongs to the counts.
    inflation
        Design (n, q) with intercept of the logit of structural zeros; None is an intercept.

    Returns
    -------
    dict
        As :func:`biosae.stats.loglinear.fit_poisson` for the count part, and ``coef_inflation`` (q,), ``cov_inflation``
        (q, q), ``inflation`` (mean share of structural zeros). ``cov`` is the count part of the inverse observed
        information of all parameters; ``scores`` are those of the count part less their regression on the scores of the
        others, so that ``bread scores'scores bread`` is the sandwich of the full model. ``mu`` is the mean of the count
        part, ``(1 - pi) mu`` that of a count.

        Notes: ``"boundary"`` where no inflation is better than some, and the fit is that without; ``"separated"`` where
        an estimate would be infinite: coefficients other than intercepts are then penalised a standard deviation by
        log-F(1, 1) (Greenland and Mansournia, Stat Med 34, 3133, 2015), a bound and not an estimate.

    Raises
    ------
    InputError
        As :func:`biosae.stats.loglinear.fit_poisson`, and for counts that are not whole numbers.
    """
    return _fit(y, X, offset, inflation, dispersed=False)


def fit_zinb(
    y: np.ndarray, X: np.ndarray, *, offset: np.ndarray | None = None, inflation: np.ndarray | None = None
) -> dict[str, Any]:
    """Zero-inflated negative binomial (NB2) regression by maximum likelihood.

    Parameters and result as :func:`fit_zip`, and ``alpha``, ``alpha_se``. Where ``alpha`` goes to 0 the fit is that of
    :func:`fit_zip`, where the inflation does that of :func:`biosae.stats.loglinear.fit_negbin`, with
    note ``"boundary"``.
    """
    return _fit(y, X, offset, inflation, dispersed=True)


def _fit(y, X, offset, inflation, *, dispersed: bool) -> dict[str, Any]:
    y, X, offset = checked(y, X, offset)
    if (y != np.round(y)).any():
        raise InputError("zero inflation needs whole counts; use fit_poisson, which is then quasi-Poisson")
    Z = np.ones((len(y), 1)) if inflation is None else np.asarray(inflation, np.float64)
    if Z.ndim != 2 or len(Z) != len(y) or not np.isfinite(Z).all():
        raise InputError(f"inflation has shape {Z.shape}; it needs one finite row a count")
    k, q = X.shape[1], Z.shape[1]
    plain = (fit_negbin if dispersed else fit_poisson)(y, X, offset=offset)
    none = {"coef_inflation": np.full(q, np.nan), "cov_inflation": np.full((q, q), np.nan), "inflation": 0.0}
    if plain["note"] == "one_class":
        return {**plain, **none, "inflation": np.nan}
    unscale = np.r_[np.sqrt((X**2).mean(axis=0)), np.sqrt((Z**2).mean(axis=0)), np.ones(int(dispersed))]
    D, E = X / unscale[:k], Z / unscale[k : k + q]

    def scores(p: np.ndarray) -> tuple[float, np.ndarray]:
        """Log-likelihood, and its derivative by every parameter for every row (n, k + q (+ 1))."""
        alpha = float(np.exp(min(p[-1], 30.0))) if dispersed else 0.0
        return _likelihood(y, D, E, p[:k], p[k : k + q], alpha, offset, dispersed)

    spread = np.r_[D.std(axis=0), E.std(axis=0), np.zeros(int(dispersed))]
    gone = plain["note"] == "separated"
    p, fine = _best(scores, _starts(plain, y, X, offset, unscale, k, q, dispersed), spread * gone)
    share = special.expit(E @ p[k : k + q])
    if share.max() < NO_INFLATION:
        return {**plain, **none, "note": plain["note"] or "boundary"}
    if dispersed and np.exp(p[-1]) < 10 * MIN_ALPHA:
        out = fit_zip(y, X, offset=offset, inflation=inflation)
        return {**out, "alpha_se": np.nan, "note": out["note"] or "boundary"}
    if not gone and (not fine or np.abs(p[k : k + q] * np.ptp(E, axis=0)).max() > 20):
        gone = True
        p, fine = _best(scores, [p * (spread == 0), p / np.maximum(np.abs(p), 1.0)], spread)
    loglik, S = scores(p)
    penalty = spread * gone
    share = special.expit(E @ p[k : k + q])
    inverse = np.linalg.inv(_hessian(scores, p, penalty))
    inverse = (inverse + inverse.T) / 2 / np.outer(unscale, unscale)
    S, beta = S * unscale, p / unscale
    bread = inverse[:k, :k]
    alpha = float(np.exp(p[-1])) if dispersed else 0.0
    mu = np.exp(X @ beta[:k] + offset)
    mean, variance = (1 - share) * mu, (1 - share) * mu * (1 + mu * (share + alpha))
    free = len(y) - len(p)
    return {
        "coef": beta[:k], "cov": bread, "bread": bread, "scores": S @ np.linalg.solve(bread, inverse[:k]).T,
        "loglik": loglik, "aic": 2.0 * len(p) - 2.0 * loglik, "converged": fine, "note": "separated" if gone else "",
        "mu": mu, "alpha": alpha, "alpha_se": alpha * float(np.sqrt(inverse[-1, -1])) if dispersed else np.nan,
        "pearson_chi2_df": float(((y - mean) ** 2 / variance).sum() / free) if free > 0 else np.nan,
        "coef_inflation": beta[k : k + q], "cov_inflation": inverse[k : k + q, k : k + q],
        "inflation": float(share.mean()),
    }  # fmt: skip


def _likelihood(y, X, Z, beta, gamma, alpha: float, offset, dispersed: bool) -> tuple[float, np.ndarray]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        mu, zeta = np.exp(X @ beta + offset), Z @ gamma
        inside, log_out, share = special.log_expit(zeta), special.log_expit(-zeta), special.expit(zeta)
        log_f = log_density(y, mu, alpha)
        zero = y == 0
        log_p = np.where(zero, np.logaddexp(inside, log_out + log_f), log_out + log_f)
        genuine = np.exp(np.where(zero, log_out + log_f - log_p, 0.0))  # chance that a zero is one of the counts
        by_eta = genuine * (y - mu) / (1.0 + alpha * mu)
        by_zeta = np.where(zero, 1.0 - genuine, 0.0) - share
        parts = [X * by_eta[:, None], Z * by_zeta[:, None]]
        if dispersed:
            theta = 1.0 / alpha
            by_tau = special.psi(y + theta) - special.psi(theta) - np.log1p(mu / theta) + (mu - y) / (mu + theta)
            parts.append((-theta * genuine * by_tau)[:, None])
    return float(log_p.sum()), np.hstack(parts)


def _starts(plain, y, X, offset, unscale, k: int, q: int, dispersed: bool) -> list[np.ndarray]:
    """Few structural zeros beside the fit without them, and as many as there are zeros too many for Poisson."""
    out = []
    expected = np.exp(log_density(np.zeros(len(y)), plain["mu"], plain["alpha"])).mean()
    positive = y > 0
    for excess in (0.05, float(np.clip((y == 0).mean() - expected, 0.1, 0.9)), 0.9 * (y == 0).mean()):
        gamma = np.zeros(q)
        gamma[0] = special.logit(np.clip(excess, 0.02, 0.95))
        beta = plain["coef"].copy()
        beta[0] -= np.log1p(-np.clip(excess, 0.0, 0.95)) if positive.any() else 0.0
        p = np.r_[beta, gamma, [np.log(max(plain["alpha"], 0.1) * (1 - 0.8 * excess))] if dispersed else []]
        out.append(p * unscale)
    return out


def _objective(scores: Callable, penalty: np.ndarray) -> Callable:
    def value(p: np.ndarray) -> tuple[float, np.ndarray]:
        loglik, S = scores(p)
        scaled = p * penalty
        prior = (0.5 * scaled + special.log_expit(-scaled)) * (penalty > 0)
        total, slope = loglik + prior.sum(), S.sum(axis=0) + penalty * (0.5 - special.expit(scaled))
        if not np.isfinite(total) or not np.isfinite(slope).all():
            return 1e300, np.zeros_like(p)
        return -total, -slope

    return value


def _hessian(scores: Callable, p: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Observed information: central differences of the analytic gradient, extrapolated once (error h^4)."""
    gradient = _objective(scores, penalty)
    H = np.empty((len(p), len(p)))
    for i in range(len(p)):
        h = 1e-3 * max(1.0, min(abs(p[i]), 10.0))
        d = np.zeros_like(p)
        d[i] = h
        wide = (gradient(p + 2 * d)[1] - gradient(p - 2 * d)[1]) / (4 * h)
        H[i] = (4.0 * (gradient(p + d)[1] - gradient(p - d)[1]) / (2 * h) - wide) / 3.0
    return (H + H.T) / 2


def _best(scores: Callable, starts: list[np.ndarray], penalty: np.ndarray) -> tuple[np.ndarray, bool]:
    """Best optimum over the starts: BFGS, then Newton steps until the gradient is nothing."""
    value = _objective(scores, penalty)
    found = [optimize.minimize(value, p, jac=True, method="BFGS", options={"maxiter": 500}) for p in starts]
    p = min(found, key=lambda f: f.fun).x
    at, g = value(p)
    for _ in range(20):
        try:
            step = np.linalg.solve(_hessian(scores, p, penalty), -g)
        except np.linalg.LinAlgError:
            return p, False
        if g @ step > 0 or not np.isfinite(step).all():
            return p, False
        size = 1.0
        while size > 1e-4 and value(p + size * step)[0] > at + 1e-12 * abs(at):
            size /= 2
        if size <= 1e-4:
            return p, bool(-(g @ step) < 1e-8)
        p = p + size * step
        at, g = value(p)
        if np.abs(step).max() < 1e-9:
            return p, True
    return p, False


def compare_counts(
    y: np.ndarray, X: np.ndarray, *, offset: np.ndarray | None = None, inflation: np.ndarray | None = None
) -> pd.DataFrame:
    """Poisson, NB2 and their zero-inflated forms on the same counts, by AIC.

    Returns
    -------
    DataFrame
        One row a model: ``model, loglik, n_parameters, aic, delta_aic, alpha, inflation, pearson_chi2_df,
        zeros_observed, zeros_expected, note``. An excess of zeros that NB2 explains is no zero inflation.

    Raises
    ------
    InputError
        As the fits.
    """
    rows = []
    for model in ("poisson", "negbin", "zip", "zinb"):
        if model in ("poisson", "negbin"):
            found = {"poisson": fit_poisson, "negbin": fit_negbin}[model](y, X, offset=offset)
        else:
            found = {"zip": fit_zip, "zinb": fit_zinb}[model](y, X, offset=offset, inflation=inflation)
        share = found.get("inflation", 0.0)
        at_zero = np.exp(log_density(np.zeros(len(found["mu"])), found["mu"], found["alpha"]))
        pi = share
        if inflation is not None and np.isfinite(found.get("coef_inflation", [np.nan])).all():
            pi = special.expit(np.asarray(inflation) @ found["coef_inflation"])
        rows.append(
            {
                "model": model, "loglik": found["loglik"],
                "n_parameters": (found["aic"] + 2.0 * found["loglik"]) / 2.0, "aic": found["aic"],
                "alpha": found["alpha"], "inflation": share, "pearson_chi2_df": found["pearson_chi2_df"],
                "zeros_observed": int((np.asarray(y) == 0).sum()),
                "zeros_expected": float((pi + (1 - pi) * at_zero).sum()), "note": found["note"],
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    table.insert(4, "delta_aic", table["aic"] - table["aic"].min())
    return table


def rootogram(
    y: np.ndarray, mu: np.ndarray, *, alpha: float = 0.0, inflation: float | np.ndarray = 0.0,
    max_count: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Observed and expected number of units with each count (Kleiber and Zeileis, Am Stat 70, 296, 2016).

    Parameters
    ----------
    y
        Whole counts (n,).
    mu, alpha, inflation
        Means (n,) of the count part, dispersion and share of structural zeros (one number, or one a unit).
    max_count
        Largest count with a row of its own; the last row holds all that are larger. None is the largest count.

    Returns
    -------
    DataFrame
        ``count, observed, expected, hanging`` with ``hanging = sqrt(observed) - sqrt(expected)``: bars that hang from
        the expected curve end below (above) zero where the model expects too many (too few).

    Raises
    ------
    InputError
        For counts that are negative or not whole.
    """
    y, mu = np.asarray(y, np.float64), np.asarray(mu, np.float64)
    if (y != np.round(y)).any() or (y < 0).any():
        raise InputError("a rootogram needs whole counts of 0 or more")
    top = int(y.max(initial=0)) if max_count is None else int(max_count)
    k = np.arange(top + 1)
    observed = np.bincount(np.minimum(y, top + 1).astype(int), minlength=top + 2).astype(np.float64)
    expected = np.array(
        [((1 - inflation) * np.exp(log_density(np.full(len(y), float(c)), mu, alpha))).sum() for c in k]
    )
    expected[0] += np.sum(inflation * np.ones(len(y)))
    rest = max(len(y) - expected.sum(), 0.0)
    table = pd.DataFrame({"count": np.r_[k, top + 1], "observed": observed, "expected": np.r_[expected, rest]})
    return table.assign(hanging=np.sqrt(table["observed"]) - np.sqrt(table["expected"]))
