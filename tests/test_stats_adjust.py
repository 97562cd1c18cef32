"""Covariates: worked numbers, a sign that turns, splines as R's, and what cannot be adjusted for."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import associate, overlap
from biosae.stats.adjust import basis, column_of, design, determined, natural_spline, partial_correlation

X = np.array([1.0, 2, 3, 4, 6, 7, 8, 9])
Y = np.array([2.0, 1, 4, 3, 7, 9, 8, 10])
C = np.repeat([0.0, 1.0], 4)


def test_worked_numbers():
    raw = np.corrcoef(X, Y)[0, 1]
    found = partial_correlation(X[:, None], Y, C[:, None]).iloc[0]
    assert raw == pytest.approx(0.955195, abs=5e-7)
    assert (found["r"], found["p"], found["df"]) == (
        pytest.approx(0.7, abs=1e-9),
        pytest.approx(0.0799167, abs=5e-8),
        5,
    )
    assert (round(found["ci_low"], 2), round(found["ci_high"], 2)) == (-0.11, 0.95)


def test_semi_partial_is_the_share_that_the_column_adds():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(60, 3))
    x = Z @ [1, 0.5, 0] + rng.normal(size=60)
    y = Z @ [0.5, -1, 2] - 0.7 * x + rng.normal(size=60)

    def r2(*columns):
        A = np.column_stack([np.ones(60), *columns])
        e = y - A @ np.linalg.lstsq(A, y, rcond=None)[0]
        return 1 - e @ e / ((y - y.mean()) ** 2).sum()

    semi = partial_correlation(x[:, None], y, Z, semi=True).iloc[0]
    full = partial_correlation(x[:, None], y, Z).iloc[0]
    assert semi["r"] ** 2 == pytest.approx(r2(Z, x) - r2(Z), rel=1e-10)
    assert semi["r"] == pytest.approx(full["r"] * np.sqrt(1 - r2(Z)), rel=1e-12)
    left = x - np.column_stack([np.ones(60), Z]) @ np.linalg.lstsq(np.column_stack([np.ones(60), Z]), x, rcond=None)[0]
    assert semi["r"] == pytest.approx(np.corrcoef(left, y)[0, 1], rel=1e-10)
    assert semi["p"] == full["p"] and abs(semi["r"]) < abs(full["r"])
    half = stats.norm.ppf(0.975) / np.sqrt(60 - 3 - 3)
    np.testing.assert_allclose(np.arctanh([full["ci_low"], full["ci_high"]]), np.arctanh(full["r"]) + [-half, half])


def table(n_sites=4, n=40, seed=0):
    """Within every site the marker falls with the latent; sites with more of the one have more of the other."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_sites), n)
    latent = np.maximum(0, site + rng.normal(0, 0.4, len(site)))
    obs = pd.DataFrame(
        {"patient": [f"p{i}" for i in range(len(site))], "site": [f"site {s}" for s in site],
         "marker": 2.0 * site - latent + rng.normal(0, 0.3, len(site)), "age": rng.uniform(20, 80, len(site))},
        index=[f"s{i}" for i in range(len(site))],
    )  # fmt: skip
    return anndata.AnnData(X=sp.csr_matrix(latent[:, None]), obs=obs)


@pytest.mark.parametrize("method", ["pearson", "spearman", "ols"])
def test_simpson_the_sign_turns_with_adjustment(method):
    adata = table()
    raw = associate(adata, "marker", unit="patient", method=method).iloc[0]
    adjusted = associate(adata, "marker", unit="patient", method=method, covariates=["site"]).iloc[0]
    assert raw["estimate"] > 0 and raw["p"] < 1e-3
    assert adjusted["estimate"] < 0 and adjusted["p"] < 1e-3


