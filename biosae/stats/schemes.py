"""Schemes of permutation that a user names: groups as wholes, samples within groups, tiles of a slide as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from scipy import linalg

from biosae.errors import InputError, StatisticsError
from biosae.stats.adjust import residual
from biosae.stats.correlation import Columns, dot
from biosae.stats.kernels import kernels
from biosae.stats.kernels_numpy import members
from biosae.stats.permutation import Draws, null_counts

KEPT = 2**29
"""Bytes of rearranged row numbers that are kept for the next target instead of being drawn again."""
AT_ONCE = 128
"""Draws whose products are made together."""
SINGLE = 5_000
"""From this many rows the products of permuted targets are made in single precision."""


@dataclass
class Scheme:
    """How rows (n,) are rearranged: by whom, within which parts, and the draws, the same for every target."""

    name: str
    parts: np.ndarray | None = None
    """Part of every row within which it is rearranged; None where groups move as wholes."""
    n_parts: int = 0
    arrange: Callable[[np.random.Generator, int], np.ndarray] | None = None
    """Row numbers (n, b) to take values from, for b draws."""
    exact: bool = True
    """Every row is taken once; False where values may repeat, so that draws are centred and scaled again."""
    _kept: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)

    def draws(self, n_draws: int, random_state: int) -> Iterator[np.ndarray]:
        for start in range(0, n_draws, AT_ONCE):
            size = min(AT_ONCE, n_draws - start)
            key = (random_state, start, size)
            rows = self._kept.get(key)
            if rows is None:
                rows = self.arrange(np.random.default_rng((random_state, start)), size)
                if sum(kept.nbytes for kept in self._kept.values()) + rows.nbytes <= KEPT:
                    self._kept[key] = rows
            yield rows


def within(codes: np.ndarray, *, name: str = "within groups") -> Scheme:
    """Rows exchanged freely within the parts ``codes`` (n,), integers from 0."""
    size = np.bincount(codes)
    rows = np.argsort(codes, kind="stable")
    starts = np.r_[0, np.cumsum(size)]

    def arrange(rng: np.random.Generator, b: int) -> np.ndarray:
        return kernels().shuffle(rows, starts, rng.random((b, len(codes))))

    return Scheme(name, codes, len(size), arrange)


@dataclass
class Arranged:
    """A target and columns within parts: what is left of both after part means and covariates are taken off."""

    V: Columns
    Q: np.ndarray
    """Covariates within parts, orthonormal (n, k)."""
    coefficient: np.ndarray
    ss: np.ndarray
    scheme: Scheme

    def centred(self, Y: np.ndarray) -> np.ndarray:
        """Y (n, b) less its means in every part."""
        parts, size = self.scheme.parts, np.bincount(self.scheme.parts, minlength=self.scheme.n_parts)
        return Y - ((members(parts, len(size)) @ Y) / np.maximum(size, 1)[:, None])[parts]

    def products(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``x_w'y_w`` (m, b) and the norm of ``y_w`` (b,), y_w the part of Y off the covariates."""
        inside = self.Q.T @ Y
        norm = np.sqrt(np.maximum(np.einsum("ib,ib->b", Y, Y) - (inside**2).sum(axis=0), 0.0))
        if sp.issparse(self.V):
            U = kernels().product(self.V, Y.astype(np.float32) if len(Y) >= SINGLE else Y)
        else:
            U = dot(self.V, Y)
        if self.Q.shape[1]:
            U = U - (self.coefficient.T @ inside).astype(U.dtype)
        return U, norm


