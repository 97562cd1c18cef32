"""Semi-NMF: signed sparse directions, non-negative strengths, no encoder (Ding, Li and Jordan 2010)."""

from __future__ import annotations

import math
import warnings
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError
from biosae.sae.direct import SCALINGS, Direct, nonnegative_codes, training_rows, unit
from biosae.sae.rows import Held, Rows

EPS = 1e-6
"""Added to the inverted matrix and to the divisor of the released code."""
KMEANS_STEPS = 15
STARTS = ("random", "kmeans", "svd")


@dataclass
class Factors:
    """X (n, d) ~ codes (n, m) @ atoms (m, d).

    Attributes
    ----------
    atoms
        Signed, (m, d).
    codes
        >= 0, (n, m).
    loss
        ||X - codes atoms||_F^2 of these two.
    losses
        The same after every iteration, in order.
    """

    atoms: np.ndarray
    codes: np.ndarray
    loss: float = math.inf
    losses: list[float] = field(default_factory=list)


def start(rows: np.ndarray, m: int, *, init: str = "random", random_state: int = 0) -> Factors:
    """First factors of rows (n, d).

    ``random``: codes uniform in [0, 1), at least 1e-6, atoms normal. ``kmeans``: centroids of 15 rounds from m random
    rows, an empty cluster starts again from a random row; codes are 1 for the row's cluster, else 1e-6. ``svd``: atoms
    sqrt(s) v^T and codes max(u sqrt(s), 1e-6) of the m largest singular values; where m exceeds their number the other
    atoms start as with ``random``.
    """
    rng = np.random.default_rng(random_state)
    n, d = rows.shape
    codes = np.maximum(rng.random((n, m)), EPS).astype(rows.dtype)
    atoms = rng.standard_normal((m, d)).astype(rows.dtype)
    if init == "svd":
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
        r = min(m, len(s))
        root = np.sqrt(s[:r])
        codes[:, :r], atoms[:r] = np.maximum(u[:, :r] * root, EPS), root[:, None] * vt[:r]
    elif init == "kmeans":
        atoms = rows[rng.choice(n, m, replace=n < m)].copy()
        for _ in range(KMEANS_STEPS):
            label = np.argmin(np.square(atoms).sum(1) - 2 * rows @ atoms.T, axis=1)
            member = scipy.sparse.csr_matrix((np.ones(n, rows.dtype), label, np.arange(n + 1)), shape=(n, m))
            counts = np.bincount(label, minlength=m)
            atoms = np.asarray(member.T @ rows) / np.maximum(counts, 1)[:, None].astype(rows.dtype)
            atoms[counts == 0] = rows[rng.integers(0, n, int((counts == 0).sum()))]
        codes = np.full((n, m), EPS, rows.dtype)
        codes[np.arange(n), label] = 1
    return Factors(atoms, codes)


def keep_largest(atoms: np.ndarray, share: float) -> np.ndarray:
    """Atoms (m, d) with the entries at least as large as the ceil(share d)-th largest magnitude of their row, else 0.

    Ties may keep more.
    """
    count = max(1, math.ceil(share * atoms.shape[1]))
    size = np.abs(atoms)
    least = np.partition(size, atoms.shape[1] - count, axis=1)[:, atoms.shape[1] - count]
    return np.where(size >= least[:, None], atoms, 0)


def best_atoms(rows: np.ndarray, codes: np.ndarray, *, eps: float = EPS) -> np.ndarray:
    """Atoms of least squares for fixed codes, (codes^T codes + eps I)^-1 codes^T X, (m, d)."""
    gram = (codes.T @ codes).astype(np.float64) + eps * np.eye(codes.shape[1])
    return np.linalg.solve(gram, (codes.T @ rows).astype(np.float64)).astype(rows.dtype)


