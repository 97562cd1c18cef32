"""Losses. Shapes: rows x and reconstructions (n, d), codes and pre-activations (n, m), decoder (m, d)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from biosae.errors import InputError
from biosae.sae.activations import abstopk, topk

SMALLEST_MASS = 1e-6
"""Masses are kept this far from 0 and 1 in :func:`distil_top_k`."""


def mse_sum(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """mean_i ||x_i - x_hat_i||^2: summed over the width, averaged over rows."""
    return (x - x_hat).square().sum(1).mean()


def l1_norm(z: torch.Tensor) -> torch.Tensor:
    """mean_i sum_j |z_ij|, for atoms of unit norm."""
    return z.abs().sum(1).mean()


def l1_atoms(z: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
    """mean_i sum_j |z_ij| ||d_j||, for atoms of any norm: no rescaling of a latent changes it (Anthropic 2024)."""
    return (z.abs() @ decoder.norm(dim=1)).mean()


def tanh_norm(z: torch.Tensor, decoder: torch.Tensor, *, scale: float = 4.0) -> torch.Tensor:
    """mean_i sum_j tanh(scale z_ij ||d_j||): nearly L0 for large codes, L1 for small ones (Anthropic, January 2025)."""
    return torch.tanh(scale * z * decoder.norm(dim=1)).sum(1).mean()


def l0_target(l0: torch.Tensor, k: int) -> torch.Tensor:
    """(mean_i L0_i / k - 1)^2: keeps the mean number of open latents at k (Rajamanoharan et al. 2024)."""
    return (l0.mean() / k - 1).square()


def auxk(
    residual: torch.Tensor,
    a: torch.Tensor,
    dead: torch.Tensor,
    decoder: torch.Tensor,
    k: int,
    *,
    signed: bool = False,
) -> torch.Tensor:
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
    signed
        Take the largest in size, with their signs, instead of the largest positive ones.

    Returns
    -------
    torch.Tensor
        Scalar; 0 where nothing is dead or all residual rows are equal (denominator < 1e-12).
    """
    if dead.numel() == 0 or k == 0:
        return a.new_zeros(())
    e = residual.detach()
    z = (abstopk if signed else topk)(a.index_select(1, dead), k)
    e_hat = z @ decoder.index_select(0, dead)
    spread = (e - e.mean(0)).square().sum(1).mean()
    loss = mse_sum(e, e_hat) / spread.clamp_min(1e-12)
    return torch.where(spread < 1e-12, torch.zeros_like(loss), loss)


@dataclass(frozen=True)
class TopLogits:
    """The K most likely classes of a teacher for each row: all of it that :func:`distil_top_k` needs."""

    log_probabilities: torch.Tensor
    """log P_T over all classes, of the K kept ones, (n, K)."""
    classes: torch.Tensor
    """Which they are, int64 (n, K)."""


def top_logits(logits: torch.Tensor, k: int = 32) -> TopLogits:
    """Keep a teacher's k most likely classes of each row; of equal ones the lower index.

    Parameters
    ----------
    logits
        (n, n_classes).
    k
        Classes kept, clipped to n_classes.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    return TopLogits(logits.log_softmax(1).gather(1, order), order)


@dataclass(frozen=True)
class Distillation:
    """Terms of :func:`distil_top_k`, means over rows."""

    total: torch.Tensor
    mass: torch.Tensor
    """KL between the Bernoulli masses that teacher and student give to the teacher's top classes."""
    conditional: torch.Tensor
    """P_T(T) times the tempered KL within these classes."""


def distil_top_k(
    logits: torch.Tensor, teacher: TopLogits, *, temperature: float = 1.0, squared_factor: bool = False
) -> Distillation:
    """Decoupled, tempered top-K distillation of a truncated teacher (Amini et al. 2025, arXiv 2511.23404).

    With T the teacher's K classes and P(T) the mass on them, KL(P_T || P_S) is the sum of KL(Bern(P_T(T)) ||
    Bern(P_S(T))), P_T(T) times the KL within T and (1 - P_T(T)) times the KL within the rest. The last is not known of
    a truncated teacher and dropped; the second alone is tempered, so that the masses stay those of the models::

        L = KL_Bern + P_T(T) KL(softmax(l_T / tau)[T] || softmax(l_S / tau)[T])

    At tau = 1 it is at most the full KL, with equality where the tails agree. Add a cross-entropy on hard labels where
    there are any; its weight is not published.

    Parameters
    ----------
    logits
        Of the student, over all classes, (n, n_classes).
    teacher
        From :func:`top_logits`.
    temperature
        tau > 0.
    squared_factor
        Multiply the second term by tau^2, as one other implementation does.

    Raises
    ------
    InputError
        If the temperature is not positive or the tables have different numbers of rows.
    """
    if not temperature > 0:
        raise InputError(f"temperature={temperature!r} must be positive")
    if len(logits) != len(teacher.classes):
        raise InputError(f"the student has {len(logits)} rows, the teacher {len(teacher.classes)}: match them by id")
    picked = logits.gather(1, teacher.classes)
    whole = logits.logsumexp(1)
    mass_t = teacher.log_probabilities.logsumexp(1).exp()
    mass_s = (picked.logsumexp(1) - whole).exp()
    p, q = (mass.clamp(SMALLEST_MASS, 1 - SMALLEST_MASS) for mass in (mass_t, mass_s))
    mass = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    ours, theirs = ((part / temperature).log_softmax(1) for part in (picked, teacher.log_probabilities))
    share = theirs.exp()
    conditional = mass_t * torch.where(share > 0, share * (theirs - ours), torch.zeros_like(share)).sum(1)
    if squared_factor:
        conditional = conditional * temperature**2
    return Distillation((mass + conditional).mean(), mass.mean(), conditional.mean())
