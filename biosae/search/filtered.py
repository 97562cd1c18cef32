"""Clusters along a few chosen latents, beside those of all latents and of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.search.cluster import alive_rows, ari, categories, chosen, free_column, label_columns, representation

LINKAGES = ("average", "spectral")
MAX_ROWS = 10_000
"""Most rows between which all Jaccard distances are held at once."""


def cluster_filtered(
    adata: Any,
    latents: str | Sequence[str],
    *,
    n_clusters: int,
    linkage: str = "average",
    labels: Sequence[str] | None = None,
    key: str = "filtered",
    random_state: int = 0,
) -> pd.DataFrame:
    """Clusters along a few chosen latents, compared with clusters along all of them and along the embedding.

    Parameters
    ----------
    adata
        Latents (n, m), at most 10,000 rows. ``obs[key]`` is written.
    latents
        Names, or a text that is looked for in ``var["name"]``.
    n_clusters
        Clusters, besides ``"silent"`` for the samples in which none of the latents fires.
    linkage
        ``"average"`` (agglomerative) or ``"spectral"``.
    labels
        Columns to compare with; None as in :func:`cluster`.
    random_state
        Seed of ``"spectral"``.

    Returns
    -------
    DataFrame
        One row a representation (``chosen latents``, ``all latents``, and ``embedding`` where ``obsm`` has it):
        ``representation, n_clusters, ari_<label>``, over the samples that are not silent along the chosen ones. All
        rows have the same linkage and the same number of clusters.

    Raises
    ------
    InputError
        For unknown names, too many rows, or fewer distinct patterns of latents than clusters.

    Notes
    -----
    Codes are made binary (fires or not) and compared by the Jaccard distance ``1 - |A and B| / |A or B|``; embeddings
    by the cosine distance. After Jiang et al. (2025), arXiv 2512.10092, whose filter is the query.
    """
    if linkage not in LINKAGES:
        raise InputError(f"linkage={linkage!r}; {nearest(linkage, LINKAGES)}")
    names = chosen(adata, latents)
    V = representation(adata, names, None)
    alive = alive_rows(V)
    if not 2 <= n_clusters <= alive.sum():
        raise InputError(f"n_clusters={n_clusters}, and {int(alive.sum())} samples have a code along these latents")
    if alive.sum() > MAX_ROWS:
        raise InputError(
            f"{int(alive.sum()):,} samples; all distances between more than {MAX_ROWS:,} are too much for memory: take "
            "a part of them, or cluster(adata, latents=...), which needs neighbours only"
        )
    free_column(adata, key)
    everything = representation(adata, list(adata.var_names), None)
    distances = {"chosen latents": jaccard(V[alive]), "all latents": jaccard(everything[alive])}
    if "embedding" in adata.obsm:
        from sklearn.metrics.pairwise import cosine_distances

        distances["embedding"] = cosine_distances(np.asarray(adata.obsm["embedding"])[alive])
    compared, rows = label_columns(adata.obs, labels), []
    for name, D in distances.items():
        found = _cut(D, n_clusters, linkage, random_state)
        if name == "chosen latents":
            adata.obs[key] = categories(found, alive)
            adata.uns[key] = {"params": {"latents": list(names), "linkage": linkage, "n_clusters": n_clusters}}
        row = {"representation": name, "n_clusters": len(np.unique(found))}
        rows.append(row | {f"ari_{c}": ari(found, values[alive]) for c, values in compared.items()})
    return pd.DataFrame(rows)


def jaccard(V: Any) -> np.ndarray:
    """Jaccard distances (n, n) between the sets of latents that fire in each row of V (n, m).

    Two empty sets have distance 0, an empty and another set 1.
    """
    on = sp.csr_matrix(V != 0, dtype=np.float64)
    both = np.asarray((on @ on.T).todense())
    size = np.asarray(on.sum(axis=1)).ravel()
    either = size[:, None] + size[None, :] - both
    return 1.0 - np.divide(both, either, out=np.ones_like(both), where=either > 0)


def _cut(D: np.ndarray, n_clusters: int, linkage: str, random_state: int) -> np.ndarray:
    if linkage == "spectral":
        from sklearn.cluster import SpectralClustering

        affinity = np.clip(1.0 - D, 0.0, None)
        return SpectralClustering(n_clusters, affinity="precomputed", random_state=random_state).fit_predict(affinity)
    from sklearn.cluster import AgglomerativeClustering

    return AgglomerativeClustering(n_clusters, metric="precomputed", linkage="average").fit_predict(D)
