"""Archetypal and relaxed archetypal SAE: atoms that are, or nearly are, mixtures of typical rows.

Fel et al. 2025, arXiv 2502.12892.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse
import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae import objectives
from biosae.sae.methods.base import Loss, Now
from biosae.sae.methods.selection import Selecting, Selection
from biosae.sae.model import ZERO_NORM, first_gain, geometric_median

KMEANS_ROUNDS = 20
KMEANS_ROWS = 8192
"""Rows of a k-means with fewer points than a quarter of them; with more, four rows a point are used."""
NEARBY = 1e-8


@dataclass(frozen=True)
class RelaxedOptions(Selection):
    """Settings of ``relaxed_archetypal``."""

    delta: float = 1.0
    """Largest distance of an atom from its mixture of points, in normalised units (rows have a mean square of 1)."""
    points: int | None = None
    """Number of typical rows (k-means centroids of the training rows). None: as many as latents, at most the rows."""
    multiplier: bool = True
    """Learn one factor for all atoms."""

    def check(self) -> None:
        super().check()
        if self.delta < 0 or (self.points is not None and self.points < 1):
            raise InputError(f"delta={self.delta!r} must be >= 0, points={self.points!r} at least 1")


@dataclass(frozen=True)
class ArchetypalOptions(RelaxedOptions):
    """Settings of ``archetypal``."""

    delta: float = 0.0


def stochastic(W: torch.Tensor) -> torch.Tensor:
    """max(W, 0) with each row divided by (its sum + 1e-8); rows without a positive entry become 0."""
    W = torch.relu(W)
    return W / (W.sum(1, keepdim=True) + NEARBY)


def shortened(relax: torch.Tensor, delta: float) -> torch.Tensor:
    """Rows no longer than delta: row * min(1, delta / ||row||); all 0 for delta = 0."""
    if delta == 0:
        return torch.zeros_like(relax)
    return relax * (delta / relax.norm(dim=1, keepdim=True).clamp_min(ZERO_NORM)).clamp_max(1)


class Archetypal(Selecting):
    """x_hat = z D + b_dec with D = (W C + Lambda) e^s: rows of W >= 0 with sum 1, ||Lambda_j|| <= delta.

    C (p, d) are k-means centroids of the training rows, taken about b_dec at the start. Atoms are not of unit norm.
    """

    Options: ClassVar[type] = RelaxedOptions
    unit_atoms = False

    def make(self) -> None:
        d, m = self.n_features, self.n_latents
        p = self.options.points or m
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(m, d)), nn.Parameter(torch.zeros(m))
        self.mixture = nn.Parameter(torch.zeros(m, p))
        if self.options.delta:
            self.relax = nn.Parameter(torch.zeros(m, d))
        if self.options.multiplier:
            self.log_factor = nn.Parameter(torch.zeros(1))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.register_buffer("points", torch.zeros(p, d))
        self.register_buffer("centre", torch.zeros(d))
        self.make_threshold()

    def atoms(self, *, table: int = 0) -> torch.Tensor:
        D = self.mixture @ self.points
        if self.options.delta:
            D = D + self.relax
        return D * self.log_factor.exp() if self.options.multiplier else D

    def decode(self, z: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        return torch.addmm(self.b_dec, z, self.atoms())

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        a, D = self.preactivations(x), self.atoms()
        z, penalty = self.choose(a, now)
        x_hat = torch.addmm(self.b_dec, z, D)
        revival = self.revival(a, x - x_hat, lambda dead: D[dead], now)
        return Loss(objectives.mse_sum(x, x_hat) + penalty + revival, z.detach(), (x_hat - x).detach())

    @torch.no_grad()
    def constrain_(self, generator: torch.Generator) -> None:
        super().constrain_(generator)
        empty = (self.mixture <= 0).all(1)
        if bool(empty.any()):  # an atom at the bias would be of no use: it starts anew at one point
            drawn = torch.randint(len(self.points), (int(empty.sum()),), generator=generator)
            self.mixture[empty] = F.one_hot(drawn, len(self.points)).to(self.mixture)
        self.mixture.copy_(stochastic(self.mixture))
        if self.options.delta:
            self.relax.copy_(shortened(self.relax, self.options.delta))

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """b_dec the geometric median; points by k-means; ``data``: latent j starts at point j, and what is beyond the
        number of points at random mixtures of two; ``random``: all at random mixtures. W_enc has the atoms' directions.

        Points do not depend on the seed or the order of the rows, so that models fitted to the same rows share them.
        """
        bias = geometric_median(rows)
        self.b_dec.copy_(bias)
        m, p = self.mixture.shape
        self.centre.copy_(bias)
        self.points.copy_(centroids(rows, p) - bias)
        first = min(m, p) if atoms == "data" else 0
        self.mixture[:first] = torch.eye(m, p)[:first]
        one = torch.randint(p, (m - first,), generator=generator)
        other = (one + torch.randint(1, max(p, 2), (m - first,), generator=generator)) % p
        share = torch.rand(m - first, 1, generator=generator)
        self.mixture[first:] = F.one_hot(one, p) * share + F.one_hot(other, p) * (1 - share)
        self.constrain_(generator)
        start = self.atoms()
        self.W_enc.copy_(start / start.norm(dim=1, keepdim=True).clamp_min(ZERO_NORM))
        gain = first_gain(lambda x: self.rebuilt(x, generator), rows, bias, scale=scale, generator=generator)
        if gain > ZERO_NORM:
            self.W_enc.div_(gain)


class StrictArchetypal(Archetypal):
    """The same with delta = 0: atoms are mixtures of points, times one factor."""

    Options: ClassVar[type] = ArchetypalOptions


def archetypes(sae: Any) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Of what each atom of a fitted archetypal SAE is mixed.

    Parameters
    ----------
    sae
        Fitted ``SAE("archetypal")`` or ``SAE("relaxed_archetypal")``.

    Returns
    -------
    weights : csr_matrix (m, p)
        Share of each point in the mixture of each latent; rows sum to 1.
    points : ndarray (p, d), float32
        The k-means centroids, in the space of the embedding.

    Raises
    ------
    InputError
        If the SAE is of another architecture.
    """
    model = getattr(sae, "_model", None)
    if not isinstance(model, Archetypal):
        raise InputError("archetypes are those of a fitted SAE('archetypal') or SAE('relaxed_archetypal')")
    points = (model.points + model.centre).cpu().numpy()
    return scipy.sparse.csr_matrix(model.mixture.detach().cpu().numpy()), sae._raw(points, 0)


