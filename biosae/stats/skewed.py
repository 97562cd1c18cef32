"""Tails of a score whose distribution over all rearrangements is skewed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from biosae.stats.correlation import skewness

if TYPE_CHECKING:
    from biosae.stats.inference import Block

TOLERATED = 1.05
"""Skewness counts where it raises a p by more than this factor, and by what it raises it beyond."""


def skewed_pvalue(p: np.ndarray, z: np.ndarray, skew: np.ndarray, *, normal: bool, sides: int = 2) -> np.ndarray:
    """p of ``z`` where the rearrangement distribution is skewed, never below ``p``.

    A rare label and a rare latent meet in a few units: their score is nearly a Poisson count, and the normal or t tail
    of it is too small by orders of magnitude (200 units, 5 cases, fires in 10, of which 3 cases: normal 1e-8, exact
    9e-4). The tail is that of a Pearson type III (shifted gamma) with the first three moments of the score under all
    rearrangements, which are known exactly (Mielke and Berry, Permutation Methods, 2007). Where that tail is less than
    :data:`TOLERATED` times ``p``, the result is ``p``; beyond, it is the tail over :data:`TOLERATED`.

    Parameters
    ----------
    p
        The normal (``normal=True``) or t p-value, of as many ``sides``. A t p-value passes into the type III tail
        between skewness 0 and 0.1.
    z
        The statistic over its standard deviation under rearrangement; its sign is the direction of a one-sided test.
    skew
        Third standardised moment of the statistic under rearrangement.
    """
    p = np.array(p, dtype=np.float64)
    heavy, size, a = np.sign(z) * skew > 0, np.abs(z), np.abs(skew)
    # (z^3 - 3 z) a / 6 is the first-order change of the log tail; two-sided, the two tails cancel it
    reach = a * (size**3 + 3.0) / 6.0
    matters = reach > 0.12 if sides == 2 else np.where(heavy, reach > 0.03, a > 0.2)
    at = np.flatnonzero((a > 1e-3) & matters)
    if len(at) == 0:
        return p
    x, a, own = size[at], a[at], p[at]
    shape = 4.0 / a**2
    long, short = np.zeros(len(at)), np.zeros(len(at))
    far = heavy[at] if sides == 1 else np.ones(len(at), bool)
    long[far] = special.gammaincc(shape[far], (shape + x * np.sqrt(shape))[far])
    near = ~heavy[at] if sides == 1 else far
    short[near] = special.gammainc(shape[near], np.maximum(shape - x * np.sqrt(shape), 0.0)[near])
    tail = long + short
    if not normal:
        share = np.minimum(1.0, a / 0.1)
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = np.exp((1.0 - share) * np.log(own) + share * np.log(tail))
    p[at] = np.where(np.isfinite(tail), np.fmin(1.0, np.fmax(own, tail / TOLERATED)), own)
    return p


def times_skewness(p: np.ndarray, z: np.ndarray, skew: np.ndarray) -> np.ndarray:
    """``p`` of a test on several columns times what skewness does to the two-sided normal tail at its largest ``z``."""
    free = 2.0 * special.ndtr(-np.abs(z))
    skewed = skewed_pvalue(free, z, skew, normal=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.fmin(1.0, np.where(free > 0, p * (skewed / free), np.fmax(p, skewed)))


def rearrangement_skew(blocks: list[Block]) -> np.ndarray:
    """Third standardised moment over all rearrangements of the target of ``sum_s w_s r_s``.

    ``E[(sum_i x_i y_pi(i))^3] = n / ((n-1)(n-2)) sum x^3 sum y^3`` for centred x and y; with covariates y is the
    residual and x the column itself.
    """
    third, second = 0.0, 0.0
    for b in blocks:
        norm = np.sqrt(b.e @ b.e)
        factor = b.n / ((b.n - 1) * (b.n - 2)) if b.n > 2 and norm > 0 else 0.0
        cubes = np.einsum("i,i,i->", b.e, b.e, b.e) if b.batch is None else b.batch.cubes[b.place]
        skew = skewness(b.V) if b.batch is None else b.batch.projection.skew
        third = third + b.weight**3 * factor * np.nan_to_num(skew) * (cubes / norm**3 if norm > 0 else 0.0)
        second = second + b.weight
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(second > 0, third / (second * np.sqrt(second)), 0.0)
