"""Replication, confounders and readout on cohorts with planted truth."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError
from biosae.stats import confounders, readout, replicate
from biosae.stats.nested import pool


def cohort(n_patients=60, per=8, m=10, seed=0, separable=True):
    """L0000 follows the count, L0001 the label, L0002 the scanner, L0003 both; the rest is noise by patient."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n_patients), per)
    label = rng.permutation(np.arange(n_patients) % 2)[g]
    scanner = label if not separable else rng.permutation(np.arange(n_patients) % 2)[g]
    count = rng.poisson(4, len(g)).astype(float)
    x = 0.4 * rng.normal(size=(n_patients, m))[g] + rng.normal(size=(len(g), m))
    x[:, 0] += 0.7 * (count - 4)
    x[:, 1] += 1.5 * label
    x[:, 2] += 1.5 * scanner
    x[:, 3] += 1.2 * scanner + 1.2 * label
    obs = pd.DataFrame(
        {
            "patient": [f"p{i:02d}" for i in g],
            "label": np.where(label, "tumour", "normal"),
            "scanner": np.where(scanner, "S1", "S2"),
            "count": count,
            "split": np.where(g < n_patients * 0.6, "train", "test"),
        },
        index=[f"t{i}" for i in range(len(g))],
    )
    adata = anndata.AnnData(sp.csr_matrix(np.where(x > 0.2, x, 0).astype(np.float32)), obs=obs)
    adata.var_names = [f"L{j:04d}" for j in range(m)]
    adata.obsm["embedding"] = (x @ rng.normal(size=(m, 6))).astype(np.float32)
    return adata


def test_replication_of_planted_latents():
    adata = cohort()
    found = replicate(adata, ["count", "label"], unit="sample", n_permutations=99)
    assert found.groupby("source").size().to_dict() == {"latent": 2, "pca": 2, "raw": 2}
    latents = found[found["source"] == "latent"].set_index("target")
    assert latents.loc["count", "latent"] == "L0000" and latents.loc["label", "latent"] in ("L0001", "L0003")
    assert latents["replicated"].all() and latents["sign_agrees"].all()
    assert (latents["p_maxt_discovery"] <= 0.05).all() and (latents["groups_shared"] == 0).all()
    assert latents["n_groups_discovery"].unique() == [36] and latents["n_groups_replication"].unique() == [24]
    row = latents.loc["count"]
    assert row["ci_low"] < row["estimate_replication"] < row["ci_high"]
    assert row["shrinkage"] == pytest.approx(row["estimate_replication"] / row["estimate_discovery"])


def test_chance_findings_do_not_replicate():
    hits, p = 0, []
    for seed in range(12):
        adata = cohort(n_patients=40, per=4, seed=seed)
        rng = np.random.default_rng(seed + 100)
        adata.obs["noise"] = rng.normal(size=adata.n_obs) + rng.normal(size=40).repeat(4)
        row = replicate(adata, "noise", unit="sample", controls=False, n_permutations=0).iloc[0]
        hits += bool(row["replicated"])
        p.append(row["p_replication"])
    assert hits <= 3 and 0.2 < np.mean(p) < 0.8


def test_direction_is_fixed_by_the_discovery_part():
    adata = cohort()
    test = (adata.obs["split"] == "test").to_numpy()
    adata.obs.loc[test, "count"] = 10 - adata.obs.loc[test, "count"]
    row = replicate(adata, "count", unit="sample", controls=False, n_permutations=0).iloc[0]
    assert row["estimate_discovery"] > 0 > row["estimate_replication"]
    assert not row["sign_agrees"] and row["p_replication"] > 0.99 and not row["replicated"]
    assert row["shrinkage"] < 0


