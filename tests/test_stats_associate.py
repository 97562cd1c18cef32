"""``associate``: agreement with scipy, the edge policy, units of inference, strata, covariates, families."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import STATUS, aggregate, associate, ranked, summary, within_strata
from biosae.stats.association import COLUMNS

FREE = {"unit": "sample", "assume_independent": True, "controls": False}


def cohort(n_patients=24, per=10, m=12, seed=0, **columns):
    """Samples of patients with a patient effect in the latents; L0000 carries ``count`` and L0001 ``label``."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n_patients), per)
    n = len(g)
    x = 0.6 * rng.normal(size=(n_patients, m))[g] + 0.8 * rng.normal(size=(n, m))
    obs = pd.DataFrame(
        {
            "patient": [f"p{i:02d}" for i in g],
            "slide": [f"s{i // 5:03d}" for i in range(n)],
            "site": np.where(g % 2, "north", "south"),
            "count": rng.poisson(3, n).astype(float),
            "label": np.where(g < n_patients // 3, "tumour", "normal"),
            "grade": np.array(["I", "II", "III"])[g % 3],
            "stain": rng.normal(size=n),
        },
        index=[f"t{i}" for i in range(n)],
    ).assign(**columns)
    x[:, 0] += 0.8 * (obs["count"].to_numpy() - 3)
    x[:, 1] += 1.5 * (obs["label"] == "tumour").to_numpy()
    adata = anndata.AnnData(sp.csr_matrix(np.where(x > 0.3, x, 0).astype(np.float32)), obs=obs)
    adata.var_names = [f"L{j:04d}" for j in range(m)]
    adata.obsm["embedding"] = x @ rng.normal(size=(m, 5)).astype(np.float32)
    return adata


def table(X, n=None, **columns):
    X = np.asarray(X, np.float64)
    obs = pd.DataFrame(columns, index=[f"r{i}" for i in range(len(X))])
    return anndata.AnnData(sp.csr_matrix(X), obs=obs)


def one(result, latent="L0000", source="latent"):
    return result[(result["latent"] == latent) & (result["source"] == source)].iloc[0]


# ---------------------------------------------------------------------------------------- agreement with references


@pytest.mark.parametrize("negative", [False, True])
def test_free_units_agree_with_scipy(negative):
    """Targets are symmetric, so that rearranging them is not skewed and p are those of the textbook."""
    even = np.random.default_rng(3).permutation(stats.norm.ppf((np.arange(120) + 0.5) / 120))
    adata = cohort(per=5, even=even, label=np.where(np.arange(120) < 60, "tumour", "normal"))
    if negative:
        adata.X.data *= np.random.default_rng(1).choice([-1, 1], adata.X.nnz)
        adata.X.data[::11] = 0.0  # stored zeros
    x, obs = adata.X.toarray().astype(np.float64), adata.obs
    positive = (obs["label"] == "tumour").to_numpy()
    checks = {
        ("even", "spearman"): lambda c: stats.spearmanr(c, obs["even"]),
        ("even", "pearson"): lambda c: stats.pearsonr(c, obs["even"]),
        ("grade", "kruskal"): lambda c: stats.kruskal(*(c[obs["grade"] == v] for v in ("I", "II", "III"))),
        ("label", "welch"): lambda c: max(
            (stats.ttest_ind(c[positive], c[~positive], equal_var=equal) for equal in (False, True)),
            key=lambda found: found.pvalue,
        ),
        ("label", "fisher"): lambda c: stats.fisher_exact(pd.crosstab(positive, c != 0)),
        ("label", "wilcoxon"): lambda c: stats.mannwhitneyu(
            c[positive], c[~positive], use_continuity=False, method="asymptotic"
        ),
    }
    for (target, method), reference in checks.items():
        found = associate(adata, target, method=method, **FREE)
        assert list(found.columns[:15]) == COLUMNS and (found["status"] == "ok").all()
        expected = [reference(column) for column in x.T]
        p = np.array([e.pvalue for e in expected])
        if method == "kruskal":  # three classes are never symmetric
            assert (found["p"] >= p * (1 - 1e-9)).all() and (found["p"] <= 1.1 * p + 1e-4).all()
        else:
            assert found["p"].to_numpy() == pytest.approx(p, rel=1e-7), method
        if method not in ("fisher", "wilcoxon", "welch"):
            statistic = "estimate" if target == "even" else "statistic"
            assert found[statistic].to_numpy() == pytest.approx([e.statistic for e in expected], abs=1e-10), method
        if method == "wilcoxon":
            area = np.array([e.statistic for e in expected]) / positive.sum() / (~positive).sum()
            assert found["estimate"].to_numpy() == pytest.approx(2 * area - 1, abs=1e-12)


def test_ols_agrees_with_statsmodels():
    sm = pytest.importorskip("statsmodels.api")
    adata = cohort(per=5)
    found = associate(adata, "count", method="ols", covariates=["site", "stain"], **FREE)
    grouped = associate(adata, "count", method="ols", covariates=["site", "stain"], unit="sample", controls=False)
    C = np.column_stack([adata.obs["site"] == "south", adata.obs["stain"]]).astype(float)
    for j in (0, 5):
        D = sm.add_constant(np.column_stack([adata.X[:, j].toarray().ravel().astype(float), C]))
        fit = sm.OLS(adata.obs["count"].to_numpy(), D).fit()
        row = found.iloc[j]
        assert (row["estimate"], row["p"]) == pytest.approx((fit.params[1], fit.pvalues[1]), rel=1e-8)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(fit.conf_int()[1]), rel=1e-8)
        robust = fit.get_robustcov_results("cluster", groups=pd.factorize(adata.obs["patient"])[0], use_t=True)
        low, high = robust.conf_int()[1]
        assert grouped.iloc[j]["ci_low"] <= low + 1e-9 and grouped.iloc[j]["ci_high"] >= high - 1e-9


