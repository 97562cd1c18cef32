"""Every statistic against the numbers that R gave for the same data (``tests/reference/stats``, README there).

Tolerance is 1e-8, relative, unless a test says why not.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

import biosae as bs
from biosae.stats import (
    adjust,
    cox,
    cox_screen,
    effects,
    glmm,
    kendall,
    loglinear,
    meta,
    mixed,
    ordinal,
    posthoc,
    regression,
    robust,
    survival,
    tables,
    zeros,
)
from biosae.stats.correlation import as_columns
from biosae.stats.permutation import max_t
from biosae.stats.power import _detectable_epsilon, detectable, sample_size

FOLDER = Path(__file__).parent / "reference" / "stats"
LATENTS = ["z_sparse", "z_tied", "z_signed", "z_rare", "z_dense", "z_halves"]


def _numbers(value: Any) -> Any:
    """JSON as R wrote it, with infinities as numbers."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return {"Inf": np.inf, "-Inf": -np.inf, "NA": np.nan, "NaN": np.nan}.get(value, value) if value else value


R = _numbers(json.loads((FOLDER / "reference.json").read_text()))


@lru_cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv")


@lru_cache
def samples(name: str) -> ad.AnnData:
    """A data set as ``associate`` takes it: codes in X, everything else in obs."""
    frame = table(name)
    z = [c for c in frame if c.startswith("z_")]
    obs = frame.drop(columns=z)
    obs.index = obs["id"] if "id" in obs else [f"u{i:03d}" for i in range(len(obs))]
    return ad.AnnData(
        sp.csr_matrix(frame[z].to_numpy()), obs=obs.drop(columns="id", errors="ignore"), var=pd.DataFrame(index=z)
    )


@lru_cache
def screen(name: str, target: str, **options: Any) -> pd.DataFrame:
    options.setdefault("controls", False)
    if name != "cohort":
        options["assume_independent"] = True
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    unit = options.pop("unit", "sample")
    found = bs.stats.associate(samples(name), target, unit=unit, **options)
    return found.set_index("latent")


def close(ours: Any, theirs: Any, *, rtol: float = 1e-8, atol: float = 1e-11) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=rtol, atol=atol)


def t_pvalue(t: float, df: float) -> float:
    return 2 * stats.t.sf(abs(t), df)


def test_reference_names_its_versions_and_no_machine() -> None:
    text = (FOLDER / "reference.json").read_text()
    assert R["versions"]["R"].startswith("4.") and len(R["versions"]) == 14
    assert "/" not in text


# ---- correlation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", LATENTS)
def test_pearson(latent: str) -> None:
    row, r = screen("patients", "score", method="pearson").loc[latent], R["correlation"][latent]
    close(row["estimate"], r["pearson"])
    close(row["statistic"], r["pearson_t"])
    close([row["ci_low"], row["ci_high"]], r["pearson_ci"])
    close(t_pvalue(row["statistic"], 118), r["pearson_p"])
    assert row["p"] >= r["pearson_p"] * (1 - 1e-8)  # never smaller: corrected for skewness


@pytest.mark.parametrize("latent", LATENTS)
def test_spearman(latent: str) -> None:
    """Targets without ties have symmetric ranks: no correction for skewness, and the p is R's."""
    row, r = screen("patients", "score", method="spearman").loc[latent], R["correlation"][latent]
    close(row["estimate"], r["spearman"])
    close(row["p"], r["spearman_p"])


def test_correlation_of_the_worked_example() -> None:
    d, r = table("d1"), R["correlation_d1"]
    X = sp.csr_matrix(d[["x"]].to_numpy())
    close(bs.stats.correlate(X, d["y"].to_numpy(), method="pearson")[0], r["pearson"])
    close(bs.stats.correlate(X, d["y"].to_numpy(), method="spearman")[0], r["spearman"])
    close(r["pearson"], 0.8727860, rtol=1e-7)
    close(r["spearman"], 0.8558443, rtol=1e-7)


@pytest.mark.parametrize("latent", LATENTS)
def test_kendall(latent: str) -> None:
    """Normal, ties corrected, no continuity; ``score`` has no ties, so there is no skewness and the p is R's."""
    X, r = samples("patients").X, R["correlation"][latent]
    found = kendall.kendall_tau(X[:, [LATENTS.index(latent)]], table("patients")["score"].to_numpy())
    close([found["tau"][0], found["statistic"][0], found["p"][0]], [r["kendall"], r["kendall_z"], r["kendall_p"]])
    row = screen("patients", "score", method="kendall").loc[latent]
    close([row["estimate"], row["statistic"], row["p"]], [r["kendall"], r["kendall_z"], r["kendall_p"]])


@pytest.mark.parametrize("latent", [f"z_{i}" for i in range(4)])
def test_kendall_without_ties(latent: str) -> None:
    d, r = table("few"), R["correlation_exact"][latent]
    found = kendall.kendall_columns(as_columns(d[[latent]].to_numpy()), d["value"].to_numpy())
    close(found["tau"][0], r["kendall"])
    close(kendall.exact_pvalue(found["S"], len(d))[0], r["kendall_p"])
    close(bs.stats.correlate(d[[latent]].to_numpy(), d["value"].to_numpy())[0], r["spearman"])


def test_kendall_of_the_worked_example() -> None:
    d, r = table("d1"), R["correlation_d1"]
    close(kendall.kendall_tau(d[["x"]].to_numpy(), d["y"].to_numpy())["tau"][0], r["kendall"])
    close(r["kendall"], 0.7396003, rtol=1e-7)


