"""Does Cox's likelihood have a maximum, or do the columns order the events without a fault?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy import optimize

if TYPE_CHECKING:
    from biosae.stats.cox import RiskSets


def monotone(sets: RiskSets, X: np.ndarray, score: np.ndarray) -> bool:
    """True if some ``d`` gives every event the largest ``x'd`` of its risk set, and not all risk sets one value.

    Then, and only then, the partial likelihood rises for ever along ``d`` (Bryson and Johnson, Technometrics 23, 381,
    1981). Linear programme in ``d`` and one bound a time with events, since risk sets are nested within strata.

    Parameters
    ----------
    sets
        Risk sets.
    X
        Columns (n, k) in their order.
    score
        Score (k,) at coefficients of 0, along which the gain is counted.
    """
    k, T = X.shape[1], sets.n_times
    kept, ended = np.flatnonzero(sets.upto > sets.first), np.flatnonzero(sets.event)

    def bound(times: np.ndarray) -> sp.csr_matrix:
        return sp.csr_matrix((np.ones(len(times)), (np.arange(len(times)), times)), shape=(len(times), T))

    later = np.setdiff1d(np.arange(1, T), sets.bounds)
    rows = [
        sp.hstack([sp.csr_matrix(X[kept]), -bound(sets.upto[kept] - 1)]),
        sp.hstack([sp.csr_matrix(-X[ended]), bound(sets.upto[ended] - 1)]),
        sp.hstack([sp.csr_matrix((len(later), k)), bound(later) - bound(later - 1)]),
    ]
    A = sp.vstack(rows, format="csr")
    found = optimize.linprog(
        np.r_[-score, np.zeros(T)], A_ub=A, b_ub=np.zeros(A.shape[0]),
        bounds=[(-1.0, 1.0)] * k + [(None, None)] * T, method="highs",
    )  # fmt: skip
    return bool(found.status == 0 and -found.fun > 1e-7)
