"""Kernels on sparse columns in numba; the functions, their arguments and results are those of ``kernels_numpy``.

Every column is worked through by itself, in one order, so that results do not depend on anything but the input.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numba import njit

from biosae.stats.kernels_numpy import group_products, members

FUSED = {"contract", "nsz"}
"""Multiply and add in one rounding; sums keep their order."""
ROWS = 8000
"""Rows of a dense table that are worked through at a time, so that they stay in the cache."""


@njit(cache=True)
def _order(indptr, data, out):
    for j in range(len(indptr) - 1):
        a, b = indptr[j], indptr[j + 1]
        out[a:b] = a + np.argsort(data[a:b])


def order(V: sp.csc_matrix) -> np.ndarray:
    out = np.empty(V.nnz, np.int32)
    _order(V.indptr, V.data, out)
    return out


@njit(cache=True)
def _ranks(indptr, data, order, n, out):
    for j in range(len(indptr) - 1):
        a, b = indptr[j], indptr[j + 1]
        negative = 0
        while a + negative < b and data[order[a + negative]] < 0:
            negative += 1
        zeros = n - (b - a)
        at_zero = negative + (zeros + 1) / 2.0
        e = a
        while e < b:
            last = e + 1
            while last < b and data[order[last]] == data[order[e]]:
                last += 1
            rank = (e - a + last - a + 1) / 2.0 - at_zero
            if e - a >= negative:
                rank += zeros
            for i in range(e, last):
                out[order[i]] = rank
            e = last


def ranks(V: sp.csc_matrix, order: np.ndarray) -> np.ndarray:
    out = np.empty(V.nnz)
    _ranks(V.indptr, V.data, order, V.shape[0], out)
    return out


@njit(cache=True)
def _moments(indptr, data, n, mean, second, third):
    for j in range(len(indptr) - 1):
        a, b = indptr[j], indptr[j + 1]
        total = 0.0
        for e in range(a, b):
            total += data[e]
        centre = total / n
        two, three, same = 0.0, 0.0, b - a == n
        for e in range(a, b):
            d = data[e] - centre
            two += d * d
            three += d * d * d
            same = same and data[e] == data[a]
        zeros = n - (b - a)
        mean[j] = centre
        second[j] = 0.0 if same else two + zeros * centre * centre
        third[j] = 0.0 if same else three - zeros * centre * centre * centre


def moments(V: sp.csc_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, second, third = np.zeros((3, V.shape[1]))
    _moments(V.indptr, V.data, V.shape[0], mean, second, third)
    return mean, second, third


@njit(cache=True, fastmath=FUSED)
def _product(indptr, indices, data, Y, step, out):
    m, n, width = len(indptr) - 1, Y.shape[0], Y.shape[1]
    at = indptr[:-1].copy()
    for start in range(0, n, step):
        stop = start + step
        for j in range(m):
            a, b, end = at[j], at[j], indptr[j + 1]
            while b < end and indices[b] < stop:
                b += 1
            at[j] = b
            o = out[j]
            while a + 3 < b:
                x0, x1, x2, x3 = data[a], data[a + 1], data[a + 2], data[a + 3]
                y0, y1, y2, y3 = Y[indices[a]], Y[indices[a + 1]], Y[indices[a + 2]], Y[indices[a + 3]]
                for t in range(width):
                    o[t] += x0 * y0[t] + x1 * y1[t] + x2 * y2[t] + x3 * y3[t]
                a += 4
            while a < b:
                x0, y0 = data[a], Y[indices[a]]
                for t in range(width):
                    o[t] += x0 * y0[t]
                a += 1


def product(V: sp.csc_matrix, Y: np.ndarray) -> np.ndarray:
    Y = np.ascontiguousarray(Y)
    out = np.zeros((V.shape[1], Y.shape[1]), Y.dtype)
    _product(V.indptr, V.indices, V.data.astype(Y.dtype, copy=False), Y, ROWS, out)
    return out


@njit(cache=True, fastmath=FUSED)
def _rearranged(indptr, indices, data, e, index, step, out):
    m, n, width = len(indptr) - 1, index.shape[0], index.shape[1]
    at = indptr[:-1].copy()
    Y = np.empty((step, width), out.dtype)
    for start in range(0, n, step):
        stop = min(start + step, n)
        for i in range(start, stop):
            row, own = Y[i - start], index[i]
            for t in range(width):
                row[t] = e[own[t]]
        for j in range(m):
            a, b, end = at[j], at[j], indptr[j + 1]
            while b < end and indices[b] < stop:
                b += 1
            at[j] = b
            o = out[j]
            while a + 3 < b:
                x0, x1, x2, x3 = data[a], data[a + 1], data[a + 2], data[a + 3]
                y0, y1 = Y[indices[a] - start], Y[indices[a + 1] - start]
                y2, y3 = Y[indices[a + 2] - start], Y[indices[a + 3] - start]
                for t in range(width):
                    o[t] += x0 * y0[t] + x1 * y1[t] + x2 * y2[t] + x3 * y3[t]
                a += 4
            while a < b:
                x0, y0 = data[a], Y[indices[a] - start]
                for t in range(width):
                    o[t] += x0 * y0[t]
                a += 1


def rearranged(V: sp.csc_matrix, e: np.ndarray, index: np.ndarray) -> np.ndarray:
    out = np.zeros((V.shape[1], index.shape[1]), e.dtype)
    step = min(ROWS, max(V.shape[0], 1))
    _rearranged(V.indptr, V.indices, V.data.astype(e.dtype, copy=False), e, index, step, out)
    return out


@njit(cache=True)
def _group_sums(indptr, indices, data, weight, codes, out):
    for j in range(len(indptr) - 1):
        for e in range(indptr[j], indptr[j + 1]):
            i = indices[e]
            out[codes[i], j] += data[e] * weight[i]


def group_sums(V: sp.csc_matrix, weight: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    out = np.zeros((n_groups, V.shape[1]))
    _group_sums(V.indptr, V.indices, V.data, weight, codes, out)
    return out


@njit(cache=True)
def _groups_firing(indptr, indices, codes, n_groups, out):
    seen = np.full(n_groups, -1, np.int64)
    for j in range(len(indptr) - 1):
        for e in range(indptr[j], indptr[j + 1]):
            g = codes[indices[e]]
            if seen[g] != j:
                seen[g] = j
                out[j] += 1


def groups_firing(V: sp.csc_matrix, codes: np.ndarray, n_groups: int) -> np.ndarray:
    out = np.zeros(V.shape[1], np.int64)
    _groups_firing(V.indptr, V.indices, codes, n_groups, out)
    return out


@njit(cache=True, fastmath=FUSED)
def _scores(indptr, indices, data, E, codes, Q, coefficient, EQ, QQ, share, out):
    G, K, T = EQ.shape
    S, X = np.empty((G, T)), np.empty(G)
    cross = np.empty((G, K))
    for j in range(len(indptr) - 1):
        S[:] = 0.0
        X[:] = 0.0
        cross[:] = 0.0
        for e in range(indptr[j], indptr[j + 1]):
            i, x = indices[e], data[e]
            g = codes[i]
            s, y = S[g], E[i]
            for t in range(T):
                s[t] += x * y[t]
            X[g] += x * x
            for k in range(K):
                cross[g, k] += x * Q[i, k]
        total, squares, about, with_x, with_e = out[0, j], out[1, j], out[2, j], out[3, j], out[4, j]
        xe, xx = out[5, j], 0.0
        for g in range(G):
            s = S[g]
            for k in range(K):
                c, b = coefficient[k, j], EQ[g, k]
                for t in range(T):
                    s[t] -= c * b[t]
                X[g] -= 2.0 * c * cross[g, k]
                for q in range(K):
                    X[g] += c * QQ[g, k, q] * coefficient[q, j]
            own, f = max(X[g], 0.0), share[g]
            xx += own * own
            for t in range(T):
                total[t] += s[t]
                squares[t] += s[t] * s[t]
                with_x[t] += s[t] * own
                with_e[t] += s[t] * f[t]
                xe[t] += own * f[t]
        for g in range(G):
            s = S[g]
            for t in range(T):
                d = s[t] - total[t] / G
                about[t] += d * d
        out[6, j, 0] = xx


def scores(
    V: sp.csc_matrix, E: np.ndarray, codes: np.ndarray, n_groups: int, Q: np.ndarray, coefficient: np.ndarray
) -> dict[str, np.ndarray]:
    EQ, QQ, share = group_products(E, codes, n_groups, Q)
    out = np.zeros((7, V.shape[1], E.shape[1]))
    _scores(
        V.indptr, V.indices, V.data, np.ascontiguousarray(E), codes, np.ascontiguousarray(Q),
        np.ascontiguousarray(coefficient), EQ, QQ, share, out,
    )  # fmt: skip
    names = ("total", "squares", "about", "with_x", "with_e", "xe")
    return dict(zip(names, out)) | {"xx": out[6, :, 0].copy(), "ee": (share**2).sum(axis=0)}


@njit(cache=True, fastmath=FUSED)
def _delong(indptr, indices, data, order, labels, n1, n0, s1, q1, s0, q0):
    n, T = labels.shape
    above1, a1 = np.empty(T), np.empty(T)
    t1, u1, t0, u0 = np.empty(T), np.empty(T), np.empty(T), np.empty(T)
    for j in range(len(indptr) - 1):
        a, b = indptr[j], indptr[j + 1]
        t1[:] = 0.0
        u1[:] = 0.0
        t0[:] = 0.0
        u0[:] = 0.0
        above1[:] = 0.0
        above, e, zero_done = 0, b - 1, False
        while e >= a or not zero_done:
            if e > a and data[order[e - 1]] != data[order[e]] and (zero_done or data[order[e]] > 0):
                row = labels[indices[order[e]]]  # most often: a value without a tie
                for t in range(T):
                    own = np.float64(row[t])
                    v1 = n0[t] / 2.0 - above + above1[t]
                    v0 = above1[t] - n1[t] / 2.0
                    t1[t] += own * v1
                    u1[t] += own * v1 * v1
                    t0[t] += (1.0 - own) * v0
                    u0[t] += (1.0 - own) * v0 * v0
                    above1[t] += own
                above += 1
                e -= 1
                continue
            a1[:] = 0.0
            if not zero_done and (e < a or data[order[e]] < 0):
                size = n - (b - a)
                zero_done = True
                for t in range(T):
                    a1[t] = n1[t] - above1[t]
                for i in range(a, e + 1):
                    row = labels[indices[order[i]]]
                    for t in range(T):
                        a1[t] -= row[t]
            else:
                value, size = data[order[e]], 0
                while e >= a and data[order[e]] == value:
                    row = labels[indices[order[e]]]
                    for t in range(T):
                        a1[t] += row[t]
                    size += 1
                    e -= 1
            for t in range(T):
                here0 = size - a1[t]
                v1 = n0[t] / 2.0 - (above - above1[t]) - here0 / 2.0
                v0 = above1[t] + a1[t] / 2.0 - n1[t] / 2.0
                t1[t] += a1[t] * v1
                u1[t] += a1[t] * v1 * v1
                t0[t] += here0 * v0
                u0[t] += here0 * v0 * v0
                above1[t] += a1[t]
            above += size
        s1[j], q1[j], s0[j], q0[j] = t1, u1, t0, u0


def delong(V: sp.csc_matrix, order: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n1 = labels.sum(axis=0, dtype=np.float64)
    n0 = len(labels) - n1
    s1, q1, s0, q0 = np.zeros((4, V.shape[1], labels.shape[1]))
    _delong(V.indptr, V.indices, V.data, order, labels, n1, n0, s1, q1, s0, q0)
    return q1 - s1**2 / n1, q0 - s0**2 / n0


@njit(cache=True, fastmath=FUSED)
def _delong_groups(indptr, indices, data, order, labels, codes, n1, n0, size1, size0, out):
    n, T = labels.shape
    G = size1.shape[0]
    D1, D0 = np.empty((G, T)), np.empty((G, T))
    above1, a1, z1, z0 = np.empty(T), np.empty(T), np.empty(T), np.empty(T)
    m1, m0, v1, v0 = np.empty(T), np.empty(T), np.empty(T), np.empty(T)
    for j in range(len(indptr) - 1):
        a, b = indptr[j], indptr[j + 1]
        D1[:] = 0.0
        D0[:] = 0.0
        m1[:] = 0.0
        m0[:] = 0.0
        above1[:] = 0.0
        a1[:] = 0.0
        first = b  # entries above zero
        while first > a and data[order[first - 1]] > 0:
            first -= 1
            row = labels[indices[order[first]]]
            for t in range(T):
                above1[t] += row[t]
        for i in range(a, first):
            row = labels[indices[order[i]]]
            for t in range(T):
                a1[t] += row[t]
        zeros = n - (b - a)
        for t in range(T):
            own1 = n1[t] - above1[t] - a1[t]
            z1[t] = n0[t] / 2.0 - (b - first - above1[t]) - (zeros - own1) / 2.0
            z0[t] = above1[t] + own1 / 2.0 - n1[t] / 2.0
        above1[:] = 0.0
        above, e, passed = 0, b - 1, False
        while e >= a:
            if not passed and data[order[e]] < 0:
                passed = True
                for t in range(T):
                    above1[t] = n1[t] - a1[t]
                above += zeros
            last, value = e, data[order[e]]
            v1[:] = 0.0
            while e >= a and data[order[e]] == value:
                row = labels[indices[order[e]]]
                for t in range(T):
                    v1[t] += row[t]
                e -= 1
            size = last - e
            for t in range(T):
                own1 = v1[t]
                v1[t] = n0[t] / 2.0 - (above - above1[t]) - (size - own1) / 2.0 - z1[t]
                v0[t] = above1[t] + own1 / 2.0 - n1[t] / 2.0 - z0[t]
                above1[t] += own1
                m1[t] += own1 * v1[t]
                m0[t] += (size - own1) * v0[t]
            above += size
            for i in range(e + 1, last + 1):
                r = indices[order[i]]
                row, d1, d0 = labels[r], D1[codes[r]], D0[codes[r]]
                for t in range(T):
                    d1[t] += row[t] * v1[t]
                    d0[t] += (1.0 - row[t]) * v0[t]
        for t in range(T):
            m1[t] /= n1[t]
            m0[t] /= n0[t]
        for g in range(G):
            for t in range(T):
                d = (D1[g, t] - size1[g, t] * m1[t] + D0[g, t] - size0[g, t] * m0[t]) / (n1[t] * n0[t])
                out[j, t] += d * d


def delong_groups(
    V: sp.csc_matrix, order: np.ndarray, labels: np.ndarray, codes: np.ndarray, n_groups: int
) -> np.ndarray:
    size1 = np.ascontiguousarray(members(codes, n_groups) @ labels.astype(np.float64))
    size0 = np.bincount(codes, minlength=n_groups)[:, None] - size1
    out = np.zeros((V.shape[1], labels.shape[1]))
    _delong_groups(
        V.indptr, V.indices, V.data, order, labels, codes, size1.sum(axis=0), size0.sum(axis=0), size1, size0, out
    )
    return out


@njit(cache=True)
def _exceed(null, order, threshold, sign, step_down, own, joint, side):
    width = null.shape[1]
    top = np.zeros(width)
    if not step_down:
        for j in order:
            for t in range(width):
                if abs(null[j, t]) > top[t]:
                    top[t] = abs(null[j, t])
    for place in range(len(order) - 1, -1, -1):
        j = order[place]
        bound, s = threshold[place], sign[place]
        n_own, n_side, n_joint = 0, 0, 0
        for t in range(width):
            value = null[j, t] if null[j, t] == null[j, t] else 0.0
            size = abs(value)
            if step_down:
                top[t] = max(top[t], size)
            n_own += size >= bound
            n_side += value * s >= bound
            n_joint += top[t] >= bound
        own[place] += n_own
        side[place] += n_side
        joint[place] += n_joint


def exceed(
    null: np.ndarray, order: np.ndarray, threshold: np.ndarray, sign: np.ndarray, step_down: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    own, joint, side = np.zeros((3, len(order)))
    _exceed(null, order, threshold, sign, step_down, own, joint, side)
    return own, joint, side


@njit(cache=True)
def _shuffle(rows, starts, uniform, out):
    width, n = uniform.shape
    place = np.empty((8, n), np.int32)
    for first_draw in range(0, width, 8):
        many = min(8, width - first_draw)
        for b in range(many):
            own, u = place[b], uniform[first_draw + b]
            own[:] = rows
            for g in range(len(starts) - 1):
                first = starts[g]
                for i in range(starts[g + 1] - 1, first, -1):
                    k = first + int(u[i] * (i - first + 1))
                    own[i], own[k] = own[k], own[i]
        for i in range(n):
            for b in range(many):
                out[rows[i], first_draw + b] = place[b, i]


def shuffle(rows: np.ndarray, starts: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), len(uniform)), np.int32)
    _shuffle(rows.astype(np.int32), starts, uniform, out)
    return out