# ---- two groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", LATENTS)
def test_wilcoxon(latent: str) -> None:
    """The arms are of one size, so that there is no skewness and the p is R's (ties corrected, no continuity)."""
    row, r = screen("patients", "arm", method="wilcoxon").loc[latent], R["two_groups"][latent]
    close(row["estimate"], 2 * r["w"] / 3600 - 1)
    close(row["statistic"], r["wilcoxon_z"])
    close(row["p"], r["wilcoxon_p"])
    close(row["p"], r["coin_p"])


@pytest.mark.parametrize("latent", LATENTS)
def test_auroc_and_delong(latent: str) -> None:
    row, r = screen("patients", "arm", method="auroc").loc[latent], R["two_groups"][latent]
    close(row["estimate"], r["auc"])
    positive = (table("patients")["arm"] == "b").to_numpy()
    V = as_columns(samples("patients").X)
    variance = effects.delong_variance(V, positive)[LATENTS.index(latent)]
    close(variance, r["delong"])
    half = stats.norm.ppf(0.975) * np.sqrt(r["delong"])
    close([r["auc"] - half, r["auc"] + half], r["auc_ci"])  # pROC's is Wald's on the area, ours is on the logit
    logit = np.log(r["auc"] / (1 - r["auc"])) + np.array([-half, half]) / (r["auc"] * (1 - r["auc"]))
    close([row["ci_low"], row["ci_high"]], 1 / (1 + np.exp(-logit)))


def test_wilcoxon_and_delong_of_the_worked_example() -> None:
    d, r = table("d1"), R["two_groups_d1"]
    V, positive = as_columns(sp.csr_matrix(d[["x"]].to_numpy())), (d["y"] >= 2).to_numpy()
    close(effects.delong_variance(V, positive)[0], r["delong"])
    close([r["delong"], r["auc"], r["wilcoxon_p"]], [0.015625, 0.875, 0.0472209], rtol=1e-6)
    g, low, high = effects.hedges_g(*_moments(d["x"].to_numpy(), positive))
    close(g[0], r["hedges_g"])
    close([low[0], high[0]], r["hedges_ci"])


def _moments(x: np.ndarray, positive: np.ndarray) -> tuple:
    out = []
    for own in (x[positive], x[~positive]):
        out += [np.array([own.mean()]), np.array([((own - own.mean()) ** 2).sum()]), len(own)]
    return tuple(out)


@pytest.mark.parametrize("latent", LATENTS)
def test_stratified_wilcoxon(latent: str) -> None:
    """Strata weigh ``(n_s - 1) r_s``: not coin's default (sum of rank sums) nor van Elteren's ranks / (n_s + 1)."""
    row, r = screen("patients", "arm", method="wilcoxon", strata="site").loc[latent], R["stratified"][latent]["rank"]
    close(row["statistic"], r["z"])
    assert row["p"] >= r["p"] * (1 - 1e-8)


@pytest.mark.parametrize("latent", [f"z_{i}" for i in range(4)])
def test_exact_wilcoxon(latent: str) -> None:
    row, r = screen("few", "y", method="wilcoxon", min_active=1, min_active_groups=1).loc[latent], R["exact"][latent]
    close(row["p"], r["p"])
    close(row["p"], r["coin_p"])


def test_exact_wilcoxon_with_ties_is_the_permutation_of_ranks() -> None:
    row = screen("few", "y", method="wilcoxon", min_active=1, min_active_groups=1).loc["z_tied"]
    close(row["p"], R["exact_tied"]["coin_p"])


@pytest.mark.parametrize("latent", LATENTS)
def test_welch_and_hedges_g(latent: str) -> None:
    """R's noncentral t is accurate to about 1e-8 by its own warning, and so is the interval."""
    row, r = screen("patients", "arm", method="welch").loc[latent], R["two_groups"][latent]
    close(row["statistic"], r["welch_t"])
    close(row["estimate"], r["hedges_g"])
    close([row["ci_low"], row["ci_high"]], r["hedges_ci"])
    assert row["p"] >= r["welch_p"] * (1 - 1e-8)  # the larger of Welch's and Student's


@pytest.mark.parametrize("latent", [z for z in LATENTS if z != "z_dense"])
def test_fisher(latent: str) -> None:
    row, r = screen("patients", "arm", method="fisher").loc[latent], R["two_groups"][latent]
    close(row["p"], r["fisher_p"])
    close(row["estimate"], r["or"])
    close([row["ci_low"], row["ci_high"]], r["or_ci"])


@pytest.mark.parametrize("name", ["spec", "zero", "small", "wide"])
def test_exact_odds_ratio(name: str) -> None:
    """fisher.test stops at 1e-4 of the ratio or its inverse; ``fine`` and mid-p: the same equations to the end."""
    r = R["tables"][name]
    cells = [np.array([c]) for c in r["cells"]]
    ratio, low, high = (float(v[0]) for v in tables.odds_ratio_exact(*cells))
    close([ratio, low, high], [r["fine_or"], *r["fine_ci"]])
    ours, theirs = (np.array(v) for v in ([ratio, low, high], [r["conditional_or"], *r["exact_ci"]]))
    close(np.minimum(ours, 1 / ours), np.minimum(theirs, 1 / theirs), rtol=0, atol=2e-4)
    close([float(v[0]) for v in tables.odds_ratio_exact(*cells, mid_p=True)][1:], r["mid_ci"])
    a, b, c, d = r["cells"]
    close(effects.fisher_pvalue(np.array([a]), a + c, np.array([a + b]), a + b + c + d)[0], r["p"])


