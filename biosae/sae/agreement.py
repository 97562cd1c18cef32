"""Do the same latents come back when the dictionary is learnt again? Matching of atoms and of codes between SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import scipy.sparse
from scipy.optimize import linear_sum_assignment

from biosae.errors import IdentityError, InputError, NotFittedError, nearest

EXACT_CELLS = 4096 * 4096
"""Largest number of pairs for which the optimal matching is computed; above it a greedy one comes first."""
CANDIDATES = 50
"""Nearest atoms that the greedy matching offers each atom."""
BLOCK_CELLS = 2**23
"""Pairs held at once where only the largest are needed: 32 MiB in float32."""
NULLS = ("rotation", "second_moment")
SCORES = ("mmcs", "mmcs_back", "hungarian", "shared")


@dataclass(frozen=True)
class PairStability:
    """Agreement of two dictionaries A (``first``) and B (``second``), live latents only."""

    first: int
    second: int
    n_first: int
    n_second: int
    """Live latents compared."""
    mmcs: float
    """Mean over A of the largest cosine with an atom of B; several atoms of A may claim the same atom of B."""
    mmcs_back: float
    """The same from B to A."""
    hungarian: float
    """Mean cosine of the one-to-one matching with the largest sum; it has min(n_first, n_second) pairs."""
    shared: float
    """Share of those pairs with cosine >= threshold."""
    exact: bool
    """False: the matching is greedy at first, so ``hungarian`` and ``shared`` belong to a matching that is not optimal;
    the optimal mean lies between ``hungarian`` and ``mmcs`` of the smaller dictionary."""
    null_mean: dict[str, float] = field(repr=False)
    """Mean of each of the four scores under the null."""
    null_q95: dict[str, float] = field(repr=False)
    """95 % quantile of each under the null."""
    activation: float | None = None
    """Mean over A's latents that vary on the shared rows of the largest Pearson correlation with codes of B."""
    activation_back: float | None = None
    """The same from B to A."""
    n_constant_first: int | None = None
    n_constant_second: int | None = None
    """Live latents whose code does not vary on the shared rows; they take no part in ``activation``."""


@dataclass(frozen=True)
class Stability:
    """What :func:`stability` found."""

    pairs: tuple[PairStability, ...]
    """Every pair of models, (0, 1), (0, 2), ..., (1, 2), ..."""
    n_dead: tuple[int, ...]
    """Latents of each model that were active in no training row; they take no part."""
    best: np.ndarray = field(repr=False)
    """(m,) for the latents of the first model: largest cosine with an atom, mean over the other models. NaN if dead."""
    z: np.ndarray = field(repr=False)
    """(m,): (best - mean) / standard deviation of ``best`` under the null."""
    activation: np.ndarray | None = field(repr=False)
    """(m,): largest correlation of the codes, mean over the other models; NaN if dead or constant. None without X."""
    threshold: float = 0.7
    n_null: int = 20
    null: str = "rotation"


