"""Group-sparse autoencoder of two aligned tables: both members of a pair share their latents (GSAE, MGSAE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import ZERO_NORM, first_atoms, first_gain, geometric_median
from biosae.sae.partner import split


@dataclass(frozen=True)
class Options(NoOptions):
    """Options of ``group_sparse``."""

    group_weight: float = 0.05
    """Weight lambda of the group-sparse penalty; 0 and ``mask=0``: a TopK SAE of the stacked tables."""
    mask: float = 0.2
    """Share p of the latents hidden from each pair while training; 0: GSAE without masks."""

    def check(self) -> None:
        """Raise ``InputError`` for values that make no sense."""
        if not self.group_weight >= 0:
            raise InputError(f"group_weight={self.group_weight!r} must be 0 or more")
        if not 0 <= self.mask < 1:
            raise InputError(f"mask={self.mask!r} is the share of latents hidden from a pair: 0 or more, and below 1")


class GroupSparse(Method):
    """Two tables of one width share encoder and atoms; each has a bias of its own.

    ``a_m = (x_m - b_m) W_enc^T + b_enc``, ``z_m = ReLU(TopK(s a_m))`` with one mask s for both members of a pair (none
    in evaluation), ``x_hat_m = z_m W_dec + b_m``;
    ``L = mse_x + mse_y + lambda s(t) mean_pairs sum_j sqrt(z_xj^2 + z_yj^2) + aux_alpha AuxK``.

    Rows that have one of the two modalities only count in its reconstruction. AuxK is that of ``topk``, over the rows
    of both tables.

    Kaushik, Barch, Fanelli 2026, arXiv 2601.20028. Mask share, penalty weight and the bias that is added back are not
    printed there: 0.2, 0.05 and the modality's own are our choices.
    """

    Options: ClassVar[type] = Options
    homogeneous: ClassVar[bool] = False  # so that codes of both tables are in one unit
    partner: ClassVar[str | None] = "modality"

    def make(self) -> None:
        """Parameters of :class:`Method`, and the bias of the second table."""
        same_width("group_sparse", self.n_features, self.n_partner)
        super().make()
        self.b_second = nn.Parameter(torch.zeros(self.n_features))

    def bias(self, table: int) -> torch.Tensor:
        """Bias of the first (0) or second (1) table, (d,)."""
        return self.b_second if table else self.b_dec

    def preactivations(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Pre-activations a, (n, m), of rows of one table."""
        return F.linear(x - self.bias(table), self.W_enc, self.b_enc)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes of rows of one table: the k largest positive pre-activations."""
        return activations.topk(self.preactivations(x, table=table), self.k)

    def decode(self, z: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Reconstructions of rows of one table."""
        return torch.addmm(self.bias(table), z, self.W_dec)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """See the class; ``x`` are joined rows [x | y | has_x | has_y]."""
        *tables, has = split(x, (self.n_features, self.n_partner))
        has = has > 0
        visible = None
        if self.options.mask:
            visible = torch.rand(len(x), self.n_latents, generator=now.generator).to(x.device) >= self.options.mask
        pre, codes, residual = [], [], []
        for table, rows in enumerate(tables):
            a = self.preactivations(rows, table=table)
            # what is hidden is never positive, so the k places go to visible latents
            z = activations.topk(a if visible is None else torch.where(visible, a, 0.0), now.k)
            pre.append(a)
            codes.append(z)
            residual.append(self.decode(z, table=table) - rows)
        total = sum(mean_over(e.square().sum(1), has[:, t]) for t, e in enumerate(residual))
        if self.options.group_weight:
            shared = mean_over(group_norm(*codes), has.all(1))
            total = total + self.options.group_weight * now.ramp * shared
        e = torch.cat([e[has[:, t]] for t, e in enumerate(residual)])
        z = torch.cat([z[has[:, t]] for t, z in enumerate(codes)])
        if now.aux_k and len(now.dead):
            a = torch.cat([a[has[:, t]] for t, a in enumerate(pre)])
            total = total + now.aux_alpha * objectives.auxk(-e, a, now.dead, self.W_dec, now.aux_k)
        return Loss(total, z, e, torch.cat([rows[has[:, t]] for t, rows in enumerate(tables)]))

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, *, atoms: str, scale: str, generator: torch.Generator) -> None:
        """As every method, from the rows of both tables: each bias the geometric median of its table."""
        *tables, has = split(rows, (self.n_features, self.n_partner))
        present = [table[has[:, t] > 0] for t, table in enumerate(tables)]
        centred = []
        for table, part in enumerate(present):
            if len(part):
                self.bias(table).copy_(geometric_median(part))
            centred.append(part - self.bias(table).cpu())
        both = torch.cat(centred)[torch.randperm(sum(map(len, centred)), generator=generator)]
        start = first_atoms(both, self.n_latents, atoms=atoms, generator=generator)
        self.W_dec.copy_(start)
        self.W_enc.copy_(start)
        gain = first_gain(
            lambda x: self.decode(self.encode(x + self.b_dec)) - self.b_dec, both, torch.zeros_like(self.b_dec),
            scale=scale, generator=generator,
        )  # fmt: skip
        if gain > ZERO_NORM:
            self.W_enc.div_(gain)


def group_norm(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Group-sparse norm of each pair of codes, sum_j sqrt(z_j^2 + w_j^2), (n,).

    It is between the longer of the two in L1 and the sum of both, and equals the sum where supports are disjoint: it is
    cheaper to use the same latents. The gradient at (0, 0) is 0.
    """
    square = first.square() + second.square()
    return torch.where(square > 0, square.clamp_min(1e-12).sqrt(), square).sum(1)


def mean_over(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Mean of the values (n,) where ``present``; 0 where nothing is."""
    return (values * present).sum() / present.sum().clamp_min(1)


def same_width(name: str, n_features: int, n_partner: int) -> None:
    """Refuse a missing second table, or one of another width.

    Raises
    ------
    InputError
    """
    if n_partner == 0:
        raise InputError(f"architecture={name!r} learns from two tables: fit(X, partner=Y), one row of Y for each of X")
    if n_partner != n_features:
        raise InputError(
            f"architecture={name!r} needs two tables of one width in one space, found {n_features} and {n_partner} "
            "columns; align them first: biosae.sae.Alignment().fit(X, Y)"
        )