@pytest.mark.parametrize("pair", R["paired_delong"], ids=lambda r: f"{r['a']}-{r['b']}")
def test_paired_delong(pair: dict) -> None:
    found = posthoc.compare_auroc(
        samples("patients"), "arm", pair["a"], pair["b"], unit="sample", assume_independent=True
    )
    close(found[["auroc_a", "auroc_b"]], pair["auc"])
    close(found[["statistic", "p"]], [pair["z"], pair["p"]])


# ---- several groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", LATENTS)
def test_kruskal(latent: str) -> None:
    row, r = screen("patients", "site", method="kruskal").loc[latent], R["several_groups"][latent]
    close(row["statistic"], r["h"])
    close(row["statistic"], r["coin"])
    close(row["estimate"], r["rank_eta2"])
    close(stats.chi2.sf(row["statistic"], 2), r["p"])
    assert row["p"] >= r["p"] * (1 - 1e-8)


@pytest.mark.parametrize("latent", LATENTS)
def test_eta_and_omega_squared(latent: str) -> None:
    V, codes = as_columns(samples("patients").X), np.unique(table("patients")["site"], return_inverse=True)[1]
    j, r = LATENTS.index(latent), R["several_groups"][latent]
    close(effects.eta_squared(V, codes)[j], r["eta2"])
    close(effects.omega_squared(V, codes)[j], r["omega2"])


@pytest.mark.parametrize("latent", LATENTS)
def test_dunn(latent: str) -> None:
    found = posthoc.dunn(samples("patients"), "site", latents=[latent], unit="sample", assume_independent=True)
    r = R["dunn"][latent]
    assert list(found["class_a"]) == r["first"] and list(found["class_b"]) == r["second"]
    close(-found["statistic"], r["z"])
    assert (found["p"] >= np.array(r["p"]) * (1 - 1e-8)).all()  # corrected for skewness


def test_eta_and_omega_squared_of_the_worked_example() -> None:
    d, r = table("d3"), R["several_groups_d3"]
    V, codes = as_columns(d[["value"]].to_numpy(float)), np.unique(d["group"], return_inverse=True)[1]
    close(effects.eta_squared(V, codes)[0], r["eta2"])
    close(effects.omega_squared(V, codes)[0], r["omega2"])
    close([r["eta2"], r["omega2"], r["f"], r["f_p"]], [0.678571, 0.542373, 6.3333, 0.033209], rtol=2e-5)


# ---- max-T -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["values", "ranks"])
@pytest.mark.parametrize("step_down", [False, True])
def test_max_t_of_every_arrangement(scores: str, step_down: bool) -> None:
    """3,003 arrangements of 6 of 14 units, listed by R's combn and by ours: the same fractions."""
    r = R["max_t"]
    X = table("few")[r["columns"]].to_numpy()
    X = stats.rankdata(X, axis=0) if scores == "ranks" else X
    found = max_t(X, table("few")["y"].to_numpy(), step_down=step_down)
    close(found, r[scores]["step_down" if step_down else "single_step"])


def test_max_t_against_coin() -> None:
    """Rank sums of six columns. Both sides are resampled, so they agree to Monte-Carlo error: four of its sd."""
    r, y = R["max_t_coin"], (table("patients")["arm"] == "b").to_numpy()
    ranks = stats.rankdata(samples("patients").X.toarray(), axis=0)
    screened = screen("patients", "arm", method="wilcoxon", n_permutations=9999)["p_maxt"].to_numpy()
    error = {}
    for step_down in (False, True):
        kind = "step_down" if step_down else "single_step"
        p = np.array([r[kind][z] for z in LATENTS])
        error[kind] = 4 * np.sqrt(p * (1 - p) * (1 / 9999 + 1 / r["draws"])) + 1e-4
        assert (np.abs(max_t(ranks, y, n_permutations=9999, step_down=step_down) - p) < error[kind]).all(), kind
    low, high = (np.array([r[kind][z] for z in LATENTS]) for kind in ("step_down", "single_step"))
    assert (screened > low - error["step_down"]).all() and (screened < high + error["single_step"]).all()


# ---- linear models ---------------------------------------------------------------------------------------------------

COVARIATES = ("age", "site", "sex")


@pytest.mark.parametrize("latent", LATENTS)
def test_partial_correlation(latent: str) -> None:
    row, r = screen("patients", "score", method="pearson", covariates=COVARIATES).loc[latent], R["linear"][latent]
    close(row["estimate"], r["partial"])
    close(row["statistic"], r["t"])
    row = screen("patients", "score", method="spearman", covariates=COVARIATES).loc[latent]
    close(row["estimate"], r["partial_spearman"])


@pytest.mark.parametrize("latent", LATENTS)
def test_ols(latent: str) -> None:
    row, r = screen("patients", "score", method="ols", covariates=COVARIATES).loc[latent], R["linear"][latent]
    close(row["estimate"], r["slope"])
    close(row["statistic"], r["t"])
    close([row["ci_low"], row["ci_high"]], r["ci"])
    close(t_pvalue(row["statistic"], 120 - 6), r["p"])
    assert row["p"] >= r["p"] * (1 - 1e-8)