@torch.no_grad()
def centroids(rows: torch.Tensor, n_points: int) -> torch.Tensor:
    """k-means centroids (p, d) of rows (n, d), by Lloyd's iteration; the order of the rows does not matter.

    The start is every (n / p)-th row along the leading principal direction. A cluster that loses its rows takes the
    row that lies farthest from its centroid. With p >= n the rows themselves are returned, repeated to p.
    """
    direction = _leading(rows)
    ordered = rows[(rows @ direction).argsort(stable=True)]
    ordered = ordered[:: max(1, len(ordered) // max(KMEANS_ROWS, 4 * n_points))]
    if n_points >= len(rows):
        return ordered[torch.arange(n_points) % len(rows)]
    found = ordered[((torch.arange(n_points) + 0.5) * len(ordered) / n_points).long()].clone()
    nearest = None
    for _ in range(KMEANS_ROUNDS):
        square = found.square().sum(1)
        parts = [(square - 2 * part @ found.T).min(1) for part in ordered.split(2048)]
        moved = torch.cat([part.indices for part in parts])
        if nearest is not None and bool((moved == nearest).all()):
            break
        nearest = moved
        distance = torch.cat([part.values for part in parts]) + ordered.square().sum(1)
        counts = torch.bincount(nearest, minlength=n_points)
        found = torch.zeros_like(found).index_add_(0, nearest, ordered) / counts.clamp_min(1)[:, None]
        lost = (counts == 0).nonzero().squeeze(1)
        found[lost] = ordered[distance.argsort(descending=True, stable=True)[: len(lost)]]
    return found


def _leading(rows: torch.Tensor) -> torch.Tensor:
    """Leading principal direction of rows, (d,), with the sign of its largest entry made positive."""
    centred = (rows - rows.mean(0)).double()
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return (vectors * torch.sign(vectors[vectors.abs().argmax()])).float()
