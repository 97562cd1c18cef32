"""Score tests of one latent at a time added to a regression that was fitted once, and full fits of the best.

A regression without latents has score residuals ``r_i`` (derivative of the log-likelihood by the linear predictor) and
weights ``w_i`` (their variance). The score of column x is ``U = sum x_i r_i``, its variance
``x'(W - W C (C'W C)^-1 C'W) x`` (Rao 1948; Cox and Hinkley, Theoretical Statistics, 1974). With ``V = W^(1/2) x``,
``e = W^(-1/2) r`` and M the projection off ``W^(1/2) [1, C]`` these are ``U = (M V)'e`` and ``|M V|^2``: the linear
score of :mod:`biosae.stats.inference`, with its groups, permutations and skewness correction. Codes stay sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy import linalg, stats

from biosae.stats.adjust import basis
from biosae.stats.adjust import residual as off_basis
from biosae.stats.correlation import Columns, dot, moments, ratio
from biosae.stats.inference import FEW, Block, Inference, block, linear
from biosae.stats.problem import Problem, Result

PENALISED = ("separated", "few_events")
"""Notes of a fit whose coefficient is shrunk, which the table repeats."""


@dataclass
class WeightedBlock(Block):
    """A block whose intercept is a weighted column, and so counts like a covariate."""

    @property
    def k(self) -> int:
        return self.Q.shape[1]

    @property
    def weight(self) -> np.ndarray:
        return np.where(np.isnan(self.r), 0.0, float(max(self.n - self.Q.shape[1], 0)))


@dataclass
class Score:
    """Score test of all columns, and the first Newton step from no effect with its standard error."""

    block: Block
    inference: Inference
    step: np.ndarray
    """``U / Var U``: change of the linear predictor for one unit of the latent (m,)."""
    se: np.ndarray
    df: float


def score_block(V: Columns, r: np.ndarray, w: np.ndarray, C: np.ndarray | None) -> Block:
    """Block of the score ``sum x_i r_i`` with weights ``w``; an unweighted one where all weights are equal."""
    n, root = len(r), np.sqrt(w)
    rows = np.arange(n)
    if np.ptp(root) <= 1e-9 * root.max():
        b = block(rows, V, r / root.mean(), C)
        b.V = scaled(V, root)
        b.coefficient, b.ss = b.coefficient * root.mean(), b.ss * root.mean() ** 2
        return b
    V = scaled(V, root)
    Q, R, _ = linalg.qr(root[:, None] * basis(C, n), mode="economic", pivoting=True)
    Q = Q[:, np.abs(np.diag(R)) > 1e-10 * abs(R[0, 0])]
    e = off_basis(r / root, Q)
    coefficient = dot(V, Q).T
    square = V.multiply(V) if sp.issparse(V) else V * V
    total = np.asarray(square.sum(axis=0)).ravel()
    ss = np.maximum(total - (coefficient**2).sum(axis=0), 0.0)
    ss = np.where(ss <= 1e-10 * total, 0.0, ss)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = np.where(total > 0, 1.0 - ss / total, np.nan)
    return WeightedBlock(rows, V, e, Q, coefficient, ss, ratio(dot(V, e), np.sqrt(ss * (e @ e))), 0.0, r2)


def scaled(V: Columns, by: np.ndarray) -> Columns:
    """Rows of the columns multiplied by ``by`` (n,)."""
    if not sp.issparse(V):
        return V * by[:, None]
    out = V.copy()
    out.data = out.data * by[out.indices]
    return out


def robust_variance(b: Block) -> np.ndarray:
    """``sum_i (M V)_i^2 e_i^2`` of every column: variance of the score whatever the variance of a row."""
    e2 = b.e**2
    square = b.V.multiply(b.V) if sp.issparse(b.V) else b.V * b.V
    cross = dot(b.V, e2[:, None] * b.Q).T
    within = b.Q.T @ (e2[:, None] * b.Q)
    out = dot(square, e2) - 2.0 * (b.coefficient * cross).sum(axis=0)
    return np.maximum(out + np.einsum("km,kl,lm->m", b.coefficient, within, b.coefficient, optimize=True), 0.0)


def score_test(
    problem: Problem, *, residual: np.ndarray, weight: np.ndarray, robust: bool, variance: np.ndarray | None = None
) -> Score:
    """Test every column of a problem against the fitted regression without latents.

    Parameters
    ----------
    problem
        Columns, covariates, groups and options.
    residual, weight
        ``r`` (n,) and ``w`` (n,) of the module's equations.
    robust
        Independent units: True takes the larger p of the scale estimated from all residuals, and of
        :func:`robust_variance` (not where units are permuted, which needs neither).
    variance
        Of the scores (m,), where more than intercept and covariates was fitted; never above ``|M V|^2``.
    """
    b = score_block(problem.V, residual, weight, problem.C)
    if variance is not None:
        U = b.r * b.scale
        b.ss = np.where(b.ss > 0, np.clip(variance, 1e-10 * b.ss, b.ss), 0.0)
        b.r = ratio(U, b.scale)
    inference = linear([b], problem.groups, rank_sum=False, **problem.options())
    n, df = b.n, max(b.n - b.Q.shape[1] - 1, 1)
    dispersion = max(float(b.e @ b.e) / df, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        U = b.r * b.scale
        step = np.where(b.ss > 0, U / b.ss, np.nan)
        se = np.sqrt(dispersion / b.ss)
        if problem.groups.codes is not None:
            se = np.fmax(se, inference.se * np.sqrt(b.e @ b.e / b.ss))
            return Score(b, inference, step, se, inference.df)
        spread = np.sqrt(robust_variance(b) * n / df)
        se = np.fmax(se, spread / b.ss)
        if robust and problem.scheme is None and (n >= FEW or b.k):  # rearrangement needs no variance
            t = np.where(spread > 0, U / spread, np.nan)
            p = np.where(problem.testable, 2.0 * stats.t.sf(np.abs(t), df), np.nan)
            inference.statistic = np.where(p > inference.p, t, inference.statistic)
            inference.p = np.fmax(inference.p, p)
            inference.p_side = np.fmax(inference.p_side, p / 2)
            inference.p_maxt = np.maximum(inference.p_maxt, inference.p)
            inference.how += ", wider of two standard errors"
    return Score(b, inference, step, se, df)


def finish(problem: Problem, score: Score, full: Callable[[np.ndarray], dict[str, Any]], *, k: int) -> Result:
    """Ratios ``exp(beta)`` for one standard deviation of the latent over the units.

    Parameters
    ----------
    full
        Fit with one column (n,) as the last of ``k`` coefficients; gives ``coef, cov, bread, scores, note``, and
        ``interval`` of the last coefficient where it has one of its own.
    """
    V, n = problem.V, len(problem.y)
    sd = np.sqrt(moments(V)[1] / max(n - 1, 1))
    with np.errstate(invalid="ignore"):  # a dead latent has a spread of 0 and an infinite step
        log, se = score.step * sd, score.se * sd
    kind = np.full(len(log), "one step", dtype=object)
    p = np.where(problem.testable, score.inference.p, np.nan)
    ends: dict[int, tuple[float, float]] = {}
    best = np.lexsort((-np.abs(np.nan_to_num(score.inference.statistic)), p))
    for j in best[: min(problem.n_fits, int((~np.isnan(p)).sum()))]:
        x = V[:, [j]].toarray().ravel() if sp.issparse(V) else V[:, j]
        found = full((x - x.mean()) / sd[j])
        if not np.isfinite(found["coef"][-1]) or not (found["converged"] or found["note"] == "separated"):
            continue
        log[j], kind[j] = found["coef"][-1], found["note"] if found["note"] in PENALISED else "full"
        se[j] = _error(found, problem, n, k, score.se[j] * sd[j])
        if "interval" in found:
            ends[j] = found["interval"]
    critical = float(stats.t.ppf(0.975, max(score.df, 1.0)))
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.exp(log - critical * se), np.exp(log + critical * se)
        for j, interval in ends.items():
            low[j], high[j] = np.exp(interval)
        return Result(np.exp(log), low, high, score.inference, {"fit": kind})


def _error(found: dict[str, Any], problem: Problem, n: int, k: int, null: float) -> float:
    """Standard error of the last coefficient: the widest of model, sandwich, and for groups that of no effect."""
    model = float(np.sqrt(found["cov"][-1, -1]))
    if found["note"] == "separated":  # residuals of a column that tells all say nothing of its error
        return model
    influence = found["scores"] @ found["bread"][-1]
    codes, G = problem.groups.codes, problem.groups.n
    if codes is None:
        return max(model, float(np.sqrt((influence**2).sum() * n / max(n - k, 1))))
    total = np.bincount(codes, weights=influence, minlength=G)
    cr1 = float(np.sqrt((total**2).sum() * G / max(G - 1, 1) * (n - 1) / max(n - k, 1)))
    return max(cr1, null, model)
