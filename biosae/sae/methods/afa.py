"""Top-AFA: as many latents a row as it takes for the norm of the code to match that of the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.objectives import auxk
from biosae.sae.rows import Rows


def norm_matched(
    r: torch.Tensor, sizes: torch.Tensor, target: torch.Tensor, *, never_all: bool = False
) -> torch.Tensor:
    """Keep in each row the largest latents, up to the number whose joint length comes closest to the target.

    With v_j = (r_j ||d_j||)^2 in falling order and c_t the root of the sum of the first t, the first
    1 + argmin_t |c_t - target| latents are kept (the first minimum; of equal v_j the lower index comes first).

    Parameters
    ----------
    r
        max(a, 0), (n, m).
    sizes
        Norms of the atoms, (m,).
    target
        Norm that the code should have, (n,).
    never_all
        Leave the choice of all m latents out, as the released code does.

    Returns
    -------
    torch.Tensor
        r where kept, else 0, (n, m).

    References
    ----------
    Lee et al. 2025, arXiv 2503.24277.
    """
    with torch.no_grad():
        v, order = (r * sizes).square().sort(dim=1, descending=True, stable=True)
        wide = v.dtype if v.device.type == "mps" else torch.float64  # sums must still grow by the smallest latent
        length = v.cumsum(1, dtype=wide).sqrt_()
        if never_all:
            length[:, -1] = torch.inf
        last = (length - target[:, None]).abs_().argmin(1, keepdim=True)
        places = torch.arange(r.shape[1], device=r.device)
        keep = torch.zeros_like(r, dtype=torch.bool).scatter_(1, order, places <= last)
    return torch.where(keep, r, torch.zeros_like(r))


def norm_mismatch(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """mean_i (||z_i|| - ||x_i||)^2 of codes (n, m) and rows (n, d), with derivative 0 where a code is empty."""
    square = z.square().sum(1)
    length = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
    return (length - x.norm(dim=1)).square().mean()


def code_norm_bounds(square: float, *, coherence: float, n_latents: int) -> tuple[float, float]:
    """Least and largest ||f||^2 of a code f with x = sum_j f_j d_j, for ||x||^2 = ``square``.

    ||x||^2 / (1 + eps (m - 1)) <= ||f||^2 <= ||x||^2 / (1 - eps (m - 1)), for unit atoms with |<d_i, d_j>| <= eps =
    ``coherence``; the upper bound is infinite where eps (m - 1) >= 1 (Lee et al. 2025).
    """
    spread = coherence * (n_latents - 1)
    return square / (1 + spread), square / (1 - spread) if spread < 1 else np.inf


def quasi_orthogonality(square: Any, codes: Any, *, sizes: Any, bias: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Length of each code beside that of its row, and the least coherence that would explain the difference.

    Parameters
    ----------
    square
        ||x_i||^2, (n,).
    codes
        (n, m), dense or sparse.
    sizes
        Norms of the atoms, (m,).
    bias
        ||b_dec||: one more coordinate of the code, as in the released code.

    Returns
    -------
    length, eps
        ||f_i|| with f_ij = z_ij ||d_j||, and eps_LBO = | ||x||^2 - ||f||^2 | / ((m - 1) ||f||^2), (n,) each. Where f is
        0, eps is 0 for a zero row and infinite otherwise; with a single latent it is NaN.
    """
    weights = np.square(np.asarray(sizes, np.float64))
    squared = codes.multiply(codes).tocsr() if hasattr(codes, "multiply") else np.square(np.asarray(codes, np.float64))
    own = np.asarray(squared.astype(np.float64) @ weights).ravel() + float(bias) ** 2
    gap = np.abs(np.asarray(square, np.float64) - own)
    with np.errstate(divide="ignore", invalid="ignore"):
        eps = np.where((own == 0) & (gap == 0), 0.0, gap / own)
    return np.sqrt(own), eps / (len(weights) - 1) if len(weights) > 1 else np.full_like(eps, np.nan)


