"""Differences of two cohorts and pairs of latents: worked numbers, other implementations, planted truth, no truth."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, fisher_exact
from statsmodels.stats.contingency_tables import StratifiedTable
from statsmodels.stats.proportion import confint_proportions_2indep

from biosae.errors import InputError, StatisticsError
from biosae.search.diff import diff
from biosae.search.pairs import npmi, pairs
from biosae.search.proportions import mcnemar, newcombe, proportion_difference

A = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
B = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0])


def table(X: np.ndarray, **obs) -> anndata.AnnData:
    frame = pd.DataFrame(obs, index=[f"s{i}" for i in range(len(X))])
    names = [f"L{j:04d}" for j in range(X.shape[1])]
    return anndata.AnnData(X=sp.csr_matrix(X, dtype=np.float32), obs=frame, var=pd.DataFrame(index=names))


def cohort(
    rng: np.random.Generator, *, n_a=20, n_b=20, tiles_a=(6, 7), tiles_b=(6, 7), m=40, spread=1.5, effect=0.0
) -> anndata.AnnData:
    """Patients with their own log odds of firing (dependent tiles); latent 0 fires more in cohort a by ``effect``."""
    sizes = np.r_[rng.integers(*tiles_a, n_a), rng.integers(*tiles_b, n_b)]
    arm = np.repeat(["a", "b"], [n_a, n_b])
    logit = rng.normal(rng.normal(-1, 1, m), spread, (n_a + n_b, m))
    logit[arm == "a", 0] += effect
    patient = np.repeat(np.arange(n_a + n_b), sizes)
    X = rng.random((len(patient), m)) < 1 / (1 + np.exp(-logit[patient]))
    return table(X, patient=np.char.add("p", patient.astype(str)), arm=arm[patient])


def test_worked_proportions() -> None:
    found = proportion_difference(30, 100, 10, 100)
    assert found["difference"] == pytest.approx(0.2)
    assert found["z"] == pytest.approx(3.535534, abs=1e-6)
    assert found["p"] == pytest.approx(0.000407, abs=5e-7)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.0900, 0.3058), abs=5e-5)
    with pytest.raises(InputError, match="no proportions"):
        proportion_difference(3, 2, 1, 4)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_newcombe_is_that_of_statsmodels(n: int, m: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    found = proportion_difference(a, n, b, m)
    expected = confint_proportions_2indep(a, n, b, m, method="newcomb", compare="diff")
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(expected, abs=1e-9)
    assert -1 - 1e-12 <= found["ci_low"] <= found["difference"] <= found["ci_high"] <= 1 + 1e-12


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, abs=1e-12)


def test_newcombe_of_pairs() -> None:
    p1, p2 = 48 / 50, 38 / 50
    low, high = newcombe(np.array([p1]), 50, np.array([p2]), 50, 0.0)
    unpaired = confint_proportions_2indep(48, 50, 38, 50, method="newcomb", compare="diff")
    assert (low[0], high[0]) == pytest.approx(unpaired)
    narrower = newcombe(np.array([p1]), 50, np.array([p2]), 50, 0.5)
    assert narrower[0] > low and narrower[1] < high


def test_worked_pair() -> None:
    both = np.array([[A @ A, A @ B], [A @ B, B @ B]])
    assert npmi(both, 10)[0, 1] == pytest.approx(0.522112, abs=1e-6)
    assert np.diag(npmi(both, 10)) == pytest.approx([1.0, 1.0])
    found = pairs(table(np.column_stack([A, B])), assume_independent=True, min_count=1).iloc[0]
    assert (found["npmi"], found["jaccard"], found["phi"]) == pytest.approx((0.522112, 0.6, 0.583333), abs=1e-6)
    assert (found["n_a"], found["n_b"], found["n_both"], found["n"]) == (4, 4, 3, 10)


def test_npmi_at_its_ends() -> None:
    always, never = np.ones(8), np.zeros(8)
    half, other, crossed = np.repeat([1, 0], 4), np.repeat([0, 1], 4), np.tile([1, 0], 4)
    X = np.column_stack([always, never, half, other, crossed])
    found = npmi(X.T @ X, 8)
    assert np.isnan(found[0, 0]) and np.isnan(found[1]).all()
    assert found[2, 3] == -1 and found[2, 2] == 1
    assert found[2, 4] == pytest.approx(0) and found[0, 2] == pytest.approx(0)


def test_odds_ratio_within_strata_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    stratum = np.repeat(np.arange(4), 30)
    x = rng.random(120) < 0.2 + 0.2 * stratum
    y = rng.random(120) < np.where(x, 0.3, 0.1) + 0.15 * stratum
    tables = [np.array([[(x & y)[s].sum(), (x & ~y)[s].sum()], [(~x & y)[s].sum(), (~x & ~y)[s].sum()]])
              for s in (stratum == k for k in range(4))]  # fmt: skip
    adata = table(np.column_stack([x, y]), site=stratum.astype(str))
    found = pairs(adata, strata="site", assume_independent=True).iloc[0]
    reference = StratifiedTable(tables)
    assert found["mh_odds_ratio"] == pytest.approx(reference.oddsratio_pooled)
    # the adjusted test is the Mantel-Haenszel test up to the weights of strata in its variance
    assert found["p"] == pytest.approx(reference.test_null_odds().pvalue, rel=0.35)


def test_patients_make_pairs_that_strata_take_away() -> None:
    """Two latents of the same patients, independent within them: a large NPMI, and nothing within."""
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(30), 20)
    rate = np.where(np.arange(30) % 2, 0.7, 0.05)[patient]
    X = rng.random((600, 3)) < np.column_stack([rate, rate, np.full(600, 0.4)])
    X[:, 2] |= X[:, 1] & (rng.random(600) < 0.7)
    found = pairs(table(X, patient=patient.astype(str))).set_index(["latent_a", "latent_b"])
    apart, together = found.loc[("L0000", "L0001")], found.loc[("L0001", "L0002")]
    assert apart["npmi"] > 0.3 and apart["p"] > 0.05 and 0.6 < apart["mh_odds_ratio"] < 1.6
    assert together["p"] < 0.001 and together["mh_odds_ratio"] > 3


def test_pairs_of_no_truth_with_dependent_tiles() -> None:
    """Latents that follow their own smooth course within patients: p is not small more often than said."""
    p = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        walk = np.cumsum(rng.normal(0, 0.5, (12, 40, 14)), axis=1) + rng.normal(0, 1, (12, 1, 14))
        adata = table((walk > 0.5).reshape(-1, 14), patient=np.repeat(np.arange(12), 40).astype(str))
        p.append(pairs(adata)["p"].dropna())
    p = np.concatenate(p)
    assert len(p) > 400 and (p <= 0.05).mean() < 0.075 and (p <= 0.001).mean() < 0.005


def test_shuffling_within_patients_agrees_where_samples_are_exchangeable() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(25), 16)
    X = rng.random((400, 6)) < rng.uniform(0.1, 0.7, (25, 6))[patient]
    X[:, 1] = np.where(rng.random(400) < 0.4, X[:, 0], X[:, 1])
    adata = table(X, patient=patient.astype(str))
    shuffled, scores = (pairs(adata, **o).set_index(["latent_a", "latent_b"]) for o in ({"permute": "within"}, {}))
    assert shuffled.index[0] == scores.index[0] == ("L0000", "L0001")
    assert shuffled["p"].iloc[0] == pytest.approx(0.001) and scores["p"].iloc[0] < 0.001
    both = pd.concat([shuffled["p"], scores["p"]], axis=1, keys=["a", "b"])
    assert both.corr(method="spearman").iloc[0, 1] > 0.8


def test_shifted_maps_do_not_take_smoothness_for_a_pair() -> None:
    """Smooth maps of independent latents: shuffled tiles make pairs of them, shifted maps do not."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    maps = gaussian_filter(rng.normal(size=(6, 12, 12, 8)), (0, 1.5, 1.5, 0), mode="wrap")
    X = (maps > np.quantile(maps, 0.6)).reshape(-1, 8)
    adata = table(X, patient=np.repeat(np.arange(6), 144).astype(str))
    adata.obsm["spatial"] = (
        np.tile(np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2), (6, 1)) * 1.0
    )
    shifted, shuffled = (pairs(adata, permute=how, n_permutations=199)["p"].dropna() for how in ("spatial", "within"))
    assert len(shifted) == 28 and (shifted <= 0.05).mean() < 0.2 < 0.4 < (shuffled <= 0.05).mean()