def test_partial_spearman_is_of_ranks():
    adata = cohort(per=5)
    found = one(associate(adata, "count", covariates=["stain"], **FREE), "L0003")
    ranks = [stats.rankdata(v) for v in (adata.X[:, 3].toarray().ravel(), adata.obs["count"], adata.obs["stain"])]
    D = np.column_stack([np.ones(len(ranks[0])), ranks[2]])
    left = [v - D @ np.linalg.lstsq(D, v, rcond=None)[0] for v in ranks[:2]]
    r = stats.pearsonr(*left).statistic
    df = len(ranks[0]) - 3
    assert found["estimate"] == pytest.approx(r, abs=1e-10)
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(r) * np.sqrt(df / (1 - r * r)), df), rel=1e-8)


def test_small_samples_are_permuted():
    rng = np.random.default_rng(0)
    X, y = rng.random((7, 3)), rng.random(7)
    found = associate(table(X, y=y), "y", min_active=3, **FREE)
    expected = stats.permutation_test(
        (X[:, 0],), lambda v: abs(stats.spearmanr(v, y).statistic), permutation_type="pairings", n_resamples=np.inf,
        alternative="greater",
    )  # fmt: skip
    assert found["p"][0] == pytest.approx(expected.pvalue, abs=1e-12)
    label = np.array(list("aaabbbb"))
    found = associate(table(X, y=label), "y", min_active=3, **FREE)
    u = [stats.mannwhitneyu(c[label == "b"], c[label == "a"], method="exact").pvalue for c in X.T]
    assert found["p"].to_numpy() == pytest.approx(u, abs=1e-12)


def test_strata_weigh_by_their_size_and_one_stratum_changes_nothing():
    adata = cohort(per=5, one="x")
    for target in ("count", "label"):
        plain = associate(adata, target, **FREE)
        within = associate(adata, target, strata="one", **FREE)
        for column in ("estimate", "p", "ci_low", "ci_high"):
            assert within[column].to_numpy() == pytest.approx(plain[column].to_numpy(), rel=1e-7), (target, column)
    found = one(associate(adata, "label", strata="site", **FREE), "L0001")
    u = v = area = pairs = 0.0
    for _, rows in adata.obs.groupby("site"):
        c = adata[rows.index, "L0001"].X.toarray().ravel()
        pos = (rows["label"] == "tumour").to_numpy()
        r = stats.rankdata(c)
        n, n1, n0 = len(c), pos.sum(), (~pos).sum()
        w = np.sqrt((n - 1) / (n1 * n0 * ((r - r.mean()) ** 2).sum() / n)) * (n - 1) ** 0.5
        e = r[pos].sum() - n1 * (n + 1) / 2
        u, v = u + w * e, v + w**2 * n1 * n0 / n / (n - 1) * ((r - r.mean()) ** 2).sum()
        area, pairs = area + e + n1 * n0 / 2, pairs + n1 * n0
    assert found["estimate"] == pytest.approx(area / pairs, abs=1e-10)
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(u / np.sqrt(v))), rel=1e-6)


