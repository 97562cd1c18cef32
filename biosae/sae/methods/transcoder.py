"""Transcoder: sparse codes of one table that rebuild another, such as a later layer of the same encoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Loss, Method, Now
from biosae.sae.model import ZERO_NORM, first_atoms, geometric_median, unit_rows_
from biosae.sae.partner import split


class Transcoder(Method):
    """``a = x W_enc^T + b_enc``, ``z = TopK(a)``, ``y_hat = z W_dec + b_dec``; ``L = mean ||y - y_hat||^2 + AuxK``.

    Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944, with TopK in place of ReLU and L1 (as in the released sparsify).
    The input has no bias of its own: b_enc is as good.
    """

    homogeneous: ClassVar[bool] = False  # codes are strengths in the scaled target, not in the units of the input
    partner: ClassVar[str | None] = "target"

    def make(self) -> None:
        """Encoder (m, d) and (m,), decoder (m, d_out) and (d_out,)."""
        if self.n_partner == 0:
            raise InputError(
                "architecture='transcoder' predicts a second table: fit(X, partner=Y), one row of Y for each of X"
            )
        self.W_enc = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.W_dec = nn.Parameter(torch.zeros(self.n_latents, self.n_partner))
        self.b_dec = nn.Parameter(torch.zeros(self.n_partner))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations a, (n, m), of rows (n, d)."""
        return F.linear(x, self.W_enc, self.b_enc)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes of rows of the first table: the k largest positive pre-activations."""
        return activations.topk(self.preactivations(x), self.k)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """See the class; ``x`` are joined rows [x | y]."""
        x, y, _ = split(x, (self.n_features, self.n_partner))
        a = self.preactivations(x)
        z = activations.topk(a, now.k)
        e = self.decode(z) - y
        total = e.square().sum(1).mean()
        if now.aux_k and len(now.dead):
            total = total + now.aux_alpha * objectives.auxk(-e, a, now.dead, self.W_dec, now.aux_k)
        return Loss(total, z, e, y)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """A latent looks for the direction of a row in the first table and writes that of the same row in the second.

        b_enc takes the geometric median of the first table off, b_dec is that of the second. ``atoms="random"``: random
        directions in both. The encoder is brought to the length that meets the first targets best, whatever ``scale``
        says: unit vectors have no target to be compared with.
        """
        x, y, _ = split(rows, (self.n_features, self.n_partner))
        center, bias = geometric_median(x), geometric_median(y)
        joined = torch.cat([x - center, y - bias], dim=1)
        start = first_atoms(joined, self.n_latents, atoms=atoms, generator=generator)
        look, write = start[:, : self.n_features].clone(), start[:, self.n_features :].clone()
        unit_rows_(look, generator=generator)
        unit_rows_(write, generator=generator)
        self.b_dec.copy_(bias)
        self.W_dec.copy_(write)
        self.W_enc.copy_(look)
        self.b_enc.copy_(-(look @ center))
        square = product = 0.0
        for given, wanted in zip(x[:4096].split(256), y[:4096].split(256), strict=True):
            found = (self.decode(self.encode(given.to(self.W_enc.device))) - self.b_dec).cpu()
            square += float(found.square().sum())
            product += float((found * (wanted - bias)).sum())
        if product > ZERO_NORM:
            self.W_enc.mul_(product / square)
            self.b_enc.mul_(product / square)