def test_second_cohort_and_shared_patients():
    first, second = cohort(seed=0), cohort(seed=5)
    second.obs["cells"] = second.obs.pop("count")
    second.obs["count"] = second.obs["cells"] * 2
    del second.obs["patient"]
    found = replicate(
        first, "count", unit="sample", replication=second, replication_assume_independent=True, n_permutations=0
    )
    row = found[found["source"] == "latent"].iloc[0]
    assert row["latent"] == "L0000" and row["replicated"] and row["n_samples_discovery"] == first.n_obs
    assert "independence assumed" in row["inference"] and row["groups_shared"] is None
    second.varm["decoder"], first.varm["decoder"] = np.ones((10, 2)), np.zeros((10, 2))
    with pytest.raises(InputError, match="different SAEs"):
        replicate(first, "count", unit="sample", replication=second)
    mixed = cohort()
    mixed.obs["split"] = np.where(np.arange(mixed.n_obs) % 2, "train", "test")
    assert replicate(mixed, "count", unit="sample", n_permutations=0)["groups_shared"].eq(60).all()


def test_two_patients_give_estimates_and_no_verdict():
    adata = cohort(n_patients=2, per=60)
    adata.obs["split"] = np.where(np.arange(120) % 2, "train", "test")
    adata.obs["section"] = np.where(np.arange(120) < 30, "a", np.where(np.arange(120) < 60, "b", "c"))
    found = replicate(adata, "count", unit="sample", strata="section", n_permutations=9)
    assert found["estimate_replication"].notna().all() and found["p_replication"].isna().all()
    assert found["replicated"].isna().all() and (found["status_replication"] == "too_few_groups").all()
    row = found[found["source"] == "latent"].iloc[0]
    assert row["n_strata"] == 3 and row["n_same_sign"] == 3 and row["sign_agrees"]


def test_wrong_parts():
    adata = cohort(n_patients=10)
    with pytest.raises(StatisticsError, match="no sample has split 'val'"):
        replicate(adata, "count", unit="sample", replication="val")
    with pytest.raises(StatisticsError, match="in both parts"):
        replicate(adata, "count", unit="sample", replication="train")
    with pytest.raises(InputError, match="other latents"):
        replicate(adata, "count", unit="sample", replication=adata[:, :4])


def test_confounders_flag_planted_latents():
    found = confounders(cohort(), biology=["label", "count"], technical=["scanner"], n_permutations=499)
    flags = found.set_index("latent")["flag"]
    assert flags[["L0001", "L0002", "L0003"]].tolist() == ["biology", "technical", "mixed"]
    assert (flags[["L0004", "L0005", "L0006", "L0007", "L0008", "L0009"]] == "neither").sum() >= 5
    assert (found["status"] == "ok").all() and found["n_groups"].eq(60).all()
    rows = found.set_index("latent")
    assert rows.loc["L0002", "eta2_technical"] > 0.25 > 5 * rows.loc["L0002", "eta2_biology"]
    assert (rows["unique_biology"] <= rows["eta2_biology"] + rows["eta2_technical"]).all()


def test_variance_share_is_eta_squared():
    adata = cohort(n_patients=30, per=1)
    found = confounders(adata, biology="label", technical="scanner", n_permutations=9)
    x = adata[:, "L0002"].X.toarray().ravel().astype(float)
    means = pd.Series(x).groupby(adata.obs["scanner"].to_numpy()).transform("mean")
    eta = ((means - x.mean()) ** 2).sum() / ((x - x.mean()) ** 2).sum()
    assert found.set_index("latent").loc["L0002", "eta2_technical"] == pytest.approx(eta, abs=1e-10)


def test_what_cannot_be_told_apart_is_refused():
    found = confounders(cohort(separable=False), biology="label", technical="scanner", n_permutations=9)
    assert (found["flag"] == "not_separable").all() and (found["status"] == "unidentifiable").all()
    assert found[["p_biology", "p_technical"]].isna().all(axis=None) and found["eta2_technical"].notna().all()


def test_confounders_without_groups_or_with_few():
    adata = cohort(n_patients=2, per=30)
    adata.obs["scanner"] = np.where(np.arange(60) % 2, "S1", "S2")
    assert set(confounders(adata, biology="count", technical="scanner")["flag"]) == {"undetermined"}
    del adata.obs["patient"]
    found = confounders(adata, biology="count", technical="scanner")
    assert set(found["status"]) == {"no_groups"} and set(found["flag"]) == {"undetermined"}
    free = confounders(adata, biology="count", technical="scanner", assume_independent=True, n_permutations=99)
    assert free["p_technical"].notna().all()


