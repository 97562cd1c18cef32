"""Cox's proportional hazards model: partial likelihood with Efron's or Breslow's ties, strata, Firth's penalty.

With ``w_i = exp(x_i' b)``, the events at one time in one stratum are taken in ``d`` steps ``l = 0 .. d-1``; step ``l``
has the denominator ``S0 - (l/d) D0``, S0 the sum of ``w`` over the rows at risk and D0 over the events of that time
(Efron, JASA 72, 557, 1977; Breslow takes ``S0`` in every step). With ``m`` the weighted mean of x in a step,

``U = sum_events x - sum_steps m = X' M``, ``I = X' diag(h) X - sum_steps m m'``,

where ``h_i`` is the cumulative hazard that row i has lived through and ``M_i = event_i - h_i`` its martingale
residual. Times are ties if they are equal to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import optimize, stats

from biosae.errors import InputError, nearest
from biosae.stats.monotone import monotone

TIES = ("efron", "breslow")
PENALTY = ("auto", "none", "firth")
EVENTS_PER_COLUMN = 10
FLAT = 1e-8
"""Information an event, in units of the column's variance, below which the likelihood is monotone: no maximum."""
MAX_STEPS = 60
RUNAWAY = 15.0
"""A linear predictor that spans more than this raises the question whether the likelihood has a maximum."""


@dataclass
class RiskSets:
    """Who is at risk when: rows in order of stratum and time, and the steps of every time with events."""

    order: np.ndarray
    """Rows by stratum and time (n,); the other row arrays are in this order."""
    event: np.ndarray
    stratum: np.ndarray
    upto: np.ndarray
    """Times with events, counted over all strata, up to and including that of the row."""
    first: np.ndarray
    """The same before the row's stratum."""
    bounds: np.ndarray
    """First time of every stratum that has events, and the number of all (n_strata + 1,)."""
    step_of: np.ndarray
    """Time of each step (n_events,)."""
    fraction: np.ndarray
    """Share of the tied events that has left the risk set at each step: ``l / d``, or 0."""

    @property
    def n_times(self) -> int:
        return int(self.bounds[-1])

    def at_risk(self, F: np.ndarray) -> np.ndarray:
        """Sums of the rows of F (n, q) over the risk set of every time (n_times, q)."""
        kept = np.flatnonzero(self.upto > self.first)
        starts = np.flatnonzero(np.diff(self.upto[kept], prepend=-1))
        total = np.add.reduceat(F[kept], starts, axis=0)
        for a, b in pairwise(self.bounds):
            total[a:b] = np.cumsum(total[a:b][::-1], axis=0)[::-1]
        return total

    def of_events(self, F: np.ndarray) -> np.ndarray:
        """Sums of the rows of F (n, q) over the events of every time (n_times, q)."""
        rows = np.flatnonzero(self.event)
        return np.add.reduceat(F[rows], np.flatnonzero(np.diff(self.upto[rows], prepend=-1)), axis=0)

    def by_time(self, a: np.ndarray) -> np.ndarray:
        """Sums over the steps of every time: (n_events, ...) to (n_times, ...)."""
        return np.add.reduceat(a, np.flatnonzero(np.diff(self.step_of, prepend=-1)), axis=0)

    def lived(self, a: np.ndarray) -> np.ndarray:
        """Sums over the times that each row has lived through: (n_times, ...) to (n, ...)."""
        total = a.copy()
        for start, stop in pairwise(self.bounds):
            total[start:stop] = np.cumsum(a[start:stop], axis=0)
        out = np.zeros((len(self.order), *a.shape[1:]))
        kept = self.upto > self.first
        out[kept] = total[self.upto[kept] - 1]
        return out

    def own(self, a: np.ndarray) -> np.ndarray:
        """The value at the time of each event, 0 for censored rows: (n_times, ...) to (n, ...)."""
        out = np.zeros((len(self.order), *a.shape[1:]))
        out[self.event] = a[self.upto[self.event] - 1]
        return out


