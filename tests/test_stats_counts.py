"""Counts: fits against statsmodels and closed forms, edge cases, the screens' identities and error rates."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import associate
from biosae.stats.counts import (
    NonIntegerCountsWarning,
    compare_counts,
    fit_negbin,
    fit_poisson,
    fit_zinb,
    fit_zip,
    rootogram,
)
from biosae.stats.ranking import ranked, strength

FITS = {"poisson": fit_poisson, "negbin": fit_negbin, "zip": fit_zip, "zinb": fit_zinb}


def simulated(n=150, *, alpha=0.7, structural=0.0, seed=3):
    """Counts, design of intercept, covariate and sparse latent, and log exposure."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(n) < 0.4, rng.exponential(size=n), 0.0)
    C, offset = rng.normal(size=n), 0.5 * rng.normal(size=n)
    mu = np.exp(1.0 + 0.3 * C + 0.5 * x + offset)
    y = rng.poisson(mu * (rng.gamma(1 / alpha, alpha, n) if alpha else 1.0)).astype(float)
    y[rng.random(n) < structural] = 0.0
    return y, np.column_stack([np.ones(n), C, x]), offset


@pytest.mark.parametrize("model", ["poisson", "negbin"])
@pytest.mark.parametrize("seed", [0, 1])
def test_coefficients_and_errors_are_those_of_statsmodels_glm(model, seed):
    import statsmodels.api as sm

    y, X, offset = simulated(seed=seed)
    found = FITS[model](y, X, offset=offset)
    family = sm.families.Poisson() if model == "poisson" else sm.families.NegativeBinomial(alpha=found["alpha"])
    other = sm.GLM(y, X, family=family, offset=offset).fit(tol=1e-14)
    np.testing.assert_allclose(found["coef"], other.params, atol=3e-8)
    np.testing.assert_allclose(np.sqrt(np.diag(found["cov"])), other.bse, rtol=3e-8)
    assert found["loglik"] == pytest.approx(other.llf, abs=1e-8)
    assert found["pearson_chi2_df"] == pytest.approx(other.pearson_chi2 / other.df_resid, rel=1e-7)
    robust = sm.GLM(y, X, family=family, offset=offset).fit(tol=1e-14, cov_type="HC0")
    V = found["bread"] @ found["scores"].T @ found["scores"] @ found["bread"]
    if model == "poisson":  # for NB, statsmodels takes the observed information
        np.testing.assert_allclose(np.sqrt(np.diag(V)), robust.bse, rtol=1e-7)


def test_alpha_is_that_of_statsmodels_and_the_likelihood_has_no_higher_value():
    import statsmodels.api as sm

    y, X, offset = simulated()
    found = fit_negbin(y, X, offset=offset)
    other = sm.NegativeBinomial(y, X, offset=offset).fit(disp=0, method="newton", maxiter=200, tol=1e-12)
    np.testing.assert_allclose([*found["coef"], found["alpha"]], other.params, atol=1e-6)
    assert found["loglik"] == pytest.approx(other.llf, abs=1e-8)
    assert found["aic"] == pytest.approx(other.aic, abs=1e-7)


def _by_hand(y, X, Z, offset, p, dispersed):
    """Zero-inflated log-likelihood written out with scipy's distributions."""
    k, q = X.shape[1], Z.shape[1]
    mu, pi = np.exp(X @ p[:k] + offset), special.expit(Z @ p[k : k + q])
    if dispersed:
        theta = np.exp(-p[-1])
        f = stats.nbinom.pmf(y, theta, theta / (theta + mu))
    else:
        f = stats.poisson.pmf(y, mu)
    return np.log(pi * (y == 0) + (1 - pi) * f).sum()