def test_pairs_refuse() -> None:
    adata = table(np.random.default_rng(0).random((40, 4)) < 0.3)
    with pytest.raises(StatisticsError, match="assume_independent"):
        pairs(adata)
    with pytest.raises(InputError, match="no latent 'L9999'"):
        pairs(adata, latents=["L9999"], assume_independent=True)
    adata.obs["patient"], adata.obs["site"] = np.repeat(list("abcdefgh"), 5), np.tile(["x", "y"], 20)
    with pytest.raises(InputError, match="leave strata out"):
        pairs(adata, strata="site", permute="within")
    rare = pairs(adata, assume_independent=True, min_count=30)
    assert (rare["status"] == "too_sparse").all() and rare["p"].isna().all()


def test_planted_difference_is_found_and_signed() -> None:
    adata = cohort(np.random.default_rng(0), effect=6.0)
    found = diff(adata, "arm", n_permutations=1999)
    first = found.iloc[0]
    assert first["latent"] == "L0000" and first["q"] < 0.05 and first["difference"] > 0 and first["p_maxt"] < 0.05
    assert first["ci_low"] > 0 and first["p"] >= 1 / 10_000
    turned = diff(adata, "arm", cohorts=("b", "a"), n_permutations=1999).set_index("latent")
    again = found.set_index("latent").loc[turned.index]
    assert np.allclose(turned["difference"], -again["difference"]) and np.allclose(turned["ci_low"], -again["ci_high"])
    arms = adata.obs.groupby("patient")["arm"].first()
    by_hand = adata.to_df().ne(0).groupby(adata.obs["patient"]).mean().groupby(arms).mean()
    assert np.allclose(again["frequency_a"], by_hand.loc["a", again.index])


