"""Cox score test of every latent, added to a model of the covariates that was fitted once; codes stay sparse.

The score of column x is ``U = sum x_i M_i``, M the martingale residuals of the model without latents, and its
information there (notation of :mod:`biosae.stats.cox`, ``p_i = w_i x_i``)

``I_xx = sum h_i x_i^2 - sum_times (c0 S^2 - 2 c1 S D + c2 D^2)``, ``c_a = sum_l f_l^a / (S0 - f_l D0)^2``,

with S the sum of p over the rows at risk and D that over the events of the time. S only changes where the column is
not zero, so that a column costs its number of non-zeros. ``I_xz`` is linear in x; the variance of U with the covariates
z estimated is ``I_xx - I_xz I_zz^-1 I_zx``. The third moment of U is the sum over events of that of x among the rows at
risk; a rare, skewed latent makes it large, and the normal tail too small.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from scipy import stats

from biosae.stats.adjust import basis, residual
from biosae.stats.correlation import Columns, dot
from biosae.stats.cox import RiskSets, fit_cox, maximise, profile_interval, risk_sets, standardised
from biosae.stats.inference import Block, Groups, Inference, block, linear, skewed_pvalue
from biosae.stats.problem import Problem, Result
from biosae.stats.score import Score, finish

MIN_EVENTS = 3
"""With fewer events (groups with events) there is an estimate and no p."""
CHUNK = 64
"""Dense columns that are worked through at a time."""


def cox(problem: Problem) -> Result:
    """Score test of Cox's model for every column, within strata, given covariates; hazard ratio a SD of the latent.

    ``p`` is the largest of: normal with the information as variance, or twice the one-sided tail corrected for
    skewness; that of rearranging the martingale residuals (t, corrected for skewness; listed or drawn below 20 units);
    the cluster-robust score where units are grouped. The first holds where censoring goes with the latent, the second
    where few and skewed values carry it.

    Raises
    ------
    InputError
        For times not above 0 or events not 0 or 1.
    """
    n = len(problem.y)
    sets = risk_sets(problem.y, problem.event, strata=problem.strata)
    codes = problem.groups.codes
    ended = np.flatnonzero(problem.event) if codes is None else np.unique(codes[np.asarray(problem.event) == 1])
    if len(ended) < MIN_EVENTS:
        problem = replace(problem, testable=np.zeros_like(problem.testable))
    Z = within(problem.C, problem.strata, n)
    U, info, martingale, skew = score_and_information(sets, problem.V, Z)
    S = stratum_columns(problem.strata, n)
    b = block(np.arange(n), problem.V, martingale, S if problem.C is None else np.hstack([S, problem.C]))
    inference = _inference(problem, b, U, info, skew)
    with np.errstate(divide="ignore", invalid="ignore"):
        possible = np.where(info > 0, info, np.nan)
        step, se, df = U / possible, 1.0 / np.sqrt(possible), np.inf
        if problem.groups.codes is not None:
            se, df = np.fmax(se, inference.se * b.scale / possible), inference.df

    def full(x: np.ndarray) -> dict:
        X = np.column_stack([Z, x])
        found = fit_cox(problem.y, problem.event, X, strata=problem.strata, codes=problem.groups.codes)
        if found["note"] == "separated" and np.isfinite(found["coef"][-1]) and problem.groups.codes is None:
            own, scale = standardised(sets, X)
            ends = profile_interval(sets, own, found["coef"] * scale, firth=True)
            found["interval"] = tuple(end / scale[-1] for end in ends)
        return found

    result = finish(problem, Score(None, inference, step, se, df), full, k=Z.shape[1] + 1)
    if problem.strata is not None:
        result.extra["n_strata"] = np.full(len(U), len(sets.bounds) - 1)
    result.extra["n_events"] = np.full(len(U), int(sets.event.sum()))
    return result


def within(C: np.ndarray | None, strata: np.ndarray | None, n: int) -> np.ndarray:
    """Covariates centred within strata, as orthogonal columns of unit variance (n, k); collinear ones are dropped."""
    if C is None or C.shape[1] == 0:
        return np.empty((n, 0))
    left = residual(C, basis(stratum_columns(strata, n), n))
    left[:, (left**2).sum(axis=0) < 1e-20 * (C**2).sum(axis=0)] = 0.0
    return basis(left, n)[:, 1:] * np.sqrt(n)


def stratum_columns(strata: np.ndarray | None, n: int) -> np.ndarray:
    """Dummies of the strata but the first (n, n_strata - 1)."""
    if strata is None:
        return np.empty((n, 0))
    return (strata[:, None] == np.unique(strata)[1:]).astype(np.float64)


def score_and_information(
    sets: RiskSets, V: Columns, Z: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Score and its variance for every column of V (n, m) at no effect, given covariates Z (n, k) of :func:`within`.

    Returns
    -------
    tuple
        Score and variance (m,), 0 where a column does not vary within the sets at risk; martingale residuals (n,);
        third standardised moment of the score (m,), covariates taken as known and ties in Breslow's way.
    """
    order, f = sets.order, sets.fraction
    own = Z[order]
    _, state, note = maximise(sets, own)
    if note:  # covariates that separate the events: Firth's estimate, and the score of the columns beyond theirs
        state = maximise(sets, own, firth=True)[1]
    n = len(order)
    martingale, hazard = np.empty(n), np.empty(n)
    martingale[order], hazard[order] = sets.event - state.hazard, state.hazard
    c = [sets.by_time(f**a / state.denominator**2) for a in range(3)]
    d, total = np.bincount(sets.step_of), sets.at_risk(state.w[:, None])[:, 0]
    cubed = np.empty(n)
    cubed[order] = state.w * sets.lived(d / total)
    if sp.issparse(V):
        square, cube = (sp.csc_matrix((V.data**a, V.indices, V.indptr), shape=V.shape) for a in (2, 3))
        place = np.empty(n, V.indices.dtype)
        place[order] = np.arange(n)
        P = sp.csc_matrix((np.arange(V.nnz), place[V.indices], V.indptr), shape=V.shape)
        P.sort_indices()
        weighted = state.w[P.indices] * V.data[P.data]
        running = [_prefix(sets, a) for a in (c[0], d / total**2, d / total**3)]
        spent, third = _kernel()(
            P.indptr, P.indices, weighted, weighted * V.data[P.data], sets.event, sets.upto, sets.first,
            running[0], *c[1:], *running[1:],
        )  # fmt: skip
    else:
        square, cube, (spent, third) = V**2, V**3, np.empty((2, V.shape[1]))
        for a in range(0, V.shape[1], CHUNK):
            X = V[order, a : a + CHUNK]
            P = state.w[:, None] * X
            S, D, Q = sets.at_risk(P), sets.of_events(P), sets.at_risk(P * X)
            spent[a : a + CHUNK] = c[0] @ S**2 - 2.0 * (c[1] @ (S * D)) + c[2] @ D**2
            third[a : a + CHUNK] = 2.0 * ((d / total**3) @ S**3) - 3.0 * ((d / total**2) @ (S * Q))
    lived = dot(square, hazard)
    info = lived - spent
    with np.errstate(divide="ignore", invalid="ignore"):
        skew = np.where(info > 1e-10 * lived, (dot(cube, cubed) + third) / info**1.5, 0.0)
    score = dot(V, martingale)
    if Z.shape[1]:
        S, D = sets.at_risk(state.w[:, None] * own), sets.of_events(state.w[:, None] * own)
        before = sets.lived(c[0][:, None] * S - c[1][:, None] * D) - sets.own(c[1][:, None] * S - c[2][:, None] * D)
        linear_part = np.empty_like(Z)
        linear_part[order] = state.hazard[:, None] * own - state.w[:, None] * before
        cross = dot(V, linear_part)
        known = cross @ np.linalg.pinv(state.info, hermitian=True)
        info = info - (known * cross).sum(axis=1)
        score = score - known @ state.score
    return score, np.where(info > 1e-10 * lived, info, 0.0), martingale, skew


