"""Kernel of non-negative least squares for rows with many active atoms: block principal pivoting, in float64.

Compiled by numba where it is there; without it the same functions run interpreted.
"""

from __future__ import annotations

import numpy as np

try:
    from numba import njit, prange
except ImportError:

    def njit(**_options):
        return lambda function: function

    prange = range

ROUNDING = 1e-12
"""Share of the largest number below which a sign is rounding; also the ridge, as a share of the atoms' mean square."""
TRIES = 3
"""Exchanges of all wrong atoms at once that may fail to lower their number before they are exchanged one by one."""


@njit(cache=True)
def _pivot(linear, gram, steps, z):
    active = linear > 0
    floor = ROUNDING * np.abs(linear).max()
    fewest, left = len(linear) + 1, TRIES
    for _ in range(steps):
        used = np.flatnonzero(active)
        z[:] = 0
        if len(used):
            z[used] = np.linalg.solve(np.ascontiguousarray(gram[used][:, used]), linear[used])
        slope = gram @ z - linear
        small = ROUNDING * np.abs(z).max()
        wrong = np.flatnonzero((active & (z < -small)) | (~active & (slope < -floor)))
        if len(wrong) == 0:
            z[:] = np.maximum(z, 0)
            return True
        if len(wrong) < fewest:
            fewest, left = len(wrong), TRIES
        elif left > 0:
            left -= 1
        else:
            wrong = wrong[-1:]
        active[wrong] = ~active[wrong]
    return False


@njit(cache=True, parallel=True)
def pivot(x, atoms, steps, z, done):
    """z >= 0 (n, m) of least ||x - z D||^2 for rows x (n, d); ``done`` (n,) says which rows came to an end."""
    m = len(atoms)
    gram = atoms @ atoms.T
    ridge = ROUNDING * np.trace(gram) / m
    for j in range(m):
        gram[j, j] += ridge
    for i in prange(len(x)):
        done[i] = _pivot(atoms @ x[i], gram, steps, z[i])
