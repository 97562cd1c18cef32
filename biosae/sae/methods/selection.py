"""Which latents of linear pre-activations are active, for methods that leave it open: topk, batchtopk or jumprelu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from biosae.errors import InputError
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Method, NoOptions, Now
from biosae.sae.model import calibrated

SLICE = 256
ACTIVATIONS = ("topk", "batchtopk", "jumprelu")


@dataclass(frozen=True)
class Selection(NoOptions):
    """Rule of activation."""

    activation: str = "topk"
    """``topk`` (k a row), ``batchtopk`` (k a row on average) or ``jumprelu`` (learnt thresholds)."""
    l0_weight: float = 4.0
    """``jumprelu``: weight of (L0 / k - 1)^2."""
    bandwidth: float = 0.1
    """``jumprelu``: width of the window of its pseudo-derivatives, in normalised units."""
    threshold: float = 0.001
    """``jumprelu``: first threshold, in normalised units."""

    def check(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        if self.l0_weight < 0 or self.bandwidth <= 0 or self.threshold < 0:
            raise InputError("l0_weight and threshold must be >= 0, bandwidth > 0")


class Selecting(Method):
    """A method with a linear encoder whose codes are chosen by ``options.activation``."""

    Options: ClassVar[type] = Selection

    def make(self) -> None:
        super().make()
        self.make_threshold()

    def make_threshold(self) -> None:
        """Thresholds: learnt, one a latent (``jumprelu``), or one for all that is set after training."""
        if self.options.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((self.n_latents,), float(self.options.threshold)))
        else:
            self.register_buffer("threshold", torch.zeros(()))

    def choose(self, a: torch.Tensor, now: Now) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Codes (n, m) of pre-activations by the training rule, and the sparsity penalty (0 but for ``jumprelu``)."""
        if self.options.activation == "jumprelu":
            z, l0 = activations.jumprelu(a, self.threshold, self.options.bandwidth)
            return z, self.options.l0_weight * now.ramp * objectives.l0_target(l0, now.k)
        rule = activations.topk if self.options.activation == "topk" else activations.batchtopk
        return rule(a, now.k), 0.0

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        a = self.preactivations(x)
        if self.options.activation == "topk":
            return activations.topk(a, self.k)
        return activations.above(a, self.threshold)

    @torch.no_grad()
    def constrain_(self, generator: torch.Generator) -> None:
        if self.options.activation == "jumprelu":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def complete_(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        if self.options.activation == "batchtopk":
            self.threshold.fill_(calibrated(self.preactivations, rows.split(SLICE), self.k))

    def revival(self, a: torch.Tensor, residual: torch.Tensor, atoms: Any, now: Now) -> torch.Tensor | float:
        """AuxK times its weight; ``atoms(dead)`` gives the atoms of dead latents, residual is x - x_hat."""
        if not now.aux_k or not len(now.dead):
            return 0.0
        of_dead = torch.arange(len(now.dead), device=a.device)
        loss = objectives.auxk(residual, a.index_select(1, now.dead), of_dead, atoms(now.dead), now.aux_k)
        return now.aux_alpha * loss
