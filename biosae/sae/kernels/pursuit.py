"""Kernels of :mod:`biosae.sae.solvers`: one row at a time in float64, compiled by numba where it is there.

Without numba the same functions run as plain numpy. Shapes: rows x (n, d), unit atoms U (m, d) (a zero atom stays zero
and is never chosen), their products G = U U^T (m, m), or (0, 0) where that table would be too large. Codes are written
to ``out`` (n, m). A row ends early where its residual is at most ``tol`` times its norm.
"""

from __future__ import annotations

import numpy as np

try:
    from numba import njit, prange
except ImportError:  # the same code, interpreted

    def njit(**_options):
        return lambda function: function

    prange = range

EPS = 1e-12
"""Correlations below this share of the row's norm are rounding."""
RIDGE = 1e-12
"""Added to the diagonal of the normal equations: an atom that depends on others gives a huge step, not a failure."""
RELU, SIGNED, ABS = 0, 1, 2


@njit(cache=True)
def _norm(x):
    return np.sqrt((x * x).sum())


@njit(cache=True)
def _residual(x, z, used, U):
    r = x.copy()
    for j in used:
        r -= z[j] * U[j]
    return r


@njit(cache=True)
def _correlations(r, start, z, used, U, G):
    """U r, by way of the table G where there is one (``start`` = U x)."""
    if len(G) == 0:
        return U @ r
    p = start.copy()
    for j in used:
        p -= z[j] * G[j]
    return p


@njit(cache=True)
def _products(used, U, G):
    """U_S U_S^T of the atoms used, with the ridge."""
    n = len(used)
    table = np.empty((n, n))
    for a in range(n):
        for b in range(n):
            table[a, b] = G[used[a], used[b]] if len(G) else (U[used[a]] * U[used[b]]).sum()
        table[a, a] += RIDGE
    return table


@njit(cache=True)
def _non_negative(table, target, z, floor):
    """argmin over z >= 0 of z T z / 2 - t z by the active sets of Lawson and Hanson, from a feasible z whose zeros are
    free to enter; works on z in place."""
    n = len(target)
    inside = z > 0
    for _ in range(3 * n + 3):
        gradient = target - table @ z
        best, at = floor, -1
        for a in range(n):
            if not inside[a] and gradient[a] > best:
                best, at = gradient[a], a
        if at >= 0:
            inside[at] = True
        for _ in range(n + 1):
            used = np.flatnonzero(inside)
            if len(used) == 0:
                break
            goal = np.linalg.solve(np.ascontiguousarray(table[used][:, used]), target[used])
            step, out = 1.0, -1
            for a in range(len(used)):
                if goal[a] <= 0:
                    share = z[used[a]] / (z[used[a]] - goal[a]) if z[used[a]] > goal[a] else 0.0
                    if share < step or out < 0:
                        step, out = share, a
            for a in range(len(used)):
                z[used[a]] += step * (goal[a] - z[used[a]])
            if out < 0:
                break
            z[used[out]] = 0.0
            for a in used:
                if z[a] <= 0:
                    z[a] = 0.0
                    inside[a] = False
        if at < 0:
            return


@njit(cache=True)
def _match(x, U, G, k, tol, rule, z):
    size = _norm(x)
    r, p = x.copy(), U @ x
    for _ in range(k):
        if _norm(r) <= tol * size:
            return
        j = np.argmax(np.abs(p)) if rule == ABS else np.argmax(p)
        c = p[j]
        if (c if rule == RELU else abs(c)) <= EPS * size:
            return
        z[j] += c
        r -= c * U[j]
        p = p - c * G[j] if len(G) else U @ r


@njit(cache=True)
def _refit(x, U, G, k, tol, signed, penalty, gap, z):
    """Greedy choice with all chosen coefficients fitted anew; run to its end with a penalty it is the LASSO.

    Returns the duality gap, as a share of ||x||^2 / 2.
    """
    size = _norm(x)
    start = U @ x
    free = np.ones(len(U), np.bool_)
    chosen = np.empty(min(k, len(U)), np.int64)
    found = -1.0
    for count in range(len(chosen) + 1):
        used = np.flatnonzero(z)
        r = _residual(x, z, used, U)
        p = _correlations(r, start, z, used, U, G)
        if gap >= 0:
            found = _gap(x, r, p, z, penalty, size)
            if found <= gap:
                return found
        if count == len(chosen) or _norm(r) <= tol * size:
            return found
        score = np.where(free, np.abs(p) if signed else p, -np.inf)
        j = np.argmax(score)
        if score[j] - penalty <= EPS * size:
            return found
        free[j] = False
        chosen[count] = j
        among = chosen[: count + 1]
        table = _products(among, U, G)
        if signed:
            fitted = np.linalg.solve(table, start[among])
        else:
            fitted = z[among]
            _non_negative(table, start[among] - penalty, fitted, EPS * size)
        for a in range(count + 1):
            z[chosen[a]] = fitted[a]
    return found


@njit(cache=True)
def _gap(x, r, p, z, penalty, size):
    """P(z) - D(theta) over ||x||^2 / 2, with theta = r brought inside the dual constraints U theta <= penalty."""
    if size == 0:
        return 0.0
    top = p.max()
    theta = r * (penalty / top) if top > penalty else r
    primal = (r * r).sum() / 2 + penalty * z.sum()
    off = x - theta
    return (primal - (size * size - (off * off).sum()) / 2) / (size * size / 2)


@njit(cache=True)
def _gradient(x, U, G, k, tol, keep, z):
    size = _norm(x)
    start = U @ x
    ever = np.zeros(len(U), np.bool_)
    for _ in range(k):
        used = np.flatnonzero(z)
        r = _residual(x, z, used, U)
        if _norm(r) <= tol * size:
            return
        p = _correlations(r, start, z, used, U, G)
        active = ever if keep else z > 0
        active[np.argmax(p)] = True
        g = np.where(active, p, 0.0)
        over = np.flatnonzero(g)
        square = (g * g).sum()  # <c, r>, as c = g U and p = U r
        if np.sqrt(square) <= EPS * size:
            return
        c = np.zeros(len(x))
        for j in over:
            c += g[j] * U[j]
        step = square / (c * c).sum()
        for j in over:
            z[j] = max(z[j] + step * g[j], 0.0)


@njit(cache=True, parallel=True)
def match(x, U, G, k, tol, rule, out):
    """Matching pursuit; ``k`` steps of each row, (n,)."""
    for i in prange(len(x)):
        _match(x[i], U, G, k[i], tol, rule, out[i])


@njit(cache=True, parallel=True)
def refit(x, U, G, k, tol, signed, penalty, gap, out, gaps):
    """Orthogonal matching pursuit; with ``gap`` >= 0 the LASSO of ``penalty`` (n,), ending at that duality gap."""
    for i in prange(len(x)):
        gaps[i] = _refit(x[i], U, G, k[i], tol, signed, penalty[i], gap, out[i])


@njit(cache=True, parallel=True)
def gradient(x, U, G, k, tol, keep, out):
    """Gradient pursuit; ``keep``: atoms once chosen stay active although their coefficient fell to zero."""
    for i in prange(len(x)):
        _gradient(x[i], U, G, k[i], tol, keep, out[i])
