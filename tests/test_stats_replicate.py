"""Replication: planted and chance latents, parts by patient, sizes that agree, the winner's curse, sites left out, and
patients that the SAE has seen.
"""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import (
    associate,
    by_site,
    leave_one_site_out,
    replicate,
    replication_rate,
    sae_training,
    summary,
    winners_curse,
)
from biosae.stats.agreement import expected_power, size_agreement
from biosae.stats.curse import carried, conditional, shrunk
from biosae.stats.parts import discovery_part
from biosae.stats.scale import back, natural

RUN = {"unit": "patient", "controls": False, "n_permutations": 0, "split": None}


def cohort(n_patients=80, per=4, m=40, true=5, effect=1.0, seed=0, sites=2, sign_flip=None):
    """The first ``true`` latents go with the label of the patient, and against it in the site ``sign_flip``."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n_patients), per)
    label = rng.permutation(np.arange(n_patients) % 2)
    site = rng.permutation(np.arange(n_patients) % sites)
    way = np.where(site == sign_flip, -1, 1) if sign_flip is not None else np.ones(n_patients)
    x = (0.7 * rng.normal(size=(n_patients, m)))[g] + rng.normal(size=(len(g), m))
    x[:, :true] += effect * (way * (label - 0.5))[g, None]
    obs = pd.DataFrame(
        {
            "patient": [f"p{i:03d}" for i in g],
            "label": np.where(label, "tumour", "normal")[g],
            "age": rng.normal(60, 10, n_patients)[g],
            "site": np.array(list("ABCDEFGH"))[site][g],
        },
        index=[f"t{i}" for i in range(len(g))],
    )
    adata = anndata.AnnData(sp.csr_matrix(np.exp(x).astype(np.float32)), obs=obs)
    adata.var_names = [f"L{j:04d}" for j in range(m)]
    return adata


def test_true_latents_replicate_in_other_patients_and_chance_ones_do_not():
    found = replicate(cohort(n_patients=160, effect=1.5), "label", carry="significant", stratify=["label"], **RUN)
    assert {f"L{j:04d}" for j in range(5)} <= set(found["latent"]) and (found["q_discovery"] <= 0.05).all()
    planted = found["latent"] < "L0005"
    assert found.loc[planted, "replicated"].all() and found.loc[planted, "sign_agrees"].all()
    assert not found.loc[~planted, "replicated"].any()
    assert (found["groups_shared"] == 0).all() and (found["n_groups_discovery"] == 96).all()
    everything = replicate(cohort(n_patients=160, effect=1.5), "label", carry=40, stratify=["label"], **RUN)
    assert set(everything.loc[everything["replicated"], "latent"]) == {f"L{j:04d}" for j in range(5)}
    p = np.sort(everything["p_replication"])[:5]
    assert np.sort(everything["p_holm"])[0] == pytest.approx(40 * p[0])


def test_one_carried_is_the_first_of_the_summary_and_a_number_carries_so_many():
    adata = cohort()
    adata.obs["split"] = np.where(discovery_part(adata.obs, by="patient"), "train", "test")
    how = {**RUN, "split": "split"}
    discovery = associate(
        adata[adata.obs["split"] == "train"], ["label", "age"], unit="patient", controls=False, n_permutations=0
    )
    one = replicate(adata, ["label", "age"], **how)
    assert one["latent"].tolist() == summary(discovery)["latent"].tolist()
    three = replicate(adata, ["label", "age"], carry=3, **how)
    assert three.groupby("target").size().to_dict() == {"label": 3, "age": 3}
    assert three.attrs["biosae"]["n_carried"] == {"latent": 6}
    # the tests themselves do not depend on how many are carried, only the correction does
    both = three.merge(one, on=["target", "latent"], suffixes=("", "_one"))
    assert len(both) == 2 and np.allclose(both["p_replication"], both["p_replication_one"], rtol=1e-12)
    assert (both["p_holm"] >= both["p_holm_one"]).all()


def test_nothing_significant_carries_nothing():
    found = replicate(cohort(true=0, seed=4), ["age"], carry="significant", **RUN)
    assert found["latent"].tolist() == [""] and found["replicated"].isna().all()
    assert found["estimate_replication"].isna().all() and found.attrs["biosae"]["n_carried"] == {"latent": 0}
    assert replication_rate(found)[["n_carried", "n_tested"]].iloc[0].tolist() == [0, 0]
    with pytest.raises(InputError, match="carry="):
        replicate(cohort(), "label", carry=0, **RUN)


@given(st.integers(4, 60), st.floats(0.2, 0.8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_parts_are_disjoint_balanced_and_do_not_depend_on_row_order(n_patients, share, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, n_patients, 5 * n_patients)
    rows = np.concatenate([np.arange(n_patients), rows])
    obs = pd.DataFrame({
        "patient": [f"p{i}" for i in rows], "label": (rows % 2).astype(str), "site": np.array(list("abc"))[rows % 3]
    }, index=[str(i) for i in range(len(rows))])  # fmt: skip
    first = discovery_part(obs, by="patient", stratify=["site", "label"], share=share, random_state=seed)
    assert not set(obs.loc[first, "patient"]) & set(obs.loc[~first, "patient"])
    dealt = obs.loc[first, "patient"].nunique()
    assert 0 < dealt < n_patients
    if n_patients >= 24:
        assert abs(dealt - share * n_patients) <= 1.5
        one = obs.drop_duplicates("patient").assign(first=lambda t: t["patient"].isin(obs.loc[first, "patient"]))
        assert one.groupby(["site", "label"])["first"].agg(["any", "all"]).eq([True, False]).all(axis=None)
    order = rng.permutation(len(obs))
    again = discovery_part(
        obs.iloc[order], by="patient", stratify=["site", "label"], share=share, random_state=seed
    )  # fmt: skip
    assert (again == first[order]).all()


def test_split_is_made_of_patients_repeated_and_recorded():
    adata = cohort()
    found = replicate(adata, "label", repeats=3, random_state=7, **RUN)
    facts = found.attrs["biosae"]
    assert found["seed"].tolist() == [7, 8, 9] and facts["seeds"] == [7, 8, 9] and facts["split_by"] == "patient"
    assert facts["stratify"] == ["label", "site"] and (found["groups_shared"] == 0).all()
    alone = replicate(adata, "label", random_state=8, **RUN)
    assert alone["p_replication"].iloc[0] == found["p_replication"].iloc[1]
    del adata.obs["patient"]
    with pytest.raises(StatisticsError, match="no 'patient' column"):
        replicate(adata, "label", **(RUN | {"unit": "sample"}))
    with pytest.raises(InputError, match="alpha"):
        replicate(cohort(), "label", **RUN, alpha=5)
    with pytest.raises(InputError, match="repeats"):
        replicate(cohort(), "label", repeats=2, **(RUN | {"split": "split"}))


def test_units_that_hold_several_patients_are_not_cut():
    adata = cohort(n_patients=40)
    adata.obs["ward"] = (adata.obs["patient"].str[1:].astype(int) // 2).astype(str)
    found = replicate(adata, "age", **(RUN | {"unit": "ward"}))
    assert found.attrs["biosae"]["split_by"] == "ward"


def test_a_patient_id_helps_only_where_patients_are_cut():
    """A latent that knows each patient and nothing else: rows of known patients replicate it, other patients do not."""
    rng = np.random.default_rng(0)
    hits = {"grouped": 0, "row-wise": 0}
    for seed in range(8):
        adata = cohort(n_patients=30, per=12, m=12, true=0, seed=seed)
        patient = adata.obs["patient"].str[1:].astype(int).to_numpy()
        level = rng.normal(size=30)
        adata.obs["score"] = level[patient] + 0.1 * rng.normal(size=adata.n_obs)
        # the latent is a code of the patient, which among 30 patients happens to go a little with the score
        code = 2.0 ** (-np.arange(30) / 5)
        X = adata.X.toarray()
        X[:, 0] = (0.45 * (level - level.mean()) / level.std() + rng.normal(size=30) * 0.9)[patient] + 5
        X[:, 1] = code[rng.permutation(30)][patient] + 1
        adata.X = sp.csr_matrix(X)
        adata.obs["split"] = np.where(np.arange(adata.n_obs) % 2, "train", "test")
        how = {"unit": "sample", "controls": False, "n_permutations": 0, "assume_independent": True}
        cut = replicate(adata, "score", **how).iloc[0]
        whole = replicate(adata, "score", unit="patient", controls=False, n_permutations=0, split=None).iloc[0]
        hits["row-wise"] += bool(cut["replicated"])
        hits["grouped"] += bool(whole["replicated"])
        assert cut["groups_shared"] == 30 and whole["groups_shared"] == 0
        assert abs(cut["difference"]) < 0.2  # the same patients on both sides: the chance finding comes back whole
    assert hits["row-wise"] == 8 and hits["grouped"] <= 4


def test_near_duplicates_across_the_parts_are_counted():
    adata = cohort(n_patients=20)
    rng = np.random.default_rng(0)
    E = rng.normal(size=(adata.n_obs, 16)).astype(np.float32)
    first = discovery_part(adata.obs, by="patient", stratify=["label", "site"])
    inside, outside = np.flatnonzero(first), np.flatnonzero(~first)
    E[outside[:3]] = 2 * E[inside[:3]] + 1e-4
    adata.obsm["embedding"] = E
    found = replicate(adata, "label", near_duplicates=True, **RUN)
    assert found.attrs["biosae"]["near_duplicates"] == [3]
    del adata.obsm["embedding"]
    with pytest.raises(InputError, match="keep_embedding"):
        replicate(adata, "label", near_duplicates=True, **RUN)


def row(estimate, se, effect="slope"):
    return {"effect": effect, "estimate": estimate, "ci_low": estimate - 1.96 * se, "ci_high": estimate + 1.96 * se}


def test_size_agreement_closed_forms():
    got = size_agreement(row(1.0, 0.1), row(0.7, 0.2))
    se = np.hypot(0.1, 0.2)
    assert got["difference"] == pytest.approx(-0.3)
    assert (got["difference_low"], got["difference_high"]) == pytest.approx((-0.3 - 1.96 * se, -0.3 + 1.96 * se))
    assert (got["prediction_low"], got["prediction_high"]) == pytest.approx((1 - 1.96 * se, 1 + 1.96 * se))
    assert got["consistent"] is True and size_agreement(row(1.0, 0.1), row(0.5, 0.1))["consistent"] is False
    # Fieller: roots of (a - b r)^2 = t^2 (va + r^2 vb)
    a, b, va, vb, t2 = 0.7, 1.0, 0.04, 0.01, 1.96**2
    roots = np.sort(np.roots([b**2 - t2 * vb, -2 * a * b, a**2 - t2 * va]))
    assert (got["shrinkage_low"], got["shrinkage_high"]) == pytest.approx(tuple(roots))
    turned = size_agreement(row(-1.0, 0.1), row(-0.7, 0.2))
    assert turned["shrinkage_high"] == pytest.approx(got["shrinkage_high"]) and turned["difference"] == pytest.approx(
        0.3
    )
    # the discovery interval reaches no effect: no bound on the quotient; no interval: nothing
    assert np.isnan(size_agreement(row(0.1, 0.1), row(0.7, 0.2))["shrinkage_low"])
    assert size_agreement(row(1.0, np.nan), row(0.7, 0.2))["consistent"] is pd.NA
    # ratios by their logarithm
    ratio = {"effect": "odds_ratio", "estimate": 4.0, "ci_low": 2.0, "ci_high": 8.0}
    got = size_agreement(ratio, ratio)
    assert got["difference_high"] == pytest.approx(np.sqrt(2) * np.log(2))
    assert got["prediction_high"] == pytest.approx(4 * 2 ** np.sqrt(2))


def test_size_agreement_covers():
    """Correlations of 40 and 30 patients: the interval of the difference holds 0, the prediction the replication."""
    rng = np.random.default_rng(0)
    covers, predicted = [], []
    for _ in range(600):
        two = []
        for n in (40, 30):
            x = rng.normal(size=n)
            r = np.corrcoef(x, 0.7 * x + rng.normal(size=n))[0, 1]
            low, high = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.96 / np.sqrt(n - 3))
            two.append({"effect": "pearson_r", "estimate": r, "ci_low": low, "ci_high": high})
        got = size_agreement(*two)
        covers.append(got["difference_low"] <= 0 <= got["difference_high"])
        predicted.append(got["prediction_low"] <= two[1]["estimate"] <= got["prediction_high"])
        assert predicted[-1] == got["consistent"] == covers[-1]
    assert 0.92 < np.mean(covers) < 0.98


def test_scale_of_effects():
    table = pd.DataFrame({
        "effect": ["auroc", "pearson_r", "odds_ratio", "hedges_g", "epsilon_squared", "auroc", "cliffs_delta"],
        "estimate": [0.8, 0.5, 3.0, 1.2, 0.3, 1.0, -1.0],
        "ci_low": [special.expit(special.logit(0.8) - 1.96), np.tanh(np.arctanh(0.5) - 0.392), 1.5, 0.22, np.nan,
                   0.025 ** (1 / 12), -1.0],
        "ci_high": [special.expit(special.logit(0.8) + 1.96), np.tanh(np.arctanh(0.5) + 0.392), 6.0, 2.18, np.nan,
                    1.0, 1 - 2 * 0.025 ** (1 / 12)],
    })  # fmt: skip
    theta, se = natural(table)
    assert theta[:4] == pytest.approx([np.log(4), np.arctanh(0.5), np.log(3), 1.2])
    assert se[:4] == pytest.approx([1.0, 0.2, np.log(2) / 1.96, 0.5], rel=1e-4)
    assert np.isnan(theta[4]) and np.isnan(se[4])
    # perfect separation of 12 pairs: the median-unbiased estimate of 12 hits in 12
    assert special.expit(theta[5]) == pytest.approx(0.5 ** (1 / 12))
    assert (1 + np.tanh(theta[6])) / 2 == pytest.approx(1 - 0.5 ** (1 / 12)) and np.isfinite(se[5:]).all()
    assert back(theta, table["effect"])[:4] == pytest.approx(table["estimate"][:4])


def test_conditional_estimate_closed_forms():
    z = np.array([0.3, 2.0, 5.0, 30.0])
    mu, low, high = conditional(z, np.zeros(4))
    assert mu == pytest.approx(z) and low == pytest.approx(z - 1.959964) and high == pytest.approx(z + 1.959964)
    far = np.array(conditional(np.array([20.0]), np.array([4.0]))).ravel()  # far beyond the threshold
    assert far == pytest.approx([20, 20 - 1.959964, 20 + 1.959964], abs=1e-6)
    # the maximum of the likelihood, by brute force
    for z, c in ((3.2, 3.0), (4.0, 3.0), (2.5, 1.0)):
        grid = np.linspace(-1, 6, 70001)
        chosen = stats.norm.sf(c - grid) + stats.norm.cdf(-c - grid)
        best = grid[np.argmax(stats.norm.pdf(z - grid) / chosen)]
        assert conditional(np.array([z]), np.array([c]))[0][0] == pytest.approx(best, abs=2e-4)


@given(st.floats(0.5, 12), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_conditional_estimate_shrinks_and_never_turns(z, share):
    mu, low, high = conditional(np.array([z]), np.array([share * z]))
    assert 0 <= mu[0] <= z + 1e-9 and low[0] < high[0] < z + 1.96 + 1e-6


@pytest.mark.parametrize("mu", [0.5, 2.0, 3.0, 4.5])
def test_conditional_estimate_is_less_biased_and_its_interval_covers(mu):
    rng = np.random.default_rng(1)
    z = mu + rng.normal(size=400_000)
    z = z[np.abs(z) > 3][:3000]
    found, low, high = conditional(np.abs(z), np.full(len(z), 3.0))
    side = np.sign(z)
    if mu < 4:  # further on the likelihood takes off more than the choice has put on
        assert abs((side * found).mean() - mu) < abs(z.mean() - mu)
    inside = (np.where(side > 0, low, -high) <= mu) & (mu <= np.where(side > 0, high, -low))
    assert abs(inside.mean() - 0.95) < 4 * np.sqrt(0.95 * 0.05 / len(z))


def test_shrinkage_closed_forms_and_simulation():
    rng = np.random.default_rng(0)
    m = 4000
    # one normal prior: theta tau^2 / (tau^2 + se^2)
    beta, se = rng.normal(0, 0.3, m), np.full(m, 0.2)
    theta = beta + se * rng.normal(size=m)
    mean, low, high = shrunk(theta[:200], se[:200], theta, se)
    factor = 0.09 / (0.09 + 0.04)
    assert np.polyfit(theta[:200], mean, 1)[0] == pytest.approx(factor, abs=0.03)
    assert np.mean((low <= beta[:200]) & (beta[:200] <= high)) > 0.9
    # a few true effects among many of none: the winners
    beta = np.where(rng.random(m) < 0.1, rng.normal(0, 0.6, m), 0.0)
    theta = beta + se * rng.normal(size=m)
    top = np.argsort(-np.abs(theta))[:100]
    mean, low, high = shrunk(theta[top], se[top], theta, se)
    side = np.sign(theta[top])
    naive, corrected = (side * (theta[top] - beta[top])).mean(), (side * (mean - beta[top])).mean()
    assert naive > 0.05 and abs(corrected) < naive / 3
    assert np.mean((low <= beta[top]) & (beta[top] <= high)) > 0.88
    # a strong effect stays, nothing but noise goes to 0
    assert shrunk(np.array([8.0]), np.array([0.01]), np.r_[theta, 8.0], np.r_[se, 0.01])[0][0] == pytest.approx(8, 1e-3)
    noise = 0.2 * rng.normal(size=m)
    assert np.abs(shrunk(noise[:50], se[:50], noise, se)[0]).max() < 0.06


def test_threshold_of_the_choice():
    p = np.array([1e-6, 1e-4, 0.002, 0.2, 0.5, 0.8, 0.9, 0.95])
    q = stats.false_discovery_control(p)
    table = pd.DataFrame({"latent": [f"L{i}" for i in range(8)], "target": "t", "source": "latent", "p": p, "q": q,
                          "estimate": special.ndtri(1 - p / 2) / 10, "effect": "slope", "status": "ok", "n_units": 50,
                          "statistic": special.ndtri(1 - p / 2), "method": "ols", "contrast": ""})  # fmt: skip
    table["ci_low"], table["ci_high"] = table["estimate"] - 0.196, table["estimate"] + 0.196
    taken = carried(table, carry="significant")
    assert taken["latent"].tolist() == ["L0", "L1", "L2"]
    assert taken["p_threshold"].tolist() == pytest.approx([0.05 * 3 / 8] * 3)  # Benjamini-Hochberg: alpha R / m
    assert carried(table, carry=2)["p_threshold"].tolist() == [0.002, 0.002]
    assert carried(table, carry=8)["p_threshold"].tolist() == [1.0] * 8
    every = winners_curse(table, select=8)  # the choice was certain
    assert every["estimate_corrected"].to_numpy() == pytest.approx(every["estimate"].to_numpy())
    assert every["ci_high_corrected"].to_numpy() == pytest.approx(every["ci_high"].to_numpy(), abs=1e-4)
    some = winners_curse(table)
    assert (some["retained"] < 1).all() and some["retained"].is_monotonic_decreasing
    assert winners_curse(table, method="shrinkage")["retained"].between(0, 1).all()
    with pytest.raises(InputError, match="conditional"):
        winners_curse(table, method="conditonal")


def test_winners_curse_of_associations():
    """Best of 40 latents, over 25 cohorts: the corrected correlation lies nearer to the truth."""
    naive, corrected, shrinkage, truth = [], [], [], []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        n, m = 60, 40
        beta = np.r_[np.full(6, 0.25), np.zeros(m - 6)]
        x = rng.normal(size=(n, m))
        obs = pd.DataFrame({"y": x @ beta + rng.normal(size=n), "patient": [str(i) for i in range(n)]})
        obs.index = obs["patient"].to_numpy()
        adata = anndata.AnnData(sp.csr_matrix(x + 10), obs=obs)
        table = associate(adata, "y", unit="patient", method="pearson", controls=False)
        for method, out in (("conditional", corrected), ("shrinkage", shrinkage)):
            best = winners_curse(table, select=1, method=method).iloc[0]
            out.append(abs(best["estimate_corrected"]))
        naive.append(abs(best["estimate"]))
        truth.append(beta[int(best["latent"])] / np.sqrt(1 + 6 * 0.25**2) * np.sign(best["estimate"]))
    bias = {k: np.mean(np.array(v) - truth) for k, v in (("naive", naive), ("c", corrected), ("s", shrinkage))}
    assert bias["naive"] > 0.15 and abs(bias["c"]) < 0.6 * bias["naive"] and abs(bias["s"]) < 0.6 * bias["naive"]


def test_rate_counts_and_expected_power():
    table = pd.DataFrame({"effect": "slope", "source": "latent", "estimate_corrected": [0.5, 0.1], "p_replication": 0.1,
                          "estimate_replication": [0.4, 0.1], "ci_low": [0.4 - 0.196, 0.1 - 0.196],
                          "ci_high": [0.4 + 0.196, 0.1 + 0.196]})  # fmt: skip
    # Holm of two z: either passes 1.96 alone, the smaller 1.645 where the other has passed 1.96
    a, b = stats.norm(5, 1), stats.norm(1, 1)
    second, first = stats.norm.isf([0.05, 0.025])
    assert expected_power(table.iloc[:1], alpha=0.05) == pytest.approx(a.sf(second), abs=1e-5)
    expected = [
        a.sf(first) + b.sf(first) * (a.sf(second) - a.sf(first)),
        b.sf(first) + a.sf(first) * (b.sf(second) - b.sf(first)),
    ]
    assert expected_power(table, alpha=0.05) == pytest.approx(expected, abs=0.04)
    found = replicate(cohort(n_patients=160, effect=1.2), "label", carry=8, repeats=4, **RUN)
    rates = replication_rate(found)
    assert len(rates) == 4 and (rates["n_carried"] == 8).all()
    assert rates["rate"].tolist() == (found.groupby("repeat")["replicated"].mean()).tolist()
    exact = stats.binomtest(int(rates["n_replicated"].iloc[0]), 8).proportion_ci()
    assert (rates["rate_low"].iloc[0], rates["rate_high"].iloc[0]) == pytest.approx(tuple(exact))
    assert abs(rates["rate_expected"].mean() - rates["rate"].mean()) < 0.3
    assert (rates["slope_corrected"] > rates["slope"]).all() and rates["correlation"].between(-1, 1).all()
    mixed = found.astype({"sign_agrees": object})
    mixed.loc[0, "sign_agrees"] = pd.NA
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replication_rate(mixed)
    with pytest.raises(InputError, match="replicate"):
        replication_rate(found.drop(columns="power_expected"))


@pytest.mark.slow
def test_shuffled_labels_replicate_at_the_level():
    """The best of 40 latents of no effect replicates in alpha of the splits, and its power is expected to be low."""
    hits, p = [], []
    for seed in range(300):
        adata = cohort(n_patients=50, per=3, m=40, true=0, seed=seed)
        found = replicate(adata, "label", **RUN).iloc[0]
        hits.append(bool(found["replicated"]))
        p.append(found["p_replication"])
    assert np.mean(hits) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)
    assert stats.kstest(p, "uniform").pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize(("effect", "true"), [(0.9, 20), (0.6, 20), (1.5, 10)])
def test_expected_rate_meets_the_rate(effect, true):
    """As many of the carried latents replicate as the corrected effects say; the discovery's own promise too many."""
    expected, naive, seen, slopes = 0.0, 0.0, 0, []
    for seed in range(30):
        adata = cohort(n_patients=120, per=3, m=60, true=true, effect=effect, seed=seed)
        found = replicate(adata, "label", carry="significant", random_state=seed, **RUN)
        found = found[found["p_replication"].notna()].reset_index(drop=True)
        if len(found):
            expected += found["power_expected"].sum()
            naive += expected_power(found.assign(estimate_corrected=found["estimate_discovery"]), alpha=0.05).sum()
            seen += int(found["replicated"].sum())
            slopes.append(replication_rate(found).iloc[0][["slope", "slope_corrected"]].astype(float).to_numpy())
    assert abs(expected - seen) < 0.35 * seen
    before, after = np.mean(slopes, axis=0)
    assert before < 1 and before < after