@pytest.mark.parametrize("design", ["equal", "unequal", "drawn"])
def test_no_truth_gives_no_small_p(design: str) -> None:
    sizes = {"tiles_a": (6, 7), "tiles_b": (6, 7)} if design == "equal" else {"tiles_a": (2, 9), "tiles_b": (5, 30)}
    p, smallest = [], []
    for seed in range(8):
        adata = cohort(np.random.default_rng(seed), m=60, **sizes)
        found = diff(adata, "arm", n_permutations=499, n_tiles=2 if design == "drawn" else None, random_state=seed)
        p.append(found["p"].dropna())
        smallest.append(found["p_maxt"].min())
    p = np.concatenate(p)
    assert len(p) > 250 and (p <= 0.05).mean() < 0.08 and np.mean(np.array(smallest) <= 0.05) <= 0.25


def test_documents_of_equal_tiles() -> None:
    """On-anywhere grows with the number of tiles; cut to the same number it does not."""
    rng = np.random.default_rng(0)
    tiles = np.repeat([4, 40], 15)
    patient = np.repeat(np.arange(30), tiles)
    X = rng.random((len(patient), 20)) < 0.1
    adata = table(X, patient=patient.astype(str), slide=patient.astype(str), arm=np.where(patient < 15, "a", "b"))
    found = diff(adata, "arm", document="slide", n_permutations=199)
    assert found.attrs["biosae"]["n_tiles"] == 4
    assert (found["n_samples_a"] == 60).all() and (found["n_samples_b"] == 60).all()
    assert abs(found["difference"].mean()) < 0.06
    raw = pd.DataFrame(X).groupby(patient).any()
    assert raw.iloc[15:].mean().mean() - raw.iloc[:15].mean().mean() > 0.5
    with pytest.raises(StatisticsError, match="no patient is left in 'a'"):
        diff(adata, "arm", document="slide", n_tiles=10)


def test_one_sample_a_patient_has_the_interval_of_two_proportions() -> None:
    x = np.r_[np.repeat([1, 0], [30, 70]), np.repeat([1, 0], [10, 90])]
    adata = table(x[:, None], arm=np.repeat(["a", "b"], 100))
    found = diff(adata, "arm", assume_independent=True).iloc[0]
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.0900, 0.3058), abs=5e-5)
    assert found["p"] == pytest.approx(0.0007, abs=0.0006)  # Fisher's exact p is 0.0007
    assert (found["n_a"], found["n_b"]) == (100, 100)


