"""CPU kernels in numba: each row, and in the backward pass each latent, is worked through by one thread in one order.

Hence results do not depend on the number of threads. The functions are those of :mod:`biosae.sae.kernels.torch_any`,
whose docstrings hold the equations; here stands what is fast on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from biosae.sae.kernels.codes import Codes, Gradient
from biosae.sae.kernels.numba_select import FAST, dot, select_above, select_topk, threads
from biosae.sae.kernels.torch_any import linear

__all__ = ["adam_", "code_gradient", "decode", "latent_gradient", "linear", "select_above", "select_topk"]

ROW_COST = 8
"""Cost of a latent without entries, in entries; only balances the threads."""


# ------------------------------------------------------------------------------------------------ forward, backward


@njit(cache=True, parallel=True, fastmath=FAST)
def _decode(indptr, index, value, decoder, ends, out):
    n_prefixes, n, d = out.shape
    for i in prange(n):
        e, last = indptr[i], indptr[i + 1]
        for g in range(n_prefixes):
            target = out[g, i]
            if g == 0:
                target[:] = 0
            else:
                target[:] = out[g - 1, i]
            while e < last and index[e] < ends[g]:
                z = value[e]
                if z != 0:
                    atom = decoder[index[e]]
                    for t in range(d):
                        target[t] += z * atom[t]
                e += 1


@njit(cache=True, parallel=True, fastmath=FAST)
def _code_gradient(indptr, index, grads, decoder, ends, out):
    for i in prange(len(indptr) - 1):
        g = 0
        for e in range(indptr[i], indptr[i + 1]):
            while index[e] >= ends[g]:
                g += 1
            out[e] = dot(grads[g, i], decoder[index[e]])


@njit(cache=True)
def _by_latent(indptr, index, value, code_grad, offsets, order, row):
    """Counting sort of the entries that carry anything: ``offsets`` (m + 1), then entry and row of each place."""
    offsets[:] = 0
    for e in range(len(index)):
        offsets[index[e] + 1] += value[e] != 0 or code_grad[e] != 0
    for j in range(1, len(offsets)):
        offsets[j] += offsets[j - 1]
    at = offsets[:-1].copy()
    for i in range(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            if value[e] != 0 or code_grad[e] != 0:
                order[at[index[e]]] = e
                row[at[index[e]]] = i
                at[index[e]] += 1


@njit(cache=True, fastmath=FAST)
def _one_latent(j, first, last, order, row, value, code_grad, x, grads, g, decoder, extra, dec, enc):
    """Gradient of one latent's atom (projected) and encoder row into ``dec``, ``enc``; returns that of its bias."""
    d = len(dec)
    at, extra_dec, extra_enc, extra_bias = extra
    more = at[j]
    bias = np.float32(0)
    if more >= 0:
        dec[:] = extra_dec[more]
        enc[:] = extra_enc[more]
        bias = extra_bias[more]
    else:
        dec[:] = 0
        enc[:] = 0
    for place in range(first, last):
        z, slope = value[order[place]], code_grad[order[place]]
        residual, rows = grads[g, row[place]], x[row[place]]
        bias += slope
        for t in range(d):
            dec[t] += z * residual[t]
            enc[t] += slope * rows[t]
    atom = decoder[j]
    along = dot(dec, atom)
    for t in range(d):
        dec[t] -= along * atom[t]
    return bias


@njit(cache=True)
def _share(offsets, n_blocks):
    """Bounds of ``n_blocks`` runs of latents of about equal work."""
    m = len(offsets) - 1
    total = offsets[m] + ROW_COST * m
    bounds = np.empty(n_blocks + 1, np.int64)
    block = 0
    for j in range(m):
        while block <= n_blocks and (offsets[j] + ROW_COST * j) * n_blocks >= block * total:
            bounds[block] = j
            block += 1
    bounds[block:] = m
    return bounds


