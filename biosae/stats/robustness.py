"""Robustness index: are the nearest neighbours of a sample of its biology or of its site?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.stats.nested import in_memory

GRID = (1, 3, 5, 7, 9, 11, 21, 31, 51)


def robustness_index(
    adata: Any, *, biology: str, technical: str, k: int | None = None, exclude: str | None = "slide",
    use: str = "latents", n_bootstrap: int = 200, random_state: int = 0,
) -> pd.Series:  # fmt: skip
    """``SO / (SO + OS)`` over the ``k`` nearest neighbours of every sample: 1 where biology decides, 0 where the site.

    SO counts neighbours of the Same biology and Other site, OS the reverse; neighbours are by cosine (Koemen et al.
    2025, PathoROB, arXiv 2507.17845).

    Parameters
    ----------
    adata
        Latents; rows without either label are left out.
    biology, technical
        Categorical columns of ``obs``.
    k
        Neighbours; None takes that of the grid 1, 3, 5, ... whose majority vote predicts ``biology`` best.
    exclude
        Column within which rows are never neighbours (slide, patient); None compares all rows.
    use
        ``"latents"`` or ``"embedding"``.
    n_bootstrap
        Resamples of the values of ``exclude`` (of rows without it) for ``sd``.

    Returns
    -------
    Series
        ``robustness_index, sd, k, balanced_accuracy, n_so, n_os, n_samples, status``. Status ``unidentifiable`` (NaN):
        some biology occurs at no or some site lacks it; ``undefined`` (NaN): no neighbour is SO or OS.

    Raises
    ------
    InputError
        For unknown columns or ``use``.
    """
    adata = in_memory(adata)
    columns = [biology, technical] + ([exclude] if exclude else [])
    absent = [c for c in columns if c not in adata.obs]
    if absent:
        raise InputError(f"{absent[0]!r} is not a column of obs; exclude=None compares rows of one slide too")
    if use not in ("latents", "embedding") or (use == "embedding" and "embedding" not in adata.obsm):
        raise InputError(f"use={use!r}: there are 'latents' and, where kept, 'embedding'")
    known = adata.obs[columns].notna().all(axis=1).to_numpy()
    X = sp.csr_matrix(adata.X[known], dtype=np.float64) if use == "latents" else adata.obsm["embedding"][known]
    norm = np.sqrt(squares(X))
    X = sp.diags(1.0 / np.where(norm > 0, norm, 1.0)) @ X
    bio, tech = (pd.factorize(adata.obs.loc[known, c].astype(str))[0] for c in columns[:2])
    slide = pd.factorize(adata.obs.loc[known, exclude].astype(str))[0] if exclude else np.arange(len(bio))
    out = {"robustness_index": np.nan, "sd": np.nan, "k": k, "balanced_accuracy": np.nan, "n_so": 0, "n_os": 0}
    out |= {"n_samples": len(bio), "status": "unidentifiable"}
    if len(bio) and min(bio.max(), tech.max()) > 0 and (pd.crosstab(bio, tech) > 0).all(axis=None):
        near = neighbours(X, slide, max(GRID) if k is None else k)
        accuracy = {j: vote(near[:, :j], bio) for j in (GRID if k is None else [k]) if j <= near.shape[1]}
        best = max(accuracy, key=accuracy.get)
        so, os = pairs(near[:, :best], bio, tech)
        rng, codes = np.random.default_rng(random_state), np.unique(slide, return_inverse=True)[1]
        times = rng.multinomial(codes.max() + 1, np.full(codes.max() + 1, 1.0 / (codes.max() + 1)), size=n_bootstrap)
        a, b = times @ np.bincount(codes, so), times @ np.bincount(codes, os)
        enough = a + b > 0
        out |= {"k": best, "balanced_accuracy": accuracy[best], "n_so": int(so.sum()), "n_os": int(os.sum())}
        out["status"] = "ok" if so.sum() + os.sum() else "undefined"
        if out["status"] == "ok":
            out |= {"robustness_index": so.sum() / (so.sum() + os.sum()), "sd": (a / (a + b))[enough].std(ddof=1)}
    return pd.Series(out)


def squares(X: Any) -> np.ndarray:
    """Squared length of every row."""
    return np.asarray(X.multiply(X).sum(axis=1)).ravel() if sp.issparse(X) else (np.asarray(X, float) ** 2).sum(axis=1)


def neighbours(X: Any, slide: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest (Euclidean) of every row on other slides, nearest first, -1 where there are fewer."""
    square, n = squares(X), X.shape[0]
    out = np.full((n, min(k, n - 1)), -1)
    for start in range(0, n, 512):
        rows = np.arange(start, min(start + 512, n))
        product = X[rows] @ X.T
        distance = square[None, :] - 2.0 * (product.toarray() if sp.issparse(product) else product)
        distance[slide[rows][:, None] == slide[None, :]] = np.inf
        order = np.argsort(distance, axis=1, kind="stable")[:, : out.shape[1]]
        out[rows] = np.where(np.isfinite(np.take_along_axis(distance, order, axis=1)), order, -1)
    return out


def pairs(near: np.ndarray, bio: np.ndarray, tech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SO and OS neighbours of every row."""
    there, same_bio, same_tech = near >= 0, bio[near] == bio[:, None], tech[near] == tech[:, None]
    return (there & same_bio & ~same_tech).sum(axis=1), (there & ~same_bio & same_tech).sum(axis=1)


def vote(near: np.ndarray, bio: np.ndarray) -> float:
    """Balanced accuracy of the majority of the neighbours."""
    counts = np.stack([((bio[near] == c) & (near >= 0)).sum(axis=1) for c in range(bio.max() + 1)], axis=1)
    right = counts.argmax(axis=1) == bio
    return float(np.mean([right[bio == c].mean() for c in range(bio.max() + 1)]))
