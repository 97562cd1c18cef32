"""The kernels in plain torch: any device. Shapes: rows x (n, d), weights (m, d), biases (m,), prefix ends (G,).

Scores a = x W^T + b are made for a chunk of rows at a time; what is kept of them are codes. ``grads`` is
the derivative of the loss by the reconstruction, (G, n, d): ``grads[g]`` is summed over all prefixes that contain the
latents of group g, which are those with ends[g - 1] <= j < ends[g].
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from biosae.sae.kernels.codes import Codes, Gradient

CHUNK = 512
"""Rows of one encoder product; its result stays in the cache, and no table of n x m is ever held."""
CHUNK_BYTES = 2**30
"""On an accelerator a chunk is as many rows as this many bytes of scores."""
SPARE = 8
"""Candidates beyond k that the bfloat16 prefilter passes on to the exact score."""


@cache
def _onednn():
    """oneDNN's float32 product, about twice as fast as MKL's on some processors; None where this torch has none.

    The operator is private to torch, so it is tried once on a small product before it is trusted.
    """
    try:
        op = torch.ops.mkldnn._linear_pointwise
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((4, 8), (16, 8), (16,)))
        good = torch.allclose(op(x, weight, bias, "none", [], ""), F.linear(x, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return op if good else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, (n, m), in the type of the weight."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) and (op := _onednn()) is not None:
        return op(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def margin(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """How far below ``threshold`` the bfloat16 score of a row may lie while the exact one is above it, (n,).

    Six standard errors of the products of rounded numbers, sqrt(sum_t (x_t w_t)^2) <= |x|_4 |w|_4 times 7/6 * 2^-9 (two
    factors, each with 0.83 * 2^-9), at most their bound 2^-7 |x| |w|; and the rounding of the bias and of the score.
    """
    fourth = x.square().square().sum(1).pow(0.25) * weight.square().square().sum(1).max().pow(0.25)
    products = torch.minimum(7 * 2.0**-9 * fourth, 2.0**-7 * x.norm(dim=1) * weight.norm(dim=1).max())
    level = torch.as_tensor(threshold).abs().max() + 2 * bias.abs().max()
    return 1.01 * products + 2.0**-8 * level


def chunk_rows(x: torch.Tensor, n_latents: int) -> int:
    """Rows of one chunk of scores."""
    return CHUNK if x.device.type == "cpu" else max(1, CHUNK_BYTES // (4 * n_latents))


def select_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, *, low: torch.Tensor | None = None
) -> Codes:
    """The k largest positive scores of each row; of equal ones the lower latent. Each row has min(k, m) entries.

    Parameters
    ----------
    low
        bfloat16 copy of ``weight``: it ranks all latents, and the best k + 8 are scored again in float32. A latent of
        the true top k that bfloat16 ranks lower is missed.
    """
    n, m = len(x), len(weight)
    k = min(k, m)
    indices, values = [], []
    for part in x.split(chunk_rows(x, m)):
        if low is None:
            index, value = largest_of_rows(linear(part, weight, bias), k)
        else:
            scores = linear(part.to(low.dtype), low, bias.to(low.dtype))
            found = scores.topk(min(k + SPARE, m), dim=1, sorted=False).indices.sort(1).values
            exact = torch.cat(
                [
                    torch.einsum("nkd,nd->nk", weight[index], rows)
                    for index, rows in zip(found.split(64), part.split(64), strict=True)
                ]
            )
            place, value = largest_of_rows(exact + bias[found], k)
            index = found.gather(1, place)
        indices.append(index.int())
        values.append(value)
    indptr = torch.arange(n + 1, device=x.device) * k
    return Codes(indptr, torch.cat(indices).flatten(), torch.cat(values).flatten())


def largest_of_rows(a: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (rising) and values of the k largest positive entries a row; of equal ones the lower place."""
    value, index = a.float().topk(k, dim=1, sorted=False)
    last = value.amin(1, keepdim=True)
    if k < a.shape[1]:
        # torch.topk leaves open which of several equal entries it takes: make it the first ones
        free = k - (value > last).sum(1, keepdim=True)
        equal = a == last
        rows = ((equal.sum(1, keepdim=True) > free) & (last > 0)).squeeze(1)
        if a.device.type != "cpu" or bool(rows.any()):
            rows = rows if a.device.type == "cpu" else slice(None)
            keep = (a[rows] > last[rows]) | (equal[rows] & (equal[rows].cumsum(1) <= free[rows]))
            index[rows] = keep.int().topk(k, dim=1, sorted=False).indices
    index = index.sort(1).values
    return index, a.gather(1, index).float().clamp_min(0)


