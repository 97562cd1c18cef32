"""Exact odds ratios, pairs of classes and of latents, variance between classes: other implementations, closed forms."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats.contingency import odds_ratio

from biosae.errors import InputError, StatisticsError
from biosae.stats import associate, compare_auroc, dunn, holm, variance_explained
from biosae.stats.posthoc import paired_delong
from biosae.stats.tables import conditional_pvalue, odds_ratio_exact

FREE = {"unit": "sample", "assume_independent": True}


def samples(X, patient=None, **columns):
    obs = pd.DataFrame(columns, index=[f"s{i}" for i in range(len(X))])
    if patient is not None:
        obs["patient"] = np.asarray(patient).astype(str)
    return anndata.AnnData(X=sp.csr_matrix(np.asarray(X, float)), obs=obs)


# odds ratios


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=4, max_size=4).filter(lambda t: min(t[0] + t[1], t[2] + t[3], t[0] + t[2],
                                                                                  t[1] + t[3]) > 0))  # fmt: skip
def test_exact_interval_agrees_with_scipy(cells):
    expected = odds_ratio(np.reshape(cells, (2, 2)), kind="conditional")
    interval = expected.confidence_interval(0.95)
    found = [float(v[0]) for v in odds_ratio_exact(*np.array(cells)[:, None])]
    np.testing.assert_allclose(found, [expected.statistic, interval.low, interval.high], rtol=1e-8)


@pytest.mark.parametrize("a", [1.5, -1.0, np.nan])
def test_cells_are_whole_counts(a):
    with pytest.raises(InputError, match="whole counts"):
        odds_ratio_exact([a], [1], [1], [1])


def test_bounds_have_the_tail_that_they_promise():
    a, b, c, d = 12, 3, 5, 20
    for mid_p in (False, True):
        psi, low, high = (float(v[0]) for v in odds_ratio_exact(*np.array([[a], [b], [c], [d]]), mid_p=mid_p))

        def at(odds, mid=0.5 if mid_p else 0.0):
            law = stats.nchypergeom_fisher(a + b + c + d, a + b, a + c, odds)
            return law.sf(a - 1) - mid * law.pmf(a), law.cdf(a) - mid * law.pmf(a), law.mean()

        assert at(low)[0] == pytest.approx(0.025, rel=1e-9) and at(high)[1] == pytest.approx(0.025, rel=1e-9)
        assert at(psi)[2] == pytest.approx(a, rel=1e-10)
    assert psi == pytest.approx(14.57003, abs=2e-5)  # fisher.test of R 4.2: 14.57005 (its root finder stops at 1e-4)


def test_mid_p_is_shorter_and_columns_exchanged_are_the_inverse():
    rng = np.random.default_rng(0)
    T = rng.integers(1, 20, (4, 50))
    psi, low, high = odds_ratio_exact(*T)
    _, mid_low, mid_high = odds_ratio_exact(*T, mid_p=True)
    assert (low < mid_low).all() and (mid_high < high).all() and (mid_low < psi).all() and (psi < mid_high).all()
    turned = odds_ratio_exact(T[1], T[0], T[3], T[2])
    np.testing.assert_allclose(turned[0], 1 / psi, rtol=1e-9)
    np.testing.assert_allclose([turned[1], turned[2]], [1 / high, 1 / low], rtol=1e-9)
    empty = odds_ratio_exact(*np.array([[12, 0], [0, 0], [5, 10], [20, 10]]))
    assert empty[0].tolist()[0] == np.inf and empty[2][0] == np.inf and empty[1][0] > 1
    assert np.isnan([e[1] for e in empty]).all()  # an empty row says nothing


def test_fisher_of_associate_has_exact_intervals_where_cells_are_small():
    rng = np.random.default_rng(1)
    label = np.repeat(["no", "yes"], [40, 20])
    X = (rng.random((60, 12)) < np.linspace(0.1, 0.6, 12)).astype(float)
    X[:, 0] = np.r_[np.zeros(40), np.ones(12), np.zeros(8)]
    table = associate(samples(X, label=label), "label", method="fisher", controls=False, **FREE)
    kinds = set()
    for j, row in table.iterrows():
        a, b = X[40:, j].sum(), 20 - X[40:, j].sum()
        c, d = X[:40, j].sum(), 40 - X[:40, j].sum()
        counts = np.array([[a, b], [c, d]])
        small = stats.contingency.expected_freq(counts).min() < 5 or counts.min() == 0
        kinds.add(bool(small))
        if small:
            interval = odds_ratio(counts.astype(int), kind="conditional").confidence_interval()
            expected = (interval.low, interval.high)
        else:
            half = stats.norm.ppf(0.975) * np.sqrt((1 / counts).sum())
            expected = (a * d / b / c * np.exp(-half), a * d / b / c * np.exp(half))
        np.testing.assert_allclose([row["ci_low"], row["ci_high"]], expected, rtol=1e-8)
        assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
    assert kinds == {True, False} and table["ci_high"].iloc[0] == np.inf


# Dunn


def test_dunn_by_hand():
    """``z = (R_b - R_a) / sqrt((n (n + 1) / 12 - ties) (1/n_a + 1/n_b))``, Holm over the pairs."""
    rng = np.random.default_rng(2)
    label = np.repeat(list("abc"), [20, 25, 30])
    x = np.round(np.maximum(0, rng.normal(size=75) + np.repeat([0, 0.3, 1.5], [20, 25, 30])), 1)
    table = dunn(samples(x[:, None], label=label), "label", latents=["0"], **FREE)
    ranks = stats.rankdata(x)
    t = np.unique(x, return_counts=True)[1]
    s2 = 75 * 76 / 12 - (t**3 - t).sum() / (12 * 74)
    p = []
    for (a, b), (_, row) in zip(itertools.combinations("abc", 2), table.iterrows()):
        A, B = ranks[label == a], ranks[label == b]
        z = (B.mean() - A.mean()) / np.sqrt(s2 * (1 / len(A) + 1 / len(B)))
        assert (row["class_a"], row["class_b"], row["n_a"], row["n_b"]) == (a, b, len(A), len(B))
        assert row["statistic"] == pytest.approx(z, rel=1e-10)
        assert row["p"] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.2)  # corrected for skewness, never below
        assert row["p"] >= 2 * stats.norm.sf(abs(z)) * (1 - 1e-9)
        u = stats.mannwhitneyu(x[label == b], x[label == a]).statistic
        assert row["estimate"] == pytest.approx(2 * u / len(A) / len(B) - 1, abs=1e-12)
        p.append(row["p"])
    np.testing.assert_allclose(table["p_holm"], holm(p))
    screen = associate(samples(x[:, None], label=label), "label", method="kruskal", controls=False, **FREE)
    assert table["p_kruskal"].tolist() == [screen["p"][0]] * 3


def test_dunn_counts_patients():
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(36), 10)
    label = np.array(list("abc"))[patient % 3]
    X = np.maximum(0, rng.normal(size=(360, 6)) * 0.1 + rng.normal(size=(36, 6))[patient] + 1)
    adata = samples(X, patient, label=label)
    names = list(adata.var_names)
    grouped, free = dunn(adata, "label", latents=names, unit="sample"), dunn(adata, "label", latents=names, **FREE)
    assert (grouped["n_groups"] == 36).all() and (grouped["p"] >= free["p"]).all()
    assert (free["p"] < 0.01).sum() >= 4 and (grouped["p"] < 0.01).sum() == 0
    pooled = dunn(adata, "label", latents=names, unit="patient")
    assert np.corrcoef(np.log(pooled["p"]), np.log(grouped["p"]))[0, 1] > 0.9
    with pytest.raises(InputError, match="no three classes"):
        dunn(samples(X, patient, label=patient % 2), "label", latents=names, unit="sample")
    with pytest.raises(InputError, match="no latent 'x'"):
        dunn(adata, "label", latents=["x"], unit="sample")


def test_dunn_does_not_take_the_number_of_samples_for_a_difference():
    """Class c has 3 samples a patient, the others 40; maxima of 40 are higher than maxima of 3."""
    rng = np.random.default_rng(9)
    counts = np.where(np.arange(60) % 3 == 2, rng.integers(2, 6, 60), rng.integers(3, 60, 60))
    patient = np.repeat(np.arange(60), counts)
    label = np.array(list("abc"))[patient % 3]
    X = np.maximum(0, rng.normal(size=(len(patient), 30)))
    adata = samples(X, patient, label=label)
    table = dunn(adata, "label", latents=list(adata.var_names), unit="patient", aggregate="max")
    z = table["statistic"].abs()
    assert (z > 3).mean() > 0.3 and (table["p"] < 0.01).mean() < 0.05


# paired DeLong


def test_paired_delong_numbers_of_proc():
    """R 4.2, pROC: ``roc.test(roc(y, a, direction = "<"), roc(y, b, direction = "<"), method = "delong")``."""
    a = np.array([1.0, 3, 2, 5, 4, 6, 2, 8, 7, 9, 5, 3, 6, 7, 10, 4])
    b = np.array([2.0, 1, 4, 3, 3, 5, 6, 4, 9, 6, 8, 2, 7, 4, 5, 6])
    y = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0])
    found = paired_delong(np.column_stack([a, b]), y == 1)
    got = [found[k] for k in ("auroc_a", "auroc_b", "statistic", "p", "ci_low", "ci_high")]
    np.testing.assert_allclose(
        got, [0.8671875, 0.8828125, -0.113644749774, 0.909519411933, -0.285100161142, 0.253850161142], rtol=1e-9
    )
    turned = paired_delong(np.column_stack([b, a]), y == 1)
    assert turned["difference"] == -found["difference"] and turned["p"] == found["p"]


def test_paired_delong_of_copies_and_of_one_latent():
    rng = np.random.default_rng(4)
    y = np.repeat([False, True], 60)
    X = np.maximum(0, rng.normal(size=(120, 2)) + y[:, None] * [1.0, 0.4])
    alone = paired_delong(X, y)
    copied = paired_delong(np.repeat(X, 5, axis=0), np.repeat(y, 5), codes=np.repeat(np.arange(120), 5))
    assert copied["se"] == pytest.approx(alone["se"], rel=0.02) and copied["df"] == 119
    assert paired_delong(np.repeat(X, 5, axis=0), np.repeat(y, 5))["se"] < 0.5 * alone["se"]
    same = paired_delong(X[:, [0, 0]], y)
    assert same["difference"] == 0 and np.isnan(same["p"])
    sparse = paired_delong(sp.csr_matrix(X), y)
    assert sparse["p"] == pytest.approx(alone["p"], rel=1e-9)
    table = associate(samples(X, y=np.where(y, "b", "a")), "y", method="auroc", controls=False, **FREE)
    pair = compare_auroc(samples(X, y=np.where(y, "b", "a")), "y", "0", "1", **FREE)
    assert [pair["auroc_a"], pair["auroc_b"]] == pytest.approx(table["estimate"].tolist(), rel=1e-12)
    assert pair["p"] == pytest.approx(alone["p"], rel=1e-12) and pair["contrast"] == "b over a"
    with pytest.raises(StatisticsError, match="2 rows"):
        paired_delong(X[:61], y[:61])


@pytest.mark.slow
def test_error_rate_of_paired_delong():
    rng = np.random.default_rng(5)
    free, grouped = [], []
    codes = np.repeat(np.arange(40), 10)
    for _ in range(1000):
        y = np.repeat([False, True], 40)
        shared = rng.normal(size=(80, 1))
        free.append(paired_delong(shared + rng.normal(size=(80, 2)) + y[:, None], y)["p"])
        yes = (codes % 2).astype(bool)
        X = rng.normal(size=(40, 2))[codes] + rng.normal(size=(400, 2)) + yes[:, None]
        grouped.append(paired_delong(X, yes, codes=codes)["p"])
    rates = [np.mean(np.array(p) < 0.05) for p in (free, grouped)]
    print(rates)
    assert 0.03 < rates[0] < 0.065 and 0.02 < rates[1] < 0.07


# variance between classes


def test_shares_of_the_spec():
    x, label = np.array([1.0, 2, 3, 2, 4, 6, 5, 7, 9]), np.repeat(list("abc"), 3)
    table = variance_explained(samples(x[:, None], label=label), "label", latents=["0"], **FREE).set_index("measure")
    assert table.loc["eta_squared", "estimate"] == pytest.approx(0.678571, abs=5e-7)
    assert table.loc["omega_squared", "estimate"] == pytest.approx(0.542373, abs=5e-7)
    H = stats.kruskal(x[:3], x[3:6], x[6:]).statistic
    assert table.loc["epsilon_squared", "estimate"] == pytest.approx(H / 8, rel=1e-12)
    assert (table["ci_low"] <= table["estimate"]).all() and (table["estimate"] <= table["ci_high"]).all()


def test_intervals_of_shares_count_patients():
    rng = np.random.default_rng(6)
    patient = np.repeat(np.arange(30), 20)
    label = np.array(list("abc"))[patient % 3]
    x = np.maximum(0, 2 + rng.normal(size=30)[patient] + (patient % 3) * 0.8 + 0.3 * rng.normal(size=600))
    adata = samples(x[:, None], patient, label=label)
    grouped = variance_explained(adata, "label", latents="0", unit="sample").set_index("measure")
    free = variance_explained(adata, "label", latents="0", **FREE).set_index("measure")
    np.testing.assert_allclose(grouped["estimate"], free["estimate"])
    width = (grouped["ci_high"] - grouped["ci_low"]) / (free["ci_high"] - free["ci_low"])
    assert (width > 2).all()
    two = variance_explained(adata[:40], "label", latents="0", unit="sample")
    assert two["ci_low"].isna().all() and two["estimate"].notna().all()
    again = variance_explained(adata, "label", latents="0", unit="sample").set_index("measure")
    pd.testing.assert_frame_equal(again, grouped)


@pytest.mark.slow
def test_coverage_of_shares():
    """3 classes of 40, means 0, 0.5, 1: true share (1/6) / (1 + 1/6) = 1/7; and no effect."""
    from biosae.stats.posthoc import MEASURES, _interval, _resamples, _shares

    rng = np.random.default_rng(7)
    y = np.repeat([0, 1, 2], 40)
    for shift, truth in ((0.5, 1 / 7), (0.0, 0.0)):
        held = np.zeros(3)
        for _ in range(300):
            x = shift * y + rng.normal(size=120)
            point = _shares(x, y, np.ones((1, 120)))[:, 0]
            draws = _shares(x, y, _resamples(np.arange(120), y, 120, 800, rng))
            for k, measure in enumerate(MEASURES[:2]):
                low, high = _interval(measure, point[k], draws[k])
                held[k] += low <= truth <= high
        print(truth, held / 300)
        assert (held[:2] / 300 > 0.87).all()


# names of the same thing


def test_point_biserial_is_pearson_and_rank_biserial_is_cliff():
    rng = np.random.default_rng(8)
    y = np.repeat([0, 1], [30, 20])
    x = np.maximum(0, rng.normal(size=50) + y)
    adata = samples(x[:, None], y=y)
    pearson = associate(adata, "y", method="pearson", controls=False, **FREE).iloc[0]
    reference = stats.pointbiserialr(y, x)
    assert pearson["estimate"] == pytest.approx(reference.statistic, rel=1e-12)
    cliff = associate(adata, "y", method="wilcoxon", controls=False, **FREE).iloc[0]
    pairs = np.sign(x[y == 1][:, None] - x[y == 0])  # share of favourable less share of unfavourable pairs
    assert cliff["estimate"] == pytest.approx(pairs.mean(), rel=1e-12)


def test_exact_test_within_strata_is_that_of_r_and_of_fisher():
    """R 4.2, mantelhaen.test(exact=TRUE) on 2 x 2 x 3 and 2 x 2 x 2 counts; scipy for a single stratum."""
    assert conditional_pvalue([5, 4, 2], [7, 5, 5], [6, 7, 2], [14, 16, 9]) == pytest.approx(0.00220399258860797)
    assert conditional_pvalue([6, 3], [7, 4], [6, 4], [16, 10]) == pytest.approx(0.000216450216450216)
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b, c, d = rng.integers(0, 9, 4)
        expected = stats.fisher_exact([[a, b], [c, d]])[1]
        assert conditional_pvalue([a], [a + b], [a + c], [a + b + c + d]) == pytest.approx(expected, rel=1e-9)
