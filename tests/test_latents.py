"""``encode``: codes, pooling, summaries, and the round trip through .h5ad."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biosae.embeddings.store import Embeddings
from biosae.errors import IdentityError, InputError
from biosae.latents import encode, plain
from biosae.sae import SAE

IDENTITY = {"encoder": "e", "layer": "last", "pool": "tokens", "weights_sha256": "0" * 64, "licence": None}


class Copy:
    """Stands in for an SAE: the codes are the positive part of the embedding."""

    def __init__(self, d):
        self.decoder_ = np.eye(d, dtype=np.float32)

    def codes(self, X):
        return sp.csr_matrix(np.maximum(X.array(), 0))


def embeddings(n=7, T=6, d=5, seed=0, **obs):
    rng = np.random.default_rng(seed)
    X = np.where(rng.random((n * T, d)) < 0.4, rng.normal(size=(n * T, d)), -1).astype(np.float32)
    X[:T, 0] = 2.0  # active in every token of the first sample
    table = pd.DataFrame({"patient": [f"p{i // 2}" for i in range(n)], **obs}, index=[f"s{i}" for i in range(n)])
    return Embeddings.from_array(X, obs=table, identity=IDENTITY, tokens_per_sample=T, grid=(2, 3) if T == 6 else None)


@pytest.mark.parametrize("block", [3, 12, 65_536])
def test_tokens_are_pooled_as_dense(monkeypatch, block):
    monkeypatch.setattr("biosae.latents.BLOCK", block)
    emb = embeddings()
    Z = np.maximum(emb.array(), 0).reshape(7, 6, 5)
    expected = {"mean": Z.mean(1), "max": Z.max(1), "fraction_active": (Z > 0).mean(1)}
    for how, dense in expected.items():
        adata = encode(Copy(5), emb, tokens=how)
        assert sp.isspmatrix_csr(adata.X) and adata.X.dtype == np.float32
        assert adata.X.toarray() == pytest.approx(dense, abs=1e-6)
        assert adata.obsm["embedding"] == pytest.approx(emb.array().reshape(7, 6, 5).mean(1), abs=1e-6)
        assert adata.obs_names.tolist() == [f"s{i}" for i in range(7)]


def test_negative_codes_are_pooled_with_their_zeros():
    class Signed(Copy):
        def codes(self, X):
            return sp.csr_matrix(np.where(X.array() < -0.9, X.array(), 0))

    emb = embeddings()
    Z = np.where(emb.array() < -0.9, emb.array(), 0).reshape(7, 6, 5)
    assert encode(Signed(5), emb, tokens="max").X.toarray() == pytest.approx(Z.max(1))


def test_tokens_are_kept_with_their_place():
    adata = encode(Copy(5), embeddings(), tokens=None)
    assert adata.shape == (42, 5) and adata.obs_names[7] == "s1#1"
    assert adata.obs["sample_id"].tolist() == np.repeat([f"s{i}" for i in range(7)], 6).tolist()
    assert adata.obs[["token_row", "token_col"]].iloc[:6].to_numpy().tolist() == [
        [r, c] for r in (0, 1) for c in range(3)
    ]
    assert adata.obsm["embedding"].shape == (42, 5) and adata.uns["biosae"]["tokens"] == "kept"


def test_summaries_of_latents():
    emb = embeddings(T=1, n=40)
    Z = np.maximum(emb.array(), 0)
    var = encode(Copy(5), emb).var
    assert var.index.tolist() == [f"L{j:04d}" for j in range(5)]
    assert var["n_active"].tolist() == (Z > 0).sum(0).tolist()
    assert var["density"].to_numpy() == pytest.approx((Z > 0).mean(0))
    assert var["mean_active"].to_numpy() == pytest.approx(Z.sum(0) / (Z > 0).sum(0), rel=1e-6)
    assert var["max"].to_numpy() == pytest.approx(Z.max(0))
    assert (
        var["n_active_patients"].tolist()
        == (pd.DataFrame(Z > 0).groupby(emb.obs["patient"].to_numpy()).any()).sum().tolist()
    )


def test_round_trip_of_a_fitted_sae(tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "patient": [f"p{i % 10}" for i in range(200)],
            "note": [None, "x"] * 100,
            "mixed": [1, "a"] * 100,
            "flag": [True, False] * 100,
        },
        index=[f"s{i}" for i in range(200)],
    )  # fmt: skip
    emb = Embeddings.from_array(rng.normal(size=(200, 8)).astype(np.float32), obs=obs, identity=IDENTITY)
    sae = SAE("topk", n_latents=16, k=4, n_steps=20, random_state=0, device="cpu").fit(emb)
    adata = encode(sae, emb)
    assert abs(adata.X - sae.transform(emb)).max() == 0 and adata.varm["decoder"].shape == (16, 8)
    assert adata.obs["sae_trained_on"].dtype == bool and 0 < adata.obs["sae_trained_on"].sum() < 200
    assert adata.obs.groupby("patient")["sae_trained_on"].nunique().eq(1).all()
    adata.write_h5ad(tmp_path / "latents.h5ad")
    back = anndata.read_h5ad(tmp_path / "latents.h5ad")
    assert (
        abs(back.X - adata.X).max() == 0 and back.obs["sae_trained_on"].tolist() == adata.obs["sae_trained_on"].tolist()
    )
    uns = back.uns["biosae"]
    assert uns["identity"]["encoder"] == "e" and "licence" not in uns["identity"]
    assert uns["fingerprint"] == emb.fingerprint and int(uns["sae"]["k"]) == 4 and "versions" in uns["provenance"]
    other = Embeddings.from_array(emb.array(), obs=obs, identity={**IDENTITY, "layer": "first"})
    with pytest.raises(IdentityError):
        encode(sae, other)


def test_options():
    emb = embeddings()
    with pytest.raises(InputError, match="did you mean 'mean'"):
        encode(Copy(5), emb, tokens="men")
    assert "embedding" not in encode(Copy(5), emb, keep_embedding=False).obsm
    assert plain({"a": None, "b": {"c": None, "d": (1, 2)}, "e/f": np.float32(1)})["e_f"] == 1.0
    assert "a" not in plain({"a": None}) and plain({"b": {"c": None}}) == {"b": {}}


def test_arguments_of_another_kind_are_named():
    with pytest.raises(InputError, match=r"got a ndarray and a int; .*from_array"):
        encode(np.zeros((3, 2)), 4)
