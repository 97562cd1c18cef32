"""Ordered classes: the fit against statsmodels and closed forms, the screen as a score test, error rates."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import optimize, special, stats

from biosae.errors import InputError
from biosae.stats import associate
from biosae.stats.ordinal import fit_ordinal, proportional_odds
from biosae.stats.ranking import strength


def simulated(n=300, *, seed=5, cuts=(-1.0, 0.5, 1.5, 3.0), slope=0.8):
    rng = np.random.default_rng(seed)
    a, x = rng.normal(size=n), np.where(rng.random(n) < 0.3, rng.exponential(size=n), 0.0)
    return np.digitize(0.7 * a + slope * x + rng.logistic(size=n), cuts), np.column_stack([a, x])


def _loglik(y, X, thresholds, beta):
    edge = special.expit(np.r_[-np.inf, thresholds, np.inf][:, None] - X @ beta)
    return np.log(edge[y + 1, np.arange(len(y))] - edge[y, np.arange(len(y))]).sum()


@pytest.mark.parametrize("seed", [0, 5])
def test_fit_is_that_of_statsmodels_and_at_the_maximum(seed):
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    y, X = simulated(seed=seed)
    found = fit_ordinal(y, X)
    other = OrderedModel(y, X, distr="logit").fit(method="bfgs", disp=0, gtol=1e-9, maxiter=500)
    np.testing.assert_allclose(found["coef"], other.params[:2], atol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(found["cov"])), other.bse[:2], rtol=1e-5)
    assert found["loglik"] == pytest.approx(other.llf, abs=1e-8)
    assert found["loglik"] == pytest.approx(_loglik(y, X, found["thresholds"], found["coef"]), abs=1e-9)
    p = np.r_[found["thresholds"], found["coef"]]
    slope = optimize.approx_fprime(p, lambda p: _loglik(y, X, p[:4], p[4:]), 1e-7)
    assert np.abs(slope).max() < 1e-3
    np.testing.assert_allclose(found["scores"].sum(axis=0), 0.0, atol=1e-8)


def test_two_classes_are_logistic_regression_and_reversed_classes_turn_the_sign():
    import statsmodels.api as sm

    y, X = simulated()
    two = (y > 1).astype(float)
    found, logit = fit_ordinal(two, X), sm.Logit(two, sm.add_constant(X)).fit(disp=0, tol=1e-14)
    np.testing.assert_allclose(found["coef"], logit.params[1:], atol=1e-8)
    np.testing.assert_allclose(np.sqrt(np.diag(found["cov"])), logit.bse[1:], rtol=1e-8)
    up, down = fit_ordinal(y, X), fit_ordinal(-y, X)
    np.testing.assert_allclose(up["coef"], -down["coef"], atol=1e-9)
    np.testing.assert_allclose(up["thresholds"], -down["thresholds"][::-1], atol=1e-9)
    assert fit_ordinal(y, X * [1e6, 1e-4])["coef"] * [1e6, 1e-4] == pytest.approx(up["coef"], abs=1e-9)


def test_sandwich_of_the_scores_is_that_of_all_parameters():
    y, X = simulated()
    found = fit_ordinal(y, X)
    k = 4

    def rows(p):
        edge = special.expit(np.r_[-np.inf, p[:k], np.inf][:, None] - X @ p[k:])
        return np.log(edge[y + 1, np.arange(len(y))] - edge[y, np.arange(len(y))])

    p, h = np.r_[found["thresholds"], found["coef"]], 1e-4
    E = np.eye(len(p)) * h
    S = np.column_stack([(rows(p + d) - rows(p - d)) / (2 * h) for d in E])
    H = np.array(
        [[(rows(p + a + b) - rows(p + a - b) - rows(p - a + b) + rows(p - a - b)).sum() for a in E] for b in E]
    )
    inverse = np.linalg.inv(-H / (4 * h * h))
    full = inverse @ S.T @ S @ inverse
    mine = found["bread"] @ found["scores"].T @ found["scores"] @ found["bread"]
    np.testing.assert_allclose(mine, full[k:, k:], rtol=1e-4)


def test_classes_that_a_column_orders_without_fault_get_a_bound():
    y, X = simulated()
    rare = np.where(y == 4, np.random.default_rng(0).random(len(y)), 0.0)
    for x in (np.column_stack([X[:, 0], rare]), y[:, None] + 0.0):
        found = fit_ordinal(y, x)
        assert found["note"] == "separated" and found["converged"]
        assert 0 < found["coef"][-1] * x[:, -1].std() < 30 and np.isfinite(found["cov"]).all()
        assert np.isnan(found["p_proportional"])
    assert fit_ordinal(y, X)["note"] == ""
    assert fit_ordinal(np.ones(len(y)), X)["note"] == "one_class"
    with pytest.raises(InputError, match="constant"):
        fit_ordinal(y, np.column_stack([np.ones(len(y)), X]))


def test_proportional_odds_check_is_near_the_likelihood_ratio_and_finds_what_is_not_proportional():
    y, X = simulated(2000, cuts=(-1.0, 0.5, 2.0))
    found = fit_ordinal(y, X)

    def free(p):  # a coefficient of the latent at every threshold
        edge = np.column_stack([p[k] - p[3] * X[:, 0] - p[4 + k] * X[:, 1] for k in range(3)])
        F = np.column_stack([np.zeros(len(y)), special.expit(edge), np.ones(len(y))])
        P = F[np.arange(len(y)), y + 1] - F[np.arange(len(y)), y]
        return 1e9 if (P <= 0).any() else -np.log(P).sum()

    start = np.r_[found["thresholds"], found["coef"][0], np.full(3, found["coef"][1])]
    best = optimize.minimize(free, start, method="BFGS")
    p = stats.chi2.sf(2 * (-best.fun - found["loglik"]), 2)
    assert found["p_proportional"] == pytest.approx(p, rel=0.15, abs=0.01)
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    split = np.where(
        rng.random(2000) < special.expit(2 * x), 1 + (rng.random(2000) < 0.5), 0
    )  # moves one threshold only
    wrong = fit_ordinal(split, np.column_stack([rng.normal(size=2000), x]))
    assert wrong["p_proportional"] < 1e-6 and wrong["p_proportional_all"] < 1e-6
    assert proportional_odds(split, np.column_stack([rng.normal(size=2000), x]), wrong, columns=[0]) > 1e-4


# ---- the screen


def cohort(n=240, m=20, *, per=1, seed=0, effect=0.0):
    rng = np.random.default_rng(seed)
    Z = np.where(rng.random((n, m)) < 0.3, rng.exponential(size=(n, m)), 0.0)
    age = rng.normal(60, 10, n)
    grade = np.digitize(0.04 * (age - 60) + effect * Z[:, 0] + rng.logistic(size=n), [-1, 0.3, 1.5])
    names = np.array(["benign", "low", "high", "anaplastic"])
    obs = pd.DataFrame(
        {
            "patient": (np.arange(n) // per).astype(str), "age": age, "grade": grade,
            "stage": pd.Categorical(names[grade], categories=names, ordered=True), "label": names[grade],
            "site": np.where(rng.random(n) < 0.5, "north", "south"),
        },
        index=[f"s{i}" for i in range(n)],
    )  # fmt: skip
    return anndata.AnnData(sp.csr_matrix(Z), obs=obs)


def test_grades_and_ordered_categories_are_the_same_test_and_others_are_refused():
    adata = cohort(effect=0.9)
    options = {"unit": "sample", "method": "ordinal", "controls": False}
    stage, grade = (associate(adata, t, **options) for t in ("stage", "grade"))
    for name in ("estimate", "ci_low", "ci_high", "p"):
        np.testing.assert_allclose(stage[name], grade[name], rtol=1e-9)
    assert (stage["contrast"] == "anaplastic over benign").all() and (stage["effect"] == "cumulative_odds_ratio").all()
    first = stage.loc[stage["p"].idxmin()]
    assert first["latent"] == "0" and first["fit"] == "full" and first["ci_low"] > 1
    assert strength(stage)[0] == pytest.approx(np.log(stage["estimate"][0]))
    for target in ("label", "age"):
        with pytest.raises(InputError, match="ordinal"):
            associate(adata, target, **options)


def test_full_fits_are_the_fits():
    adata = cohort(effect=0.6)
    table = associate(adata, "stage", unit="sample", method="ordinal", covariates=["age"], controls=False, n_fits=4)
    assert table["fit"].value_counts().to_dict() == {"one step": 16, "full": 4}
    y, age = adata.obs["grade"].to_numpy(), adata.obs["age"].to_numpy()
    for _, row in table[table["fit"] == "full"].iterrows():
        x = adata.X[:, [int(row["latent"])]].toarray().ravel()
        fit = fit_ordinal(y, np.column_stack([age, x]))
        assert np.log(row["estimate"]) == pytest.approx(fit["coef"][1] * x.std(ddof=1), abs=1e-8)


def test_without_covariates_the_score_is_the_correlation_with_mid_ranks():
    adata = cohort()
    table = associate(adata, "grade", unit="sample", method="ordinal", controls=False)
    ridit = stats.rankdata(adata.obs["grade"])
    r = np.array([stats.pearsonr(x, ridit)[0] for x in adata.X.toarray().T])
    n = len(ridit)
    np.testing.assert_allclose(table["statistic"], r * np.sqrt((n - 2) / (1 - r**2)), rtol=1e-8)


def test_a_latent_of_two_values_gives_the_wilcoxon_test():
    adata = cohort()
    adata.X = (adata.X > 0).astype(float).tocsr()
    table = associate(adata, "grade", unit="sample", method="ordinal", controls=False)
    n, y = adata.n_obs, adata.obs["grade"].to_numpy()
    for j in range(5):
        fires = adata.X[:, [j]].toarray().ravel() > 0
        H = stats.kruskal(y[fires], y[~fires])[0]
        t2 = table["statistic"][j] ** 2
        assert (n - 1) * t2 / (n - 2 + t2) == pytest.approx(H, rel=1e-8)


def test_adjusted_score_has_the_efficient_variance():
    """U and its variance with all nuisance parameters, from the multinomial information written out."""
    adata = cohort()
    table = associate(adata, "grade", unit="sample", method="ordinal", covariates=["age"], controls=False, n_fits=0)
    y, age = adata.obs["grade"].to_numpy(), adata.obs["age"].to_numpy() - 60
    null = fit_ordinal(y, age[:, None])
    n, K, X = len(y), 4, adata.X.toarray()
    edge = np.r_[-np.inf, null["thresholds"], np.inf]

    def scores(k):
        """Of every row, were its class k: thresholds, age, linear predictor."""
        a, b = edge[k + 1] - age * null["coef"][0], edge[k] - age * null["coef"][0]
        f = [special.expit(v) * special.expit(-v) for v in (a, b)]
        P = special.expit(a) - special.expit(b)
        t = np.zeros((n, K - 1))
        if k < K - 1:
            t[:, k] += f[0] / P
        if k > 0:
            t[:, k - 1] -= f[1] / P
        r = (f[1] - f[0]) / P
        return P, np.column_stack([t, age * r]), r

    U, own, cross, B = 0.0, 0.0, 0.0, 0.0
    for k in range(K):
        P, s, r = scores(k)
        U = U + (X * (r * (y == k))[:, None]).sum(axis=0)
        own = own + ((P * r**2)[:, None] * X**2).sum(axis=0)
        cross = cross + s.T @ ((P * r)[:, None] * X)
        B = B + s.T @ (P[:, None] * s)
    variance = own - (cross * np.linalg.solve(B, cross)).sum(axis=0)
    sd = X.std(axis=0, ddof=1)
    np.testing.assert_allclose(np.log(table["estimate"]), U / variance * sd, rtol=1e-6)
    z = U / np.sqrt(variance)
    np.testing.assert_allclose(table["statistic"], z, rtol=0.05, atol=0.02)


def test_patients_with_grades_that_differ_within_them_are_refused_or_counted_by_samples():
    adata = cohort(240, per=4, effect=0.8)
    with pytest.raises(InputError, match="several values"):
        associate(adata, "stage", unit="patient", method="ordinal", controls=False)
    table = associate(adata, "stage", unit="sample", method="ordinal", controls=False)
    assert "60 groups" in table["inference"][0] and table["latent"][table["p"].idxmin()] == "0"


@pytest.mark.slow
@pytest.mark.parametrize("inflation", [0.6, 0.9])
@pytest.mark.parametrize("G", [20, 60])
def test_screen_holds_its_level(G, inflation):
    rng = np.random.default_rng(1000 * G + int(100 * inflation))
    paths = {
        "samples": ("grade", {"unit": "sample"}),
        "samples, adjusted": ("grade", {"unit": "sample", "covariates": ["stain"]}),
        "patients": ("stage", {"unit": "patient"}),
        "patients, adjusted": ("stage", {"unit": "patient", "covariates": ["site"]}),
        "stages of patients, samples": ("stage", {"unit": "sample"}),
        "stages of patients, samples, adjusted": ("stage", {"unit": "sample", "covariates": ["stain"]}),
    }
    found: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(40):
        size = rng.integers(4, 21, G)
        g = np.repeat(np.arange(G), size)
        n = len(g)
        noise = np.sqrt(0.3) * rng.normal(size=(G, 32))[g] + np.sqrt(0.7) * rng.normal(size=(n, 32))
        x, cut = noise[:, 2:], stats.norm.ppf(inflation)
        obs = pd.DataFrame(
            {
                "patient": g.astype(str), "stain": noise[:, 0],
                "site": np.where(rng.permutation(np.arange(G) % 2)[g], "north", "south"),
                "grade": np.digitize(noise[:, 1], [-0.5, 0.7, 1.6]),
                "stage": np.digitize(rng.normal(size=G), [-0.3, 0.6, 1.3])[g],
            },
            index=[f"t{i}" for i in range(n)],
        )  # fmt: skip
        adata = anndata.AnnData(sp.csr_matrix(np.where(x > cut, np.exp(x) - np.exp(cut), 0)), obs=obs)
        for name, (target, options) in paths.items():
            p = associate(adata, target, method="ordinal", controls=False, n_fits=0, **options)["p"].dropna()
            if len(p):
                found[name].append(float((p <= 0.05).mean()))
    for name, rates in found.items():
        error = np.std(rates, ddof=1) / np.sqrt(len(rates))
        assert np.mean(rates) <= 0.05 + 3 * max(error, 1e-3), (name, np.mean(rates), error)
