"""Permutation and sign-flip draws shared by all columns, and the max-T adjusted p-value.

``p = (1 + #{|T^b| >= |T|}) / (B + 1)`` for B random draws; the share over all arrangements where these can be listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np

from biosae.stats.kernels import kernels

MAX_EXACT = 50_000
"""Most arrangements that are listed instead of drawn."""
CHUNK = 64


@dataclass
class Watch:
    """What the permutations of each (target, source) gave: the observed statistics and the largest of every draw."""

    key: tuple[str, str] | None = None
    observed: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    largest: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched() -> Iterator[Watch]:
    """Keep the null distributions of the tests inside; :func:`now_testing` says whose they are."""
    watch = Watch()
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)


def now_testing(target: str, source: str) -> None:
    """Name the test whose permutations come next."""
    if (watch := _WATCH.get()) is not None:
        watch.key = (target, source)


@dataclass
class Draws:
    """Arrangements of a target, in blocks of columns (n, b)."""

    blocks: Callable[[], Iterator[np.ndarray]]
    n_draws: int
    exact: bool

    def p(self, count: np.ndarray) -> np.ndarray:
        """p-value of a count of arrangements at least as extreme."""
        return count / self.n_draws if self.exact else (count + 1.0) / (self.n_draws + 1.0)

    @property
    def describe(self) -> str:
        return f"all {self.n_draws} arrangements" if self.exact else f"{self.n_draws} random draws"


def permutations(y: np.ndarray, *, blocks: np.ndarray | None, n_draws: int, random_state: int) -> Draws:
    """Rearrangements of ``y`` (n,) within ``blocks`` (integer codes; None is one block).

    All distinct ones if ``y`` has two values or at most 8 entries and there are no more than :data:`MAX_EXACT`;
    otherwise ``n_draws`` at random. The same seed and length give the same rearrangements whatever ``y`` is.
    """
    n = len(y)
    grain = 1e-10 * max(float(np.abs(y).max()), 1e-300)  # equal values that rounding has parted are one value
    _, first, place = np.unique(np.round(y / grain), return_index=True, return_inverse=True)
    values = y[first]
    y = values[place.ravel()]
    if blocks is None and len(values) == 2:
        k = int((y == values[1]).sum())
        if math.comb(n, k) <= MAX_EXACT:
            chosen = np.array(list(itertools.combinations(range(n), k))).reshape(-1, k)
            table = np.full((n, len(chosen)), values[0], dtype=np.float64)
            table[chosen, np.arange(len(chosen))[:, None]] = values[1]
            return Draws(lambda: _columns(table), table.shape[1], True)
    if blocks is None and math.factorial(min(n, 20)) <= MAX_EXACT:
        table = np.array(list(itertools.permutations(y)), dtype=np.float64).T
        return Draws(lambda: _columns(table), table.shape[1], True)

    def drawn() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(random_state)
        by_block = np.arange(n) if blocks is None else np.argsort(blocks, kind="stable")
        keys = np.zeros(n) if blocks is None else blocks[by_block].astype(np.float64)
        for start in range(0, n_draws, CHUNK):
            size = min(CHUNK, n_draws - start)
            order = np.argsort(keys[:, None] + rng.random((n, size)), axis=0)
            out = np.empty((n, size))
            out[by_block] = y[by_block][order]
            yield out

    return Draws(drawn, n_draws, False)


def sign_flips(n_groups: int, *, n_draws: int, random_state: int) -> Draws:
    """Signs (n_groups, b), one a group: all ``2^(G-1)`` up to a common sign if that is few, else at random."""
    if n_groups <= 16:
        k = np.arange(2 ** (n_groups - 1))
        table = 1.0 - 2.0 * ((k[None, :] >> np.arange(n_groups)[:, None]) & 1)
        return Draws(lambda: _columns(table), table.shape[1], True)

    def drawn() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(random_state)
        for start in range(0, n_draws, CHUNK):
            yield rng.choice((-1.0, 1.0), (n_groups, min(CHUNK, n_draws - start)))

    return Draws(drawn, n_draws, False)


def _columns(table: np.ndarray) -> Iterator[np.ndarray]:
    step = 1024
    for start in range(0, table.shape[1], step):
        yield table[:, start : start + step]


def null_counts(
    observed: np.ndarray,
    draws: Draws,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    step_down: bool = True,
    slack: float = 1e-9,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Permutation p, max-T adjusted p (Westfall and Young 1993) and one-sided p of every column, from the same draws.

    Parameters
    ----------
    observed
        Statistics (m,), signed or not, on one scale for all columns; NaN columns are not tested and not in the maximum.
    draws
        Arrangements.
    statistic
        Maps arrangements (n, b) to statistics (m, b).
    step_down
        True takes the maximum over the columns whose statistic is not larger, from the largest down, and keeps the p
        monotone: never above the p of the maximum over all columns, and as safe.
    slack
        Share by which a draw may fall short and still count as a tie.

    Returns
    -------
    tuple
        ``(p, p_maxt, p_side)``, all (m,): of absolute statistics, and ``p_side`` of those in the observed direction.
    """
    p, p_max, p_side = (np.full(observed.shape, np.nan) for _ in range(3))
    tested = np.flatnonzero(~np.isnan(observed))
    if len(tested) == 0:
        return p, p_max, p_side
    sign, observed = np.sign(observed), np.abs(observed)
    order = tested[np.argsort(-observed[tested], kind="stable")]
    threshold = observed[order] * (1.0 - slack) - 1e-12
    counts = np.zeros((3, len(order)))
    watch = _WATCH.get()
    kept = [] if watch is not None and watch.key is not None and watch.key not in watch.observed else None
    for arrangement in draws.blocks():
        drawn = statistic(arrangement)
        counts += kernels().exceed(drawn, order, threshold, sign[order], step_down)
        if kept is not None:
            kept.append(np.abs(drawn[order]).max(axis=0))
    if kept:
        watch.observed[watch.key], watch.largest[watch.key] = sign * observed, np.concatenate(kept)
    own, joint, side = counts
    p[order] = draws.p(own)
    p_side[order] = draws.p(side)
    p_max[order] = np.maximum.accumulate(draws.p(joint))
    return p, p_max, p_side


def max_t(
    X: np.ndarray,
    y: np.ndarray,
    *,
    n_permutations: int = 9999,
    blocks: np.ndarray | None = None,
    step_down: bool = False,
    random_state: int = 0,
) -> np.ndarray:
    """Max-T adjusted p of the Pearson correlation of every column of X (n, m) with y (n,), one permutation for all.

    Rows must be exchangeable within ``blocks``: one row a patient, blocks the sites. For ranks, rank first. Ties of the
    maximum count as exceedances. Westfall and Young, Resampling-Based Multiple Testing (1993).
    """  # fmt: skip
    from biosae.stats.correlation import as_columns, dot, moments, ratio

    V, y = as_columns(X), np.asarray(y, np.float64)
    y = y - y.mean()
    scale = np.sqrt(moments(V)[1] * (y @ y))
    draws = permutations(y, blocks=blocks, n_draws=n_permutations, random_state=random_state)
    observed = np.abs(ratio(dot(V, y), scale))
    return null_counts(observed, draws, lambda Y: np.abs(ratio(dot(V, Y), scale[:, None])), step_down=step_down)[1]