def test_strata_fixed_effect_and_heterogeneity():
    adata = cohort(per=10)
    found = one(associate(adata, "count", strata="site", **FREE), "L0004")
    r, n = zip(*[
        (stats.spearmanr(adata[rows.index, "L0004"].X.toarray().ravel(), rows["count"]).statistic, len(rows))
        for _, rows in adata.obs.groupby("site")
    ])  # fmt: skip
    w = np.array(n) - 3
    z = np.average(np.arctanh(r), weights=w)
    assert found["estimate"] == pytest.approx(np.tanh(z), abs=1e-10)
    q = (w * (np.arctanh(r) - z) ** 2).sum() / (1 + np.tanh(z) ** 2 / 2)
    assert found["q_heterogeneity"] == pytest.approx(q, abs=1e-9) and found["n_strata"] == 2


# ------------------------------------------------------------------------------------------------------ edge policy


def edge(**how):
    rng = np.random.default_rng(0)
    n = 60
    X = rng.random((n, 4)) + 0.1
    X[:, 1] = 0
    X[:, 2] = 2.5
    X[4:, 3] = 0
    return associate(table(X, y=rng.random(n), label=np.arange(n) % 2 == 0), how.pop("target", "y"), **FREE, **how)


def test_dead_constant_sparse():
    found = edge()
    assert found["status"].tolist() == ["ok", "dead", "constant", "too_sparse"]
    assert found["p"].notna().tolist() == [True, False, False, False]
    assert found["estimate"].notna().tolist() == [True, False, False, True]
    assert found["q"][0] == found["p"][0] and found.attrs["biosae"]["m_tested"]["latent"] == 1
    assert set(found["status"]) <= set(STATUS)


def test_dead_and_constant_of_two_classes():
    area, delta = edge(target="label"), edge(target="label", method="wilcoxon")
    assert area["estimate"][1:3].tolist() == [0.5, 0.5]
    assert np.isnan(delta["estimate"][1]) and delta["estimate"][2] == 0
    assert area[["p", "ci_low", "ci_high"]][1:3].isna().all(axis=None)


def test_one_class_and_missing_labels():
    X = np.random.default_rng(0).random((40, 2))
    y = np.r_[np.full(35, 1.0), np.full(5, np.nan)]
    found = associate(table(X, y=y, z=np.arange(40.0)), ["y", "z"], **FREE)
    gone = found[found["target"] == "y"]
    assert (gone["status"] == "one_class").all() and gone[["estimate", "ci_low", "p"]].isna().all(axis=None)
    assert (gone["n_samples"] == 35).all() and (found.loc[found["target"] == "z", "n_samples"] == 40).all()
    shorter = associate(table(X[:35], z=np.arange(35.0)), "z", **FREE)
    hidden = associate(table(X, z=np.r_[np.arange(35.0), np.full(5, np.nan)]), "z", **FREE)
    assert hidden["p"].to_numpy() == pytest.approx(shorter["p"].to_numpy(), rel=1e-12)


def test_too_small():
    found = associate(table([[1.0], [2.0]], y=[1.0, 3.0]), "y", **FREE)
    assert found["status"].tolist() == ["too_small"] and np.isnan(found["estimate"][0])


@pytest.mark.parametrize("target", ["count", "label"])
def test_too_few_groups_have_estimates_alone(target):
    adata = cohort(n_patients=2, per=40)
    adata.obs["label"] = np.where(np.arange(80) % 3 == 0, "a", "b")
    found = associate(adata, target, unit="sample", n_permutations=49)
    assert (found["status"] == "too_few_groups").all() and found["estimate"].notna().all()
    assert found[["ci_low", "ci_high", "p", "q", "p_maxt", "statistic"]].isna().all(axis=None)
    assert (summary(found)["latent"] != "").all()


def test_few_groups_are_marked_and_permuted():
    adata = cohort(n_patients=8)
    found = associate(
        adata, ["count", "label", "grade"], unit="sample", controls=False, n_permutations=99, min_active_groups=1
    )
    assert (found["status"] == "few_groups").all() and found["p"].notna().all()
    by_target = found.groupby("target")["inference"].first()
    assert "score t over 8 groups" in by_target["count"]
    assert by_target["label"].startswith("permutation of 8 groups, all 28 arrangements")
    assert by_target["grade"].startswith("permutation of 8 groups")
    assert (found.loc[found["target"] == "label", "p"] >= 1 / 28).all()


