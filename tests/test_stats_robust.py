"""Robust errors: worked numbers, statsmodels, Welch's t, and every sign vector refitted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from biosae.errors import InputError
from biosae.stats.regression import fit_logistic, fit_ols
from biosae.stats.robust import cr2, sandwich, wild_bootstrap

X8 = np.array([1, 2, 3, 4, 6, 7, 8, 9.0])
Y8 = np.array([2, 1, 4, 3, 7, 9, 8, 10.0])
G8 = np.repeat(np.arange(4), 2)


def _nested(seed: int, G: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(G), rng.integers(2, 9, G))
    X = np.column_stack([np.ones(len(codes)), rng.normal(size=G)[codes], rng.normal(size=len(codes))])
    return X @ [1.0, 0.5, -0.3] + rng.normal(size=G)[codes] + rng.normal(size=len(codes)), X, codes


def test_worked_example_of_eight_rows_in_four_groups() -> None:
    X = np.column_stack([np.ones(8), X8])
    found = fit_ols(Y8, X)
    se = {k: np.sqrt(sandwich(found["bread"], found["scores"], codes=G8, kind=k)[1, 1]) for k in ("cr0", "cr1")}
    assert found["coef"][1] == pytest.approx(1.1166667, abs=1e-7)
    assert np.sqrt(found["cov"][1, 1]) == pytest.approx(0.1412576, abs=1e-7)
    assert se["cr0"] == pytest.approx(0.0635255, abs=1e-7)
    assert se["cr1"] == pytest.approx(0.0792303, abs=1e-7)
    assert 2 * stats.t.sf(found["coef"][1] / se["cr1"], 3) == pytest.approx(0.000774, abs=1e-6)


def test_cluster_and_heteroscedastic_errors_are_those_of_statsmodels() -> None:
    y, X, codes = _nested(0)
    found = fit_ols(y, X)
    cluster = sm.OLS(y, X).fit(cov_type="cluster", cov_kwds={"groups": codes}).cov_params()
    assert np.allclose(sandwich(found["bread"], found["scores"], codes=codes), cluster, rtol=1e-10, atol=0)
    for kind, name in (("cr0", "HC0"), ("cr1", "HC1")):
        expected = sm.OLS(y, X).fit(cov_type=name).cov_params()
        assert np.allclose(sandwich(found["bread"], found["scores"], kind=kind), expected, rtol=1e-10, atol=0)
    assert np.allclose(cr2(X, found["residuals"])[0], sm.OLS(y, X).fit(cov_type="HC2").cov_params(), rtol=1e-9)


def test_logistic_cluster_errors_are_those_of_statsmodels() -> None:
    y, X, codes = _nested(1, G=20)
    y = (y > 0.5).astype(float)
    found = fit_logistic(y, X)
    expected = sm.GLM(y, X, family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": codes}, tol=1e-14
    )
    assert np.allclose(found["coef"], expected.params, rtol=1e-8)
    assert np.allclose(sandwich(found["bread"], found["scores"], codes=codes), expected.cov_params(), rtol=1e-7)


def test_one_row_a_group_is_the_answer_for_independent_rows() -> None:
    y, X, _ = _nested(2)
    own = np.random.default_rng(0).permutation(len(y))
    found = fit_ols(y, X)
    for kind in ("cr0", "cr1"):
        grouped = sandwich(found["bread"], found["scores"], codes=own, kind=kind)
        assert np.allclose(grouped, sandwich(found["bread"], found["scores"], kind=kind), rtol=1e-12)
    for a, b in zip(cr2(X, found["residuals"], codes=own), cr2(X, found["residuals"]), strict=True):
        assert np.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize(("n1", "n0"), [(3, 6), (5, 5)])
def test_cr2_of_two_arms_of_equal_groups_is_welch_on_group_means(n1: int, n0: int) -> None:
    rng = np.random.default_rng(n1)
    codes = np.repeat(np.arange(n1 + n0), 4)
    arm = (codes < n1).astype(float)
    y = rng.normal(size=n1 + n0)[codes] + rng.normal(size=len(codes))
    X = np.column_stack([np.ones(len(y)), arm])
    found = fit_ols(y, X)
    V, df = cr2(X, found["residuals"], codes=codes)
    means = y.reshape(-1, 4).mean(axis=1)
    expected = means[:n1].var(ddof=1) / n1 + means[n1:].var(ddof=1) / n0
    assert V[1, 1] == pytest.approx(expected, rel=1e-10)
    working = (1 / n1 + 1 / n0) ** 2 / (1 / (n1**2 * (n1 - 1)) + 1 / (n0**2 * (n0 - 1)))
    assert df[1] == pytest.approx(working, rel=1e-10)


def test_cr2_where_one_group_alone_determines_a_coefficient() -> None:
    y, X, codes = _nested(3)
    X = np.column_stack([X, codes == 0])
    V, df = cr2(X, fit_ols(y, X)["residuals"], codes=codes)
    without = cr2(X[codes > 0][:, :3], fit_ols(y[codes > 0], X[codes > 0][:, :3])["residuals"], codes=codes[codes > 0])
    assert np.isfinite(V[:3, :3]).all()
    assert V[2, 2] <= without[0][2, 2] * 1.5 and df[2] > 1


def test_order_of_rows_and_names_of_groups_do_not_matter() -> None:
    y, X, codes = _nested(4)
    order = np.random.default_rng(1).permutation(len(y))
    renamed = np.random.default_rng(2).permutation(codes.max() + 1)[codes]
    a = cr2(X, fit_ols(y, X)["residuals"], codes=codes)
    b = cr2(X[order], fit_ols(y[order], X[order])["residuals"], codes=renamed[order])
    assert np.allclose(a[0], b[0], rtol=1e-9) and np.allclose(a[1], b[1], rtol=1e-9)
    one, two = (wild_bootstrap(v, W, codes=c) for v, W, c in ((y, X, codes), (y[order], X[order], renamed[order])))
    assert one["p"] == two["p"] and one["low"] == pytest.approx(two["low"], rel=1e-4)


def test_wild_bootstrap_is_every_sign_vector_refitted() -> None:
    y, X, codes = _nested(5, G=6)
    null = X[:, :-1] @ np.linalg.lstsq(X[:, :-1], y, rcond=None)[0]

    def t(values: np.ndarray) -> float:
        fit = sm.OLS(values, X).fit(cov_type="cluster", cov_kwds={"groups": codes})
        return abs(float(fit.tvalues[-1]))

    signs = itertools.product((-1.0, 1.0), repeat=6)
    drawn = np.array([t(null + np.array(s)[codes] * (y - null)) for s in signs])
    expected = (drawn >= t(y) * (1 - 1e-9)).mean()
    found = wild_bootstrap(y, X, codes=codes)
    assert found["p"] == pytest.approx(expected, abs=1e-12)
    assert abs(found["statistic"]) == pytest.approx(t(y), rel=1e-9)


def test_wild_interval_holds_what_is_not_rejected() -> None:
    y, X, codes = _nested(6, G=12)
    found = wild_bootstrap(y, X, codes=codes)
    for bound, inwards in ((found["low"], 1.0), (found["high"], -1.0)):
        step = inwards * 0.01 * (found["high"] - found["low"])
        inside = wild_bootstrap(y - (bound + step) * X[:, -1], X, codes=codes, interval=False)["p"]
        outside = wild_bootstrap(y - (bound - step) * X[:, -1], X, codes=codes, interval=False)["p"]
        assert outside <= 0.05 < inside


def test_four_groups_cannot_reach_five_percent() -> None:
    y = 3.0 * X8 + 0.01 * Y8
    found = wild_bootstrap(y, np.column_stack([np.ones(8), X8]), codes=G8)
    assert found["p"] >= 1 / 8 and found["low"] == -np.inf and found["high"] == np.inf
    assert "all 8" in found["how"]


def test_webb_weights_have_mean_zero_and_variance_one() -> None:
    from biosae.stats.robust import _webb

    drawn = np.hstack(list(_webb(50, 4000, 0)))
    assert abs(drawn.mean()) < 0.01 and drawn.var() == pytest.approx(1.0, abs=0.01)
    assert len(np.unique(np.round(drawn, 12))) == 6
    y, X, codes = _nested(7)
    assert 0 < wild_bootstrap(y, X, codes=codes, weights="webb")["p"] <= 1


def test_unknown_kinds_are_named() -> None:
    y, X, codes = _nested(8)
    found = fit_ols(y, X)
    with pytest.raises(InputError, match="cr0"):
        sandwich(found["bread"], found["scores"], kind="cr9")
    with pytest.raises(InputError, match="webb"):
        wild_bootstrap(y, X, codes=codes, weights="web")