def test_partial_correlation_of_the_worked_example() -> None:
    d = table("d2")
    found = adjust.partial_correlation(d[["x"]].to_numpy(float), d["y"].to_numpy(float), d[["c"]].to_numpy(float))
    close(found["r"][0], R["d2"]["partial"])
    close([R["d2"][k] for k in ("partial", "slope", "se", "cr0", "cr1")],
          [0.7, 1.1166667, 0.1412576, 0.0635255, 0.0792303], rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("latent", LATENTS)
def test_semi_partial_correlation(latent: str) -> None:
    """``semi`` takes the covariates off the latent alone."""
    d, r = table("patients"), R["linear"][latent]
    C = _design(d, *COVARIATES)[:, 1:]
    close(adjust.partial_correlation(d[[latent]].to_numpy(), d["score"].to_numpy(), C)["r"][0], r["partial"])
    semi = adjust.partial_correlation(d[[latent]].to_numpy(), d["score"].to_numpy(), C, semi=True)
    close(semi["r"][0], r["semi_partial_latent"])


def test_natural_spline() -> None:
    d, r = table("patients"), R["spline"]
    for df, fitted in ((4, r["fitted"]), (3, r["fitted3"])):
        X = np.column_stack([np.ones(len(d)), adjust.natural_spline(d["age"].to_numpy(), df=df)])
        close(X @ regression.fit_ols(d["score"].to_numpy(), X)["coef"], fitted)


@pytest.mark.parametrize("latent", LATENTS)
def test_ols_adjusted_for_a_spline(latent: str) -> None:
    row = screen("patients", "score", method="ols", covariates=("spline(age, df=4)",)).loc[latent]
    r = R["spline"]["latents"][latent]
    close([row["estimate"], row["statistic"]], [r["slope"], r["t"]])
    close((row["ci_high"] - row["ci_low"]) / 2 / stats.t.ppf(0.975, 114), r["se"])


@pytest.mark.parametrize("how", ["mean", "firing", "max"])
def test_pooled_to_patients(how: str) -> None:
    aggregate = {"firing": "fraction_active"}.get(how, how)
    found = screen("cohort", "score", unit="patient", method="pearson", aggregate=aggregate)
    for latent in LATENTS:
        if latent != "z_dense" or how != "firing":
            close(found.loc[latent, "estimate"], R["pooled"][latent][how])


def _design(frame: pd.DataFrame, *columns: Any) -> np.ndarray:
    """Intercept and columns (n, k) in the order of R's formula; text as dummies, the first level left out."""
    parts = [np.ones((len(frame), 1))]
    for column in columns:
        values = frame[column] if isinstance(column, str) else column
        if pd.api.types.is_numeric_dtype(values):
            parts.append(np.asarray(values, np.float64)[:, None])
        else:
            parts.append(pd.get_dummies(values, drop_first=True).to_numpy(np.float64))
    return np.hstack(parts)


def _patients() -> np.ndarray:
    return np.unique(table("cohort")["patient"], return_inverse=True)[1]


# ---- robust errors ---------------------------------------------------------------------------------------------------


def test_cluster_robust_errors_of_the_worked_example() -> None:
    d, r = table("d2"), R["d2"]
    X, y, codes = _design(d, "x"), d["y"].to_numpy(float), d["g"].to_numpy() - 1
    fit = regression.fit_ols(y, X)
    close(fit["coef"][1], r["slope"])
    close(np.sqrt(fit["cov"][1, 1]), r["se"])
    for kind in ("cr0", "cr1"):
        close(np.sqrt(robust.sandwich(fit["bread"], fit["scores"], codes=codes, kind=kind)[1, 1]), r[kind])
    V, df = robust.cr2(X, fit["residuals"], codes=codes)
    close([np.sqrt(V[1, 1]), df[1]], [r["cr2"], r["cr2_df"]])


@pytest.mark.parametrize("latent", LATENTS)
def test_cluster_robust_least_squares(latent: str) -> None:
    """CR0: HC0 without, CR1: HC1 with sandwich's cluster adjustment = clubSandwich CR1S; CR2 with Satterthwaite df."""
    d, r = table("cohort"), R["cluster_lm"][latent]
    X, codes = _design(d, "age", "scanner", latent), _patients()
    fit = regression.fit_ols(d["score"].to_numpy(), X)
    close(fit["coef"], r["coef"])
    close(np.sqrt(np.diag(fit["cov"])), r["se"])
    for kind, theirs in (("cr0", r["cr0"]), ("cr1", r["cr1"]), ("cr1", r["cr1s"]["se"])):
        V = robust.sandwich(fit["bread"], fit["scores"], codes=codes, kind=kind)
        close(np.sqrt(np.diag(V)), theirs)
    V, df = robust.cr2(X, fit["residuals"], codes=codes)
    close(np.sqrt(np.diag(V)), r["cr2"]["se"])
    close(df, r["cr2"]["df"])
    close([t_pvalue(c / s, f) for c, s, f in zip(fit["coef"], np.sqrt(np.diag(V)), df, strict=True)], r["cr2"]["p"])


@pytest.mark.parametrize("latent", ["z_sparse", "z_signed", "z_dense"])
@pytest.mark.parametrize("model", ["logistic", "poisson"])
def test_cluster_robust_generalised_models(model: str, latent: str) -> None:
    d, r = table("cohort"), R[f"cluster_{model}"][latent]
    X = _design(d, "age", latent)
    if model == "logistic":
        fit = regression.fit_logistic((d["region"] == "edge").to_numpy(float), X)
    else:
        fit = loglinear.fit_poisson(d["count"].to_numpy(), X, offset=np.log(d["area"].to_numpy()))
    close(fit["coef"], r["coef"])
    close(np.sqrt(np.diag(fit["cov"])), r["se"])
    for kind in ("cr0", "cr1"):
        V = robust.sandwich(fit["bread"], fit["scores"], codes=_patients(), kind=kind)
        close(np.sqrt(np.diag(V)), r[kind])


# ---- mixed models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("nested", [False, True])
def test_linear_mixed_model(nested: bool, latent: str) -> None:
    d, r = table("cohort"), R["lmer_nested" if nested else "lmer"][latent]
    y, X, codes = d["score"].to_numpy(), _design(d, "age", latent), _patients()
    slides = np.unique(d["slide"], return_inverse=True)[1] if nested else None
    fit = mixed.fit_lmm(y, X, codes=codes, subcodes=slides)
    ml = mixed.fit_lmm(y, X, codes=codes, subcodes=slides, reml=False)
    variance = dict(zip(r["groups"], r["variance"], strict=True))
    ours = {"patient": fit["tau2"], "Residual": fit["sigma2"], "slide:patient": fit["tau2_sub"]}
    # lmer's optimiser leaves 1e-6 of the variances (likelihoods are flat at the top), and lmerTest differentiates
    # numerically
    close([ours[g] for g in r["groups"]], list(variance.values()), rtol=2e-6)
    close(fit["coef"], r["coef"], rtol=1e-6)
    close(np.sqrt(np.diag(fit["cov"])), r["se"], rtol=1e-6)
    close(fit["df"], r["df"], rtol=2e-6)
    close([t_pvalue(c / e, f) for c, e, f in zip(fit["coef"], np.sqrt(np.diag(fit["cov"])), fit["df"], strict=True)],
          r["p"], rtol=1e-5)  # fmt: skip
    close([fit["loglik"], ml["loglik"]], [r["reml"], r["ml"]], rtol=1e-12)
    close(mixed.likelihood_ratio(y, X, codes=codes, subcodes=slides), [r["lr"], r["lr_p"]])


def test_intraclass_correlation() -> None:
    found = mixed.icc(table("cohort")["score"].to_numpy(), _patients(), estimator="anova")
    close([found["icc"], found["n0"]], [R["intraclass"]["icc"], R["intraclass"]["n0"]])


@pytest.mark.parametrize("latent", ["z_sparse", "z_tied", "z_dense"])
@pytest.mark.parametrize("family", ["binomial", "poisson"])
def test_generalised_mixed_model(family: str, latent: str) -> None:
    """25 nodes on both sides. glmer's optimiser leaves about 1e-5, its errors are from a numerical Hessian."""
    d = table("cohort")
    r, laplace = R[f"glmer_{family}_25"][latent], R[f"glmer_{family}_1"][latent]
    y = (d["region"] == "edge").to_numpy(float) if family == "binomial" else d["count"].to_numpy(float)
    offset = None if family == "binomial" else np.log(d["area"].to_numpy())
    X = _design(d, (d["age"] - 55) / 10, latent)
    fit = glmm.fit_glmm(y, X, codes=_patients(), family=family, offset=offset, n_points=25)
    close(fit["coef"], r["coef"], rtol=3e-5)
    close(np.sqrt(fit["tau2"]), r["sd"], rtol=1e-6)
    close(np.sqrt(np.diag(fit["cov"])), r["se"], rtol=1e-5)
    # Laplace (nAGQ = 1) is another estimate: we are at least ten times nearer to the integral itself
    assert abs(np.sqrt(fit["tau2"]) - r["sd"]) < 0.1 * abs(laplace["sd"] - r["sd"])


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", LATENTS)
def test_poisson(latent: str) -> None:
    d, r = table("patients"), R["poisson"][latent]
    fit = loglinear.fit_poisson(d["count"].to_numpy(), _design(d, "age", latent), offset=np.log(d["area"].to_numpy()))
    close(fit["coef"], r["coef"])
    close(np.sqrt(np.diag(fit["cov"])), r["se"])
    close([fit["loglik"], fit["aic"], fit["pearson_chi2_df"]], [r["loglik"], r["aic"], r["pearson"]])


@pytest.mark.parametrize("latent", LATENTS)
def test_negbin(latent: str) -> None:
    d, r = table("patients"), R["negbin"][latent]
    fit = loglinear.fit_negbin(d["count"].to_numpy(), _design(d, "age", latent), offset=np.log(d["area"].to_numpy()))
    close(fit["coef"], r["coef"])
    close(np.sqrt(np.diag(fit["cov"])), r["se"])
    close(fit["alpha"], 1 / r["theta"])
    close(fit["alpha_se"], r["se_theta"] / r["theta"] ** 2)  # delta method
    close(fit["loglik"], r["loglik"])


@pytest.mark.parametrize("model", ["zip", "zinb"])
def test_zero_inflated(model: str) -> None:
    """pscl's optimiser leaves about 1e-8 of the coefficients, its errors are from a numerical Hessian."""
    d, r = table("zero_inflated"), R[model]
    fit = {"zip": zeros.fit_zip, "zinb": zeros.fit_zinb}[model](
        d[model].to_numpy(), _design(d, "w", "x"), offset=np.log(d["area"].to_numpy())
    )
    close(fit["coef"], r["coef"], rtol=1e-7)
    close(fit["coef_inflation"], np.atleast_1d(r["zero"]), rtol=1e-7)
    close(fit["loglik"], r["loglik"])
    assert fit["loglik"] >= r["loglik"] - 1e-9
    if model == "zinb":
        close(fit["alpha"], 1 / r["theta"], rtol=1e-7)
    close(np.sqrt(np.r_[np.diag(fit["cov"]), np.diag(fit["cov_inflation"])]), r["se"], rtol=1e-6)


@pytest.mark.parametrize("latent", LATENTS)
def test_logistic(latent: str) -> None:
    d, r = table("patients"), R["logistic"][latent]
    fit = regression.fit_logistic((d["arm"] == "b").to_numpy(float), _design(d, "age", latent))
    close(fit["coef"], r["coef"])
    close(np.sqrt(np.diag(fit["cov"])), r["se"])
    close(fit["loglik"], r["loglik"])


# ---- ordered classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", LATENTS)
def test_ordinal(latent: str) -> None:
    """``clm`` to 1e-8; ``polr`` stops earlier and has errors from a numerical Hessian."""
    d, r = table("patients"), R["ordinal"][latent]
    fit = ordinal.fit_ordinal(d["grade"].to_numpy(), _design(d, "age", latent)[:, 1:])
    close(fit["coef"], r["coef"])
    close(fit["thresholds"], r["zeta"])
    close(np.sqrt(np.diag(fit["cov"])), r["se"][-2:])
    close([fit["loglik"], fit["aic"]], [r["loglik"], r["aic"]])
    close(np.r_[fit["coef"], fit["thresholds"]], r["polr"] + r["polr_zeta"], rtol=1e-6)
    close(np.sqrt(np.diag(fit["cov"])), r["polr_se"][:2], rtol=2e-3)
    null = ordinal.fit_ordinal(d["grade"].to_numpy(), _design(d, "age")[:, 1:])
    close(2 * (fit["loglik"] - null["loglik"]), r["lr"])
    close(fit["p_proportional"], r["proportional"]["p"])


@pytest.mark.parametrize("latent", ["z_sparse", "z_signed", "z_dense"])
def test_cluster_robust_ordinal(latent: str) -> None:
    """Scores from ``sandwich::estfun`` of polr, which stops earlier: 1e-6."""
    d, r = table("patients"), R["cluster_ordinal"][latent]
    fit = ordinal.fit_ordinal(d["grade"].to_numpy(), _design(d, "age", latent)[:, 1:])
    V = robust.sandwich(fit["bread"], fit["scores"], codes=np.unique(d["site"], return_inverse=True)[1], kind="cr0")
    close(np.sqrt(np.diag(V)), r["cr0"], rtol=1e-6)


# ---- screens of regressions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target", "options"),
    [
        ("poisson", "count", {"exposure": "area"}),
        ("negbin", "count", {"exposure": "area"}),
        ("ordinal", "grade", {}),
        ("cox", "time", {"event": "event"}),
    ],
)
def test_full_fits_of_a_screen(method: str, target: str, options: dict) -> None:
    """``estimate`` is the ratio for one standard deviation of the latent."""
    found = screen("patients", target, method=method, covariates=("age",), **options)
    for latent in LATENTS:
        r = R[method][latent]
        coef = (r["efron"]["coef"] if method == "cox" else r["coef"])[-1]
        assert found.loc[latent, "fit"] == "full"
        close(np.log(found.loc[latent, "estimate"]), coef * table("patients")[latent].std())


