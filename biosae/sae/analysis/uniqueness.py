"""When are codes unique: coherence against sparsity, thresholds that recover a support, and the rank of the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError
from biosae.sae.analysis.atoms import Metric, pairs, unit, unit_atoms


@dataclass(frozen=True)
class Uniqueness:
    """q* = sup{q : mu_q < 1 / (2 K_q - 1)}."""

    share: float
    """q*, from 0 to 1: 1 means that even the closest pair and the fullest row meet the bound."""
    mu: float
    """Quantile of |AIP| over pairs of atoms at q*."""
    k: float
    """Quantile of L0 over rows at q*."""
    zero_rows: int
    """Rows without active latents, left out."""


def uniqueness_share(
    atoms: Any, codes: Any, *, metric: Metric | None = None, random_state: int | None = None
) -> Uniqueness:
    """Up to which quantile coherence and sparsity together guarantee unique codes.

    Parameters
    ----------
    atoms
        (m, d).
    codes
        (n, m), sparse or dense: their L0.
    metric
        From :func:`second_moment_metric`, as in the paper. None: Euclidean.
    random_state
        Of the pairs drawn above 10 million of them.

    Raises
    ------
    InputError
        If no row has an active latent.

    Notes
    -----
    mu_q (2 K_q - 1) does not fall with q, so q* is found by bisection on linearly interpolated quantiles.

    References
    ----------
    Hu et al. 2025, arXiv 2509.20784. Which coherences the paper takes the quantile of is not stated; here all pairs.
    """
    l0 = _l0(codes)
    zero, l0 = int((l0 == 0).sum()), l0[l0 > 0]
    if not len(l0):
        raise InputError("no row has an active latent; uniqueness of codes has no meaning here")
    u, _ = unit_atoms(atoms, metric)
    values = np.sort(pairs(u, random_state)[0])
    l0 = np.sort(l0).astype(np.float64)

    def at(q: float) -> tuple[float, float]:
        return float(np.quantile(values, q)), float(np.quantile(l0, q))

    def unique(q: float) -> bool:
        mu, k = at(q)
        return mu * (2 * k - 1) < 1

    low, high = 0.0, 1.0
    if unique(1.0):
        low = 1.0
    elif unique(0.0):
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if unique(middle) else (low, middle)
    return Uniqueness(low, *at(low), zero)


def support_window(mu: float, *, k: int, low: float, high: float) -> tuple[float, float] | None:
    """Thresholds that recover the support of every code of at most k entries in [low, high].

    Returns
    -------
    (float, float) or None
        mu k high < tau < low - mu (k - 1) high; None where no threshold does.
    """
    window = mu * k * high, low - mu * (k - 1) * high
    return window if window[0] < window[1] else None


def threshold_codes(X: Any, atoms: Any, *, threshold: float, metric: Metric | None = None) -> scipy.sparse.csr_matrix:
    """Codes sigma_tau(x S d_j) with sigma_tau(u) = u where u >= tau, and atoms of unit length in the metric.

    The support is exact where :func:`support_window` holds tau; the values are where the active atoms are orthogonal.

    Returns
    -------
    csr_matrix (n, m), float32
    """
    X = np.asarray(X, np.float64)
    response = (X if metric is None else X @ metric.root) @ unit(atoms, metric).T
    return scipy.sparse.csr_matrix(np.where(response >= threshold, response, 0).astype(np.float32))


def effective_rank(codes: Any) -> float:
    """exp of the entropy of the normalised eigenvalues of Z^T Z: how many directions the codes use.

    Parameters
    ----------
    codes
        (n, m), sparse or dense. The smaller of Z^T Z and Z Z^T is decomposed: at most a few thousand rows or latents.

    Returns
    -------
    float
        From 1 to min(n, m); 0 where all codes are zero.

    References
    ----------
    Roy and Vetterli 2007, EUSIPCO.
    """
    Z = scipy.sparse.csr_matrix(codes, dtype=np.float64)
    gram = (Z.T @ Z if Z.shape[1] <= Z.shape[0] else Z @ Z.T).toarray()
    values = np.linalg.eigvalsh(gram)
    if values.max(initial=0) <= 0:
        return 0.0
    share = values[values > values.max() * 1e-14]
    share = share / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _l0(codes: Any) -> np.ndarray:
    Z = scipy.sparse.csr_matrix(codes)
    return np.bincount(Z.nonzero()[0], minlength=Z.shape[0])