def test_spline_spans_what_ns_spans():
    """R: ``qr.fitted(qr(cbind(1, splines::ns(x, df = 4))), y)`` of x and y below, first 5 of 12."""
    x = np.array([1.0, 2, 4, 5, 7, 8, 11, 13, 14, 18, 20, 25])
    y = np.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    Q = basis(natural_spline(x, df=4), 12)
    np.testing.assert_allclose(
        (Q @ (Q.T @ y))[:5], [2.0255075301, 2.2358175507, 2.8735033647, 3.4089387416, 4.8416553431], rtol=1e-9
    )
    assert Q.shape == (12, 5)
    line = basis(natural_spline(x, df=1), 12)
    np.testing.assert_allclose(line @ (line.T @ x), x, rtol=1e-12)  # a straight line


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=6, max_size=40), st.integers(1, 6))
def test_spline_of_tied_numbers_keeps_lines_and_finite_values(values, df):
    x = np.array(values, float)
    B = natural_spline(x, df=df)
    assert np.isfinite(B).all() and B.shape[1] <= df
    Q = basis(B, len(x))
    np.testing.assert_allclose(Q @ (Q.T @ x), x, atol=1e-8)


def test_knots_that_rounding_parts_are_one_knot():
    ages = np.array([0.0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])  # the quantile 0.6 of 11 values comes out as 1 + 1e-15
    B = natural_spline(ages, df=5)
    assert B.shape == (11, 3) and np.abs(B).max() < 10
    line = np.column_stack([np.ones(11), B]) @ np.linalg.lstsq(np.column_stack([np.ones(11), B]), ages, rcond=None)[0]
    assert line == pytest.approx(ages, abs=1e-12)


def test_spline_takes_off_what_a_line_leaves():
    adata = table()
    rng = np.random.default_rng(1)
    bend = (adata.obs["age"] - 50) ** 2 / 300
    adata.obs["marker"] = bend + rng.normal(0, 0.5, adata.n_obs)
    adata.X = sp.csr_matrix(np.maximum(0, bend.to_numpy() + rng.normal(0, 0.5, adata.n_obs))[:, None])
    for method in ("pearson", "spearman"):
        how = {"unit": "patient", "method": method}
        line = associate(adata, "marker", covariates=["age"], **how)["estimate"][0]
        curve = associate(adata, "marker", covariates=["spline(age, df=4)"], **how)["estimate"][0]
        assert line > 0.7 and abs(curve) < 0.3
    sample = associate(adata, "marker", unit="sample", covariates=["spline(age)", "site"], method="pearson")
    B = np.column_stack([natural_spline(adata.obs["age"], df=3), pd.get_dummies(adata.obs["site"]).to_numpy(float)])
    expected = partial_correlation(adata.X, adata.obs["marker"].to_numpy(), B).iloc[0]
    assert sample["estimate"][0] == pytest.approx(expected["r"], rel=1e-10)


def test_spelling_of_covariates():
    assert [column_of(c) for c in ("age", "spline(age)", "spline( my age , df = 5 )")] == ["age", "age", "my age"]
    obs = pd.DataFrame({"age": np.arange(10.0), "grade": pd.Categorical(list("abcabcabca"), ordered=True)})
    assert design(obs, ["spline(age, df=4)", "grade"]).shape == (10, 6)
    assert design(obs, ["grade"], rank=True).tolist() == design(obs, ["grade"]).tolist()  # ordered levels: dummies
    with pytest.raises(InputError, match="dummies"):
        design(obs, ["spline(grade)"])
    with pytest.raises(InputError, match="at least 1"):
        design(obs, ["spline(age, df=0)"])
    with pytest.raises(InputError, match="'height' is not a column"):
        design(obs, ["spline(height)"])
    with pytest.raises(InputError, match="both a target"):
        associate(table(), "age", unit="patient", covariates=["spline(age)"])


