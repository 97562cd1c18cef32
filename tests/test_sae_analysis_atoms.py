"""Angles between atoms: worked numbers, invariances, brute force and bounds that must hold."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae import analysis
from biosae.sae.analysis import (
    atomic_inner_product,
    babel,
    babel_selected,
    coherence,
    effective_rank,
    isometry,
    isometry_bound,
    second_moment_metric,
    support_window,
    threshold_codes,
    unique_sparsity,
    uniqueness_share,
)

few = hypothesis_settings(max_examples=25)
TWO = np.array([[1.0, 0.0], [0.6, 0.8]])


def table(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def sparse_codes(n: int, m: int, k: int, seed: int) -> scipy.sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    z = np.zeros((n, m))
    for row in z:
        row[rng.choice(m, k, replace=False)] = rng.uniform(0.5, 2, k)
    return scipy.sparse.csr_matrix(z)


# ------------------------------------------------------------------------------------------------- worked numbers


def test_two_atoms():
    found = coherence(TWO)
    assert found.mu == pytest.approx(0.6) and found.pair == (0, 1) and found.n_pairs == 1 and not found.sampled
    assert found.unique_sparsity == 1 and pytest.approx(4 / 3) == (1 + 1 / 0.6) / 2
    np.testing.assert_allclose(babel(TWO), [0.6])
    assert isometry_bound(0.6, 2) == pytest.approx(0.6)
    codes = threshold_codes([[1.0, 0.0]], TWO, threshold=0.8)
    assert codes.toarray().tolist() == [[1, 0]]
    np.testing.assert_allclose(threshold_codes([[1.0, 0.0]], TWO, threshold=0.5).toarray(), [[1, 0.6]], rtol=1e-6)
    assert support_window(0.6, k=1, low=1, high=1) == pytest.approx((0.6, 1.0))
    assert support_window(0.6, k=2, low=1, high=1) is None


@pytest.mark.parametrize(
    ("mu", "k"), [(1.0, 0), (0.999, 1), (0.6, 1), (1 / 3 - 1e-9, 2), (1 / 3 + 1e-9, 1), (0.01, 50)]
)
def test_unique_sparsity_is_the_largest_that_meets_the_bound(mu, k):
    assert unique_sparsity(mu) == k
    assert not mu < 1 / (2 * (k + 1) - 1) and (k == 0 or mu < 1 / (2 * k - 1))


def test_orthogonal_atoms_are_unique_at_any_sparsity():
    found = coherence(np.eye(4) * 3)
    assert found.mu == 0 and found.unique_sparsity > 10**9 and found.welch == 0


# ------------------------------------------------------------------------------------------------------ invariance


@few
@given(st.integers(0, 10**6))
def test_inner_products_do_not_change_with_a_linear_map(seed):
    X, D, A = table(200, 5, seed), table(9, 5, seed + 1), table(5, 5, seed + 2) + 3 * np.eye(5)
    before = atomic_inner_product(D, metric=second_moment_metric(X))
    after = atomic_inner_product(D @ A, metric=second_moment_metric((X @ A).astype(np.float64)))
    np.testing.assert_allclose(after, before, atol=1e-3)  # rows pass through float32
    assert np.abs(atomic_inner_product(D @ A) - atomic_inner_product(D)).max() > 0.01  # the Euclidean ones do


def test_metric_is_the_inverse_second_moment_and_the_product_its_definition():
    X, D = table(300, 4, 0).astype(np.float32) + 1, table(6, 4, 1)
    metric = second_moment_metric(X)
    S = np.linalg.inv(X.T.astype(np.float64) @ X / 300)
    np.testing.assert_allclose(metric.matrix, S, rtol=1e-4)
    np.testing.assert_allclose(metric.root @ metric.root.T, metric.matrix, rtol=1e-8)
    assert (metric.ridge, metric.rank, metric.n_rows) == (0, 4, 300)
    u, v = D[0], D[1]
    expected = u @ S @ v / np.sqrt(u @ S @ u * (v @ S @ v))
    assert atomic_inner_product(D, metric=metric)[0, 1] == pytest.approx(expected, rel=1e-4)
    assert atomic_inner_product(D[:1], D[1:2], metric=metric)[0, 0] == pytest.approx(expected, rel=1e-4)


def test_a_singular_moment_gets_a_ridge_and_says_so():
    X = table(6, 10, 0).astype(np.float32)
    metric = second_moment_metric(X)
    assert metric.rank == 6 and metric.ridge == pytest.approx(1e-6 * np.square(X).sum() / 6 / 10, rel=1e-5)
    assert np.isfinite(metric.matrix).all()
    assert second_moment_metric(X, ridge=0.1).ridge == pytest.approx(1e5 * metric.ridge)
    with pytest.raises(InputError, match="rank 6 of 10"):
        second_moment_metric(X, ridge=0.0)
    with pytest.raises(InputError, match="zero"):
        second_moment_metric(np.zeros((5, 3)))


# ------------------------------------------------------------------------------------------------------ brute force


@few
@given(st.integers(0, 10**6), st.integers(3, 8))
def test_babel_and_coherence_by_brute_force(seed, m):
    D = table(m, 4, seed)
    G = np.abs(atomic_inner_product(D))
    found = babel(D)
    for r in range(1, m):
        expected = max(G[j, list(S)].sum() for j in range(m) for S in combinations(sorted({*range(m)} - {j}), r))
        assert found[r - 1] == pytest.approx(expected)
    about = coherence(D)
    off = G[np.triu_indices(m, 1)]
    assert about.mu == pytest.approx(off.max()) == found[0] and G[about.pair] == pytest.approx(about.mu)
    assert about.mean == pytest.approx(off.mean()) and about.rms == pytest.approx(np.sqrt(np.square(off).mean()))
    assert about.quantiles[0.5] == pytest.approx(np.quantile(off, 0.5))
    assert about.mu >= about.welch - 1e-12
    assert (found <= np.arange(1, m) * about.mu + 1e-12).all() and (np.diff(found) >= -1e-12).all()


@few
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_selected_sets_stay_within_the_bounds(seed, k):
    D, Z = table(20, 8, seed), sparse_codes(15, 20, k, seed + 1)
    unit = D / np.linalg.norm(D, axis=1, keepdims=True)
    selected, delta = babel_selected(D, Z), isometry(D, Z)
    assert (delta <= selected + 1e-9).all()  # Gershgorin, set by set
    if k > 1:
        assert selected.max() <= babel(D)[k - 2] + 1e-9
        assert delta.max() <= isometry_bound(coherence(D).mu, k) + 1e-9
    else:
        assert not selected.any() and not delta.any()
    z = Z.toarray()
    ratio = np.square(z @ unit).sum(1) / np.square(z).sum(1)
    assert (np.abs(ratio - 1) <= delta + 1e-9).all()  # what restricted isometry says


def test_quantiles_of_sampled_pairs(monkeypatch):
    D = table(200, 16, 0)
    exact = coherence(D)
    monkeypatch.setattr(analysis.atoms, "MOST_PAIRS", 5_000)
    monkeypatch.setattr(analysis.atoms, "BLOCK", 64)
    found = coherence(D, random_state=0)
    assert found.sampled and found.n_pairs == 5_000 and found.mu == exact.mu and found.pair == exact.pair
    assert found.quantiles[0.9] == pytest.approx(exact.quantiles[0.9], abs=0.03)


def test_zero_atoms_are_left_out():
    D = np.vstack([np.zeros((1, 2)), TWO])
    assert coherence(D).pair == (1, 2) and coherence(D).n_pairs == 1
    assert not atomic_inner_product(D)[0].any()
    with pytest.raises(InputError, match="two"):
        coherence(D[:2])
    with pytest.raises(InputError, match="columns"):
        coherence(TWO, metric=second_moment_metric(table(20, 3, 0)))


# ------------------------------------------------------------------------------------------------------ uniqueness


def test_uniqueness_share():
    assert uniqueness_share(np.eye(5), sparse_codes(10, 5, 5, 0)).share == 1
    twice = np.vstack([np.eye(3), np.eye(3)])  # 3 of 15 pairs coincide, the others are orthogonal
    found = uniqueness_share(twice, sparse_codes(10, 6, 2, 0))
    # the 15 sorted values are at q = i / 14: 0 up to 11 / 14 and 1 from 12 / 14; mu_q < 1/3 up to a third of that step
    assert found.share == pytest.approx((11 + 1 / 3) / 14, abs=1e-9) and found.k == 2
    assert found.mu == pytest.approx(1 / 3)
    assert uniqueness_share(np.ones((4, 2)), sparse_codes(5, 4, 1, 0)).share == 0
    with_zero = scipy.sparse.vstack([sparse_codes(9, 6, 2, 0), scipy.sparse.csr_matrix((3, 6))])
    assert uniqueness_share(twice, with_zero).zero_rows == 3
    with pytest.raises(InputError, match="active"):
        uniqueness_share(twice, scipy.sparse.csr_matrix((3, 6)))


@few
@given(st.integers(0, 10**6))
def test_uniqueness_share_is_where_the_bound_is_met(seed):
    rng = np.random.default_rng(seed)
    D, Z = table(15, 30, seed), sparse_codes(30, 15, int(rng.integers(1, 4)), seed)
    found = uniqueness_share(D, Z)
    values = np.abs(atomic_inner_product(D))[np.triu_indices(15, 1)]
    l0 = Z.getnnz(1)
    for q in np.linspace(0, 1, 41):
        holds = np.quantile(values, q) < 1 / (2 * np.quantile(l0, q) - 1)
        assert holds == (q <= found.share) or abs(q - found.share) < 1e-9


@few
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_thresholds_in_the_window_recover_supports(seed, k):
    rng = np.random.default_rng(seed)
    D = np.linalg.qr(table(40, 40, seed))[0][:12] + 0.008 * table(12, 40, seed + 1)
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    mu, Z = coherence(D).mu, sparse_codes(30, 12, k, seed).toarray()
    low, high = Z[Z > 0].min(), Z.max()
    window = support_window(mu, k=k, low=low, high=high)
    assert (window is not None) == (low > mu * (2 * k - 1) * high)
    if window:
        tau = window[0] + rng.uniform(0.05, 0.95) * (window[1] - window[0])
        np.testing.assert_array_equal(threshold_codes(Z @ D, D, threshold=tau).toarray() > 0, Z > 0)


def test_threshold_codes_in_the_metric_recover_orthogonal_atoms_with_values():
    """With codes of equal and uncorrelated second moments the metric makes any basis orthogonal."""
    rng = np.random.default_rng(0)
    D = table(6, 6, 1) + 2 * np.eye(6)
    Z = np.eye(6)[rng.integers(0, 6, 60)]
    metric = second_moment_metric(Z @ D)
    assert coherence(D, metric=metric).mu < 1e-3 < coherence(D).mu
    codes = threshold_codes(Z @ D, D, threshold=0.5, metric=metric).toarray()
    np.testing.assert_array_equal(codes > 0, Z > 0)
    assert coherence(D, metric=metric).unique_sparsity > 100


# --------------------------------------------------------------------------------------------------- effective rank


def test_effective_rank():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((9, 4))) == pytest.approx(1)
    assert effective_rank(np.zeros((3, 4))) == 0
    a = np.array([3.0, 1.0])
    share = a**2 / np.square(a).sum()
    assert effective_rank(np.diag(a)) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@few
@given(st.integers(0, 10**6))
def test_effective_rank_of_wide_and_tall_tables(seed):
    Z = sparse_codes(12, 20, 3, seed)
    assert effective_rank(Z) == pytest.approx(effective_rank(Z.T))
    assert effective_rank(Z) == pytest.approx(effective_rank(5 * Z.toarray()))
    assert 1 - 1e-9 <= effective_rank(Z) <= 12 + 1e-9