def risk_sets(
    time: np.ndarray, event: np.ndarray, *, strata: np.ndarray | None = None, ties: str = "efron"
) -> RiskSets:
    """Risk sets of times and events (both (n,)), within ``strata``.

    Raises
    ------
    InputError
        For times that are not above 0 and finite, events that are not 0 or 1, lengths that differ or unknown ties.
    """
    if ties not in TIES:
        raise InputError(f"unknown ties {ties!r}; {nearest(ties, TIES)}")
    time, event = np.asarray(time, np.float64), np.asarray(event)
    if len(time) != len(event) or (strata is not None and len(strata) != len(time)):
        raise InputError(f"time has {len(time)} rows, event {len(event)}; they and strata need one value a row each")
    bad = ~(np.isfinite(time) & (time > 0))
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {len(time)} times are not above 0 and finite; a time is counted from entry to the "
            "event or to the end of observation. Leave those rows out"
        )
    if not np.isin(event, (0, 1)).all():
        raise InputError("event must be 1 (the time ended in the event) or 0 (censored) in every row")
    codes = np.zeros(len(time), int) if strata is None else np.unique(strata, return_inverse=True)[1].ravel()
    order = np.lexsort((time, codes))
    time, event, codes = time[order], event[order].astype(bool), codes[order]
    at = np.flatnonzero(event)
    new = np.r_[True, (np.diff(time[at]) != 0) | (np.diff(codes[at]) != 0)] if len(at) else np.empty(0, bool)
    times, owner = time[at][new], codes[at][new]
    step_of = np.cumsum(new) - 1
    count = np.bincount(step_of, minlength=len(times))
    fraction = (np.arange(len(at)) - np.flatnonzero(new)[step_of]) / count[step_of] if len(at) else np.empty(0)
    before = np.searchsorted(owner, np.arange(codes.max(initial=0) + 2))
    first = before[codes]
    upto = np.empty(len(time), int)
    for s in range(len(before) - 1):
        rows = slice(*np.searchsorted(codes, (s, s + 1)))
        upto[rows] = before[s] + np.searchsorted(times[before[s] : before[s + 1]], time[rows], side="right")
    fraction = fraction if ties == "efron" else np.zeros_like(fraction)
    return RiskSets(order, event, codes, upto, first, np.unique(before), step_of, fraction)


@dataclass
class State:
    """The partial likelihood and its derivatives at one coefficient; rows in the order of the risk sets."""

    loglik: float
    score: np.ndarray
    info: np.ndarray
    w: np.ndarray
    """Hazard of each row relative to the largest of its stratum."""
    hazard: np.ndarray
    denominator: np.ndarray
    mean: np.ndarray
    """Weighted mean of x at every step (n_events, k)."""


def evaluate(sets: RiskSets, X: np.ndarray, beta: np.ndarray) -> State:
    """Log partial likelihood, score and information of the columns ``X`` (n, k), in the order of the risk sets."""
    eta = X @ beta
    top = np.full(sets.stratum[-1] + 1, -np.inf)
    np.maximum.at(top, sets.stratum, eta)
    eta = eta - top[sets.stratum]
    w = np.exp(eta)
    F = np.column_stack([w, w[:, None] * X])
    f = sets.fraction[:, None]
    sums = sets.at_risk(F)[sets.step_of] - f * sets.of_events(F)[sets.step_of]
    denominator = sums[:, 0]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # steps too far are taken back
        mean = sums[:, 1:] / denominator[:, None]
        loglik = eta[sets.event].sum() - np.log(denominator).sum()
        score = X[sets.event].sum(axis=0) - mean.sum(axis=0)
        rate, spared = sets.by_time(1.0 / denominator), sets.by_time(sets.fraction / denominator)
        hazard = w * (sets.lived(rate) - sets.own(spared))
        info = (X * hazard[:, None]).T @ X - mean.T @ mean
    return State(float(loglik), score, info, w, hazard, denominator, mean)


