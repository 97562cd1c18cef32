"""The methods of ``associate``: an estimate, its interval and its p for every column."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
from scipy import special, stats

from biosae.stats import effects
from biosae.stats.adjust import basis, residual, share_explained
from biosae.stats.areas import auroc, wilcoxon
from biosae.stats.correlation import Columns, dot, fisher_interval, z_interval
from biosae.stats.counts import negbin, poisson
from biosae.stats.cox_screen import cox
from biosae.stats.inference import Block, Groups, Inference, block, linear
from biosae.stats.kendall import kendall
from biosae.stats.kruskal import kruskal
from biosae.stats.lmm import lmm
from biosae.stats.meta import combine, heterogeneity, not_below
from biosae.stats.nested import group_scores, group_squares, indicator
from biosae.stats.ordinal import ordinal
from biosae.stats.problem import Method, Problem, Result
from biosae.stats.tables import odds_ratio_exact

MAX_SIZE_R2 = 0.8
"""Pooled units: above this share of the target explained by the number of samples a unit holds, no p is given."""


def _correlation(problem: Problem, *, rank: bool) -> Result:
    blocks = problem.blocks(rank=rank)
    inference = linear(blocks, problem.groups, rank_sum=False, **problem.options())
    extra = {}
    if problem.strata is None:
        b = blocks[0]
        estimate = b.r
        low, high = fisher_interval(estimate, n_effective=b.n - b.k, rank=rank)
    else:
        estimate, low, high, extra = _over_strata(blocks, rank=rank)
    if problem.groups.codes is not None:
        low, high = _grouped_interval(blocks, problem.groups, estimate, low, high, rank, inference)
    if problem.pooling == "random" and problem.strata is not None:
        z, variance = _each(blocks, problem.groups, rank=rank)
        found = combine(z, variance, effects="random")
        estimate, low, high = (np.tanh(found[name]) for name in ("estimate", "ci_low", "ci_high"))
        extra |= heterogeneity(found)
        not_below(inference, found)
    return Result(estimate, low, high, inference, extra)


def _over_strata(blocks: list[Block], *, rank: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Fixed effect on Fisher's z with weights ``n - 3 - k``, its free interval, and heterogeneity."""
    r = np.stack([b.r for b in blocks])
    w = np.where(np.isnan(r), 0.0, np.array([max(b.n - 3 - b.k, 0) for b in blocks], float)[:, None])
    z_each = np.arctanh(np.clip(np.nan_to_num(r), -_most(blocks), _most(blocks)))
    weight = w.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(weight > 0, (w * z_each).sum(axis=0) / weight, np.nan)
        estimate = np.tanh(z)
        spread = 1 + estimate**2 / 2 if rank else np.ones_like(estimate)
        half = special.ndtri(0.975) * np.sqrt(spread / weight)
        Q = (w * (z_each - z) ** 2).sum(axis=0) / spread
        used = (w > 0).sum(axis=0)
        contributing = np.where(w > 0, np.array([b.n for b in blocks])[:, None], 0).sum(axis=0)
        tau2 = (Q - (used - 1)) * spread / (weight - (w**2).sum(axis=0) / weight)
        extra = {
            "n_units": np.where(used > 0, contributing, sum(b.n for b in blocks)),
            "n_strata": used, "q_heterogeneity": np.where(used > 1, Q, np.nan),
            "p_heterogeneity": np.where(used > 1, stats.chi2.sf(Q, np.maximum(used - 1, 1)), np.nan),
            "i2": np.where(used > 1, np.clip(1 - (used - 1) / Q, 0, 1), np.nan),
            "tau2": np.where(used > 1, np.maximum(tau2, 0.0), np.nan),
            "n_same_sign": ((np.sign(r) == np.sign(estimate)) & (w > 0)).sum(axis=0),
        }  # fmt: skip
    return estimate, *z_interval(estimate, half), extra


def _most(blocks: list[Block]) -> np.ndarray:
    return np.array([1 - 1 / b.n if b.n < 10 else 0.999999 for b in blocks])[:, None]  # r = 1 of 5 rows says little