@dataclass(frozen=True)
class AFAOptions(NoOptions):
    """Options of ``top_afa``."""

    weight: float | None = None
    """Weight of (||z|| - ||x||)^2, for rows of mean square 1. None: d / 32. The released code averages its squared
    error over the d columns of rows of norm sqrt(d): its ``afa_coeff``, 1/128 to 1/16, is this weight / d."""
    about_bias: bool = True
    """Compare ||z|| in the loss with ||x - b_dec||, as the choice does (b_dec not differentiated). False: with ||x||,
    as the released code does; b_dec can then move away until all latents are chosen."""
    never_all: bool = False
    """Never choose all latents, even where their joint norm fits best, as the released code does."""

    def check(self) -> None:
        """Raise ``InputError`` for a negative weight."""
        if self.weight is not None and not self.weight >= 0:
            raise InputError(f"weight={self.weight!r} must be 0 or larger")


class TopAFA(Method):
    """r = max((x - b_dec) W_enc^T, 0); z keeps the largest of them until ||z|| is nearest to ||x - b_dec||.

    There is no k and no encoder bias. Loss: mse + weight mean_i (||z_i|| - ||x_i - b_dec||)^2 + aux_alpha AuxK.

    References
    ----------
    Lee, Davies, Canby, Hockenmaier 2025, arXiv 2503.24277, and its released code.
    """

    Options = AFAOptions

    def make(self) -> None:
        """Parameters; without an encoder bias."""
        self.W_enc = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
        self.W_dec = nn.Parameter(torch.zeros(self.n_latents, self.n_features))
        self.b_dec = nn.Parameter(torch.zeros(self.n_features))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """(x - b_dec) W_enc^T, (n, m)."""
        return F.linear(x - self.b_dec, self.W_enc)

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes (n, m)."""
        return self._codes(x, self.preactivations(x))

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Reconstruction, norm and AuxK."""
        a = self.preactivations(x)
        z = self._codes(x, a)
        residual = self.decode(z) - x
        weight = self.n_features / 32 if self.options.weight is None else self.options.weight
        about = x - self.b_dec.detach() if self.options.about_bias else x
        total = residual.square().sum(1).mean() + weight * norm_mismatch(z, about)
        if now.aux_k and len(now.dead):
            total = total + now.aux_alpha * auxk(-residual, a, now.dead, self.W_dec, now.aux_k)
        return Loss(total, z.detach(), residual.detach())

    def _codes(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        sizes, target = self.W_dec.norm(dim=1), (x - self.b_dec).norm(dim=1)
        return norm_matched(torch.relu(a), sizes, target, never_all=self.options.never_all)


def eps_lbo(coder: Any, X: Any) -> dict[str, np.ndarray]:
    """How far the codes of any dictionary are longer or shorter than quasi-orthogonal atoms would make them.

    Parameters
    ----------
    coder
        Fitted :class:`biosae.sae.SAE` or another coder whose reconstruction is affine in its codes.
    X
        (n, d): array or embeddings.

    Returns
    -------
    dict
        ``norm_x`` = ||x_i||, ``norm_f`` = ||f_i|| with f_ij = z_ij ||d_j|| and ||b_dec|| as one more coordinate, and
        ``eps_lbo`` = | ||x||^2 - ||f||^2 | / ((m - 1) ||f||^2), (n,) each. A row with norm_f > norm_x is
        over-activated, one with norm_f < norm_x under-activated.

    References
    ----------
    Lee et al. 2025, arXiv 2503.24277.
    """
    rows = Rows(X)
    square = np.concatenate([np.square(x, dtype=np.float64).sum(1) for _, x in rows.blocks()])
    sizes, bias = np.linalg.norm(coder.decoder_, axis=1), float(np.linalg.norm(coder.bias_))
    length, eps = quasi_orthogonality(square, coder.codes(X), sizes=sizes, bias=bias)
    return {"norm_x": np.sqrt(square), "norm_f": length, "eps_lbo": eps}
