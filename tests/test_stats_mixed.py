"""Mixed models: closed forms of balanced designs, the likelihood written out, statsmodels, quadrature by scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import integrate, special, stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import icc
from biosae.stats.glmm import fit_glmm
from biosae.stats.mixed import fit_lmm, likelihood_ratio
from biosae.stats.regression import fit_logistic, fit_ols
from biosae.stats.robust import sandwich


def _cohort(seed: int, *, G: int = 15, tau: float = 1.0, slide: float = 0.0):
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(G), rng.integers(3, 12, G))
    n = len(codes)
    slides = codes * 3 + rng.integers(0, 3, n)
    X = np.column_stack([np.ones(n), rng.normal(size=G)[codes], rng.normal(size=n) + rng.normal(size=G)[codes]])
    y = X @ [4.0, 0.3, 0.5] + tau * rng.normal(size=G)[codes] + slide * rng.normal(size=3 * G)[slides]
    return y + rng.normal(size=n), X, codes, slides


def _dense(codes: np.ndarray, tau2: float, slides: np.ndarray, tau2_sub: float, sigma2: float) -> np.ndarray:
    V = sigma2 * np.eye(len(codes)) + tau2 * (codes[:, None] == codes) + tau2_sub * (slides[:, None] == slides)
    return V


def test_balanced_one_way_is_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    G, n = 8, 5
    codes = np.repeat(np.arange(G), n)
    y = rng.normal(size=G)[codes] + rng.normal(size=G * n)
    mean = y.reshape(G, n).mean(axis=1)
    msb = n * mean.var(ddof=1)
    msw = ((y - mean[codes]) ** 2).sum() / (G * (n - 1))
    found = fit_lmm(y, np.ones((G * n, 1)), codes=codes)
    assert msb > msw
    assert found["sigma2"] == pytest.approx(msw, rel=1e-9)
    assert found["tau2"] == pytest.approx((msb - msw) / n, rel=1e-9)
    assert np.sqrt(found["cov"][0, 0]) == pytest.approx(np.sqrt(msb / (G * n)), rel=1e-9)
    assert found["df"][0] == pytest.approx(G - 1, rel=1e-9)
    for estimator in ("anova", "reml"):
        rho = icc(y, codes, estimator=estimator)
        assert rho["icc"] == pytest.approx((msb - msw) / (msb + (n - 1) * msw), rel=1e-9)
        assert rho["design_effect"] == pytest.approx(1 + (n - 1) * rho["icc"], rel=1e-12)
        assert rho["ci_low"] < rho["icc"] < rho["ci_high"]


def test_no_variance_between_groups_is_least_squares() -> None:
    y, X, codes, _ = _cohort(1)
    y = y - np.bincount(codes, weights=y)[codes] / np.bincount(codes)[codes]  # groups of equal means
    X = np.column_stack([np.ones(len(y)), np.random.default_rng(0).normal(size=len(y))])
    found, ols = fit_lmm(y, X, codes=codes), fit_ols(y, X)
    assert found["note"] == "boundary" and found["tau2"] == 0.0 and found["icc"] == 0.0
    assert np.allclose(found["coef"], ols["coef"], rtol=1e-10, atol=1e-12)
    assert np.allclose(found["cov"], ols["cov"], rtol=1e-10)
    assert np.allclose(found["df"], ols["df"])


def test_one_row_a_group_is_least_squares() -> None:
    y, X, _, _ = _cohort(2)
    found, ols = fit_lmm(y, X, codes=np.arange(len(y))), fit_ols(y, X)
    assert np.allclose(found["coef"], ols["coef"], rtol=1e-10) and np.allclose(found["cov"], ols["cov"], rtol=1e-10)
    assert np.allclose(found["df"], ols["df"])
    with pytest.raises(StatisticsError, match="several rows"):
        icc(y, np.arange(len(y)))
    for values, kind in (
        ([1.0, np.nan, 2, 3], InputError),
        ([2.0] * 4, StatisticsError),
        ([1.0, 1, 2, 2], StatisticsError),
    ):
        with pytest.raises(kind):
            icc(values, [0, 0, 1, 1])


def test_pairs_are_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(size=12)
    after = before + 0.4 + 0.5 * rng.normal(size=12)
    codes, x = np.tile(np.arange(12), 2), np.repeat([0.0, 1.0], 12)
    found = fit_lmm(np.r_[before, after], np.column_stack([np.ones(24), x]), codes=codes)
    t = found["coef"][1] / np.sqrt(found["cov"][1, 1])
    paired = stats.ttest_rel(after, before)
    assert t == pytest.approx(paired.statistic, rel=1e-8)
    assert found["df"][1] == pytest.approx(11, rel=1e-8)


@pytest.mark.parametrize("nested", [False, True])
def test_likelihood_and_estimates_are_those_of_the_matrix_written_out(nested: bool) -> None:
    y, X, codes, slides = _cohort(4, slide=0.8 * nested)
    for reml in (True, False):
        found = fit_lmm(y, X, codes=codes, subcodes=slides if nested else None, reml=reml)

        def deviance(tau2: float, sub: float, sigma2: float, reml: bool = reml) -> float:
            V = _dense(codes, tau2, slides, sub, sigma2)
            W = np.linalg.solve(V, X)
            beta = np.linalg.solve(X.T @ W, W.T @ y)
            value = -2 * stats.multivariate_normal(X @ beta, V).logpdf(y)
            return value + (np.linalg.slogdet(X.T @ W)[1] - X.shape[1] * np.log(2 * np.pi) if reml else 0.0)

        at = (found["tau2"], found["tau2_sub"], found["sigma2"])
        assert -2 * found["loglik"] == pytest.approx(deviance(*at), rel=1e-10)
        for i in range(3):
            for factor in (0.99, 1.01):
                moved = [v * (factor if i == j else 1) for j, v in enumerate(at)]
                assert deviance(*moved) >= deviance(*at) - 1e-9
        V = _dense(codes, at[0], slides, at[1], at[2])
        assert np.allclose(found["cov"], np.linalg.inv(X.T @ np.linalg.solve(V, X)), rtol=1e-8)
        assert np.allclose(found["scores"].sum(axis=0), 0, atol=1e-8 * np.abs(found["scores"]).sum(axis=0).max())


def test_linear_mixed_model_of_statsmodels() -> None:
    y, X, codes, _ = _cohort(5)
    found = fit_lmm(y, X, codes=codes)
    other = sm.MixedLM(y, X, groups=codes).fit(reml=True)
    assert np.allclose(found["coef"], other.fe_params, rtol=1e-4)
    assert found["tau2"] == pytest.approx(float(np.squeeze(other.cov_re)), rel=1e-3)
    assert found["sigma2"] == pytest.approx(other.scale, rel=1e-4)
    assert found["loglik"] == pytest.approx(other.llf, rel=1e-6)


def test_scores_give_the_sandwich_of_the_matrix_written_out() -> None:
    y, X, codes, slides = _cohort(6)
    found = fit_lmm(y, X, codes=codes)
    V = _dense(codes, found["tau2"], slides, 0.0, found["sigma2"])
    W, e = np.linalg.inv(V), y - X @ found["coef"]
    meat = sum(np.outer(s, s) for g in range(15) for s in [X.T[:, codes == g] @ (W @ e)[codes == g]])
    bread = np.linalg.inv(X.T @ W @ X)
    assert np.allclose(
        sandwich(found["bread"], found["scores"], codes=codes, kind="cr0"), bread @ meat @ bread, rtol=1e-8
    )


def test_shift_and_scale() -> None:
    y, X, codes, slides = _cohort(7, slide=0.7)
    one, other = (fit_lmm(v, X, codes=codes, subcodes=slides) for v in (y, 1e3 * y + 1e6))
    assert other["coef"][2] == pytest.approx(1e3 * one["coef"][2], rel=1e-6)
    assert other["tau2"] == pytest.approx(1e6 * one["tau2"], rel=1e-5)
    assert np.allclose(one["df"], other["df"], rtol=1e-5)


def test_likelihood_ratio_is_that_of_two_fits() -> None:
    y, X, codes, _ = _cohort(8)
    statistic, p = likelihood_ratio(y, X, codes=codes)
    full, null = (sm.MixedLM(y, D, groups=codes).fit(reml=False).llf for D in (X, X[:, :2]))
    assert statistic == pytest.approx(2 * (full - null), abs=1e-4)
    assert p == pytest.approx(stats.chi2.sf(statistic, 1))


def test_designs_without_an_answer_are_refused() -> None:
    codes = np.repeat(np.arange(6), 3)
    with pytest.raises(StatisticsError, match="unit=groups"):
        fit_lmm(codes.astype(float) ** 2, np.ones((18, 1)), codes=codes)
    with pytest.raises(StatisticsError, match="one group"):
        fit_lmm(np.arange(18.0) % 5, np.ones((18, 1)), codes=codes, subcodes=np.tile([0, 1, 2], 6))
    with pytest.raises(InputError, match="anova"):
        icc(np.arange(18.0), codes, estimator="manova")


def test_design_effect_of_a_hundred_patients_of_two_hundred_tiles() -> None:
    rng = np.random.default_rng(9)
    codes = np.repeat(np.arange(100), 200)
    within = rng.normal(size=(100, 200))
    within = (within - within.mean(axis=1, keepdims=True)) / within.std(axis=1, ddof=1, keepdims=True)
    between = rng.normal(size=100)
    between = (between - between.mean()) / between.std(ddof=1)
    scale = np.sqrt(0.3 / 0.7 + 1 / 200)  # of means, so that the estimate is exactly .3
    found = icc((within + scale * between[:, None]).ravel(), codes, estimator="anova")
    assert found["icc"] == pytest.approx(0.3, abs=1e-10)
    assert found["design_effect"] == pytest.approx(60.7, abs=1e-6)
    assert round(found["n_effective"]) in (329, 330) and found["n_effective"] == pytest.approx(20_000 / 60.7)


def test_intervals_of_the_icc_cover() -> None:
    rng = np.random.default_rng(10)
    codes = np.repeat(np.arange(15), 6)
    hits = {"anova": 0, "reml": 0}
    for _ in range(60):
        y = np.sqrt(0.4) * rng.normal(size=15)[codes] + np.sqrt(0.6) * rng.normal(size=90)
        for estimator in hits:
            found = icc(y, codes, estimator=estimator)
            hits[estimator] += found["ci_low"] <= 0.4 <= found["ci_high"]
    assert all(h >= 51 for h in hits.values()), hits


@pytest.mark.parametrize("family", ["binomial", "poisson"])
def test_generalised_likelihood_is_the_integral(family: str) -> None:
    rng = np.random.default_rng(11)
    codes = np.repeat(np.arange(12), rng.integers(4, 9, 12))
    X = np.column_stack([np.ones(len(codes)), rng.normal(size=len(codes))])
    eta = X @ [-0.2, 0.6] + 1.5 * rng.normal(size=12)[codes]
    offset = rng.uniform(-0.5, 0.5, len(codes)) if family == "poisson" else np.zeros(len(codes))
    y = (rng.poisson(np.exp(eta + offset)) if family == "poisson" else rng.random(len(eta)) < special.expit(eta)) * 1.0
    found = fit_glmm(y, X, codes=codes, family=family, offset=offset, n_points=25)

    def loglik(beta: np.ndarray, tau: float) -> float:
        total = 0.0
        for g in range(12):
            own = codes == g
            fixed = X[own] @ beta + offset[own]

            def density(b: float, own=own, fixed=fixed) -> float:
                at = fixed + tau * b
                rest = np.exp(at) + special.gammaln(y[own] + 1) if family == "poisson" else np.logaddexp(0, at)
                return np.exp((y[own] * at - rest).sum() - b**2 / 2) / np.sqrt(2 * np.pi)

            total += np.log(integrate.quad(density, -9, 9, epsabs=0, epsrel=1e-9, limit=200)[0])
        return total

    beta, tau = found["coef"], np.sqrt(found["tau2"])
    best = loglik(beta, tau)
    assert found["loglik"] == pytest.approx(best, abs=1e-5)
    step = 0.01
    for i in range(3):
        up, down = (np.r_[beta, tau] + sign * step * np.eye(3)[i] for sign in (1, -1))
        up, down = loglik(up[:2], up[2]), loglik(down[:2], down[2])
        assert up < best and down < best
        assert np.linalg.inv(found["bread"])[i, i] == pytest.approx((2 * best - up - down) / step**2, rel=1e-3)
    assert np.allclose(found["scores"].sum(axis=0), 0, atol=1e-5)


def test_no_variance_between_groups_is_logistic_regression() -> None:
    rng = np.random.default_rng(12)
    codes = np.repeat(np.arange(20), 10)
    x = rng.normal(size=200)
    y = np.tile([0.0, 1.0], 100)  # every group half and half: less variance between groups than chance gives
    X = np.column_stack([np.ones(200), x])
    found, plain = fit_glmm(y, X, codes=codes), fit_logistic(y, X)
    assert found["note"] == "boundary" and found["tau2"] == 0.0
    assert np.allclose(found["coef"], plain["coef"], rtol=1e-6, atol=1e-9)
    assert np.allclose(found["cov"], plain["cov"], rtol=1e-6)
    expected = sm.Logit(y, X).fit(disp=0, tol=1e-12)
    assert np.allclose(plain["coef"], expected.params, rtol=1e-7, atol=1e-9)
    assert plain["loglik"] == pytest.approx(expected.llf, rel=1e-10)


def test_separated_classes_are_said_to_be() -> None:
    x = np.arange(40.0)
    codes = np.repeat(np.arange(8), 5)
    X = np.column_stack([np.ones(40), (x - x.mean()) / x.std()])
    for y in ((x > 20) * 1.0, np.r_[np.zeros(20), np.ones(20)]):
        assert fit_logistic(y, X)["note"] == "separated"
        assert fit_glmm(y, X, codes=codes)["note"] == "separated"
    crossed = np.r_[np.zeros(19), 1, 0, np.ones(19)]
    assert fit_logistic(crossed, X)["note"] == "" and fit_logistic(crossed, X)["converged"]
    rare = (x == 3) * 1.0
    fires = np.column_stack([np.ones(40), (x < 4) * 1.0])
    assert fit_logistic(rare, fires)["note"] == "separated"


def test_unknown_family_and_too_few_nodes_are_refused() -> None:
    y, X, codes, _ = _cohort(13)
    with pytest.raises(InputError, match="poisson"):
        fit_glmm(y, X, codes=codes, family="poison")
    with pytest.raises(InputError, match="7"):
        fit_glmm((y > 4) * 1.0, X, codes=codes, n_points=1)


def test_lmm_of_associate() -> None:
    import anndata as ad
    import scipy.sparse as sp

    from biosae.stats import associate

    rng = np.random.default_rng(14)
    y, X, codes, _ = _cohort(14, G=25)
    z = rng.exponential(size=(len(y), 4)) * (rng.random((len(y), 4)) < 0.5)
    y = y + z[:, 0]
    obs = pd.DataFrame({"patient": codes.astype(str), "score": y, "age": X[:, 1]}, index=np.arange(len(y)).astype(str))
    adata = ad.AnnData(sp.csr_matrix(z), obs=obs, var=pd.DataFrame(index=list("abcd")))
    table = associate(adata, "score", unit="sample", method="lmm", covariates=["age"], controls=False)
    for j, row in enumerate(table.itertuples()):
        found = fit_lmm(y, np.column_stack([np.ones(len(y)), X[:, 1], z[:, j]]), codes=codes)
        assert row.estimate == pytest.approx(found["coef"][-1], rel=1e-8)
        own = 2 * stats.t.sf(abs(found["coef"][-1]) / np.sqrt(found["cov"][-1, -1]), found["df"][-1])
        assert row.p >= own * (1 - 1e-8)
        assert row.ci_low < row.estimate < row.ci_high
    assert table.loc[0, "p"] < 0.01 and (table.loc[1:, "p"] > 0.01).all()
    adata.obs["group_score"] = np.bincount(codes, weights=y)[codes]
    with pytest.raises(StatisticsError, match="unit='patient'"):
        associate(adata, "group_score", unit="sample", method="lmm", controls=False)