def test_site_left_out_in_which_the_sign_flips():
    adata = cohort(n_patients=120, effect=2.0, sites=4, sign_flip=3)
    found = leave_one_site_out(adata, "label", unit="patient", controls=False)
    sites = found[found["site"] != "combined"].set_index("site")
    assert sites.index.tolist() == list("ABCD") and (sites["latent"] < "L0005").all()
    assert sites["opposite"].tolist() == [False, False, False, True] and sites.loc["D", "p"] > 0.99
    assert sites["sign_agrees"].tolist() == [True, True, True, False] and sites.loc["A", "p"] < 0.05
    combined = found[found["site"] == "combined"].iloc[0]
    assert (combined["n_sites"], combined["n_same_sign"], combined["n_opposite"]) == (4, 3, 1)
    assert combined["p"] == pytest.approx(min(1, 2 * sites["p"].astype(float).mean()))
    assert combined["p_heterogeneity"] < 1e-4 and combined["i2"] > 0.7 and combined["n_units"] == 120
    steady = leave_one_site_out(cohort(n_patients=120, effect=2.0, sites=4), "label", unit="patient", controls=False)
    combined = steady[steady["site"] == "combined"].iloc[0]
    assert combined["n_same_sign"] == 4 and combined["n_opposite"] == 0 and combined["p"] < 1e-3
    assert combined["ci_low"] > 0.5 and (steady["groups_shared"].dropna() == 0).all()


