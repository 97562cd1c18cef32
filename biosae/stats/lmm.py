"""Method ``lmm`` of ``associate``: a random intercept of the patient for each of a few hundred columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from scipy import linalg, stats

from biosae.errors import StatisticsError
from biosae.stats.adjust import basis
from biosae.stats.adjust import residual as off_basis
from biosae.stats.correlation import ratio
from biosae.stats.inference import Groups, linear
from biosae.stats.mixed import fit_lmm
from biosae.stats.nested import indicator
from biosae.stats.problem import Problem, Result
from biosae.stats.robust import sandwich
from biosae.stats.score import WeightedBlock

MAX_COLUMNS = 500
"""Columns of one source that are fitted."""


def lmm(problem: Problem) -> Result:
    """Slope of the target on every column in a linear mixed model with a random intercept of the group (REML).

    p is the larger of two: the Satterthwaite t of the slope, which takes the model at its word; and a score test in the
    metric of the model without latents, ``V^(-1/2) y`` on ``V^(-1/2) x``, that adds scores up by group and so does not
    assume that all patients share one slope, or that the errors of a patient's tiles are independent. Intervals are
    the wider of Satterthwaite's and of CR1 errors with groups - 1 degrees of freedom.

    Raises
    ------
    StatisticsError
        For more than 500 columns, independent units, a target that is constant within groups, or ``permute=``.
    """
    n, m = problem.V.shape
    if m > MAX_COLUMNS:
        raise StatisticsError(
            f"method 'lmm' fits a model a column, and there are {m}; it takes at most {MAX_COLUMNS}. Screen with 'ols' "
            "or 'spearman', which count patients too, then pass adata[:, names] with controls=False, or use fit"
        )
    codes = problem.groups.codes
    if codes is None:
        raise StatisticsError("method 'lmm' needs several units a group; units are independent here: use method='ols'")
    if problem.groups.constant:
        raise StatisticsError(
            "method 'lmm': the target has one value within every group, so that there is nothing within groups to "
            "model; pool to groups (unit='patient') and use method='ols'"
        )
    if problem.scheme is not None:
        raise StatisticsError("method 'lmm' flips the signs of groups' scores; leave permute= out")
    y = problem.y.astype(np.float64)
    B = basis(problem.C, n) * np.sqrt(n)
    X = problem.V.toarray() if sp.issparse(problem.V) else np.asarray(problem.V, np.float64)
    null = fit_lmm(y, B, codes=codes)
    whiten = _whitening(null["tau2"] / null["sigma2"], codes, problem.groups.n)
    Q = linalg.qr(whiten(B), mode="economic")[0]
    V, e = whiten(X), off_basis(whiten(y[:, None])[:, 0], Q)
    coefficient, total = Q.T @ V, (V**2).sum(axis=0)
    ss = np.maximum(total - (coefficient**2).sum(axis=0), 0.0)
    ss = np.where(ss <= 1e-10 * total, 0.0, ss)
    r2 = 1.0 - ratio(ss, total)
    b = WeightedBlock(np.arange(n), V, e, Q, coefficient, ss, ratio(V.T @ e, np.sqrt(ss * (e @ e))), 0.0, r2)
    inference = linear([b], Groups(codes, problem.groups.n, False), rank_sum=False, **problem.options())
    slope, se, df, half = (np.full(m, np.nan) for _ in range(4))
    wide = stats.t.ppf(0.975, max(problem.groups.n - 1, 1))
    for j in np.flatnonzero(ss > 0):
        spread = X[:, j].std()
        try:
            found = fit_lmm(y, np.column_stack([B, (X[:, j] - X[:, j].mean()) / spread]), codes=codes)
        except np.linalg.LinAlgError:  # the column determines the target
            continue
        slope[j], se[j], df[j] = found["coef"][-1] / spread, np.sqrt(found["cov"][-1, -1]) / spread, found["df"][-1]
        robust = sandwich(found["bread"], found["scores"], codes=codes)[-1, -1] if problem.groups.n > 1 else np.inf
        half[j] = max(se[j] * stats.t.ppf(0.975, df[j]), np.sqrt(robust) / spread * wide)
    t = slope / se
    p = np.where(problem.testable, 2.0 * stats.t.sf(np.abs(t), df), np.nan)
    inference.statistic = np.where(p > inference.p, t, inference.statistic)
    inference.p = np.maximum(inference.p, p)
    inference.p_side, inference.p_maxt = np.fmax(inference.p_side, p / 2), np.maximum(inference.p_maxt, p)
    inference.how = f"larger of Satterthwaite t and {inference.how}, ICC {null['icc']:.3g} without latents"
    return Result(slope, slope - half, slope + half, inference)


def _whitening(variances: float, codes: np.ndarray, n_groups: int) -> Callable[[np.ndarray], np.ndarray]:
    """``V^(-1/2)`` of columns (n, k), ``V = I + variances ZZ'``: each row less a share of its group's sum."""
    size = np.bincount(codes, minlength=n_groups).astype(np.float64)
    share = (1.0 - 1.0 / np.sqrt(1.0 + variances * size)) / np.maximum(size, 1.0)
    A = indicator(codes, n_groups)
    return lambda values: values - (share[:, None] * (A @ values))[codes]