@pytest.mark.parametrize("dispersed", [False, True])
@pytest.mark.parametrize("design", [False, True])
def test_zero_inflated_fits_are_at_the_maximum_of_the_likelihood_written_out(dispersed, design):
    y, X, offset = simulated(400, alpha=0.5 * dispersed, structural=0.4, seed=5)
    Z = np.column_stack([np.ones(len(y)), X[:, 1]]) if design else np.ones((len(y), 1))
    found = (fit_zinb if dispersed else fit_zip)(y, X, offset=offset, inflation=Z if design else None)
    assert found["converged"] and found["note"] == ""
    p = np.r_[found["coef"], found["coef_inflation"], [np.log(found["alpha"])] if dispersed else []]

    def value(p):
        return -_by_hand(y, X, Z, offset, p, dispersed)

    assert value(p) == pytest.approx(-found["loglik"], abs=1e-8)
    assert np.abs(optimize.approx_fprime(p, value, 1e-6)).max() < 2e-3
    again = optimize.minimize(value, p + 0.1, method="Nelder-Mead", options={"maxiter": 8000, "maxfev": 8000})
    assert again.fun >= value(p) - 1e-7
    h = 1e-3
    E = np.eye(len(p)) * h
    H = np.array([[value(p + a + b) - value(p + a - b) - value(p - a + b) + value(p - a - b) for a in E] for b in E])
    inverse, k = np.linalg.inv(H / (4 * h * h)), X.shape[1]
    np.testing.assert_allclose(found["cov"], inverse[:k, :k], rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(found["cov_inflation"], inverse[k : k + Z.shape[1], k : k + Z.shape[1]], rtol=2e-3)
    np.testing.assert_allclose(found["scores"].sum(axis=0), 0.0, atol=1e-7)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_slope_of_two_equal_groups_is_the_log_of_the_ratio_of_means(low, high, seed):
    rng = np.random.default_rng(seed)
    y = np.r_[rng.negative_binomial(2, 2 / (2 + low), 30), rng.negative_binomial(2, 2 / (2 + high), 30)].astype(float)
    x = np.repeat([0.0, 1.0], 30)
    if y[:30].any() and y[30:].any():
        expected = np.log(y[30:].mean() / y[:30].mean())
        for fit in (fit_poisson, fit_negbin):
            assert fit(y, np.column_stack([np.ones(60), x]))["coef"][1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("model", list(FITS))
def test_twice_the_exposure_moves_the_intercept_by_the_log_of_two_alone(model):
    y, X, offset = simulated(300, alpha=0.5, structural=0.3, seed=5)
    a, b = FITS[model](y, X, offset=offset), FITS[model](y, X, offset=offset + np.log(2))
    np.testing.assert_allclose(b["coef"] - a["coef"], [-np.log(2), 0, 0], atol=1e-8)
    np.testing.assert_allclose(b["cov"], a["cov"], rtol=1e-6)
    assert b["loglik"] == pytest.approx(a["loglik"], abs=1e-8)


def test_spec_example_overdispersed_counts_have_wider_errors_and_dispersion_near_three():
    """Spec D6: alpha .7, n 120: slope .67, se NB .18 against Poisson .13, dispersion 3.1, recovered on average."""
    rng, slopes, alphas, wider = np.random.default_rng(3), [], [], []
    for _ in range(60):
        x = np.repeat([0.0, 1.0], 60)
        y = rng.poisson(np.exp(0.7 + 0.67 * x) * rng.gamma(1 / 0.7, 0.7, 120)).astype(float)
        X = np.column_stack([np.ones(120), x])
        nb, p = fit_negbin(y, X), fit_poisson(y, X)
        slopes.append(nb["coef"][1])
        alphas.append(nb["alpha"])
        wider.append(np.sqrt(nb["cov"][1, 1] / p["cov"][1, 1]))
        assert nb["p_overdispersion"] < 1e-4 and nb["aic"] < p["aic"]
    assert np.mean(slopes) == pytest.approx(0.67, abs=4 * np.std(slopes) / np.sqrt(60))
    assert 0.55 < np.mean(alphas) < 0.75
    assert 1.3 < np.mean(wider) < 1.8


def test_structural_zeros_are_found():
    """Spec D6: 40 % structural zeros."""
    y, X, offset = simulated(3000, alpha=0, structural=0.4, seed=5)
    found = fit_zip(y, X, offset=offset)
    se = np.sqrt(found["cov_inflation"][0, 0])
    assert found["coef_inflation"][0] == pytest.approx(special.logit(0.4), abs=3.5 * se)
    assert found["coef"][2] == pytest.approx(0.5, abs=3.5 * np.sqrt(found["cov"][2, 2]))
    table = compare_counts(y, X, offset=offset).set_index("model")
    assert table["aic"].idxmin() == "zip"
    assert table.loc["zip", "loglik"] <= table.loc["zinb", "loglik"] + 1e-8 < table.loc["zip", "loglik"] + 3
    assert table.loc["zip", "zeros_expected"] == pytest.approx(table.loc["zip", "zeros_observed"], rel=0.02)
    assert table.loc["poisson", "zeros_expected"] < 0.6 * table.loc["poisson", "zeros_observed"]


def test_zeros_that_overdispersion_explains_are_not_inflation():
    y, X, offset = simulated(2000, alpha=2.0, seed=8)
    table = compare_counts(y, X, offset=offset).set_index("model")
    assert table.loc["zip", "inflation"] > 0.1  # which looks like structural zeros as long as counts must be Poisson
    assert table["aic"].drop("zinb").idxmin() == "negbin"
    assert table.loc["zinb", "aic"] > table.loc["negbin", "aic"] - 4


def test_no_overdispersion_is_poisson_with_p_one_and_the_boundary_p_is_half_the_chi_squared():
    rng = np.random.default_rng(1)
    X = np.column_stack([np.ones(200), rng.normal(size=200)])
    under = fit_negbin(rng.binomial(10, 0.5, 200).astype(float), X)
    assert under["note"] == "boundary" and under["alpha"] == 0 and under["p_overdispersion"] == 1
    y, X, offset = simulated(80, alpha=0.2, seed=2)
    nb, p = fit_negbin(y, X, offset=offset), fit_poisson(y, X, offset=offset)
    expected = stats.chi2.sf(2 * (nb["loglik"] - p["loglik"]), 1) / 2
    assert nb["p_overdispersion"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_overdispersion_is_found_in_five_percent_of_poisson_counts():
    rng = np.random.default_rng(0)
    p = [fit_negbin(rng.poisson(5.0, 400).astype(float), np.ones((400, 1)))["p_overdispersion"] for _ in range(2000)]
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize("model", list(FITS))
def test_a_latent_that_is_silent_wherever_there_are_counts_gets_a_bound(model):
    y, X, _ = simulated(200, alpha=0.5, structural=0.3 if model.startswith("z") else 0.0)
    rng = np.random.default_rng(0)
    z = np.zeros(200)
    z[np.flatnonzero(y == 0)[:12]] = rng.random(12) + 0.5
    found = FITS[model](y, np.column_stack([np.ones(200), z]))
    assert found["note"] == "separated" and found["converged"]
    slope, se = found["coef"][1], np.sqrt(found["cov"][1, 1])
    assert -20 < slope < 0 and 0.3 < se < 20
    assert FITS[model](y, X)["note"] == ""


def test_firth_of_one_empty_group_is_the_half_event():
    """Saturated Poisson: Jeffreys' prior adds half a count to every group."""
    y = np.r_[np.zeros(10), np.full(10, 3.0)]
    X = np.column_stack([np.ones(20), np.repeat([1.0, 0.0], 10)])
    found = fit_poisson(y, X)
    assert found["coef"] == pytest.approx([np.log(30.5 / 10), np.log(0.5 / 30.5)], abs=1e-7)


def test_counts_that_are_not_whole_warn_and_have_scaled_errors_and_no_likelihood():
    y, X, offset = simulated()
    with pytest.warns(NonIntegerCountsWarning, match="whole"):
        found = fit_poisson(y + 0.25, X, offset=offset)
    assert found["note"] == "quasi" and np.isnan(found["loglik"]) and np.isnan(found["aic"])
    np.testing.assert_allclose(found["cov"], found["bread"] * found["pearson_chi2_df"])
    with pytest.warns(NonIntegerCountsWarning), pytest.raises(InputError, match="whole"):
        fit_zip(y + 0.25, X)


@pytest.mark.parametrize("model", list(FITS))
def test_without_counts_there_is_nothing_to_estimate_and_bad_input_is_refused(model):
    y, X, _ = simulated()
    found = FITS[model](np.zeros(len(y)), X)
    assert found["note"] == "one_class" and np.isnan(found["coef"]).all() and not found["converged"]
    with pytest.raises(InputError, match="negative"):
        FITS[model](y - 1, X)
    with pytest.raises(InputError, match="collinear"):
        FITS[model](y, np.column_stack([X, X[:, 1]]))
    with pytest.raises(InputError, match="NaN"):
        FITS[model](np.r_[np.nan, y[1:]], X)


def test_large_offsets_and_scales_do_not_matter():
    y, X, offset = simulated()
    plain = fit_negbin(y, X, offset=offset)
    scaled = fit_negbin(y, X * [1, 1e6, 1e-5], offset=offset + 20)
    np.testing.assert_allclose(scaled["coef"] * [1, 1e6, 1e-5] + [20, 0, 0], plain["coef"], atol=1e-8)


def test_rootogram_adds_up_and_shows_too_few_zeros():
    y, X, offset = simulated(1000, alpha=0, structural=0.4)
    p, z = fit_poisson(y, X, offset=offset), fit_zip(y, X, offset=offset)
    plain, inflated = (
        rootogram(y, f["mu"], inflation=f.get("inflation", 0.0), alpha=f["alpha"], max_count=8) for f in (p, z)
    )
    for table in (plain, inflated):
        assert table["observed"].sum() == 1000 and table["expected"].sum() == pytest.approx(1000)
        np.testing.assert_allclose(table["hanging"], np.sqrt(table["observed"]) - np.sqrt(table["expected"]))
    assert plain["hanging"][0] > 5 and abs(inflated["hanging"][0]) < 0.5
    assert plain["expected"][1] == pytest.approx(stats.poisson.pmf(1, p["mu"]).sum())
    nb = fit_negbin(y, X, offset=offset)
    theta = 1 / nb["alpha"]
    by_hand = stats.nbinom.pmf(2, theta, theta / (theta + nb["mu"])).sum()
    assert rootogram(y, nb["mu"], alpha=nb["alpha"])["expected"][2] == pytest.approx(by_hand)


# ---- the screens


def cohort(n=240, m=20, *, per=1, seed=0, effect=0.0):
    rng = np.random.default_rng(seed)
    Z = np.where(rng.random((n, m)) < 0.3, rng.exponential(size=(n, m)), 0.0)
    area, age = rng.uniform(0.5, 4, n), rng.normal(60, 10, n)
    mu = area * np.exp(0.3 + 0.03 * (age - 60) + effect * Z[:, 0])
    obs = pd.DataFrame(
        {
            "patient": (np.arange(n) // per).astype(str),
            "cells": rng.negative_binomial(3, 3 / (3 + mu)).astype(float),
            "area": area, "age": age, "unit area": 2.0,
        },
        index=[f"s{i}" for i in range(n)],
    )  # fmt: skip
    return anndata.AnnData(sp.csr_matrix(Z), obs=obs)


def _sd(adata, j):
    return adata.X[:, [j]].toarray().std(ddof=1)


@pytest.mark.parametrize("model", ["poisson", "negbin"])
def test_screen_full_fits_are_the_fits_and_one_steps_are_newton_steps_from_no_effect(model):
    adata = cohort(effect=0.5)
    options = {"unit": "sample", "method": model, "exposure": "area", "covariates": ["age"], "controls": False}
    table = associate(adata, "cells", n_fits=5, **options).set_index("latent")
    assert table["fit"].value_counts().to_dict() == {"one step": 15, "full": 5}
    y, age = adata.obs["cells"].to_numpy(), adata.obs["age"].to_numpy()
    offset = np.log(adata.obs["area"].to_numpy())
    C = np.column_stack([np.ones(len(y)), age - 60])
    null = FITS[model](y, C, offset=offset)
    mu, alpha = null["mu"], null["alpha"]
    w, r = mu / (1 + alpha * mu), (y - mu) / (1 + alpha * mu)
    for name, row in table.iterrows():
        x = adata.X[:, [adata.var_names.get_loc(name)]].toarray().ravel()
        if row["fit"] == "full":
            fit = FITS[model](y, np.column_stack([C, x]), offset=offset)
            assert np.log(row["estimate"]) == pytest.approx(fit["coef"][2] * x.std(ddof=1), abs=1e-8)
            continue
        left = x - C @ np.linalg.solve(C.T @ (w[:, None] * C), C.T @ (w * x))
        assert np.log(row["estimate"]) == pytest.approx((left @ r) / (w @ left**2) * x.std(ddof=1), abs=1e-8)


def test_negbin_screen_is_the_score_test_of_the_fitted_null():
    """The statistic is U / sqrt(Var U) with the variance scaled by the Pearson residuals: t in its correlation form."""
    adata = cohort()
    table = associate(adata, "cells", unit="sample", method="negbin", exposure="area", controls=False)
    y, offset = adata.obs["cells"].to_numpy(), np.log(adata.obs["area"].to_numpy())
    n = len(y)
    null = fit_negbin(y, np.ones((n, 1)), offset=offset)
    w = null["mu"] / (1 + null["alpha"] * null["mu"])
    r = (y - null["mu"]) / (1 + null["alpha"] * null["mu"])
    X = adata.X.toarray()
    left = X - (w @ X) / w.sum()
    U, variance = left.T @ r, w @ left**2
    R2 = U**2 / variance / (r**2 / w).sum()
    np.testing.assert_allclose(table["statistic"] ** 2, R2 * (n - 2) / (1 - R2), rtol=1e-7)
    assert (np.sign(table["statistic"]) == np.sign(U)).all()


def test_without_exposure_and_covariates_the_score_is_the_correlation():
    adata = cohort()
    count = associate(adata, "cells", unit="sample", method="negbin", controls=False)
    pearson = associate(adata, "cells", unit="sample", method="pearson", controls=False)
    np.testing.assert_allclose(count["statistic"], pearson["statistic"], rtol=1e-9)
    np.testing.assert_allclose(count["p"], pearson["p"], rtol=1e-9)
    robust = associate(adata, "cells", unit="sample", method="poisson", controls=False)
    assert (robust["p"] >= pearson["p"] * (1 - 1e-9)).all()


def test_exposure_in_other_units_changes_nothing():
    adata = cohort(effect=0.4)
    adata.obs["metres"] = adata.obs["area"] * 1e-6
    tables = [
        associate(adata, "cells", unit="sample", method="negbin", exposure=e, controls=False)
        for e in ("area", "metres")
    ]
    np.testing.assert_allclose(tables[0]["estimate"], tables[1]["estimate"], rtol=1e-8)
    np.testing.assert_allclose(tables[0]["p"], tables[1]["p"], rtol=1e-7)


def test_counts_and_exposures_of_a_unit_are_added_up_and_samples_without_a_count_are_left_out():
    adata = cohort(240, per=4, effect=0.4)
    adata.obs.loc[["s0", "s1", "s7"], "cells"] = np.nan
    known = adata.obs["cells"].notna().to_numpy()
    found = associate(adata, "cells", unit="patient", method="poisson", exposure="area", controls=False, n_fits=3)
    codes = adata.obs["patient"].astype(int).to_numpy()[known]
    y = np.bincount(codes, weights=adata.obs["cells"][known])
    area = np.bincount(codes, weights=adata.obs["area"][known])
    best = found["p"].idxmin()
    x = adata.X[known][:, [int(found["latent"][best])]].toarray().ravel()
    x = np.bincount(codes, weights=x) / np.bincount(codes)
    fit = fit_poisson(y, np.column_stack([np.ones(60), (x - x.mean()) / x.std(ddof=1)]), offset=np.log(area))
    assert found["n_units"].eq(60).all()
    assert found["estimate"][best] == pytest.approx(np.exp(fit["coef"][1]), rel=1e-8)


def test_a_planted_rate_ratio_is_found_at_the_unit_of_patients():
    adata = cohort(900, per=3, effect=0.5, seed=4)
    for unit in ("sample", "patient"):
        table = associate(
            adata, "cells", unit=unit, method="negbin", exposure="area", covariates=["age"], controls=False
        )
        first = ranked(table).iloc[0]
        assert first["latent"] == "0" and first["fit"] == "full" and first["q"] < 0.01
        if unit == "sample":
            assert first["ci_low"] < np.exp(0.5 * _sd(adata, 0)) < first["ci_high"]
        assert strength(table)[0] == pytest.approx(np.log(table["estimate"][0]))
        assert (table["effect"] == "rate_ratio").all()


def test_silent_latent_zeros_and_bad_counts_in_the_screen():
    adata = cohort(300)
    y = adata.obs["cells"].to_numpy()
    X = adata.X.toarray()
    X[:, 1] = 0.0
    X[np.flatnonzero(y == 0)[:30], 1] = 1.0
    adata.X = sp.csr_matrix(X)
    options = {"unit": "sample", "exposure": "area", "controls": False}
    table = associate(adata, "cells", method="poisson", **options).set_index("latent")
    assert table.loc["1", "fit"] == "separated"
    assert 0 < table.loc["1", "estimate"] < 1 and table.loc["1", "p"] < 0.05
    assert 0 < table.loc["1", "ci_low"] < table.loc["1", "ci_high"] < 1.5
    adata.obs["none"] = 0.0
    assert (associate(adata, "none", method="negbin", **options)["status"] == "one_class").all()
    adata.obs["any"] = (y > 0).astype(float)  # 0 and 1 are counts, too
    assert np.isfinite(associate(adata, "any", method="poisson", **options)["p"]).all()
    adata.obs["ones"] = 1.0  # one count each, but in different areas
    assert np.isfinite(associate(adata, "ones", method="poisson", **options)["p"]).all()
    adata.obs["below"] = y - 1
    with pytest.raises(InputError, match="negative"):
        associate(adata, "below", method="poisson", **options)
    adata.obs["mean"] = y / 3
    with pytest.warns(NonIntegerCountsWarning):
        associate(adata, "mean", method="poisson", **options)
    adata.obs.loc["s3", "area"] = 0.0
    with pytest.raises(InputError, match="exposure"):
        associate(adata, "cells", method="poisson", **options)


def test_few_units_are_permuted_and_p_is_never_below_one_over_the_draws():
    adata = cohort(15, seed=2)
    options = {"unit": "sample", "method": "poisson", "controls": False, "min_active": 1, "min_active_groups": 1}
    plain = associate(adata, "cells", **options)
    assert plain["inference"][0].count("permutation") == 1
    weighted = associate(adata, "cells", exposure="area", **options)
    assert (weighted["p"].dropna() >= 1e-4).all()
    assert "Freedman-Lane" in weighted["inference"].iloc[0]


def test_rearranged_within_patients_negbin_is_tested_and_overdispersed_poisson_refused():
    adata = cohort(240, per=6)
    options = {"unit": "sample", "exposure": "area", "permute": "within", "n_permutations": 99, "controls": False}
    found = associate(adata, "cells", method="negbin", **options)
    assert found["inference"].str.contains("within").all() and (found["p"] >= 0.01).all()
    with pytest.raises(StatisticsError, match="negbin"):
        associate(adata, "cells", method="poisson", **options)


# ---- error rates


def nested_cohort(G, rng, *, m, inflation, icc=0.3):
    """Patients of 4 to 20 samples; overdispersed and zero-inflated counts that do not go with the latents."""
    size = rng.integers(4, 21, G)
    g = np.repeat(np.arange(G), size)
    n = len(g)

    def nested(columns=()):
        return np.sqrt(icc) * rng.normal(size=(G, *columns))[g] + np.sqrt(1 - icc) * rng.normal(size=(n, *columns))

    x, level, cut = nested((m,)), nested(), stats.norm.ppf(inflation)
    area, hours = np.exp(0.5 * rng.normal(size=n)), np.exp(0.7 * rng.normal(size=G))[g]
    obs = pd.DataFrame(
        {
            "patient": g.astype(str),
            "site": np.where(rng.permutation(np.arange(G) % 2)[g], "north", "south"),
            "stain": nested(), "area": area, "hours": hours,
            "cells": rng.negative_binomial(2, 2 / (2 + area * np.exp(0.8 * level))).astype(float),
            "zeroed": rng.poisson(4 * np.exp(0.5 * level)) * (rng.random(n) < 0.3).astype(float),
            "events": rng.poisson(0.3 * hours * np.exp(0.8 * level)).astype(float),
        },
        index=[f"t{i}" for i in range(n)],
    )  # fmt: skip
    return anndata.AnnData(sp.csr_matrix(np.where(x > cut, np.exp(x) - np.exp(cut), 0)), obs=obs)


PATHS = {
    f"{model}, {name}": (target, {"method": model, **options})
    for model in ("poisson", "negbin")
    for name, (target, options) in {
        "samples": ("cells", {"unit": "sample", "exposure": "area"}),
        "samples, adjusted": ("cells", {"unit": "sample", "exposure": "area", "covariates": ["stain"]}),
        "samples, zero-inflated": ("zeroed", {"unit": "sample"}),
        "patients": ("cells", {"unit": "patient", "exposure": "area"}),
        "patients, adjusted": ("cells", {"unit": "patient", "exposure": "area", "covariates": ["site"]}),
        "patients, zero-inflated": ("zeroed", {"unit": "patient"}),
        "patients, hours": ("events", {"unit": "patient", "exposure": "hours"}),
    }.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("inflation", [0.6, 0.9])
@pytest.mark.parametrize("G", [20, 60])
def test_screens_hold_their_level(G, inflation):
    rng = np.random.default_rng(1000 * G + int(100 * inflation))
    found: dict[str, list[float]] = {name: [] for name in PATHS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonIntegerCountsWarning)
        for _ in range(40):
            adata = nested_cohort(G, rng, m=30, inflation=inflation)
            for name, (target, options) in PATHS.items():
                p = associate(adata, target, controls=False, n_fits=0, **options)["p"].dropna()
                if len(p):
                    found[name].append(float((p <= 0.05).mean()))
    for name, rates in found.items():
        error = np.std(rates, ddof=1) / np.sqrt(len(rates))
        assert np.mean(rates) <= 0.05 + 3 * max(error, 1e-3), (name, np.mean(rates), error)
