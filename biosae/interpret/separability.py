"""How differently a latent fires for different concepts, and how to take one concept out of it at least cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.stats.nested import codes_of

BINS = 64
SMOOTHING = 1e-6
LEAST_UNITS = 30


def js_distance(p: Any, q: Any) -> np.ndarray | float:
    """Jensen-Shannon distance in base 2, ``sqrt(KL(P||M)/2 + KL(Q||M)/2)``, ``M = (P + Q)/2``.

    Parameters
    ----------
    p, q
        Counts or probabilities (..., b), not negative; each row is brought to a sum of 1.

    Returns
    -------
    float or ndarray
        From 0 (alike) to 1 (no overlap); NaN where a row is all 0.

    >>> float(js_distance([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]))
    1.0
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape[-1] != q.shape[-1] or (p < 0).any() or (q < 0).any():
        raise InputError(f"two rows of equally many numbers >= 0 are needed, found shapes {p.shape} and {q.shape}")
    p, q = _shares(p), _shares(q)
    middle = (p + q) / 2
    found = np.sqrt(np.clip(_entropy(middle) - (_entropy(p) + _entropy(q)) / 2, 0, 1))
    return found if found.ndim else float(found)


def separability(
    adata: Any,
    concept: str,
    *,
    latents: Sequence[str] | None = None,
    groups: str | None = "patient",
    n_bins: int = BINS,
    smoothing: float = SMOOTHING,
    min_units: int = LEAST_UNITS,
    n_null: int = 0,
    random_state: int = 0,
) -> pd.DataFrame:
    """Mean Jensen-Shannon distance between the distributions of each latent in different concepts.

    Parameters
    ----------
    adata
        Codes; a row is a unit (token, tile, beat).
    concept
        Column of ``obs`` with classes; missing values are left out.
    latents
        Some latents; None: all.
    groups
        Column of independent groups: each counts alike in every concept, however many rows it has there. None: rows
        count.
    n_bins, smoothing
        Equal bins over the latent's pooled range of codes other than 0, one bin for 0 alone, and what is added to the
        share of each.
    min_units
        Concepts with fewer rows are left out.
    n_null
        Shuffles of the concept, between groups where it is constant in them and within them otherwise.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        A row a latent: ``latent, separability`` (mean over pairs of concepts), ``separability_joint`` (the K-way form,
        ``sqrt((H(mean P) - mean H(P)) / log2 K)``), ``concept_a, concept_b, largest`` (the pair farthest apart),
        ``n_concepts, n_units, n_groups, status`` (``ok``, ``dead``, ``too_few_groups``: fewer than 3); with ``n_null``
        also ``null_mean``. ``attrs["biosae"]``: ``mean`` over live latents, ``top_decile``, concepts used and left out.

    Raises
    ------
    InputError
        For unknown columns or latents, rows whose group is missing, or fewer than two bins.
    StatisticsError
        If fewer than two concepts have enough rows.

    Notes
    -----
    Histograms of few rows differ by chance: compare with ``null_mean``, not with 0.

    References
    ----------
    Fereidouni, Haider, Ju and Siddique 2026, Findings of EACL, arXiv 2508.15094. How the paper bins and averages is not
    public; this is our reading.
    """
    if n_bins < 2:
        raise InputError(f"n_bins={n_bins!r}; take at least 2")
    codes, names = columns_of(adata, latents)
    classes, levels, kept, dropped = _concepts(adata.obs, concept, min_units)
    codes = codes[kept]
    grouped = groups is not None
    if grouped and groups not in adata.obs:
        raise InputError(f"obs has no column {groups!r}; {nearest(groups, adata.obs.columns)}, or groups=None")
    number = codes_of(adata.obs.iloc[kept], groups)[0] if grouped else np.arange(len(kept))
    bins = bins_of(codes, n_bins)
    shares = histograms_of(bins, codes.shape, classes, number if grouped else None, n_bins, smoothing)
    pairs = list(itertools.combinations(range(len(levels)), 2))
    apart = np.stack([js_distance(shares[a], shares[b]) for a, b in pairs])
    far = apart.argmax(0)
    mixed = _entropy(shares.mean(0)) - _entropy(shares).mean(0)
    live = np.diff(codes.indptr) > 0
    n_groups = int(number.max()) + 1
    status = "too_few_groups" if grouped and n_groups < 3 else "ok"
    table = pd.DataFrame({
        "latent": names,
        "separability": apart.mean(0),
        "separability_joint": np.sqrt(np.clip(mixed / np.log2(len(levels)), 0, 1)),
        "concept_a": [levels[pairs[i][0]] for i in far],
        "concept_b": [levels[pairs[i][1]] for i in far],
        "largest": apart.max(0),
        "n_concepts": len(levels),
        "n_units": len(kept),
        "n_groups": n_groups if grouped else np.nan,
        "status": np.where(live, status, "dead"),
    })  # fmt: skip
    if n_null:
        from biosae.sae.labels import shuffled

        rng, total = np.random.default_rng(random_state), np.zeros(len(names))
        for _ in range(n_null):
            drawn = shuffled(classes, number if grouped else None, rng)
            some = histograms_of(bins, codes.shape, drawn, number if grouped else None, n_bins, smoothing)
            total += np.mean([js_distance(some[a], some[b]) for a, b in pairs], axis=0)
        table["null_mean"] = total / n_null
    values = np.sort(table["separability"].to_numpy()[live])
    table.attrs["biosae"] = {
        "concept": concept, "concepts": list(levels), "left_out": dropped, "groups": groups, "n_bins": n_bins,
        "mean": float(values.mean()) if len(values) else np.nan,
        "top_decile": float(values[-max(1, len(values) // 10) :].mean()) if len(values) else np.nan,
    }  # fmt: skip
    return table


def columns_of(adata: Any, latents: Sequence[str] | None) -> tuple[sp.csc_matrix, pd.Index]:
    """Codes of some latents without stored zeros."""
    if latents is not None:
        latents = list(dict.fromkeys([latents] if isinstance(latents, str) else latents))
        absent = [name for name in latents if name not in adata.var_names]
        if absent:
            raise InputError(f"no latent {absent[0]!r}; {nearest(absent[0], adata.var_names)}")
        adata = adata[:, latents]
    codes = sp.csc_matrix(adata.X, dtype=np.float64, copy=True)
    codes.eliminate_zeros()
    return codes, adata.var_names


def _concepts(obs: pd.DataFrame, concept: str, least: int) -> tuple[np.ndarray, list[str], np.ndarray, dict[str, int]]:
    """Class numbers of the rows kept, names, which rows, and the classes left out with their size."""
    if concept not in obs:
        raise InputError(f"obs has no column {concept!r}; {nearest(concept, obs.columns)}")
    values = obs[concept].astype(object).where(obs[concept].notna(), None)
    counts = values.dropna().astype(str).value_counts()
    levels = sorted(counts.index[counts >= least])
    if len(levels) < 2:
        raise StatisticsError(
            f"{concept!r} has {len(levels)} classes of at least {least} rows; separability needs two (lower "
            "min_units only for a look)"
        )
    classes = pd.Categorical(values.map(lambda v: None if v is None else str(v)), categories=levels).codes
    kept = np.flatnonzero(classes >= 0)
    return classes[kept].astype(np.int64), levels, kept, counts[counts < least].to_dict()


def edges_of(codes: sp.csc_matrix, n_bins: int) -> np.ndarray:
    """Borders (m, n_bins + 1) of equal bins over each column's codes other than 0."""
    low, high = np.zeros(codes.shape[1]), np.ones(codes.shape[1])
    filled = np.flatnonzero(np.diff(codes.indptr))
    if len(filled):
        low[filled] = np.minimum.reduceat(codes.data, codes.indptr[filled])
        high[filled] = np.maximum.reduceat(codes.data, codes.indptr[filled])
    return low[:, None] + (high - low)[:, None] * np.linspace(0, 1, n_bins + 1)


def bins_of(codes: sp.csc_matrix, n_bins: int) -> sp.csc_matrix:
    """Bin of every stored code, from 0; bin ``n_bins`` is that of 0."""
    edges = edges_of(codes, n_bins)
    column = np.repeat(np.arange(codes.shape[1]), np.diff(codes.indptr))
    bins = codes.copy()
    bins.data = bin_of(codes.data, edges[column, 0], edges[column, -1], n_bins).astype(np.float64)
    return bins


def bin_of(codes: np.ndarray, low: Any, high: Any, n_bins: int) -> np.ndarray:
    """Number of the bin of each code (n,) among equal bins from low to high; beyond them, the first or the last."""
    span = np.broadcast_to(np.subtract(high, low), codes.shape)
    place = np.divide(codes - low, span, out=np.zeros(codes.shape), where=span > 0)
    return np.clip(np.floor(place * n_bins), 0, n_bins - 1).astype(np.int64)


def histograms_of(
    bins: sp.csc_matrix, shape: tuple[int, int], classes: np.ndarray, groups: np.ndarray | None, n_bins: int,
    smoothing: float,
) -> np.ndarray:  # fmt: skip
    """Smoothed shares (K, m, n_bins + 1) of every class's bins, the last that of 0; groups count alike in a class."""
    K, m = int(classes.max()) + 1, shape[1]
    if groups is None:
        weight = 1.0 / np.bincount(classes)[classes]
    else:
        pair = classes * (int(groups.max()) + 1) + groups
        size = np.bincount(pair)
        per_class = np.array([len(set(groups[classes == k])) for k in range(K)])
        weight = 1.0 / (size[pair] * per_class[classes])
    column = np.repeat(np.arange(m), np.diff(bins.indptr))
    place = (classes[bins.indices] * m + column) * (n_bins + 1) + bins.data.astype(np.int64)
    out = np.bincount(place, weight[bins.indices], K * m * (n_bins + 1)).reshape(K, m, n_bins + 1)
    out[:, :, -1] = np.clip(1 - out[:, :, :-1].sum(-1), 0, 1)
    return _shares(out + smoothing)


def _shares(p: np.ndarray) -> np.ndarray:
    total = p.sum(-1, keepdims=True)
    return np.divide(p, total, out=np.full(p.shape, np.nan), where=total > 0)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in bits of the last axis."""
    from scipy.special import entr

    return entr(p).sum(-1) / np.log(2)
