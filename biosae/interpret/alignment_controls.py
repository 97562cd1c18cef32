"""Alignment of several dictionaries side by side, and controls that have learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.interpret.alignment import alignment
from biosae.interpret.rows import joined


def compare_alignment(models: Mapping[str, Any], emb: Any, labels: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Alignment of several dictionaries of the same embeddings with the same labels.

    Parameters
    ----------
    models
        Name to a fitted :class:`biosae.sae.Coder`, to codes (rows of ``emb``, m), or to ``"raw"`` for the embedding's
        own dimensions about their training mean. Fit them on the training part alone.
    emb
        :class:`biosae.Embeddings`.
    labels, **options
        As in :func:`alignment`.

    Returns
    -------
    DataFrame
        Rows of :func:`alignment` with ``model`` in front and, repeated over the classes, ``n_latents``, ``l0`` (mean
        active latents a row) and ``nmse`` (``sum ||x - x^||^2 / sum ||x - mean||^2``) of the test rows; nmse is NaN
        where there is no reconstruction.

    Raises
    ------
    InputError
        As :func:`alignment`, or if there is no model.
    """
    from biosae.latents import encode

    if not models:
        raise InputError("name at least one model: {'sae': sae, 'pca': pca}")
    template = encode(_Raw(emb.shape[1]), emb, tokens=None, keep_embedding=False)
    _, _, parts = joined(template, labels, **{k: options[k] for k in ("split", "train", "test") if k in options})
    tables = []
    for name, model in models.items():
        adata = _coded(model, emb, template, parts["train"])
        codes = sp.csr_matrix(adata.X)[parts["test"]]
        l0 = np.count_nonzero(codes.data) / codes.shape[0]
        nmse = _nmse(model, codes, emb[parts["test"]]) if hasattr(model, "inverse_transform") else np.nan
        table = alignment(adata, labels, **options)
        facts = {"model": name, "n_latents": adata.n_vars, "l0": l0, "nmse": nmse}
        for at, (key, value) in enumerate(facts.items()):
            table.insert(at, key, value)
        tables.append(table)
    out = pd.concat(tables, ignore_index=True)
    out.attrs["biosae"] = tables[0].attrs["biosae"]
    return out


def random_codes(emb: Any, *, n_latents: int, k: int, rows: Any = None, random_state: int = 0) -> sp.csr_matrix:
    """Codes of random directions, as sparse as an SAE's: a control that has learnt nothing but the mean.

    Parameters
    ----------
    emb
        :class:`biosae.Embeddings` or an array (n, d).
    n_latents, k
        Directions (standard normal, unit length) and codes kept a row: the k largest products with the centred row, of
        those above 0.
    rows
        Rows whose mean is the centre; None for all.
    random_state
        Seed.

    Returns
    -------
    csr_matrix (n, n_latents)
        float32.

    Raises
    ------
    InputError
        If ``k`` is not between 1 and ``n_latents``.
    """
    if not 1 <= k <= n_latents:
        raise InputError(f"k={k!r} must be between 1 and n_latents={n_latents!r}")
    X = np.asarray(emb, np.float32)
    centre = X[slice(None) if rows is None else rows].mean(0, dtype=np.float64).astype(np.float32)
    atoms = np.random.default_rng(random_state).standard_normal((n_latents, X.shape[1])).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    parts = []
    for start in range(0, len(X), 16_384):
        z = (X[start : start + 16_384] - centre) @ atoms.T
        least = -np.partition(-z, k - 1, axis=1)[:, k - 1 : k]
        parts.append(sp.csr_matrix(np.where((z >= least) & (z > 0), z, 0)))
    return sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.float32)


class _Raw:
    """The embedding's own dimensions behind the contract of a coder."""

    def __init__(self, d: int) -> None:
        self.decoder_ = np.eye(d, dtype=np.float32)

    def codes(self, X: Any) -> sp.csr_matrix:
        return sp.csr_matrix(np.asarray(X, np.float32))


def _coded(model: Any, emb: Any, template: Any, train: np.ndarray) -> Any:
    """Codes of a model as AnnData with the rows of the template."""
    import anndata

    if isinstance(model, str):
        if model != "raw":
            raise InputError(f"model {model!r} is unknown; {nearest(model, ['raw'])}, or give a fitted model or codes")
        X = template.X.toarray()
        codes = sp.csr_matrix(X - X[train].mean(0, dtype=np.float64).astype(np.float32))
    else:
        codes = sp.csr_matrix(model.codes(emb) if hasattr(model, "codes") else model, dtype=np.float32)
    if codes.shape[0] != template.n_obs:
        raise InputError(f"codes have {codes.shape[0]} rows, the embeddings {template.n_obs}")
    width = max(4, len(str(codes.shape[1] - 1)))
    var = pd.DataFrame(index=[f"L{j:0{width}d}" for j in range(codes.shape[1])])
    return anndata.AnnData(X=codes, obs=template.obs, var=var)


def _nmse(model: Any, codes: sp.csr_matrix, X: np.ndarray) -> float:
    error = np.square(X - np.asarray(model.inverse_transform(codes), np.float32)).sum(dtype=np.float64)
    return float(error / np.square(X - X.mean(0, dtype=np.float64)).sum(dtype=np.float64))
