"""Clusters and decoder geometry: worked numbers, other implementations, planted groups, and no groups."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jaccard as scipy_jaccard
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

import biosae as bs
from biosae.errors import InputError, MissingExtraError, StatisticsError
from biosae.search.cluster import ari, cluster, exact_graph
from biosae.search.filtered import cluster_filtered, jaccard
from biosae.search.geometry import cosine_silhouette, decoder_geometry, label_rows, top_samples
from biosae.search.markers import rank_latents

pytest.importorskip("igraph", reason="Leiden needs igraph (the extra 'cluster')")


def planted(*, n_patients=12, n_tiles=10, m=60, n_kinds=3, noise=0.05, random_state=0) -> anndata.AnnData:
    """Three kinds of tiles in every patient: latents 0-9 fire for the first, 10-19 for the second, ...; 50-59 for site
    y.
    """
    rng = np.random.default_rng(random_state)
    n = n_patients * n_tiles
    patient, kind = np.repeat(np.arange(n_patients), n_tiles), rng.integers(0, n_kinds, n)
    on = rng.random((n, m)) < noise
    for k in range(n_kinds):
        on[:, 10 * k : 10 * k + 10] |= (kind == k)[:, None] & (rng.random((n, 10)) < 0.8)
    on[:, 50:] |= (patient % 2 == 0)[:, None] & (rng.random((n, m - 50)) < 0.9)
    X = on * rng.gamma(4, 0.25, (n, m))
    X[-2:] = 0
    obs = pd.DataFrame({
        "patient": np.char.add("p", patient.astype(str)), "site": np.where(patient % 2, "x", "y"),
        "label": np.array(["a", "b", "c", "d"])[kind],
    }, index=[f"s{i}" for i in range(n)])  # fmt: skip
    names = [f"L{j:04d}" for j in range(m)]
    var = pd.DataFrame({"name": ["kind"] * 30 + [""] * 20 + ["stain of the site"] * 10}, index=names)
    decoder = rng.normal(0, 0.1, (m, 16))
    for k in range(3):
        decoder[10 * k : 10 * k + 10, k] += 1.0
    return anndata.AnnData(X=sp.csr_matrix(X, dtype=np.float32), obs=obs, var=var, varm={"decoder": decoder})


def test_the_graph_holds_the_exact_neighbours() -> None:
    rng = np.random.default_rng(0)
    V = sp.csr_matrix(rng.random((80, 30)) * (rng.random((80, 30)) < 0.3), dtype=np.float32)
    for metric in ("cosine", "euclidean"):
        found = exact_graph(V, n_neighbors=10, metric=metric, random_state=0).obsp["distances"]
        exact, _ = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(V).kneighbors(V)
        kept = np.array([np.sort(row.data) for row in found])
        assert kept.shape == (80, 9) and np.allclose(kept, exact[:, 1:], atol=1e-6)


def test_planted_kinds_are_found_along_their_latents_and_the_site_without_them() -> None:
    adata = planted()
    table = cluster(adata, latents="KIND", resolution=0.5, n_neighbors=12)
    kept = table[table["kept"]].iloc[0]
    assert kept["n_clusters"] == 3 and kept["ari_label"] > 0.9 and kept["ari_seeds"] > 0.95
    assert kept["ari_subsamples"] > 0.9 and abs(kept["ari_site"]) < 0.1
    assert list(adata.obs["cluster"].cat.categories) == ["0", "1", "2", "silent"]
    assert (adata.obs["cluster"] == "silent").sum() == adata.uns["cluster"]["params"]["n_silent"] >= 2
    silent = (adata.obs["cluster"] == "silent").to_numpy()
    assert np.isnan(adata.obsm["X_umap"][silent]).all() and np.isfinite(adata.obsm["X_umap"][~silent]).all()
    assert np.diff(adata.obsp["connectivities"].indptr)[silent].max() == 0
    site = cluster(adata, latents="stain", resolution=0.5, n_neighbors=12, umap=False, key="stain")
    assert abs(site.loc[site["kept"], "ari_label"].item()) < 0.1
    assert (adata.obs.loc[adata.obs["stain"] == "silent", "site"] == "x").mean() > 0.9
    again = planted()
    assert cluster(again, latents="KIND", resolution=0.5, n_neighbors=12).equals(table)
    assert again.obs["cluster"].equals(adata.obs["cluster"])


def test_what_is_written_goes_on_in_scanpy_and_through_a_file(tmp_path) -> None:
    adata = planted()
    cluster(adata, resolution=0.5, n_subsamples=0, n_seeds=2)
    table = rank_latents(adata, "cluster")
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    shown = sc.get.rank_genes_groups_df(back, "0")
    first = table[table["cluster"] == "0"].iloc[0]
    assert shown["names"].iloc[0] == first["latent"] and shown["scores"].iloc[0] == pytest.approx(first["score"])
    assert shown["pct_nz_group"].iloc[0] == pytest.approx(first["share"])
    sc.tl.leiden(back, 0.5, flavor="igraph", directed=False, n_iterations=2)
    alive = back.obs["cluster"] != "silent"
    assert ari(back.obs["leiden"][alive], back.obs["cluster"][alive]) > 0.8
    sc.pl.rank_genes_groups(back, show=False)
    sc.pl.umap(back, color="cluster", show=False)


def test_no_clusters_agree_less_than_clusters() -> None:
    """Seeds agree only in part on noise, and other patients hardly at all."""
    adata = planted(noise=0.3)
    X = adata.X.toarray()
    rng = np.random.default_rng(0)
    adata.X = sp.csr_matrix(np.column_stack([rng.permutation(column) for column in X.T]))
    found = cluster(adata, resolution=1.0, umap=False)
    assert found["n_clusters"].iloc[0] == 1 and np.isnan(found["ari_seeds"].iloc[0])  # one cluster agrees with itself
    assert found["ari_subsamples"].max() < 0.6 and found["ari_label"].abs().max() < 0.1


def test_clusters_have_no_p_for_the_latents_they_are_made_of() -> None:
    adata = planted(n_tiles=25, noise=0.15)
    cluster(adata, latents="kind", resolution=0.5, n_subsamples=0, n_seeds=1, umap=False)
    table = rank_latents(adata, "cluster").set_index("latent")
    own = table.loc[[f"L{j:04d}" for j in range(30)]]
    assert own["p"].isna().all() and set(own["status"]) == {"circular"} and own["score"].max() > 0.5
    other = table.loc[[f"L{j:04d}" for j in range(30, 50)]]
    other = other[other["cluster"] != "silent"]
    assert other["p"].notna().mean() > 0.5 and (other["p"].dropna() <= 0.01).mean() < 0.06
    truth = rank_latents(adata, "label")
    top = truth[truth["cluster"] == "a"].head(10)
    assert set(top["latent"]) == {f"L{j:04d}" for j in range(10)} and (top["q"] < 0.05).all()
    log2 = np.log2(
        np.asarray(adata.X[(adata.obs["label"] == "a").to_numpy()].mean(axis=0)).ravel()
        / np.asarray(adata.X[(adata.obs["label"] != "a").to_numpy()].mean(axis=0)).ravel()
    )
    assert top["log2_fold_change"].to_numpy() == pytest.approx(
        log2[adata.var_names.get_indexer(top["latent"])], abs=1e-4
    )


def test_filtered_clusters_follow_the_intended_axis() -> None:
    """A weak axis that clusters of everything miss."""
    adata = planted()
    rng = np.random.default_rng(1)
    grade = rng.random(adata.n_obs) < 0.5
    X = adata.X.toarray()
    X[:, 30:40] = rng.random((adata.n_obs, 10)) < np.where(grade, 0.7, 0.05)[:, None]
    X[:, 40:45] = rng.random((adata.n_obs, 5)) < np.where(grade, 0.05, 0.8)[:, None]
    adata.X, adata.obs["grade"] = sp.csr_matrix(X), grade.astype(str)
    adata.obsm["embedding"] = X @ rng.normal(size=(60, 20))
    for linkage in ("average", "spectral"):
        table = cluster_filtered(
            adata, [f"L{j:04d}" for j in range(30, 45)], n_clusters=2, linkage=linkage, labels=["grade"]
        )
        assert list(table["representation"]) == ["chosen latents", "all latents", "embedding"]
        assert table["ari_grade"].iloc[0] > 0.8 and table["ari_grade"].iloc[1:].max() < 0.4
        assert set(adata.obs["filtered"]) == {"0", "1"}


@given(st.integers(0, 2**32 - 1))
def test_jaccard_is_that_of_scipy(seed: int) -> None:
    on = np.random.default_rng(seed).random((5, 6)) < 0.4
    found = jaccard(sp.csr_matrix(on, dtype=np.float32))
    for i in range(5):
        for j in range(5):
            if (on[i] | on[j]).any():
                assert found[i, j] == pytest.approx(scipy_jaccard(on[i], on[j]))


def test_jaccard_of_the_worked_pair_and_ari_with_gaps() -> None:
    a, b = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    assert 1 - jaccard(sp.csr_matrix([a, b]))[0, 1] == pytest.approx(0.6)
    assert ari(["x", "x", "y", "y", None], [0, 0, 1, 1, 1]) == 1.0
    assert ari(pd.Series([1, 1, 2, np.nan]), ["a", "a", "b", "b"]) == 1.0


def test_cluster_refuses() -> None:
    adata = planted(n_patients=2, n_tiles=6)
    with pytest.raises(InputError, match="not more than n_neighbors=15"):
        cluster(adata)
    with pytest.raises(InputError, match="no latent is named 'mitosis'"):
        cluster(adata, latents="mitosis")
    with pytest.raises(InputError, match="no latent 'L00'"):
        cluster(adata, latents=["L00"])
    with pytest.raises(InputError, match="obsm has no 'X_pca'"):
        cluster(adata, use_rep="X_pca")
    with pytest.raises(InputError, match="metric='cosin'"):
        cluster(adata, metric="cosin")
    with pytest.raises(InputError, match="n_clusters=1"):
        cluster_filtered(adata, "kind", n_clusters=1)
    with pytest.raises(InputError, match="no column 'kinds'"):
        rank_latents(adata, "kinds")


ROWS, LABELS = [[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], [0, 0, 1, 1]


def test_worked_silhouette() -> None:
    found = cosine_silhouette(ROWS, LABELS, collapse=None)
    assert found["silhouette"] == pytest.approx(0.993101, abs=1e-6)
    assert found["p"] > 0.2  # one in three ways to put two pairs of labels on four rows is this one
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = cosine_silhouette(np.array(ROWS) @ turn * [[1.0], [3.0], [0.2], [1.0]], LABELS, collapse=None)
    assert turned["silhouette"] == pytest.approx(found["silhouette"])
    near = cosine_silhouette(ROWS, LABELS)  # both pairs are copies at a cosine above 0.95
    assert near["status"] == "too_few" and near["n_collapsed"] == 2 and np.isnan(near["silhouette"])


def test_silhouette_is_that_of_sklearn_and_leaves_out_what_has_no_label() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(60, 8)), rng.integers(0, 4, 60).astype(object)
    expected = silhouette_score(rows[:40], labels[:40].astype(int), metric="cosine")
    labels[40:50], labels[50:] = None, ""
    found = cosine_silhouette(rows, labels, n_permutations=99)
    assert found["silhouette"] == pytest.approx(expected) and found["share_unlabelled"] == pytest.approx(1 / 3)
    assert found["n_rows"] == 40 and found["null_mean"] == pytest.approx(expected, abs=4 * found["null_sd"])


def test_silhouette_of_labels_at_random_has_uniform_p_and_of_planted_ones_a_small_one() -> None:
    rng = np.random.default_rng(0)
    p = [cosine_silhouette(rng.normal(size=(25, 6)), rng.integers(0, 3, 25), n_permutations=99)["p"] for _ in range(60)]
    assert np.mean(np.array(p) <= 0.1) < 0.25 and np.median(p) > 0.25
    rows, labels = rng.normal(size=(30, 6)), np.repeat([0, 1, 2], 10)
    rows[np.arange(30), labels] += 3
    assert cosine_silhouette(rows, labels, n_permutations=199)["p"] == pytest.approx(1 / 200)


def test_rows_are_labelled_by_what_excites_them_most() -> None:
    adata = planted(n_patients=24)
    table = label_rows(adata, "label", n_top=40, min_fold=1.5)
    named = table.iloc[:30]
    assert (named["concept"].to_numpy() == np.repeat(["a", "b", "c"], 10)).mean() > 0.9
    assert named["labelled"].mean() > 0.8 and table.iloc[30:]["labelled"].mean() < 0.1
    found = decoder_geometry(adata, "label", n_top=40, min_fold=1.5, n_permutations=199, n_neighbors=5)
    assert found["status"] == "ok" and found["silhouette"] > 0.3 and found["p"] == pytest.approx(1 / 200)
    assert set(found["n_labels"]) >= {"a", "b", "c"} and adata.varm["X_umap"].shape == (60, 2)
    assert set(adata.var["concept"]) >= {"", "a"}


def test_enrichment_of_few_patients_or_of_nothing_labels_nothing() -> None:
    adata = planted(n_patients=24)
    adata.obs["grade"] = np.random.default_rng(0).integers(0, 2, 24).astype(str)[
        adata.obs["patient"].str[1:].astype(int)
    ]  # fmt: skip
    assert label_rows(adata, "grade", n_top=40, min_fold=1.0)["labelled"].sum() <= 1
    two = adata[adata.obs["patient"].isin(["p0", "p1"])].copy()
    assert not label_rows(two, "label")["labelled"].any()
    del two.obs["patient"]
    with pytest.raises(StatisticsError, match="independent"):
        label_rows(two, "label")
    with pytest.raises(InputError, match="no column 'labels'"):
        label_rows(two, "labels")


def test_top_samples_take_the_largest_positive_codes() -> None:
    X = sp.csr_matrix([[3.0, -5.0], [1.0, 0.0], [2.0, 1.0], [2.0, 0.0]])
    assert top_samples(X, 2).toarray().tolist() == [[1, 0], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("page", ["clustering", "diff"])
def test_snippets_of_the_pages(page: str) -> None:
    adata = planted(n_patients=10, n_tiles=8)
    adata.obs["slide"], adata.obs["grade"] = adata.obs["patient"], adata.obs["label"]
    text = (Path(__file__).parents[1] / f"docs/search/{page}.md").read_text(encoding="utf-8")
    found = {"bs": bs, "adata": adata}
    words = {"L0706": "L0021", "L0305": "L0011", '"gland"': '"kind"', '"Hospital X", "Hospital Y"': '"x", "y"'}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for word, instead in words.items():
            code = code.replace(word, instead)
        exec(code, found)
    assert len(found["table"]) == (2 if page == "clustering" else adata.n_vars)


@pytest.mark.parametrize("use_rep", [None, "embedding"])
def test_scanpy_lays_out_our_graph(use_rep) -> None:
    adata = planted()
    adata.obsm["embedding"] = np.random.default_rng(0).normal(size=(adata.n_obs, 8))
    cluster(adata, use_rep=use_rep, n_seeds=1, n_subsamples=0, resolutions=(), umap=False)
    sc.tl.umap(adata)
    sc.tl.paga(adata, groups="cluster")
    assert np.isfinite(adata.obsm["X_umap"]).all()


def test_clusters_under_another_name_have_no_p_either() -> None:
    adata = planted(n_tiles=25, noise=0.15)
    cluster(adata, resolution=0.5, n_subsamples=0, n_seeds=1, umap=False)
    adata.obs["tissue"] = adata.obs["cluster"].map(lambda level: f"tissue {level}")
    sc.tl.leiden(adata, 0.5, flavor="igraph", directed=False, n_iterations=2)
    for column in ("cluster", "tissue", "leiden"):
        table = rank_latents(adata, column)
        assert table["p"].isna().all() and "circular" in set(table["status"])
    assert rank_latents(adata, "label")["p"].notna().any()


def test_a_stored_zero_is_no_code() -> None:
    adata, plain = planted(), planted()
    X = adata.X.copy()
    rows = np.flatnonzero(np.diff(X.indptr))[:3]
    for row in rows:
        X.data[X.indptr[row] : X.indptr[row + 1]] = 0
    adata.X = X
    plain.X = X.copy()
    plain.X.eliminate_zeros()
    for each in (adata, plain):
        cluster(each, n_seeds=1, n_subsamples=0, resolutions=(), umap=False)
    assert adata.obs["cluster"].equals(plain.obs["cluster"]) and (adata.obs["cluster"].iloc[rows] == "silent").all()
    pd.testing.assert_frame_equal(rank_latents(adata, "label"), rank_latents(plain, "label"))
    assert adata.X.nnz == X.nnz  # as it was


def test_codes_on_disk_are_clustered_and_labelled(tmp_path) -> None:
    adata = planted()
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    options = {"n_seeds": 1, "n_subsamples": 0, "resolutions": (), "umap": False}
    pd.testing.assert_frame_equal(cluster(backed, **options), cluster(adata, **options))
    assert list(backed.obs["cluster"]) == list(adata.obs["cluster"])
    for function in (rank_latents, label_rows):
        pd.testing.assert_frame_equal(function(backed, "label"), function(adata, "label"))
    pd.testing.assert_frame_equal(*(cluster_filtered(each, "kind", n_clusters=2) for each in (backed, adata)))


def test_leiden_is_optional_and_columns_of_the_user_are_kept(monkeypatch) -> None:
    adata = planted()
    with pytest.raises(InputError, match="another origin"):
        cluster(adata, key="label")
    with pytest.raises(InputError, match="another origin"):
        cluster_filtered(adata, "kind", n_clusters=2, key="site")
    for options in ({"n_neighbors": 1}, {"n_seeds": 0}, {"resolution": 0}, {"latents": " "}):
        with pytest.raises(InputError):
            cluster(adata, **options)
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'biosae\[cluster\]'"):
        cluster(adata)
    monkeypatch.setitem(sys.modules, "leidenalg", None)
    monkeypatch.delitem(sys.modules, "igraph")
    assert cluster(adata, n_seeds=1, n_subsamples=0, resolutions=(), umap=False)["n_clusters"].item() > 1


def test_what_is_written_is_read_by_scanpy_for_every_kind_of_class(tmp_path) -> None:
    adata = planted()
    text = adata.obs["label"].astype("string")
    text.iloc[:3] = pd.NA
    adata.obs = adata.obs.assign(
        flag=(text == "a").astype("boolean"), number=np.where(adata.obs["label"] == "a", 1, 2), text=text
    )
    for column, first in (("flag", "False"), ("number", "1"), ("text", "a"), ("label", "a")):
        table = rank_latents(adata, column)
        shown = sc.get.rank_genes_groups_df(adata, first)
        own = table[table["cluster"] == first].reset_index(drop=True)
        assert shown["names"].tolist() == own["latent"].tolist()
        np.testing.assert_allclose(shown["pvals"], own["p"])
        np.testing.assert_allclose(shown["pct_nz_reference"], own["share_rest"])
    adata.obs["label"] = adata.obs["label"].astype("category")
    for name in ("dotplot", "matrixplot", "heatmap"):
        getattr(sc.pl, f"rank_genes_groups_{name}")(adata, n_genes=3, show=False)