def _each(blocks: list[Block], groups: Groups, *, rank: bool) -> tuple[np.ndarray, np.ndarray]:
    """Fisher's z of every stratum and its variance (k, m): of free rows, or by groups where that is wider."""
    r = np.clip(np.stack([b.r for b in blocks]), -_most(blocks), _most(blocks))
    n = np.array([b.n - 3 - b.k for b in blocks], float)[:, None]
    variance = np.where(n > 0, (1 + r**2 / 2 if rank else np.ones_like(r)) / np.where(n > 0, n, 1.0), np.nan)
    if groups.codes is not None:
        for s, b in enumerate(blocks):
            G = len(np.unique(groups.codes[b.rows]))
            if G < 2:
                variance[s] = np.nan
                continue
            own = G / (G - 1) * (_influence(b, groups) ** 2).sum(axis=0) * (1 + r[s] ** 2 / 2 if rank else 1.0)
            variance[s] = np.fmax(variance[s], own)
    return np.arctanh(r), variance


def _grouped_interval(blocks, groups, estimate, low, high, rank, inference) -> tuple[np.ndarray, np.ndarray]:
    """Sandwich interval on Fisher's z, never narrower than that of free units or than the null error of the test."""
    G = groups.n
    shared = blocks[0].batch is not None
    if shared:
        se = np.sqrt(G / max(G - 1, 1) * _influence_squares(blocks[0], groups))
    else:
        total, weight = 0.0, 0.0
        for b in blocks:
            w = np.where(np.isnan(b.r), 0.0, max(b.n - 3 - b.k, 0) if len(blocks) > 1 else 1.0)
            total = total + np.where(w > 0, w * _influence(b, groups), 0.0)
            weight = weight + w
        with np.errstate(divide="ignore", invalid="ignore"):
            se = np.sqrt(G / max(G - 1, 1) * (total**2).sum(axis=0)) / weight
    with np.errstate(divide="ignore", invalid="ignore"):
        se = se * np.sqrt(1 + estimate**2 / 2) if rank else se
        free = (np.arctanh(high) - np.arctanh(low)) / 2 / special.ndtri(0.975)
    widest = np.fmax(np.fmax(se, inference.se), np.where(np.isfinite(free), free, 0.0))
    return z_interval(estimate, inference.critical * widest)


def _influence(b: Block, groups: Groups) -> np.ndarray:
    """Influence of every group on Fisher's z of every column (G, m)."""
    own, G = groups.codes[b.rows], groups.n
    S = group_scores(b.V, b.e, b.Q, b.coefficient, own, G)
    share = np.bincount(own, weights=b.e**2, minlength=G)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = group_squares(b.V, b.Q, b.coefficient, own, G) / b.ss + share / (b.e @ b.e)
        return (S / b.scale - b.r / 2 * share) / (1 - b.r**2)


