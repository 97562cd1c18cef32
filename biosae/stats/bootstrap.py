"""Cluster bootstrap: patients are drawn again with all their rows, and a statistic is computed on each draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from biosae.errors import InputError, StatisticsError, nearest

INTERVALS = ("percentile", "bca")
LEAST_DRAWS = 2000
MAX_EXACT = 5000
"""Most resamples that are listed instead of drawn."""
MAX_FAILED = 0.05
"""Above this share of draws without a finite statistic there is no interval."""


@dataclass
class Bootstrap:
    """What the resamples say of a statistic."""

    estimate: float
    se: float
    """Standard deviation of the statistic over resamples."""
    low: float
    high: float
    draws: np.ndarray
    """The statistic of every resample (b,), NaN where it does not exist."""
    n_groups: int
    n_failed: int
    how: str

    def p(self, null: float = 0.0) -> float:
        """Twice the smaller share of draws at or beyond ``null``, ``(b + 1) / (B + 1)``; NaN without an interval."""
        known = self.draws[np.isfinite(self.draws)]
        if np.isnan(self.low):
            return float("nan")
        tail = min((known <= null).sum(), (known >= null).sum())
        return float(min(1.0, 2.0 * (tail + 1.0) / (len(known) + 1.0)))


def cluster_bootstrap(
    codes: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    classes: np.ndarray | None = None,
    subcodes: np.ndarray | None = None,
    n_draws: int = LEAST_DRAWS,
    interval: str = "percentile",
    random_state: int = 0,
) -> Bootstrap:
    """Bootstrap a statistic of rows by resampling groups with all their rows.

    Groups that hold the same classes are resampled among themselves, so that no resample is of one class. Where there
    are at most :data:`MAX_EXACT` resamples all of them are taken. With few groups (below about 20) the intervals are
    too narrow whatever the number of draws: see docs/statistics.md.

    Parameters
    ----------
    codes
        Group (patient) of every row (n,).
    statistic
        Maps row numbers (some of them several times) to a number; NaN where it does not exist.
    classes
        Label of every row; None for no strata.
    subcodes
        Subgroup (slide) of every row: subgroups are resampled within every drawn group too. Only where subgroups were
        themselves a sample of a group's.
    n_draws
        Resamples, at least 2000.
    interval
        ``"percentile"``, or ``"bca"``: bias-corrected and accelerated, the acceleration from leaving out one group at
        a time (Efron, J Am Stat Assoc 82, 171, 1987).
    random_state
        Seed.

    Raises
    ------
    InputError
        For an unknown interval or too few draws.
    StatisticsError
        With fewer than 3 groups, or if the statistic does not exist on the rows themselves.
    """
    if interval not in INTERVALS:
        raise InputError(f"unknown interval {interval!r}; {nearest(interval, INTERVALS)}")
    if n_draws < LEAST_DRAWS:
        raise InputError(f"n_draws={n_draws}: take at least {LEAST_DRAWS}; quantiles of fewer are mostly chance")
    codes = np.unique(codes, return_inverse=True)[1].ravel()
    G = int(codes.max()) + 1
    if G < 3:
        raise StatisticsError(
            f"{G} groups cannot be resampled: a cluster bootstrap needs 3, and 20 for honest intervals"
        )
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    estimate = float(statistic(np.arange(len(codes))))
    if not np.isfinite(estimate):
        raise StatisticsError("the statistic has no value on the rows themselves, so there is nothing to bootstrap")
    strata = _strata(members, classes)
    slides = None if subcodes is None else [_split(rows, subcodes) for rows in members]
    exact = slides is None and math.prod(len(s) ** len(s) for s in strata) <= MAX_EXACT
    choices = _all(strata) if exact else _drawn(strata, n_draws, random_state)
    rng = np.random.default_rng([random_state, 1])
    values = []
    for chosen in choices:
        parts = [members[g] for g in chosen]
        if slides is not None:
            parts = [slides[g][i] for g in chosen for i in rng.integers(0, len(slides[g]), len(slides[g]))]
        values.append(statistic(np.concatenate(parts)))
    draws = np.asarray(values, dtype=np.float64)
    known = draws[np.isfinite(draws)]
    n_failed = len(draws) - len(known)
    how = f"{'all ' if exact else ''}{len(draws)} resamples of {G} groups"
    how += f" within {len(strata)} strata of classes" if len(strata) > 1 else ""
    how += " and of subgroups within them" if slides is not None else ""
    if n_failed > MAX_FAILED * len(draws):
        return Bootstrap(estimate, np.nan, np.nan, np.nan, draws, G, n_failed, how + "; too many without a value")
    levels = np.array([0.025, 0.975])
    if interval == "bca":
        left_out = np.array([statistic(np.concatenate(members[:g] + members[g + 1 :])) for g in range(G)])
        levels = _bca_levels(estimate, known, left_out, levels)
        how += ", BCa"
    low, high = np.quantile(known, levels) if np.isfinite(levels).all() else (np.nan, np.nan)
    se = float(known.std(ddof=0 if exact else 1))
    return Bootstrap(estimate, se, float(low), float(high), draws, G, n_failed, how)


def _bca_levels(estimate: float, draws: np.ndarray, left_out: np.ndarray, levels: np.ndarray) -> np.ndarray:
    share = ((draws < estimate).sum() + 0.5 * (draws == estimate).sum()) / len(draws)
    d = left_out.mean() - left_out
    spread = (d**2).sum() ** 1.5
    if not np.isfinite(spread) or not 0.0 < share < 1.0:
        return np.full(2, np.nan)
    a = (d**3).sum() / (6.0 * spread) if spread > 0 else 0.0
    z0, z = special.ndtri(share), special.ndtri(levels)
    return special.ndtr(z0 + (z0 + z) / (1.0 - a * (z0 + z)))


def _strata(members: list[np.ndarray], classes: np.ndarray | None) -> list[list[int]]:
    """Groups by the set of classes that each holds."""
    if classes is None:
        return [list(range(len(members)))]
    kinds: dict[tuple, list[int]] = {}
    for g, rows in enumerate(members):
        kinds.setdefault(tuple(np.unique(classes[rows])), []).append(g)
    return list(kinds.values())


def _split(rows: np.ndarray, subcodes: np.ndarray) -> list[np.ndarray]:
    own = subcodes[rows]
    return [rows[own == s] for s in np.unique(own)]


def _all(strata: list[list[int]]) -> Iterator[list[int]]:
    for parts in itertools.product(*(itertools.product(s, repeat=len(s)) for s in strata)):
        yield [g for part in parts for g in part]


def _drawn(strata: list[list[int]], n_draws: int, random_state: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(random_state)
    for _ in range(n_draws):
        yield [s[i] for s in strata for i in rng.integers(0, len(s), len(s))]