def _prefix(sets: RiskSets, c: np.ndarray) -> np.ndarray:
    """Running sums of a value of every time, anew in every stratum."""
    out = c.copy()
    for a, b in pairwise(sets.bounds):
        out[a:b] = np.cumsum(c[a:b])
    return out


def _kernel():
    if importlib.util.find_spec("numba") is None:
        return powers_of_means
    from biosae.stats import cox_numba

    return cox_numba.powers_of_means


def powers_of_means(
    indptr, indices, data, square, event, upto, first, prefix, c1, c2, prefix2, prefix3
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over times, for every sparse column with rows in the order of the risk sets, both (m,).

    ``sum (c0 S^2 - 2 c1 S D + c2 D^2)`` and ``sum (2 b3 S^3 - 3 b2 S Q)``, Q the sum of ``w x^2`` over the rows at
    risk.

    Parameters
    ----------
    indptr, indices, data, square
        Columns of ``w x`` with sorted indices, and ``w x^2`` of the same entries.
    event, upto, first
        Of :class:`biosae.stats.cox.RiskSets`.
    prefix, c1, c2, prefix2, prefix3
        Running sums of c0 within strata, c1, c2, and running sums of b2 and b3, of every time.
    """
    out, third = np.zeros((2, len(indptr) - 1))
    for j, (a, b) in enumerate(pairwise(indptr)):
        rows, value, squared = indices[a:b][::-1], data[a:b][::-1], square[a:b][::-1]
        kept = upto[rows] > first[rows]
        rows, value, squared = rows[kept], value[kept], squared[kept]
        if len(rows) == 0:
            continue
        starts = np.flatnonzero(np.diff(upto[rows], prepend=-1))
        time, low = upto[rows[starts]], first[rows[starts]]
        S, Q, D = (np.add.reduceat(v, starts) for v in (value, squared, value * event[rows]))
        for s in np.unique(low):
            here = low == s
            S[here], Q[here] = np.cumsum(S[here]), np.cumsum(Q[here])
        follows = np.r_[low[1:] == low[:-1], False]
        stop = np.where(follows, np.r_[time[1:], 0], low)
        spent, spent2, spent3 = (
            p[time - 1] - np.where(stop > low, p[stop - 1], 0.0) for p in (prefix, prefix2, prefix3)
        )
        out[j] = (S**2 * spent + D * (c2[time - 1] * D - 2.0 * c1[time - 1] * S)).sum()
        third[j] = (2.0 * S**3 * spent3 - 3.0 * S * Q * spent2).sum()
    return out, third


def _inference(problem: Problem, b: Block, U: np.ndarray, info: np.ndarray, skew: np.ndarray) -> Inference:
    options = problem.options()
    if problem.strata is not None:
        pairs = [problem.strata] if problem.units_blocks is None else [problem.strata, problem.units_blocks]
        options["units_blocks"] = np.unique(np.column_stack(pairs), axis=0, return_inverse=True)[1].ravel()
    groups = problem.groups
    if groups.codes is not None:
        outcome = np.column_stack([problem.y, problem.event, groups.codes])
        groups = Groups(groups.codes, groups.n, len(np.unique(outcome, axis=0)) == groups.n)
    found = linear([b], groups, rank_sum=False, **options)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(problem.testable & (info > 0), U / np.sqrt(info), np.nan)
    side = skewed_pvalue(np.where(np.isnan(z), np.nan, stats.norm.sf(np.abs(z))), z, skew, normal=True, sides=1)
    p = np.minimum(2.0 * side, 1.0)
    return replace(
        found,
        statistic=np.where(p > found.p, z, found.statistic),
        p=np.maximum(found.p, p),
        p_side=np.maximum(found.p_side, side),
        p_maxt=np.maximum(found.p_maxt, p),
        how=f"Cox score, larger p of information and {found.how}",
    )
