"""How the atoms of a dictionary lie: angles in a metric of the data, coherence, isometry and uniqueness of codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError
from biosae.sae.rows import Rows

RIDGE = 1e-6
"""Added to a singular second moment, as a share of its mean eigenvalue."""
MOST_PAIRS = 10_000_000
"""Pairs of atoms whose products are held at once for quantiles; beyond, as many are drawn."""
BLOCK = 1024
QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Metric:
    """S = (E[x x^T] + ridge I)^-1, in which angles do not change with a linear map of all embeddings and atoms."""

    matrix: np.ndarray
    """S, (d, d)."""
    root: np.ndarray
    """R with R R^T = S: rows u R are whitened, and their Euclidean products are those of the metric."""
    ridge: float
    """Added to the diagonal; 0 where the second moment has full rank."""
    rank: int
    """Rank of the second moment."""
    n_rows: int


def second_moment_metric(X: Any, *, ridge: float | None = None) -> Metric:
    """The inverse second moment of embeddings, about 0.

    Parameters
    ----------
    X
        Embeddings (n, d), array or :class:`biosae.Embeddings`; read in blocks.
    ridge
        Added to the diagonal, as a share of trace / d. None: 1e-6 where the second moment is singular, else 0.

    Raises
    ------
    InputError
        If all rows are zero.

    Notes
    -----
    S is as good as its estimate: with few more rows than dimensions it overstates directions of little variance.
    """
    total, n = 0.0, 0
    for _, x in Rows(X).blocks():
        x = x.astype(np.float64)
        total, n = total + x.T @ x, n + len(x)
    moment = total / n
    values, vectors = np.linalg.eigh(moment)
    if values[-1] <= 0:
        raise InputError("all rows are zero; there is no metric")
    rank = int((values > values[-1] * len(values) * np.finfo(np.float64).eps * 16).sum())
    share = (0.0 if rank == len(values) else RIDGE) if ridge is None else ridge
    added = share * float(np.trace(moment)) / len(values)
    if not added >= 0 or (rank < len(values) and added == 0):
        raise InputError(f"ridge={ridge!r}: the second moment has rank {rank} of {len(values)} and needs a ridge > 0")
    inverse = 1 / (np.maximum(values, 0) + added)
    return Metric((vectors * inverse) @ vectors.T, vectors * np.sqrt(inverse), added, rank, n)


def atomic_inner_product(atoms: Any, others: Any = None, *, metric: Metric | None = None) -> np.ndarray:
    """Cosines of atoms in a metric: u S v / sqrt(u S u  v S v).

    Parameters
    ----------
    atoms
        (m, d).
    others
        (q, d); None: the atoms themselves.
    metric
        From :func:`second_moment_metric`. None: the Euclidean one.

    Returns
    -------
    ndarray (m, q), float64
        A zero atom has products 0.

    Raises
    ------
    InputError
        If widths differ.

    References
    ----------
    Hu et al. 2025, Towards atoms of large language models, arXiv 2509.20784.
    """
    u = unit(atoms, metric)
    return u @ (u if others is None else unit(others, metric)).T


@dataclass(frozen=True)
class Coherence:
    """Off-diagonal |AIP| of a dictionary; see :func:`coherence`."""

    mu: float
    """The largest, over all pairs."""
    pair: tuple[int, int]
    """Where it is reached."""
    mean: float
    rms: float
    quantiles: dict[float, float]
    welch: float
    """The least mu that m unit vectors in d dimensions can have, sqrt((m - d) / (d (m - 1))); 0 for m <= d."""
    unique_sparsity: int
    """See :func:`unique_sparsity`."""
    n_pairs: int
    """Pairs that mean, rms and quantiles rest on."""
    sampled: bool
    """Whether these pairs are a random part of all."""


def coherence(
    atoms: Any,
    *,
    metric: Metric | None = None,
    quantiles: tuple[float, ...] = QUANTILES,
    random_state: int | None = None,
) -> Coherence:
    """Mutual coherence mu = max_{i != j} |AIP(d_i, d_j)| and the distribution below it.

    Parameters
    ----------
    atoms
        (m, d), at least two; zero atoms are left out.
    metric
        From :func:`second_moment_metric`. None: Euclidean.
    quantiles
        Which to report.
    random_state
        Of the pairs drawn above 10 million of them; mu is always of all pairs.

    Raises
    ------
    InputError
        With fewer than two atoms that are not zero.
    """
    u, kept = unit_atoms(atoms, metric)
    mu, pair = -1.0, (0, 0)
    for start, block in _off_diagonal(u):
        at = np.unravel_index(block.argmax(), block.shape)
        if block[at] > mu:
            mu, pair = float(block[at]), (int(kept[start + at[0]]), int(kept[at[1]]))
    values, sampled = pairs(u, random_state)
    m, d = u.shape
    return Coherence(
        mu,
        (min(pair), max(pair)),
        float(values.mean()),
        float(np.sqrt(np.square(values).mean())),
        {q: float(np.quantile(values, q)) for q in quantiles},
        float(np.sqrt(max(m - d, 0) / (d * (m - 1)))),
        unique_sparsity(mu),
        len(values),
        sampled,
    )


def babel(atoms: Any, *, most: int = 64, metric: Metric | None = None) -> np.ndarray:
    """Babel function mu_1(r) = max over j and sets S of r other atoms of sum_{i in S} |<d_i, d_j>|.

    Returns
    -------
    ndarray (min(most, m - 1),)
        mu_1(1) = mu, mu_1(2), ...; never falling, at most r mu.

    References
    ----------
    Tropp 2004, IEEE Transactions on Information Theory 50.
    """
    u, _ = unit_atoms(atoms, metric)
    r = min(most, len(u) - 1)
    best = np.zeros(r)
    for _, block in _off_diagonal(u):
        top = -np.sort(-np.partition(block, -r, axis=1)[:, -r:], axis=1)
        best = np.maximum(best, np.cumsum(top, axis=1).max(0))
    return best


def babel_selected(atoms: Any, codes: Any, *, metric: Metric | None = None) -> np.ndarray:
    """The Babel sum among the atoms that a row selects: max_j in A_i of sum_{i' in A_i, i' != j} |<d_i', d_j>|.

    Parameters
    ----------
    atoms
        (m, d).
    codes
        (n, m), sparse or dense; the atoms with a code other than 0 are the row's set A_i.

    Returns
    -------
    ndarray (n,)
        0 for a row with fewer than two atoms. Compare with ``babel(atoms)`` at r = L0 - 1.
    """
    return np.asarray([np.abs(g).sum(1).max(initial=0) for g in _selected(atoms, codes, metric)])


def isometry(atoms: Any, codes: Any, *, metric: Metric | None = None) -> np.ndarray:
    """Restricted isometry on the sets that rows select: the largest |eigenvalue - 1| of the atoms' products.

    Parameters
    ----------
    atoms, codes
        As for :func:`babel_selected`.

    Returns
    -------
    ndarray (n,)
        (1 - delta) ||z||^2 <= ||z D||^2 <= (1 + delta) ||z||^2 on the row's atoms. The largest over rows is a lower
        bound of the constant delta_K over all sets; :func:`isometry_bound` is an upper one.
    """
    return np.asarray(
        [np.abs(np.linalg.eigvalsh(g)).max() if len(g) > 1 else 0.0 for g in _selected(atoms, codes, metric)]
    )


def isometry_bound(mu: float, k: int) -> float:
    """Upper bound (k - 1) mu of the isometry constant of k atoms (Gershgorin); it says something only below 1."""
    return (k - 1) * mu


def unique_sparsity(mu: float) -> int:
    """Largest K with mu < 1 / (2 K - 1): codes of at most K atoms are unique, and L1 minimisation finds them.

    0 for mu = 1 (two atoms coincide); a very large number for mu = 0.
    """
    if mu <= 0:
        return int(np.iinfo(np.int64).max)
    return max(0, int(np.ceil((1 + 1 / mu) / 2) - 1))


# --------------------------------------------------------------------------------------------------------- internal


def unit(atoms: Any, metric: Metric | None) -> np.ndarray:
    """Atoms in whitened coordinates at unit length; zero atoms stay zero."""
    table = np.asarray(atoms, np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InputError(f"atoms must be a finite table (m, d), found shape {table.shape}")
    if metric is not None:
        if table.shape[1] != len(metric.root):
            raise InputError(f"atoms have {table.shape[1]} columns, the metric {len(metric.root)}")
        table = table @ metric.root
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(norms > 0, norms, 1)


def unit_atoms(atoms: Any, metric: Metric | None) -> tuple[np.ndarray, np.ndarray]:
    """Unit atoms that are not zero, and their numbers."""
    u = unit(atoms, metric)
    kept = np.flatnonzero(u.any(1))
    if len(kept) < 2:
        raise InputError(f"{len(kept)} of {len(u)} atoms are not zero; coherence needs two")
    return u[kept], kept


def _off_diagonal(u: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """``(start, |u u^T|)`` block by block of rows, with 0 on the diagonal."""
    for start in range(0, len(u), BLOCK):
        block = _size(u[start : start + BLOCK] @ u.T)
        block[np.arange(len(block)), start + np.arange(len(block))] = 0
        yield start, block


def pairs(u: np.ndarray, random_state: int | None) -> tuple[np.ndarray, bool]:
    """|AIP| of all pairs of unit atoms, or of as many random ones as are held at once; and whether they are sampled."""
    m = len(u)
    if m * (m - 1) // 2 <= MOST_PAIRS:
        parts = [block[np.arange(len(block))[:, None] + start < np.arange(m)] for start, block in _off_diagonal(u)]
        return np.concatenate(parts), False
    rng = np.random.default_rng(random_state)
    first = rng.integers(0, m, MOST_PAIRS)
    second = (first + rng.integers(1, m, MOST_PAIRS)) % m
    step = max(1, 2**24 // u.shape[1])
    parts = [np.einsum("nd,nd->n", u[first[s : s + step]], u[second[s : s + step]]) for s in range(0, MOST_PAIRS, step)]
    return _size(np.concatenate(parts)), True


def _size(products: np.ndarray) -> np.ndarray:
    """Magnitudes; what is 1 up to rounding (the same atom twice) is 1."""
    size = np.abs(products)
    size[size > 1 - 1e-12] = 1.0
    return size


def _selected(atoms: Any, codes: Any, metric: Metric | None) -> Iterator[np.ndarray]:
    """Products of the atoms of each row, with 0 on the diagonal."""
    u, Z = unit(atoms, metric), scipy.sparse.csr_matrix(codes, copy=True)
    if Z.shape[1] != len(u):
        raise InputError(f"codes have {Z.shape[1]} latents, the dictionary {len(u)} atoms")
    Z.eliminate_zeros()
    for i in range(Z.shape[0]):
        chosen = u[Z.indices[Z.indptr[i] : Z.indptr[i + 1]]]
        products = chosen @ chosen.T
        np.fill_diagonal(products, 0)
        yield products
