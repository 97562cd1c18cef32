"""MP-SAE: matching pursuit, step by step, as the encoder of a dictionary that is learnt through it.

Costa, Fel, Lubana, Tolooshams, Ba 2025, arXiv 2506.03093.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from biosae.errors import InputError
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import first_atoms, geometric_median

RULES = ("positive", "signed", "abs")
SOLVERS = ("mp", "omp")
SLICE = 256
"""Rows that orthogonal pursuit takes at a time."""
GRAM_LATENTS = 8192
"""Largest dictionary whose inner products (m, m) are kept while rows are coded."""
UNUSED = 10
"""The revival term acts where more atoms than this are unused in a batch."""


@dataclass(frozen=True)
class PursuitOptions(NoOptions):
    """Settings of ``mp``."""

    solver: str = "mp"
    """``mp``: matching pursuit; ``omp``: after each choice all coefficients so far are fitted anew, >= 0."""
    rule: str = "positive"
    """``positive``: the atom of the largest correlation, while it is above 0; ``signed``: the same without an end, so
    that negative coefficients are added; ``abs``: the largest in size. ``omp`` is always ``positive``."""
    steps: int | None = None
    """Steps at inference; may be changed after fitting. None: k."""
    tolerance: float = 0.0
    """A row is finished once its residual is shorter than this, in normalised units; may be changed after fitting."""
    stop_at_repeat: bool = False
    """A row is finished once a step adds no new latent, as in SAELens."""
    refits: int = 10
    """Gradient steps of each fit of ``omp``."""
    dropout: float = 0.0
    """Share of the atoms that a batch may not use, in training."""
    revive: float = 0.01
    """Weight of the mean correlation of what is left with atoms that a batch did not use."""

    def check(self) -> None:
        if self.solver not in SOLVERS or self.rule not in RULES:
            raise InputError(
                f"solver={self.solver!r}, rule={self.rule!r}: solver is one of {', '.join(SOLVERS)}, rule one of "
                f"{', '.join(RULES)}"
            )
        if self.solver == "omp" and self.rule != "positive":
            raise InputError("solver='omp' fits coefficients >= 0: leave rule='positive'")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps={self.steps!r} must be at least 1")
        if self.tolerance < 0 or self.revive < 0 or not 0 <= self.dropout < 1 or self.refits < 1:
            raise InputError("tolerance and revive must be >= 0, dropout in [0, 1), refits >= 1")


@dataclass
class Path:
    """What a pursuit did: step t takes atom ``chosen[t]`` with coefficient ``coefficients[t]`` (0: the row is done)."""

    z: torch.Tensor
    """Codes, (n, m)."""
    residual: torch.Tensor
    """x - z D, (n, d)."""
    chosen: torch.Tensor
    """int64 (steps, n)."""
    coefficients: torch.Tensor
    """(steps, n)."""


@torch.no_grad()
def matching_pursuit(
    x: torch.Tensor,
    atoms: torch.Tensor,
    *,
    steps: int,
    rule: str = "positive",
    tolerance: float = 0.0,
    stop_at_repeat: bool = False,
    barred: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
) -> Path:
    """Matching pursuit: j = argmax <d_j, r>, c = <d_j, r>, z_j += c, r -= c d_j, up to ``steps`` times.

    With unit atoms ||r_t||^2 = ||r_{t-1}||^2 - c_t^2. Of equal correlations the lower index is taken.

    Parameters
    ----------
    x
        Rows about the bias, (n, d).
    atoms
        D, (m, d), rows of unit norm.
    steps
        Most steps of a row; an atom may be taken more than once.
    rule
        ``positive``, ``signed`` or ``abs``, see :class:`PursuitOptions`.
    tolerance, stop_at_repeat
        When a row is finished early.
    barred
        Bool (m,): atoms that must not be taken.
    gram
        D D^T, (m, m), if it is at hand.
    """
    n, m = len(x), len(atoms)
    z, residual = x.new_zeros(n, m), x.clone()
    open_ = torch.ones(n, dtype=torch.bool, device=x.device)
    chosen, coefficients = [], []
    if gram is None and m <= GRAM_LATENTS and m < n * steps:
        gram = atoms @ atoms.T
    correlation = residual @ atoms.T
    for step in range(steps):
        if step and gram is not None:
            correlation -= coefficients[-1][:, None] * gram[chosen[-1]]
        elif step:
            correlation = residual @ atoms.T
        ranked = correlation.abs() if rule == "abs" else correlation
        if barred is not None:
            ranked = ranked.masked_fill(barred, -torch.inf)
        j = ranked.argmax(1)
        direction = atoms[j]
        c = (residual * direction).sum(1)
        if rule == "positive":
            open_ &= c > 0
        c = torch.where(open_, c, torch.zeros_like(c))
        old = z.gather(1, j[:, None]).squeeze(1)
        z.scatter_(1, j[:, None], (old + c)[:, None])
        residual = torch.addcmul(residual, c[:, None], direction, value=-1)
        chosen.append(j)
        coefficients.append(c)
        if stop_at_repeat:
            open_ &= (old == 0) & (c != 0)
        if tolerance:
            open_ &= residual.norm(dim=1) >= tolerance
        if not bool(open_.any()):
            break
    return Path(z, residual, torch.stack(chosen), torch.stack(coefficients))


@torch.no_grad()
def orthogonal_pursuit(
    x: torch.Tensor,
    atoms: torch.Tensor,
    *,
    steps: int,
    refits: int = 10,
    tolerance: float = 0.0,
    barred: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes (n, m) >= 0: after each choice all coefficients are fitted anew by non-negative least squares.

    The fit is ``refits`` steps of projected gradient descent with rate 1 / ||Q||_F, Q the inner products of the chosen
    atoms; an atom is chosen once. A row is finished when no atom left has a correlation above 0, or its residual is
    shorter than ``tolerance``.
    """
    n, m = len(x), len(atoms)
    steps = min(steps, m)
    z, residual = x.new_zeros(n, m), x.clone()
    used = torch.zeros(n, m, dtype=torch.bool, device=x.device)
    if barred is not None:
        used |= barred
    chosen = torch.zeros(n, 0, dtype=torch.int64, device=x.device)
    open_ = torch.ones(n, dtype=torch.bool, device=x.device)
    for _ in range(steps):
        best, j = (residual @ atoms.T).masked_fill(used, -torch.inf).max(1)
        open_ &= best > 0
        if tolerance:
            open_ &= residual.norm(dim=1) >= tolerance
        if not bool(open_.any()):
            break
        used.scatter_(1, j[:, None], True)
        chosen = torch.cat([chosen, j[:, None]], 1)
        picked = atoms[chosen]
        inner = picked @ picked.transpose(1, 2)
        target = (picked @ x[:, :, None]).squeeze(2)
        rate = 1 / (inner.square().sum((1, 2)).sqrt() + 1e-8)
        w = z.gather(1, chosen)
        for _ in range(refits):
            w = (w - rate[:, None] * ((inner @ w[:, :, None]).squeeze(2) - target)).clamp_min(0)
        z = torch.where(open_[:, None], z.scatter(1, chosen, w), z)
        residual = x - z @ atoms
    return z


