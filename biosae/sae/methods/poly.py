"""PolySAE: a linear encoder, and a decoder with products of two and of three latents.

Koromilas, Demou, Oldfield, Panagakis, Nicolaou 2026, arXiv 2602.01322.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse
import torch
from torch import nn

from biosae.errors import InputError
from biosae.sae import objectives
from biosae.sae.methods.base import Loss, Now
from biosae.sae.methods.selection import Selecting, Selection
from biosae.sae.model import ZERO_NORM, first_atoms, first_gain, geometric_median
from biosae.sae.normalise import inverse

COLLAPSED = 1e-6
"""Frobenius norm below which a projection is left as it was."""
CANDIDATES = 10_000
"""Sets of latents, the most often active together, among which the strongest interactions are looked for."""


@dataclass(frozen=True)
class PolyOptions(Selection):
    """Settings of ``polysae``."""

    order: int = 3
    """1: linear, 2: with products of two latents, 3: with products of three."""
    ranks: tuple[int, int, int] | None = None
    """Ranks R1 >= R2 >= R3 of the linear, quadratic and cubic term. None: d, and max(8, d / 12) twice; at most m."""
    shared: bool = True
    """One projection U for all terms; False: one for each factor."""
    lambda2: float = -0.5
    lambda3: float = 0.5
    """First weights of the two terms; they are learnt."""
    scale: float | None = None
    """Factor by which rows are multiplied before powers are taken. None: the root of d, so that a normalised row has
    entries of size 1; 1: rows as they come."""

    def check(self) -> None:
        super().check()
        if self.order not in (1, 2, 3):
            raise InputError(f"order={self.order!r} must be 1, 2 or 3")
        if self.ranks is not None:
            ranks = tuple(self.ranks)
            if len(ranks) != 3 or min(ranks) < 1 or list(ranks) != sorted(ranks, reverse=True):
                raise InputError(f"ranks={self.ranks!r} must be three numbers R1 >= R2 >= R3 >= 1")
        if self.scale is not None and self.scale <= 0:
            raise InputError(f"scale={self.scale!r} must be above 0")


class PolySAE(Selecting):
    """x_hat = b_dec + v C1^T + s lambda2 (v[:R2]^2) C2^T + s^2 lambda3 (v[:R3]^3) C3^T with v = z U, U^T U = I.

    Powers are elementwise; s is ``scale``, which is the same as the equation without it for rows multiplied by s. With
    separate projections v^2 becomes (z U1)(z U2) and v^3 (z U1)(z U2)(z U3), on the leading columns. The atom of latent
    j is row j of U C1^T: the linear term alone.
    """

    Options: ClassVar[type] = PolyOptions
    homogeneous: ClassVar[bool] = False
    unit_atoms = False
    affine: ClassVar[bool] = False

    def make(self) -> None:
        d, m, options = self.n_features, self.n_latents, self.options
        small = max(8, d // 12)
        first, *others = options.ranks or (d, small, small)
        first = min(int(first), m)
        most = min(first, m if options.shared else max(1, m // 3))
        self.ranks = (first, *(min(int(rank), most) for rank in others))
        self.factor = float(options.scale or math.sqrt(d))
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(m, d)), nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(torch.zeros(d))
        for term, rank in enumerate(self.ranks[: options.order], start=1):
            if term == 1 or not options.shared:
                self.register_parameter(f"U{term}", nn.Parameter(torch.zeros(m, rank)))
            self.register_parameter(f"C{term}", nn.Parameter(torch.zeros(d, rank)))
        if options.order > 1:
            self.weights = nn.Parameter(torch.tensor([options.lambda2, options.lambda3][: options.order - 1]))
        self.make_threshold()

    def projection(self, factor: int) -> torch.Tensor:
        """U of a factor 1, 2, 3 of the products, (m, rank)."""
        return self.U1 if self.options.shared else getattr(self, f"U{factor}")

    def decode(self, z: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        v = z @ self.projection(1)
        factors = [v] + [v if self.options.shared else z @ self.projection(f) for f in range(2, self.options.order + 1)]
        x_hat = torch.addmm(self.b_dec, v, self.C1.T)
        for term in range(2, self.options.order + 1):
            product = math.prod(factor[:, : self.ranks[term - 1]] for factor in factors[:term])
            weight = self.weights[term - 2] * self.factor ** (term - 1)
            x_hat = x_hat + weight * (product @ getattr(self, f"C{term}").T)
        return x_hat

    def atoms(self, *, table: int = 0) -> torch.Tensor:
        return self.projection(1) @ self.C1.T

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        a = self.preactivations(x)
        z, penalty = self.choose(a, now)
        x_hat = self.decode(z)
        revival = self.revival(a, x - x_hat, lambda dead: self.projection(1)[dead] @ self.C1.T, now)
        return Loss(objectives.mse_sum(x, x_hat) + penalty + revival, z.detach(), (x_hat - x).detach())

    @torch.no_grad()
    def constrain_(self, generator: torch.Generator) -> None:
        super().constrain_(generator)
        shared = self.ranks[2]
        first = None
        for term in range(1, 1 + (1 if self.options.shared else self.options.order)):
            U = self.projection(term)
            if first is not None:  # leading columns of the three are orthogonal to each other
                U[:, :shared] -= first @ (first.T @ U[:, :shared])
            U.copy_(retracted(U))
            first = U[:, :shared] if first is None else torch.cat([first, U[:, :shared]], 1)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """b_dec the geometric median; ``data``: linear atoms are rows (the rank-R1 part of them) and products start
        from 0; ``random``: U orthogonal and C Kaiming-uniform, as in the released code. W_enc has the atoms'
        directions."""
        bias = geometric_median(rows)
        self.b_dec.copy_(bias)
        d, m = self.n_features, self.n_latents
        for term, rank in enumerate(self.ranks[: self.options.order], start=1):
            if atoms == "random":
                bound = math.sqrt(6 / rank)
                drawn = (2 * torch.rand(d, rank, generator=generator) - 1) * bound
                getattr(self, f"C{term}").copy_(drawn)
            if term == 1 or not self.options.shared:
                self.projection(term).copy_(torch.randn(m, rank, generator=generator))
        if atoms == "data":
            start = first_atoms(rows - bias, m, atoms=atoms, generator=generator)
            left, size, right = torch.linalg.svd(start, full_matrices=False)
            rank = min(self.ranks[0], len(size))
            self.U1[:, :rank] = left[:, :rank]
            self.C1[:, :rank] = right[:rank].T * size[:rank]
        self.constrain_(generator)
        directions = self.atoms()
        self.W_enc.copy_(directions / directions.norm(dim=1, keepdim=True).clamp_min(ZERO_NORM))
        gain = first_gain(lambda x: self.rebuilt(x, generator), rows, bias, scale=scale, generator=generator)
        if gain > ZERO_NORM:
            self.W_enc.div_(gain)

    # --------------------------------------------------------------------------------------------- interactions

    @torch.no_grad()
    def pair_terms(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """What pairs of latents add to the sum of each alone, by powers of their codes.

        Parameters
        ----------
        i, j
            Latents, int64 (p,).

        Returns
        -------
        Tensor (3, p, d)
            Vectors of z_i z_j, of z_i^2 z_j and of z_i z_j^2.
        """
        terms = [self._multilinear((i, j)), self._multilinear((i, i, j)), self._multilinear((i, j, j))]
        return torch.stack(terms)

    @torch.no_grad()
    def triple_terms(self, i: torch.Tensor, j: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Vectors (p, d) of z_i z_j z_k for three distinct latents: what no two of them explain."""
        return self._multilinear((i, j, k))

    def _multilinear(self, latents: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Sum over the distinct orders of the latents of C (U1_a * U2_b [* U3_c])."""
        term = len(latents)
        if term > self.options.order:
            return self.C1.new_zeros(len(latents[0]), self.n_features)
        rank = self.ranks[term - 1]
        first = [next(q for q in range(term) if latents[q] is latents[p]) for p in range(term)]
        places = {tuple(first[p] for p in order) for order in itertools.permutations(range(term))}
        total = 0.0
        for order in sorted(places):
            product = 1.0
            for factor, place in enumerate(order, start=1):
                product = product * self.projection(factor)[latents[place], :rank]
            total = total + product
        return self.weights[term - 2] * self.factor ** (term - 1) * (total @ getattr(self, f"C{term}").T)


@torch.no_grad()
def retracted(U: torch.Tensor) -> torch.Tensor:
    """Q of the reduced QR decomposition of U (m, R), m >= R, with the signs that make diag(R) >= 0.

    U itself where its Frobenius norm is below 1e-6.
    """
    if float(U.norm()) < COLLAPSED:
        return U
    Q, R = torch.linalg.qr(U)
    sign = torch.sign(torch.diagonal(R))
    sign[sign == 0] = 1
    return Q * sign


def interactions(sae: Any, X: Any, *, order: int = 2, top: int = 100, min_rows: int = 10) -> dict[str, np.ndarray]:
    """The strongest products of two or three latents in a fitted PolySAE, on rows where they are active together.

    For two latents the interaction is x_hat(i and j) - x_hat(i) - x_hat(j) + x_hat(neither), all others being absent;
    for three, what remains of x_hat(i, j, k) once single latents and pairs are taken off.

    Parameters
    ----------
    sae
        Fitted ``SAE("polysae")``.
    X
        Embeddings, (n, d).
    order
        2 or 3.
    top
        Sets returned.
    min_rows
        Least number of rows in which all latents of a set are active.

    Returns
    -------
    dict
        ``latents`` int (t, order), rising in a row; ``n_rows`` (t,), rows in which all are active; ``strength`` (t,),
        mean length of the interaction over those rows, in the units of the embedding (with ``normalise="layernorm"`` or
        ``"l2"``, of the scaled row); ``vector`` (t, d), its mean. Strongest first.
        The 10,000 sets most often active together are looked at.

    Raises
    ------
    InputError
        If the SAE is of another architecture or has no product of this order.
    """
    model = getattr(sae, "_model", None)
    if not isinstance(model, PolySAE):
        raise InputError("interactions are those of a fitted SAE('polysae'); other decoders have none")
    if order not in (2, 3) or order > model.options.order:
        raise InputError(f"order={order!r}: this PolySAE has products of up to {model.options.order} latents")
    codes = sae.codes(X)
    sets = _together(codes, order, min_rows)
    if not len(sets):
        none = np.zeros(0)
        return {
            "latents": np.zeros((0, order), int), "n_rows": none.astype(int), "strength": none,
            "vector": np.zeros((0, sae.n_features_in_), np.float32),
        }  # fmt: skip
    device = model.b_dec.device
    columns = [torch.from_numpy(sets[:, place].copy()).to(device) for place in range(order)]
    terms = model.pair_terms(*columns) if order == 2 else model.triple_terms(*columns)[None]
    terms, scaling = terms.cpu().numpy().astype(np.float64), sae.normaliser_
    terms = (terms if scaling.whiten is None else terms @ inverse(scaling.whiten)) / scaling.scale
    by_latent = codes.tocsc()
    n_rows, strength, vector = [], [], []
    for place, chosen in enumerate(sets):
        together = by_latent[:, chosen[0]]
        for other in chosen[1:]:
            together = together.multiply(by_latent[:, other] != 0)
        active = scipy.sparse.csc_matrix(together).indices
        z = by_latent[:, chosen][active].toarray().astype(np.float64)
        powers = z.prod(1, keepdims=True) * (np.c_[np.ones(len(z)), z] if order == 2 else 1.0)
        gram = terms[:, place] @ terms[:, place].T
        n_rows.append(len(active))
        strength.append(np.sqrt(np.einsum("np,pq,nq->n", powers, gram, powers).clip(0)).mean())
        vector.append(powers.mean(0) @ terms[:, place])
    best = np.argsort(-np.asarray(strength), kind="stable")[:top]
    return {
        "latents": sets[best], "n_rows": np.asarray(n_rows)[best], "strength": np.asarray(strength)[best],
        "vector": np.asarray(vector, np.float32)[best],
    }  # fmt: skip


def _together(codes: scipy.sparse.csr_matrix, order: int, min_rows: int) -> np.ndarray:
    """Sets of latents (t, order) active together in at least ``min_rows`` rows, most often first."""
    active = scipy.sparse.csr_matrix((np.ones(codes.nnz, np.float32), codes.indices, codes.indptr), shape=codes.shape)
    both = scipy.sparse.triu(active.T @ active, k=1).tocoo()
    keep = np.flatnonzero(both.data >= min_rows)
    keep = keep[np.argsort(-both.data[keep], kind="stable")][:CANDIDATES]
    pairs = np.c_[both.row[keep], both.col[keep]].astype(np.int64)
    if order == 2 or not len(pairs):
        return pairs.reshape(-1, order) if order == 2 else np.zeros((0, 3), np.int64)
    columns, found, counts = active.tocsc(), [], []
    for start in range(0, len(pairs), 1000):
        part = pairs[start : start + 1000]
        rows = columns[:, part[:, 0]].multiply(columns[:, part[:, 1]])
        third = scipy.sparse.coo_matrix(rows.T @ active)
        keep = (third.data >= min_rows) & (third.col > part[third.row, 1])  # each set once, by its first two
        found.append(np.c_[part[third.row[keep]], third.col[keep]])
        counts.append(third.data[keep])
    order_of = np.argsort(-np.concatenate(counts), kind="stable")[:CANDIDATES]
    return np.concatenate(found).astype(np.int64)[order_of]


def latent_effect(coder: Any, Z: Any, latent: int) -> np.ndarray:
    """What a latent does in each row: x_hat(z) - x_hat(z without it), float32 (n, d).

    With a polynomial decoder this depends on the latents beside it; with a linear one it is z_j times the atom.

    Parameters
    ----------
    coder
        Any fitted coder.
    Z
        Codes, (n, m), sparse or dense.
    latent
        Index of the latent.
    """
    codes = scipy.sparse.csr_matrix(Z, dtype=np.float32)
    if not 0 <= latent < codes.shape[1]:
        raise InputError(f"latent={latent} does not exist: the codes have {codes.shape[1]} columns")
    rest = codes.tocsc(copy=True)
    rest.data[rest.indptr[latent] : rest.indptr[latent + 1]] = 0
    rest = rest.tocsr()
    rest.eliminate_zeros()
    return coder.inverse_transform(codes) - coder.inverse_transform(rest)
