"""Figures of clusters, decoder directions, cohorts and pairs: what they draw is what the tables hold."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biosae import pl
from biosae.errors import InputError


@pytest.fixture
def adata() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    n, m = 40, 6
    obs = pd.DataFrame({
        "cluster": pd.Categorical(["0"] * 20 + ["1"] * 15 + ["silent"] * 5, categories=["0", "1", "silent"]),
        "age": np.r_[np.arange(39.0), np.nan], "grade": ["low", "high", None, "low"] * 10,
    }, index=[f"s{i}" for i in range(n)])  # fmt: skip
    out = anndata.AnnData(X=sp.csr_matrix(rng.random((n, m)), dtype=np.float32), obs=obs)
    out.var_names = [f"L{j:04d}" for j in range(m)]
    out.obsm["X_umap"] = np.r_[rng.normal(size=(35, 2)), np.full((5, 2), np.nan)]
    out.uns["cluster"] = {"params": {"latents": "all"}}
    out.varm["X_umap"] = np.r_[rng.normal(size=(5, 2)), [[np.nan, np.nan]]]
    out.var["concept"] = ["a", "a", "b", "", "", ""]
    return out


@pytest.fixture
def stability() -> pd.DataFrame:
    return pd.DataFrame({
        "resolution": [0.5, 1.0, 2.0], "n_clusters": [1, 4, 9], "ari_seeds": [np.nan, 0.9, 0.6],
        "ari_seeds_min": [np.nan, 0.8, 0.5], "ari_subsamples": [np.nan, 0.7, 0.4], "kept": [False, True, False],
        "ari_label": [0.0, 0.5, -0.1],
    })  # fmt: skip


@pytest.fixture
def table() -> pd.DataFrame:
    out = pd.DataFrame({
        "latent": ["L0001", "L0000", "L0002", "L0003"], "frequency_a": [0.9, 0.1, 0.5, 0.0],
        "frequency_b": [0.2, 0.5, 0.5, 0.0], "difference": [0.7, -0.4, 0.0, 0.0], "ci_low": [0.5, -0.6, -0.2, -0.1],
        "ci_high": [0.8, -0.1, 0.2, 0.1], "p": [1e-4, 0.03, 0.9, np.nan], "q": [3e-4, 0.045, 0.9, np.nan], "n_a": 12,
        "n_b": 15,
    })  # fmt: skip
    out.attrs["biosae"] = {"by": "site", "a": "Hospital X", "b": "Hospital Y", "unit": "patient"}
    return out


def dots(ax) -> np.ndarray:
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections if hasattr(c, "get_offsets")])


def test_clusters_are_drawn_where_they_lie(adata) -> None:
    fig = pl.clusters(adata, colour=["cluster", "age", "grade", "L0003"])
    first, age, grade, latent = fig.axes[:4]
    assert len(dots(first)) == 35 and "5 silent, not shown" in first.get_title(loc="left")
    centre = {t.get_text(): t.get_position() for t in first.texts}
    assert centre["1"] == pytest.approx(np.median(adata.obsm["X_umap"][20:35], axis=0))
    assert len(dots(age)) >= 35 and {t.get_text() for t in grade.get_legend().texts} == {"high (9)", "low (17)"}
    assert latent.get_title(loc="left").startswith("L0003: 35 samples") and len(fig.axes) == 6  # two colour bars
    with pytest.raises(InputError, match="neither a column"):
        pl.clusters(adata, colour="ages")
    with pytest.raises(InputError, match="X_tsne"):
        pl.clusters(adata, basis="X_tsne")
    adata.obs["many"] = [f"c{i}" for i in range(30)] + [f"d{i}" for i in range(10)]
    pl.clusters(adata, colour="many")
    big = anndata.AnnData(obs=pd.DataFrame({"x": [str(i) for i in range(60)]}, index=[f"r{i}" for i in range(60)]))
    big.obsm["X_umap"] = np.zeros((60, 2))
    with pytest.raises(InputError, match="60 classes"):
        pl.clusters(big, colour="x")


def test_stability_shows_every_resolution_and_what_was_kept(stability) -> None:
    ax = pl.cluster_stability(stability)
    by_name = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert by_name["label"].tolist() == [0.0, 0.5, -0.1] and by_name["other seeds"][1] == 0.9
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.5\n1", "1\n4", "2\n9"] and ax.get_ylim()[0] < -0.1
    with pytest.raises(InputError, match="'kept'"):
        pl.cluster_stability(stability.drop(columns="kept"))


def test_decoder_map_counts_labels(adata) -> None:
    result = {"status": "ok", "silhouette": 0.25, "null_mean": -0.01, "p": 0.001, "n_rows": 3}
    ax = pl.decoder_map(adata, result=result)
    assert {t.get_text() for t in ax.get_legend().texts} == {"no label (2)", "a (2)", "b (1)"}
    assert "silhouette 0.250" in ax.get_title(loc="left").replace("\n", " ") and len(dots(ax)) == 5
    del adata.varm["X_umap"]
    with pytest.raises(InputError, match="decoder_geometry"):
        pl.decoder_map(adata)


def test_diff_draws_frequencies_and_intervals(table) -> None:
    left, right = pl.diff(table, n=2).axes
    assert len(dots(left)) == 4 and "Hospital X" in left.get_ylabel() and "15 patients" in left.get_xlabel()
    assert [t.get_text() for t in right.get_yticklabels()] == ["L0000", "L0001"]
    assert [t.get_text() for t in right.texts] == ["q 0.045", "q <0.001"]
    segments = right.collections[0].get_segments()
    assert segments[1][:, 0].tolist() == [0.5, 0.8]
    with pytest.raises(InputError, match="no latent was tested"):
        pl.diff(table.assign(p=np.nan))


def test_pairs_name_those_that_pass() -> None:
    table = pd.DataFrame({
        "latent_a": ["L0", "L0", "L1"], "latent_b": ["L1", "L2", "L2"], "npmi": [0.6, 0.1, -0.2],
        "r_within": [0.4, 0.0, -0.1], "p": [1e-5, 0.4, np.nan], "q": [2e-5, 0.4, np.nan],
        "status": ["ok", "ok", "too_sparse"],
    })  # fmt: skip
    table.attrs["biosae"] = {"strata": "patient"}
    ax = pl.pairs(table)
    assert "within patient" in ax.get_ylabel() and len(dots(ax)) == 3
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["L0 + L1"]
    with pytest.raises(InputError, match="'npmi'"):
        pl.pairs(table.drop(columns="npmi"))