@pytest.mark.slow
def test_sites_together_hold_their_level_where_there_is_nothing():
    found = [
        leave_one_site_out(cohort(80, 2, 30, true=0, seed=500 + s, sites=4), "label", unit="patient", controls=False)
        for s in range(60)
    ]
    p = np.array([t.loc[t["site"] == "combined", "p"].iloc[0] for t in found], dtype=float)
    assert (p <= 0.05).mean() <= 0.05 and (p <= 0.2).mean() <= 0.25


def test_left_out_site_is_the_replication_of_the_others():
    adata = cohort(n_patients=90, sites=3)
    found = leave_one_site_out(adata, ["label", "age"], unit="patient", controls=False, effects="fixed")
    one = replicate(
        adata, ["label", "age"], unit="patient", split="site", discovery=["A", "C"], replication="B", controls=False,
        n_permutations=0,
    )  # fmt: skip
    mine = found[found["site"] == "B"]
    assert mine["latent"].tolist() == one["latent"].tolist()
    assert np.allclose(mine["p"].astype(float), one["p_replication"]) and np.allclose(
        mine["estimate"].astype(float), one["estimate_replication"]
    )
    # inverse variance on Fisher's z or the logit, in the direction found
    rows = found[(found["target"] == "age") & (found["site"] != "combined")]
    theta, se = natural(rows)
    theta, w = theta * rows["direction"].to_numpy(float), se**-2
    combined = found[(found["target"] == "age") & (found["site"] == "combined")].iloc[0]
    turn = combined["direction"] if combined["direction"] else 1
    assert np.arctanh(combined["estimate"]) * turn == pytest.approx((w * theta).sum() / w.sum())
    with pytest.raises(StatisticsError, match="at least two sites"):
        leave_one_site_out(adata[adata.obs["site"] == "A"], "label", unit="patient")
    with pytest.raises(InputError, match="also a target"):
        leave_one_site_out(adata, "site", unit="patient")


