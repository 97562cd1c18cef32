"""AUROC and Cliff's delta of every column: estimate, interval over units or groups, strata put together."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy import special

from biosae.stats import effects
from biosae.stats.inference import FEW, Inference, combined, linear
from biosae.stats.meta import combine, heterogeneity, not_below
from biosae.stats.problem import Problem, Result


def auroc(problem: Problem) -> Result:
    blocks = problem.blocks(rank=True)
    inference = linear(blocks, problem.groups, rank_sum=True, **problem.options())
    positive = problem.y == 1
    codes, G = problem.groups.codes, problem.groups.n
    factor = G / max(G - 1, 1)
    areas, variances, pairs, per_r, n_min = [], [], [], 0.0, 0
    influence = 0.0
    for b in blocks:
        own = positive[b.rows]
        n1, n0 = int(own.sum()), int((~own).sum())
        areas.append(0.5 + 2.0 * b.r * b.scale / (b.n * n1 * n0))  # the ranks of the two classes differ by n / 2
        areas[-1] = np.where(np.isnan(b.r), 0.5, areas[-1])
        pairs.append(float(n1 * n0))
        per_r = per_r + np.sqrt(b.ss * n1 * n0 / b.n)  # change of the area, times pairs, for a unit of the correlation
        n_min += min(n1, n0)
        if b.batch is not None and sp.issparse(problem.V):
            variances.append(problem.delong() if codes is None else factor * problem.delong())
            continue
        V = problem.V if problem.strata is None else effects.rows_of(problem.V, b.rows)
        if codes is None:
            variances.append(effects.delong_variance(V, own))
        else:
            each = effects.delong_groups(V, own, codes[b.rows], G)
            held = len(np.unique(codes[b.rows]))
            variances.append(held / max(held - 1, 1) * (each**2).sum(axis=0))
            influence = influence + pairs[-1] * each
    w = np.array(pairs)[:, None] / sum(pairs)
    area, variance = (w * np.stack(areas)).sum(axis=0), (w**2 * np.stack(variances)).sum(axis=0)
    if codes is not None:
        if len(blocks) > 1:
            variance = factor * ((influence / sum(pairs)) ** 2).sum(axis=0)
        n_min = min(len(np.unique(codes[positive])), len(np.unique(codes[~positive])))
    low, high = effects.logit_interval(area, variance, critical=inference.critical, n_min=n_min)
    if codes is not None:
        R, error = combined(blocks)[0], inference.se
        if G >= FEW:  # the error of the test; of few groups it is too small (coverage 0.88), that of no effect is not
            with np.errstate(divide="ignore", invalid="ignore"):
                error = np.where(R != 0, np.abs(R / inference.statistic), error)
        error = error * per_r / sum(pairs)
        least = effects.score_interval(area, error, critical=inference.critical)
        spread = (variance > 1e-15) & (area > 0) & (area < 1)
        low, high = np.where(spread, np.fmin(low, least[0]), low), np.where(spread, np.fmax(high, least[1]), high)
    if codes is None and problem.strata is None and len(positive) <= 20 and problem.scheme is None:
        _exact_where_untied(problem, positive, area, inference)
    if problem.strata is None:
        return Result(area, low, high, inference)
    found = _areas_together(np.stack(areas), np.stack(variances), problem.pooling)
    if problem.pooling == "random":
        area, low, high = (special.expit(found[name]) for name in ("estimate", "ci_low", "ci_high"))
        not_below(inference, found)
    return Result(area, low, high, inference, heterogeneity(found))


def _areas_together(areas: np.ndarray, variances: np.ndarray, pooling: str) -> dict:
    """AUROC of strata (k, m) put together on the logit scale; perfect separation leaves a stratum out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (areas > 0) & (areas < 1)
        logit = np.where(inside, special.logit(areas), np.nan)
        found = combine(logit, variances / (areas * (1 - areas)) ** 2, effects="random")
    if pooling == "fixed":
        mean = combine(logit, variances / np.where(inside, areas * (1 - areas), 1.0) ** 2)["estimate"]
        found["n_same_sign"] = (np.sign(logit) == np.sign(mean)).sum(axis=0)
    return found


def _exact_where_untied(problem: Problem, positive: np.ndarray, area: np.ndarray, inference: Inference) -> None:
    dense = problem.V.toarray() if sp.issparse(problem.V) else problem.V
    ordered = np.sort(dense, axis=0)
    untied = (np.diff(ordered, axis=0) > 0).all(axis=0) & problem.testable
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if untied.any() and problem.units_blocks is None:
        inference.p[untied] = effects.exact_u_pvalue(area[untied] * n1 * n0, n1, n0)
        inference.p_side[untied] = inference.p[untied] / 2
        inference.p_maxt = np.fmax(inference.p_maxt, np.where(np.isnan(inference.p_maxt), np.nan, inference.p))
        inference.how += "; exact where untied"


def wilcoxon(problem: Problem) -> Result:
    found = auroc(problem)
    return Result(2 * found.estimate - 1, 2 * found.low - 1, 2 * found.high - 1, found.inference, found.extra)