def test_score_statistic_of_the_cox_screen() -> None:
    V, n = as_columns(samples("patients").X), len(table("patients"))
    sets = cox.risk_sets(*_times())
    for covariates, name in (((), "alone"), (("age",), "chisq")):
        Z = _design(table("patients"), *covariates)[:, 1:] if covariates else np.empty((n, 0))
        U, information, *_ = cox_screen.score_and_information(sets, V, Z)
        theirs = np.array([R["cox_score"][latent][name] for latent in LATENTS])
        close(U**2 / information, theirs)
        p = screen("patients", "time", method="cox", event="event", covariates=covariates)["p"]
        assert (p >= stats.chi2.sf(theirs, 1) * (1 - 1e-8)).all()  # the wider of two errors


# ---- survival --------------------------------------------------------------------------------------------------------


def _times() -> tuple[np.ndarray, np.ndarray]:
    return table("patients")["time"].to_numpy(float), table("patients")["event"].to_numpy()


def _compare_cox(fit: dict, r: dict) -> None:
    close(fit["coef"], np.atleast_1d(r["coef"]))
    close(np.sqrt(np.diag(fit["cov"])), np.atleast_1d(r["se"]))
    close([fit["loglik_null"], fit["loglik"]], r["loglik"])
    close([fit["chi2_score"], fit["chi2_lr"], fit["chi2_wald"]], [r["score"], r["lr"], r["wald"]])


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("kind", ["efron", "breslow", "strata", "alone"])
def test_cox(kind: str, latent: str) -> None:
    d, r = table("patients"), R["cox"][latent][kind]
    X = _design(d, *(["age"] if kind != "alone" else []), latent)[:, 1:]
    options = {"strata": d["site"].to_numpy() if kind == "strata" else None}
    ties = "breslow" if kind == "breslow" else "efron"
    _compare_cox(cox.fit_cox(*_times(), X, ties=ties, **options), r)
    for transform in ("km", "identity", "rank"):
        found, theirs = (
            survival.schoenfeld(*_times(), X, ties=ties, transform=transform, **options),
            r[f"zph_{transform}"],
        )
        close(found["chi2"], theirs["chisq"])
        close(found["p"], theirs["p"])