def scale_codes(atoms: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with the columns of the codes at unit length (lengths of at least 1e-8)."""
    norms = np.maximum(np.linalg.norm(codes, axis=0), 1e-8)
    return atoms * norms[:, None], codes / norms


def update_codes(codes: np.ndarray, P: np.ndarray, Q: np.ndarray, *, eps: float = EPS) -> np.ndarray:
    """One multiplicative step of non-negative codes for fixed atoms F.

    ``G sqrt((P+ + G Q-) / (P- + G Q+ + eps))`` with P = X F^T (n, m), Q = F F^T (m, m), M+ and M- their positive and
    negative parts; without ``eps`` the squared error does not rise (Ding, Li and Jordan 2010, eq. 10). An entry of 0
    stays 0; with ``eps`` = 0 the ratio 0 / 0 counts as 0.
    """
    above = np.maximum(P, 0) + codes @ np.maximum(-Q, 0)
    below = np.maximum(-P, 0) + codes @ np.maximum(Q, 0) + eps
    return codes * np.sqrt(np.divide(above, below, out=np.zeros_like(above), where=below > 0))


def factorise(
    rows: np.ndarray,
    first: Factors,
    *,
    keep: float | None = None,
    n_steps: int = 500,
    patience: int = 100,
    tol: float = 1e-4,
    eps: float = EPS,
    random_state: int = 0,
) -> Factors:
    """Alternate least squares for the atoms and the multiplicative step for the codes; the best pair is kept.

    Parameters
    ----------
    rows
        X (n, d), float32 or float64.
    first
        Factors to start from (:func:`start`); only its codes matter.
    keep
        Share of the entries of an atom that winner-take-all keeps. None: all, and then the loss never rises but for
        ``eps``.
    n_steps, patience, tol
        Iterations at most; iterations without a loss lower than the best by more than ``tol`` (in the units of the
        squared rows) after which to stop.
    eps
        Of :func:`best_atoms` and :func:`update_codes`.
    random_state
        Of codes drawn anew for a latent that no row uses.
    """
    rng = np.random.default_rng(random_state)
    codes, total = first.codes, float(np.square(rows, dtype=np.float64).sum())
    best, stale, losses = Factors(first.atoms, codes), 0, []
    for _ in range(n_steps):
        unused = np.linalg.norm(codes, axis=0) < 1e-8
        if unused.any():  # a multiplicative step never brings them back
            codes = codes.copy()
            codes[:, unused] = rng.random((len(codes), int(unused.sum())))
        atoms = best_atoms(rows, codes, eps=eps)
        if keep is not None:
            atoms = keep_largest(atoms, keep)
        atoms, codes = scale_codes(atoms, codes)
        P, Q = rows @ atoms.T, atoms @ atoms.T
        codes = update_codes(codes, P, Q, eps=eps)
        cross = np.einsum("ij,ij->", P, codes, dtype=np.float64)
        square = np.einsum("ij,ij->", codes.T @ codes, Q, dtype=np.float64)
        losses.append(max(0.0, total - 2 * float(cross) + float(square)))
        if losses[-1] < best.loss - tol:
            best, stale = Factors(atoms, codes, losses[-1]), 0
        else:
            stale += 1
        if stale >= patience:
            break
    best.losses = losses
    return best


@dataclass(eq=False)
class SemiNMF(Direct):
    """Semi-NMF: rows are non-negative sums of signed, sparse directions.

    X - b ~ Z D with Z >= 0 and no sign on D. The dictionary comes from :func:`factorise`; it is scaled to unit atoms,
    so that codes are in the units of the embedding. Codes of rows, training rows too, are those of non-negative least
    squares for the fixed dictionary: exact, sparse, and each row by itself.

    Attributes
    ----------
    losses_ : list of float
        ||X - Z D||^2 after each iteration, over that of Z = 0 (rows of ``max_rows``).

    References
    ----------
    Ding, Li and Jordan 2010, IEEE TPAMI 32:45; for activations: Shafran, Geiger and Geva 2025, arXiv 2506.10920.
    """

    n_latents: int | None = None
    """Number of directions m. None: 100, and at most the number of training rows."""
    k: int | None = None
    """Latents of a row at most, chosen by non-negative orthogonal matching pursuit. None: as many as the least error
    takes."""
    _: KW_ONLY
    keep: float | None = None
    """Share of the entries of each atom that are kept, the largest by magnitude (0.01 in Shafran et al., for the
    neurons of an MLP). None: all; the coordinates of most embeddings have no meaning one by one."""
    init: str = "random"
    """``random``, ``kmeans`` or ``svd``: see :func:`start`."""
    n_steps: int = 500
    """Iterations at most."""
    patience: int = 100
    """Iterations without improvement after which to stop."""
    tol: float = 1e-6
    """Improvement that counts, as a share of the squared rows."""
    normalise: str = "centre"
    """``centre``: the mean row is the bias; ``none``: the bias is 0, and a direction has to carry the mean."""
    max_rows: int = 65_536
    """Rows that are factorised, at random; all are held in memory."""
    validation: float = 0.1
    """Share of the rows held out (whole groups where groups are known); 0 holds out nothing."""
    random_state: int | None = None
    """Seed. None: drawn from the system and kept in ``random_state_``."""

    _state = ("losses",)

    def validate(self) -> None:
        """Check every setting; ``InputError`` names the first that is wrong."""
        self._check(
            choices={"init": STARTS, "normalise": SCALINGS},
            whole=(("n_latents", 1), ("k", 1), ("n_steps", 1), ("patience", 1), ("max_rows", 1), ("random_state", 0)),
            positive=("tol", "keep"),
        )
        if self.keep is not None and self.keep > 1:
            raise InputError(f"keep={self.keep!r} is a share and must lie in (0, 1]")

    def _learn(self, rows: Rows, held: Held) -> None:
        seed = self.random_state_
        self.bias_ = self._centre(rows, held)
        x = training_rows(rows, held, self.max_rows, seed) - self.bias_
        m = self.n_latents or min(100, len(x))
        if len(x) < m:
            warnings.warn(
                f"{len(x)} rows for {m} directions: each row can be a direction of its own; lower n_latents",
                UserWarning,
                stacklevel=4,
            )
        total = float(np.square(x, dtype=np.float64).sum())
        if total == 0:  # constant rows: the bias is all there is
            self.decoder_, self.losses_ = np.zeros((m, rows.d), np.float32), [0.0]
            return
        scale = np.float32(math.sqrt(len(x) / total))  # eps and tol mean the same whatever the units
        first = start(x * scale, m, init=self.init, random_state=seed)
        found = factorise(
            x * scale, first, keep=self.keep, n_steps=self.n_steps, patience=self.patience, tol=self.tol * len(x),
            random_state=seed,
        )  # fmt: skip
        self.decoder_ = unit(found.atoms)[0]
        self.losses_ = [loss / len(x) for loss in found.losses]

    def _codes(self, x: np.ndarray) -> scipy.sparse.csr_matrix:
        return nonnegative_codes(x - self.bias_, self.decoder_, k=self.k)


# ------------------------------------------------------------------------------------------------------ hierarchy


@dataclass
class Level:
    """Directions that a few broader ones explain: ``lower ~ weights @ directions``.

    Attributes
    ----------
    weights
        >= 0, (m of the level below, m): how much of each broader direction a narrower one is.
    directions
        Signed, (m, d), in the space of the embedding about the bias.
    """

    weights: np.ndarray
    directions: np.ndarray


def hierarchy(
    model: SemiNMF, ranks: tuple[int, ...], *, X: Any = None, n_steps: int = 500, learning_rate: float = 1e-3,
    random_state: int = 0,
) -> list[Level]:  # fmt: skip
    """Factorise the directions of a fitted model again and again, into fewer and broader ones.

    Level l: ``D_(l-1) ~ W_l D_l`` with W_l >= 0, by semi-NMF of the directions below, without a sparsity step.

    Parameters
    ----------
    model
        Fitted :class:`SemiNMF`.
    ranks
        Numbers of directions, falling, e.g. ``(20, 5)``.
    X
        Training rows (n, d). Given, all weights, the rows' codes and the last directions are then fitted together,
        X - b ~ Z W_1 ... W_L D_L, by Adam on the mean squared error, with weights and codes kept >= 0 after each step
        (the released code lets them go negative).
    n_steps, learning_rate
        Of that fit.
    random_state
        Seed of the factorisations.

    Returns
    -------
    list of Level
        One for each rank; ``directions`` of level l is W_(l+1) ... W_L D_L after a joint fit.

    Raises
    ------
    InputError
        If the ranks do not fall from the number of the model's directions.
    """
    sizes = (model.n_latents_, *ranks)
    if not ranks or any(b >= a or b < 1 for a, b in pairwise(sizes)):
        raise InputError(f"ranks={tuple(ranks)!r} must fall, from fewer than the {sizes[0]} directions of the model")
    lower, levels = model.decoder_.astype(np.float64), []
    for rank in ranks:
        found = factorise(lower, start(lower, rank, random_state=random_state), random_state=random_state, tol=0)
        levels.append(Level(found.codes, found.atoms))
        lower = found.atoms
    if X is not None:
        _fit_together(model, levels, X, n_steps, learning_rate)
    return levels


def _fit_together(model: SemiNMF, levels: list[Level], X: Any, n_steps: int, learning_rate: float) -> None:
    rows = np.concatenate([x - model.bias_ for _, x in model._rows(X).blocks()])
    target = torch.from_numpy(rows)
    parts = [torch.from_numpy(model.codes(X).toarray()), *(torch.from_numpy(lv.weights).float() for lv in levels)]
    parts = [part.clone().requires_grad_() for part in parts]
    last = torch.from_numpy(levels[-1].directions).float().requires_grad_()
    optimiser = torch.optim.Adam([*parts, last], lr=learning_rate)
    for _ in range(n_steps):
        optimiser.zero_grad()
        product = parts[0]
        for weights in parts[1:]:
            product = product @ weights
        torch.nn.functional.mse_loss(product @ last, target).backward()
        optimiser.step()
        with torch.no_grad():
            for part in parts:
                part.clamp_(min=0)
    directions = last.detach().double().numpy()
    for level, weights in zip(reversed(levels), reversed(parts[1:])):
        level.weights, level.directions = weights.detach().double().numpy(), directions
        directions = level.weights @ directions
