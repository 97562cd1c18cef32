"""Losses. Shapes: rows x and reconstructions (n, d), codes and pre-activations (n, m), decoder (m, d)."""

from __future__ import annotations

import torch

from biosae.sae.activations import topk


def mse_sum(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """mean_i ||x_i - x_hat_i||^2: summed over the width, averaged over rows."""
    return (x - x_hat).square().sum(1).mean()


def l1_norm(z: torch.Tensor) -> torch.Tensor:
    """mean_i sum_j |z_ij|, for atoms of unit norm."""
    return z.abs().sum(1).mean()


def l0_target(l0: torch.Tensor, k: int) -> torch.Tensor:
    """(mean_i L0_i / k - 1)^2: keeps the mean number of open latents at k (Rajamanoharan et al. 2024)."""
    return (l0.mean() / k - 1).square()


def auxk(residual: torch.Tensor, a: torch.Tensor, dead: torch.Tensor, decoder: torch.Tensor, k: int) -> torch.Tensor:
    """AuxK loss: how badly the dead latents explain the residual (Gao et al. 2024, released code).

    ``mean_i ||e_i - e_hat_i||^2 / mean_i ||e_i - mean(e)||^2`` with e detached and e_hat made of the
    ``min(k, n_dead)`` largest positive pre-activations among dead latents, without bias.

    Parameters
    ----------
    residual
        e = x - x_hat, (n, d).
    a
        Pre-activations, (n, m).
    dead
        Indices of dead latents, int64 (n_dead,).
    decoder
        Atoms, (m, d).
    k
        Dead latents used a row.

    Returns
    -------
    torch.Tensor
        Scalar; 0 where nothing is dead or all residual rows are equal (denominator < 1e-12).
    """
    if dead.numel() == 0 or k == 0:
        return a.new_zeros(())
    e = residual.detach()
    z = topk(a.index_select(1, dead), k)
    e_hat = z @ decoder.index_select(0, dead)
    spread = (e - e.mean(0)).square().sum(1).mean()
    loss = mse_sum(e, e_hat) / spread.clamp_min(1e-12)
    return torch.where(spread < 1e-12, torch.zeros_like(loss), loss)
