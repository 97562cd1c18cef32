"""Loss and gradient of one batch, through active latents alone (:func:`sparse`) or by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from biosae.sae import activations, objectives
from biosae.sae.distributed import ALONE, Alone
from biosae.sae.kernels.codes import Codes, Gradient
from biosae.sae.methods.base import Loss, Method, Now
from biosae.sae.model import SparseAutoencoder
from biosae.sae.sparse_ops import auxiliary, select_batchtopk


@dataclass(frozen=True)
class Wanted:
    """What the loss of this step is made of."""

    k: int
    """Latents a row, after annealing."""
    weight: float
    """Weight of the sparsity penalty, after annealing."""
    dead: torch.Tensor
    """Dead latents of this process that AuxK may use, int64."""
    aux_k: int
    aux_alpha: float
    some_dead: bool = False
    """Whether another process has dead latents."""
    guess: float = 0.0
    """Where ``batchtopk`` looks for candidates."""


@dataclass
class Outcome:
    """Gradient of a batch and what is worth knowing about it."""

    latents: Gradient
    b_dec: torch.Tensor
    """(d,)."""
    threshold: torch.Tensor | None
    """By the thresholds of ``jumprelu``, (m,)."""
    fired: torch.Tensor
    """Bool (m,): latents active in this batch."""
    residual: torch.Tensor
    """x_hat - x, (n, d), by the whole dictionary."""
    active: int | torch.Tensor
    """Number of active entries."""
    loss: torch.Tensor
    """Whole loss of the batch."""
    cut: float = 0.0
    """Smallest kept value of ``batchtopk``."""


@dataclass
class Taken:
    """Gradient of a batch of a method (:func:`by_autograd`); as :class:`Outcome` for the rest."""

    grads: dict[str, torch.Tensor]
    fired: torch.Tensor
    residual: torch.Tensor
    target: torch.Tensor
    """What the residual is about, (n, d)."""
    active: torch.Tensor
    loss: torch.Tensor
    found: Loss


def sparse(
    model: SparseAutoencoder,
    x: torch.Tensor,
    wanted: Wanted,
    ops: ModuleType,
    *,
    low: torch.Tensor | None = None,
    comm: Alone = ALONE,
    room: Gradient | None = None,
) -> Outcome:
    """Gradient of a batch of normalised rows, with work in proportion to the active latents once they are chosen.

    With R_g = x_hat_g - x for the prefix ends m_1 < ... < m_G (one for all but ``matryoshka``), the derivative of
    mean_g mse by the atoms of group h is z^T sum_{g >= h} 2 R_g / (n G).

    Parameters
    ----------
    low
        bfloat16 copy of W_enc for the prefilter.
    room
        Memory for the gradient of the latents.
    """
    encoder, bias, decoder = model.W_enc.detach(), model.b_enc.detach(), model.W_dec.detach()
    centred = x - model.b_dec.detach()
    n, ends = comm.rows(len(x)), model.ends
    codes, raw, cut = _select(model, centred, wanted, ops, low, comm)
    # tables of n x d cost as much as the sparse work: few are made, and the factor goes to the codes instead
    residual = comm.reconstruction(ops.decode(codes, decoder, ends)).sub_(centred)
    scale = 2 / (n * len(ends))
    flat = residual.flatten()
    loss = comm.over_rows(flat @ flat) / (n * len(ends))
    summed = residual.flip(0).cumsum(0).flip(0) if len(ends) > 1 else residual
    by_code = ops.code_gradient(codes, summed, decoder, ends) * scale
    opened = codes.values > 0
    slopes = by_code * opened
    active = opened.sum()
    by_threshold = None
    if model.architecture == "relu":
        slopes = slopes + opened * (wanted.weight / n)
        loss = loss + wanted.weight / n * comm.over_rows(comm.over_latents(codes.values.sum()))
    elif model.architecture == "jumprelu":
        share = comm.over_rows(comm.over_latents(active.float())) / n / wanted.k - 1
        loss = loss + wanted.weight * share.square()
        latent = codes.indices.long()
        threshold = model.threshold.detach()
        near = (raw - threshold[latent]).abs() < model.bandwidth / 2
        pull = threshold[latent] * by_code + 2 * wanted.weight * share / (wanted.k * n)
        by_threshold = torch.zeros_like(threshold).index_add_(0, latent, near * -pull / model.bandwidth)
    extra = None
    if wanted.aux_k and (len(wanted.dead) or wanted.some_dead):
        dead = wanted.dead
        aux, more = auxiliary(
            ops, centred, residual[-1], encoder[dead], bias[dead], decoder[dead],
            k=wanted.aux_k, alpha=wanted.aux_alpha, comm=comm,
        )  # fmt: skip
        loss, extra = loss + aux, (dead, more)
    scaled = Codes(codes.indptr, codes.indices, codes.values * scale)
    found = ops.latent_gradient(scaled, slopes, centred, summed, ends, decoder, extra=extra, out=room)
    b_dec = scale * summed[0].sum(0) - comm.over_latents(encoder.T @ found.bias)
    fired = torch.zeros(len(decoder), dtype=torch.uint8, device=x.device)
    fired = fired.scatter_reduce_(0, codes.indices.long(), opened.to(torch.uint8), "amax").bool()
    return Outcome(found, b_dec, by_threshold, fired, residual[-1], active, loss, cut)


def _select(
    model: SparseAutoencoder, x: torch.Tensor, wanted: Wanted, ops: ModuleType, low: torch.Tensor | None, comm: Alone
) -> tuple[Codes, torch.Tensor | None, float]:
    """Codes of centred rows by the training rule; for ``jumprelu`` also the pre-activations of the entries."""
    weight, bias = model.W_enc.detach(), model.b_enc.detach()
    if model.architecture == "topk":
        return comm.top_rows(ops.select_topk(x, weight, bias, wanted.k, low=low), wanted.k), None, 0.0
    if model.architecture in ("batchtopk", "matryoshka"):
        count = min(wanted.k, len(weight) * comm.shards) * comm.rows(len(x))
        codes, cut = select_batchtopk(ops, x, weight, bias, count, wanted.guess, low=low, comm=comm)
        return codes, None, cut
    if model.architecture == "relu":
        return ops.select_above(x, weight, bias, 0.0, low=low), None, 0.0
    threshold = model.threshold.detach()
    codes = ops.select_above(x, weight, bias, threshold - model.bandwidth / 2, low=low)
    raw = codes.values
    opened = raw > threshold[codes.indices.long()]
    return Codes(codes.indptr, codes.indices, torch.where(opened, raw, 0.0)), raw, 0.0


def dense(model: SparseAutoencoder, x: torch.Tensor, wanted: Wanted) -> Outcome:
    """The same by autograd on tables of n x m: the reference, and the faster way while most codes are active."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.enable_grad():
        a = model.preactivations(x)
        penalty = 0.0
        if model.architecture == "jumprelu":
            z, l0 = activations.jumprelu(a, model.threshold, model.bandwidth)
            penalty = wanted.weight * objectives.l0_target(l0, wanted.k)
        else:
            rule = activations.topk if model.architecture == "topk" else activations.batchtopk
            z = activations.relu(a) if model.architecture == "relu" else rule(a, wanted.k)
            if model.architecture == "relu":
                penalty = wanted.weight * objectives.l1_norm(z)
        starts = (0, *model.ends[:-1])
        x_hat, prefixes = model.b_dec, []
        for start, end in zip(starts, model.ends, strict=True):
            x_hat = x_hat + z[:, start:end] @ model.W_dec[start:end]
            prefixes.append(objectives.mse_sum(x, x_hat))
        loss = torch.stack(prefixes).mean() + penalty
        if wanted.aux_k and len(wanted.dead):
            loss = loss + wanted.aux_alpha * objectives.auxk(x - x_hat, a, wanted.dead, model.W_dec, wanted.aux_k)
        loss.backward()
    dec, enc, bias = model.W_dec.grad, model.W_enc.grad, model.b_enc.grad
    decoder = model.W_dec.detach()
    dec.addcmul_(torch.einsum("md,md->m", dec, decoder)[:, None], decoder, value=-1)
    square = dec.square().sum(1).double() + enc.square().sum(1).double() + bias.square().double()
    opened = z.detach() > 0
    return Outcome(
        Gradient(dec, enc, bias, square), model.b_dec.grad,
        model.threshold.grad if model.architecture == "jumprelu" else None,
        opened.any(0), (x_hat - x).detach(), opened.sum(), loss.detach(),
    )  # fmt: skip