def test_patients_that_do_not_vary_cannot_reach_small_p():
    adata = cohort(n_patients=8, per=200)  # 1,600 samples, yet 8 patients
    free = one(associate(adata, "label", **FREE), "L0001")
    honest = one(associate(adata, "label", unit="sample", controls=False), "L0001")
    pooled = one(associate(adata, "label", unit="patient", controls=False), "L0001")
    assert free["p"] < 1e-30 and honest["p"] >= 1 / 28 and pooled["p"] >= 2 / 28 - 1e-12
    assert "independence assumed" in free["inference"]
    assert free["estimate"] == pytest.approx(honest["estimate"])


def test_unidentifiable():
    adata = cohort(per=10)
    adata.obs["same"] = adata.obs["label"].map({"tumour": "scanner 1", "normal": "scanner 2"})
    adata.obs["twin"] = np.asarray(adata.X[:, 2].todense()).ravel() + 0.01 * adata.obs["stain"]
    found = associate(adata, "label", covariates=["same"], **FREE)
    assert (found["status"] == "unidentifiable").all() and found[["estimate", "p"]].isna().all(axis=None)
    found = associate(adata, "count", covariates=["twin"], method="pearson", **FREE)
    assert found["status"].tolist() == ["ok", "ok", "unidentifiable"] + ["ok"] * 9


def test_strata_without_information_are_left_out():
    adata = cohort(per=10)
    adata.obs["lab"] = np.where(adata.obs["label"] == "tumour", "x", "y")  # the label is constant in both
    found = associate(adata, "label", strata="lab", **FREE)
    assert (found["status"] == "one_class").all() and found["p"].isna().all()
    adata.obs["lab"] = np.where(adata.obs["site"] == "north", "mixed", adata.obs["lab"])
    found = associate(adata, "label", strata="lab", **FREE)
    assert found.attrs["biosae"]["targets"]["label"]["strata_left_out"] == 2
    north = adata[adata.obs["site"] == "north"]
    assert found["n_units"].unique().tolist() == [north.n_obs]
    assert found["estimate"].to_numpy() == pytest.approx(associate(north, "label", **FREE)["estimate"].to_numpy())


# ------------------------------------------------------------------------------------------------------------ units


def test_independence_must_be_known_or_claimed():
    adata = cohort()
    del adata.obs["patient"]
    with pytest.raises(StatisticsError, match="assume_independent=True"):
        associate(adata, "count", unit="sample")
    found = associate(adata, "count", unit="sample", assume_independent=True, controls=False)
    assert found.attrs["biosae"]["assume_independent"] is True
    assert (found["inference"].str.endswith("independence assumed")).all()
    assert associate(adata, "count", unit="slide", controls=False)["n_groups"].unique().tolist() == [48]
    found = associate(adata, "count", unit="sample", groups="slide", controls=False)
    assert found["n_groups"].unique().tolist() == [48] and found["n_units"].unique().tolist() == [240]


def test_clusters_of_one_patient_are_not_taken_as_independent():
    adata = cohort()
    how = {"unit": "slide", "nested": "cluster", "controls": False}
    with pytest.raises(StatisticsError, match="24 of the patients have several slides"):
        associate(adata, "count", **how)
    claimed = associate(adata, "count", assume_independent=True, **how)
    assert claimed["n_groups"].unique().tolist() == [48] and claimed["n_units"].unique().tolist() == [240]
    assert claimed["inference"].str.contains("48 groups.*independence assumed").all()
    patients = associate(adata, "count", unit="patient", nested="cluster", controls=False)
    pd.testing.assert_frame_equal(patients, associate(adata, "count", unit="sample", controls=False))


def test_units_are_pooled_and_counted():
    adata = cohort()
    found = associate(adata, ["count", "label"], unit="patient", controls=False)
    assert found["n_units"].unique().tolist() == [24] and found["n_samples"].unique().tolist() == [240]
    units = aggregate(adata, by="patient")
    expected = stats.spearmanr(units.X[:, 0].toarray().ravel(), units.obs["count"])
    assert found["estimate"][0] == pytest.approx(expected.statistic, abs=1e-6)
    assert found["p"][0] == pytest.approx(expected.pvalue, rel=1e-4)
    slides = associate(adata, "count", unit="slide", controls=False)
    assert slides["n_units"].unique().tolist() == [48] and slides["n_groups"].unique().tolist() == [24]
    assert slides["inference"].str.contains("24 groups").all()
    sites = associate(adata, "count", unit="site", controls=False, min_active_groups=1)
    assert (sites["status"] == "too_few_groups").sum() + (sites["status"] == "too_small").sum() == len(sites)