@pytest.mark.parametrize("unit", ["patient", "sample"])
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_a_label_that_a_covariate_determines_is_refused_with_its_name(unit, method):
    adata = table()
    adata.obs["scanner"] = np.where(adata.obs["site"].isin(["site 0", "site 1"]), "A", "B")
    adata.obs["case"] = np.where(adata.obs["scanner"] == "A", "yes", "no")
    with pytest.warns(UserWarning, match="'scanner' determines target 'case'"):
        found = associate(adata, "case", unit=unit, method=method, covariates=["age", "scanner"])
    assert found["status"].tolist() == ["unidentifiable"] and np.isnan(found["p"][0]) and np.isnan(found["estimate"][0])
    assert "'scanner' determines" in found.attrs["biosae"]["targets"]["case"]["unidentifiable"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = associate(adata, "marker", unit=unit, method=method, covariates=["age", "scanner"])
    assert fine["status"].tolist() == ["ok"] and "unidentifiable" not in fine.attrs["biosae"]["targets"]["marker"]


def test_a_latent_that_a_covariate_determines_is_refused():
    adata = table()
    rng = np.random.default_rng(2)
    dose = adata.obs["age"].to_numpy() + rng.normal(0, 1, adata.n_obs)  # R2 0.997, VIF 300
    loose = adata.obs["age"].to_numpy() + rng.normal(0, 12, adata.n_obs)  # VIF about 3
    wide = anndata.AnnData(X=sp.csr_matrix(np.column_stack([dose, np.maximum(0, loose)])), obs=adata.obs)
    found = associate(wide, "marker", unit="patient", method="ols", covariates=["age"])
    assert found["status"].tolist() == ["unidentifiable", "ok"] and np.isnan(found["p"][0])


def test_reason_names_one_several_or_all_together():
    n = 40
    a, b = np.tile([0, 1], n // 2), np.repeat([0, 1], n // 2)
    obs = pd.DataFrame({"a": a.astype(str), "b": b.astype(str), "c": a.astype(str), "d": np.arange(n) % 7.0})
    y = a + 2.0 * b
    assert determined(y, obs, ["a", "d"], target="y") == ""
    assert "'a' and 'b' together determine" in determined(y, obs, ["a", "b"], target="y")
    assert "'a' and 'c' each determine" in determined(a, obs, ["a", "b", "c"], target="y")


def test_overlap_verdicts():
    obs = pd.DataFrame({"case": list("yynnyynn"), "scanner": list("AABBAABB"), "site": list("abababab"),
                        "ward": list("ssssttuu"), "patient": list("11223344")})  # fmt: skip
    same = overlap(obs, "case", by="scanner")
    assert (
        same.attrs["verdict"] == "determined" and same.attrs["r2"] == pytest.approx(1) and not same.attrs["separable"]
    )
    assert "'scanner' determines 'case'" in same.attrs["reason"]
    crossed = overlap(obs, "case", by="site")
    assert crossed.attrs["verdict"] == "crossed" and crossed.attrs["r2"] == pytest.approx(0)
    some = overlap(obs, "case", by="ward")
    assert some.attrs["verdict"] == "gaps" and some.attrs["empty_cells"] == 2 and some.attrs["r2"] == pytest.approx(0.5)
    assert overlap(obs, "case", by="ward", unit="patient").loc["s"].tolist() == [1, 1]
    nearly = pd.DataFrame({"case": ["y"] * 100 + ["n"] * 100, "scanner": ["A"] * 99 + ["B"] * 101})
    assert overlap(nearly, "case", by="scanner").attrs["verdict"] == "determined"
    y = (nearly["case"] == "y").to_numpy(float)
    expected = np.corrcoef(y, nearly["scanner"] == "A")[0, 1] ** 2
    assert overlap(nearly, "case", by="scanner").attrs["r2"] == pytest.approx(expected)


def test_overlap_needs_two_columns_with_rows():
    obs = pd.DataFrame({"label": ["a", "b"] * 3, "site": [None] * 6})
    with pytest.raises(StatisticsError, match="cannot confound itself"):
        overlap(obs, "label", by="label")
    with pytest.raises(StatisticsError, match="no row has both"):
        overlap(obs, "label", by="site")
