"""How well the best latent fits a label on given rows, and how well it would fit shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError


class Target:
    """One label of some rows: classes, or a number.

    Parameters
    ----------
    values
        (n,). Numbers with more than two values are taken as a number, everything else as classes; None and NaN are
        missing.

    Attributes
    ----------
    known : ndarray of bool (n,)
    values : ndarray
        Of the known rows: ranks minus their mean, or the number of the class.
    n_classes : int
        0 for a number.
    """

    def __init__(self, values: Any) -> None:
        values = np.asarray(values, dtype=object)
        self.known = np.asarray([v is not None and str(v) != "<NA>" and v == v for v in values], bool)
        values = values[self.known]
        numbers = None
        if not any(isinstance(v, str | bool | np.bool_) for v in values):
            numbers = values.astype(np.float64)
        if numbers is not None and len(np.unique(numbers)) > 2:
            self.n_classes, ranks = 0, _ranks(numbers)
            self.values = ranks - ranks.mean()
        else:
            names, self.values = np.unique(values.astype(str), return_inverse=True)
            self.n_classes = len(names)

    @property
    def varies(self) -> bool:
        """Whether there is anything to fit."""
        return self.n_classes != 1 and len(self.values) > 1

    def weights(self, values: np.ndarray) -> np.ndarray:
        """What ranks are summed with, (rows, classes), for these values: scores are sums over rows."""
        if self.n_classes == 0:
            return values[:, None]
        one = values[:, None] == np.arange(self.n_classes)
        if self.n_classes == 2:
            one = one[:, 1:]
        inside = one.sum(0)
        return 2 / len(values) * np.where(one, 1 / inside, -1 / (len(values) - inside))


class Labels:
    """Labels of some rows, against which codes of those rows are held.

    For classes the score of a latent is |2 AUROC - 1|, one class against the rest, averaged over more than two classes;
    for numbers |Spearman's rho|. The score of a label is that of the best latent.

    Parameters
    ----------
    labels
        Name to values of the rows, (n,).
    groups
        Group of each row, (n,), or None. Labels that are the same throughout each group are shuffled between groups,
        others within them; without groups, between rows.
    n_null
        Shuffles.
    random_state
        Of the shuffles.

    Raises
    ------
    InputError
        If a label does not vary on these rows.
    """

    def __init__(
        self, labels: Mapping[str, Any], *, groups: Any = None, n_null: int = 20, random_state: int = 0
    ) -> None:
        if n_null < 1:
            raise InputError(f"n_null={n_null!r} must be at least 1")
        self.targets = {name: Target(values) for name, values in labels.items()}
        for name, target in self.targets.items():
            if not target.varies:
                raise InputError(f"label {name!r} does not vary on the held-out rows; leave it out, or hold out more")
        self._weights = {}
        for number, (name, target) in enumerate(self.targets.items()):
            inside = (
                None if groups is None else np.unique(np.asarray(groups, str)[target.known], return_inverse=True)[1]
            )
            rng = np.random.default_rng([random_state, number])
            shuffles = [shuffled(target.values, inside, rng) for _ in range(n_null)]
            self._weights[name] = np.stack([target.weights(v) for v in (target.values, *shuffles)])

    def scores(self, codes: scipy.sparse.csr_matrix) -> dict[str, tuple[float, float]]:
        """Label to score of the best latent of codes (n, m), and the mean of the same over the shuffled labels."""
        found = {}
        for name, target in self.targets.items():
            ranks, spread = rank_codes(codes[np.flatnonzero(target.known)])
            weights = self._weights[name]  # (1 + shuffles, rows, classes)
            flat = weights.transpose(1, 0, 2).reshape(weights.shape[1], -1)
            sums = np.abs(ranks.T @ flat)
            if target.n_classes == 0:
                norm = spread * np.linalg.norm(target.values)
                sums = np.divide(sums, norm[:, None], out=np.zeros_like(sums), where=norm[:, None] > 0)
            best = sums.max(0).reshape(len(weights), -1).mean(1)
            found[name] = float(best[0]), float(best[1:].mean())
        return found


def shuffled(values: np.ndarray, groups: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Values (n,) moved between whole groups where each has one value, else within groups (numbers 0, 1, ...)."""
    if groups is None:
        return rng.permutation(values)
    first = np.zeros(groups.max() + 1, values.dtype)
    first[groups] = values
    if (first[groups] == values).all():
        return rng.permutation(first)[groups]
    out = np.empty_like(values)
    out[np.lexsort((rng.random(len(values)), groups))] = values[np.argsort(groups, kind="stable")]
    return out


def rank_codes(codes: scipy.sparse.csr_matrix) -> tuple[scipy.sparse.csc_matrix, np.ndarray]:
    """Ranks of each column of codes (n, m) minus the rank of its zeros, ties averaged, as sparse as the codes.

    Returns
    -------
    ranks, spread
        Sparse (n, m); root of the summed squared deviations of each column's ranks from their mean, (m,).
    """
    found = scipy.sparse.csc_matrix(codes, dtype=np.float64, copy=True)
    found.eliminate_zeros()
    n, m = found.shape
    filled = np.diff(found.indptr)
    column = np.repeat(np.arange(m), filled)
    order = np.lexsort((found.data, column))  # columns stay in their order
    values = found.data[order]
    below = np.bincount(column, found.data < 0, m)
    place = np.arange(len(values)) - found.indptr[:-1][column] + 1.0
    place += np.where(values > 0, (n - filled)[column], 0)
    if len(values):
        starts = np.flatnonzero(np.r_[True, (np.diff(values) != 0) | (np.diff(column) != 0)])
        lengths = np.diff(np.r_[starts, len(values)])
        place = np.repeat(np.add.reduceat(place, starts) / lengths, lengths)
    zero = below + (n - filled + 1) / 2
    found.data[order] = place - zero[column]
    mean, square = (np.asarray(part.sum(0)).ravel() / n for part in (found, found.multiply(found)))
    return found, np.sqrt(np.maximum(n * (square - mean**2), 0))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties averaged."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which]