def score_residuals(sets: RiskSets, X: np.ndarray, state: State) -> np.ndarray:
    """Each row's share of the score, ``int (x_i - m(t)) dM_i(t)`` (n, k); sums to the score."""
    d = np.bincount(sets.step_of, minlength=sets.n_times)[:, None]
    rate = state.mean / state.denominator[:, None]
    lived = sets.lived(sets.by_time(rate)) - sets.own(sets.by_time(sets.fraction[:, None] * rate))
    event = sets.event[:, None]
    return event * X - sets.own(sets.by_time(state.mean) / d) - state.hazard[:, None] * X + state.w[:, None] * lived


def firth_score(sets: RiskSets, X: np.ndarray, state: State) -> np.ndarray:
    """Derivative of ``log det(I) / 2``: Firth's addition to the score (Heinze and Schemper, Biometrics 57, 114, 2001).

    It is half the sum over steps of ``E[(x - m)' I^-1 (x - m) (x - m)]``.
    """
    values, vectors = np.linalg.eigh(state.info)
    A = vectors / np.sqrt(np.maximum(values, 1e-300))
    Y, mu = X @ A, state.mean @ A
    k = X.shape[1]
    square = (Y**2).sum(axis=1, keepdims=True)
    F = state.w[:, None] * np.hstack([square, square * X, (Y[:, :, None] * X[:, None, :]).reshape(len(X), -1)])
    E = sets.at_risk(F)[sets.step_of] - sets.fraction[:, None] * sets.of_events(F)[sets.step_of]
    E /= state.denominator[:, None]
    cross = E[:, 1 + k :].reshape(-1, k, k) - mu[:, :, None] * state.mean[:, None, :]
    third = E[:, 1 : 1 + k] - E[:, :1] * state.mean - 2.0 * np.einsum("sa,sar->sr", mu, cross)
    return third.sum(axis=0) / 2.0


def penalised(state: State) -> float:
    """``log L + log det(I) / 2``."""
    return state.loglik + float(np.linalg.slogdet(state.info)[1]) / 2.0


def maximise(
    sets: RiskSets, X: np.ndarray, *, firth: bool = False, start: np.ndarray | None = None, fixed: int = 0
) -> tuple[np.ndarray, State, str]:
    """Maximum of the (penalised) partial likelihood by Newton steps with halving.

    Parameters
    ----------
    X
        Columns (n, k) in the order of the risk sets, centred within strata, of unit variance.
    start
        First coefficients; 0 if None.
    fixed
        This many last coefficients stay at ``start``.

    Returns
    -------
    tuple
        Coefficients, the state there, and ``""``, ``"separated"`` (monotone likelihood, because the information has run
        to 0 or by :func:`biosae.stats.monotone.monotone`; the coefficients are those of the last step and mean
        nothing), ``"singular"`` or ``"not converged"``.
    """
    k = X.shape[1]
    beta = np.zeros(k) if start is None else start.astype(np.float64).copy()
    free = slice(0, k - fixed)
    value = penalised if firth else (lambda s: s.loglik)
    state = evaluate(sets, X, beta)
    at_zero, asked = state if start is None else evaluate(sets, X, np.zeros(k)), firth or fixed > 0
    for _ in range(MAX_STEPS * (3 if firth else 1)):
        if k - fixed == 0:
            return beta, state, ""
        info, score = state.info[free, free], state.score + (firth_score(sets, X, state) if firth else 0.0)
        lowest = np.linalg.eigvalsh(info)[0] / len(sets.step_of)
        if not lowest > FLAT:
            known = np.abs(beta).max() > 1.0 or (not asked and monotone(sets, X, at_zero.score))
            return beta, state, "separated" if known else "singular"
        step = np.linalg.solve(info, score[free])
        decrement = float(score[free] @ step)
        step *= min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))
        best = value(state)
        for halving in range(30):
            trial = beta.copy()
            trial[free] += step / 2**halving
            there = evaluate(sets, X, trial)
            if (
                np.isfinite(there.loglik)
                and np.isfinite(there.info).all()
                and value(there) >= best - 1e-12 * max(1.0, abs(best))
            ):
                break
        else:
            return beta, state, "not converged"
        beta, state = trial, there
        if not asked and np.ptp(X @ beta) > RUNAWAY:
            asked = True
            if monotone(sets, X, at_zero.score):
                return beta, state, "separated"
        if decrement < (1e-18 if firth else 1e-20) * max(1.0, abs(best)):
            return beta, state, ""
    return beta, state, "" if decrement < 1e-10 else "not converged"


