"""Counts in an area or a time against latents: Poisson and negative binomial score screens, and the fits.

Per patient or sample, ``log mu_i = x_i' beta + log exposure_i`` (:mod:`biosae.stats.loglinear`). The model without
latents is fitted once; every column has the score test added to it (:mod:`biosae.stats.score`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from biosae.errors import StatisticsError
from biosae.stats.adjust import basis
from biosae.stats.loglinear import (
    NonIntegerCountsWarning,
    checked,
    coefficients,
    described,
    fit_dispersed,
    fit_negbin,
    fit_poisson,
)  # fmt: skip
from biosae.stats.problem import Problem, Result
from biosae.stats.score import finish, score_test
from biosae.stats.zeros import compare_counts, fit_zinb, fit_zip, rootogram

__all__ = [
    "NonIntegerCountsWarning", "compare_counts", "fit_negbin", "fit_poisson", "fit_zinb", "fit_zip", "negbin",
    "poisson", "rootogram",
]  # fmt: skip

MAX_DISPERSION = 1.25
"""Pearson chi2/df above which Poisson residuals of unequal means are not exchangeable."""


def poisson(problem: Problem) -> Result:
    """Score test of Poisson regression for every column, robust to overdispersion; rate ratio a SD."""
    return _screen(problem, "poisson")


def negbin(problem: Problem) -> Result:
    """Score test of NB2 regression for every column, ``alpha`` from the model without latents; rate ratio a SD."""
    return _screen(problem, "negbin")


def _screen(problem: Problem, model: str) -> Result:
    n = len(problem.y)
    B = basis(problem.C, n) * np.sqrt(n)
    y, B, offset = checked(problem.y, B, problem.offset)
    if model == "negbin":
        null = fit_dispersed(y, B, offset)
    else:
        null = described(y, B, offset, *coefficients(y, B, offset, 0.0), 0.0)
    mu, alpha = null["mu"], null["alpha"]
    rearranged = problem.scheme is not None and problem.scheme.arrange is not None
    if rearranged and model == "poisson" and np.ptp(mu) > 0 and null["pearson_chi2_df"] > MAX_DISPERSION:
        raise StatisticsError(
            f"counts vary {null['pearson_chi2_df']:.3g} times more than Poisson's, so residuals of units with unequal "
            f"means may not be rearranged (permute={problem.permute!r}); use method='negbin'"
        )
    score = score_test(
        problem, residual=(y - mu) / (1.0 + alpha * mu), weight=mu / (1.0 + alpha * mu), robust=model == "poisson"
    )

    def full(x: np.ndarray) -> dict[str, Any]:
        X = np.column_stack([B, x])
        if model == "negbin":
            return fit_dispersed(y, X, offset)
        return described(y, X, offset, *coefficients(y, X, offset, 0.0), 0.0)

    result = finish(problem, score, full, k=B.shape[1] + 1)
    overdispersion = f"alpha {alpha:.4g}" if model == "negbin" else f"Pearson chi2/df {null['pearson_chi2_df']:.4g}"
    result.inference.how = f"score test of {model} ({overdispersion}), {result.inference.how}"
    return result
