"""Rules that turn pre-activations (n, m) into non-negative sparse codes (n, m).

All of them return their input where a latent is kept and 0 elsewhere, so that gradients reach the kept entries only.
"""

from __future__ import annotations

import torch


def relu(a: torch.Tensor) -> torch.Tensor:
    """z = max(a, 0)."""
    return torch.relu(a)


def topk(a: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest positive entries of each row (Gao et al. 2024); of equal ones the lower index wins."""
    return _keep_largest(torch.relu(a), min(k, a.shape[1]))


def batchtopk(a: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k n largest positive entries of the whole batch (Bussmann et al. 2024); used in training only."""
    r = torch.relu(a)
    return _keep_largest(r.reshape(1, -1), min(k, a.shape[1]) * a.shape[0]).reshape(a.shape)


def above(a: torch.Tensor, threshold: float) -> torch.Tensor:
    """z = a where a > threshold (>= 0), else 0: the inference rule of ``batchtopk``, independent of other rows."""
    return torch.where(a > threshold, a, torch.zeros_like(a))


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