def fit_cox(
    time: np.ndarray,
    event: np.ndarray,
    X: np.ndarray,
    *,
    strata: np.ndarray | None = None,
    ties: str = "efron",
    codes: np.ndarray | None = None,
    penalty: str = "auto",
) -> dict:
    """Cox regression of times to an event on the columns of ``X``.

    Parameters
    ----------
    time, event
        Time above 0 (n,), and 1 where it ended in the event, 0 where it was censored.
    X
        Columns (n, k) without intercept; ``k = 0`` is the model without columns.
    strata
        Labels (n,): each stratum has a baseline hazard of its own.
    ties
        ``"efron"`` or ``"breslow"``.
    codes
        Integer group of each row (n,): adds ``cov_robust``, the sandwich of the groups' summed score residuals times
        ``G / (G - 1)`` (Lin and Wei, JASA 84, 1074, 1989).
    penalty
        ``"none"``, ``"firth"``, or ``"auto"``: Firth's penalty where there are fewer than 10 events (groups with
        events) a column. A likelihood without a maximum is always fitted with Firth's penalty.

    Returns
    -------
    dict
        ``coef`` (k,), ``cov`` and ``bread`` (k, k) the inverse information, ``scores`` (n, k) score residuals,
        ``martingale`` (n,), ``loglik``, ``loglik_null``, ``penalised`` (the likelihoods include Firth's
        penalty), ``chi2_lr``, ``chi2_score``, ``chi2_wald`` with ``df`` and ``p_lr``, ``p_score``, ``p_wald``,
        ``n_events``, ``converged``, ``note``: ``""``, ``"separated"``, ``"few_events"``, ``"no_events"`` or
        ``"singular"`` (collinear columns). Coefficients are logarithms of hazard ratios for a unit of the column; NaN
        with the last two, and with ``"separated"`` where events are ordered so finely that Firth's maximum is out of
        the reach of floating point.

    Raises
    ------
    InputError
        For times not above 0, events not 0 or 1, X with NaN or of another length, unknown ties or penalty.
    """
    if penalty not in PENALTY:
        raise InputError(f"unknown penalty {penalty!r}; {nearest(penalty, PENALTY)}")
    X = np.asarray(X, np.float64)
    if X.ndim != 2 or len(X) != len(time) or not np.isfinite(X).all():
        raise InputError(f"X is {X.shape}; it must be ({len(time)}, k) without NaN or infinite values")
    sets = risk_sets(time, event, strata=strata, ties=ties)
    n, k = X.shape
    n_events = len(sets.step_of)
    if n_events == 0:
        return _empty(n, k, "no_events", n_events)
    own, scale = standardised(sets, X)
    if not (scale > 0).all():
        return _empty(n, k, "singular", n_events)
    null = evaluate(sets, own, np.zeros(k))
    ended = n_events if codes is None else len(np.unique(np.asarray(codes)[np.asarray(event).astype(bool)]))
    few = ended < EVENTS_PER_COLUMN * k
    firth = penalty == "firth" or (penalty == "auto" and few)
    beta, state, note = maximise(sets, own, firth=firth)
    if note == "singular":
        return _empty(n, k, note, n_events)
    if note == "separated" and not firth:
        firth = True
        beta, state, found = maximise(sets, own, firth=True)
        if found:
            return _empty(n, k, note, n_events)
    elif firth and note == "" and maximise(sets, own)[2] == "separated":
        note = "separated"
    value = penalised if firth else (lambda s: s.loglik)
    inverse = np.linalg.inv(state.info)
    back = np.empty(n, int)
    back[sets.order] = np.arange(n)
    scores = score_residuals(sets, own, state)[back] * scale
    cov = inverse / np.outer(scale, scale)
    units = float(np.log(scale).sum()) if firth else 0.0  # of the determinant
    fitted, at_null = value(state) + units, value(null) + units
    chi2 = {
        "lr": 2.0 * (fitted - at_null),
        "score": float(null.score @ np.linalg.solve(null.info, null.score)) if k else 0.0,
        "wald": float(beta @ state.info @ beta),
    }
    out = {
        "coef": beta / scale, "cov": cov, "bread": cov, "scores": scores,
        "martingale": (sets.event - state.hazard)[back], "loglik": fitted, "loglik_null": at_null,
        "penalised": firth, "df": k, "n_events": n_events, "converged": note in ("", "separated"),
        "note": note or ("few_events" if few else ""),
    }  # fmt: skip
    for name, statistic in chi2.items():
        out[f"chi2_{name}"], out[f"p_{name}"] = statistic, float(stats.chi2.sf(statistic, k)) if k else np.nan
    if codes is not None:
        G = int(np.max(codes)) + 1
        grouped = np.zeros((G, k))
        np.add.at(grouped, codes, scores)
        out["cov_robust"] = cov @ (grouped.T @ grouped) @ cov * G / max(G - 1, 1)
    return out