def test_label_that_varies_within_the_unit_is_refused():
    adata = cohort(tile=np.arange(240) % 2 == 0)
    with pytest.raises(StatisticsError, match="several values within 24 of the 24 units 'patient'"):
        associate(adata, "tile", unit="patient")
    adata.obs["crossed"] = [f"c{i % 7}" for i in range(240)]
    with pytest.raises(StatisticsError, match="cut across"):
        associate(adata, "count", unit="crossed")
    with pytest.raises(StatisticsError, match="cuts across"):
        associate(adata, "label", unit="sample", blocks="slide", n_permutations=9)
    adata.obs.loc["t0", "patient"] = None
    with pytest.raises(InputError, match="1 rows have no 'patient'"):
        associate(adata, "count", unit="sample")


def test_singleton_groups_are_free_units():
    adata = cohort(n_patients=40, per=1)
    for target in ("count", "label", "grade"):
        grouped = associate(adata, target, unit="sample", controls=False, min_active=3)
        free = associate(adata, target, min_active=3, **FREE)
        assert grouped["p"].to_numpy() == pytest.approx(free["p"].to_numpy(), rel=1e-12)


def test_aggregate_slots():
    adata = cohort(tile=np.arange(240) % 2 == 0)
    adata.obs["age"] = adata.obs["patient"].str[1:].astype(float)
    units = aggregate(adata, by="patient", how="max")
    assert units.shape == (24, 12) and sp.isspmatrix_csr(units.X) and units.obs["n_samples"].eq(10).all()
    assert {"site", "label", "age", "count"} <= set(units.obs) and not {"tile", "slide"} & set(units.obs)
    assert units.obs["age"].tolist() == list(range(24)) and units.obsm["embedding"].shape == (24, 5)
    assert units.X.max() == adata.X.max()
    with pytest.raises(InputError, match="did you mean 'mean'"):
        aggregate(adata, by="patient", how="men")


# -------------------------------------------------------------------------------------------- families, permutations


def test_cox_goes_on_where_the_penalised_maximum_is_out_of_reach():
    fires = {0: 1.74, 3: 2.21, 4: 1.78, 12: 1.80, 19: 4.49}
    x = np.array([fires.get(i, 0.0) for i in range(24)])
    time = [0.25, 13.77, 2.86, 4.29, 0.4, 7.04, 5.54, 3.31, 3.86, 3.81, 2.18, 2.1, 6.18, 2.91, 4.9, 1.7, 13.27, 13.71,
            2.49, 12.21, 0.65, 1.18, 4.27, 7.72]  # fmt: skip
    event = [int(c) for c in "011001101101010100000100"]
    adata = table(np.column_stack([x, np.arange(24.0)]), time=time, event=event, site=list("212101022012121021210001"))
    how = {"unit": "sample", "event": "event", "strata": "site", "min_active": 1, "assume_independent": True}
    found = associate(adata, "time", method="cox", controls=False, **how)
    assert found["p"].between(0.05, 1).all() and found["fit"].tolist() == ["one step", "full"]
    assert (found["ci_low"] < found["estimate"]).all() and (found["estimate"] < found["ci_high"]).all()


def test_aggregated_columns_keep_their_kind(tmp_path):
    adata = cohort(n_patients=6, per=5)
    adata.obs["seen"] = np.repeat([True, False], 15)
    grades = ["low", "mid", "high"]
    adata.obs["grade"] = pd.Categorical(np.repeat(grades, 10), categories=grades, ordered=True)
    adata.obs["known"] = pd.array(np.repeat([True, None, False], 10), dtype="boolean")
    units = aggregate(adata, by="patient")
    for name in ("seen", "grade", "known"):
        assert units.obs[name].dtype == adata.obs[name].dtype
    assert units.obs["seen"].tolist() == [True] * 3 + [False] * 3
    adata.uns["study"] = {"name": "one"}
    aggregate(adata, by="patient").uns["study"]["name"] = "other"
    assert adata.uns["study"]["name"] == "one"
    units.write_h5ad(tmp_path / "units.h5ad")
    assert anndata.read_h5ad(tmp_path / "units.h5ad").obs["grade"].tolist() == ["low"] * 2 + ["mid"] * 2 + ["high"] * 2


