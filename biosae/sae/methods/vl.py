"""VL-SAE: one encoder by distances, shared by two aligned tables, and a decoder for each."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from biosae.sae.methods.base import Loss, Method, Now
from biosae.sae.methods.group_sparse import mean_over, same_width
from biosae.sae.model import ZERO_NORM, first_atoms, geometric_median
from biosae.sae.partner import split


class VLSAE(Method):
    """Codes are closenesses to m directions; each table is rebuilt by its own linear decoder.

    ``h_j = 2 - ||x / ||x|| - w_j / ||w_j|| ||`` in [0, 2]; the k largest are kept, without ties at the last place;
    ``x_hat_m = z W_m + b_m``; ``L = mse_x + mse_y``. By the triangle inequality rows that lie close have close codes.

    Shen, Sun, Huang, Wang 2025, arXiv 2510.21323, with the released code, whose loss divides by the width.
    """

    homogeneous: ClassVar[bool] = False
    unit_atoms: bool = False
    partner: ClassVar[str | None] = "modality"

    def make(self) -> None:
        """Encoder directions (m, d), and for each table a decoder (m, d) with a bias (d,)."""
        same_width("vl_sae", self.n_features, self.n_partner)
        shape = (self.n_latents, self.n_features)
        self.W_enc = nn.Parameter(torch.zeros(shape))
        self.W_dec, self.b_dec = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(self.n_features))
        self.W_second, self.b_second = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(self.n_features))

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes of rows of either table; a zero row has none."""
        return strictly_largest(closeness(x, self.W_enc), self.k)

    def decode(self, z: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Reconstructions of rows of one table."""
        return torch.addmm(self.b_second if table else self.b_dec, z, self.atoms(table=table))

    def atoms(self, *, table: int = 0) -> torch.Tensor:
        """Decoder of one table, (m, d); rows are not of unit norm."""
        return self.W_second if table else self.W_dec

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """See the class; rows that have one table only count in its reconstruction."""
        *tables, has = split(x, (self.n_features, self.n_partner))
        has = has > 0
        codes, residual, rows = [], [], []
        total = 0.0
        for t, table in enumerate(tables):
            z = strictly_largest(closeness(table, self.W_enc), now.k)
            e = self.decode(z, table=t) - table
            total = total + mean_over(e.square().sum(1), has[:, t])
            for kept, part in zip((codes, residual, rows), (z, e, table), strict=True):
                kept.append(part[has[:, t]])
        return Loss(total, torch.cat(codes), torch.cat(residual), torch.cat(rows))

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """Encoder directions and atoms from rows of both tables, biases their geometric medians.

        Each decoder is brought to the length that meets the first rows of its table best, whatever ``scale`` says: a
        closeness does not change with the length of an encoder row.
        """
        *tables, has = split(rows, (self.n_features, self.n_partner))
        present = [table[has[:, t] > 0] for t, table in enumerate(tables)]
        both = torch.cat(present)[torch.randperm(sum(map(len, present)), generator=generator)]
        start = first_atoms(both, self.n_latents, atoms=atoms, generator=generator)
        self.W_enc.copy_(start)
        for t, part in enumerate(present):
            bias, atoms_ = (self.b_second, self.W_second) if t else (self.b_dec, self.W_dec)
            atoms_.copy_(start)
            if not len(part):
                continue
            bias.copy_(geometric_median(part))
            square = product = 0.0
            for piece in part[:4096].to(bias.device).split(256):
                found = self.decode(self.encode(piece), table=t) - bias
                square += float(found.square().sum())
                product += float((found * (piece - bias)).sum())
            if product > ZERO_NORM:
                atoms_.mul_(product / square)


def closeness(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """h = 2 - ||u - v|| of unit rows u = x / ||x|| and v = w / ||w||, (n, m), in [0, 2].

    2 at cosine 1, 0 at cosine -1; a zero row has 1 everywhere. |h_j(x) - h_j(y)| <= ||u_x - u_y|| for all j. Distances
    below 1e-6 are taken as 1e-6, because the square root has no slope at 0.
    """
    u, v = (rows / rows.norm(dim=1, keepdim=True).clamp_min(ZERO_NORM) for rows in (x, directions))
    square = u.square().sum(1, keepdim=True) + v.square().sum(1) - 2 * (u @ v.T)
    return 2 - square.clamp_min(1e-12).sqrt()


def strictly_largest(h: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the entries of each row above its (k + 1)-th largest; with k >= m all of them.

    Of entries that equal the (k + 1)-th none is kept, so ties leave fewer than k, and a row of equal entries is 0.
    """
    if k >= h.shape[1]:
        return h
    last = h.detach().topk(k + 1, dim=1).values[:, -1:]
    return torch.where(h > last, h, torch.zeros_like(h))
