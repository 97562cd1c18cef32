"""Cox's model, its score screen over latents, concordance, proportionality and survival tables."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import associate, cox_screen
from biosae.stats.correlation import as_columns
from biosae.stats.cox import evaluate, fit_cox, maximise, penalised, profile_interval, risk_sets, standardised
from biosae.stats.monotone import monotone
from biosae.stats.survival import aalen_johansen, concordance, kaplan_meier, schoenfeld, uno_c

T = np.array([5.0, 8, 12, 3, 9, 15, 7, 11, 4, 10])
E = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 0])
Z = np.array([0, 2, 0.5, 2.5, 0, 0.1, 0, 1.6, 2.2, 0.9])
TIED = np.array([5.0, 8, 12, 3, 8, 15, 7, 11, 3, 10])


def rows(seed=0, *, n=60, k=3, n_times=12):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, k))
    t = np.ceil(rng.exponential(size=n) * np.exp(-0.5 * X[:, 0]) * n_times / 2)
    return t, (rng.random(n) < 0.6).astype(int), X, rng.integers(0, 3, n)


def test_worked_numbers():
    fit = fit_cox(T, E, Z[:, None], penalty="none")
    assert fit["coef"][0] == pytest.approx(0.69231, abs=5e-6)
    assert np.sqrt(fit["cov"][0, 0]) == pytest.approx(0.49379, abs=5e-6)
    assert fit["loglik"] == pytest.approx(-12.004986, abs=5e-7)
    assert concordance(T, E, Z) == pytest.approx(0.621951, abs=5e-7)
    assert fit_cox(TIED, E, Z[:, None], penalty="none")["coef"][0] == pytest.approx(0.61401, abs=5e-6)
    breslow = fit_cox(TIED, E, Z[:, None], penalty="none", ties="breslow")["coef"][0]
    assert breslow == pytest.approx(0.55059, abs=5e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(-50, 50), st.floats(0.01, 1000), st.integers(0, 1000))
def test_only_the_order_of_times_and_differences_of_columns_count(shift, factor, seed):
    t, e, X, s = rows(seed, n=40, k=2)
    one = fit_cox(t, e, X, strata=s, penalty="none")
    other = fit_cox(factor * t, e, X + shift, strata=s, penalty="none")
    order = np.random.default_rng(seed).permutation(len(t))
    shuffled = fit_cox(t[order], e[order], X[order], strata=s[order], penalty="none")
    np.testing.assert_allclose(other["coef"], one["coef"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shuffled["coef"], one["coef"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(shuffled["scores"], one["scores"][order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_statsmodels(ties):
    from statsmodels.duration.hazard_regression import PHReg

    t, e, X, s = rows(1)
    mine = fit_cox(t, e, X, strata=s, ties=ties, penalty="none")
    theirs = PHReg(t, X, status=e, strata=s, ties=ties).fit(method="newton", gtol=1e-12, maxiter=200)
    np.testing.assert_allclose(mine["coef"], theirs.params, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(mine["cov"])), theirs.bse, rtol=1e-6)
    assert mine["loglik"] == pytest.approx(theirs.llf, rel=1e-9)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_derivatives_and_residuals(ties):
    t, e, X, s = rows(2)
    sets = risk_sets(t, e, strata=s, ties=ties)
    own, beta = X[sets.order], np.array([0.3, -0.4, 0.2])
    at = evaluate(sets, own, beta)
    np.testing.assert_allclose(
        at.score, optimize.approx_fprime(beta, lambda b: evaluate(sets, own, b).loglik, 1e-7), rtol=1e-4, atol=1e-4
    )
    for a in range(3):
        step = np.eye(3)[a] * 1e-5
        slope = (evaluate(sets, own, beta - step).score - evaluate(sets, own, beta + step).score) / 2e-5
        np.testing.assert_allclose(at.info[a], slope, rtol=1e-6)
    fit = fit_cox(t, e, X, strata=s, ties=ties, penalty="none")
    np.testing.assert_allclose(fit["scores"].sum(axis=0), 0, atol=1e-9)
    for stratum in range(3):
        assert fit["martingale"][s == stratum].sum() == pytest.approx(0, abs=1e-12)
    assert fit["p_lr"] == pytest.approx(stats.chi2.sf(2 * (fit["loglik"] - fit["loglik_null"]), 3))


def test_robust_errors_of_rows_given_twice():
    t, e, X, _ = rows(3)
    once = fit_cox(t, e, X, ties="breslow", penalty="none", codes=np.arange(60))
    twice = fit_cox(
        np.r_[t, t], np.r_[e, e], np.r_[X, X], ties="breslow", penalty="none", codes=np.tile(np.arange(60), 2)
    )
    np.testing.assert_allclose(twice["coef"], once["coef"], rtol=1e-9)
    np.testing.assert_allclose(twice["cov"], once["cov"] / 2, rtol=1e-9)  # rows are not patients
    np.testing.assert_allclose(twice["cov_robust"], once["cov_robust"], rtol=1e-9)


def logrank(t, e, group):
    """Observed less expected events of a group, squared, over the hypergeometric variance."""
    gap, variance = 0.0, 0.0
    for at in np.unique(t[e == 1]):
        risk, d = t >= at, ((t == at) & (e == 1)).sum()
        n, n1 = risk.sum(), (risk & group).sum()
        gap += ((t == at) & (e == 1) & group).sum() - d * n1 / n
        variance += d * n1 / n * (1 - n1 / n) * (n - d) / max(n - 1, 1)
    return gap**2 / variance


def test_score_test_of_two_groups_is_the_logrank_test():
    t, e, X, _ = rows(4)
    t = t + np.random.default_rng(0).random(60) * 1e-3  # without ties the variances are the same
    assert fit_cox(t, e, (X[:, [0]] > 0).astype(float))["chi2_score"] == pytest.approx(logrank(t, e, X[:, 0] > 0))
    theirs = stats.logrank(
        *(stats.CensoredData.right_censored(t[part], e[part] == 0) for part in (X[:, 0] > 0, X[:, 0] <= 0))
    )
    assert fit_cox(t, e, (X[:, [0]] > 0).astype(float))["p_score"] == pytest.approx(theirs.pvalue)


def test_many_ordered_events_are_separated_and_a_strong_effect_is_not():
    """Close values keep the information up while the coefficient runs away; a linear programme decides."""
    x = np.exp(np.random.default_rng(2).normal(size=60))
    x[:30] = 0.0
    fit = fit_cox(1000.0 - x, np.ones(60, int), x[:, None])
    assert fit["note"] == "separated" and not 0 <= fit["coef"][0] * x.std() < 1
    assert np.isnan(fit["coef"][0]) or fit["cov"][0, 0] > 0
    x = np.exp(2 * np.random.default_rng(1).normal(size=500))
    t = np.maximum(np.random.default_rng(3).exponential(np.exp(-np.minimum(0.5 * x, 300))), 1e-300)
    fit = fit_cox(t, np.ones(500, int), x[:, None])
    assert fit["note"] == "" and np.ptp(x) * fit["coef"][0] > 50
    assert fit["coef"][0] == pytest.approx(0.5, abs=4 * np.sqrt(fit["cov"][0, 0]))


@pytest.mark.parametrize("seed", range(30))
def test_monotone_likelihood_by_all_pairs(seed):
    """Against the definition: a direction in which no event is below a row of its risk set, and one is above."""
    rng = np.random.default_rng(seed)
    n, k = rng.integers(4, 9), rng.integers(1, 4)
    X = rng.integers(0, 3, (n, k)).astype(float) if seed % 2 else rng.normal(size=(n, k))
    t, e, s = rng.integers(1, 6, n).astype(float), np.r_[1, rng.integers(0, 2, n - 1)], rng.integers(0, 2, n)
    pairs = [X[i] - X[j] for i in range(n) for j in range(n) if e[i] and t[j] >= t[i] and s[i] == s[j]]
    D = np.array(pairs)
    found = optimize.linprog(-D.sum(axis=0), A_ub=-D, b_ub=np.zeros(len(D)), bounds=(-1, 1))
    sets = risk_sets(t, e, strata=s)
    own = X[sets.order]
    assert monotone(sets, own, evaluate(sets, own, np.zeros(k)).score) == (-found.fun > 1e-7)


def test_separated_columns_never_give_the_runaway_number():
    t, e = np.arange(1.0, 13), (np.arange(12) < 6).astype(int)
    x = (np.arange(12) < 6).astype(float)[:, None]
    for penalty in ("none", "auto", "firth"):
        fit = fit_cox(t, e, x, penalty=penalty)
        assert fit["note"] == "separated" and fit["penalised"] and fit["converged"]
        assert 1 < fit["coef"][0] < 6
    sets = risk_sets(t, e)
    own, scale = standardised(sets, x)
    low, high = profile_interval(sets, own, fit["coef"] * scale, firth=True)
    assert 0 < low < fit["coef"][0] * scale[0] < high < 50
    assert fit_cox(t, e, x[::-1], penalty="none")["coef"][0] == pytest.approx(-fit["coef"][0])


def test_firth_is_the_maximum_of_the_penalised_likelihood():
    t, e, X, s = rows(5)
    sets = risk_sets(t, e, strata=s)
    own = X[sets.order]
    best = optimize.minimize(lambda b: -penalised(evaluate(sets, own, b)), np.zeros(3), options={"gtol": 1e-9})
    fit = fit_cox(t, e, X, strata=s, penalty="firth")
    np.testing.assert_allclose(fit["coef"], best.x, atol=1e-5)
    assert fit["loglik"] == pytest.approx(-best.fun, rel=1e-10)
    # the profile falls by half the quantile of chi2 at both ends
    plain = standardised(sets, X)[0]
    beta = maximise(sets, plain)[0]
    low, high = profile_interval(sets, plain, beta, firth=False)
    for end in (low, high):
        start = np.r_[beta[:2], end]
        there = maximise(sets, plain, start=start, fixed=1)[1].loglik
        assert evaluate(sets, plain, beta).loglik - there == pytest.approx(stats.chi2.ppf(0.95, 1) / 2, abs=1e-5)


def test_few_events_are_shrunk_and_say_so():
    fit, free = fit_cox(T, E, Z[:, None]), fit_cox(T, E, Z[:, None], penalty="none")
    assert fit["note"] == free["note"] == "few_events"
    assert fit["penalised"] and not free["penalised"] and 0 < fit["coef"][0] < free["coef"][0]


def test_no_events_and_collinear_columns_have_no_coefficient():
    none = fit_cox(T, 0 * E, Z[:, None])
    assert none["note"] == "no_events" and np.isnan(none["coef"]).all() and none["n_events"] == 0
    assert fit_cox(T, E, np.column_stack([Z, 2 * Z]))["note"] == "singular"
    assert np.isnan(concordance(T, 0 * E, Z))


@pytest.mark.parametrize(
    ("time", "event"), [([0.0, 1], [1, 1]), ([1, np.nan], [1, 1]), ([1, np.inf], [1, 1]), ([1, 2], [1, 2])]
)
def test_times_and_events_that_are_none(time, event):
    with pytest.raises(InputError, match=r"above 0|must be 1"):
        fit_cox(np.array(time), np.array(event), np.ones((2, 1)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_concordance_counts_pairs(seed, n):
    rng = np.random.default_rng(seed)
    t, e, s = rng.integers(1, 10, n), rng.integers(0, 2, n), rng.integers(0, 5, n)
    known = (e[:, None] == 1) & ((t[:, None] < t) | ((t[:, None] == t) & (e == 0)))
    right = (s[:, None] > s) + 0.5 * (s[:, None] == s)
    if known.any():
        assert concordance(t, e, s) == pytest.approx((known * right).sum() / known.sum())
        assert concordance(t, e, s) == pytest.approx(1 - concordance(t, e, -s))


def test_unos_c_without_censoring_is_harrells_and_with_it_less_biased():
    rng = np.random.default_rng(0)
    risk = rng.normal(size=4000)
    t = rng.exponential(size=4000) * np.exp(-risk)
    truth = concordance(t, np.ones(4000), risk)
    assert uno_c(t, np.ones(4000), risk) == pytest.approx(truth)
    c = rng.exponential(size=4000) * 0.5
    seen, event = np.minimum(t, c), (t <= c).astype(int)
    tau = np.quantile(seen, 0.95)
    early = np.where(t <= tau, t, tau + 1)  # C of events before tau
    target = concordance(early, (t <= tau).astype(int), risk)
    assert abs(uno_c(seen, event, risk, tau=tau) - target) < abs(concordance(seen, event, risk) - target)


def test_proportional_hazards_hold_or_not():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 2))
    t = rng.exponential(size=500) * np.exp(-0.7 * x[:, 0])
    assert (schoenfeld(t, np.ones(500), x)["p"] > 0.01).all()
    crossing = np.where(x[:, 0] > 0, rng.exponential(size=500), 0.9 + 0.1 * rng.random(500))
    found = schoenfeld(crossing, np.ones(500), x)["p"]
    assert found[0] < 1e-6 and found["global"] < 1e-6 and found[1] > 1e-3


def test_survival_tables():
    km = kaplan_meier(T, E)
    assert km["survival"].iloc[0] == 1 and km["time"].iloc[0] == 0
    np.testing.assert_allclose(km["survival"].iloc[1:4], [0.9, 0.8, 0.7])
    assert km["se"].iloc[1] == pytest.approx(np.sqrt(0.9 * 0.1 / 10))
    rng = np.random.default_rng(0)
    t, cause = rng.integers(1, 20, 80), rng.integers(0, 3, 80)
    incidence = aalen_johansen(t, cause)
    total = (
        incidence[incidence["cause"] == 1]["incidence"].to_numpy()
        + incidence[incidence["cause"] == 2]["incidence"].to_numpy()
    )
    np.testing.assert_allclose(1 - total, kaplan_meier(t, cause > 0)["survival"])
    alone = aalen_johansen(t, (cause == 1).astype(int))
    np.testing.assert_allclose(1 - alone["incidence"], kaplan_meier(t, cause == 1)["survival"])
    np.testing.assert_allclose(alone["se"][:-1], kaplan_meier(t, cause == 1)["se"][:-1], rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ screen


def columns(rng, n, m, share=0.3):
    X = rng.normal(size=(n, m)) * (rng.random((n, m)) < share)
    X[:, 0] = 0.0
    X[:, 1] = 1.0
    X[:, 2] = rng.exponential(size=n) + 1
    return X


@pytest.mark.parametrize("with_strata", [False, True])
@pytest.mark.parametrize("with_covariates", [False, True])
def test_screen_is_the_score_test_of_the_full_model_sparse_dense_and_without_numba(
    with_strata, with_covariates, monkeypatch
):
    rng = np.random.default_rng(3)
    t, e, C, s = rows(6, n=80, k=2)
    s, C = s if with_strata else None, C if with_covariates else None
    X = columns(rng, 80, 12)
    sets, Zc = risk_sets(t, e, strata=s), cox_screen.within(C, s, 80)
    U, info, _, skew = cox_screen.score_and_information(sets, sp.csc_matrix(X), Zc)
    dense = cox_screen.score_and_information(sets, as_columns(X), Zc)
    np.testing.assert_allclose(dense[0][2:], U[2:], atol=1e-11)
    np.testing.assert_allclose(dense[1][2:], info[2:], rtol=1e-10)
    np.testing.assert_allclose(dense[3][2:], skew[2:], rtol=1e-8)
    monkeypatch.setattr(cox_screen, "_kernel", lambda: cox_screen.powers_of_means)
    twin = cox_screen.score_and_information(sets, sp.csc_matrix(X), Zc)
    np.testing.assert_allclose(twin[1], info, rtol=1e-11)
    np.testing.assert_allclose(twin[3], skew, rtol=1e-10)
    beta = maximise(sets, Zc[sets.order])[0]
    k = Zc.shape[1]
    for j in (2, 7):
        at = evaluate(sets, np.column_stack([Zc, X[:, j]])[sets.order], np.r_[beta, 0.0])
        given_z = at.info[k, :k] @ np.linalg.solve(at.info[:k, :k], at.info[:k, k]) if k else 0.0
        assert U[j] == pytest.approx(at.score[k], abs=1e-10)
        assert info[j] == pytest.approx(at.info[k, k] - given_z, rel=1e-10)
    assert info[0] == info[1] == 0  # dead, constant


def test_third_moment_of_the_score_is_that_of_every_set_at_risk():
    rng = np.random.default_rng(8)
    t, e, x = (
        rng.permutation(np.arange(1.0, 41)),
        rng.integers(0, 2, 40),
        rng.exponential(size=40) * (rng.random(40) < 0.5),
    )
    found = cox_screen.score_and_information(risk_sets(t, e), sp.csc_matrix(x[:, None]), np.empty((40, 0)))
    at_risk = [x[t >= at] for at in t[e == 1]]
    variance = sum(part.var() for part in at_risk)
    third = sum(((part - part.mean()) ** 3).mean() for part in at_risk)
    assert found[1][0] == pytest.approx(variance)
    assert found[3][0] == pytest.approx(third / variance**1.5)


def table(X, obs):
    return anndata.AnnData(sp.csr_matrix(X), obs=pd.DataFrame(obs, index=[str(i) for i in range(len(X))]))


def patients(seed=0, *, n=60, m=20, each=3, effect=1.0):
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n), each)
    X = rng.exponential(size=(n * each, m)) * (rng.random((n * each, m)) < 0.4)
    X[:, 0] += 2 * (rng.random(n) < 0.5)[g]
    level = np.bincount(g, weights=X[:, 0]) / each
    t = rng.exponential(size=n) * np.exp(-effect * level)
    c = rng.exponential(size=n) * np.median(t) * 3
    return table(X, {
        "patient": g.astype(str), "time": np.minimum(t, c)[g], "died": (t <= c)[g],
        "site": np.array(["a", "b"])[g % 2], "age": rng.normal(size=n)[g],
    })  # fmt: skip


def test_hazard_ratio_of_a_planted_latent():
    adata = patients(effect=1.0)
    found = associate(adata, "time", method="cox", event="died", unit="patient", n_fits=5)
    best = found.sort_values("p").iloc[0]
    assert best["latent"] == "0" and best["q"] < 0.01 and best["effect"] == "hazard_ratio"
    pooled = np.asarray(adata.X.todense()).reshape(60, 3, -1).mean(axis=1)[:, 0]
    order = adata.obs.iloc[::3]
    fit = fit_cox(
        order["time"].to_numpy(), order["died"].to_numpy(int), ((pooled - pooled.mean()) / pooled.std(ddof=1))[:, None]
    )
    assert best["estimate"] == pytest.approx(np.exp(fit["coef"][0]), rel=1e-5)
    assert best["ci_low"] < np.exp(1.0 * pooled.std(ddof=1)) < best["ci_high"]
    assert best["fit"] == "full" and (found["fit"] == "one step").sum() == 15
    assert (found["n_events"] == order["died"].sum()).all()
    assert (found["ci_low"] < found["estimate"]).all()


@pytest.mark.parametrize("options", [{"covariates": ["age"]}, {"strata": "site"}])
def test_adjusted_and_stratified_screens(options):
    found = associate(patients(), "time", method="cox", event="died", unit="patient", **options)
    assert found.sort_values("p")["latent"].iloc[0] == "0" and found["p"].min() < 0.001
    assert "strata" not in options or (found["n_strata"] == 2).all()


def test_repeated_rows_do_not_multiply_patients():
    adata = patients()
    by_patient = associate(adata, "time", method="cox", event="died", unit="patient").set_index("latent")
    by_sample = associate(adata, "time", method="cox", event="died", unit="sample").set_index("latent")
    again = np.repeat(np.arange(0, 180, 3), 3)
    copies = table(adata.X.toarray()[again], adata.obs.iloc[again].to_dict("list"))
    single = adata[np.arange(0, 180, 3)].copy()
    alone = associate(single, "time", method="cox", event="died", unit="sample").set_index("latent")
    thrice = associate(copies, "time", method="cox", event="died", unit="sample").set_index("latent")
    assert by_sample["p"].min() > by_patient["p"].min() / 10
    tested = alone["p"].notna() & thrice["p"].notna()
    assert (thrice["p"][tested] > alone["p"][tested] / 3).all()
    width = np.log(thrice["ci_high"] / thrice["ci_low"]) / np.log(alone["ci_high"] / alone["ci_low"])
    assert (width[tested] > 0.7).all()


def test_max_t_is_that_of_permuted_residuals():
    found = associate(patients(), "time", method="cox", event="died", unit="patient", n_permutations=199)
    assert found.set_index("latent")["p_maxt"]["0"] <= 0.02 and (found["p_maxt"] >= found["p"]).all()


def test_a_latent_that_tells_events_apart_is_separated():
    n = 40
    rng = np.random.default_rng(0)
    X = rng.exponential(size=(n, 5)) * (rng.random((n, 5)) < 0.6)
    e = np.arange(n) < 12
    X[:, 0] = np.where(e, 2.0, 0.0)
    adata = table(X, {"patient": np.arange(n).astype(str), "time": np.arange(1.0, n + 1), "died": e.astype(int)})
    found = associate(adata, "time", method="cox", event="died", unit="patient").set_index("latent")
    assert found["fit"]["0"] == "separated" and 1 < found["ci_low"]["0"] < found["estimate"]["0"] < 100


def test_what_a_cohort_must_have():
    adata = patients()
    with pytest.raises(InputError, match="needs event="):
        associate(adata, "time", method="cox", unit="patient")
    words = adata.copy()
    words.obs["died"] = "yes"
    with pytest.raises(InputError, match="must be 1"):
        associate(words, "time", method="cox", event="died", unit="patient")
    late = adata.copy()
    late.obs["time"] = late.obs["time"] - late.obs["time"].max() / 2
    with pytest.raises(InputError, match="not above 0"):
        associate(late, "time", method="cox", event="died", unit="patient")
    several = adata.copy()
    several.obs["time"] = several.obs["time"] + np.arange(180)
    with pytest.raises(StatisticsError, match="one time and one end"):
        associate(several, "time", method="cox", event="died", unit="patient")
    alive = adata.copy()
    alive.obs["died"] = 0
    found = associate(alive, "time", method="cox", event="died", unit="patient")
    assert (found["status"] == "one_class").all() and found["p"].isna().all()


def test_two_events_are_too_few_to_test():
    adata = patients()
    adata.obs["died"] = (np.arange(180) < 6).astype(int)
    found = associate(adata, "time", method="cox", event="died", unit="patient", controls=False)
    assert found["p"].isna().all() and (found["status"] == "too_sparse").all() and found["estimate"].notna().all()


def null_cohort(rng, n, *, censored, active, design, m=200):
    """No latent acts on the hazard; times have ties, latents are zero-inflated and skewed."""
    x = rng.lognormal(size=(n, m)) * (rng.random((n, m)) < active)
    age = rng.normal(size=n)
    t = rng.exponential(size=n) * np.exp(-0.7 * age)
    event = rng.permutation(n) < round(n * (1 - censored))
    t = np.ceil(np.where(event, t, t * rng.random(n)) * 10 + 1e-9)
    if design == "rows":
        g = np.repeat(np.arange(n), rng.integers(1, 6, n))
        x = (0.3 * x[g] + 0.7 * rng.lognormal(size=(len(g), m))) * (rng.random((len(g), m)) < active)
    else:
        g = np.arange(n)
    return table(
        x, {"patient": g.astype(str), "time": t[g], "died": event[g], "age": age[g], "site": np.where(g % 2, "a", "b")}
    )


@pytest.mark.slow
@pytest.mark.parametrize("design", ["plain", "covariates", "strata", "rows"])
@pytest.mark.parametrize("n", [20, 60])
def test_null_latents_are_not_rejected_more_often_than_said(n, design):
    options = {"covariates": {"covariates": ["age"]}, "strata": {"strata": "site"}}.get(design, {})
    unit = "sample" if design == "rows" else "patient"
    for censored in (0.3, 0.8, 0.85 if n == 20 else 0.95):  # 3 events at the least
        for active in (0.15, 0.4):
            rng, rates = np.random.default_rng(1), []
            for _ in range(20):
                adata = null_cohort(rng, n, censored=censored, active=active, design=design)
                p = associate(
                    adata, "time", method="cox", event="died", unit=unit, n_fits=0, controls=False, min_active=3,
                    **options,
                )["p"].dropna()  # fmt: skip
                if len(p):
                    rates.append((p <= 0.05).mean())
            error = np.std(rates) / np.sqrt(len(rates))  # latents of a cohort share its times
            assert np.mean(rates) <= 0.05 + 2.5 * error + 0.002, (n, design, censored, active, np.mean(rates))


def test_proportional_hazards_cannot_be_tested_at_a_single_time():
    x = np.array([0.3, 1.0, -0.4, 0.2, -1.1, 0.6])[:, None]
    found = schoenfeld(np.array([2.0, 2.0, 2.0, 3.0, 4.0, 5.0]), np.array([1, 1, 0, 0, 0, 0]), x)
    assert found["p"].isna().all()
