"""Kendall's tau-b: worked number, scipy, all orders listed, and error rates for rows of the same patient."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biosae.errors import InputError
from biosae.stats import associate, kendall_tau
from biosae.stats.correlation import as_columns
from biosae.stats.kendall import concordance, exact_pvalue, kendall_columns

FREE = {"unit": "sample", "assume_independent": True, "method": "kendall", "controls": False}


def samples(X, patient=None, **columns):
    obs = pd.DataFrame(columns, index=[f"s{i}" for i in range(len(X))])
    if patient is not None:
        obs["patient"] = np.asarray(patient).astype(str)
    return anndata.AnnData(X=sp.csr_matrix(np.asarray(X, float)), obs=obs)


def test_worked_number():
    x, y = np.array([0, 0, 0, 0, 1.5, 2, 0, 3]), np.array([1.0, 0, 2, 1, 3, 5, 0, 4])
    for X in (x[:, None], sp.csr_matrix(x[:, None])):
        found = kendall_tau(X, y)
        assert found["tau"][0] == pytest.approx(0.7396003, abs=5e-8)
        reference = stats.kendalltau(x, y, method="asymptotic")
        assert found["p"][0] == pytest.approx(reference.pvalue, rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 4), st.integers(0, 5)), min_size=0, max_size=60))
def test_scores_of_rows_are_those_of_all_pairs(rows):
    x, y = (np.array([r[k] for r in rows], float) for k in (0, 1))
    pairs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    np.testing.assert_array_equal(concordance(x, y), pairs.sum(axis=1))


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 50), st.integers(0, 10**6), st.floats(0, 1))
def test_agrees_with_scipy_on_sparse_columns(n, seed, density):
    rng = np.random.default_rng(seed)
    X = rng.integers(-2, 5, (n, 4)) * (rng.random((n, 4)) < density).astype(float)
    y = rng.integers(0, 7, n).astype(float)
    found, dense = kendall_tau(sp.csr_matrix(X), y), kendall_tau(X, y)
    for j in range(4):
        reference = stats.kendalltau(X[:, j], y, method="asymptotic")
        for one in (found, dense):
            assert one["tau"][j] == pytest.approx(reference.statistic, abs=1e-12, nan_ok=True)
            assert one["p"][j] == pytest.approx(reference.pvalue, rel=1e-9, abs=1e-300, nan_ok=True)
    turned = kendall_tau(sp.csr_matrix(np.sign(X) * np.sqrt(np.abs(X))), np.exp(y))
    np.testing.assert_allclose(turned["tau"], found["tau"], atol=1e-12)  # only order counts


def test_exact_p_without_ties_is_that_of_all_orders():
    for n in (3, 6):
        orders = np.array(list(itertools.permutations(range(n))))
        S = np.array([concordance(np.arange(n), o).sum() / 2 for o in orders])
        for value in np.unique(S):
            assert exact_pvalue(value, n) == pytest.approx((np.abs(S) >= abs(value)).mean(), rel=1e-12) or value == 0
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    reference = stats.kendalltau(x, y, method="exact")
    S = concordance(x, y).sum() / 2
    assert exact_pvalue(S, 30) == pytest.approx(reference.pvalue, rel=1e-10)


def test_rows_of_associate():
    rng = np.random.default_rng(1)
    y = rng.normal(size=30)
    X = np.column_stack([rng.random(30), np.maximum(0, y + rng.normal(size=30)), np.zeros(30)])
    table = associate(samples(X, y=y), "y", **FREE).set_index("latent")
    first = stats.kendalltau(X[:, 0], y, method="exact")
    assert table["estimate"].iloc[0] == pytest.approx(first.statistic, rel=1e-12)
    assert table["p"].iloc[0] == pytest.approx(first.pvalue, rel=1e-9)
    second = stats.kendalltau(X[:, 1], y, method="asymptotic")
    assert table["p"].iloc[1] == pytest.approx(second.pvalue, rel=0.5) and table["p"].iloc[1] >= second.pvalue
    assert (table["ci_low"].iloc[:2] < table["estimate"].iloc[:2]).all()
    assert table["status"].tolist() == ["ok", "ok", "dead"] and (table["effect"] == "kendall_tau").all()
    assert (table["ci_low"].iloc[1] > 0) == (table["p"].iloc[1] < 0.05)


def test_few_units_are_permuted():
    x, y = np.array([1.0, 2, 3, 4, 5, 0, 0]), np.array([1.0, 2, 4, 3, 5, 0, 0])
    table = associate(samples(x[:, None], y=y), "y", min_active=1, min_active_groups=1, **FREE)
    orders = np.array(list(itertools.permutations(y)))
    S = (np.sign(x[:, None] - x) * np.sign(orders[:, :, None] - orders[:, None])).sum(axis=(1, 2))
    own = (np.sign(x[:, None] - x) * np.sign(y[:, None] - y)).sum()
    assert table["p"][0] == pytest.approx((np.abs(S) >= abs(own)).mean(), rel=1e-9)


def test_a_shortlist_and_no_more():
    X = np.ones((30, 501))
    with pytest.raises(InputError, match="at most 500 columns"):
        associate(samples(X, y=np.arange(30.0)), "y", **FREE)
    with pytest.raises(InputError, match="takes no covariates"):
        associate(samples(X[:, :2], y=np.arange(30.0), age=np.arange(30.0)), "y", covariates=["age"], **FREE)


def test_error_of_tau_is_that_of_the_jackknife():
    """Leaving out one row, or one group, at a time: the same standard error to first order."""
    rng = np.random.default_rng(2)
    n, G = 400, 40
    codes = np.repeat(np.arange(G), n // G)
    x = np.maximum(0, rng.normal(size=n) + 0.5 * rng.normal(size=G)[codes])
    y = np.round(2 * (x + rng.normal(size=n) + 0.5 * rng.normal(size=G)[codes]))
    V = as_columns(sp.csr_matrix(x[:, None]))
    for of, k in ((np.arange(n), n), (codes, G)):
        left = np.array([stats.kendalltau(x[of != g], y[of != g]).statistic for g in range(k)])
        jackknife = np.sqrt((k - 1) / k * ((left - left.mean()) ** 2).sum())
        grouped = (None, 0) if k == n else (codes, G)
        assert kendall_columns(V, y, *grouped)["se"][0] == pytest.approx(jackknife, rel=0.03)


def test_copies_of_patients_add_nothing():
    """Ten copies of 40 rows, grouped: p not below that of the 40."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=40)
    X = np.maximum(0, y[:, None] + rng.normal(size=(40, 5)))
    alone = associate(samples(X, y=y), "y", **FREE)
    many = samples(np.repeat(X, 10, axis=0), np.repeat(np.arange(40), 10), y=np.repeat(y, 10))
    copied = associate(many, "y", unit="sample", method="kendall", controls=False)
    assert (copied["p"] > 0.5 * alone["p"]).all()
    width = (copied["ci_high"] - copied["ci_low"]) / (alone["ci_high"] - alone["ci_low"])
    assert (width > 0.85).all() and (width < 1.3).all()
    free = associate(many, "y", **FREE)
    assert (free["p"] < 1e-4 * copied["p"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("G", "rows"), [(12, 20), (40, 10)])
def test_error_rate_with_dependent_rows(constant, G, rows):
    """True nulls, latents and target both alike within patients: 5 % of p below 0.05, 95 % of intervals hold 0."""
    rng = np.random.default_rng(4)
    p, held = [], []
    codes = np.repeat(np.arange(G), rows)
    for _ in range(60):
        X = np.maximum(0, rng.normal(size=(G * rows, 40)) + rng.normal(size=(G, 40))[codes] - 0.5)
        y = rng.normal(size=G)[codes] + (0 if constant else rng.normal(size=G * rows))
        table = associate(samples(X, codes, y=y), "y", unit="sample", method="kendall", controls=False)
        p += table["p"].tolist()
        held += ((table["ci_low"] < 0) & (table["ci_high"] > 0)).tolist()
    rate = np.mean(np.array(p) < 0.05)
    print(constant, G, rate, np.mean(held))
    assert 0.005 < rate < 0.065
    assert np.mean(held) > 0.92
