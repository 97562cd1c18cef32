"""What a study can show: worked numbers, inverses, simulated power, design effects, reasons for refusal."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import (
    STATUS,
    associate,
    auroc_error,
    design_effect,
    detectable,
    detectable_auroc,
    evidence,
    power,
    power_by_thinning,
    sample_size,
    sample_size_auroc,
)
from biosae.stats.nested import intraclass_correlation


def samples(X, patient=None, **columns):
    obs = pd.DataFrame(columns, index=[f"s{i}" for i in range(len(X))])
    if patient is not None:
        obs["patient"] = np.asarray(patient).astype(str)
    return anndata.AnnData(X=sp.csr_matrix(np.asarray(X, float)), obs=obs)


def test_worked_numbers():
    assert sample_size(0.3) == pytest.approx(84.93, abs=5e-3)
    assert sample_size(0.3, m=10_000) == pytest.approx(308.1, abs=0.05)
    assert auroc_error(0.75, 50, 50) == pytest.approx(0.0488365, abs=5e-8)
    assert detectable(40, m=4096) == pytest.approx(0.7, abs=0.01)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.02, 0.95), st.floats(1e-4, 0.2), st.floats(0.5, 0.99), st.floats(1, 1e5), st.floats(1, 50))
def test_detectable_and_sample_size_are_inverse(r, alpha, share, m, deff):
    how = {"alpha": alpha, "power": share, "m": m, "design_effect": deff}
    n = sample_size(r, **how)
    assert detectable(n, **how) == pytest.approx(r, rel=1e-9)
    assert detectable(2 * n, **how) < r < detectable(0.9 * n, **how) or np.isnan(detectable(0.9 * n, **how))
    assert sample_size(-r, **how) == n == pytest.approx(deff * sample_size(r, **{**how, "design_effect": 1}))


def test_sample_size_has_the_power_that_it_promises():
    rng = np.random.default_rng(0)
    n = int(np.ceil(sample_size(0.3)))
    x = rng.normal(size=(4000, n))
    y = 0.3 * x + np.sqrt(1 - 0.09) * rng.normal(size=(4000, n))
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y)])
    p = 2 * stats.t.sf(np.abs(r) * np.sqrt((n - 2) / (1 - r**2)), n - 2)
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.025)


def test_auroc_sizes_are_inverse_and_hold_in_simulation():
    for share, m, deff in ((0.5, 1, 1.0), (0.2, 4096, 1.0), (0.3, 10, 4.0)):
        n = sample_size_auroc(0.75, share=share, m=m, design_effect=deff)
        again = detectable_auroc(n * share, n * (1 - share), m=m, design_effect=deff)
        assert again == pytest.approx(0.75, rel=1e-9)
        assert sample_size_auroc(0.25, share=share, m=m, design_effect=deff) == n
    rng = np.random.default_rng(1)
    n = int(np.ceil(sample_size_auroc(0.7))) // 2
    shift = np.sqrt(2) * stats.norm.ppf(0.7)
    p = [stats.mannwhitneyu(rng.normal(size=n) + shift, rng.normal(size=n)).pvalue for _ in range(800)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.8, abs=0.05)
    assert np.isnan(detectable_auroc(2, 2))  # not even a perfect separation of 2 and 2
    with pytest.raises(InputError, match="other than"):
        sample_size_auroc(0.5)
    with pytest.raises(InputError, match="at least one test"):
        detectable(40, m=0)
    assert np.isnan(detectable(3))


def test_design_effect_of_the_spec():
    """100 patients x 200 tiles, ICC 0.3: 1 + 199 x 0.3 = 60.7, so 20,000 tiles count as 329."""
    rng = np.random.default_rng(2)
    codes = np.repeat(np.arange(100), 200)
    b, e = rng.normal(size=100), rng.normal(size=20_000)
    b, e = (b - b.mean()) / b.std(ddof=1), e - np.bincount(codes, e)[codes] / 200
    msw = 1.0  # scale the parts so that the ANOVA estimate is 0.3 to the digit
    e *= np.sqrt(msw * (20_000 - 100) / (e @ e))
    msb = msw * (1 + 200 * 0.3 / 0.7)
    x = b[codes] * np.sqrt(msb / 200) + e
    found = design_effect(x[:, None], codes).iloc[0]
    assert found["icc"] == pytest.approx(0.3, rel=1e-9)
    assert found["design_effect"] == pytest.approx(60.7, rel=1e-9)
    assert int(found["n_effective"]) == 329


def test_design_effect_agrees_with_one_column_at_a_time_and_with_simulation():
    rng = np.random.default_rng(3)
    codes = np.sort(rng.integers(0, 25, 300))
    X = np.maximum(0, rng.normal(size=(300, 5)) + rng.normal(size=(25, 5))[codes] * np.arange(5) / 2)
    X[:, 4] = 0
    for form in (X, sp.csr_matrix(X)):
        found = design_effect(form, codes)
        for j in range(4):
            assert found["icc"][j] == pytest.approx(intraclass_correlation(X[:, j], codes), rel=1e-10)
        assert np.isnan(found["icc"][4])
    codes = np.repeat(np.arange(30), 10)
    r = []
    for _ in range(1500):  # both vary within groups: the variance of r is deff / n
        x, y = (rng.normal(size=30)[codes] * s + rng.normal(size=300) for s in (1.0, 1.0))
        r.append(np.corrcoef(x, y)[0, 1])
    x = rng.normal(size=(30, 400))[codes] + rng.normal(size=(300, 400))
    promised = design_effect(x[:, :200], codes, y=x[:, 300])["design_effect"].median()
    assert 300 * np.var(r) == pytest.approx(1 + 9 * 0.25, rel=0.12)
    assert promised == pytest.approx(1 + 9 * 0.25, rel=0.4)
    assert (design_effect(x[:, :3], np.arange(300))["design_effect"] == 1).all()
    with pytest.raises(StatisticsError, match="2 groups"):
        design_effect(x, np.zeros(300))


def study(n_patients=40, tiles=10, m=64, seed=4):
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), tiles)
    X = np.maximum(0, rng.normal(size=(len(patient), m)) + rng.normal(size=(n_patients, m))[patient] - 0.5)
    grade = rng.permutation(np.arange(n_patients) % 2)
    return samples(
        X, patient, marker=rng.normal(size=n_patients)[patient], region=rng.normal(size=len(patient)),
        grade=np.array(["low", "high"])[grade][patient],
        stage=np.array(list("abcd"))[np.arange(n_patients) % 4][patient],
    )  # fmt: skip


def test_power_of_a_study():
    adata = study()
    table = power(adata, ["marker", "grade", "stage"], unit="patient", m=4096).set_index("target")
    assert (table["n_units"] == 40).all() and (table["design_effect"] == 1).all() and (table["m"] == 4096).all()
    assert table.loc["marker", "detectable"] == pytest.approx(float(detectable(40, m=4096)))
    assert table.loc["grade", "detectable"] == pytest.approx(detectable_auroc(20, 20, m=4096))
    assert table.loc["grade", "classes"] == "high 20, low 20"
    assert table["effect"].tolist() == ["pearson_r", "auroc", "epsilon_squared"]
    assert "40 patients and 4,096 tests only |r| > 0.70 can be confirmed" in table.loc["marker", "sentence"]
    assert 0.2 < table.loc["marker", "icc_median"] < 0.7
    assert power(adata, ["marker", "grade"], unit="patient")["m"].tolist() == [128, 128]
    rng = np.random.default_rng(5)
    share = table.loc["stage", "detectable"]
    H = stats.ncx2.rvs(3, 40 * share / (1 - share), size=20_000, random_state=rng)
    critical = stats.chi2.isf(0.05 / 4096, 3)
    assert (critical < H).mean() == pytest.approx(0.8, abs=0.01)


def test_targets_without_two_values_leave_the_others_their_power():
    adata = study()
    adata.obs["word"], adata.obs["zero"], adata.obs["unknown"] = "a", 0.0, np.nan
    table = power(adata, ["marker", "word", "zero", "unknown"], unit="patient", m=10).set_index("target")
    assert table["n_units"].tolist() == [40, 40, 40, 0]
    assert table["detectable"].notna().tolist() == [True, False, False, False]
    assert table["sentence"].iloc[1:].str.contains("nothing can be confirmed").all()


def test_power_counts_patients_where_samples_are_the_unit():
    adata = study()
    table = power(adata, ["marker", "region"], unit="sample", m=100).set_index("target")
    constant, varying = table.loc["marker"], table.loc["region"]
    assert constant["n_units"] == 400 and constant["n_groups"] == 40
    assert constant["design_effect"] == pytest.approx(1 + 9 * constant["icc_median"], rel=1e-9)
    assert constant["n_effective"] < 130 and varying["n_effective"] > 300
    assert constant["detectable"] > varying["detectable"]
    assert constant["design_effect_q25"] <= constant["design_effect"] <= constant["design_effect_q75"]
    assert "400 samples of 40 patients" in constant["sentence"]


def test_few_patients_cannot_confirm_anything_among_thousands():
    adata = study(n_patients=10)
    row = power(adata, "grade", unit="patient", m=4096).iloc[0]
    assert row["smallest_p"] == pytest.approx(2 / 252) and np.isnan(row["detectable"])
    assert "nothing can be confirmed: rearranging 10 patients gives no p below 0.0079" in row["sentence"]
    y = (adata.obs.groupby("patient", sort=False)["grade"].first() == "high").to_numpy()
    X = np.where(y, 5.0, 0.0)[:, None] + np.arange(10)[:, None] / 100
    best = associate(
        samples(X, np.arange(10), grade=np.where(y, "high", "low")), "grade", unit="patient", controls=False
    )
    assert best["p"][0] == pytest.approx(row["smallest_p"])  # what is promised is what associate gives
    one = power(adata, "grade", unit="patient", m=1).iloc[0]
    assert one["detectable"] > 0.8


def test_power_by_thinning_rises_with_patients_and_is_the_power():
    rng = np.random.default_rng(6)
    n = 400
    y = rng.normal(size=n)
    X = np.column_stack([2 + 0.2 * y + rng.normal(size=n), 2 + rng.normal(size=n)])
    adata = samples(np.maximum(X, 0), np.arange(n), marker=y)
    names = list(adata.var_names)
    how = {"unit": "patient", "method": "pearson", "n_draws": 40}
    table = power_by_thinning(adata, "marker", latents=names, shares=(0.1, 0.3, 0.9), **how)
    real = table[table["latent"] == names[0]].set_index("share")
    assert real["power"].is_monotonic_increasing and real.loc[0.9, "power"] > 0.9
    r = np.corrcoef(np.maximum(X[:, 0], 0), y)[0, 1]
    z = np.arctanh(r) * np.sqrt(40 - 3)
    expected = stats.norm.sf(1.96 - z)
    assert real.loc[0.1, "ci_low"] < expected + 0.05 and expected - 0.05 < real.loc[0.1, "ci_high"]
    assert (table[table["latent"] == names[1]]["power"] < 0.3).all()
    assert table["n_groups"].tolist()[::2] == [40, 120, 360]
    label = power_by_thinning(study(), "grade", latents=["0"], unit="patient", shares=[0.5], n_draws=5)
    assert label["n_groups"].tolist() == [20] and label["n_withheld"].tolist() == [0]
    with pytest.raises(InputError, match="shares"):
        power_by_thinning(adata, "marker", latents=names, unit="patient", shares=[2])


def test_evidence_counts_every_row_with_its_reason():
    adata = study(m=20)
    adata.X = sp.csr_matrix(adata.X.toarray() * np.r_[np.zeros(3), np.ones(17)])
    rare = adata.X.toarray()
    rare[:, 3] = 0
    rare[:2, 3] = 1.0
    adata.X = sp.csr_matrix(rare)
    adata.obs["twin"] = adata.obs["marker"] * 2 + 1
    with pytest.warns(UserWarning, match="determines"):
        result = associate(adata, ["marker", "region"], unit="sample", covariates=["twin"], method="pearson")
    table = evidence(result)
    assert table.groupby("target")["n"].sum().tolist() == [20, 20] and table["share"].sum() == pytest.approx(2)
    refused = table[table["target"] == "marker"].set_index("status")
    assert (
        refused.loc["unidentifiable", "n"] == 17
        and "'twin' determines target 'marker'" in refused.loc["unidentifiable", "reason"]
    )
    region = table[table["target"] == "region"].set_index("status")
    assert region["n"].to_dict() == {"ok": 16, "dead": 3, "too_sparse": 1}
    assert region.index[0] == "ok" and region["tested"].tolist() == [True, False, False]
    assert region.loc["dead", "reason"] == STATUS["dead"]
    assert table[table["tested"]]["n"].sum() == result["p"].notna().sum()
