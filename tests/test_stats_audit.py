"""Audit of confounders: planted biology and scanner, worked numbers, other implementations, what is refused."""

from __future__ import annotations

import itertools
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.metrics import roc_auc_score

from biosae.errors import InputError
from biosae.stats import (
    ablate,
    audit_confounders,
    average_drop,
    clustering_score,
    confounders,
    performance_drop,
    pvca,
    readout,
    robustness,
    robustness_index,
    spurious_removal,
)
from biosae.stats.confounding import _bias_corrected, ratio_interval
from biosae.stats.correlation import as_columns
from biosae.stats.drop import cells, divide, draw, size_of
from biosae.stats.features import feature_sets
from biosae.stats.pvca import variance_components
from biosae.stats.readout import interval, out_of_fold
from biosae.stats.removal import score

BIOLOGY, SCANNER, MIXED = ["L0000", "L0001"], ["L0002", "L0003", "L0004"], ["L0005"]


def cohort(n_patients=48, per=6, m=14, d=16, seed=0, crossed=True, mixed=False, signal=2.5):
    """Latents of the label, of the scanner, (of both,) and of neither; ``x = z W + b + e``."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n_patients), per)
    place = rng.permutation(n_patients)
    label = (place % 2)[g]
    scanner = (place // 2 % 2)[g] if crossed else label
    z = 0.5 * rng.normal(size=(n_patients, m))[g] + 0.7 * rng.normal(size=(len(g), m))
    z[:, 0:2] += signal * label[:, None]
    z[:, 2:5] += signal * scanner[:, None]
    z[:, 5] += mixed * signal * (label + scanner) / 1.5
    z = np.where(z > 0.3, z, 0)
    obs = pd.DataFrame(
        {
            "patient": [f"p{i:03d}" for i in g],
            "label": np.where(label, "tumour", "normal"),
            "scanner": np.where(scanner, "B", "A"),
            "stain": np.where(rng.permutation(np.arange(n_patients) % 2)[g], "x", "y"),
            "age": rng.normal(60, 9, n_patients)[g],
        },
        index=[f"t{i}" for i in range(len(g))],
    )
    adata = anndata.AnnData(sp.csr_matrix(z), obs=obs)
    adata.var_names = [f"L{j:04d}" for j in range(m)]
    W = rng.normal(size=(m, d))
    adata.varm["decoder"] = (W / np.linalg.norm(W, axis=1, keepdims=True)).astype(np.float32)
    adata.obsm["embedding"] = (z @ adata.varm["decoder"] + 1 + 0.2 * rng.normal(size=(len(g), d))).astype(np.float32)
    return adata


# --------------------------------------------------------------------------- variance shares


def test_planted_latents_are_told_apart():
    found = confounders(cohort(mixed=True), biology="label", technical="scanner", n_permutations=199).set_index(
        "latent"
    )
    assert (found.loc[BIOLOGY, "flag"] == "biology").all() and (found.loc[SCANNER, "flag"] == "technical").all()
    assert (found.loc[MIXED, "flag"] == "mixed").all()
    assert (found["flag"].iloc[6:] == "neither").sum() >= 7
    assert (found.loc[BIOLOGY, "ratio_low"] > 1).all() and (found.loc[SCANNER, "ratio_high"] < -1).all()
    assert found.loc["L0005", "ratio_low"] < 0 < found.loc["L0005", "ratio_high"]


def test_questions_that_cannot_be_asked_are_refused_in_words():
    adata = cohort(n_patients=8)
    for how, message in (
        ({"biology": "label", "technical": "label"}, "'label' is both biology and technical"),
        ({"biology": "label", "technical": []}, "at least one column"),
        ({"biology": [], "technical": "scanner"}, "at least one column"),
    ):
        with pytest.raises(InputError, match=message):
            confounders(adata, **how)
    with pytest.raises(InputError, match="factors is empty"):
        pvca(adata, [])
    with pytest.raises(InputError, match="every latent"):
        readout(adata, "label", without=list(adata.var_names))
    for k in (0, 48):
        with pytest.raises(InputError, match="give 1 to 47"):
            robustness(adata, biology="label", technical="scanner", exclude="patient", k=k)


def r2(X, y):
    X = np.column_stack([np.ones(len(y)), X])
    e = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
    return 1 - e @ e / ((y - y.mean()) ** 2).sum()


def test_joint_shares_are_differences_of_r2():
    adata = cohort()
    found = confounders(
        adata, biology=["label", "age"], technical={"machine": ["scanner"], "lab": "stain"}, jointly=True,
        n_permutations=9, n_bootstrap=0,
    )  # fmt: skip
    assert found["factor"].unique().tolist() == ["machine", "lab"]
    obs, y = adata.obs, adata[:, "L0002"].X.toarray().ravel()
    one = {c: (obs[c] == obs[c].iloc[0]).to_numpy(float) for c in ("label", "scanner", "stain")} | {"age": obs["age"]}
    full = r2(np.column_stack(list(one.values())), y)
    row = found[found["latent"] == "L0002"].set_index("factor")
    for factor, column in (("machine", "scanner"), ("lab", "stain")):
        rest = np.column_stack([v for k, v in one.items() if k != column])
        assert row.loc[factor, "unique_technical"] == pytest.approx(full - r2(rest, y), abs=1e-10)
    bio = full - r2(np.column_stack([one["scanner"], one["stain"]]), y)
    assert row["unique_biology"].to_numpy() == pytest.approx([bio, bio], abs=1e-10)


def test_factor_of_several_columns():
    adata = cohort()
    found = confounders(adata, biology="label", technical={"both": ["scanner", "stain"]}, n_permutations=9)
    joined = adata.obs[["scanner", "stain"]].apply(lambda c: (c == c.iloc[0]).astype(float)).to_numpy()
    y = adata[:, "L0003"].X.toarray().ravel()
    assert found.set_index("latent").loc["L0003", "eta2_technical"] == pytest.approx(r2(joined, y), abs=1e-10)
    assert set(found.attrs["overlap"]["both"]) == {"label x scanner", "label x stain"}
    assert not found.attrs["biosae"]["sae_training"]["known"]


def test_patients_of_the_sae_are_counted_among_the_rows_used():
    adata = cohort(n_patients=20)
    adata.obs["sae_trained_on"] = adata.obs["patient"] < "p012"
    adata.obs.loc[adata.obs["patient"] == "p000", "label"] = None
    facts = confounders(adata, biology="label", technical="scanner", n_permutations=9, n_bootstrap=0).attrs["biosae"]
    assert facts["technical"] == {"scanner": ["scanner"]} and json.dumps(facts)
    assert (facts["sae_training"]["n_groups"], facts["sae_training"]["n_groups_trained_on"]) == (19, 11)


def test_scanner_of_a_site_has_no_share_of_its_own():
    adata = cohort()
    adata.obs["site"] = adata.obs["scanner"] + np.where(adata.obs["stain"] == "x", "1", "2")
    alone = confounders(adata, biology="label", technical=["scanner", "site"], n_permutations=9)
    jointly = confounders(adata, biology="label", technical=["scanner", "site"], n_permutations=9, jointly=True)
    assert (alone["flag"] != "not_separable").all()
    assert (jointly.loc[jointly["factor"] == "scanner", "flag"] == "not_separable").all()
    assert (jointly.loc[jointly["factor"] == "site", "flag"] != "not_separable").all()


def test_interval_of_the_ratio_is_the_cluster_bootstrap():
    """Against regressions on rows that were resampled in fact."""
    adata = cohort(n_patients=14, per=3, m=6)
    codes = np.repeat(np.arange(14), 3)
    B, T = ((adata.obs[c] == adata.obs[c].iloc[0]).to_numpy(float)[:, None] for c in ("label", "scanner"))
    one = np.ones((len(codes), 1))
    X = adata.X.toarray()
    n_bootstrap, observed = 40, np.zeros(6)
    sides = [np.linalg.qr(np.hstack(part))[0] for part in ([one, B, T], [one, T], [one, B])]
    low, high = ratio_interval(as_columns(adata.X), sides, codes, observed, n_bootstrap, 3)
    times = np.random.default_rng(3).multinomial(14, np.full(14, 1 / 14), size=n_bootstrap)
    draws = np.empty((n_bootstrap, 6))
    for b in range(n_bootstrap):
        rows = np.repeat(np.arange(len(codes)), times[b][codes])
        y = X[rows]
        rss = [
            ((y - D[rows] @ np.linalg.lstsq(D[rows], y, rcond=None)[0]) ** 2).sum(axis=0)
            for D in (np.hstack([one, B, T]), np.hstack([one, T]), np.hstack([one, B]))
        ]
        draws[b] = np.log2((rss[1] - rss[0]) / (rss[2] - rss[0]))
    expected = _bias_corrected(draws, observed)
    np.testing.assert_allclose(low, expected[0], atol=1e-8)
    np.testing.assert_allclose(high, expected[1], atol=1e-8)


def test_overlap_is_in_the_table_and_plain():
    adata = cohort(crossed=False)
    found = confounders(adata, biology=["label", "age"], technical="scanner", n_permutations=9)
    tables = found.attrs["overlap"]["scanner"]
    assert tables["label x scanner"]["counts"] == {"A": {"normal": 24, "tumour": 0}, "B": {"normal": 0, "tumour": 24}}
    assert tables["label x scanner"]["separable"] is False and len(tables["age x scanner"]["counts"]["A"]) == 3
    json.dumps(found.attrs)
    pd.concat([found, found])


def test_numbers_may_bend():
    """An arch over age: a straight line explains nothing of it, a spline nearly all."""
    adata = cohort()
    age = adata.obs["age"].to_numpy()
    adata.X = sp.csr_matrix(np.exp(-(((age - 60) / 6) ** 2))[:, None] * np.ones((1, 14)))
    straight, bent = (
        confounders(adata, biology="label", technical=t, n_permutations=9, n_bootstrap=0)["eta2_technical"].iloc[0]
        for t in ("age", "spline(age, df=5)")
    )
    assert straight < 0.3 and bent > 0.9


# --------------------------------------------------------------------------- readout


def test_without_the_scanners_latents_only_biology_is_left():
    adata = cohort()
    flags = confounders(adata, biology="label", technical="scanner", n_permutations=199)
    technical = flags.loc[flags["flag"] == "technical", "latent"].tolist()
    found = readout(adata, ["scanner", "label"], without=technical).set_index(["factor", "features"])
    assert (found.loc["scanner"].loc[["raw", "latents"], "ci_low"] > 0.85).all()
    left = found.loc[("scanner", "latents_filtered")]
    assert left["ci_low"] < 0.5 < left["ci_high"] and abs(left["auroc"] - 0.5) < 0.2
    assert (found.loc["label", "ci_low"] > 0.85).all() and (found.loc["label", "auroc"] > 0.97).all()


def test_every_set_of_features():
    adata = cohort(n_patients=24)
    names = ["raw", "pca", "reconstruction", "raw_filtered", "latents", "latents_filtered"]
    found = readout(adata, "scanner", features=names, without=SCANNER).set_index("features")["balanced_accuracy"]
    assert (found[["raw", "pca", "reconstruction", "latents"]] > 0.9).all()
    assert (found[["raw_filtered", "latents_filtered"]] < 0.75).all()
    with pytest.raises(InputError, match="without="):
        readout(adata, "scanner", features=["raw_filtered"])
    with pytest.raises(InputError, match="unknown features"):
        readout(adata, "scanner", features=["latent"])


def test_rearranged_labels():
    adata = cohort(n_patients=20, per=3)
    adata.obs["fixed"] = np.where(np.arange(adata.n_obs) % 3, "a", "b")  # varies within patients
    found = readout(adata, ["scanner", "fixed"], features=["latents"], n_permutations=19, n_splits=2)
    found = found.set_index("factor")
    assert found.loc["scanner", "p"] == pytest.approx(1 / 20)
    assert abs(found.loc["scanner", "null_mean"] - 0.5) < 0.1
    assert found.loc["fixed", "p"] > 0.05


def test_auroc_is_that_of_scikit_learn_within_folds():
    rng = np.random.default_rng(0)
    y, g = np.arange(90) % 3, np.repeat(np.arange(30), 3)
    X = rng.normal(size=(90, 4)) + y[:, None]
    right, auroc = out_of_fold(X, y, g, 2, 5)
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.preprocessing import StandardScaler

    parts, hit = [], np.zeros(90)
    for train, test in StratifiedGroupKFold(2, shuffle=True, random_state=5).split(X, y, g):
        scaler = StandardScaler().fit(X[train])
        model = LogisticRegression(C=0.01, class_weight="balanced").fit(scaler.transform(X[train]), y[train])
        p = model.predict_proba(scaler.transform(X[test]))
        hit[test] = model.predict(scaler.transform(X[test])) == y[test]
        parts.append([roc_auc_score(y[test] == c, p[:, c]) for c in range(3)])
    assert (hit == right).all()
    weight = np.array([[15 * 30] * 3] * 2)
    assert auroc == pytest.approx(np.mean((np.array(parts) * weight).sum(0) / weight.sum(0)), abs=0.01)


def test_interval_at_the_ends_is_exact_and_counts_groups():
    y, g = np.repeat([0, 1], 50), np.repeat(np.arange(20), 5)
    exact = stats.binomtest(20, 20).proportion_ci()
    assert interval(np.ones(100), y, g, 5) == pytest.approx((exact.low, 1.0))
    assert interval(np.zeros(100), y, g, 5) == pytest.approx((0.0, 1 - exact.low))
    one = np.ones(100)
    one[:5] = 0  # one patient of 20 wrong throughout
    low, high = interval(one, y, g, 5)
    assert low < stats.binomtest(19, 20).proportion_ci().low + 0.02 and high < 1


# --------------------------------------------------------------------------- ablation


def test_ablation_keeps_the_error():
    adata = cohort(n_patients=8)
    x, W, z = adata.obsm["embedding"].astype(float), adata.varm["decoder"].astype(float), adata.X.toarray()
    assert (ablate(adata, []) == x).all()
    rest = z.copy()
    rest[:, 2:5] = 0
    np.testing.assert_allclose(ablate(adata, SCANNER), rest @ W + (x - z @ W), atol=1e-12)
    with pytest.raises(InputError, match="L9"):
        ablate(adata, ["L9"])


def test_ablation_in_units_of_the_row():
    adata = cohort(n_patients=8)
    adata.uns["biosae"] = {"sae": {"normalise": "l2"}, "tokens": "none"}
    x, W, z = adata.obsm["embedding"].astype(float), adata.varm["decoder"].astype(float), adata.X.toarray()
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(ablate(adata, list(adata.var_names)), norm * (x / norm - z @ W), rtol=1e-5, atol=1e-5)
    adata.uns["biosae"]["tokens"] = "mean"
    with pytest.raises(InputError, match="tokens=None"):
        ablate(adata, SCANNER)
    adata.uns["biosae"] = {"sae": {"normalise": "centre_scale"}, "tokens": "max"}
    with pytest.raises(InputError, match="tokens='mean'"):
        ablate(adata, SCANNER)


def test_latents_that_do_not_add_up_have_no_reconstruction():
    adata = cohort(n_patients=8)
    adata.uns["biosae"] = {"sae": {"architecture": "polysae"}, "tokens": "none", "additive": False}
    with pytest.raises(InputError, match="polysae"):
        feature_sets(adata, ["reconstruction"])
    assert set(feature_sets(adata, ["raw", "latents"])) == {"raw", "latents"}


def test_worked_score():
    assert score(0.92, 0.62, 0.80) == pytest.approx(0.60)
    assert score(0.92, 0.9195, 0.5) == 0


def test_removal_repairs_a_biased_classifier():
    of = {"n_latents": (0, 3, 500), "n_repeats": 4, "n_bootstrap": 200, "n_random": 5}
    found = spurious_removal(cohort(), "label", "scanner", ablation="mean", **of)
    row = found[found["direction"] == "target"].set_index("n_latents")
    assert (row.loc[0, ["scr", "ci_low", "ci_high", "scr_random"]] == 0).all()
    assert row.loc[0, "accuracy_ablated"] == row.loc[0, "accuracy_biased"] < row.loc[0, "accuracy_clean"] - 0.2
    assert row.loc[3, "scr"] > 0.7 and 0.5 < row.loc[3, "ci_low"] < row.loc[3, "scr"] < row.loc[3, "ci_high"]
    assert row.loc[3, "scr_random"] < 0.2 and row.loc[500, "n_used"] <= 14
    first = found.groupby("direction")["accuracy_biased"].first()
    assert set(found.loc[found["reported"], "direction"]) == {first.idxmin()}
    zero = spurious_removal(cohort(), "label", "scanner", **of)
    assert (zero.loc[zero["n_latents"] == 0, "scr"] == 0).all()


# --------------------------------------------------------------------------- accuracy against correlation


def test_worked_drop():
    assert average_drop([[0.90, 0.92], [0.88, 0.90], [0.80, 0.82]]) == pytest.approx(-0.065942, abs=1e-6)
    with pytest.raises(InputError):
        average_drop([0.9])


@pytest.mark.parametrize("flip", [False, True])
def test_patients_are_drawn_with_the_asked_correlation(flip):
    design = cells(cohort(n_patients=80, per=2), "label", "scanner", "patient", max_rows=1)
    assert len(design.y) == 80  # a row a patient
    train, test = divide(design, np.random.default_rng(0), test=0.25)
    assert not set(design.unit_group[train]) & set(design.unit_group[test]) and len(train) + len(test) == 80
    n = size_of(design, train, flip)
    assert n == 28 and n % 4 == 0
    for step in (0.0, 0.5, 1.0):
        units = draw(design, train, step, n, np.random.default_rng(1), flip)
        y, c = design.cell[units] // 2, design.cell[units] % 2
        assert len(units) == pytest.approx(n, abs=2) and set(units) <= set(train)
        expected = -step if flip else step
        assert np.corrcoef(y, c)[0, 1] == pytest.approx(expected, abs=0.1) and y.mean() == 0.5


def test_accuracy_falls_with_correlation_and_filtering_repairs_it():
    found = performance_drop(cohort(), "label", "scanner", without=SCANNER, n_repeats=4, steps=(0, 0.5, 1))
    by = found.groupby("features", sort=False).first()
    assert (by.loc[["raw", "latents"], "apd"] < -0.1).all() and abs(by.loc["latents_filtered", "apd"]) < 0.05
    none = performance_drop(cohort(), "label", "stain", features=["latents"], n_repeats=4, steps=(0, 1))
    assert abs(none["apd"].iloc[0]) < 0.08
    with pytest.raises(InputError, match="begin with 0"):
        performance_drop(cohort(), "label", "scanner", steps=(0.5, 1))
    with pytest.raises(InputError, match="name the two"):
        performance_drop(cohort(), "label", "age")


# --------------------------------------------------------------------------- neighbours and clusters


def test_robustness_side_by_side():
    adata = cohort()
    found = robustness(adata, biology="label", technical="scanner", without=SCANNER, exclude="patient")
    by = found.set_index("features")["robustness_index"]
    assert by["latents_filtered"] > by["latents"] + 0.2 and len(set(found["k"])) == 1
    alone = robustness_index(
        adata, biology="label", technical="scanner", without=SCANNER, exclude="patient", k=int(found["k"].iloc[0])
    )
    assert alone["robustness_index"] == by["latents_filtered"]
    label = (adata.obs["label"] == "tumour").to_numpy(float)
    only = anndata.AnnData(sp.csr_matrix(np.column_stack([label, 1 - label]) + 0.01 * adata.X[:, :2].toarray()))
    only.obs = adata.obs
    assert robustness_index(only, biology="label", technical="scanner", exclude="patient")["robustness_index"] == 1


def test_older_index_counts_all_four_kinds():
    adata = cohort(n_patients=12, per=3)
    found = robustness_index(adata, biology="label", technical="scanner", exclude="patient", k=5)
    X = adata.X.toarray()
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    distance = ((X[:, None] - X[None]) ** 2).sum(-1)
    obs = adata.obs
    counts = dict.fromkeys(itertools.product([True, False], [True, False]), 0)
    for i in range(len(X)):
        other = np.flatnonzero((obs["patient"] != obs["patient"].iloc[i]).to_numpy())
        for j in other[np.argsort(distance[i, other], kind="stable")[:5]]:
            counts[obs["label"].iloc[i] == obs["label"].iloc[j], obs["scanner"].iloc[i] == obs["scanner"].iloc[j]] += 1
    ss, so, os = counts[True, True], counts[True, False], counts[False, True]
    assert (found["n_so"], found["n_os"]) == (so, os)
    assert found["older_index"] == pytest.approx((ss + so) / (ss + os))


def test_one_slide_a_site_is_said():
    adata = cohort(n_patients=12)
    found = robustness_index(adata, biology="label", technical="scanner", exclude="scanner", k=3)
    assert "one slide" in found["note"]


def test_clusters_follow_what_is_planted():
    adata = cohort(signal=6)
    of = {"biology": "label", "technical": "scanner", "features": ["latents"], "k_max": 6, "n_runs": 5}
    bio = clustering_score(adata[:, BIOLOGY + ["L0006"]], **of).iloc[0]
    tech = clustering_score(adata[:, SCANNER + ["L0006"]], **of).iloc[0]
    assert bio["clustering_score"] > 0.5 and tech["clustering_score"] < -0.5
    assert bio["n_combinations"] == 1 and bio["n_samples"] == 288


# --------------------------------------------------------------------------- variance components


def test_worked_components():
    bio, scanner = np.repeat([0, 1], 8), np.tile(np.repeat([0, 1], 4), 2)
    obs = pd.DataFrame({"bio": bio.astype(str), "scanner": scanner.astype(str)}, index=[str(i) for i in range(16)])
    adata = anndata.AnnData(sp.csr_matrix(np.column_stack([4.0 * bio, 2.0 * scanner])), obs=obs)
    found = pvca(adata, ["bio", "scanner"]).set_index("factor")["share"]
    assert found[["bio", "scanner", "residual"]].to_numpy() == pytest.approx([0.8, 0.2, 0.0], abs=1e-6)


def crossed_cohort():
    rng = np.random.default_rng(7)
    n = 240
    patient = np.arange(n) // 8
    site, label, batch = patient % 5, rng.permutation(30)[patient] % 2, rng.integers(0, 4, n)
    X = rng.normal(size=(n, 6)) * [3, 2, 1.5, 1, 1, 1]
    X += rng.normal(size=(30, 6))[patient] * [1.5, 0.5, 1, 0, 1, 1]
    X += rng.normal(size=(5, 6))[site] * [2, 1, 0, 0, 0.5, 0.5]
    X += rng.normal(size=(2, 6))[label] * [1, 2, 0.5, 0, 0, 0]
    X += rng.normal(size=(4, 6))[batch] * [0.3, 1, 0, 0.5, 0, 0]
    obs = pd.DataFrame({"patient": patient, "site": site, "label": label, "batch": batch}).astype(str)
    return anndata.AnnData(sp.csr_matrix(X), obs=obs.set_index(pd.Index([str(i) for i in range(n)])))


def test_components_are_those_of_lme4():
    """R 4.2, lme4: lmer(pc ~ (1|label) + (1|site) + ...), REML, of the components up to 90 %."""
    adata = crossed_cohort()
    found = pvca(adata, ["label", "site", "batch", "patient"], share=0.9).set_index("factor")["share"]
    reference = {
        "patient": 0.16109362319, "site": 0.17347259376, "batch": 0.05365285321, "label": 0.00762052463,
        "residual": 0.60416040520,
    }  # fmt: skip
    assert found.to_dict() == pytest.approx(reference, abs=2e-6) and found.sum() == pytest.approx(1, abs=1e-12)
    found = pvca(adata, ["label", "site", "batch"], share=0.9, interactions=True).set_index("factor")["share"]
    reference = {
        "site:batch": 0.002051630087, "label:site": 0.031783546504, "label:batch": 0.0, "site": 0.178248727130,
        "batch": 0.049772674411, "label": 0.007377089937, "residual": 0.730766331931,
    }  # fmt: skip
    assert found.to_dict() == pytest.approx(reference, abs=5e-6)


def test_balanced_components_are_those_of_the_analysis_of_variance():
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(12), 5)
    y = 10 + 2 * rng.normal(size=12)[g] + rng.normal(size=60)
    mean = y.reshape(12, 5).mean(axis=1)
    msb, msw = 5 * mean.var(ddof=1), y.reshape(12, 5).var(axis=1, ddof=1).mean()
    assert variance_components(y, [g]) == pytest.approx([(msb - msw) / 5, msw], rel=1e-5)
    flat = y - mean[g]  # groups differ less than chance would have it
    assert variance_components(flat, [g]) == pytest.approx([0, flat.var(ddof=1)])


def test_components_of_wide_sparse_codes():
    rng = np.random.default_rng(0)
    site = np.repeat([0, 1, 2], 200)
    X = np.where(rng.random((600, 520)) < 0.05, rng.random((600, 520)), 0)
    X[:, :20] += (site == 1)[:, None]
    obs = pd.DataFrame({"site": site.astype(str)}, index=[str(i) for i in range(600)])
    wide = pvca(anndata.AnnData(sp.csr_matrix(X), obs=obs), ["site"], max_components=10)
    dense = pvca(anndata.AnnData(sp.csr_matrix(X[:, :499]), obs=obs), ["site"], max_components=10)
    assert wide["share"].iloc[0] == pytest.approx(dense["share"].iloc[0], abs=0.02) and wide["share"].iloc[0] > 0.5


def test_components_that_cannot_be_told_apart():
    adata = cohort(n_patients=16, crossed=False)
    assert (pvca(adata, ["label", "scanner"])["status"] == "unidentifiable").all()
    adata.obs["one"] = "x"
    assert (pvca(adata, ["label", "one"])["status"] == "one_class").all()
    with pytest.raises(InputError, match="qcut"):
        pvca(adata, ["label", "age"])


# --------------------------------------------------------------------------- all of it


def test_confounded_designs_are_refused_everywhere():
    adata = cohort(n_patients=24, crossed=False)
    of = {"biology": "label", "technical": "scanner"}
    tables = [
        confounders(adata, n_permutations=9, **of), robustness(adata, exclude="patient", **of),
        clustering_score(adata, **of), performance_drop(adata, "label", "scanner"),
        spurious_removal(adata, "label", "scanner"), pvca(adata, ["label", "scanner"]),
    ]  # fmt: skip
    for table in tables:
        assert (table["status"] == "unidentifiable").all()
        assert json.loads(json.dumps(table.attrs["overlap"]))
        assert "tumour" in json.dumps(table.attrs["overlap"])
    for table, value in zip(tables, ("p_technical", "robustness_index", "clustering_score", "apd", "scr", "share")):
        assert table[value].isna().all()


def test_audit_in_one_call(monkeypatch):
    from biosae.stats import audit

    few = {"n_repeats": 2, "features": ["latents"]}
    monkeypatch.setattr(audit, "performance_drop", lambda *a, **k: performance_drop(*a, **(k | few)))
    monkeypatch.setattr(audit, "clustering_score", lambda *a, **k: clustering_score(*a, **k, k_max=4, n_runs=2))
    adata = cohort(n_patients=32)
    out = audit_confounders(adata, biology=["label", "age"], technical=["scanner"], n_permutations=99)
    assert set(out) == {"overlap", "shares", "readout", "robustness", "clusters", "variance", "drop", "removal"}
    assert out["overlap"].query("label == 'tumour'")["n"].tolist() == [8, 8]
    shares = out["variance"].groupby("features")["share"].sum()
    assert shares.to_numpy() == pytest.approx(np.ones(len(shares)))
    assert (out["readout"]["features"] == "latents_filtered").sum() == 2
    numbers = audit_confounders(adata, biology="age", technical="scanner", n_permutations=9)
    assert set(numbers) == {"overlap", "shares", "readout", "variance"}


# --------------------------------------------------------------------------- error rates


@pytest.mark.slow
@pytest.mark.parametrize("jointly", [False, True])
def test_technical_p_hold_their_level(jointly):
    """Zero-inflated latents of 24 patients, factors that vary between and within them."""
    share = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        g = np.repeat(np.arange(24), rng.integers(4, 20, 24))
        z = np.exp(0.55 * rng.normal(size=(24, 30))[g] + 0.84 * rng.normal(size=(len(g), 30)))
        z = z * (rng.random(z.shape) > 0.6)
        obs = pd.DataFrame({"patient": g.astype(str), "label": rng.permutation(np.arange(24) % 2)[g].astype(str)})
        obs["scanner"] = rng.permutation(np.arange(24) % 3)[g].astype(str)
        obs["batch"] = rng.integers(0, 2, len(g)).astype(str)
        obs.index = obs.index.astype(str)
        found = confounders(
            anndata.AnnData(sp.csr_matrix(z), obs=obs), biology="label", technical=["scanner", "batch"],
            jointly=jointly, n_permutations=199, n_bootstrap=0, random_state=seed,
        )  # fmt: skip
        share.append(found.groupby("factor")["p_technical"].apply(lambda p: (p <= 0.05).mean()))
    share = pd.DataFrame(share)
    assert (share.mean() <= 0.05 + 3 * share.std() / np.sqrt(60)).all(), share.mean()


@pytest.mark.slow
@pytest.mark.parametrize("G", [10, 20, 60])
def test_readout_intervals_cover(G):
    """The mean of the out-of-fold accuracy over cohorts lies in at least 93 % of the intervals."""
    for effect, icc in itertools.product((0.0, 1.5, 3.0), (0.3, 0.8)):
        found = []
        for seed in range(150):
            rng = np.random.default_rng(seed)
            g = np.repeat(np.arange(G), 6)
            y = (np.arange(G) % 2)[g]
            x = np.sqrt(icc) * rng.normal(size=(G, 15))[g] + np.sqrt(1 - icc) * rng.normal(size=(len(g), 15))
            x[:, :2] += effect * y[:, None]
            right, _ = out_of_fold(x, y, g, 5, seed)
            found.append((np.mean([right[y == c].mean() for c in (0, 1)]), *interval(right, y, g, 5)))
        value, low, high = np.array(found).T
        covered = ((low <= value.mean()) & (value.mean() <= high)).mean()
        assert covered >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 150), (effect, icc, covered)


@pytest.mark.slow
@pytest.mark.parametrize("n_patients", [24, 60])
def test_ratio_intervals_cover(n_patients):
    """Label and scanner effects of known size: log2 of the ratio of their squares."""
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        place = rng.permutation(n_patients)
        g = np.repeat(np.arange(n_patients), 8)
        label, scanner = (place % 2)[g], (place // 2 % 2)[g]
        x = 0.5 * rng.normal(size=(n_patients, 20))[g] + rng.normal(size=(len(g), 20))
        x = x + 1.4 * label[:, None] + 0.9 * scanner[:, None]
        obs = pd.DataFrame({"patient": g.astype(str), "label": label.astype(str), "scanner": scanner.astype(str)})
        obs.index = obs.index.astype(str)
        found = confounders(
            anndata.AnnData(sp.csr_matrix(x), obs=obs), biology="label", technical="scanner", n_permutations=9,
            random_state=seed,
        )  # fmt: skip
        truth = 2 * np.log2(1.4 / 0.9)
        covered.append(((found["ratio_low"] <= truth) & (truth <= found["ratio_high"])).mean())
    assert np.mean(covered) >= 0.90, np.mean(covered)
