"""Numba kernels that choose codes: exact top-k by lane maxima, scores above a threshold, and the bfloat16 prefilter."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange

from biosae.sae.kernels.codes import Codes
from biosae.sae.kernels.torch_any import CHUNK, SPARE, linear, margin

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Float rules that let sums be vectorised; NaN and infinity keep their meaning."""
LANES = 256


def threads() -> int:
    """Numba works with as many threads as torch does."""
    n = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(n)
    return n


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
def dot(u, v):
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
                    score[kept] = dot(x[i], weight[j]) + bias[j]
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
            value[e] = dot(x[i], weight[index[e]]) + bias[index[e]]


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
