"""What a factor may be read from: embeddings, latents, and either of them with some latents taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest

FEATURES = ("raw", "latents", "latents_filtered", "raw_filtered", "pca", "reconstruction")
"""``raw``: ``obsm["embedding"]``; ``pca``: its components; ``reconstruction``: ``Z W_dec``; ``*_filtered``:
without some latents."""


def feature_sets(adata: Any, names: Sequence[str] | None = None, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Features (n, d) by name, CSR or float32 arrays; ``pca`` is the embedding itself, to be reduced by the caller.

    Parameters
    ----------
    adata
        Latents.
    names
        Among :data:`FEATURES`; None takes what is there of ``raw``, ``latents`` and, with ``without``,
        ``latents_filtered``.
    without
        Latents left out of the filtered sets.

    Raises
    ------
    InputError
        For unknown names or latents, or sets whose parts are not in the table.
    """
    if names is None:
        names = ["raw"] * ("embedding" in adata.obsm) + ["latents"] + ["latents_filtered"] * bool(len(without))
    drop = positions(adata, without)
    out: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in FEATURES:
            raise InputError(f"unknown features {name!r}; {nearest(name, FEATURES)}")
        if name.endswith("_filtered") and not len(drop):
            raise InputError(f"{name!r} needs without=, the latents to leave out")
        if name in ("raw", "pca"):
            out[name] = embedding(adata)
        elif name == "raw_filtered":
            out[name] = ablate(adata, without).astype(np.float32)
        elif name == "reconstruction":
            _additive(adata.uns.get("biosae", {}))
            out[name] = np.asarray(sp.csr_matrix(adata.X) @ decoder(adata), dtype=np.float32)
        else:
            X = sp.csr_matrix(adata.X)
            out[name] = X if name == "latents" else X[:, np.setdiff1d(np.arange(adata.n_vars), drop)]
            if not out[name].shape[1]:
                raise InputError("without= leaves out every latent, so that nothing is left to read from")
    return out


def positions(adata: Any, latents: Sequence[str]) -> np.ndarray:
    """Columns of the named latents.

    Raises
    ------
    InputError
        For an unknown name.
    """
    at = pd.Index(adata.var_names.astype(str)).get_indexer([str(name) for name in latents])
    if (at < 0).any():
        raise InputError(f"no latent {list(latents)[int(np.flatnonzero(at < 0)[0])]!r} to leave out")
    return at


def embedding(adata: Any) -> np.ndarray:
    """``obsm["embedding"]`` (n, d), float32.

    Raises
    ------
    InputError
        If it was not kept.
    """
    if "embedding" not in adata.obsm:
        raise InputError("the table has no embeddings; encode with keep_embedding=True")
    return np.asarray(adata.obsm["embedding"], dtype=np.float32)


def decoder(adata: Any) -> np.ndarray:
    """``varm["decoder"]`` (m, d), float32, in units of the embedding.

    Raises
    ------
    InputError
        If it is not in the table.
    """
    if "decoder" not in adata.varm:
        raise InputError('the table has no varm["decoder"]; encode with biosae.encode')
    return np.asarray(adata.varm["decoder"], dtype=np.float32)


def ablate(adata: Any, latents: Sequence[str]) -> np.ndarray:
    """Embeddings with latents set to zero and the reconstruction error kept: ``x' = x - z_S W_S``, (n, d) float64.

    With ``x = z W + b + e`` this is ``(z with S zeroed) W + b + e``; no latents give ``x`` itself, bit for bit.

    Parameters
    ----------
    adata
        Latents with ``obsm["embedding"]`` (n, d) and ``varm["decoder"]`` (m, d).
    latents
        Names of the latents to ablate.

    Raises
    ------
    InputError
        For unknown latents, absent embeddings or decoder, or tokens pooled so that codes no longer add up to the
        pooled embedding.
    """
    x, at = embedding(adata), positions(adata, latents)
    if not len(at):
        return x.astype(np.float64)
    part = np.asarray(sp.csr_matrix(adata.X, dtype=np.float64)[:, at] @ decoder(adata)[at].astype(np.float64))
    return x - part * row_scale(adata, x)


def row_scale(adata: Any, x: np.ndarray) -> np.ndarray | float:
    """What codes times decoder must be multiplied by to be in units of the embedding: 1, or a factor a row (n, 1).

    An SAE trained with ``normalise="layernorm"`` or ``"l2"`` reads rows divided by their spread or norm.

    Raises
    ------
    InputError
        Where tokens were pooled in a way that does not keep the sum.
    """
    record = adata.uns.get("biosae", {})
    _additive(record)
    tokens, normalise = record.get("tokens", "none"), dict(record.get("sae", {})).get("normalise")
    rowwise = record.get("rowwise", normalise if normalise in ("layernorm", "l2") else None)  # older files say less
    if tokens in ("max", "fraction_active") or (rowwise and tokens == "mean"):
        raise InputError(
            f"codes pooled by {tokens!r}{' of an SAE that scales every token' if rowwise else ''} do not add up to the "
            "pooled embedding, so nothing can be ablated; encode with tokens=None"
            + ("" if rowwise else " or tokens='mean'")
        )
    if not rowwise:
        return 1.0
    from biosae.sae.normalise import ROWWISE

    return np.asarray(ROWWISE[rowwise](x)[1], dtype=np.float64)


def _additive(record: Mapping[str, Any]) -> None:
    """Refuse latents that do not add their code times their atom to the embedding."""
    if not record.get("additive", True):
        name = dict(record.get("sae", {})).get("architecture")
        raise InputError(
            f"latents of {name!r} do not add to the embedding one by one, so none can be taken away, nor is Z W_dec "
            "the reconstruction; take those of another architecture"
        )