def test_means_of_units_tie_whatever_the_order_of_rows():
    rows = [[0.1, 0.2, -0.3], [-0.3, 0.2, 0.1], [0.0, 0.0, 0.0], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.2, 0.2]]
    per, n = 3, 24
    patient = np.repeat([f"P{i:02d}" for i in range(n)], per)
    score = np.concatenate([rows[i % 6] for i in range(n)])
    z = np.repeat(np.random.default_rng(0).permutation(n) + 1.0, per)[:, None]
    found = associate(table(z, patient=patient, score=score), "score", unit="patient", controls=False)
    expected = stats.spearmanr(z[::per, 0], np.arange(n) % 6 // 3)
    assert found["estimate"][0] == pytest.approx(expected.statistic, abs=1e-12)
    assert found["p"][0] == pytest.approx(expected.pvalue, rel=1e-10)


def test_families_controls_and_attributes():
    adata = cohort()
    found = associate(adata, ["count", "label"], unit="sample", n_permutations=99)
    assert found["source"].value_counts().to_dict() == {"latent": 24, "raw": 10, "pca": 10}
    assert one(found, "raw_0003", "raw")["p"] > 0 and one(found, "pc_000", "pca")["p"] > 0
    for _, part in found.groupby("source"):
        assert part["q"].min() >= part["p"].min() and (part["q"] >= part["p"] - 1e-15).all()
    assert (found["p_maxt"] >= found["p"] - 1e-12).all()
    assert found.attrs["biosae"]["m_tested"] == {"latent": 24, "raw": 10, "pca": 10}
    best = summary(found)
    assert best.loc[best["source"] == "latent", "latent"].tolist() == ["L0000", "L0001"]
    assert best["n_tested"].tolist() == [12, 5, 5, 12, 5, 5]
    again = associate(adata, ["count", "label"], unit="sample", n_permutations=99)
    pd.testing.assert_frame_equal(found, again)


@pytest.mark.parametrize("unit", ["sample", "patient"])
def test_planted_truth_is_found(unit):
    found = associate(cohort(n_patients=30), ["count", "label"], unit=unit, n_permutations=199)
    latents = found[(found["source"] == "latent") & (found["p_maxt"] <= 0.05)]
    assert set(zip(latents["target"], latents["latent"])) >= {("label", "L0001")}
    count = found[(found["target"] == "count") & (found["source"] == "latent")]
    assert count.loc[count["estimate"].abs().idxmax(), "latent"] == "L0000"


def test_contrast_names_the_higher_class():
    adata = cohort()
    row = one(associate(adata, "label", unit="sample", controls=False), "L0001")
    assert row["contrast"] == "tumour over normal" and row["estimate"] > 0.6 and row["effect"] == "auroc"
    adata.obs["label"] = pd.Categorical(adata.obs["label"], categories=["tumour", "normal"])
    turned = one(associate(adata, "label", unit="sample", controls=False), "L0001")
    assert turned["contrast"] == "normal over tumour" and turned["estimate"] == pytest.approx(1 - row["estimate"])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_order_and_scale_do_not_matter(seed):
    adata = cohort(n_patients=9, per=6, seed=seed)
    for target in ("count", "label"):
        base = associate(adata, target, unit="sample", controls=False)
        order = np.random.default_rng(seed).permutation(adata.n_obs)
        moved = adata[order].copy()
        moved.X = moved.X * 3
        found = associate(moved, target, unit="sample", controls=False)
        for column in ("estimate", "ci_low", "ci_high", "p"):
            assert found[column].to_numpy() == pytest.approx(base[column].to_numpy(), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"targets": "cuont"}, "not a column"),
        ({"method": "speerman"}, "did you mean 'spearman'"),
        ({"correction": "bhh"}, "did you mean 'bh'"),
        ({"targets": "grade", "method": "auroc"}, "methods that do: kruskal"),
        ({"targets": "count", "method": "welch"}, "methods that do: pearson"),
        ({"targets": "grade", "covariates": ["stain"]}, "takes no covariates"),
        ({"method": "ols", "strata": "site"}, "takes no strata"),
        ({"covariates": ["stain"], "strata": "site"}, "not both"),
        ({"covariates": ["count"]}, "both a target"),
        ({"covariates": ["nothing"]}, "not a column"),
    ],
)
def test_wrong_questions_say_what_to_do(how, message):
    with pytest.raises(InputError, match=message):
        associate(cohort(), how.pop("targets", "count"), unit="sample", **how)


