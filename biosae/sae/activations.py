"""Rules that turn pre-activations (n, m) into sparse codes (n, m), as dense, differentiable functions.

All of them return their input where a latent is kept and 0 elsewhere, so that gradients reach the kept entries only.
They say what the kernels of :mod:`biosae.sae.sparse_ops` must compute.
"""

from __future__ import annotations

from typing import Any

import torch


def relu(a: torch.Tensor) -> torch.Tensor:
    """z = max(a, 0)."""
    return torch.relu(a)


def topk(a: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest positive entries of each row (Gao et al. 2024); of equal ones the lower index wins."""
    return _keep_largest(torch.relu(a), min(k, a.shape[1]))


def abstopk(a: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k entries of each row that are largest in size, with their signs (Zhu et al. 2025, arXiv 2510.00404).

    Of entries of equal size the lower index wins; zeros stay zeros.
    """
    kept = _keep_largest(a.abs(), min(k, a.shape[1])) > 0
    return torch.where(kept, a, torch.zeros_like(a))


def topk_signed(a: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest entries of each row whatever their sign; of equal ones the lower index wins."""
    k = min(k, a.shape[1])
    last = a.detach().topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = a > last, a == last
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return torch.where(keep, a, torch.zeros_like(a))


def batchtopk(a: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k n largest positive entries of the whole batch (Bussmann et al. 2024); used in training only."""
    r = torch.relu(a)
    return _keep_largest(r.reshape(1, -1), min(k, a.shape[1]) * a.shape[0]).reshape(a.shape)


def above(a: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """z = a where a > threshold (>= 0; a number or one per latent), else 0: codes that need no other row."""
    return torch.where(a > threshold, a, torch.zeros_like(a))


class _JumpReLU(torch.autograd.Function):
    """z and the number of open latents a row, with the pseudo-derivatives by the thresholds."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, threshold: torch.Tensor, bandwidth: float, closed: bool) -> Any:
        opened = a >= threshold if closed else a > threshold
        ctx.save_for_backward(a, threshold, opened)
        ctx.bandwidth = bandwidth
        return torch.where(opened, a, torch.zeros_like(a)), opened.sum(1).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, by_z: torch.Tensor, by_l0: torch.Tensor) -> Any:
        a, threshold, opened = ctx.saved_tensors
        window = ((a - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        by_threshold = -(window * (threshold * by_z + by_l0[:, None])).sum(0)
        return by_z * opened, by_threshold, None, None


def jumprelu(
    a: torch.Tensor, threshold: torch.Tensor, bandwidth: float, *, closed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = a 1[a > theta] and each row's L0 (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Straight-through derivatives with bandwidth eps and K(u) = 1[|u| < 1/2]: dz/da = 1[a > theta], dz/dtheta =
    -(theta / eps) K((a - theta) / eps), dL0/dtheta = -(1 / eps) K((a - theta) / eps), dL0/da = 0; the window is laid
    about a, not about z. With ``closed`` a latent at its threshold is open: z = a 1[a >= theta].

    Returns
    -------
    z, l0
        (n, m) and float (n,).
    """
    return _JumpReLU.apply(a, threshold, bandwidth, closed)


def _keep_largest(r: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest entries in each row of the non-negative ``r``; ties at the last place: lower index first.

    ``torch.topk`` leaves the order of ties open, so it only supplies the k-th value.
    """
    if k >= r.shape[1]:
        return r
    last = r.detach().topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    keep = r >= last
    # surplus entries exist only where several equal the k-th value; zeros are kept at no cost, they stay 0
    tied = ((keep.sum(1, keepdim=True) > k) & (last > 0)).squeeze(1)
    if r.device.type != "cpu" or bool(tied.any()):
        rows = tied if r.device.type == "cpu" else slice(None)
        equal = r[rows] == last[rows]
        free = k - (r[rows] > last[rows]).sum(1, keepdim=True)
        keep[rows] = (r[rows] > last[rows]) | (equal & (equal.cumsum(1) <= free))
    return torch.where(keep, r, torch.zeros_like(r))