@pytest.mark.parametrize("latent", LATENTS)
def test_cox_robust_errors(latent: str) -> None:
    """coxph has no factor for few clusters; ours has G / (G - 1)."""
    d, r = table("patients"), R["cox"][latent]["cluster"]
    codes = np.unique(d["site"], return_inverse=True)[1]
    fit = cox.fit_cox(*_times(), _design(d, "age", latent)[:, 1:], codes=codes, penalty="none")
    close(np.sqrt(np.diag(fit["cov_robust"]) * 2 / 3), r["robust_se"])


@pytest.mark.parametrize("latent", LATENTS)
def test_concordance(latent: str) -> None:
    z, r = table("patients")[latent].to_numpy(), R["cox"][latent]
    close(survival.concordance(*_times(), z), r["concordance"])
    close(survival.uno_c(*_times(), z), r["uno"])


@pytest.mark.parametrize("kind", ["untied", "efron", "breslow"])
def test_cox_of_the_worked_example(kind: str) -> None:
    d, r = table("d7"), R["cox_d7"][kind]
    time = d["time" if kind == "untied" else "tied"].to_numpy(float)
    fit = cox.fit_cox(
        time,
        d["event"].to_numpy(),
        d[["z"]].to_numpy(),
        ties="breslow" if kind == "breslow" else "efron",
        penalty="none",
    )
    _compare_cox(fit, r)
    close(fit["coef"][0], {"untied": 0.69231, "efron": 0.61401, "breslow": 0.55059}[kind], rtol=1e-5)


