"""Strata combined: closed forms, and numbers of R's metafor 3.8-1 (``rma(yi, vi, method, test)``)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biosae.errors import InputError
from biosae.stats import combine

Y = np.array([0.10, 0.50, 0.90, 0.20, 0.70])
V = np.array([0.02, 0.03, 0.01, 0.05, 0.02])
#           estimate, se, p, tau2, i2
METAFOR = {
    ("fixed", "dl", False): (0.594736842105, 0.0628280862438, 2.90491934474e-21, 0, 0.843298969072),
    ("fixed", "dl", True): (0.594736842105, 0.158714974761, 0.0199956045882, 0, 0.843298969072),
    ("random", "dl", False): (0.497286110485, 0.166838194404, 0.00287638196051, 0.114405594406, 0.843298969072),
    ("random", "dl", True): (0.497286110485, 0.152026838834, 0.030758974534, 0.114405594406, 0.843298969072),
    ("random", "reml", False): (0.499738350012, 0.155839255952, 0.00134241160401, 0.096825693343, 0.819969995788),
    ("random", "reml", True): (0.499738350012, 0.152346086754, 0.0304926138831, 0.096825693343, 0.819969995788),
    ("random", "pm", False): (0.500597678812, 0.152456850827, 0.00102513262877, 0.0916692780611, 0.811749631431),
    ("random", "pm", True): (0.500597678812, 0.152456850827, 0.0303994990933, 0.0916692780611, 0.811749631431),
}  # fmt: skip


def one(y=Y, v=V, **how):
    return {k: float(a[0]) for k, a in combine(np.asarray(y)[:, None], np.asarray(v)[:, None], **how).items()}


@pytest.mark.parametrize(("effects", "method", "hartung_knapp"), list(METAFOR))
def test_numbers_of_metafor(effects, method, hartung_knapp):
    got = one(effects=effects, method=method, hartung_knapp=hartung_knapp)
    expected = METAFOR[effects, method, hartung_knapp]
    np.testing.assert_allclose([got[k] for k in ("estimate", "se", "p", "tau2", "i2")], expected, rtol=1e-8)


def test_fixed_effect_by_hand():
    got, w = one(), 1 / V
    mean = (w @ Y) / w.sum()
    q = w @ (Y - mean) ** 2
    assert got["estimate"] == pytest.approx(mean, rel=1e-14)
    assert got["se"] == pytest.approx(w.sum() ** -0.5, rel=1e-14)
    assert got["q"] == pytest.approx(q, rel=1e-14)
    assert got["p_heterogeneity"] == pytest.approx(stats.chi2.sf(q, 4), rel=1e-12)
    assert got["i2"] == pytest.approx(1 - 4 / q, rel=1e-12)
    assert (got["n_strata"], got["n_same_sign"], got["df"]) == (5, 5, np.inf)


def test_equal_variances_have_closed_forms():
    """With equal v all three estimators give ``max(0, s^2 - v)`` and Hartung-Knapp is the one-sample t test."""
    for method in ("dl", "reml", "pm"):
        got = one(Y, np.full(5, 0.03), effects="random", method=method, hartung_knapp=True)
        assert got["tau2"] == pytest.approx(Y.var(ddof=1) - 0.03, rel=1e-9)
        t = stats.ttest_1samp(Y, 0)
        assert got["p"] == pytest.approx(t.pvalue, rel=1e-9)
        low, high = t.confidence_interval(0.95)
        assert (got["ci_low"], got["ci_high"]) == pytest.approx((low, high), rel=1e-9)
        half = stats.t.ppf(0.975, 3) * np.sqrt(Y.var(ddof=1) / 5 + got["tau2"])
        assert got["prediction_high"] - got["estimate"] == pytest.approx(half, rel=1e-9)


def test_columns_are_on_their_own_and_missing_strata_left_out():
    rng = np.random.default_rng(0)
    y, v = rng.normal(0.3, 0.4, (6, 40)), rng.gamma(2, 0.02, (6, 40))
    y[rng.random((6, 40)) < 0.2] = np.nan
    v[0, :3] = [0.0, np.inf, np.nan]
    y[:, 5], y[1:, 6] = np.nan, np.nan
    for how in ({}, {"effects": "random", "method": "reml"}, {"effects": "random", "method": "pm"}):
        together = combine(y, v, **how)
        for j in range(40):
            kept = np.isfinite(y[:, j]) & np.isfinite(v[:, j]) & (v[:, j] > 0)
            if not kept.any():
                assert np.isnan([a[j] for k, a in together.items() if not k.startswith("n_") and k != "df"]).all()
                continue
            alone = one(y[kept, j], v[kept, j], **how)
            for name, value in alone.items():
                np.testing.assert_allclose(together[name][j], value, rtol=1e-7, atol=1e-12, err_msg=name)


def test_one_stratum_is_itself():
    got = one([0.4], [0.04], effects="random", method="reml")
    assert (got["estimate"], got["se"]) == pytest.approx((0.4, 0.2))
    assert np.isnan([got["p_heterogeneity"], got["i2"], got["prediction_low"]]).all() and got["tau2"] == 0
    assert np.isnan(one([0.4], [0.04], hartung_knapp=True)["p"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 2)), min_size=2, max_size=8),
    st.sampled_from(["dl", "reml", "pm"]),
    st.floats(0.1, 50),
)
def test_properties(rows, method, scale):
    y, v = map(np.array, zip(*rows))
    fixed, random = one(y, v), one(y, v, effects="random", method=method)
    for got in (fixed, random):
        assert y.min() - 1e-9 <= got["estimate"] <= y.max() + 1e-9
        assert 0 <= got["i2"] < 1 and got["tau2"] >= 0
    assert random["se"] >= fixed["se"] - 1e-12
    if random["tau2"] == 0:
        assert random["estimate"] == pytest.approx(fixed["estimate"], abs=1e-12)
    scaled = one(y * scale, v * scale**2, effects="random", method=method)
    assert scaled["estimate"] == pytest.approx(scale * random["estimate"], rel=1e-5, abs=1e-7 * scale)
    turned = one(-y, v, effects="random", method=method)
    assert turned["estimate"] == pytest.approx(-random["estimate"], rel=1e-6, abs=1e-9)
    assert turned["p"] == pytest.approx(random["p"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("method", ["dl", "reml", "pm"])
def test_where_sites_differ_fixed_effects_claim_too_much(method):
    """True mean 0, effects of 8 sites with variance 0.1: fixed errs in far more than 5 %, Hartung-Knapp in about 5."""
    rng = np.random.default_rng(3)
    v = np.repeat(rng.uniform(0.01, 0.1, (8, 1)), 4000, axis=1)
    y = rng.normal(size=v.shape) * np.sqrt(v + 0.1)
    assert (combine(y, v)["p"] < 0.05).mean() > 0.2
    random = combine(y, v, effects="random", method=method, hartung_knapp=True)
    assert 0.04 < (random["p"] < 0.05).mean() < 0.065
    new = rng.normal(size=4000) * np.sqrt(0.1)
    inside = (random["prediction_low"] < new) & (new < random["prediction_high"])
    assert 0.9 < inside.mean() < 0.98


def test_wrong_input_is_refused():
    for bad in ({"effects": "mixed"}, {"method": "ml"}):
        with pytest.raises(InputError, match="Valid"):
            combine(np.ones((2, 1)), np.ones((2, 1)), **bad)
    with pytest.raises(InputError, match="negative"):
        combine(np.ones((2, 1)), -np.ones((2, 1)))
    with pytest.raises(InputError, match="strata, columns"):
        combine(np.ones(2), np.ones(2))