def test_site_of_one_class_or_of_few_patients_has_a_status():
    adata = cohort(n_patients=80, per=8, sites=4, effect=2.0)
    keep = ~((adata.obs["site"] == "B") & (adata.obs["label"] == "tumour")).to_numpy()
    few = adata.obs.loc[(adata.obs["site"] == "C"), "patient"].unique()
    label = adata.obs.drop_duplicates("patient").set_index("patient").loc[few, "label"]
    few = {label[label == c].index[0] for c in ("tumour", "normal")}
    keep &= ((adata.obs["site"] != "C") | adata.obs["patient"].isin(few)).to_numpy()
    found = leave_one_site_out(adata[keep], "label", unit="sample", controls=False).set_index("site")
    assert found.loc["B", "status"] == "one_class" and pd.isna(found.loc["B", "estimate"])
    assert found.loc["C", "status"] == "too_few_groups" and pd.isna(found.loc["C", "p"])
    assert found.loc["combined", "n_sites"] == 2 and found.loc["A", "status"] in ("ok", "few_groups")


def test_by_site_puts_sites_together():
    adata = cohort(n_patients=120, effect=2.0, sites=4, sign_flip=3)
    found = by_site(adata, "label", unit="patient", latents=["L0000", "L0030"])
    assert found["site"].unique().tolist() == ["pooled", "within", "A", "B", "C", "D", "fixed", "random"]
    planted = found[found["latent"] == "L0000"].set_index("site")
    theta, se = natural(planted.loc[list("ABCD")])
    assert special.logit(planted.loc["fixed", "estimate"]) == pytest.approx((theta / se**2).sum() / (se**-2).sum())
    assert planted.loc["fixed", "p_heterogeneity"] < 1e-4 and planted.loc["random", "tau2"] > 0.5
    assert planted.loc["random", "ci_low"] < planted.loc["fixed", "ci_low"]
    assert planted.loc["random", "n_strata"] == 4 and planted.loc["random", "n_units"] == 120
    ols = by_site(adata, "age", unit="patient", latents=["L0000"], method="ols").set_index("site")
    assert "within" not in ols.index and np.isfinite(ols.loc["fixed", "estimate"])