def test_kaplan_meier_and_aalen_johansen() -> None:
    time, event = _times()
    r = R["kaplan_meier"]
    found = survival.kaplan_meier(time, event).iloc[1:]
    for ours, theirs in (("time", "time"), ("survival", "survival"), ("n_risk", "n_risk"), ("n_event", "n_event")):
        close(found[ours], r[theirs])
    inside = (found["survival"] > 0).to_numpy() & (found["survival"] < 1).to_numpy()
    for ours, theirs in (("se", "se"), ("ci_low", "low"), ("ci_high", "high")):
        close(found[ours][inside], np.array(r[theirs], float)[inside])
    cause = np.where(event == 1, np.where(table("patients")["sex"] == "f", 1, 2), 0)
    found = survival.aalen_johansen(time, cause)
    for number, name in ((1, "first"), (2, "second")):
        close(found.loc[found["cause"] == number, "incidence"].iloc[1:], R["aalen_johansen"][name])


# ---- full models of a shortlist, by the public fit -------------------------------------------------------------------


@lru_cache
def shortlist(
    name: str, target: str, model: str, latents: tuple[str, ...] = tuple(LATENTS), **options: Any
) -> pd.DataFrame:
    options = {"assume_independent": name != "cohort", "standardise": False, **options}
    found = bs.stats.fit(samples(name), target, latents=list(latents), model=model, unit="sample", **options)
    return found.set_index("latent")


@pytest.mark.parametrize(
    ("model", "target", "options", "name"),
    [
        ("ols", "score", {"covariates": ("age", "scanner")}, "cluster_lm"),
        ("logistic", "region", {"covariates": ("age",)}, "cluster_logistic"),
        ("poisson", "count", {"covariates": ("age",), "exposure": "area"}, "cluster_poisson"),
    ],
)
def test_fit_with_errors_over_patients(model: str, target: str, options: dict, name: str) -> None:
    """CR2 and its Satterthwaite df as clubSandwich has them for least squares.

    For generalised models ours are those of the weighted least squares that the last step is (``cr2_step``).
    clubSandwich takes the root of another matrix, on the scale of the response; both correct the same bias, and errors
    differ by less than 1 % here.
    """
    found = shortlist("cohort", target, model, tuple(R[name]), errors="cr2", **options)
    for latent, r in R[name].items():
        row, last = found.loc[latent], r.get("cr2_step", r["cr2"])
        close(row["estimate"], r["coef"][-1])
        close([row["se"], row["df"], row["p"]], [last["se"][-1], last["df"][-1], last["p"][-1]])
        close([row["se"], row["df"]], [r["cr2"]["se"][-1], r["cr2"]["df"][-1]], rtol=0.01)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("subgroups", [None, "slide"])
def test_fit_of_a_mixed_model(subgroups: str | None, latent: str) -> None:
    row = shortlist("cohort", "score", "lmm", covariates=("age",), subgroups=subgroups).loc[latent]
    r = R["lmer_nested" if subgroups else "lmer"][latent]
    close(row[["estimate", "se", "df"]], [r["coef"][-1], r["se"][-1], r["df"][-1]], rtol=2e-6)
    close(row["p"], r["p"][-1], rtol=1e-5)


@pytest.mark.parametrize("latent", LATENTS)
def test_mixed_model_of_associate(latent: str) -> None:
    """The slope is lmer's; its interval and p are never narrower or smaller than lmerTest's."""
    row, r = screen("cohort", "score", method="lmm", covariates=("age",)).loc[latent], R["lmer"][latent]
    half = stats.t.ppf(0.975, r["df"][-1]) * r["se"][-1]
    close(row["estimate"], r["coef"][-1], rtol=1e-6)
    assert row["p"] >= r["p"][-1] * (1 - 1e-5)
    assert row["ci_high"] - row["ci_low"] >= 2 * half * (1 - 1e-5)


