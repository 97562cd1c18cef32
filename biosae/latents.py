"""SAE x Embeddings -> AnnData of sparse codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae import provenance
from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    import anndata

TOKENS = ("mean", "max", "fraction_active")
BLOCK = 65_536


def encode(sae: Any, emb: Any, *, tokens: str | None = "mean", keep_embedding: bool = True) -> anndata.AnnData:
    """Sparse codes of embeddings as AnnData, one row a sample (or a token).

    Parameters
    ----------
    sae
        Fitted :class:`biosae.sae.Coder`: an SAE, ITDA, a baseline.
    emb
        :class:`biosae.Embeddings` of the encoder, layer and preprocessing that the SAE was trained on. Read in blocks.
    tokens
        How the codes of a sample's tokens are pooled: ``"mean"``, ``"max"``, ``"fraction_active"`` (share of tokens in
        which the latent fires), or None to keep a row a token. No effect where a sample has one row, except that
        ``fraction_active`` is then 0 or 1.
    keep_embedding
        Also keep the embeddings in ``obsm["embedding"]`` (float32; mean over tokens where these are pooled).

    Returns
    -------
    AnnData
        ``X`` csr_matrix float32 (n, m), in units of the embedding; ``obs`` the samples (with tokens kept, also
        ``sample_id``, ``token_row``, ``token_col``), plus ``sae_trained_on`` where the patients that the SAE was
        trained on are known; ``var`` ``L0000`` ... with ``density`` (share of rows active), ``n_active``,
        ``n_active_patients`` (with a patient column), ``mean_active`` (mean over active rows), ``max``, and ``min``
        where codes may be negative;
        ``varm["decoder"]`` (m, d) float32; ``obsm["spatial"]`` (n, 2) float64, micrometres (x, y), where ``obs`` has
        ``x_um`` and ``y_um`` (of its tile for each token); ``uns["biosae"]`` plain dictionary: identity, sae, metrics,
        roles, tokens, ``additive`` (whether a latent adds its code times its atom to the embedding), ``rowwise``
        (``layernorm`` or ``l2`` where it does so after each row was scaled by itself), provenance.

    Raises
    ------
    InputError
        For an unknown ``tokens``.
    IdentityError
        If the embeddings come from another encoder, layer or preprocessing (raised by the SAE).
    """
    import anndata

    if not hasattr(sae, "codes") or not hasattr(emb, "tokens_per_sample"):
        raise InputError(
            f"encode(sae, emb) got a {type(sae).__name__} and a {type(emb).__name__}; pass a fitted SAE and Embeddings "
            "(wrap an array with Embeddings.from_array)"
        )
    if tokens is not None and tokens not in TOKENS:
        raise InputError(f"tokens={tokens!r} is unknown; {nearest(tokens, TOKENS)} or None")
    T = int(emb.tokens_per_sample)
    n_samples = len(emb.obs)
    per_token = tokens is None and T > 1
    X, embedding = _codes(sae, emb, T, n_samples, tokens, keep_embedding)
    obs = _plain_table(emb.obs.copy())
    if "patient" in obs and getattr(sae, "training_groups_", ()):
        obs["sae_trained_on"] = np.asarray(sae.trained_on(obs["patient"].astype(str)), dtype=bool)
    if per_token:
        obs = _per_token(obs, T, emb.grid)
    decoder = np.asarray(sae.decoder_, dtype=np.float32)
    width = max(4, len(str(X.shape[1] - 1)))
    var = pd.DataFrame(index=pd.Index([f"L{j:0{width}d}" for j in range(X.shape[1])], name="latent"))
    adata = anndata.AnnData(X=X, obs=obs, var=var.assign(**_summaries(X, obs)), varm={"decoder": decoder})
    if embedding is not None:
        adata.obsm["embedding"] = embedding
    if {"x_um", "y_um"} <= set(obs) and all(pd.api.types.is_numeric_dtype(obs[c]) for c in ("x_um", "y_um")):
        adata.obsm["spatial"] = obs[["x_um", "y_um"]].to_numpy(np.float64)
    settings = sae.get_params() if hasattr(sae, "get_params") else {}
    learnt = {name: getattr(sae, f"{name}_", None) for name in ("n_latents", "k", "random_state")}
    adata.uns["biosae"] = plain({
        "identity": getattr(emb, "identity", None),
        **_partner(sae),
        "fingerprint": getattr(emb, "fingerprint", None),
        "sae": {"class": type(sae).__name__, **settings, **{k: v for k, v in learnt.items() if v is not None}},
        "additive": bool(getattr(sae, "additive", True)),
        "rowwise": getattr(getattr(sae, "normaliser_", None), "rowwise", None),
        "metrics": getattr(sae, "metrics_", None),
        "roles": getattr(emb, "roles", None),
        "mpp": getattr(emb, "mpp", None),
        "tokens": "kept" if per_token else "none" if T == 1 and tokens != "fraction_active" else tokens,
        "tokens_per_sample": T,
        "provenance": provenance.record(),
    })  # fmt: skip
    return adata


def _partner(sae: Any) -> dict[str, Any]:
    """What a second table that the SAE learnt from hands down."""
    width = getattr(sae, "partner_features_", 0)
    return {"partner_features": width, "partner_identity": sae.partner_identity_} if width else {}


def _codes(
    sae: Any, emb: Any, T: int, n_samples: int, tokens: str | None, keep: bool
) -> tuple[sp.csr_matrix, np.ndarray | None]:
    """Codes block by block (whole samples), pooled as they come, and the embedding that goes with them."""
    pooled = tokens is not None and T > 1
    step = max(1, BLOCK // T)
    parts, dense = [], []
    for start in range(0, n_samples, step):
        view = emb.select(np.arange(start, min(start + step, n_samples)))
        Z = sae.codes(view)
        if tokens == "fraction_active":
            Z = (Z != 0).astype(np.float32)
        if pooled:
            Z = _pool(Z, T, "max" if tokens == "max" else "mean")
        parts.append(sp.csr_matrix(Z, dtype=np.float32))
        if keep:
            rows = view.array()
            dense.append(rows.reshape(-1, T, rows.shape[1]).mean(axis=1, dtype=np.float64) if pooled else rows)
    X = sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.float32)
    X.eliminate_zeros()
    X.sort_indices()
    return X, np.concatenate(dense).astype(np.float32) if keep else None


def _pool(Z: sp.csr_matrix, T: int, how: str) -> sp.csr_matrix:
    """Rows of T tokens pooled to one, sums in float64."""
    n = Z.shape[0] // T
    if how == "mean":
        member = sp.csr_matrix(
            (np.full(n * T, 1.0 / T), np.arange(n * T), np.arange(0, n * T + 1, T)), shape=(n, n * T)
        )
        return member @ Z.astype(np.float64)
    coo = Z.tocoo()
    key = (coo.row // T).astype(np.int64) * Z.shape[1] + coo.col
    order = np.argsort(key, kind="stable")
    key, value = key[order], coo.data[order]
    start = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.empty(0, np.int64)
    top = np.maximum.reduceat(value, start) if len(key) else value
    full = np.diff(np.r_[start, len(key)]) == T  # a token without the latent counts as zero
    top = np.where(full, top, np.maximum(top, 0))
    return sp.csr_matrix((top, (key[start] // Z.shape[1], key[start] % Z.shape[1])), shape=(n, Z.shape[1]))


def _per_token(obs: pd.DataFrame, T: int, grid: tuple[int, int] | None) -> pd.DataFrame:
    n = len(obs)
    token = np.tile(np.arange(T), n)
    out = obs.iloc[np.repeat(np.arange(n), T)].copy()
    out.insert(0, "sample_id", out.index.astype(str))
    columns = grid[1] if grid is not None else T
    out["token_row"], out["token_col"] = token // columns, token % columns
    digits = len(str(T - 1))
    out.index = pd.Index([f"{s}#{t:0{digits}d}" for s, t in zip(out["sample_id"], token)], name="token_id")
    return out


def _summaries(X: sp.csr_matrix, obs: pd.DataFrame) -> dict[str, np.ndarray]:
    n, m = X.shape
    columns = X.tocsc()
    active = np.diff(columns.indptr)
    total = np.asarray(X.sum(axis=0, dtype=np.float64)).ravel()
    out = {
        "density": active / max(n, 1),
        "n_active": active.astype(np.int64),
        "mean_active": np.divide(total, active, out=np.zeros(m), where=active > 0).astype(np.float32),
        "max": np.asarray(X.max(axis=0).todense()).ravel() if n else np.zeros(m, np.float32),
    }
    if n and X.data.min(initial=0) < 0:
        out["min"] = np.asarray(X.min(axis=0).todense()).ravel()
    if "patient" in obs:
        codes, levels = pd.factorize(obs["patient"])
        known = codes >= 0
        member = sp.csr_matrix((np.ones(known.sum()), (codes[known], np.flatnonzero(known))), shape=(len(levels), n))
        out["n_active_patients"] = np.asarray(((member @ (X != 0)) > 0).sum(axis=0)).ravel().astype(np.int64)
    return out


def _plain_table(obs: pd.DataFrame) -> pd.DataFrame:
    """Object columns that hold numbers, booleans or mixtures become types that .h5ad can hold."""
    for name in obs.columns:
        if obs[name].dtype == object:
            better = obs[name].infer_objects()
            if better.dtype == object:
                text = better.map(lambda v: v if pd.isna(v) else str(v))
                better = text if text.isna().any() else text.astype(str)
                better = better.astype("category") if text.isna().any() else better
            obs[name] = better
    return obs


def plain(value: Any) -> Any:
    """Only dictionaries with text keys, text, numbers and lists: what ``.h5ad`` holds and gives back. None is left
    out.
    """
    if isinstance(value, Mapping):
        kept = {str(k).replace("/", "_"): plain(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.ndarray) or (
        isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
    ):
        return np.asarray(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [str(v) for v in value]
    return str(value)