class _Unrolled(torch.autograd.Function):
    """Residual of a matching pursuit, differentiated through coefficients and residuals along the path it took.

    r_t = r_{t-1} - d <d, r_{t-1}>, so with g_t the derivative by r_t: g_{t-1} = g_t - d <d, g_t> and the derivative by
    d is -(c_t g_t + <d, g_t> r_{t-1}). Residuals are rebuilt backwards: no step is stored.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, atoms: torch.Tensor, path: Path) -> torch.Tensor:
        ctx.save_for_backward(atoms, path.residual, path.chosen, path.coefficients)
        return path.residual.clone()

    @staticmethod
    def backward(ctx: Any, by_residual: torch.Tensor) -> Any:
        atoms, residual, chosen, coefficients = ctx.saved_tensors
        by_atoms, g = torch.zeros_like(atoms), by_residual
        for j, c in zip(chosen.flip(0), coefficients.flip(0), strict=True):
            direction = atoms[j]
            residual = torch.addcmul(residual, c[:, None], direction)
            s = (direction * g).sum(1) * (c != 0)
            by_atoms.index_add_(0, j, -(c[:, None] * g + s[:, None] * residual))
            g = torch.addcmul(g, s[:, None], direction, value=-1)
        return g, by_atoms, None


class MatchingPursuit(Method):
    """z = matching pursuit of x - b_dec in the unit atoms D = W_dec, x_hat = z D + b_dec; there is no encoder matrix.

    Loss: mse, differentiated through coefficients and residuals but not through the choices.
    """

    Options: ClassVar[type] = PursuitOptions
    late: ClassVar[tuple[str, ...]] = ("steps", "tolerance", "stop_at_repeat")

    def make(self) -> None:
        self.W_dec = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
        self.b_dec = nn.Parameter(torch.zeros(self.n_features))
        self.signed = self.options.rule != "positive"
        self._gram: tuple[Any, torch.Tensor] | None = None

    def _pursue(self, x: torch.Tensor, steps: int, barred: torch.Tensor | None = None) -> Path:
        options = self.options
        return matching_pursuit(
            x, self.W_dec.detach(), steps=steps, rule=options.rule, tolerance=options.tolerance,
            stop_at_repeat=options.stop_at_repeat, barred=barred, gram=self._inner_products(),
        )  # fmt: skip

    def _inner_products(self) -> torch.Tensor | None:
        """D D^T of a dictionary that is not in training, kept from one block of rows to the next."""
        if self.training or self.n_latents > GRAM_LATENTS:
            return None
        version = (self.W_dec._version, self.W_dec.device)
        if self._gram is None or self._gram[0] != version:
            atoms = self.W_dec.detach()
            self._gram = (version, atoms @ atoms.T)
        return self._gram[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gram": None}

    def _refit(self, x: torch.Tensor, steps: int, barred: torch.Tensor | None = None) -> torch.Tensor:
        options, atoms = self.options, self.W_dec.detach()
        return torch.cat([
            orthogonal_pursuit(
                part, atoms, steps=steps, refits=options.refits, tolerance=options.tolerance, barred=barred
            )
            for part in x.split(SLICE)
        ])  # fmt: skip

    @torch.no_grad()
    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        centred, steps = x - self.b_dec, self.options.steps or self.k
        return self._refit(centred, steps) if self.options.solver == "omp" else self._pursue(centred, steps).z

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        centred, barred = x - self.b_dec, None
        if self.options.dropout and now.generator is not None and torch.is_grad_enabled():  # not on held-out rows
            barred = (torch.rand(self.n_latents, generator=now.generator) < self.options.dropout).to(x.device)
        if self.options.solver == "omp":
            z = self._refit(centred.detach(), now.k, barred)
            left = centred - z @ self.W_dec
        else:
            path = self._pursue(centred.detach(), now.k, barred)
            z, left = path.z, _Unrolled.apply(centred, self.W_dec, path)
        total = left.square().sum(1).mean()
        unused = ~(z != 0).any(0)
        if self.options.revive and int(unused.sum()) > UNUSED:
            total = total - self.options.revive * (left @ self.W_dec[unused].T).mean()
        return Loss(total, z, -left.detach())

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """b_dec the geometric median, unit atoms from rows or at random; nothing is scaled."""
        bias = geometric_median(rows)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(first_atoms(rows - bias, self.n_latents, atoms=atoms, generator=generator))