@pytest.mark.parametrize(("family", "target"), [("binomial", "region"), ("poisson", "count")])
def test_fit_of_a_generalised_mixed_model(family: str, target: str) -> None:
    """25 nodes, as in glmer; the model's errors."""
    options = {"errors": "model"} | ({"exposure": "area"} if family == "poisson" else {})
    name = f"glmer_{family}_25"
    found = shortlist("cohort", target, f"glmm_{family}", tuple(R[name]), covariates=("age",), **options)
    for latent, r in R[name].items():
        close(found.loc[latent, ["estimate", "se"]], [r["coef"][-1], r["se"][-1]], rtol=3e-5)
        close(found.loc[latent, "tau2"], r["sd"] ** 2, rtol=3e-5)


@pytest.mark.parametrize(
    ("model", "target", "options"),
    [
        ("logistic", "arm", {}),
        ("poisson", "count", {"exposure": "area"}),
        ("negbin", "count", {"exposure": "area"}),
        ("ordinal", "grade", {}),
        ("cox", "time", {"event": "event"}),
    ],
)
def test_fit_with_errors_of_the_model(model: str, target: str, options: dict) -> None:
    found = shortlist("patients", target, model, covariates=("age",), errors="model", **options)
    for latent in LATENTS:
        row, r = found.loc[latent], R[model][latent]
        r = r["efron"] if model == "cox" else r
        close(row["estimate"], r["coef"][-1])
        close(row["se"], r["se"][-1])
        close(row["p"], 2 * stats.norm.sf(abs(r["coef"][-1] / r["se"][-1])))
        close(row["ratio_high"], np.exp(r["coef"][-1] + stats.norm.ppf(0.975) * r["se"][-1]))
        if model == "cox":
            close([row["concordance"], row["p_schoenfeld"]], [r["concordance"], r["zph_km"]["p"][1]])
        if model == "ordinal":
            close(row["p_proportional"], r["proportional"]["p"])


def test_fit_with_errors_of_units_left_out() -> None:
    found = shortlist("patients", "time", "cox", ("z_dense",), covariates=("age",), errors="jackknife", event="event")
    close(found.loc["z_dense", "se"], R["jackknife"]["cox"])


# ---- strata and studies put together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["varied", "alike"])
@pytest.mark.parametrize("name", ["FE", "DL", "REML", "PM", "DL_knha", "REML_knha", "PM_knha"])
def test_combine(data: str, name: str) -> None:
    d, r = table("studies"), R["meta"][data][name]
    y = d["yi" if data == "varied" else "alike"].to_numpy()[:, None]
    options = {} if name == "FE" else {"effects": "random", "method": name.split("_")[0].lower()}
    found = meta.combine(y, d["vi"].to_numpy()[:, None], hartung_knapp=name.endswith("knha"), **options)
    for ours, theirs in (
        ("estimate", "estimate"),
        ("se", "se"),
        ("p", "p"),
        ("q", "q"),
        ("p_heterogeneity", "q_p"),
        ("tau2", "tau2"),
    ):
        close(found[ours][0], r[theirs])
    close([found["ci_low"][0], found["ci_high"][0]], r["ci"])
    close(100 * found["i2"][0], r["i2"])
    if r["prediction"]:
        # metafor: normal, or t with k - 1 under Knapp and Hartung; ours: t with k - 2 (Higgins et al.)
        theirs_t = stats.t.ppf(0.975, 7) if name.endswith("knha") else stats.norm.ppf(0.975)
        spread = (np.array(r["prediction"]) - r["estimate"]) / theirs_t * stats.t.ppf(0.975, 6)
        close([found["prediction_low"][0], found["prediction_high"][0]], r["estimate"] + spread)


@pytest.mark.parametrize("pooling", ["fixed", "random"])
def test_pearson_within_strata(pooling: str) -> None:
    """metafor's rma of Fisher's z of each site, FE and DL."""
    found = screen("patients", "score", method="pearson", strata="site", pooling=pooling)
    for latent in LATENTS:
        row, r = found.loc[latent], R["strata"][latent][pooling]
        close(np.arctanh(row[["estimate", "ci_low", "ci_high"]].to_numpy(float)), [r["estimate"], *r["ci"]])
        close(row[["q_heterogeneity", "p_heterogeneity", "i2"]], [r["q"], r["q_p"], r["i2"] / 100])


def test_auroc_within_strata() -> None:
    """metafor's rma of the logit of each site's AUROC, DeLong's variance."""
    found = screen("patients", "arm", method="auroc", strata="site", pooling="random")
    for latent in LATENTS:
        row, r = found.loc[latent], R["strata"][latent]["auroc"]
        area = row[["estimate", "ci_low", "ci_high"]].to_numpy(float)
        close(np.log(area / (1 - area)), [r["estimate"], *r["ci"]])
        close(row[["q_heterogeneity", "p_heterogeneity", "i2"]], [r["q"], r["q_p"], r["i2"] / 100])


# ---- power -----------------------------------------------------------------------------------------------------------


def test_power() -> None:
    r = R["power"]
    close([sample_size(0.3), sample_size(0.3, m=10_000)], [r["pearson_n"], r["pearson_n_family"]])
    close(detectable(40), r["pearson_r"])
    close(_detectable_epsilon(120, 3, 0.05, 0.8, 1), r["kruskal"])  # R's noncentral chi-squared


# ---- multiplicity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ours"), [("BH", "bh"), ("BY", "by"), ("holm", "holm"), ("bonferroni", "bonferroni")])
def test_adjusted_p(name: str, ours: str) -> None:
    close(getattr(bs.stats, ours)(table("p_values")["p"]), R["adjust"][name])