@njit(cache=True, parallel=True, fastmath=FAST)
def _latent_gradient(
    offsets, order, row, value, code_grad, x, grads, ends, decoder, extra, n_blocks, dec, enc, bias, sq
):
    bounds = _share(offsets, n_blocks)
    for block in prange(n_blocks):
        g = 0
        for j in range(bounds[block], bounds[block + 1]):
            while j >= ends[g]:
                g += 1
            bias[j] = _one_latent(
                j, offsets[j], offsets[j + 1], order, row, value, code_grad, x, grads, g, decoder, extra, dec[j], enc[j]
            )
            sq[j] = np.float64(dot(dec[j], dec[j])) + np.float64(dot(enc[j], enc[j])) + np.float64(bias[j]) ** 2


def decode(codes: Codes, decoder: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Reconstructions without bias by each prefix of the dictionary, (G, n, d)."""
    threads()
    out = torch.empty(len(ends), codes.n_rows, decoder.shape[1])
    _decode(*_arrays(codes), decoder.numpy(), np.asarray(ends), out.numpy())
    return out


def code_gradient(codes: Codes, grads: torch.Tensor, decoder: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Derivative of the loss by each code, (nnz,)."""
    threads()
    out = torch.empty(len(codes.indices))
    _code_gradient(
        codes.indptr.numpy(), codes.indices.numpy(), grads.numpy(), decoder.numpy(), np.asarray(ends), out.numpy()
    )
    return out


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
    """Gradient by atoms (projected), encoder rows and encoder biases."""
    m, d = decoder.shape
    indptr, index, value = _arrays(codes)
    offsets, order = np.empty(m + 1, np.int64), np.empty(len(index), np.int64)
    row = np.empty(len(index), np.int64)
    slopes = code_grads.numpy()
    _by_latent(indptr, index, value, slopes, offsets, order, row)
    at = np.full(m, -1, np.int32)
    more = (np.empty((0, d), np.float32), np.empty((0, d), np.float32), np.empty(0, np.float32))
    if extra is not None:
        latents, g = extra
        at[latents.numpy()] = np.arange(len(latents))
        more = (g.dec.numpy(), g.enc.numpy(), g.bias.numpy())
    out = out or Gradient.empty(decoder)
    _latent_gradient(
        offsets, order, row, value, slopes, x.numpy(), grads.numpy(), np.asarray(ends), decoder.numpy(), (at, *more),
        4 * threads(), out.dec.numpy(), out.enc.numpy(), out.bias.numpy(), out.square.numpy(),
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------ update


@njit(cache=True, parallel=True, fastmath=FAST)
def _adam(weight, grad, first, second, factor, rate, keep1, new1, keep2, new2, eps, debias, unit):
    """Adam with dense semantics: rows without gradient decay their moments and still move. Optional unit rows."""
    for j in prange(weight.shape[0]):
        w, g, m, v = weight[j], grad[j], first[j], second[j]
        square = np.float32(0)
        for t in range(len(w)):
            slope = factor * g[t]
            m[t] = keep1 * m[t] + new1 * slope
            v[t] = keep2 * v[t] + new2 * slope * slope
            w[t] -= rate * m[t] / (np.sqrt(v[t]) * debias + eps)
            square += w[t] * w[t]
        if unit:
            scale = np.float32(1) / max(np.sqrt(square), np.float32(1e-12))
            for t in range(len(w)):
                w[t] *= scale


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
    """One Adam step in place; see :func:`biosae.sae.kernels.torch_any.adam_`."""
    threads()
    f = np.float32
    tables = (t.detach().reshape(len(weight), -1).numpy() for t in (weight, grad, first, second))
    _adam(
        *tables, f(factor), f(rate / (1 - betas[0] ** step)), f(betas[0]), f(1 - betas[0]), f(betas[1]),
        f(1 - betas[1]), f(eps), f((1 - betas[1] ** step) ** -0.5), unit,
    )  # fmt: skip


def _arrays(codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return codes.indptr.numpy(), codes.indices.numpy(), codes.values.numpy()
