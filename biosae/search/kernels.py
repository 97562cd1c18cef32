"""Exact nearest rows, compiled: the best n of a corpus for each query, equal scores by lower row.

Every score is a float64 sum over columns in ascending order. Products of two float32 numbers are exact in float64, so
that a score has the same bits however rows are blocked and however many threads run.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

COSINE, DOT, EUCLIDEAN, JACCARD = range(4)
TILE = 8192
"""Corpus rows whose sums are kept in cache at a time."""


@njit(cache=True, inline="always")
def _score(dot, a, b, metric):
    """Similarity from the scalar product; a, b: norms (cosine), squared norms (Euclidean), counts (Jaccard)."""
    if metric == COSINE:
        scale = a * b
        return dot / scale if scale > 0 else 0.0
    if metric == EUCLIDEAN:
        return -np.sqrt(max(a + b - 2.0 * dot, 0.0))
    if metric == JACCARD:
        union = a + b - dot
        return dot / union if union > 0 else 0.0
    return dot


@njit(cache=True, inline="always")
def _barred(groups, query_groups, row, query):
    for g in range(groups.shape[0]):  # noqa: SIM110 (compiled)
        if groups[g, row] == query_groups[g, query]:
            return True
    return False


@njit(cache=True, inline="always")
def _worse(scores, rows, i, j):
    """Whether entry i ranks behind entry j."""
    return scores[i] < scores[j] or (scores[i] == scores[j] and rows[i] > rows[j])


@njit(cache=True)
def _push(scores, rows, filled, score, row):
    """Add an entry to a heap whose root ranks last; returns how many it holds. Full: the root is replaced."""
    n = len(scores)
    if filled < n:
        i = filled
        scores[i], rows[i] = score, row
        while i > 0:
            parent = (i - 1) // 2
            if not _worse(scores, rows, i, parent):
                break
            scores[i], scores[parent] = scores[parent], scores[i]
            rows[i], rows[parent] = rows[parent], rows[i]
            i = parent
        return filled + 1
    scores[0], rows[0] = score, row
    _sink(scores, rows, 0, n)
    return n


@njit(cache=True)
def _sink(scores, rows, i, n):
    while True:
        child = 2 * i + 1
        if child >= n:
            return
        if child + 1 < n and _worse(scores, rows, child + 1, child):
            child += 1
        if not _worse(scores, rows, child, i):
            return
        scores[i], scores[child] = scores[child], scores[i]
        rows[i], rows[child] = rows[child], rows[i]
        i = child


@njit(cache=True, parallel=True)
def unheap(scores, rows, filled):
    """Turn the heap of every query into its ranking, best first; what is not filled becomes -1 and NaN."""
    for q in prange(len(filled)):
        for last in range(filled[q] - 1, 0, -1):
            scores[q, 0], scores[q, last] = scores[q, last], scores[q, 0]
            rows[q, 0], rows[q, last] = rows[q, last], rows[q, 0]
            _sink(scores[q], rows[q], 0, last)
        rows[q, filled[q] :] = -1
        scores[q, filled[q] :] = np.nan


@njit(cache=True, parallel=True)
def sparse_search(ptr, local, value, side, n_rows, queries, query_side, metric, groups, query_groups, scores, rows):
    """Fill the heaps of all queries from a corpus of posting lists.

    ``ptr`` (tiles, m + 1): where the entries of a latent within a tile of :data:`TILE` rows start in ``local`` (row
    within the tile) and ``value``; ``queries`` = (indptr, index, value); ``groups`` (rules, n_rows), ``query_groups``
    (rules, queries): a row with the group of the query is passed over. Returns entries of each heap.
    """
    indptr, index, weight = queries
    n_queries, n = scores.shape
    filled = np.zeros(n_queries, np.int64)
    for q in prange(n_queries):
        sums = np.zeros(min(TILE, n_rows), np.float64)
        best, best_rows = scores[q], rows[q]
        held = 0
        for tile in range(ptr.shape[0]):
            first = tile * TILE
            size = min(TILE, n_rows - first)
            for e in range(indptr[q], indptr[q + 1]):
                w = np.float64(weight[e])
                for t in range(ptr[tile, index[e]], ptr[tile, index[e] + 1]):
                    sums[local[t]] += w * np.float64(value[t])
            for r in range(size):
                dot = sums[r]
                sums[r] = 0.0
                if held == n:
                    if dot == 0.0 and metric != EUCLIDEAN and best[0] >= 0.0:
                        continue
                    score = _score(dot, query_side[q], side[first + r], metric)
                    if score <= best[0]:
                        continue
                else:
                    score = _score(dot, query_side[q], side[first + r], metric)
                if not _barred(groups, query_groups, first + r, q):
                    held = _push(best, best_rows, held, score, first + r)
        filled[q] = held
    return filled


@njit(cache=True, parallel=True)
def dense_search(
    screen, slack, tiny, corpus, side, norm, first, queries, query_side, query_norm, metric, groups, query_groups,
    scores, rows, filled,
):  # fmt: skip
    """Go on filling the heaps with rows ``first`` onwards of a dense corpus.

    ``screen`` (queries, size) holds their products to within ``slack`` times the norms plus ``tiny``; a row whose upper
    bound does not reach the heap is passed over, any other gets its exact score, as does one whose product overflowed.
    """
    n = scores.shape[1]
    for q in prange(scores.shape[0]):
        best, best_rows = scores[q], rows[q]
        for r in range(screen.shape[1]):
            row = first + r
            if filled[q] == n:
                high = np.float64(screen[q, r]) + slack * query_norm[q] * norm[row] + tiny
                if np.isfinite(high) and _score(high, query_side[q], side[row], metric) < best[0]:
                    continue
            if _barred(groups, query_groups, row, q):
                continue
            dot = 0.0
            for c in range(corpus.shape[1]):
                dot += np.float64(queries[q, c]) * np.float64(corpus[row, c])
            score = _score(dot, query_side[q], side[row], metric)
            if filled[q] < n or score > best[0]:
                filled[q] = _push(best, best_rows, filled[q], score, row)


@njit(cache=True, parallel=True)
def pair_scores(chosen, corpus, side, queries, query_side, metric):
    """Exact scores (queries, c) of the corpus rows ``chosen`` (queries, c) of each query; NaN where -1."""
    out = np.full(chosen.shape, np.nan)
    for q in prange(chosen.shape[0]):
        for i in range(chosen.shape[1]):
            row = chosen[q, i]
            if row >= 0:
                dot = 0.0
                for c in range(corpus.shape[1]):
                    dot += np.float64(queries[q, c]) * np.float64(corpus[row, c])
                out[q, i] = _score(dot, query_side[q], side[row], metric)
    return out