def select_above(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    low: torch.Tensor | None = None,
) -> Codes:
    """All scores above ``threshold``, a number or one per latent (m,); values are the scores themselves.

    With ``low`` latents are prefiltered in bfloat16 with the slack of :func:`margin` and scored again.
    """
    counts, indices, values = [], [], []
    for part in x.split(chunk_rows(x, len(weight))):
        if low is None:
            scores = linear(part, weight, bias)
            row, column = (scores > threshold).nonzero(as_tuple=True)
            value = scores[row, column]
        else:
            coarse = linear(part.to(low.dtype), low, bias.to(low.dtype)).float()
            row, column = (coarse > threshold - margin(part, weight, bias, threshold)[:, None]).nonzero(as_tuple=True)
            value = (part[row] * weight[column]).sum(1) + bias[column]
            limit = threshold[column] if isinstance(threshold, torch.Tensor) and threshold.ndim else threshold
            row, column, value = (t[value > limit] for t in (row, column, value))
        counts.append(torch.bincount(row, minlength=len(part)))
        indices.append(column.int())
        values.append(value)
    indptr = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return Codes(indptr, torch.cat(indices), torch.cat(values))


def _bags(codes: Codes, ends: tuple[int, ...]) -> torch.Tensor:
    """Start of the entries of row i and group g, int64 (n G,), rows first."""
    if len(ends) == 1:
        return codes.indptr[:-1]
    group = torch.bucketize(codes.indices, torch.tensor(ends, device=codes.indices.device), right=True)
    key = codes.rows() * len(ends) + group
    return torch.searchsorted(key, torch.arange(codes.n_rows * len(ends), device=key.device))


def decode(codes: Codes, decoder: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Reconstructions without bias by each prefix, (G, n, d): out[g, i] = sum of z_ij D_j over j < ends[g]."""
    parts = F.embedding_bag(
        codes.indices.long(), decoder, _bags(codes, ends), mode="sum", per_sample_weights=codes.values
    )
    parts = parts.view(codes.n_rows, len(ends), -1).transpose(0, 1)
    return parts.cumsum(0) if len(ends) > 1 else parts


def code_gradient(codes: Codes, grads: torch.Tensor, decoder: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Derivative of the loss by each code, (nnz,): <grads[g, i], D_j> with g the group of latent j."""
    weights = codes.values.detach().clone().requires_grad_()
    with torch.enable_grad():
        parts = F.embedding_bag(
            codes.indices.long(), decoder.detach(), _bags(codes, ends), mode="sum", per_sample_weights=weights
        )
    flat = grads.transpose(0, 1).reshape(parts.shape)
    return torch.autograd.grad(parts, weights, flat)[0]


def latent_gradient(
    codes: Codes,
    code_grads: torch.Tensor,
    x: torch.Tensor,
    grads: torch.Tensor,
    ends: tuple[int, ...],
    decoder: torch.Tensor,
    *,
    extra: tuple[torch.Tensor, Gradient] | None = None,
    out: Gradient | None = None,
) -> Gradient:
    """Gradient by atoms, encoder rows and encoder biases; only entries that are not zero are touched.

    dec_j = sum_i z_ij grads[g, i] less its part along the unit atom D_j, enc_j = sum_i s_ij x_i, bias_j = sum_i s_ij.

    Parameters
    ----------
    code_grads
        s, derivative of the loss by each pre-activation, (nnz,).
    x
        Rows minus b_dec.
    extra
        Latents and what is to be added to their gradients (the auxiliary loss).
    out
        Room to write to; given back.
    """
    m = len(decoder)
    order = codes.indices.argsort(stable=True)
    latents, rows = codes.indices[order].long(), codes.rows()[order]
    starts = torch.searchsorted(latents, torch.arange(m, device=latents.device))
    group = torch.bucketize(latents, torch.tensor(ends, device=latents.device), right=True) if len(ends) > 1 else 0
    slopes = code_grads[order]
    dec = F.embedding_bag(
        group * codes.n_rows + rows, grads.flatten(0, 1), starts, mode="sum", per_sample_weights=codes.values[order]
    )
    enc = F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=slopes)
    bias = torch.zeros(m, device=x.device).index_add_(0, latents, slopes)
    if extra is not None:
        more, g = extra
        dec.index_add_(0, more, g.dec)
        enc.index_add_(0, more, g.enc)
        bias.index_add_(0, more, g.bias)
    dec.addcmul_(torch.einsum("md,md->m", dec, decoder)[:, None], decoder, value=-1)
    square = dec.square().sum(1).double() + enc.square().sum(1).double() + bias.square().double()
    return Gradient(dec, enc, bias, square)


def adam_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    factor: torch.Tensor,
    unit: bool = False,
) -> None:
    """One Adam step in place (Kingma & Ba 2015) with dense semantics: idle rows decay their moments and still move.

    Parameters
    ----------
    weight, grad, first, second
        Parameter, its gradient and its two moments, of one shape.
    step
        Number of this step, from 1 on.
    factor
        Scalar tensor that multiplies the gradient (clipping).
    unit
        Bring the rows to unit norm afterwards.
    """
    grad = grad * factor
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    divisor = second.sqrt().mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
    weight.addcdiv_(first, divisor, value=-rate / (1 - betas[0] ** step))
    if unit:
        weight.div_(weight.norm(dim=1, keepdim=True).clamp_min(1e-12))
