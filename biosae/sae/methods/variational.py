"""Variational SAE: Gaussian codes with a Kullback-Leibler penalty, of which the k largest in size are kept.

Baker, Li 2025, arXiv 2509.22994. A negative result: see docs/methods/variational.md before using it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import first_atoms, first_gain, geometric_median

LOG_VARIANCES = (-6.0, 2.0)
LARGEST_MEAN = 10.0


@dataclass(frozen=True)
class VariationalOptions(NoOptions):
    """Settings of ``variational``."""

    variance: str = "fixed"
    """``fixed``: codes are the means, the penalty is half their squared length; ``learned``: a second encoder gives the
    log variance and codes are drawn in training."""
    kl: float = 1e-3
    """Weight of the penalty beside the error, which is about 1 at the start; it rises over ``l1_warmup``. The released
    code has 500."""
    log_variance: float = -2.0
    """First log variance."""
    atom_norm: float = 0.1
    """Norm of the atoms at the start; it is not held."""

    def check(self) -> None:
        if self.variance not in ("fixed", "learned"):
            raise InputError(f"variance={self.variance!r} must be 'fixed' or 'learned'")
        if self.kl < 0 or self.atom_norm <= 0:
            raise InputError("kl must be >= 0, atom_norm > 0")


def kl_per_row(mean: torch.Tensor, log_variance: torch.Tensor | None = None) -> torch.Tensor:
    """KL of N(mean, exp(log_variance)) from N(0, 1), summed over latents, (n,).

    0.5 sum(mean^2 + exp(lv) - 1 - lv), means clamped to [-10, 10] and lv to [-6, 2]; without ``log_variance`` 0.5 sum
    mean^2, the KL between Gaussians of equal variance, with no clamp.
    """
    if log_variance is None:
        return 0.5 * mean.square().sum(1)
    square = mean.clamp(-LARGEST_MEAN, LARGEST_MEAN).square()
    lv = log_variance.clamp(*LOG_VARIANCES)
    return 0.5 * (square + lv.exp() - 1 - lv).sum(1)


class Variational(Method):
    """mu = max(x W_enc^T + b_enc, 0); in training z = mu + sigma N(0, 1) (``learned``); the k largest |z| are kept.

    Rows are not taken about b_dec before encoding. Afterwards codes are the k largest mu. Loss: mse + kl s(t) mean KL +
    aux_alpha AuxK, KL over all latents, AuxK by |z| with signs.
    """

    Options: ClassVar[type] = VariationalOptions
    unit_atoms = False

    def make(self) -> None:
        super().make()
        if self.options.variance == "learned":
            self.W_var = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
            self.b_var = nn.Parameter(torch.zeros(self.n_latents))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.W_enc, self.b_enc)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        return activations.topk(self.preactivations(x), self.k)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        mean, log_variance = torch.relu(self.preactivations(x)), None
        z = mean
        if self.options.variance == "learned":
            log_variance = F.linear(x, self.W_var, self.b_var)
            noise = torch.randn(z.shape, generator=now.generator).to(z)
            z = mean + (0.5 * log_variance.clamp(*LOG_VARIANCES)).exp() * noise
        kept = activations.abstopk(z, now.k)
        x_hat = self.decode(kept)
        total = objectives.mse_sum(x, x_hat)
        total = total + self.options.kl * now.ramp * kl_per_row(mean, log_variance).mean()
        if now.aux_k and len(now.dead):
            revival = objectives.auxk(x - x_hat, z, now.dead, self.W_dec, now.aux_k, signed=True)
            total = total + now.aux_alpha * revival
        return Loss(total, kept.detach(), (x_hat - x).detach())

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """b_dec the geometric median; atoms of norm ``atom_norm``, W_enc = g D; log variances about their start.

        As no bias is taken off the rows, b_enc = -W_enc b_dec at the start.
        """
        bias = geometric_median(rows)
        start = first_atoms(rows - bias, self.n_latents, atoms=atoms, generator=generator)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(start * self.options.atom_norm)
        self.W_enc.copy_(start * self.options.atom_norm)
        self.b_enc.copy_(-self.W_enc @ bias)
        if self.options.variance == "learned":
            bound = math.sqrt(6 / self.n_features)
            self.W_var.copy_((2 * torch.rand(self.W_var.shape, generator=generator) - 1) * bound)
            self.b_var.fill_(self.options.log_variance)
        gain = first_gain(lambda x: self.rebuilt(x, generator), rows, bias, scale=scale, generator=generator)
        if gain > 0:
            self.W_enc.div_(gain)
            self.b_enc.div_(gain)