def stability(
    models: Sequence[Any],
    X: Any = None,
    *,
    threshold: float = 0.7,
    n_null: int = 20,
    null: str = "rotation",
    signed: bool = False,
    random_state: int | None = None,
) -> Stability:
    """Compare SAEs that were fitted alike with other seeds (or on other halves of the data).

    With C = A B^T the cosines of the atoms: MMCS(A -> B) = mean_i max_j C_ij; Hungarian = mean of C over the
    one-to-one matching with the largest sum; Shared = share of its pairs with C >= ``threshold``. Under the null
    B is turned by random orthogonal matrices Q: B Q for ``rotation``, which keeps the angles between its atoms, and
    B S^-1/2 Q S^1/2 for ``second_moment``, with S the second moment of the atoms of all models, which keeps the
    directions in which atoms are many. Embeddings fill few directions, so ``rotation`` is easily exceeded; beyond
    ``second_moment`` it takes more than the same principal axes. The same Q serve all models, so that ``best`` over
    several models which resemble each other has the right spread. For ``rotation`` every unit direction has the same
    distribution of its largest cosine and ``z`` takes one mean over all latents; otherwise each latent has its own.

    Parameters
    ----------
    models
        At least two fitted SAEs, or their decoders (m, d) as arrays; numbers of latents may differ. Atoms are brought
        to unit length. Latents of an SAE with ``density_`` 0 are dead and left out.
    X
        Embeddings (rows, d) that all models encode, for the correlations of codes; best held out. Needs SAEs.
    threshold
        Cosine from which two atoms count as the same.
    n_null
        Number of matrices Q, at least 2.
    null
        ``rotation`` or ``second_moment``.
    signed
        Codes may be negative (AbsTopK, PCA, ITDA): an atom and its opposite are the same, so absolute cosines and
        correlations count.
    random_state
        Seed of the rotations.

    Returns
    -------
    Stability

    Raises
    ------
    InputError
        For fewer than two models, other shapes, atoms of length 0, no live latent, or X with plain decoders.
    IdentityError
        If the SAEs were fitted to embeddings of different encoders, layers or preprocessing.
    NotFittedError
        If an SAE is not fitted.

    Notes
    -----
    Memory: up to 4096 x 4096 pairs all cosines are held for the optimal matching, in float32 and twice in float64 (0.34
    GB); beyond that 32 MiB at a time and 50 candidates an atom, and the matching is greedy until 4096 x 4096 pairs are
    left (``exact`` is False). Time of two dictionaries of 4096 atoms: about 2 s on one core for each turn.

    References
    ----------
    MMCS: Sharkey, Braun and Millidge 2022. One-to-one matching over seeds: Paulo and Belrose 2025, arXiv 2501.16615.
    """
    if len(models) < 2:
        raise InputError(f"stability compares models, got {len(models)}; fit at least two with different random_state")
    if n_null < 2:
        raise InputError(f"n_null={n_null!r} must be at least 2: the chance level needs a mean and a spread")
    if null not in NULLS:
        raise InputError(f"null={null!r} is not known; {nearest(null, NULLS)}")
    _check_identity(models)
    atoms, live = zip(*(_dictionary(model, i) for i, model in enumerate(models)))
    if len({a.shape[1] for a in atoms}) > 1:
        raise InputError(f"atoms have different numbers of features {[a.shape[1] for a in atoms]}; use one encoder")
    codes = None if X is None else [_codes(model, X, at) for model, at in zip(models, live)]
    rng = np.random.default_rng(random_state)
    indices = list(combinations(range(len(models)), 2))
    observed = [_scores(atoms[i], atoms[j], threshold, signed) for i, j in indices]
    chance: list[list[np.ndarray]] = [[] for _ in indices]
    random_best = []
    there, back = _coordinates(atoms, null)
    for _ in range(n_null):
        turn = there @ _rotation(there.shape[1], rng) @ back
        turned = [_unit(a @ turn) for a in atoms]
        bests = []
        for (i, j), seen in zip(indices, chance):
            scores, best, _ = _scores(atoms[i], turned[j], threshold, signed)
            seen.append(scores)
            if i == 0:
                bests.append(best)
        random_best.append(np.mean(bests, axis=0))
    matches = [None if codes is None else _correlate(codes[i], codes[j], signed) for i, j in indices]
    pairs = tuple(
        PairStability(
            i, j, len(atoms[i]), len(atoms[j]), *map(float, scores), exact=exact,
            null_mean=dict(zip(SCORES, np.mean(seen, 0).tolist())),
            null_q95=dict(zip(SCORES, np.quantile(seen, 0.95, axis=0).tolist())),
            **({} if match is None else _activation(*match)),
        )
        for (i, j), (scores, _, exact), seen, match in zip(indices, observed, chance, matches)
    )  # fmt: skip
    size = len(live[0])
    best = np.mean([b for (i, _), (_, b, _) in zip(indices, observed) if i == 0], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a single feature: every cosine is 1 or -1
        level = np.mean(random_best, axis=None if null == "rotation" else 0)
        z = (best - level) / np.sqrt(np.square(random_best - level).mean() * n_null / (n_null - 1))
    active = None
    if codes is not None:
        active = np.mean([forth for (i, _), (forth, _) in zip(indices, matches) if i == 0], axis=0)
    return Stability(
        pairs,
        tuple(int((~at).sum()) for at in live),
        _spread_out(best, live[0], size),
        _spread_out(z, live[0], size),
        None if active is None else _spread_out(active, live[0], size),
        float(threshold),
        int(n_null),
        null,
    )


def compare(A: np.ndarray, B: np.ndarray, signed: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Nearest atoms and a one-to-one matching of unit rows A (a, d) and B (b, d); ``signed``: by absolute cosine.

    Up to :data:`EXACT_CELLS` pairs the sum of the matching is the largest possible (Jonker and Volgenant's algorithm).
    Above that, pairs are taken from the largest cosine down among each atom's nearest :data:`CANDIDATES`, and the
    atoms left over are matched in the same way until few enough remain.

    Returns
    -------
    forth, back, paired, exact
        Largest cosine of each row of A (a,) and of B (b,); cosines of the matched pairs (min(a, b),); whether the
        matching is optimal.
    """
    if len(A) * len(B) <= EXACT_CELLS:
        cosines = _cosines(A, B, signed)
        return cosines.max(1), cosines.max(0), cosines[linear_sum_assignment(cosines, maximize=True)], True
    near = min(CANDIDATES, len(B))
    columns, cosines = np.empty((len(A), near), np.int64), np.empty((len(A), near), np.float32)
    back = np.full(len(B), -1, np.float32)
    step = max(1, BLOCK_CELLS // len(B))
    for start in range(0, len(A), step):
        block = _cosines(A[start : start + step], B, signed)
        np.maximum(back, block.max(0), out=back)
        part = np.argpartition(block, -near, axis=1)[:, -near:]
        columns[start : start + step] = part
        cosines[start : start + step] = np.take_along_axis(block, part, 1)
    rows, taken = _greedy(columns, cosines, len(B))
    paired = cosines.ravel()[taken]
    if len(rows) < min(len(A), len(B)):
        rest = compare(np.delete(A, rows, axis=0), np.delete(B, columns.ravel()[taken], axis=0), signed)
        paired = np.concatenate([paired, rest[2]])
    return cosines.max(1), back, paired, False


def _cosines(A: np.ndarray, B: np.ndarray, signed: bool) -> np.ndarray:
    cosines = A @ B.T
    return np.abs(cosines, out=cosines) if signed else cosines


def _greedy(columns: np.ndarray, cosines: np.ndarray, n_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows matched and the flat positions of their candidates, the largest cosine first; ties: the lower position."""
    near = columns.shape[1]
    order = np.argsort(-cosines, axis=None, kind="stable")
    row_free, column_free, taken = [True] * len(columns), [True] * n_columns, []
    for position, i, j in zip(order.tolist(), (order // near).tolist(), columns.ravel()[order].tolist()):
        if row_free[i] and column_free[j]:
            row_free[i] = column_free[j] = False
            taken.append(position)
    picked = np.asarray(taken)
    return picked // near, picked


def _scores(
    A: np.ndarray, B: np.ndarray, threshold: float, signed: bool = False
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The four scores in the order of SCORES, the largest cosine of each row of A, whether the matching is optimal."""
    forth, back, paired, exact = compare(A, B, signed)
    scores = [values.mean(dtype=np.float64) for values in (forth, back, paired, paired >= threshold)]
    return np.asarray(scores), forth.astype(np.float64), exact


def _rotation(d: int, rng: np.random.Generator) -> np.ndarray:
    """Random orthogonal matrix (d, d), uniform over the group, float32 (QR with positive diagonal of R)."""
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).astype(np.float32)


def _coordinates(atoms: Sequence[np.ndarray], null: str) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (d, r) and (r, d), float32, between which Q stands: S^-1/2 and S^1/2 within the span of the atoms."""
    d = atoms[0].shape[1]
    if null == "rotation":
        return np.eye(d, dtype=np.float32), np.eye(d, dtype=np.float32)
    eigenvalues, axes = np.linalg.eigh(sum(a.T.astype(np.float64) @ a for a in atoms))
    keep = eigenvalues > 1e-10 * eigenvalues.max()
    root, axes = np.sqrt(eigenvalues[keep]), axes[:, keep]
    return (axes / root).astype(np.float32), (axes * root).T.astype(np.float32)


def _unit(a: np.ndarray) -> np.ndarray:
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def _dictionary(model: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Live atoms at unit length, float32 (a, d), and which latents they are, bool (m,)."""
    if hasattr(model, "fit") and not hasattr(model, "decoder_"):
        raise NotFittedError(f"model {number} is not fitted yet: call fit(X) first, or SAE.load(folder)")
    decoder = np.asarray(getattr(model, "decoder_", model), np.float64)
    if decoder.ndim != 2 or not decoder.size or not np.isfinite(decoder).all():
        raise InputError(f"decoder {number} must be a finite table (latents, features), found shape {decoder.shape}")
    density = getattr(model, "density_", None)
    # NaN where the rows of training are unknown, as for models of other libraries: taken for alive
    live = np.ones(len(decoder), bool) if density is None else ~(np.asarray(density) <= 0)
    if not live.any():
        raise InputError(f"model {number} has no live latent: none was active in a training row; fit it again")
    norms = np.linalg.norm(decoder, axis=1)
    zero = np.flatnonzero(live & (norms == 0))
    if len(zero):
        raise InputError(f"decoder {number}: atoms {zero[:5].tolist()} have length 0, no direction; leave them out")
    return (decoder[live] / norms[live, None]).astype(np.float32), live


def _check_identity(models: Sequence[Any]) -> None:
    known = {mark for mark in (getattr(model, "fingerprint_", None) for model in models) if mark}
    if len(known) > 1:
        raise IdentityError(
            "the SAEs were fitted to embeddings of different encoders, layers or preprocessing, whose directions "
            "cannot be compared; fit all of them to the same embeddings"
        )


def _codes(model: Any, X: Any, live: np.ndarray) -> scipy.sparse.csc_matrix:
    if not hasattr(model, "codes"):
        raise InputError("codes of X need fitted SAEs, and a plain decoder was given; leave X out or pass the SAEs")
    return scipy.sparse.csc_matrix(model.codes(X), dtype=np.float64)[:, np.flatnonzero(live)]


def _correlate(
    P: scipy.sparse.csc_matrix, Q: scipy.sparse.csc_matrix, signed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Largest Pearson correlation of each column of P (n, a) with a column of Q (n, b), and the reverse; NaN: constant.

    cov_ij = sum_r p_ri q_rj / n - mean_i mean_j: sums run over the rows in which both are active, blocks of columns
    of P at a time.
    """
    n = P.shape[0]
    (p_mean, p_sd), (q_mean, q_sd) = _moments(P), _moments(Q)
    p_use, q_use = np.flatnonzero(p_sd > 0), np.flatnonzero(q_sd > 0)
    forth, back = np.full(P.shape[1], np.nan), np.full(Q.shape[1], np.nan)
    if not (len(p_use) and len(q_use)):
        return forth, back
    Q, q_mean, q_sd = Q[:, q_use], q_mean[q_use], q_sd[q_use]
    largest = np.full(len(q_use), -1.0)
    step = max(1, BLOCK_CELLS // len(q_use))
    for start in range(0, len(p_use), step):
        part = p_use[start : start + step]
        r = (P[:, part].T @ Q).toarray() / n - np.outer(p_mean[part], q_mean)
        r /= np.outer(p_sd[part], q_sd)
        if signed:
            np.abs(r, out=r)
        forth[part] = r.max(1)
        np.maximum(largest, r.max(0), out=largest)
    back[q_use] = largest
    return forth, back


def _moments(Z: scipy.sparse.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Column means and standard deviations; below rounding of the values the latter is 0."""
    mean = np.asarray(Z.mean(0)).ravel()
    square = np.asarray(Z.multiply(Z).mean(0)).ravel()
    variance = square - mean**2
    return mean, np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))


def _activation(forth: np.ndarray, back: np.ndarray) -> dict[str, Any]:
    return {
        "activation": _mean(forth),
        "activation_back": _mean(back),
        "n_constant_first": int(np.isnan(forth).sum()),
        "n_constant_second": int(np.isnan(back).sum()),
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _spread_out(values: np.ndarray, live: np.ndarray, size: int) -> np.ndarray:
    """Values of live latents at their places among all, NaN elsewhere."""
    out = np.full(size, np.nan)
    out[live] = values
    return out