def by_autograd(model: Method, x: torch.Tensor, now: Now) -> Taken:
    """Gradient of a batch of normalised rows, whatever the method."""
    for parameter in model.parameters():
        parameter.requires_grad_(True).grad = None
    with torch.enable_grad():
        found = model.loss(x, now)
        found.total.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    if model.unit_atoms:
        atoms = model.W_dec.detach()
        dec = grads["W_dec"]
        dec.addcmul_(torch.einsum("md,md->m", dec, atoms)[:, None], atoms, value=-1)
    opened = found.z.detach() != 0
    target = x if found.target is None else found.target.detach()
    active = opened.sum() * (len(x) / len(opened))  # of two tables: latents of a row of either
    return Taken(grads, opened.any(0), found.residual.detach(), target, active, found.total.detach(), found)


@torch.no_grad()
def reconstruct(
    model: SparseAutoencoder, x: torch.Tensor, wanted: Wanted, ops: ModuleType, *, comm: Alone = ALONE
) -> torch.Tensor:
    """Reconstructions (n, d) of normalised rows, with codes by the training rule."""
    codes, _, _ = _select(model, x - model.b_dec, wanted, ops, None, comm)
    return comm.reconstruction(ops.decode(codes, model.W_dec.detach(), model.ends))[-1] + model.b_dec


@torch.no_grad()
def missed(model: SparseAutoencoder, x: torch.Tensor, wanted: Wanted, ops: ModuleType, *, comm: Alone = ALONE) -> float:
    """Share of the active (row, latent) pairs of a batch that the bfloat16 prefilter does not find."""
    centred, pairs = x - model.b_dec, []
    for low in (None, model.W_enc.detach().bfloat16()):
        codes, _, _ = _select(model, centred, wanted, ops, low, comm)
        pairs.append((codes.rows() * len(model.W_enc) + codes.indices)[codes.values > 0])
    exact, found = pairs
    return comm.total(int((~torch.isin(exact, found)).sum())) / max(comm.total(len(exact)), 1)
