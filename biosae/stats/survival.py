"""Times to an event: concordance, test of proportional hazards, Kaplan-Meier and Aalen-Johansen tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import special, stats

from biosae.errors import InputError, nearest
from biosae.stats.cox import evaluate, maximise, risk_sets, standardised

TRANSFORMS = ("km", "rank", "identity", "log")


def concordance(time: np.ndarray, event: np.ndarray, score: np.ndarray, *, strata: np.ndarray | None = None) -> float:
    """Harrell's C: how often, of two units whose order is known, the one with the higher score had the event earlier.

    Pairs ``time_i < time_j`` with an event at ``time_i`` (or equal times, j censored) within a stratum; equal scores
    count one half (Harrell et al., JAMA 247, 2543, 1982). With heavy censoring it depends on the censoring: see
    :func:`uno_c`. NaN without such a pair.

    Parameters
    ----------
    time, event, score
        (n,) each; a high score means a high hazard.
    strata
        Labels (n,).

    Raises
    ------
    InputError
        For times not above 0, events not 0 or 1, or scores that are not finite.
    """
    higher, same, pairs, _ = _pairs(time, event, score, strata)
    return float((higher.sum() + same.sum() / 2.0) / pairs.sum()) if pairs.sum() else float("nan")


def uno_c(time: np.ndarray, event: np.ndarray, score: np.ndarray, *, tau: float | None = None) -> float:
    """Uno's C: Harrell's with every pair weighted by ``1 / G(t_i)^2``, G the probability of not yet being censored.

    It does not depend on a censoring that is independent of time and score (Uno et al., Stat Med 30, 1105, 2011).
    Events after ``tau`` are left out; without it the few late events weigh heavily.

    Raises
    ------
    InputError
        As for :func:`concordance`.
    """
    higher, same, pairs, order = _pairs(time, event, score, None)
    time, event = np.asarray(time, np.float64), np.asarray(event).astype(bool)
    times, free = _product_limit(time, ~event, after=event)
    G = np.r_[1.0, free][np.searchsorted(times, time[order], side="left")]
    with np.errstate(divide="ignore"):
        weight = np.where(event[order] & ((tau is None) | (time[order] <= (tau or np.inf))), G**-2.0, 0.0)
    weight = np.where(pairs > 0, weight, 0.0)
    total = (weight * pairs).sum()
    return float((weight * (higher + same / 2.0)).sum() / total) if total > 0 else float("nan")


def _pairs(time, event, score, strata) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every event: later units with a lower score, with the same, and all; and the rows they stand for."""
    score = np.asarray(score, np.float64)
    sets = risk_sets(time, event, strata=strata)
    if len(score) != len(sets.order) or not np.isfinite(score).all():
        raise InputError(f"score must be {len(sets.order)} finite numbers, one for each time")
    time, event = np.asarray(time, np.float64), np.asarray(event).astype(bool)
    codes = np.zeros(len(time), int)
    codes[sets.order] = sets.stratum
    rank = stats.rankdata(score, method="dense")
    lower = np.zeros(len(time))
    higher = np.zeros(len(time))
    total = np.zeros(len(time))
    for s in np.unique(codes):
        rows = np.flatnonzero(codes == s)
        t, e, r = time[rows], event[rows], rank[rows]
        # events before those censored at the same time; tied events in an order in which they do not count
        up = np.lexsort((np.where(e, r, 0), ~e, t))
        lower[rows[up]] = _later_below(r[up])
        down = np.lexsort((np.where(e, -r, 0), ~e, t))
        higher[rows[down]] = _later_below(-r[down])
        after = len(rows) - np.searchsorted(np.sort(t), t, side="right")
        censored = np.sort(t[~e])
        total[rows] = after + np.searchsorted(censored, t, side="right") - np.searchsorted(censored, t, side="left")
    keep = np.flatnonzero(event)
    return lower[keep], (total - lower - higher)[keep], total[keep], keep


