"""Take one concept out of some latents: weaken codes as far as they speak of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.interpret.separability import (
    BINS,
    LEAST_UNITS,
    SMOOTHING,
    bin_of,
    bins_of,
    columns_of,
    edges_of,
    histograms_of,
)

HOW = ("app", "range", "full")
DENSITIES = ("histogram", "normal")


def posterior(z: Any, target: Sequence[float], rest: Sequence[float], prior: float) -> np.ndarray:
    """Probability that a code belongs to a concept, from two normal densities.

    Parameters
    ----------
    z
        Codes of any shape.
    target, rest
        Mean and standard deviation of the codes in the concept and elsewhere; a deviation of 0 is a point.
    prior
        Prevalence of the concept, between 0 and 1.

    Returns
    -------
    ndarray
        ``prior p(z) / (prior p(z) + (1 - prior) r(z))``; where both densities vanish, that of the nearer one in units
        of deviations (the limit).

    >>> posterior([1.0, 2.0], (2, 0.5), (0.2, 0.4), 0.3).round(6).tolist()
    [0.255319, 0.999883]
    """
    if not 0 < prior < 1:
        raise InputError(f"prior={prior!r} must be between 0 and 1")
    z = np.asarray(z, np.float64)
    logs = []
    for (mean, sd), weight in ((target, prior), (rest, 1 - prior)):
        sd = max(float(sd), 1e-9 * max(1.0, abs(float(mean))))
        logs.append(np.log(weight) - np.log(sd) - ((z - mean) / sd) ** 2 / 2)
    return np.exp(logs[0] - np.logaddexp(*logs))


@dataclass
class Attenuation:
    """A way to weaken chosen latents where they speak of one concept, learnt from training rows.

    Made by :func:`attenuation`; call it with codes (n, m), sparse or dense, of any rows. Codes keep their sign, never
    grow, and 0 stays 0: ``0 <= z' / z <= 1``.
    """

    how: str
    concept: str
    latents: np.ndarray
    """(a,) columns."""
    target: np.ndarray
    """(a, 2) mean and standard deviation in the concept."""
    rest: np.ndarray
    """(a, 2) elsewhere."""
    prior: float
    width: float
    edges: np.ndarray | None
    """(a, b + 1) borders of bins, or None for normal densities."""
    shares: np.ndarray | None
    """(2, a, b + 1): shares of the bins and of 0, in the concept and elsewhere."""

    def __call__(self, codes: Any) -> sp.csr_matrix:
        """Weakened codes, csr_matrix float32 of the same shape."""
        out = sp.csc_matrix(codes, dtype=np.float64, copy=True)
        for i, j in enumerate(self.latents):
            if j >= out.shape[1]:
                raise InputError(f"codes have {out.shape[1]} latents; the attenuation was learnt on more")
            at = slice(out.indptr[j], out.indptr[j + 1])
            out.data[at] *= self.kept(i, out.data[at])
        out.eliminate_zeros()
        return sp.csr_matrix(out, dtype=np.float32)

    def kept(self, i: int, z: np.ndarray) -> np.ndarray:
        """Share of codes z (n,) of the i-th chosen latent that is kept."""
        if self.how == "full":
            return np.zeros(len(z))
        if self.how == "range":
            mean, sd = self.target[i]
            return (np.abs(z - mean) > self.width * sd + 1e-9 * np.abs(mean)).astype(float)
        if self.edges is None:
            return 1 - posterior(z, self.target[i], self.rest[i], self.prior)
        place = bin_of(z, self.edges[i, 0], self.edges[i, -1], self.edges.shape[1] - 1)
        one, other = (weight * self.shares[s, i, place] for s, weight in ((0, self.prior), (1, 1 - self.prior)))
        return 1 - one / (one + other)


def attenuation(
    adata: Any,
    concept: str,
    value: str,
    *,
    how: str = "app",
    latents: Sequence[str] | None = None,
    n_latents: int = 10,
    density: str = "histogram",
    width: float = 2.0,
    n_bins: int = BINS,
    smoothing: float = SMOOTHING,
    min_units: int = LEAST_UNITS,
) -> Attenuation:
    """Learn to take one concept out of some latents; give training rows only.

    | ``how`` | what becomes of a code z |
    | --- | --- |
    | ``"app"`` | ``z (1 - P(concept given z))``: weakened as far as it speaks of the concept |
    | ``"range"`` | 0 where ``abs(z - mean) <= width sd`` of the concept's codes |
    | ``"full"`` | 0 |

    Parameters
    ----------
    adata
        Codes of training rows.
    concept, value
        Column of ``obs``, and the class to take out.
    latents
        Which; None: the ``n_latents`` of largest mean magnitude in the concept.
    density
        ``"histogram"`` (bins as in :func:`separability`, smoothed) or ``"normal"``, for ``"app"``.
    width
        Of ``"range"``.
    n_bins, smoothing, min_units
        As in :func:`separability`.

    Returns
    -------
    Attenuation

    Raises
    ------
    InputError
        For unknown columns, classes, latents or settings.
    StatisticsError
        If the class or the rest has fewer than ``min_units`` rows.

    Notes
    -----
    What an edit costs is to be measured: ablate, and read the other labels with a probe (``bs.stats.readout``). Range:
    after arXiv 2502.06809. APP: Fereidouni et al. 2026, arXiv 2508.15094, in our reading.
    """
    for name, given, valid in (("how", how, HOW), ("density", density, DENSITIES)):
        if given not in valid:
            raise InputError(f"{name}={given!r} is unknown; {nearest(given, valid)}")
    if how == "app" and density == "histogram" and not smoothing > 0:
        raise InputError(f"smoothing={smoothing!r} must be above 0: a code in an empty bin would have no probability")
    codes, _ = columns_of(adata, None)
    if concept not in adata.obs:
        raise InputError(f"obs has no column {concept!r}; {nearest(concept, adata.obs.columns)}")
    known = adata.obs[concept].notna().to_numpy()
    values = adata.obs[concept].astype(str).to_numpy()[known]
    if str(value) not in set(values):
        raise InputError(f"{concept!r} never is {value!r}; {nearest(value, sorted(set(values)))}")
    inside = values == str(value)
    if min(inside.sum(), (~inside).sum()) < min_units:
        raise StatisticsError(
            f"{int(inside.sum())} rows of {value!r} and {int((~inside).sum())} others; both need min_units={min_units}"
        )
    codes = codes[known]
    if latents is None:
        strength = np.asarray(abs(codes[inside]).mean(axis=0)).ravel()
        chosen = np.argsort(-strength, kind="stable")[:n_latents]
        chosen = chosen[strength[chosen] > 0]
    else:
        chosen = adata.var_names.get_indexer(columns_of(adata, latents)[1])
    part = codes[:, chosen]
    moments = [_moments(part[rows]) for rows in (inside, ~inside)]
    edges = shares = None
    if density == "histogram":
        edges = edges_of(part, n_bins)
        shares = histograms_of(bins_of(part, n_bins), part.shape, (~inside).astype(int), None, n_bins, smoothing)
    return Attenuation(
        how, str(value), chosen, *moments, prior=float(inside.mean()), width=width, edges=edges, shares=shares
    )


def _moments(codes: sp.csc_matrix) -> np.ndarray:
    """Mean and standard deviation (m, 2) of columns, zeros included, in two passes."""
    n, m = codes.shape
    column = np.repeat(np.arange(m), np.diff(codes.indptr))
    mean = np.bincount(column, codes.data, m) / n
    squares = np.bincount(column, (codes.data - mean[column]) ** 2, m) + (n - np.diff(codes.indptr)) * mean**2
    return np.c_[mean, np.sqrt(squares / n)]