def test_pairs_of_patients_are_mcnemar() -> None:
    a, b = np.r_[np.ones(9), np.zeros(11)], np.r_[np.ones(2), np.zeros(7), np.ones(1), np.zeros(10)]
    other = np.r_[np.ones(10), np.zeros(10)]
    patient = [f"p{i}" for i in range(20)] * 2
    adata = table(np.column_stack([np.r_[a, b], np.r_[other, other]]), patient=patient, visit=["1"] * 20 + ["2"] * 20)
    found = diff(adata, "visit").set_index("latent")
    assert found.loc["L0000", "p"] == pytest.approx(binomtest(7, 8).pvalue)
    assert "McNemar" in found.loc["L0000", "inference"] and (found["design"] == "paired").all()
    assert found.loc["L0001", "p"] == 1 and found.loc["L0001", "difference"] == 0
    some = adata[:-5].copy()
    with pytest.raises(StatisticsError, match="15 of 20 patients are in both"):
        diff(some, "visit")
    assert diff(some, "visit", paired=True)["n_a"].iloc[0] == 15
    with pytest.raises(StatisticsError, match="no patient is left"):
        diff(some, "visit", paired=False)
    with pytest.raises(StatisticsError, match="no patient is left"):
        diff(cohort(np.random.default_rng(0), m=3), "arm", paired=True)


def test_flipped_signs_find_a_change_in_the_same_patients_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(3)
    own = rng.normal(-0.5, 2, (24, 1, 1, 30))
    change = np.zeros((1, 2, 1, 30))
    change[0, 1, 0, 0] = 2.0
    X = (rng.random((24, 2, 8, 30)) < 1 / (1 + np.exp(-(own + change)))).reshape(-1, 30)
    patient = np.repeat(np.arange(24), 16).astype(str)
    visit = np.tile(np.repeat(["1", "2"], 8), 24)
    found = diff(table(X, patient=patient, visit=visit), "visit", n_permutations=1999)
    assert found["latent"].iloc[0] == "L0000" and found["difference"].iloc[0] < 0 and found["q"].iloc[0] < 0.05
    assert (found["p"].iloc[1:] <= 0.05).mean() < 0.15 and "flipped" in found["inference"].iloc[0]


def test_refusals_keep_their_rows() -> None:
    adata = cohort(np.random.default_rng(0), m=12)
    X = adata.X.toarray()
    X[:, 3] = 0
    X[:, 4] = 1
    X[:, 5] = 0
    X[0, 5] = 1
    adata.X = sp.csr_matrix(X)
    found = diff(adata, "arm", n_permutations=99, max_frequency=0.99, min_frequency=0.0).set_index("latent")
    assert found.loc["L0003", "status"] == "dead" and found.loc["L0004", "status"] == "coverage"
    assert found.loc["L0005", "status"] == "too_sparse"
    assert found.loc[["L0003", "L0004", "L0005"], "p"].isna().all() and len(found) == 12
    assert found["p"].notna().sum() == found.attrs["biosae"]["m_tested"] == 9


def test_diff_refuses() -> None:
    adata = cohort(np.random.default_rng(0), n_a=4, n_b=4, m=5)
    with pytest.raises(InputError, match="no column 'armm'"):
        diff(adata, "armm")
    with pytest.raises(InputError, match="no value 'c'"):
        diff(adata, "arm", cohorts=("a", "c"))
    with pytest.raises(InputError, match="8 values; name two"):
        diff(adata, "patient")
    del adata.obs["patient"]
    with pytest.raises(StatisticsError, match="assume_independent=True"):
        diff(adata, "arm")


def test_two_patients_give_no_p() -> None:
    adata = cohort(np.random.default_rng(0), n_a=1, n_b=1, m=6)
    found = diff(adata, "arm")
    assert found["p"].isna().all() and found["frequency_a"].notna().all()
    assert set(found["status"]) <= {"too_few_groups", "too_small", "too_sparse", "dead", "coverage"}


