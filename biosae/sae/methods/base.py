"""What a method is: the parameters of an architecture, its loss, its codes, its decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from biosae.sae.model import ZERO_NORM, first_atoms, first_gain, geometric_median


@dataclass(frozen=True)
class NoOptions:
    """Base of the options of an architecture; by itself, none."""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""


@dataclass(frozen=True)
class Now:
    """What holds at one step of training."""

    k: int
    """Latents a row, after annealing."""
    ramp: float = 1.0
    """Share of the penalties, from 0 to 1 over ``l1_warmup`` of the steps."""
    dead: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Latents that have not fired for ``dead_after`` rows, int64."""
    aux_k: int = 0
    aux_alpha: float = 0.0
    step: int = 0
    n_steps: int = 1
    generator: torch.Generator | None = None
    """CPU generator: the only source of chance in training."""


@dataclass
class Loss:
    """Loss of a batch and what the trainer wants to know about it."""

    total: torch.Tensor
    """Scalar to be differentiated."""
    z: torch.Tensor
    """Codes, (n, m), of two tables one under the other; a latent fires where they are not 0."""
    residual: torch.Tensor
    """x_hat - x (or - target), (n, d)."""
    target: torch.Tensor | None = None
    """What is reconstructed, (n, d), where it is not the whole row."""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """What :meth:`Method.after_step_` wants to know."""


class Method(nn.Module):
    """A linear encoder, an activation and a linear decoder; subclasses change what they need.

    ``a = (x - b_dec) W_enc^T + b_enc``, ``z = activation(a)``, ``x_hat = z W_dec + b_dec``.

    What Adam trains are ``nn.Parameter`` (float32, at least one axis); all else that the next step or an evaluation
    depends on is a buffer: ``persistent=True`` where the fitted model needs it, ``persistent=False`` where training
    alone does. :meth:`loss` reads buffers, :meth:`after_step_` writes them. Rows come normalised.

    Parameters
    ----------
    n_features, n_latents
        d and m.
    k
        Active latents a row.
    options
        An instance of ``Options``.
    n_partner
        Columns of the second table; 0 without one.
    """

    Options: ClassVar[type] = NoOptions
    signed: ClassVar[bool] = False
    """Whether codes may be negative."""
    homogeneous: ClassVar[bool] = True
    """Whether encode(b + c x) = c encode(b + x) for c > 0: codes are then given in the units of the embedding, else in
    normalised units."""
    unit_atoms: bool = True
    """Whether the rows of ``W_dec`` stay at unit norm: the trainer projects their gradient and renormalises them."""
    affine: ClassVar[bool] = True
    """Whether x_hat is affine in z, so that decoding is one sparse product with the atoms."""
    late: ClassVar[tuple[str, ...]] = ()
    """Options that may be changed after fitting, by ``set_params(options=...)``."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """Buffers of which ``ema`` keeps the moving average, as of the parameters."""
    from_zero: ClassVar[tuple[str, ...]] = ()
    """Parameters (m,) besides ``b_enc`` that start from 0 in a latent that is resampled."""
    partner: ClassVar[str | None] = None
    """What a second table is: ``gradient``, ``modality`` or ``target``; None: it takes none."""

    def __init__(self, n_features: int, n_latents: int, *, k: int, options: Any, n_partner: int = 0) -> None:
        super().__init__()
        self.n_features, self.n_latents, self.n_partner = n_features, n_latents, n_partner
        self.k, self.options = k, options
        self.make()

    def make(self) -> None:
        """Make parameters and buffers, all zeros."""
        self.W_enc = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.W_dec = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
        self.b_dec = nn.Parameter(torch.zeros(self.n_features))

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x (n, d), the partner's columns (n, d2), and for modalities ``has`` (n, 2), 1 where a row has x and y.

        Rows without a partner give None for what they lack.
        """
        if rows.shape[1] == self.n_features:
            return rows, None, None
        end = self.n_features + self.n_partner
        return (
            rows[:, : self.n_features],
            rows[:, self.n_features : end],
            rows[:, end:] if end < rows.shape[1] else None,
        )

    # ------------------------------------------------------------------------------------------------ the model

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations a, (n, m), of rows (n, d)."""
        return F.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes z, (n, m), for evaluation: each row by itself.

        ``table`` is 1 for rows of the second modality. With a ``gradient`` partner x may have its columns behind.
        """
        raise NotImplementedError

    def decode(self, z: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Reconstructions, (n, d), of codes (n, m)."""
        return torch.addmm(self.b_dec, z, self.W_dec)

    def atoms(self, *, table: int = 0) -> torch.Tensor:
        """Dictionary, (m, d): the direction that a latent adds to the reconstruction."""
        return self.W_dec

    # ------------------------------------------------------------------------------------------------- training

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Loss of a batch by the training rule; changes nothing."""
        raise NotImplementedError

    @torch.no_grad()
    def constrain_(self, generator: torch.Generator) -> None:
        """Bring parameters back to where they must lie (beyond unit atoms); doing it twice changes nothing."""

    @torch.no_grad()
    def after_step_(self, loss: Loss, now: Now) -> None:
        """Update buffers after a step (running thresholds, usage, biases that no gradient moves)."""

    @torch.no_grad()
    def complete_(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        """After training: set what evaluation needs, from normalised training rows (n, d)."""

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """Start from normalised rows (n, d), or joined rows: b_dec the geometric median, unit atoms, W_enc = g W_dec.

        See :meth:`biosae.sae.model.SparseAutoencoder.initialise`; g makes the reconstructions of this method by its
        training rule fit the rows (``least_squares``) or random unit vectors (``probes``).
        """
        rows = self.split(rows)[0]
        bias = geometric_median(rows)
        start = first_atoms(rows - bias, self.n_latents, atoms=atoms, generator=generator)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(start)
        self.W_enc.copy_(start)
        gain = first_gain(lambda x: self.rebuilt(x, generator), rows, bias, scale=scale, generator=generator)
        if gain > ZERO_NORM:
            self.W_enc.div_(gain)

    def rebuilt(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Reconstructions of normalised rows by the training rule, (n, d)."""
        return self.loss(x, Now(k=self.k, generator=generator)).residual + x
