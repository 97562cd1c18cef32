"""The kernel of the Cox screen in numba; :func:`biosae.stats.cox_screen.powers_of_means` is its twin in numpy."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def powers_of_means(indptr, indices, data, square, event, upto, first, prefix, c1, c2, prefix2, prefix3):
    m = len(indptr) - 1
    out, third = np.zeros(m), np.zeros(m)
    for j in range(m):
        at_risk, squares, events, current, low = 0.0, 0.0, 0.0, -1, -1
        for i in range(indptr[j + 1] - 1, indptr[j] - 2, -1):
            last = i < indptr[j]
            r = 0 if last else indices[i]
            if not last and upto[r] == first[r]:
                continue
            if current >= 0 and (last or upto[r] != current):
                left_stratum = last or first[r] != low
                stop = low if left_stratum else upto[r]
                b, a = current - 1, stop - 1
                inside = stop > low
                out[j] += at_risk**2 * (prefix[b] - (prefix[a] if inside else 0.0))
                third[j] -= 3.0 * at_risk * squares * (prefix2[b] - (prefix2[a] if inside else 0.0))
                third[j] += 2.0 * at_risk**3 * (prefix3[b] - (prefix3[a] if inside else 0.0))
                if events != 0.0:
                    out[j] += events * (c2[b] * events - 2.0 * c1[b] * at_risk)
                events = 0.0
                if left_stratum:
                    at_risk, squares = 0.0, 0.0
            if last:
                break
            current, low = upto[r], first[r]
            at_risk += data[i]
            squares += square[i]
            if event[r]:
                events += data[i]
    return out, third