def arranged(V: Columns, Q: np.ndarray, scheme: Scheme) -> Arranged:
    """Columns V (n, m) within the parts of a scheme, adjusted for the columns of Q (n, 1 + k)."""
    out = Arranged(V, np.empty((V.shape[0], 0)), np.empty((0, V.shape[1])), np.zeros(V.shape[1]), scheme)
    inside = out.centred(Q)
    inside = inside[:, np.sqrt((inside**2).sum(axis=0)) > 1e-8]  # an unweighted intercept is constant in every part
    if inside.shape[1]:
        q, r, _ = linalg.qr(inside, mode="economic", pivoting=True)
        out.Q = q[:, np.abs(np.diag(r)) > 1e-8]
        out.coefficient = dot(V, out.Q).T
    size = np.maximum(np.bincount(scheme.parts, minlength=scheme.n_parts), 1)
    ones, step = np.ones(V.shape[0]), max(1, 2**23 // scheme.n_parts)
    for j in range(0, V.shape[1], step):
        part = V[:, j : j + step]
        square = part.multiply(part) if sp.issparse(part) else part * part
        total = np.asarray(square.sum(axis=0)).ravel()
        if sp.issparse(part):
            sums = kernels().group_sums(part, ones, scheme.parts, scheme.n_parts)
        else:
            sums = members(scheme.parts, scheme.n_parts) @ part
        left = total - (sums**2 / size[:, None]).sum(axis=0)
        out.ss[j : j + step] = np.where(left <= 1e-9 * total, 0.0, left)
    left = out.ss - (out.coefficient**2).sum(axis=0)
    out.ss = np.where(left <= 1e-9 * out.ss, 0.0, left)
    return out


def permuted(
    V: Columns, targets: np.ndarray, Q: np.ndarray, scheme: Scheme, *, n_draws: int, random_state: int,
    testable: np.ndarray, setting: Arranged | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:  # fmt: skip
    """Permutation p, max-T p and one-sided p of every column under a scheme, and the scheme in words.

    The statistic is the correlation within parts (groups or slides): part means are taken off the columns and off the
    target, which is then rearranged; with covariates its residual is (Freedman and Lane 1983), and adjusted again.
    Several ``targets`` (n, C), the classes of a label over the root of their size, count together by the sum of
    their squares.
    """
    a = setting or arranged(V, Q, scheme)
    E = residual(a.centred(targets), a.Q)
    several = E.shape[1] > 1
    quick = sp.issparse(V) and scheme.exact and a.Q.shape[1] == 0  # neither means nor norms change
    kind = np.float32 if sp.issparse(V) and len(E) >= SINGLE else np.float64
    with np.errstate(divide="ignore"):
        inverse = np.where(a.ss > 0, 1 / np.sqrt(a.ss), 0.0).astype(kind)[:, None]

    def statistic_of(index: np.ndarray) -> np.ndarray:
        total = 0.0
        for e in E.T:
            if quick:
                U = kernels().rearranged(V, e.astype(kind), index) * inverse
                total = total + (U * U if several else U)
                continue
            Y = e[index]
            Y = Y if scheme.exact else a.centred(Y)
            U, norm = a.products(Y)
            scale = np.where(norm > 0, np.sqrt(e @ e) / np.maximum(norm, 1e-300), 0.0)
            U = U * (scale.astype(U.dtype) * inverse)
            total = total + (U * U if several else U)
        return total / float((E**2).sum() if several else np.sqrt((E**2).sum()))

    observed = statistic_of(np.arange(len(E), dtype=np.int32)[:, None])[:, 0].astype(np.float64)
    observed = np.where(testable & (a.ss > 0), observed, np.nan)
    draws = Draws(lambda: scheme.draws(n_draws, random_state), n_draws, False)
    slack = 1e-5 if kind is np.float32 else 1e-9
    p, p_maxt, p_side = null_counts(observed, draws, statistic_of, slack=slack)
    return p, np.maximum(p_maxt, p), p_side, f"permutation {scheme.name}, {draws.describe}"


def needs_variation(parts: np.ndarray, y: np.ndarray, *, target: str, scheme: str, part: str) -> None:
    """Refuse parts in which there is nothing to rearrange.

    Raises
    ------
    StatisticsError
        If every part has one row, or the target has one value in every part.
    """
    size = np.bincount(parts)
    if size.max() < 2:
        raise StatisticsError(
            f"permute={scheme!r}: every {part} has a single row, so there is nothing to rearrange within it; use "
            "permute='between', or name larger groups with groups="
        )
    first = np.zeros(len(size), y.dtype)
    first[parts[::-1]] = y[::-1]
    if (y == first[parts]).all():
        raise StatisticsError(
            f"permute={scheme!r}: target {target!r} has one value in every {part}, so rearranging within it changes "
            "nothing; use permute='between'"
        )


def check(permute: str, *, n_permutations: int, strata: str | None) -> None:
    """Refuse options that do not go together.

    Raises
    ------
    InputError
        For a scheme without draws, or between groups with strata.
    """
    if permute != "auto" and n_permutations < 1:
        raise InputError(f"permute={permute!r} needs n_permutations: 999 for p down to 0.001, more for smaller ones")
    if permute != "auto" and strata:
        raise InputError(f"permute={permute!r} takes no strata=; use blocks={strata!r} to exchange groups within them")
