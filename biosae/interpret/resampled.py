"""Statistics of weighted rows, and their intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from biosae.stats.bootstrap import LEAST_DRAWS, cluster_bootstrap
from biosae.stats.effects import logit_interval

MIN_GROUPS = 3
"""Fewest patients that can be resampled."""
FEW_GROUPS = 20
"""Below this number of patients a bootstrap interval is too narrow."""


@dataclass(frozen=True)
class Number:
    """A score, its interval over patients, what it stands on, and why something is missing."""

    score: float
    low: float
    high: float
    n_patients: int
    n_samples: int
    status: str = "ok"
    reason: str = ""


def refused(reason: str, *, n_patients: int = 0, n_samples: int = 0) -> Number:
    """No score, and why."""
    return Number(np.nan, np.nan, np.nan, n_patients, n_samples, "refused", reason)


class Order:
    """Values sorted once, so that a statistic of weighted rows takes one pass over them.

    Rows with whole weights count that many times, as in a bootstrap.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.distinct, level = np.unique(values, return_inverse=True)
        self.level = level.ravel()

    def mass(self, weight: np.ndarray) -> np.ndarray:
        """Weight at each distinct value, ascending."""
        return np.bincount(self.level, weight, minlength=len(self.distinct))

    def auroc(self, positive: np.ndarray, weight: np.ndarray) -> float:
        """``P(v1 > v0) + P(v1 = v0) / 2``; NaN without weight in both classes."""
        up, down = self.mass(weight * positive), self.mass(weight * ~positive)
        n1, n0 = up.sum(), down.sum()
        if n1 <= 0 or n0 <= 0:
            return float("nan")
        return float((np.cumsum(down) - 0.5 * down) @ up / (n1 * n0))

    def ranks(self, weight: np.ndarray) -> np.ndarray:
        """Mid-rank of every row (n,), less one half."""
        mass = self.mass(weight)
        return (np.cumsum(mass) - 0.5 * mass)[self.level]

    def false_alarms(self, positive: np.ndarray, look_alike: np.ndarray, weight: np.ndarray, *, sensitivity: float):
        """Share of look-alikes at or above the highest threshold that keeps this sensitivity, and that threshold."""
        up, other = self.mass(weight * positive), self.mass(weight * look_alike)
        n1, n0 = up.sum(), other.sum()
        if n1 <= 0 or n0 <= 0:
            return float("nan"), float("nan")
        above = np.cumsum(up[::-1])[::-1]
        at = int(np.flatnonzero(above >= sensitivity * n1 - 1e-9)[-1])
        return float(other[at:].sum() / n0), float(self.distinct[at])


