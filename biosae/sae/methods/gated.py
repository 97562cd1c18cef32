"""Gated SAE: whether a latent is on and how strong it is are two questions to one encoder matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from biosae.sae import objectives
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.methods.plain import at_least


@dataclass(frozen=True)
class GatedOptions(NoOptions):
    """Options of ``gated``."""

    l1: float = 0.3
    """Weight of the L1 penalty on the gates, in the units of the normalised rows. L0 is found, not set. (Released code:
    0.1, with which half of a small table's width is active: docs/methods/gated.md.)"""

    def check(self) -> None:
        """Raise ``InputError`` for a value that makes no sense."""
        at_least("l1", self.l1, 0)


class Gated(Method):
    """h = (x - b_dec) W_enc^T, g = h + b_enc, z = 1[g > 0] max(0, exp(r_mag) h + b_mag).

    The loss is mse + l1 mean_i sum_j max(0, g_ij) + the mse of max(0, g) decoded with the decoder held fixed
    (Rajamanoharan et al. 2024, arXiv 2404.16014). The gate learns from the last two terms only, and only it is
    penalised, so that codes are not shrunken. ``b_enc`` is the bias of the gate.
    """

    Options: ClassVar[type] = GatedOptions
    from_zero: ClassVar[tuple[str, ...]] = ("r_mag", "b_mag")

    def make(self) -> None:
        """The magnitudes besides."""
        super().make()
        self.r_mag = nn.Parameter(torch.zeros(self.n_latents))
        self.b_mag = nn.Parameter(torch.zeros(self.n_latents))

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate pre-activations g and codes z, each (n, m)."""
        h = F.linear(x - self.b_dec, self.W_enc)
        g = h + self.b_enc
        return g, torch.where(g > 0, torch.relu(self.r_mag.exp() * h + self.b_mag), torch.zeros_like(g))

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes of open gates."""
        return self.gates(x)[1]

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Error of the codes, L1 of the gates, error of the gates as codes."""
        g, z = self.gates(x)
        x_hat = self.decode(z)
        gate = torch.relu(g)
        by_gate = torch.addmm(self.b_dec.detach(), gate, self.W_dec.detach())
        total = objectives.mse_sum(x, x_hat) + now.ramp * self.options.l1 * objectives.l1_norm(gate)
        total = total + objectives.mse_sum(x, by_gate)
        if now.aux_k and len(now.dead):
            total = total + now.aux_alpha * objectives.auxk(x - x_hat, g, now.dead, self.W_dec, now.aux_k)
        return Loss(total, z.detach(), (x_hat - x).detach())