def test_dates_and_numbers_kept_as_objects_are_no_labels():
    n = 30
    days = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(n), unit="D")
    adata = table(np.arange(1.0, n + 1)[:, None], day=days, since=days - days[0], y=np.arange(n) % 7)
    adata.obs["kept"] = pd.Series(list(range(n)), index=adata.obs_names, dtype=object)
    adata.obs["zero_one"] = pd.Series([0, 1, None] * 10, index=adata.obs_names, dtype=object)
    for name in ("day", "since"):
        with pytest.raises(InputError, match="dates or durations; give a number"):
            associate(adata, name, **FREE)
        with pytest.raises(InputError, match="dates or durations; give a number"):
            associate(adata, "y", covariates=[name], **FREE)
    with pytest.raises(InputError, match="to_numeric"):
        associate(adata, "kept", **FREE)
    assert associate(adata, "zero_one", **FREE)["contrast"].tolist() == ["1 over 0"]
    adata.obs["stage"] = pd.Categorical(np.arange(n) % 3)
    adata.obs["donor"] = [f"d{i}" for i in range(n)]
    assert associate(adata, "y", covariates=["stage"], **{**FREE, "unit": "donor"})["p"].notna().all()


@pytest.mark.parametrize("method", ["auroc", "fisher", "kruskal", "lmm", "negbin", "ordinal", "pearson"])
def test_a_target_without_two_values_is_a_row_whatever_the_method(method):
    adata = table(np.arange(1.0, 31)[:, None], zeros=np.zeros(30), missing=np.full(30, np.nan), word=["a"] * 30)
    found = associate(adata, ["zeros", "missing", "word"], method=method, **FREE)
    assert found["status"].tolist() == ["one_class"] * 3 and found["n_units"].tolist() == [30, 0, 30]
    assert found[["estimate", "p", "q"]].isna().all(axis=None)


def test_embeddings_and_seeds_that_cannot_be_used():
    adata = table(np.arange(1.0, 31)[:, None], y=np.arange(30) % 7)
    for how in ({"random_state": -1}, {"n_permutations": 9.5}, {"n_fits": -1}):
        with pytest.raises(InputError, match="whole number of 0 or more"):
            associate(adata, "y", **{**FREE, **how})
    adata.obsm["embedding"] = np.full((30, 2), np.nan)
    with pytest.raises(InputError, match="controls=False"):
        associate(adata, "y", **{**FREE, "controls": True})
    adata.X = None
    with pytest.raises(InputError, match="no X"):
        associate(adata, "y", **FREE)


def test_infinite_target():
    with pytest.raises(InputError, match="infinite"):
        associate(cohort(bad=np.r_[np.inf, np.zeros(239)]), "bad", unit="sample")


def test_within_strata_shows_simpson():
    rng = np.random.default_rng(0)
    source = np.repeat(["a", "b", "c"], 60)
    shift = np.repeat([0.0, 4.0, 8.0], 60)
    x = rng.random(180) + shift
    y = shift * 3 - x + 0.1 * rng.normal(size=180)
    adata = table(np.column_stack([x, rng.random(180)]), y=y, source=source, lab=np.where(source == "a", "p", "q"))
    found = within_strata(adata, "y", strata="source", unit="sample", latents=["0"], assume_independent=True)
    assert found["stratum"].tolist() == ["pooled", "within", "a", "b", "c"]
    by = found.set_index("stratum")["estimate"]
    assert by["pooled"] > 0.7 and by["within"] < -0.8 and (by[["a", "b", "c"]] < -0.8).all()
    assert found.loc[1, "n_same_sign"] == 3
    labels = within_strata(adata, "lab", strata="source", unit="sample", latents=["0"], assume_independent=True)
    assert labels["status"].tolist() == ["ok", "one_class", "one_class", "one_class", "one_class"]


def test_wide_tables_are_quick_and_stay_sparse():
    import time

    rng = np.random.default_rng(0)
    n, m, k = 20_000, 2_048, 16
    X = sp.csr_matrix(
        (rng.random(n * k), rng.integers(0, m, n * k), np.arange(0, n * k + 1, k)), shape=(n, m), dtype=np.float32
    )
    obs = pd.DataFrame({"patient": rng.integers(0, 50, n).astype(str), "count": rng.poisson(2, n).astype(float)})
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(X, obs=obs)
    start = time.process_time()
    found = associate(adata, "count", unit="sample")
    assert found["p"].notna().all() and time.process_time() - start < 20


