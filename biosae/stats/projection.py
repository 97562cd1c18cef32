"""What all targets on one set of rows share: columns off the covariates, and products with every target at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from biosae.stats.adjust import basis
from biosae.stats.correlation import Columns, dot, moments3, ratio
from biosae.stats.kernels import kernels
from biosae.stats.nested import group_scores
from biosae.stats.schemes import Arranged, Scheme, arranged


class Projection:
    """Columns V (n, m) and an orthonormal basis Q (n, 1 + k) of what they are adjusted for.

    ``coefficient = Q'V``, ``total`` and ``ss`` the sums of squares of the columns about their mean and about the whole
    basis, ``skew`` their skewness over ``sqrt(n)`` (:func:`biosae.stats.correlation.skewness`).
    """

    def __init__(self, V: Columns, C: np.ndarray | None) -> None:
        self.V, self.C = V, C
        self.Q = basis(C, V.shape[0])
        self.coefficient = dot(V, self.Q).T
        _, self.total, third = moments3(V)
        self.ss = np.maximum(self.total - (self.coefficient[1:] ** 2).sum(axis=0), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.r2 = np.where(self.total > 0, 1.0 - self.ss / self.total, np.nan)
            self.skew = np.where(self.total > 0, third / self.total**1.5, np.nan)
        self.ss = np.where(self.ss <= 1e-10 * self.total, 0.0, self.ss)
        self._totals: tuple[np.ndarray, np.ndarray] | None = None
        self._arranged: Arranged | None = None

    def arranged(self, scheme: Scheme) -> Arranged:
        """The columns within the parts of a scheme of permutation."""
        if self._arranged is None or self._arranged.scheme is not scheme:
            self._arranged = arranged(self.V, self.Q, scheme)
        return self._arranged

    def totals(self, codes: np.ndarray, n_groups: int) -> np.ndarray:
        """Sums of the residual columns in every group, in units of their norm (G, m)."""
        if self._totals is None or self._totals[0] is not codes:
            X = group_scores(self.V, np.ones(len(codes)), self.Q, self.coefficient, codes, n_groups)
            self._totals = codes, X / np.where(self.ss > 0, np.sqrt(self.ss), np.inf)
        return self._totals[1]


@dataclass
class Batch:
    """Residuals E (n, T) of several targets, their products V'E (m, T) and correlations with every column."""

    projection: Projection
    E: np.ndarray
    rows: np.ndarray
    """E transposed, so that one target lies in one piece (T, n)."""
    cubes: np.ndarray = field(init=False)
    """Sums of cubed residuals (T,)."""
    product: np.ndarray = field(init=False)
    r: np.ndarray = field(init=False)
    r2_target: np.ndarray = field(init=False)
    _scores: tuple[np.ndarray, dict[str, np.ndarray]] | None = field(init=False, default=None)

    def scores(self, codes: np.ndarray, n_groups: int) -> dict[str, np.ndarray]:
        """Sums over groups of the scores of all targets, see :func:`biosae.stats.kernels_numpy.scores`."""
        if self._scores is None or self._scores[0] is not codes:
            p = self.projection
            V = p.V if sp.issparse(p.V) else sp.csc_matrix(p.V)
            self._scores = codes, kernels().scores(V, self.E, codes, n_groups, p.Q, p.coefficient)
        return self._scores[1]


def batch(projection: Projection, ys: Sequence[np.ndarray]) -> Batch:
    """Residuals of the targets ``ys``, 0 throughout where the covariates determine one, and their products."""
    Q = projection.Q
    rows = np.stack([np.asarray(y, np.float64) for y in ys])
    constant = np.ptp(rows, axis=1) == 0
    rows -= rows.mean(axis=1, keepdims=True)
    total = np.einsum("ti,ti->t", rows, rows)
    inside = rows @ Q[:, 1:]
    r2 = np.array([(c @ c) / s if s > 0 else np.nan for c, s in zip(inside, total)])
    rows -= inside @ Q[:, 1:].T if Q.shape[1] > 1 else 0.0
    for _ in range(2):  # once more for what rounding has left
        rows -= (rows @ Q) @ Q.T
    left = np.einsum("ti,ti->t", rows, rows)
    rows[(left <= 1e-20 * total) | constant] = 0.0
    out = Batch(projection, np.ascontiguousarray(rows.T), rows)
    E = out.E
    out.r2_target = r2 if Q.shape[1] > 1 else np.zeros(len(rows))
    out.cubes = np.einsum("ti,ti,ti->t", rows, rows, rows)
    out.product = kernels().product(projection.V, E) if sp.issparse(projection.V) else dot(projection.V, E)
    out.r = ratio(out.product, np.sqrt(projection.ss[:, None] * np.einsum("ti,ti->t", rows, rows)))
    return out