def trained(adata, patients):
    adata.obs["sae_trained_on"] = adata.obs["patient"].isin(patients).to_numpy()
    return adata


def test_patients_that_the_sae_was_trained_on_are_counted():
    adata = cohort(n_patients=40)
    assert associate(adata, "label", unit="patient").attrs["biosae"]["sae_training"]["known"] is False
    first = discovery_part(adata.obs, by="patient", stratify=["label", "site"])
    inside = list(adata.obs.loc[first, "patient"].unique())
    outside = list(adata.obs.loc[~first, "patient"].unique())
    trained(adata, inside)
    facts = associate(adata, "label", unit="patient").attrs["biosae"]["sae_training"]
    assert facts == {
        "known": True, "n_groups": 40, "n_groups_trained_on": len(inside), "n_samples": 160,
        "n_samples_trained_on": 4 * len(inside),
    }  # fmt: skip
    assert sae_training(adata, "patient", rows=~first)["n_groups_trained_on"] == 0
    assert sae_training(adata, None)["n_groups"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        clean = replicate(adata, "label", **RUN)
    assert clean["independent_of_sae"].all() and clean["n_groups_trained_on_discovery"].iloc[0] == len(inside)
    trained(adata, inside[:3] + outside[:2])
    with pytest.warns(UserWarning, match="trained on 2 of the patients"):
        mixed = replicate(adata, "label", **RUN)
    assert not mixed["independent_of_sae"].any() and mixed["n_groups_trained_on_replication"].tolist() == [2]
    with pytest.warns(UserWarning, match="trained on"):
        sites = leave_one_site_out(adata, "label", unit="patient", controls=False)
    assert set(sites.attrs["biosae"]["sae_training"]) == {"A", "B"}
    adata.obs["sae_trained_on"] = adata.obs["sae_trained_on"].astype(object).where(first, None)
    assert replicate(adata, "label", **RUN)["independent_of_sae"].isna().all()
