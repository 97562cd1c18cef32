"""CPU kernels in numba: each row, and in the backward pass each latent, is worked through by one thread in one order.

Hence results do not depend on the number of threads. The functions are those of :mod:`biosae.sae.kernels.torch_any`,
whose docstrings hold the equations; here stands what is fast on a CPU.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange

from biosae.sae.kernels.codes import Codes, Gradient
from biosae.sae.kernels.torch_any import CHUNK, SPARE, linear, margin

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Float rules that let sums be vectorised; NaN and infinity keep their meaning."""
LANES = 256
ROW_COST = 8
"""Cost of a latent without entries, in entries; only balances the threads."""


def threads() -> int:
    """Numba works with as many threads as torch does."""
    n = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(n)
    return n


# ------------------------------------------------------------------------------------------------------ selection


@njit(cache=True)
def _kth_largest(values, count, k, heap):
    """k-th largest of the positive ones among ``values[:count]``, 0 if there are fewer; min-heap of size k."""
    size = 0
    for position in range(count):
        value = values[position]
        if value <= 0:
            continue
        if size < k:
            child = size
            size += 1
            while child > 0 and heap[(child - 1) >> 1] > value:
                heap[child] = heap[(child - 1) >> 1]
                child = (child - 1) >> 1
            heap[child] = value
        elif value > heap[0]:
            parent = 0
            while True:
                child = 2 * parent + 1
                if child >= k:
                    break
                if child + 1 < k and heap[child + 1] < heap[child]:
                    child += 1
                if heap[child] >= value:
                    break
                heap[parent] = heap[child]
                parent = child
            heap[parent] = value
    return heap[0] if size == k else heap.dtype.type(0)


@njit(cache=True, fastmath={"nnan", "nsz"})
def _lane_maxima(a, lanes):
    """Maximum of a[l], a[l + W], ... in lane l. Without the rule for NaN (which is never chosen) this is vectorised."""
    width = len(lanes)
    whole = len(a) // width * width
    lanes[:] = a[:width]
    for start in range(width, whole, width):
        part = a[start : start + width]
        for lane in range(width):
            lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
    for j in range(whole, len(a)):
        lanes[j - whole] = a[j] if a[j] > lanes[j - whole] else lanes[j - whole]


@njit(cache=True)
def _candidates(a, k, lanes, used, heap, index):
    """Indices, rising, of the positive entries of ``a`` that are at least its k-th largest lane maximum; their number.

    Lane l holds a[l], a[l + W], ...; k lanes have a maximum >= t, so the k-th largest entry is >= t as well: exact.
    ``index`` has room for one more than the row.
    """
    m, width = len(a), len(lanes)
    count = 0
    if m < 2 * width:
        for j in range(m):
            index[count] = j
            count += a[j] > 0
        return count
    _lane_maxima(a, lanes)
    least = _kth_largest(lanes, width, k, heap)
    n_used = 0
    for lane in range(width):
        used[n_used] = lane
        n_used += (lanes[lane] >= least) & (lanes[lane] > 0)
    whole = m // width * width
    for start in range(0, whole, width):
        for u in range(n_used):
            j = start + used[u]
            index[count] = j
            count += (a[j] >= least) & (a[j] > 0)
    for j in range(whole, m):
        index[count] = j
        count += (a[j] >= least) & (a[j] > 0)
    return count


@njit(cache=True)
def _keep(index, value, count, k, heap, out_index, out_value):
    """Write the k largest of ``count`` positive candidates, in the order given; of equal ones the earlier; 0 beyond."""
    least = _kth_largest(value, count, k, heap) if count > k else 0
    free = k
    for c in range(count):
        if value[c] > least:
            free -= 1
    kept = 0
    for c in range(count):
        if value[c] > least or (value[c] == least and free > 0 and value[c] > 0):
            if value[c] == least:
                free -= 1
            out_index[kept] = index[c]
            out_value[kept] = value[c]
            kept += 1
    last = out_index[kept - 1] if kept else 0
    for c in range(kept, k):
        out_index[c] = last
        out_value[c] = 0