def _influence_squares(b: Block, groups: Groups) -> np.ndarray:
    """Sum of :func:`_influence` squared over groups (m,), from sums that all targets share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = b.e @ b.e
        sums = _less(b, groups, b.r / 2 * b.scale / b.ss, b.r / 2 * b.scale / norm)
        return sums / b.scale**2 / (1 - b.r**2) ** 2


def _less(b: Block, groups: Groups, of_x: np.ndarray, of_e: np.ndarray | float) -> np.ndarray:
    """``sum_g (s_g - of_x x2_g - of_e e2_g)^2`` of every column (m,)."""
    found, t = b.batch.scores(groups.codes, groups.n), b.place
    total = found["squares"][:, t] + of_x**2 * found["xx"] + of_e**2 * found["ee"][t]
    total = total - 2 * of_x * found["with_x"][:, t] - 2 * of_e * found["with_e"][:, t]
    return np.maximum(total + 2 * of_x * of_e * found["xe"][:, t], 0.0)


def pearson(problem: Problem) -> Result:
    return _correlation(problem, rank=False)


def spearman(problem: Problem) -> Result:
    return _correlation(problem, rank=True)


def welch(problem: Problem) -> Result:
    positive = problem.y == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    m1, ss1, m0, ss0 = effects.class_moments(problem.V, positive)
    g, low, high = effects.hedges_g(m1, ss1, n1, m0, ss0, n0)
    b = problem.blocks(rank=False)[0]
    few = min(n1, n0) < 10
    inference = linear([b], problem.groups, rank_sum=False, permute=few, **problem.options())
    codes, G = problem.groups.codes, problem.groups.n
    if codes is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            v1, v0 = ss1 / (n1 - 1) / n1, ss0 / (n0 - 1) / n0
            t = (m1 - m0) / np.sqrt(v1 + v0)
            df = (v1 + v0) ** 2 / (v1**2 / (n1 - 1) + v0**2 / (n0 - 1))
            p = np.where(problem.testable, 2 * stats.t.sf(np.abs(t), df), np.nan)
        inference.statistic = np.where(problem.testable, t, np.nan)
        if not inference.how.startswith("permutation"):  # Welch alone rejects 8 % of true nulls for skewed columns
            inference.p, inference.how = np.fmax(p, inference.p), "larger p of Welch and Student t"
            inference.p_side = np.fmax(p / 2, inference.p_side)
            inference.p_maxt = np.maximum(inference.p_maxt, inference.p)
    else:
        inside = np.column_stack([positive / n1, ~positive / n0])
        D = group_scores(problem.V, inside[:, 0] - inside[:, 1], np.empty((b.n, 0)), np.empty((0, len(m1))), codes, G)
        D = D - (indicator(codes, G) @ inside) @ np.stack([m1, -m0])
        with np.errstate(divide="ignore", invalid="ignore"):
            null = inference.se * b.scale * (n1 + n0) / (n1 * n0)
            se = np.fmax(np.sqrt(G / max(G - 1, 1) * (D**2).sum(axis=0)), null) / np.sqrt((ss1 + ss0) / (n1 + n0 - 2))
        half = inference.critical * se
        low, high = g - half, g + half
    return Result(g, low, high, inference)


def firing(V: Columns) -> Columns:
    """1 where a latent fires (or a dense feature lies above its mean), else 0."""
    if not sp.issparse(V):
        return (V > 0).astype(np.float64)
    out = V.copy()
    out.data = np.ones_like(out.data)
    return out


def fisher(problem: Problem) -> Result:
    positive = (problem.y == 1).astype(np.float64)
    fired = firing(problem.V)
    n, n1 = len(positive), int(positive.sum())
    k = np.asarray(fired.sum(axis=0)).ravel()
    a = dot(fired, positive)
    ratio, low, high = effects.odds_ratio(a, k - a, n1 - a, n - n1 - k + a)
    codes, G = problem.groups.codes, problem.groups.n
    if codes is None and problem.scheme is None:
        p = np.where(problem.testable, effects.fisher_pvalue(a, n1, k, n), np.nan)
        shared = Inference(p, p, np.full_like(p, np.nan), "", "")
        if problem.n_permutations:
            shared = linear(
                [block(np.arange(n), fired, positive, None)], problem.groups, rank_sum=True, **problem.options()
            )
        p_maxt = np.maximum(shared.p_maxt, p)
        side = np.where(a * n >= k * n1, stats.hypergeom.sf(a - 1, n, n1, k), stats.hypergeom.cdf(a, n, n1, k))
        side = np.where(problem.testable, np.fmin(side, p), np.nan)
        expected = np.minimum(k, n - k) * min(n1, n - n1) / max(n, 1)
        small = (expected < 5) | (np.min([a, k - a, n1 - a, n - n1 - k + a], axis=0) == 0)
        a, k = (np.round(x[small]).astype(np.int64) for x in (a, k))
        low[small], high[small] = odds_ratio_exact(a, k - a, n1 - a, n - n1 - k + a)[1:]
        how = "Fisher exact; interval exact where a cell is 0 or below 5 by expectation"
        exact = Inference(np.log(ratio), p, p_maxt, how, shared.how_maxt, p_side=side)
        return Result(ratio, low, high, exact)
    b = block(np.arange(n), fired, positive, None)
    inference = linear([b], problem.groups, rank_sum=False, **problem.options())
    A = indicator(codes, G)
    cells = []
    for member in (positive, 1.0 - positive):
        hits = group_scores(fired, member, np.empty((n, 0)), np.empty((0, len(k))), codes, G)
        cells += [hits, (A @ member)[:, None] - hits]
    shift = 0.5 * (np.stack([c.sum(axis=0) for c in cells]).min(axis=0) == 0)
    cells = [c / (c.sum(axis=0) + shift) for c in cells]
    D = cells[0] + cells[3] - cells[1] - cells[2]
    half = inference.critical * np.sqrt(G / max(G - 1, 1) * (D**2).sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        free = (np.log(high) - np.log(low)) / 2
        null = inference.se * b.scale * n / (n1 * (n - n1)) / (k / n * (1 - k / n))
    half = np.fmax(np.fmax(half, free), np.where(np.isfinite(null), null, 0.0) * inference.critical)
    return Result(ratio, ratio * np.exp(-half), ratio * np.exp(half), inference)


def ols(problem: Problem) -> Result:
    b = problem.blocks(rank=False)[0]
    inference = linear([b], problem.groups, rank_sum=False, **problem.options())
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(b.ss > 0, b.r * b.scale / b.ss, np.nan)
        df = b.n - b.k - 2
        if problem.groups.codes is None:
            se = np.sqrt(np.maximum(b.e @ b.e - slope**2 * b.ss, 0.0) / max(df, 1) / b.ss)
            half = se * special.stdtrit(max(df, 1), 0.975)
        else:
            codes, G = problem.groups.codes, problem.groups.n
            if b.batch is not None:
                squares = _less(b, problem.groups, slope, 0.0)
            else:
                S = group_scores(b.V, b.e, b.Q, b.coefficient, codes, G)
                S = S - slope * group_squares(b.V, b.Q, b.coefficient, codes, G)
                squares = (S**2).sum(axis=0)
            factor = G / max(G - 1, 1) * (b.n - 1) / max(df, 1)
            robust = np.sqrt(squares * factor) / b.ss
            half = np.fmax(robust, inference.se * np.sqrt(b.e @ b.e / b.ss)) * inference.critical
    return Result(slope, slope - half, slope + half, inference)


def kruskal_wallis(problem: Problem) -> Result:
    ranks = problem.ranked("rank None", problem.V)
    inference = kruskal(ranks, problem.y.astype(int), problem.groups, **problem.options())
    none = np.full(problem.V.shape[1], np.nan)
    return Result(effects.eta_squared(ranks, problem.y.astype(int)), none, none, inference)


def size_columns(sizes: np.ndarray) -> np.ndarray:
    """What stands for the number of samples that a unit holds: its logarithm and, from 10 units on, ``sizes^-1/2``."""
    return np.log(sizes)[:, None] if len(sizes) < 10 else np.column_stack([np.log(sizes), sizes**-0.5])


def by_size(problem: Problem, method: str, sizes: np.ndarray) -> Inference:
    """The test of a method, adjusted for the number of samples that a unit holds.

    The mean of few skewed codes has another shape than that of many (more zeros, a lower median), so ranks, firing and
    maxima of pooled units go with ``sizes`` (n_units,) even where the codes do not go with the target. Means of few
    samples also vary more, latents and numbers alike (Pearson: 8 % at 5 % with 60 patients): see
    :func:`variance_ratio`. No p where the
    numbers of samples explain more than :data:`MAX_SIZE_R2` of the target.
    """
    size = size_columns(sizes)
    y = problem.y if problem.offset is None else problem.y / np.exp(problem.offset)
    sides = np.eye(problem.n_classes)[y.astype(int)].T if problem.n_classes > 2 else [y]
    if max(share_explained(side, basis(size, len(sizes))) for side in sides) > MAX_SIZE_R2:
        problem = replace(problem, testable=np.zeros_like(problem.testable))
    if method == "kruskal":
        ranks, Q = problem.ranked("rank None", problem.V), basis(size, len(sizes))
        ranks = residual(ranks.toarray() if sp.issparse(ranks) else ranks, Q)
        return kruskal(ranks, problem.y.astype(int), problem.groups, **problem.options())
    adjusted = replace(problem, C=size if problem.C is None else np.hstack([problem.C, size]), cache={}, peers=())
    if method in SCORE:
        return METHODS[method].run(replace(adjusted, n_fits=0)).inference
    if method == "fisher":
        adjusted.V = firing(problem.V)
    blocks = adjusted.blocks(rank=method in ("spearman", "kendall", "auroc", "wilcoxon"))
    found = linear(blocks, problem.groups, rank_sum=False, **problem.options())
    if problem.groups.codes is None and not problem.n_classes:
        by = np.sqrt(variance_ratio(blocks, sizes))
        found.p, found.p_side, found.p_maxt = (
            k * special.ndtr(special.ndtri(p / k) / by) for p, k in ((found.p, 2), (found.p_side, 1), (found.p_maxt, 2))
        )
        found.p_side = np.fmin(found.p_side, found.p)
        found.how += ", wider for means of few samples"
    return found


def variance_ratio(blocks: list[Block], sizes: np.ndarray) -> np.ndarray:
    """How much larger the variance of the score is than rearranging says, as means of few samples vary more (m,).

    Squared residuals of latent and target are taken as straight lines of 1 / ``sizes``: with slopes a and b relative
    to their means the ratio is ``1 + a b Var(1 / sizes)``, and at least 1. 1 where the target does not vary more in
    small units, as a number that is constant in patients.
    """
    n, total = sum(b.n for b in blocks), np.zeros_like(blocks[0].ss)
    for b in blocks:
        if not np.ptp(sizes[b.rows]):
            continue
        u = 1.0 / sizes[b.rows]
        u = u - u.mean()
        square = b.V.multiply(b.V) if sp.issparse(b.V) else b.V * b.V
        c = b.coefficient
        of_x = np.asarray(square.T @ u).ravel() - 2.0 * (dot(b.V, u[:, None] * b.Q).T * c).sum(axis=0)
        of_x = of_x + (c * ((b.Q.T * u) @ b.Q @ c)).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            total = total + np.nan_to_num(of_x / b.ss * (u @ b.e**2) / (b.e @ b.e) / (u @ u)) * b.n**2 / n
    return np.maximum(1.0 + total, 1.0)


SCORE = ("poisson", "negbin", "ordinal", "cox")
"""Methods whose p is the score test of a regression, fitted without latents."""
METHODS: dict[str, Method] = {
    "pearson": Method(pearson, "pearson_r", 0.0, "any", covariates=True, strata=True),
    "spearman": Method(spearman, "spearman_rho", 0.0, "any", covariates=True, strata=True),
    "kendall": Method(kendall, "kendall_tau", 0.0, "any"),
    "auroc": Method(auroc, "auroc", 0.5, "two", strata=True),
    "wilcoxon": Method(wilcoxon, "cliffs_delta", 0.0, "two", strata=True),
    "welch": Method(welch, "hedges_g", 0.0, "two"),
    "fisher": Method(fisher, "odds_ratio", 1.0, "two"),
    "kruskal": Method(kruskal_wallis, "epsilon_squared", 0.0, "classes"),
    "ols": Method(ols, "slope", 0.0, "any", covariates=True),
    "lmm": Method(lmm, "slope", 0.0, "numeric", covariates=True),
    "poisson": Method(poisson, "rate_ratio", 1.0, "numeric", covariates=True, counts=True),
    "negbin": Method(negbin, "rate_ratio", 1.0, "numeric", covariates=True, counts=True),
    "ordinal": Method(ordinal, "cumulative_odds_ratio", 1.0, "ordered", covariates=True),
    "cox": Method(cox, "hazard_ratio", 1.0, "numeric", covariates=True, strata=True, event=True),
}
EFFECT_NULL: dict[str, float] = {m.effect: m.null for m in METHODS.values()}