def test_a_confounder_that_makes_the_difference_takes_it_away() -> None:
    """Old patients have latent 0, and cohort a is older."""
    rng = np.random.default_rng(0)
    arm = np.repeat(["a", "b"], 40)
    age = rng.normal(np.where(arm == "a", 65, 50), 8)
    patient = np.repeat(np.arange(80), 5)
    X = rng.random((400, 5)) < 0.3
    X[:, 0] = rng.random(400) < np.clip((age[patient] - 40) / 35, 0.02, 0.98)
    adata = table(X, patient=patient.astype(str), arm=arm[patient], age=age[patient])
    crude = diff(adata, "arm").set_index("latent").loc["L0000"]
    assert crude["p"] < 0.001 and crude["difference"] > 0.2
    for covariate in ("age", "spline(age, df=3)"):
        adjusted = diff(adata, "arm", covariates=[covariate]).set_index("latent").loc["L0000"]
        assert adjusted["p"] > 0.02 and adjusted["difference"] == crude["difference"]
    with pytest.raises(InputError, match="'years'"):
        diff(adata, "arm", covariates=["years"])


def test_patients_are_rearranged_within_blocks() -> None:
    """Site decides both cohort and latent: within sites nothing is left."""
    rng = np.random.default_rng(0)
    site = np.repeat(["x", "y"], 40)
    arm = np.where(rng.random(80) < np.where(site == "x", 0.85, 0.15), "a", "b")
    patient = np.repeat(np.arange(80), 5)
    X = rng.random((400, 4)) < np.where(site == "x", 0.8, 0.2)[patient][:, None]
    adata = table(X, patient=patient.astype(str), arm=arm[patient], site=site[patient])
    assert diff(adata, "arm")["p"].max() < 0.001
    assert diff(adata, "arm", blocks="site")["p"].min() > 0.01


def test_samples_without_a_patient_matter_only_in_the_cohorts() -> None:
    adata = cohort(np.random.default_rng(0), m=5)
    adata.obs["arm"] = np.where(adata.obs["patient"] == "p0", "other", adata.obs["arm"])
    adata.obs["patient"] = adata.obs["patient"].where(adata.obs["arm"] != "other")
    found = diff(adata, "arm", cohorts=("a", "b"))
    assert found["n_a"].iloc[0] == 19 and found.attrs["biosae"]["samples_without_cohort"] == 6
    with pytest.raises(StatisticsError, match="6 samples of the two cohorts have no patient"):
        diff(adata, "arm", cohorts=("other", "b"))


def visits(rng: np.random.Generator, *, n=20, tiles=((1, 2), (40, 41)), m=30, mean=-3.0) -> anndata.AnnData:
    """The same patients in cohorts a and b with other numbers of samples, and no difference."""
    own = rng.normal(mean, 0.5, (n, m))
    size = [rng.integers(*t, n) for t in tiles]
    patient = np.concatenate([np.repeat(np.arange(n), s) for s in size])
    X = rng.random((len(patient), m)) < 1 / (1 + np.exp(-own[patient]))
    arm = np.repeat(["a", "b"], [s.sum() for s in size])
    return table(X, patient=patient.astype(str), arm=arm)


def test_same_patients_with_unequal_numbers_of_samples_and_no_truth() -> None:
    """A rare latent is absent from one sample of a patient and present in some of forty: all signs alike."""
    p, family = [], []
    for seed in range(12):
        found = diff(visits(np.random.default_rng(seed)), "arm", n_permutations=499, random_state=seed)
        p.append(found["p"].dropna())
        family.append(found["p_maxt"].min() <= 0.05)
        assert (found["n_samples_a"] == 20).all() and (found["n_samples_b"] == 20).all()
        assert found.attrs["biosae"]["samples_left_out"] == 20 * 39
    mixed = []
    for seed in range(12):
        adata = visits(np.random.default_rng(seed), tiles=((2, 6), (10, 31)), mean=-1.5)
        mixed.append(diff(adata, "arm", n_permutations=499, random_state=seed)["p"].dropna())
    assert np.mean(family) <= 0.25 and (np.concatenate(p) <= 0.05).mean() < 0.06
    assert (np.concatenate(mixed) <= 0.05).mean() < 0.08


def test_samples_of_patients_in_one_cohort_are_not_counted_as_paired() -> None:
    adata = visits(np.random.default_rng(0), tiles=((3, 4), (3, 4)), mean=0.0)
    some = adata[~((adata.obs["patient"] == "3") & (adata.obs["arm"] == "b")).to_numpy()].copy()
    found = diff(some, "arm", paired=True, n_tiles=3, n_permutations=99).iloc[0]
    assert (found["n_a"], found["n_b"], found["n_samples_a"], found["n_samples_b"]) == (19, 19, 57, 57)