def standardised(sets: RiskSets, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns in the order of the risk sets, centred within strata, over their standard deviation there; and it.

    Collinear or constant columns have scale 0. The likelihood does not change with the centre of a stratum.
    """
    X = X[sets.order]
    size = np.bincount(sets.stratum)
    mean = (
        np.stack([np.bincount(sets.stratum, weights=x) for x in X.T], axis=1)
        if X.shape[1]
        else np.empty((len(size), 0))
    )
    own = X - (mean / np.maximum(size, 1)[:, None])[sets.stratum]
    scale = np.sqrt((own**2).mean(axis=0))
    scale = np.where(scale > 1e-12 * np.abs(X).max(axis=0, initial=0.0), scale, 0.0)
    own = own / np.where(scale > 0, scale, 1.0)
    if X.shape[1] and scale.all() and np.linalg.eigvalsh(own.T @ own / len(own))[0] < 1e-10:
        scale = np.zeros_like(scale)
    return own, scale


def profile_interval(
    sets: RiskSets, X: np.ndarray, beta: np.ndarray, *, firth: bool, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the last coefficient by the (penalised) profile likelihood; infinite where it never falls enough.

    ``X`` and ``beta`` as in :func:`maximise`, at the maximum.
    """
    value = penalised if firth else (lambda s: s.loglik)
    state = evaluate(sets, X, beta)
    target, top = stats.chi2.ppf(level, 1) / 2.0, value(state)
    se = float(np.sqrt(np.linalg.inv(state.info)[-1, -1]))

    def drop(b: float) -> float:
        start = beta.copy()
        start[-1] = b
        return top - value(maximise(sets, X, firth=firth, start=start, fixed=1)[1]) - target

    ends = []
    for side in (-1.0, 1.0):
        inner, outer = float(beta[-1]), float(beta[-1] + side * 2.0 * se)
        while drop(outer) < 0 and abs(outer - beta[-1]) < 50.0:
            inner, outer = outer, outer + side * 2.0 * se
        ends.append(side * np.inf if drop(outer) < 0 else optimize.brentq(drop, inner, outer, xtol=1e-6))
    return ends[0], ends[1]


def _empty(n: int, k: int, note: str, n_events: int) -> dict:
    none = np.full((k, k), np.nan)
    out = {
        "coef": np.full(k, np.nan), "cov": none, "bread": none, "scores": np.full((n, k), np.nan),
        "martingale": np.full(n, np.nan), "loglik": np.nan, "loglik_null": np.nan, "penalised": False, "df": k,
        "n_events": n_events, "converged": False, "note": note,
    }  # fmt: skip
    return out | {f"{what}_{name}": np.nan for name in ("lr", "score", "wald") for what in ("chi2", "p")}