def test_scanner_that_varies_within_patients():
    adata = cohort(n_patients=30, per=12)
    scanner = np.arange(adata.n_obs) % 2
    adata.X = sp.csr_matrix(adata.X + np.outer(scanner, np.eye(10)[5]) * 2, dtype=np.float32)
    adata.obs["scanner"] = np.where(scanner, "S1", "S2")
    found = confounders(adata, biology="label", technical="scanner", n_permutations=499).set_index("latent")
    assert found["n_units"].eq(360).all() and found["n_groups"].eq(30).all()
    assert found.loc["L0005", "flag"] == "technical" and found.loc["L0001", "flag"] == "biology"
    assert (found.drop(["L0001", "L0003", "L0005"])["flag"] != "technical").all()


def test_readout_sees_the_scanner_and_chance():
    adata = cohort()
    adata.obs["coin"] = np.random.default_rng(3).permutation(np.repeat(np.arange(60) % 2, 8).reshape(60, 8)).ravel()
    adata.obs["coin"] = adata.obs["coin"].map({0: "a", 1: "b"})
    found = readout(adata, ["scanner", "coin"], without=["L0002", "L0003"])
    assert found["features"].tolist() == ["raw", "latents", "latents_filtered"] * 2
    by = found.set_index(["factor", "features"])["balanced_accuracy"]
    assert by["scanner", "latents"] > 0.75 and by["scanner", "raw"] > 0.7
    assert by["scanner", "latents_filtered"] < by["scanner", "latents"] - 0.1
    assert (by["coin"] - 0.5).abs().max() < 0.2 and found["chance"].eq(0.5).all()
    assert (found["ci_low"] <= found["balanced_accuracy"]).all() and (found["status"] == "ok").all()


def test_readout_does_not_learn_patients():
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(24), 20)
    x = rng.random((24, 30))[g] + 0.05 * rng.random((480, 30))  # a latent pattern of its own for every patient
    obs = pd.DataFrame({"patient": g.astype(str), "site": np.where(rng.permutation(np.arange(24) % 2)[g], "x", "y")})
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(sp.csr_matrix(x), obs=obs)
    left_out = readout(adata, "site").iloc[0]
    del adata.obs["patient"]
    leaking = readout(adata, "site").iloc[0]
    assert left_out["balanced_accuracy"] < 0.8 and leaking["balanced_accuracy"] > 0.95
    assert leaking["status"] == "no_groups" and np.isnan(leaking["ci_low"])


def test_readout_edges():
    adata = cohort(n_patients=6)
    adata.obs["one"] = "x"
    adata.obs["own"] = np.where(adata.obs["patient"] == "p00", "a", "b")
    found = readout(adata, ["one", "own"])
    assert found["status"].tolist() == ["one_class"] * 2 + ["too_few_groups"] * 2
    assert found["balanced_accuracy"].isna().all()
    with pytest.raises(InputError):
        readout(adata, "label", without=["L9999"])


@pytest.mark.parametrize("how", ["max", "top1", "top3", "top50"])
def test_mean_of_the_largest_counts_implicit_zeros(how: str) -> None:
    """Units of 1 to 9 samples; positive, zero, stored-zero and negative codes: against sorting every unit."""
    rng = np.random.default_rng(4)
    codes = np.repeat(np.arange(6), [1, 2, 3, 5, 8, 9])
    dense = rng.normal(size=(28, 20)) * (rng.random((28, 20)) < 0.6)
    dense[:, 5] = -np.abs(dense[:, 5]) - 0.1
    X = sp.csr_matrix(dense)
    X.data[:4] = 0.0
    k = 1 if how == "max" else int(how[3:])
    wanted = np.stack([np.sort(X.toarray()[codes == g], axis=0)[::-1][:k].mean(axis=0) for g in range(6)])
    for given in (X, X.toarray()):
        found = pool(given, codes, 6, how=how)
        np.testing.assert_allclose(found.toarray() if sp.issparse(found) else found, wanted, atol=1e-12)
    with pytest.raises(InputError, match="top5"):
        pool(X, codes, 6, how="top0")
