"""AbsTopK: the k largest pre-activations in size, with their signs; and the proximal operators it belongs to."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from biosae.errors import InputError, nearest
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Loss, Method, Now

PROX = ("l1", "l0", "topk", "abstopk")


class AbsTopK(Method):
    """mse + AuxK, z the k entries of a that are largest in size (Zhu, Khalili and Zhu 2025, arXiv 2510.00404).

    One latent can stand for both ends of an axis: codes are negative for one of them. AuxK ranks dead latents by size
    too (not published; our choice).
    """

    signed: ClassVar[bool] = True

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Signed codes."""
        return activations.abstopk(self.preactivations(x), self.k)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Squared error."""
        a = self.preactivations(x)
        z = activations.abstopk(a, now.k)
        x_hat = self.decode(z)
        total = objectives.mse_sum(x, x_hat)
        if now.aux_k and len(now.dead):
            aux = objectives.auxk(x - x_hat, a, now.dead, self.W_dec, now.aux_k, signed=True)
            total = total + now.aux_alpha * aux
        return Loss(total, z.detach(), (x_hat - x).detach())


def prox(u: torch.Tensor, *, of: str, weight: float | None = None, k: int | None = None) -> torch.Tensor:
    """argmin_z ||u - z||^2 / 2 + R(z): the activation that one proximal-gradient step from 0 gives.

    Parameters
    ----------
    u
        W_enc x + b_enc, (n, m).
    of
        The regulariser R: ``l1``, weight ||z||_1 with z >= 0, gives max(0, u - weight), a ReLU; ``l0``, weight ||z||_0
        with z >= 0, gives u 1[u > sqrt(2 weight)], a JumpReLU; ``topk``, at most k entries and z >= 0, gives TopK;
        ``abstopk``, at most k entries, gives AbsTopK.
    weight
        For ``l1`` and ``l0``, >= 0.
    k
        For ``topk`` and ``abstopk``.

    Returns
    -------
    torch.Tensor
        (n, m).

    Raises
    ------
    InputError
        For an unknown regulariser or a missing ``weight`` or ``k``.
    """
    if of not in PROX:
        raise InputError(f"of={of!r} is not known; {nearest(of, PROX)}")
    if of in ("l1", "l0"):
        if weight is None or not weight >= 0:
            raise InputError(f"prox of {of!r} needs weight >= 0, got {weight!r}")
        return torch.relu(u - weight) if of == "l1" else activations.above(u, math.sqrt(2 * weight))
    if k is None or k < 1:
        raise InputError(f"prox of {of!r} needs k >= 1, got {k!r}")
    return activations.topk(u, k) if of == "topk" else activations.abstopk(u, k)
