"""Closed forms, worked numbers of the specification, and agreement with scipy, statsmodels and scikit-learn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import bh, bonferroni, by, correlate, effects, holm, overlap
from biosae.stats.adjust import basis, partial_correlation
from biosae.stats.correlation import as_columns, fisher_interval, moments, rank_columns
from biosae.stats.nested import intraclass_correlation, ols_cluster, pool
from biosae.stats.permutation import max_t, permutations, sign_flips

X1 = np.array([0, 0, 0, 0, 1.5, 2, 0, 3.0])
Y1 = np.array([1, 0, 2, 1, 3, 5, 0, 4.0])
X2 = np.array([1, 2, 3, 4, 6, 7, 8, 9.0])
Y2 = np.array([2, 1, 4, 3, 7, 9, 8, 10.0])
C2 = np.array([0, 0, 0, 0, 1, 1, 1, 1.0])


def codes(n=60, m=25, *, negative=False, seed=0):
    """Sparse codes with ties, an empty and a full column; optionally negative values and stored zeros."""
    rng = np.random.default_rng(seed)
    dense = np.round(rng.exponential(size=(n, m)) * (rng.random((n, m)) < np.linspace(0.03, 0.9, m)), 1)
    if negative:
        dense *= rng.choice([-1.0, 1.0], dense.shape)
    dense[:, 3] = 0.0
    dense[:, 4] = np.round(rng.exponential(size=n) + 1, 1)
    X = sp.csr_matrix(dense)
    if negative:
        X.data[::7] = 0.0  # stored zeros
    return X, X.toarray()


def test_worked_correlations():
    X = sp.csr_matrix(X1[:, None])
    assert correlate(X, Y1, method="pearson") == pytest.approx([0.8727860], abs=1e-7)
    assert correlate(X, Y1) == pytest.approx([0.8558443], abs=1e-7)
    ranks = rank_columns(as_columns(X)).toarray().ravel() + 3
    assert ranks.tolist() == [3, 3, 3, 3, 6, 7, 3, 8]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("method", "reference"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
@pytest.mark.filterwarnings("ignore")
def test_correlations_agree_with_scipy(negative, method, reference):
    X, dense = codes(negative=negative)
    y = np.random.default_rng(1).poisson(2, len(dense)).astype(float)
    expected = [reference(column, y).statistic for column in dense.T]
    assert correlate(X, y, method=method) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert correlate(dense, y, method=method) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert np.isnan(correlate(X, y, method=method)[3])


def test_sums_of_squares_do_not_cancel():
    x = 1e8 + np.arange(6.0)
    assert moments(as_columns(sp.csr_matrix(x[:, None])))[1] == pytest.approx([17.5], rel=1e-9)
    assert moments(as_columns(x[:, None]))[1] == pytest.approx([17.5], rel=1e-9)
    assert moments(as_columns(sp.csr_matrix(np.full((7, 1), 0.1))))[1] == 0.0


def test_not_finite_is_refused():
    with pytest.raises(InputError, match="NaN or infinite"):
        correlate(np.array([[1.0], [np.nan]]), np.array([1.0, 2.0]))


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float64, (12, 4), elements=st.sampled_from([0.0, 0.0, 0.0, -1.0, 0.5, 1.0, 2.0])),
    hnp.arrays(np.float64, 12, elements=st.integers(-5, 5).map(float)),
)
def test_spearman_invariances(X, y):
    base = correlate(sp.csr_matrix(X), y)
    assert correlate(sp.csr_matrix(np.sign(X) * X**2), y**3) == pytest.approx(base, abs=1e-12, nan_ok=True)
    assert correlate(sp.csr_matrix(-X), y) == pytest.approx(-base, abs=1e-12, nan_ok=True)
    order = np.random.default_rng(0).permutation(12)
    assert correlate(sp.csr_matrix(X[order]), y[order]) == pytest.approx(base, abs=1e-12, nan_ok=True)


def test_partial_correlation_worked():
    found = partial_correlation(X2[:, None], Y2, C2[:, None]).iloc[0]
    assert (found["r"], found["p"], found["df"]) == pytest.approx((0.7, 0.0799167, 5), abs=1e-7)
    low, high = fisher_interval(np.array([0.7]), n_effective=7, rank=False)
    assert (round(low[0], 2), round(high[0], 2)) == (-0.11, 0.95)
    assert correlate(X2[:, None], Y2, method="pearson") == pytest.approx([0.955195], abs=1e-6)


def test_adjustment_can_turn_the_sign():
    x, c = np.array([1, 2, 3, 11, 12, 13.0]), np.array([0, 0, 0, 1, 1, 1.0])
    y = 20 * c - x
    assert correlate(x[:, None], y, method="pearson")[0] > 0.5
    assert partial_correlation(x[:, None], y, c[:, None])["r"][0] == pytest.approx(-1)


def test_partial_correlation_agrees_with_residuals():
    X, dense = codes()
    rng = np.random.default_rng(2)
    y, C = rng.normal(size=60), rng.normal(size=(60, 3))
    D = np.column_stack([np.ones(60), C])
    left = [v - D @ np.linalg.lstsq(D, v, rcond=None)[0] for v in (*dense.T, y)]
    expected = [np.nan if j == 3 else stats.pearsonr(left[j], left[-1]).statistic for j in range(25)]
    assert partial_correlation(X, y, C)["r"].to_numpy() == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_collinear_covariates_are_dropped():
    c = np.arange(10.0)
    assert basis(np.column_stack([c, 2 * c, c**2, np.ones(10)]), 10).shape == (10, 3)


def test_two_class_effects_worked():
    positive = Y1 >= 2
    V = as_columns(sp.csr_matrix(X1[:, None]))
    area = effects.auroc(rank_columns(V), positive)
    variance = effects.delong_variance(V, positive)
    assert (area[0], variance[0]) == pytest.approx((0.875, 0.015625), abs=1e-12)
    low, high = effects.logit_interval(area, variance, critical=stats.norm.ppf(0.975), n_min=4)
    assert (low[0], high[0]) == pytest.approx((0.4270, 0.9850), abs=1e-4)
    m1, s1, m0, s0 = effects.class_moments(V, positive)
    assert effects.hedges_g(m1, s1, 4, m0, s0, 4)[0] == pytest.approx([1.598676], abs=1e-6)
    assert effects.auroc(rank_columns(V), ~positive) == pytest.approx([0.125])


def test_odds_ratio_and_fisher_worked():
    a, b, c, d = (np.array([float(v)]) for v in (12, 3, 5, 20))
    assert np.ravel(effects.odds_ratio(a, b, c, d)) == pytest.approx([16, 3.2294, 79.2726], abs=1e-4)
    assert effects.fisher_pvalue(a, 15, a + c, 40) == pytest.approx([0.00029999], abs=1e-8)
    assert np.ravel(effects.odds_ratio(a, 0 * b, c, d)) == pytest.approx([93.18, 4.736, 1833.2], rel=1e-3)


def test_fisher_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b, c, d = rng.integers(0, 12, 4)
        if min(a + b, c + d) == 0:
            continue
        p = effects.fisher_pvalue(np.array([a]), a + b, np.array([a + c]), a + b + c + d)
        assert p[0] == pytest.approx(stats.fisher_exact([[a, b], [c, d]]).pvalue, rel=1e-9)


def test_auroc_agrees_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    X, dense = codes(negative=True)
    y = np.random.default_rng(5).random(60) < 0.3
    expected = [roc_auc_score(y, column) for column in dense.T]
    assert effects.auroc(rank_columns(as_columns(X)), y) == pytest.approx(expected, abs=1e-12)
    assert effects.auroc(rank_columns(as_columns(dense)), y) == pytest.approx(expected, abs=1e-12)


def test_delong_agrees_with_its_definition():
    X, dense = codes(negative=True, seed=3)
    y = np.random.default_rng(5).random(60) < 0.4
    for j in (0, 4, 10, 24):
        psi = (dense[y, j][:, None] > dense[~y, j]) + 0.5 * (dense[y, j][:, None] == dense[~y, j])
        expected = psi.mean(1).var(ddof=1) / y.sum() + psi.mean(0).var(ddof=1) / (~y).sum()
        assert effects.delong_variance(as_columns(X), y)[j] == pytest.approx(expected, abs=1e-14)


def test_group_delong_is_delong_for_singletons():
    X, _ = codes()
    V, y = as_columns(X), np.random.default_rng(5).random(60) < 0.4
    D = effects.delong_groups(V, y, np.arange(60), 60)
    n1, n0 = y.sum(), (~y).sum()
    split = (D[y] ** 2).sum(0) * n1 / (n1 - 1) + (D[~y] ** 2).sum(0) * n0 / (n0 - 1)
    assert split == pytest.approx(effects.delong_variance(V, y), abs=1e-14)
    assert D.sum(axis=0) == pytest.approx(0, abs=1e-12)


def test_perfect_separation_keeps_an_interval():
    low, high = effects.logit_interval(np.array([1.0, 0.0]), np.zeros(2), critical=1.96, n_min=5)
    assert low[0] == pytest.approx(0.025 ** (1 / 5)) and high[0] == 1
    assert high[1] == pytest.approx(1 - 0.025 ** (1 / 5)) and low[1] == 0


@pytest.mark.parametrize(("n1", "n0"), [(3, 4), (10, 10), (2, 15)])
def test_exact_rank_sum(n1, n0):
    rng = np.random.default_rng(n1)
    for _ in range(5):
        a, b = rng.normal(size=n1), rng.normal(size=n0) + 0.7
        found = stats.mannwhitneyu(a, b, method="exact")
        assert effects.exact_u_pvalue(np.array([found.statistic]), n1, n0)[0] == pytest.approx(found.pvalue, rel=1e-12)


def test_eta_squared_worked():
    V, group = as_columns(np.array([[1, 2, 3, 2, 4, 6, 5, 7, 9.0]]).T), np.repeat([0, 1, 2], 3)
    assert effects.eta_squared(V, group) == pytest.approx([0.678571], abs=1e-6)
    assert effects.omega_squared(V, group) == pytest.approx([0.542373], abs=1e-6)


def test_cluster_robust_slope_worked_and_as_statsmodels():
    sm = pytest.importorskip("statsmodels.api")
    groups = np.repeat([1, 2, 3, 4], 2)
    found = ols_cluster(X2[:, None], Y2, groups).iloc[0]
    assert (found["slope"], found["se"], found["p"]) == pytest.approx((1.1166667, 0.0792303, 0.000774), abs=1e-6)
    X, dense = codes()
    rng = np.random.default_rng(2)
    y, C, g = rng.normal(size=60), rng.normal(size=(60, 2)), rng.integers(0, 9, 60)
    found = ols_cluster(X, y, g, C=C)
    for j in (0, 4, 20):
        fit = sm.OLS(y, np.column_stack([np.ones(60), dense[:, j], C])).fit(
            cov_type="cluster", cov_kwds={"groups": g}, use_t=True
        )
        row = found.iloc[j]
        assert (row["slope"], row["se"]) == pytest.approx((fit.params[1], fit.bse[1]), rel=1e-10)
        assert row["p"] == pytest.approx(fit.pvalues[1], rel=1e-8)


def test_intraclass_correlation():
    assert intraclass_correlation(np.array([1, 1, 2, 2.0]), np.array([0, 0, 1, 1])) == pytest.approx(1)
    assert intraclass_correlation(np.array([1, 2, 1, 2.0]), np.array([0, 0, 1, 1])) == pytest.approx(-1)
    assert np.isnan(intraclass_correlation(np.arange(4.0), np.arange(4)))


@pytest.mark.parametrize("how", ["mean", "max", "fraction_active"])
def test_pooling_agrees_with_pandas(how):
    X, dense = codes(negative=True)
    g = np.random.default_rng(0).integers(0, 7, 60)
    g[:7] = np.arange(7)
    frame = pd.DataFrame((dense != 0) * 1.0 if how == "fraction_active" else dense)
    expected = getattr(frame.groupby(g), "max" if how == "max" else "mean")().to_numpy()
    assert pool(X, g, 7, how=how).toarray() == pytest.approx(expected, rel=1e-12)
    assert np.asarray(pool(dense, g, 7, how=how)) == pytest.approx(expected, rel=1e-12)


P = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.212, 0.216]


def test_multiplicity_worked():
    assert bh(P) == pytest.approx([0.01, 0.04, 0.084, 0.084, 0.084, 0.1, 0.105714, 0.216, 0.216, 0.216], abs=1e-6)
    assert by(P)[:2] == pytest.approx([0.029290, 0.117159], abs=1e-6)
    assert holm(P)[:3] == pytest.approx([0.01, 0.072, 0.312])
    assert bonferroni(P)[:2] == pytest.approx([0.01, 0.08])


def test_multiplicity_as_statsmodels_and_without_nan():
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    p = np.random.default_rng(0).random(40) ** 3
    holes = np.insert(p, [0, 5, 40], np.nan)
    for ours, name in ((bh, "fdr_bh"), (by, "fdr_by"), (holm, "holm"), (bonferroni, "bonferroni")):
        assert ours(p) == pytest.approx(multipletests(p, method=name)[1], abs=1e-14)
        assert ours(holes)[~np.isnan(holes)] == pytest.approx(ours(p), abs=1e-14)
        assert np.isnan(ours(holes)).sum() == 3
    assert np.isnan(bh([np.nan])).all()
    with pytest.raises(InputError):
        bh([1.2])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_multiplicity_order(p):
    p = np.array(p)
    assert (p <= bh(p) + 1e-15).all() and (bh(p) <= by(p) + 1e-15).all() and (holm(p) <= bonferroni(p) + 1e-15).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(bh(p)[order]) >= -1e-15).all() and (np.diff(holm(p)[order]) >= -1e-15).all()


M = np.array([[1, 2, 3, 4, 5, 6], [2, 1, 2, 1, 2, 1], [6, 5, 4, 3, 2, 1.0]]).T
L = np.array([0, 0, 0, 1, 1, 1.0])


def test_max_t_worked_and_duplicates():
    assert max_t(M, L) == pytest.approx([0.2, 1, 0.2])  # 2 of the 20 splits, seen in either column
    assert max_t(M, L, step_down=True) == pytest.approx([0.2, 1, 0.2])
    doubled = max_t(np.column_stack([M, M[:, 0], M[:, 1]]), L)
    assert doubled == pytest.approx([0.2, 1, 0.2, 0.2, 1])
    assert max_t(sp.csr_matrix(M), L) == pytest.approx([0.2, 1, 0.2])


def test_step_down_is_never_larger():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 40)), rng.normal(size=30)
    X[:, :3] += y[:, None]
    single, step = (max_t(X, y, n_permutations=199, step_down=s) for s in (False, True))
    assert (step <= single + 1e-12).all() and (step < single).any()
    assert single.min() == pytest.approx(1 / 200)


def test_arrangements_respect_blocks():
    y, blocks = np.arange(12.0), np.repeat([0, 1, 2], 4)
    drawn = np.concatenate(list(permutations(y, blocks=blocks, n_draws=100, random_state=0).blocks()), axis=1)
    assert drawn.shape == (12, 100)
    for b in range(3):
        assert (np.sort(drawn[blocks == b], axis=0) == y[blocks == b][:, None]).all()
    assert len(np.unique(drawn.T, axis=0)) > 90
    again = np.concatenate(list(permutations(y, blocks=blocks, n_draws=100, random_state=0).blocks()), axis=1)
    assert (again == drawn).all()


def test_all_arrangements_are_listed_once():
    split = np.concatenate(list(permutations(L, blocks=None, n_draws=5, random_state=0).blocks()), axis=1)
    assert split.shape == (6, 20) and len(np.unique(split.T, axis=0)) == 20
    noisy = L + np.array([0, 1e-17, 0, 1e-16, 0, 0])
    assert permutations(noisy, blocks=None, n_draws=5, random_state=0).n_draws == 20
    signs = np.concatenate(list(sign_flips(5, n_draws=3, random_state=0).blocks()), axis=1)
    assert signs.shape == (5, 16) and len(np.unique(signs.T, axis=0)) == 16
    assert not sign_flips(30, n_draws=3, random_state=0).exact


def test_overlap_table():
    obs = pd.DataFrame({"label": list("aabb"), "site": list("xxyy"), "patient": list("ppqr")})
    table = overlap(obs, "label", by="site", unit="patient")
    assert table.loc["x", "a"] == 1 and table.loc["y", "b"] == 2
    assert not table.attrs["separable"] and table.attrs["empty_cells"] == 2
    assert overlap(pd.concat([obs, obs.assign(site="x")]), "label", by="site").attrs["separable"]
    with pytest.raises(StatisticsError):
        overlap(obs, "label", by="scanner")