def test_ranking_goes_by_evidence_and_n_counts_contributing_strata():
    """A latent that fires in one stratum may have the largest estimate; it is not the best, and its n is that one's."""
    rng = np.random.default_rng(0)
    n = 400
    site = np.repeat(["a", "b", "c", "d"], n // 4)
    y = rng.normal(size=n)
    common = np.where(rng.random(n) < 0.7, np.exp(0.45 * y + rng.normal(size=n)), 0.0)
    rare = np.where((site == "a") & (rng.random(n) < 0.15), np.exp(1.5 * y), 0.0)
    rare[(site == "a") & (y < 0.8)] = 0.0
    adata = anndata.AnnData(
        X=sp.csr_matrix(np.column_stack([common, rare]).astype(np.float32)),
        obs=pd.DataFrame({"y": y, "site": site}, index=[f"s{i}" for i in range(n)]),
        var=pd.DataFrame(index=["common", "rare"]),
    )
    result = associate(
        adata,
        "y",
        unit="sample",
        method="spearman",
        strata="site",
        assume_independent=True,
        controls=False,
        min_active=3,
    ).set_index("latent")
    assert result.loc["common", "n_units"] == n and result.loc["common", "n_strata"] == 4
    assert (
        result.loc["rare", "n_units"] == result.loc["rare", "n_samples"] == 100 and result.loc["rare", "n_strata"] == 1
    )
    result.loc["rare", "estimate"] = 0.9
    result.loc["rare", "p"] = max(result.loc["rare", "p"], 0.01)
    assert summary(result.reset_index())["latent"].tolist() == ["common"]
    no_p = result.reset_index().assign(p=np.nan, status="too_few_groups", estimate=[0.4, 0.6])
    assert ranked(no_p)["latent"].tolist() == ["common", "rare"]


def test_arguments_of_another_kind_are_named():
    with pytest.raises(InputError, match=r"adata is a str; .*read_h5ad"):
        associate("latents.h5ad", ["y"], unit="sample")
    with pytest.raises(InputError, match="targets is empty"):
        associate(anndata.AnnData(np.zeros((3, 1), np.float32)), [], unit="sample")


def test_slopes_of_equal_p_are_not_ranked_by_the_scale_of_the_latent():
    rng = np.random.default_rng(0)
    y = rng.permutation(12).astype(float)
    X = np.column_stack([y + 0.1 * rng.random(12) + 1, 1e-6 * (y + rng.random(12) + 1)])
    found = associate(table(X, y=y), "y", method="ols", min_active=3, **FREE)
    assert found["p"][0] == found["p"][1] and abs(found["estimate"][1]) > 1e5 * abs(found["estimate"][0])
    assert ranked(found)["latent"].tolist() == ["0", "1"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_stratum_within_one_patient_is_refused_without_a_warning():
    rng = np.random.default_rng(0)
    n = 200
    patient = np.repeat(["a", "b"], n // 2)
    obs = pd.DataFrame({"patient": patient, "y": rng.normal(size=n)}, index=[f"s{i}" for i in range(n)])
    obs["slide"] = [f"{p}{i % 2}" for i, p in enumerate(patient)]
    adata = anndata.AnnData(sp.csr_matrix(np.maximum(rng.normal(size=(n, 5)), 0).astype(np.float32)), obs=obs)
    table = within_strata(adata, "y", strata="slide", unit="sample", method="spearman")
    assert set(table["status"]) == {"too_few_groups"} and table["p"].isna().all() and table["estimate"].notna().all()


@pytest.mark.parametrize("method", ["auroc", "wilcoxon", "kendall"])
def test_the_interval_of_a_strong_effect_over_patients_is_as_clear_as_its_p(method: str):
    """The null's error is a floor on the logit scale at 1/2; taken at A = 0.98 it made intervals of 0.02 to 1."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(40), 25)
    y = (0.5 * rng.normal(size=40)[g] + rng.normal(size=1000) > 1.5).astype(int)
    x = np.maximum(4 * y + 0.5 * rng.normal(size=40)[g] + rng.normal(size=1000) - 1, 0)
    obs = pd.DataFrame({"patient": g.astype(str), "y": y}, index=[str(i) for i in range(1000)])
    adata = anndata.AnnData(sp.csr_matrix(x[:, None].astype(np.float32)), obs=obs)
    row = associate(adata, "y", unit="sample", method=method, controls=False).iloc[0]
    nothing, least = {"auroc": (0.5, 0.8), "wilcoxon": (0.0, 0.6), "kendall": (0.0, 0.2)}[method]
    assert row["p"] < 1e-6 and row["n_groups"] == 40
    assert nothing < least < row["ci_low"] < row["estimate"] < row["ci_high"]
