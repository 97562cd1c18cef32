"""Gradient-aware TopK (g-SAE): latents are chosen by their activation and by how much they move a downstream loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from biosae.errors import InputError
from biosae.sae.activations import topk
from biosae.sae.methods.base import Loss, Method, NoOptions, Now
from biosae.sae.model import ZERO_NORM
from biosae.sae.objectives import auxk
from biosae.sae.rows import Rows


def sensitive_topk(z: torch.Tensor, q: torch.Tensor, k: int, *, beta: float) -> torch.Tensor:
    """The k latents a row with the largest z (1 + beta q), at their own values z.

    Parameters
    ----------
    z
        max(a, 0), (n, m).
    q
        Sensitivity |G W_dec^T| of the downstream loss, (n, m), not differentiated.
    k
        Latents a row.
    beta
        Weight of the sensitivity; 0 is TopK.
    """
    return torch.where(topk((z * (1 + beta * q)).detach(), k) > 0, z, torch.zeros_like(z))


def downstream_gradient(
    loss: Callable[..., torch.Tensor], X: Any, y: Any = None, *, batch_size: int = 1024, device: str = "cpu"
) -> np.ndarray:
    """Gradient of a downstream loss by the embeddings, row by row: the partner table of ``gsae``.

    Parameters
    ----------
    loss
        ``loss(x)``, or ``loss(x, y)`` where ``y`` is given, for rows x (b, d), float32: one number a row, (b,); a
        probe's loss with ``reduction="none"``, or a distance between outputs of the rest of the encoder.
    X
        (n, d): array or embeddings.
    y
        One target a row, in the order of the rows.
    batch_size
        Rows of one call.
    device
        Where ``loss`` computes.

    Returns
    -------
    ndarray (n, d), float32
        dloss_i / dx_i.

    Raises
    ------
    InputError
        If ``y`` has another number of rows, the loss is not one number a row or does not depend on x, or a gradient is
        not finite.
    """
    rows = Rows(X)
    targets = None if y is None else torch.as_tensor(np.asarray(y))
    if targets is not None and rows.n is not None and len(targets) != rows.n:
        raise InputError(f"y has {len(targets)} targets, X has {rows.n} rows; give one target a row")
    found = []
    for start, block in rows.blocks(batch_size):
        x = torch.from_numpy(block).to(device).requires_grad_(True)
        given = () if targets is None else (targets[start : start + len(block)].to(device),)
        with torch.enable_grad():
            value = loss(x, *given)
        if tuple(value.shape) != (len(block),):
            raise InputError(
                f"the loss has shape {tuple(value.shape)} for {len(block)} rows; return one number a row "
                "(reduction='none'), so that the gradient of a row does not depend on the size of its batch"
            )
        gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            raise InputError("the loss does not depend on the rows: compute it from x by torch, without detach()")
        if not bool(torch.isfinite(gradient).all()):
            bad = int((~torch.isfinite(gradient)).any(1).nonzero()[0]) + start
            raise InputError(f"the gradient of row {bad} is not finite; check the loss there")
        found.append(gradient.detach().float().cpu().numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class GradientOptions(NoOptions):
    """Options of ``gsae``."""

    beta: float = 1.0
    """Weight of the sensitivity, for gradients of mean norm 1; 0 is ``topk``."""

    def check(self) -> None:
        """Raise ``InputError`` for a negative weight."""
        if not 0 <= self.beta < np.inf:
            raise InputError(f"beta={self.beta!r} must be a number >= 0")


class GradientSAE(Method):
    """z = max(a, 0) at the k largest z (1 + beta q), q = |G W_dec^T|, G the gradients over their mean norm.

    Loss: mse + aux_alpha AuxK. Without gradients, and for rows whose gradient is 0, this is TopK.

    References
    ----------
    Olmo, Wilson, Forsey, Hepner, Howe, Wingate 2025, arXiv 2411.10397.
    """

    Options = GradientOptions
    partner = "gradient"

    def make(self) -> None:
        """Parameters, and the mean norm of the gradients."""
        super().make()
        self.register_buffer("norm", torch.zeros(1))

    def encode(self, x: torch.Tensor, *, table: int = 0) -> torch.Tensor:
        """Codes (n, m) of rows (n, d), or (n, 2 d) with their gradients."""
        x, gradient = self._parts(x)
        return self._codes(self.preactivations(x), gradient, self.k, self.norm)

    def loss(self, x: torch.Tensor, now: Now) -> Loss:
        """Reconstruction and AuxK."""
        x, gradient = self._parts(x)
        a = self.preactivations(x)
        norm = gradient.norm(dim=1).mean()
        z = self._codes(a, gradient, now.k, norm)
        residual = self.decode(z) - x
        total = residual.square().sum(1).mean()
        if now.aux_k and len(now.dead):
            total = total + now.aux_alpha * auxk(-residual, a, now.dead, self.W_dec, now.aux_k)
        return Loss(total, z.detach(), residual.detach(), target=x, extra={"norm": norm})

    @torch.no_grad()
    def after_step_(self, loss: Loss, now: Now) -> None:
        """Average the norm of the gradients over all batches."""
        self.norm.lerp_(loss.extra["norm"], 1 / (now.step + 1))

    def _parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = x[:, self.n_features : 2 * self.n_features]
        return x[:, : self.n_features], gradient if gradient.shape[1] else torch.zeros_like(x)

    def _codes(self, a: torch.Tensor, gradient: torch.Tensor, k: int, norm: torch.Tensor) -> torch.Tensor:
        q = (gradient @ self.W_dec.detach().T).abs() / norm.clamp_min(ZERO_NORM)
        return sensitive_topk(torch.relu(a), q, k, beta=self.options.beta)