@pytest.mark.parametrize("name", ["unit", "cohort"])
def test_columns_of_the_user_may_have_any_name(name: str) -> None:
    adata = cohort(np.random.default_rng(0), m=4)
    site = (adata.obs["patient"].str[1:].astype(int) % 2).astype(str).to_numpy()
    adata.obs["elsewhere"], adata.obs[name] = site, site
    for option in ("blocks", "covariates"):
        expected, found = (diff(adata, "arm", n_permutations=99, **{option: column}) for column in ("elsewhere", name))
        pd.testing.assert_frame_equal(expected, found)
        assert found["p"].notna().all() and len(set(found["p"])) > 1


def test_intervals_cover_where_few_patients_have_few_samples() -> None:
    """Cohorts of the same frequency, 6 patients of 1 or 2 samples against 40 of many: Welch's cover 0.91."""
    covered = []
    for seed in range(30):
        adata = cohort(np.random.default_rng(seed), n_a=6, n_b=40, tiles_a=(1, 3), tiles_b=(20, 30), spread=0.3)
        found = diff(adata, "arm", n_permutations=9, min_frequency=2.0)
        known = found["status"] != "dead"
        covered.append((found["ci_low"] <= 0)[known] & (found["ci_high"] >= 0)[known])
        assert (found["ci_low"][known] < found["difference"][known]).all()
    assert 0.935 < np.concatenate(covered).mean() < 0.995


def test_q_of_pairs_counts_those_that_were_refused_for_meeting_seldom() -> None:
    """Of independent rare latents only pairs that met by chance have a p, and that is small for this reason."""
    refuted, tested = [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        adata = table(rng.random((800, 60)) < 0.06, patient=np.repeat(np.arange(40), 20).astype(str))
        found = pairs(adata)
        tested += int(found["p"].notna().sum())
        refuted.append(bool((found["q"] <= 0.05).any()))
        assert found["q"].isna().equals(found["p"].isna())
        assert found.attrs["biosae"]["m_family"] == len(found)
    assert tested > 10 and np.mean(refuted) <= 0.15


def test_codes_on_disk_are_compared_too(tmp_path) -> None:
    adata = cohort(np.random.default_rng(0), m=5)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    pd.testing.assert_frame_equal(diff(backed, "arm", n_permutations=99), diff(adata, "arm", n_permutations=99))
    pd.testing.assert_frame_equal(pairs(backed), pairs(adata))


def test_pairs_of_independent_samples_have_the_exact_p() -> None:
    """11 and 13 of 28 patients, 11 of them both: the t of Pearson's r gave 2e-8, Fisher's test gives 4e-6."""
    X = np.zeros((28, 3), np.float32)
    X[:11, 0], X[:13, 1], X[7:20, 2] = 1, 1, 1
    obs = pd.DataFrame({"patient": [f"p{i}" for i in range(28)], "site": ["A", "B"] * 14})
    obs.index = obs["patient"].to_numpy()
    adata = anndata.AnnData(sp.csr_matrix(X), obs=obs, var=pd.DataFrame(index=["L0", "L1", "L2"]))
    found = pairs(adata, min_count=1).set_index(["latent_a", "latent_b"])
    for (a, b), row in found.iterrows():
        one, other = X[:, int(a[1])] > 0, X[:, int(b[1])] > 0
        expected = fisher_exact(pd.crosstab(one, other).to_numpy())[1]
        assert row["p"] == pytest.approx(expected, rel=1e-9)
    within = pairs(adata, min_count=1, strata="site").set_index(["latent_a", "latent_b"])
    assert (within["p"] > 0).all() and within.loc[("L0", "L1"), "p"] < 1e-3


def test_many_independent_samples_are_tested_in_time_and_without_a_step() -> None:
    """Up to 1,000 samples of the rarer latent p is exact, beyond it is that of t; both are nearly the same there."""
    rng = np.random.default_rng(0)
    found = []
    for n in (1990, 2020):
        one = np.arange(n) % 2 == 0
        other = one ^ (rng.random(n) < 0.47)
        adata = table(np.column_stack([one, other]), patient=[f"p{i}" for i in range(n)])
        row = pairs(adata).iloc[0]
        expected = fisher_exact(pd.crosstab(one, other).to_numpy())[1]
        found.append(row["p"] / expected)
    assert found[0] == pytest.approx(1, rel=1e-6) and found[1] == pytest.approx(1, rel=0.25)
