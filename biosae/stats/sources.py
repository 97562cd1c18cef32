"""The families of features that are tested: latents, and as controls the raw embedding and its components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.stats import chunks
from biosae.stats.nested import is_chunked

SCORES = "embedding_pca"
"""Slot of ``obsm`` for components fitted elsewhere. Not ``X_pca``, where scanpy puts the components of the latents."""


@dataclass
class Source:
    """One family of features: sparse latents, or dense controls."""

    name: str
    X: Any
    names: list[str]
    columns: slice | None = None
    """Range of the latents that this part holds, where ``X`` is not in memory."""


def sources(adata: Any, *, controls: bool, pooled: bool = True, pca: int = 50) -> list[Source]:
    """Latents, and as controls the raw embedding dimensions and its principal components where they are there.

    Latents that are not in memory come in several parts, unless they are ``pooled`` to units.
    """
    names = [str(v) for v in adata.var_names]
    if not is_chunked(adata.X):
        out = [Source("latent", adata.X if sp.issparse(adata.X) else sp.csr_matrix(adata.X), names)]
    elif pooled:
        out = [Source("latent", adata.X, names)]
    else:
        ranges = chunks.column_blocks(chunks.n_active(adata.X))
        out = [Source("latent", adata.X, names[columns], columns) for columns in ranges]
    if controls and "embedding" in adata.obsm:
        raw = adata.obsm["embedding"]
        raw = np.asarray(raw.toarray() if sp.issparse(raw) else raw, dtype=np.float64)
        if not np.isfinite(raw).all():
            raise InputError(
                "obsm['embedding'] holds NaN or infinite values; leave those samples out, or controls=False"
            )
        components = adata.obsm[SCORES] if SCORES in adata.obsm else principal_components(raw, n=pca)[0]
        width = max(4, len(str(raw.shape[1] - 1)))
        out.append(Source("raw", raw, [f"raw_{j:0{width}d}" for j in range(raw.shape[1])]))
        components = np.asarray(components, dtype=np.float64)
        out.append(Source("pca", components, [f"pc_{j:03d}" for j in range(components.shape[1])]))
    return out


def principal_components(X: np.ndarray, *, n: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (rows, c), mean (d,) and loadings (d, c) of the first ``c = min(n, d, rows - 1)`` components.

    By eigenvectors of the covariance in float64; the largest loading of each component is positive.
    """
    X = np.asarray(X, dtype=np.float64)
    mean = X.mean(axis=0)
    centred = X - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    c = max(0, min(n, X.shape[1], len(X) - 1, int((values > values[-1] * 1e-12).sum())))
    loadings = vectors[:, ::-1][:, :c]
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(c)])
    return centred @ loadings, mean, loadings
