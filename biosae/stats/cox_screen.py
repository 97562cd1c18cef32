"""Cox score test of every latent, added to a model of the covariates that was fitted once; codes stay sparse.

The score of column x is ``U = sum x_i M_i``, M the martingale residuals of the model without latents, and its
information there (notation of :mod:`biosae.stats.cox`, ``p_i = w_i x_i``)

``I_xx = sum h_i x_i^2 - sum_times (c0 S^2 - 2 c1 S D + c2 D^2)``, ``c_a = sum_l f_l^a / (S0 - f_l D0)^2``,

with S the sum of p over the rows at risk and D that over the events of the time. S only changes where the column is
not zero, so that a column costs its number of non-zeros. ``I_xz`` is linear in x; the variance of U with the covariates
z estimated is ``I_xx - I_xz I_zz^-1 I_zx``.
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
from biosae.stats.inference import Block, Groups, Inference, block, linear
from biosae.stats.problem import Problem, Result
from biosae.stats.score import Score, finish

CHUNK = 64
"""Dense columns that are worked through at a time."""


def cox(problem: Problem) -> Result:
    """Score test of Cox's model for every column, within strata, given covariates; hazard ratio a SD of the latent.

    ``p`` is the largest of: normal with the information as variance; that of rearranging the martingale residuals
    (t, corrected for skewness; listed or drawn below 20 units); the cluster-robust score where units are grouped.

    Raises
    ------
    InputError
        For times not above 0 or events not 0 or 1.
    """
    n = len(problem.y)
    sets = risk_sets(problem.y, problem.event, strata=problem.strata)
    Z = within(problem.C, problem.strata, n)
    U, info, martingale = score_and_information(sets, problem.V, Z)
    S = stratum_columns(problem.strata, n)
    b = block(np.arange(n), problem.V, martingale, S if problem.C is None else np.hstack([S, problem.C]))
    inference = _inference(problem, b, U, info)
    with np.errstate(divide="ignore", invalid="ignore"):
        step, se, df = np.where(info > 0, U / info, np.nan), 1.0 / np.sqrt(info), np.inf
        if problem.groups.codes is not None:
            se, df = np.fmax(se, inference.se * b.scale / info), inference.df

    def full(x: np.ndarray) -> dict:
        X = np.column_stack([Z, x])
        found = fit_cox(problem.y, problem.event, X, strata=problem.strata, codes=problem.groups.codes)
        if found["note"] == "separated" and problem.groups.codes is None:
            own, scale = standardised(sets, X)
            ends = profile_interval(sets, own, found["coef"] * scale, firth=True)
            found["interval"] = tuple(end / scale[-1] for end in ends)
        return found

    result = finish(problem, Score(None, inference, step, se, df), full, k=Z.shape[1] + 1)
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


def score_and_information(sets: RiskSets, V: Columns, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score and its variance for every column of V (n, m) at no effect, given covariates Z (n, k); residuals (n,).

    Z as of :func:`within`. The information is 0 where a column does not vary within the sets at risk.
    """
    order, f = sets.order, sets.fraction
    own = Z[order]
    state = maximise(sets, own)[1]
    n = len(order)
    martingale, hazard = np.empty(n), np.empty(n)
    martingale[order], hazard[order] = sets.event - state.hazard, state.hazard
    c = [sets.by_time(f**a / state.denominator**2) for a in range(3)]
    if sp.issparse(V):
        squares = sp.csc_matrix((V.data**2, V.indices, V.indptr), shape=V.shape)
        place = np.empty(n, V.indices.dtype)
        place[order] = np.arange(n)
        P = sp.csc_matrix((V.data * state.w[place[V.indices]], place[V.indices], V.indptr), shape=V.shape)
        P.sort_indices()
        spent = _kernel()(P.indptr, P.indices, P.data, sets.event, sets.upto, sets.first, _prefix(sets, c[0]), *c[1:])
    else:
        squares, spent = V * V, np.empty(V.shape[1])
        for a in range(0, V.shape[1], CHUNK):
            P = state.w[:, None] * V[order, a : a + CHUNK]
            S, D = sets.at_risk(P), sets.of_events(P)
            spent[a : a + CHUNK] = c[0] @ S**2 - 2.0 * (c[1] @ (S * D)) + c[2] @ D**2
    lived = dot(squares, hazard)
    info = lived - spent
    if Z.shape[1]:
        S, D = sets.at_risk(state.w[:, None] * own), sets.of_events(state.w[:, None] * own)
        before = sets.lived(c[0][:, None] * S - c[1][:, None] * D) - sets.own(c[1][:, None] * S - c[2][:, None] * D)
        linear_part = np.empty_like(Z)
        linear_part[order] = state.hazard[:, None] * own - state.w[:, None] * before
        cross = dot(V, linear_part)
        info = info - np.einsum("mk,kl,ml->m", cross, np.linalg.pinv(state.info, hermitian=True), cross, optimize=True)
    return dot(V, martingale), np.where(info > 1e-10 * lived, info, 0.0), martingale


def _prefix(sets: RiskSets, c: np.ndarray) -> np.ndarray:
    """Running sums of a value of every time, anew in every stratum."""
    out = c.copy()
    for a, b in pairwise(sets.bounds):
        out[a:b] = np.cumsum(c[a:b])
    return out


def _kernel():
    if importlib.util.find_spec("numba") is None:
        return squared_means
    from biosae.stats import cox_numba

    return cox_numba.squared_means


def squared_means(indptr, indices, data, event, upto, first, prefix, c1, c2) -> np.ndarray:
    """``sum_times (c0 S^2 - 2 c1 S D + c2 D^2)`` of every sparse column, rows in the order of the risk sets (m,).

    Parameters
    ----------
    indptr, indices, data
        Columns of ``w x`` with sorted indices.
    event, upto, first
        Of :class:`biosae.stats.cox.RiskSets`.
    prefix, c1, c2
        Running sums of c0 within strata, and c1, c2, of every time.
    """
    out = np.zeros(len(indptr) - 1)
    for j, (a, b) in enumerate(pairwise(indptr)):
        rows, value = indices[a:b][::-1], data[a:b][::-1]
        kept = upto[rows] > first[rows]
        rows, value = rows[kept], value[kept]
        if len(rows) == 0:
            continue
        starts = np.flatnonzero(np.diff(upto[rows], prepend=-1))
        time, low = upto[rows[starts]], first[rows[starts]]
        S, D = np.add.reduceat(value, starts), np.add.reduceat(value * event[rows], starts)
        for s in np.unique(low):
            here = low == s
            S[here] = np.cumsum(S[here])
        follows = np.r_[low[1:] == low[:-1], False]
        stop = np.where(follows, np.r_[time[1:], 0], low)
        spent = prefix[time - 1] - np.where(stop > low, prefix[stop - 1], 0.0)
        out[j] = (S**2 * spent + D * (c2[time - 1] * D - 2.0 * c1[time - 1] * S)).sum()
    return out


def _inference(problem: Problem, b: Block, U: np.ndarray, info: np.ndarray) -> Inference:
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
    p = np.where(np.isnan(z), np.nan, 2.0 * stats.norm.sf(np.abs(z)))
    return replace(
        found,
        statistic=np.where(p > found.p, z, found.statistic),
        p=np.maximum(found.p, p),
        p_side=np.maximum(found.p_side, p / 2),
        p_maxt=np.maximum(found.p_maxt, p),
        how=f"Cox score, larger p of information and {found.how}",
    )