class Parts:
    """AUROCs of several sets of rows in one pass (strata, folds); rows may lie in several sets.

    Parameters
    ----------
    parts
        Of each set: values (k,), rows of the table (k,), and which of them are positive (k,).
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        self.rows = np.concatenate([rows for _, rows, _ in parts])
        self.positive = np.concatenate([positive for _, _, positive in parts]).astype(bool)
        levels = [np.unique(values, return_inverse=True) for values, _, _ in parts]
        sizes = [len(distinct) for distinct, _ in levels]
        self.start = np.r_[0, np.cumsum(sizes)[:-1]].astype(int)
        self.part = np.repeat(np.arange(len(parts)), sizes)
        self.level = np.concatenate([level.ravel() + first for (_, level), first in zip(levels, self.start)])

    def pairs(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs ranked rightly (ties count half) and all pairs of every set."""
        own = weight[self.rows]
        n = len(self.part)
        up, down = (np.bincount(self.level, own * side, minlength=n) for side in (self.positive, ~self.positive))
        below = np.cumsum(down) - 0.5 * down
        before = np.r_[0.0, np.cumsum(down)][self.start]
        right = np.add.reduceat(up * (below - before[self.part]), self.start)
        return right, np.add.reduceat(up, self.start) * np.add.reduceat(down, self.start)

    def aurocs(self, weight: np.ndarray) -> np.ndarray:
        """AUROC of every set, NaN without pairs."""
        right, pairs = self.pairs(weight)
        return np.divide(right, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def pearson(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Correlation of weighted rows; NaN where one does not vary."""
    total = weight.sum()
    if total <= 0:
        return float("nan")
    u, v = a - weight @ a / total, b - weight @ b / total
    varies = all(weight @ c**2 > 1e-24 * (weight @ x**2) for c, x in ((u, a), (v, b)))
    return float(weight @ (u * v) / np.sqrt((weight @ u**2) * (weight @ v**2))) if varies else float("nan")


def spearman(a: Order, b: Order, weight: np.ndarray) -> float:
    """Rank correlation of weighted rows, ties at their mid-rank."""
    return pearson(a.ranks(weight), b.ranks(weight), weight)


def concordance(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Lin's concordance ``2 cov / (var_a + var_b + (mean_a - mean_b)^2)`` (Biometrics 45, 255, 1989)."""
    total = weight.sum()
    if total <= 0:
        return float("nan")
    mean_a, mean_b = weight @ a / total, weight @ b / total
    u, v = a - mean_a, b - mean_b
    below = weight @ u**2 + weight @ v**2 + total * (mean_a - mean_b) ** 2
    return float(2.0 * (weight @ (u * v)) / below) if below > 0 else float("nan")


def over_patients(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    *,
    classes: np.ndarray | None = None,
    used: np.ndarray | None = None,
    random_state: int = 0,
    n_draws: int = LEAST_DRAWS,
    what: str = "the score",
    bounded: bool = True,
) -> Number:
    """A statistic and its 95 % interval, patients drawn again with all their rows.

    Where the draws do not vary (a score of 1 in every patient), the bound is the exact binomial one of as many trials
    as there are patients: never an interval of no width.

    Parameters
    ----------
    statistic
        Maps weights of rows (n,), whole numbers, to a number.
    groups
        Patient of every row, codes (n,).
    classes
        Class of every row: patients with the same classes are drawn among themselves.
    used
        Rows on which the number stands (n,) bool; all by default.
    random_state, n_draws
        Seed and number of resamples.
    what
        Name of the number in reasons.
    bounded
        The statistic lies in [0, 1].
    """
    used = np.ones(len(groups), dtype=bool) if used is None else used
    n_samples = int(used.sum())
    n_patients = len(np.unique(groups[used]))
    score = float(statistic(used.astype(np.float64)))
    if not np.isfinite(score):
        return refused(f"{what} has no value on these rows", n_patients=n_patients, n_samples=n_samples)
    if n_patients < MIN_GROUPS:
        noun = "patient" if n_patients == 1 else "patients"
        reason = f"{n_patients} {noun}: an interval over patients needs {MIN_GROUPS}"
        return Number(score, np.nan, np.nan, n_patients, n_samples, "too_few_groups", reason)
    rows = np.flatnonzero(used)

    def of(chosen: np.ndarray) -> float:
        return statistic(np.bincount(rows[chosen], minlength=len(groups)).astype(np.float64))

    kinds = None if classes is None else classes[rows]
    found = cluster_bootstrap(groups[rows], of, classes=kinds, n_draws=n_draws, random_state=random_state)
    if np.isnan(found.low):
        reason = f"{what} does not exist in {found.n_failed} of {len(found.draws)} resamples of patients"
        return Number(score, np.nan, np.nan, n_patients, n_samples, "no_interval", reason)
    low, high = found.low, found.high
    if bounded and high - low < 1e-12:
        bounds = logit_interval(np.array([score]), np.zeros(1), critical=1.96, n_min=n_patients)
        low, high = float(bounds[0][0]), float(bounds[1][0])
    if n_patients < FEW_GROUPS:
        reason = f"{n_patients} patients: the interval is too narrow below {FEW_GROUPS}"
        return Number(score, low, high, n_patients, n_samples, "few_groups", reason)
    return Number(score, low, high, n_patients, n_samples)
