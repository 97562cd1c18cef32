"""Quality numbers against their definitions, dense formulas and worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae.metrics import Quality, density_histogram, fvu

few = hypothesis_settings(max_examples=40, deadline=None)


def quality_of(x, x_hat, z, bias, cuts=()):
    quality = Quality(bias, z.shape[1])
    for part in np.split(np.arange(len(x)), cuts):
        quality.update(x[part], x_hat[part], z[part])
    return quality


def random_case(seed=0, n=97, d=5, m=11):
    rng = np.random.default_rng(seed)
    x = rng.normal(100, 1, (n, d))
    z = scipy.sparse.random(n, m, 0.2, random_state=rng, format="csr", dtype=np.float64)
    return x, x + rng.normal(0, 0.3, (n, d)), z, x.mean(0)


def test_metrics_equal_their_definitions():
    x, x_hat, z, bias = random_case()
    x[3] = 0
    found = quality_of(x, x_hat, z, bias).summary()
    error = ((x - x_hat) ** 2).sum(1)
    assert found["fvu"] == pytest.approx(error.sum() / ((x - x.mean(0)) ** 2).sum())
    keep = np.arange(len(x)) != 3
    assert found["zero_rows"] == 1
    assert found["nmse"] == pytest.approx((error[keep] / (x[keep] ** 2).sum(1)).mean())
    dense = z.toarray()
    assert found["l0"] == pytest.approx((dense != 0).sum(1).mean())
    assert found["dead_share"] == pytest.approx((~dense.any(0)).mean())
    assert found["dead_density_bound"] == pytest.approx(3 / len(x))
    u, v = x - bias, x_hat - bias
    assert found["cosine"] == pytest.approx(
        np.mean((u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1))
    )
    # gamma minimises ||v / gamma - u||^2
    gammas = np.linspace(0.5, 1.5, 100_001)
    sums = (v * v).sum() / gammas**2 - 2 * (u * v).sum() / gammas
    assert found["gamma"] == pytest.approx(gammas[sums.argmin()], abs=1e-4)


def test_shrunken_reconstruction_has_gamma_below_one():
    x, _, z, bias = random_case()
    assert quality_of(x, bias + 0.8 * (x - bias), z, bias).summary()["gamma"] == pytest.approx(0.8)


@few
@given(st.lists(st.integers(1, 96), max_size=6), st.integers(0, 10_000))
def test_streamed_metrics_equal_one_pass(cuts, seed):
    case = random_case(seed)
    whole, parts = quality_of(*case), quality_of(*case, cuts=sorted(set(cuts)))
    for name, value in whole.summary().items():
        assert parts.summary()[name] == pytest.approx(value, rel=1e-10)
    np.testing.assert_array_equal(whole.density, parts.density)


def test_fvu_without_spread():
    assert fvu(0.0, 0.0, 0.0) == 0
    assert fvu(0.0, 0.0, 9.0) == 0
    assert fvu(1.0, 0.0, 9.0) == float("inf")
    assert fvu(1.0, 4.0, 9.0) == 0.25


def test_metrics_worked_numbers():
    # about the mean (1, 0): spread 1 + 1 = 2, error 0 + 1 = 1
    x = np.array([[0.0, 0.0], [2.0, 0.0]])
    x_hat = np.array([[0.0, 0.0], [1.0, 0.0]])
    z = scipy.sparse.csr_matrix(np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
    found = quality_of(x, x_hat, z, np.zeros(2)).summary()
    assert found["fvu"] == 0.5
    assert found["nmse"] == 0.25 and found["zero_rows"] == 1  # the zero row is left out: 1 / 4
    assert found["l0"] == 1 and found["dead_share"] == pytest.approx(1 / 3)
    assert found["cosine"] == 1 and found["gamma"] == 0.5  # sum ||x_hat||^2 / sum <x_hat, x> = 1 / 2


def test_stored_zeros_and_empty_blocks_change_nothing():
    x, x_hat, z, bias = random_case()
    stored = z.copy()
    stored.data[::3] = 0
    clean = stored.copy()
    clean.eliminate_zeros()
    assert stored.nnz > clean.nnz
    found = quality_of(x, x_hat, stored, bias, cuts=(0, 5, 5, len(x)))
    assert found.summary() == pytest.approx(quality_of(x, x_hat, clean, bias).summary())
    np.testing.assert_array_equal(found.active, clean.getnnz(0))


def test_density_histogram_worked_example():
    found = density_histogram(np.array([0.0, 0.0, 0.002, 0.1, 0.5, 1.0]))
    edges, counts = np.array(found["log10_edges"]), np.array(found["counts"])
    assert found["dead"] == 2
    np.testing.assert_allclose(edges, np.arange(-12, 1) / 4)
    where = {-2.75: 1, -1.0: 1, -0.5: 1, -0.25: 1}  # log10: -2.699, -1, -0.301, 0
    assert {e: c for e, c in zip(edges, counts) if c} == where


@few
@given(st.lists(st.sampled_from([0.0, 1e-7, 3e-4, 0.02, 0.3, 1.0]), min_size=1))
def test_density_histogram_counts_every_latent_once(density):
    found = density_histogram(np.array(density))
    assert sum(found["counts"]) + found["dead"] == len(density)
    assert len(found["log10_edges"]) == len(found["counts"]) + 1


def test_density_histogram_refuses_counts():
    with pytest.raises(InputError, match="density_"):
        density_histogram(np.array([0.0, 3.0]))