def _later_below(r: np.ndarray) -> np.ndarray:
    """How many later entries are below each entry, by merging halves: O(n log^2 n)."""
    n = len(r)
    count = np.zeros(n)
    r = np.unique(r, return_inverse=True)[1].ravel()
    base, place, width = n + 1, np.arange(n), 1
    while width < n:
        pair = place // (2 * width)
        right = (place // width) % 2 == 1
        keys = np.sort(pair[right] * base + r[right])
        left = np.flatnonzero(~right)
        own = pair[left] * base
        count[left] += np.searchsorted(keys, own + r[left]) - np.searchsorted(keys, own)
        width *= 2
    return count


def schoenfeld(
    time: np.ndarray,
    event: np.ndarray,
    X: np.ndarray,
    *,
    strata: np.ndarray | None = None,
    ties: str = "efron",
    transform: str = "km",
) -> pd.DataFrame:
    """Test of proportional hazards: does a coefficient of Cox's model change with time?

    Score test of adding ``x g(t)`` to the fitted model, for every column and for all together (Grambsch and Therneau,
    Biometrika 81, 515, 1994, with the exact information, as ``survival::cox.zph`` from version 3).

    Parameters
    ----------
    time, event, X, strata, ties
        As for :func:`biosae.stats.cox.fit_cox`; without penalty.
    transform
        ``g``: ``"km"`` (1 - Kaplan-Meier just before t), ``"rank"`` (among all times), ``"identity"`` or ``"log"``.

    Returns
    -------
    DataFrame
        Rows 0 .. k-1 and ``"global"``: ``chi2, df, p``. NaN where the likelihood has no maximum, or all
        events fall on one time.

    Raises
    ------
    InputError
        As for :func:`biosae.stats.cox.fit_cox`, and for an unknown transform.
    """
    if transform not in TRANSFORMS:
        raise InputError(f"unknown transform {transform!r}; {nearest(transform, TRANSFORMS)}")
    sets = risk_sets(time, event, strata=strata, ties=ties)
    X = np.asarray(X, np.float64)
    k = X.shape[1]
    own, scale = standardised(sets, X)
    chi2, note = np.full(k + 1, np.nan), "singular"
    if len(sets.step_of) and k and (scale > 0).all():
        beta, state, note = maximise(sets, own)
    if note == "":
        state = evaluate(sets, own, beta)
        g = _clock(np.asarray(time, np.float64), np.asarray(event).astype(bool), transform)[sets.order][sets.event]
        g = g - g.mean()
        gap = own[sets.event] - sets.by_time(state.mean)[sets.step_of] / np.bincount(sets.step_of)[sets.step_of, None]
        score = (g[:, None] * gap).sum(axis=0)
        cross = np.zeros((2, k, k))
        for a in range(k):  # second moments of every step, one column at a time
            F = state.w[:, None] * own[:, [a]] * own
            second = sets.at_risk(F)[sets.step_of] - sets.fraction[:, None] * sets.of_events(F)[sets.step_of]
            V = second / state.denominator[:, None] - state.mean[:, [a]] * state.mean
            cross[0, a], cross[1, a] = (g[:, None] * V).sum(axis=0), (g[:, None] ** 2 * V).sum(axis=0)
        left = cross[1] - cross[0] @ np.linalg.solve(state.info, cross[0])
        if np.linalg.matrix_rank(left, hermitian=True) == k:  # not so where all events fall on one time
            chi2[:k] = score**2 / np.diag(left)
            chi2[k] = score @ np.linalg.solve(left, score)
    df = np.r_[np.ones(k, int), k]
    return pd.DataFrame({"chi2": chi2, "df": df, "p": stats.chi2.sf(chi2, df)}, index=[*range(k), "global"])


def _clock(time: np.ndarray, event: np.ndarray, transform: str) -> np.ndarray:
    if transform != "km":
        return {"identity": np.asarray, "log": np.log, "rank": stats.rankdata}[transform](time)
    times, survival = _product_limit(time, event)
    return 1.0 - np.r_[1.0, survival][np.searchsorted(times, time, side="left")]


def _product_limit(
    time: np.ndarray, event: np.ndarray, *, after: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct times of ``event`` and the product-limit estimate from each on; rows in ``after`` leave before it."""
    times = np.unique(time[event])
    n = len(time) - np.searchsorted(np.sort(time), times, side="left")
    if after is not None:
        tied = np.sort(time[after])
        n = n - (np.searchsorted(tied, times, side="right") - np.searchsorted(tied, times, side="left"))
    d = np.searchsorted(np.sort(time[event]), times, side="right")
    return times, np.cumprod(1.0 - np.diff(d, prepend=0) / np.maximum(n, 1))


def kaplan_meier(time: np.ndarray, event: np.ndarray, *, groups: np.ndarray | None = None) -> pd.DataFrame:
    """Kaplan-Meier estimate of survival, with Greenwood's variance and a log-log interval of 95 %.

    Parameters
    ----------
    time, event
        (n,) each.
    groups
        Labels (n,): one curve each.

    Returns
    -------
    DataFrame
        One row a group and distinct time, after a row at time 0: ``group, time, n_risk, n_event, n_censored,
        survival, se, ci_low, ci_high``. The interval is ``S^exp(-/+ 1.96 se / (S log S))``, NaN where S is 0 or 1.

    Raises
    ------
    InputError
        For times not above 0 or events not 0 or 1.
    """
    risk_sets(time, event, strata=groups)
    time, event = np.asarray(time, np.float64), np.asarray(event).astype(int)
    groups = np.full(len(time), "") if groups is None else np.asarray(groups)
    return pd.concat([_curve(time[groups == g], event[groups == g], g) for g in np.unique(groups)], ignore_index=True)


def _curve(time: np.ndarray, event: np.ndarray, group: object) -> pd.DataFrame:
    times, place = np.unique(time, return_inverse=True)
    d = np.bincount(place, weights=event)
    n = np.bincount(place)[::-1].cumsum()[::-1]
    survival = np.cumprod(1.0 - d / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        se = survival * np.sqrt(np.cumsum(d / (n * (n - d))))
        half = special.ndtri(0.975) * se / (survival * np.log(survival))
        low, high = survival ** np.exp(-half), survival ** np.exp(half)
    known = (survival > 0) & (survival < 1)
    table = {
        "group": group, "time": times, "n_risk": n, "n_event": d.astype(int),
        "n_censored": np.bincount(place).astype(int) - d.astype(int), "survival": survival,
        "se": np.where(survival > 0, se, np.nan), "ci_low": np.where(known, low, np.nan),
        "ci_high": np.where(known, high, np.nan),
    }  # fmt: skip
    start = {"group": group, "time": 0.0, "n_risk": len(time), "n_event": 0, "n_censored": 0, "survival": 1.0}
    return pd.concat([pd.DataFrame([start | {"se": 0.0}]), pd.DataFrame(table)], ignore_index=True)


def aalen_johansen(time: np.ndarray, cause: np.ndarray) -> pd.DataFrame:
    """Cumulative incidence of each of several competing causes: ``sum S(t-) d_k(t) / n(t)`` (Aalen and Johansen 1978).

    One minus Kaplan-Meier with the other causes as censoring overstates it.

    Parameters
    ----------
    time, cause
        (n,) each; cause 0 is censored, 1, 2, ... the causes.

    Returns
    -------
    DataFrame
        One row a cause and distinct time, after a row at time 0: ``cause, time, n_risk, n_event, incidence, se`` (se
        of the delta method, Marubini and Valsecchi 1995).

    Raises
    ------
    InputError
        For times not above 0, or causes that are not whole numbers from 0 on.
    """
    cause = np.asarray(cause)
    if not (np.isfinite(cause.astype(np.float64)) & (cause >= 0) & (cause == np.floor(cause))).all():
        raise InputError("cause must be 0 (censored) or the number 1, 2, ... of the cause in every row")
    risk_sets(time, cause > 0)
    times, place = np.unique(np.asarray(time, np.float64), return_inverse=True)
    n = np.bincount(place)[::-1].cumsum()[::-1].astype(np.float64)
    total = np.bincount(place, weights=cause > 0)
    survival = np.cumprod(1.0 - total / n)
    before = np.r_[1.0, survival[:-1]]
    parts = []
    for one in np.unique(cause[cause > 0]):
        d = np.bincount(place, weights=cause == one)
        incidence = np.cumsum(before * d / n)
        with np.errstate(divide="ignore", invalid="ignore"):
            spent = np.where(n > total, total / (n * (n - total)), 0.0)
        own, mixed = before**2 * (n - d) / n * d / n**2, before * d / n**2
        variance = (
            incidence**2 * np.cumsum(spent) - 2.0 * incidence * np.cumsum(incidence * spent)
            + np.cumsum(incidence**2 * spent) + np.cumsum(own)
            - 2.0 * (incidence * np.cumsum(mixed) - np.cumsum(incidence * mixed))
        )  # fmt: skip
        rows = pd.DataFrame({"cause": int(one), "time": times, "n_risk": n.astype(int), "n_event": d.astype(int)})
        rows["incidence"], rows["se"] = incidence, np.sqrt(np.maximum(variance, 0.0))
        start = {"cause": int(one), "time": 0.0, "n_risk": len(cause), "n_event": 0, "incidence": 0.0, "se": 0.0}
        parts.append(pd.concat([pd.DataFrame([start]), rows], ignore_index=True))
    columns = ["cause", "time", "n_risk", "n_event", "incidence", "se"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