@njit(cache=True, parallel=True)
def _topk(a, k, n_blocks, index, value):
    n, m = a.shape
    for block in prange(n_blocks):
        width = LANES
        while width < 4 * k:
            width *= 2
        lanes, used, heap = np.empty(width, a.dtype), np.empty(width + 1, np.int32), np.empty(k, a.dtype)
        found, score = np.empty(m + 1, np.int32), np.empty(m, a.dtype)
        for i in range(block * n // n_blocks, (block + 1) * n // n_blocks):
            count = _candidates(a[i], k, lanes, used, heap, found)
            for c in range(count):
                score[c] = a[i, found[c]]
            _keep(found, score, count, k, heap, index[i], value[i])


@njit(cache=True, fastmath=FAST)
def _dot(u, v):
    total = np.float32(0)
    for t in range(len(u)):
        total += u[t] * v[t]
    return total


@njit(cache=True, parallel=True)
def _topk_rescored(bits, k, spare, x, weight, bias, n_blocks, index, value):
    """Candidates by the sign-and-magnitude bits of bfloat16 scores (int16: their order is that of positive floats)."""
    n, m = bits.shape
    for block in prange(n_blocks):
        wanted = min(k + spare, m)
        width = LANES
        while width < 4 * wanted:
            width *= 2
        lanes, coarse, heap = np.empty(width, bits.dtype), np.empty(wanted, bits.dtype), np.empty(k, np.float32)
        used, found = np.empty(width + 1, np.int32), np.empty(m + 1, np.int32)
        score, low = np.empty(m, np.float32), np.empty(m, bits.dtype)
        for i in range(block * n // n_blocks, (block + 1) * n // n_blocks):
            count = _candidates(bits[i], wanted, lanes, used, coarse, found)
            for c in range(count):
                low[c] = bits[i, found[c]]
            least = _kth_largest(low, count, wanted, coarse)
            kept = 0
            for c in range(count):  # every tie of the last place is scored again
                if low[c] >= least:
                    j = found[c]
                    found[kept] = j
                    score[kept] = _dot(x[i], weight[j]) + bias[j]
                    kept += 1
            _keep(found, score, kept, k, heap, index[i], value[i])


@njit(cache=True, parallel=True)
def _count_above(a, threshold, slack, counts):
    for i in prange(a.shape[0]):
        found = 0
        for j in range(a.shape[1]):
            found += a[i, j] > threshold[j] - slack[i]
        counts[i] = found


@njit(cache=True, parallel=True)
def _fill_above(a, threshold, slack, start, index, value):
    for i in prange(a.shape[0]):
        at = start[i]
        for j in range(a.shape[1]):
            if a[i, j] > threshold[j] - slack[i]:
                index[at] = j
                value[at] = a[i, j]
                at += 1


@njit(cache=True, parallel=True)
def _rescore(indptr, index, x, weight, bias, value):
    for i in prange(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            value[e] = _dot(x[i], weight[index[e]]) + bias[index[e]]


def select_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, *, low: torch.Tensor | None = None
) -> Codes:
    """The k largest positive scores of each row; see :func:`biosae.sae.kernels.torch_any.select_topk`."""
    n, m = len(x), len(weight)
    k, blocks = min(k, m), 4 * threads()
    index, value = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        if low is None:
            _topk(linear(x[rows], weight, bias).numpy(), k, blocks, index[rows], value[rows])
        else:
            scores = linear(x[rows].to(low.dtype), low, bias.to(low.dtype)).view(torch.int16).numpy()
            _topk_rescored(
                scores, k, SPARE, x[rows].numpy(), weight.numpy(), bias.numpy(), blocks, index[rows], value[rows]
            )
    return Codes(torch.arange(n + 1) * k, torch.from_numpy(index.ravel()), torch.from_numpy(value.ravel()))


def select_above(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    low: torch.Tensor | None = None,
) -> Codes:
    """All scores above a threshold; see :func:`biosae.sae.kernels.torch_any.select_above`."""
    threads()
    limit = np.full(len(weight), np.asarray(threshold, np.float32))
    counts, indices, values = [np.zeros(1, np.int64)], [], []
    slack = margin(x, weight, bias, threshold).numpy() if low is not None else np.zeros(len(x), np.float32)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        if low is None:
            scores = linear(x[rows], weight, bias).numpy()
        else:
            scores = linear(x[rows].to(low.dtype), low, bias.to(low.dtype)).float().numpy()
        count = np.empty(len(scores), np.int64)
        _count_above(scores, limit, slack[rows], count)
        at = np.concatenate([[0], np.cumsum(count)])
        index, value = np.empty(at[-1], np.int32), np.empty(at[-1], np.float32)
        _fill_above(scores, limit, slack[rows], at, index, value)
        if low is not None:
            _rescore(at, index, x[rows].numpy(), weight.numpy(), bias.numpy(), value)
        counts.append(count)
        indices.append(index)
        values.append(value)
    indptr = np.cumsum(np.concatenate(counts))
    codes = Codes(*(torch.from_numpy(part) for part in (indptr, np.concatenate(indices), np.concatenate(values))))
    if low is None:
        return codes
    bound = torch.from_numpy(limit)[codes.indices.long()]
    return codes.keep(codes.values > bound)


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
            out[e] = _dot(grads[g, i], decoder[index[e]])


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
    along = _dot(dec, atom)
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
            sq[j] = np.float64(_dot(dec[j], dec[j])) + np.float64(_dot(enc[j], enc[j])) + np.float64(bias[j]) ** 2


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
