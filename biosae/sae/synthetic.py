"""Rows made of known atoms, and how many of them a dictionary has found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

from biosae.errors import InputError, nearest

KINDS = ("sparse", "hierarchical", "correlated", "bidirectional", "offset", "products")


@dataclass(frozen=True)
class Planted:
    """What :func:`planted` made."""

    rows: np.ndarray
    """x, float32 (n, d)."""
    atoms: np.ndarray
    """True directions of unit norm, float32 (m, d)."""
    codes: scipy.sparse.csr_matrix
    """True strengths, float32 (n, m)."""


def planted(
    kind: str = "sparse",
    *,
    n_rows: int = 4096,
    d: int = 32,
    n_atoms: int = 64,
    k: int = 4,
    noise: float = 0.0,
    random_state: int = 0,
) -> Planted:
    """Rows x = sum_j z_j a_j + noise, with k of m random unit atoms in each.

    Parameters
    ----------
    kind
        ``sparse``: k atoms at random, strengths uniform in [0.5, 1.5]. ``hierarchical``: atoms come in families of one
        parent and three children; a child is active only where its parent is, which is then active alone as often as
        with one child. ``correlated``: atoms come in blocks of four, and half of the active ones are drawn from blocks
        that are active already. ``bidirectional``: as ``sparse``, each strength with a random sign. ``offset``: as
        ``sparse``, plus one point of norm 5 common to all rows. ``products``: as ``sparse``, and each of m / 4 pairs of
        atoms adds, where both are active, the product of their strengths times a direction of its own, while the pairs
        are drawn together in half of the rows.
    n_rows, d, n_atoms, k
        n, width, m, active atoms a row (of ``hierarchical`` on average about).
    noise
        Standard deviation of the Gaussian noise of each feature.
    random_state
        Seed.

    Raises
    ------
    InputError
        For an unknown kind, or k above the number of atoms.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is not known; {nearest(kind, KINDS)}")
    if not 1 <= k <= n_atoms:
        raise InputError(f"k={k} must lie between 1 and the number of atoms, {n_atoms}")
    rng = np.random.default_rng(random_state)
    atoms = rng.standard_normal((n_atoms, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    support = _support(kind, n_rows, n_atoms, k, rng)
    strengths = support * rng.uniform(0.5, 1.5, support.shape)
    if kind == "bidirectional":
        strengths *= rng.choice([-1.0, 1.0], support.shape)
    rows = strengths @ atoms
    if kind == "offset":
        centre = rng.standard_normal(d)
        rows += 5 * centre / np.linalg.norm(centre)
    if kind == "products":
        first, second = _pairs(n_atoms)
        own = rng.standard_normal((len(first), d))
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        rows += (strengths[:, first] * strengths[:, second]) @ own
    rows += noise * rng.standard_normal(rows.shape)
    codes = scipy.sparse.csr_matrix(strengths.astype(np.float32))
    return Planted(rows.astype(np.float32), atoms.astype(np.float32), codes)


def _pairs(m: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(0, m // 2, 2), np.arange(1, m // 2 + 1, 2)[: len(np.arange(0, m // 2, 2))]


def _support(kind: str, n: int, m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Active atoms, bool (n, m)."""
    order = rng.random((n, m))
    if kind == "correlated":
        seeds = _smallest(order, max(1, k // 2))
        block = np.arange(m) // 4
        neighbours = np.zeros((n, block[-1] + 1), bool)
        np.logical_or.at(neighbours, (np.nonzero(seeds)[0], block[np.nonzero(seeds)[1]]), True)
        order = order - 2.0 * seeds - 1.0 * neighbours[:, block]
    elif kind == "products":
        first, second = _pairs(m)
        drawn = rng.integers(0, len(first), n) if len(first) else np.zeros(0, int)
        together = np.flatnonzero(rng.random(n) < 0.5) if len(first) and k > 1 else np.zeros(0, int)
        order[together, first[drawn[together]]] = order[together, second[drawn[together]]] = -1.0
    elif kind == "hierarchical":
        parents = np.arange(0, m, 4)
        active = np.zeros((n, m), bool)
        chosen = _smallest(order[:, parents], min(max(1, round(k / 1.5)), len(parents)))
        row, family = np.nonzero(chosen)
        active[row, parents[family]] = True
        child = parents[family] + rng.integers(1, 4, len(row))
        with_child = (rng.random(len(row)) < 0.5) & (child < m)
        active[row[with_child], child[with_child]] = True
        return active
    return _smallest(order, k)


def _smallest(order: np.ndarray, k: int) -> np.ndarray:
    """The k smallest of each row, bool."""
    chosen = np.zeros(order.shape, bool)
    np.put_along_axis(chosen, np.argpartition(order, k - 1, axis=1)[:, :k], True, axis=1)
    return chosen


def recovery(found: np.ndarray, true: np.ndarray, *, signed: bool = False, threshold: float = 0.9) -> dict[str, float]:
    """How well atoms were found.

    Parameters
    ----------
    found, true
        Dictionaries (m, d) and (m', d), of any norms; zero rows are never found and find nothing.
    signed
        Also count an atom of the opposite sign, for codes that may be negative.
    threshold
        Cosine from which on a true atom counts as found.

    Returns
    -------
    dict
        ``mean_max_cosine``: mean over true atoms of the largest cosine with an atom found; ``share_found``: share of
        true atoms that are matched one to one (Hungarian) at ``threshold`` or above.
    """
    cosines = _unit(true) @ _unit(found).T
    if signed:
        cosines = np.abs(cosines)
    rows, columns = scipy.optimize.linear_sum_assignment(-cosines)
    return {
        "mean_max_cosine": float(cosines.max(1).mean()),
        "share_found": float((cosines[rows, columns] >= threshold).sum() / len(true)),
    }


def _unit(atoms: np.ndarray) -> np.ndarray:
    atoms = np.asarray(atoms, np.float64)
    return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)
