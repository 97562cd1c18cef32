"""The kernel of the Cox screen in numba; :func:`biosae.stats.cox_screen.squared_means` is its twin in numpy."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def squared_means(indptr, indices, data, event, upto, first, prefix, c1, c2):
    m = len(indptr) - 1
    out = np.zeros(m)
    for j in range(m):
        at_risk, events, current, low, total = 0.0, 0.0, -1, -1, 0.0
        for i in range(indptr[j + 1] - 1, indptr[j] - 2, -1):
            last = i < indptr[j]
            r = 0 if last else indices[i]
            if not last and upto[r] == first[r]:
                continue
            if current >= 0 and (last or upto[r] != current):
                left_stratum = last or first[r] != low
                stop = low if left_stratum else upto[r]
                spent = prefix[current - 1] - (prefix[stop - 1] if stop > low else 0.0)
                total += at_risk * at_risk * spent
                if events != 0.0:
                    total += events * (c2[current - 1] * events - 2.0 * c1[current - 1] * at_risk)
                events = 0.0
                if left_stratum:
                    at_risk = 0.0
            if last:
                break
            current, low = upto[r], first[r]
            at_risk += data[i]
            if event[r]:
                events += data[i]
        out[j] = total
    return out
