"""Input scaling: its targets, its exact folding, its inverse, and what is reported about the offset of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae.model import SparseAutoencoder
from biosae.sae.normalise import MODES, RIDGE, Normaliser, inverse, moments, offset_report, whitening

few = hypothesis_settings(max_examples=30, deadline=None)
AFFINE = [mode for mode, steps in MODES.items() if steps.rowwise is None]


def table(n=400, d=12, seed=0, offset=20.0):
    """Correlated rows with a large common offset, float32 (n, d)."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) * np.geomspace(10, 0.1, d)[:, None]
    return (rng.normal(size=(n, d)) @ mix + offset * rng.normal(size=d)).astype(np.float32)


def y_of(normaliser, x):
    return normaliser.apply(torch.from_numpy(normaliser.ready(x)))


# ------------------------------------------------------------------------------------------------ moments


@few
@given(st.lists(st.integers(0, 97), max_size=6), st.booleans())
def test_streamed_moments_equal_one_pass(cuts, covariance):
    x = table(97, 5, offset=1000.0)
    found = moments(np.split(x, sorted(cuts)), covariance=covariance)
    exact = x.astype(np.float64)
    assert found.n == 97
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, exact.var(0), rtol=1e-9)
    if covariance:
        np.testing.assert_allclose(found.covariance, np.cov(exact.T, bias=True), rtol=1e-9, atol=1e-9)
    else:
        assert found.covariance is None


def test_moments_survive_an_offset_that_dwarfs_the_spread():
    x = np.random.default_rng(0).normal(size=(10_000, 3)) + 1e7
    for covariance in (False, True):
        np.testing.assert_allclose(moments([x], covariance=covariance).variance, x.var(0), rtol=1e-6)
    with pytest.raises(InputError, match="no training rows"):
        moments([x[:0]])


# ------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reaches_its_target(mode):
    x = table()
    normaliser = Normaliser.fit(mode, [x[:7], x[7:300], x[300:]])
    y, steps = y_of(normaliser, x).double().numpy(), MODES[mode]
    if steps.scale:
        assert np.square(y).sum(1).mean() == pytest.approx(1, rel=1e-5)
    if steps.centre:
        assert np.abs(y.mean(0)).max() < 2e-6 * np.abs(y).max()
    if mode == "none":
        np.testing.assert_array_equal(y, x)
    if mode == "centre":
        np.testing.assert_allclose(y, x - x.mean(0, dtype=np.float64), atol=1e-4)
    if mode == "standardise":
        np.testing.assert_allclose(y.std(0), y.std(0)[0], rtol=1e-4)
    if mode == "unit_mean_square":
        np.testing.assert_allclose(y / y[0, 0], x / np.float64(x[0, 0]), rtol=1e-5)


def test_standardised_rows_do_not_depend_on_the_units_of_columns():
    x = table(400, 6)
    x[:, 4] = 7.0  # constant: stays at zero, and its factor is 1
    units = np.array([1e-3, 1, 50, 1e4, 3, 0.2], np.float32)
    one, other = Normaliser.fit("standardise", [x]), Normaliser.fit("standardise", [x * units])
    np.testing.assert_allclose(y_of(one, x), y_of(other, x * units), atol=2e-5)
    assert one.whiten[4, 4] == 1 and float(y_of(one, x)[:, 4].abs().max()) < 1e-6


def test_whitened_rows_are_uncorrelated_with_the_documented_variances():
    x = table(2000, 8)
    normaliser = Normaliser.fit("whiten", [x])
    z = y_of(normaliser, x).double().numpy() / normaliser.scale
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64), bias=True))[::-1]
    expected = eigenvalues / (eigenvalues + RIDGE * eigenvalues.mean())
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.diag(expected), atol=2e-5)
    assert expected[0] > 0.9 > 0.5 > expected[-1]


def test_whitening_does_not_depend_on_units_or_block_order():
    x = table(300, 6)
    first = y_of(Normaliser.fit("whiten", [x]), x)
    scaled = y_of(Normaliser.fit("whiten", [1000 * x[150:], 1000 * x[:150]]), 1000 * x)
    torch.testing.assert_close(first, scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_whitening_of_fewer_rows_than_features_and_of_dependent_features(n):
    rng = np.random.default_rng(n)
    x = np.repeat(rng.normal(5, 1, (n, 10)), 2, axis=1).astype(np.float32)  # rank <= min(n - 1, 10)
    normaliser = Normaliser.fit("whiten", [x])
    y = y_of(normaliser, x)
    assert torch.isfinite(y).all()
    if n == 1:
        assert normaliser.whiten is None and normaliser.scale == 1 and float(y.abs().max()) == 0
        return
    assert float(y.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    identity = normaliser.whiten @ inverse(normaliser.whiten)
    np.testing.assert_allclose(identity, np.eye(20), atol=1e-10)
    gain = np.linalg.norm(normaliser.whiten, 2)  # the ridge bounds how far unseen directions are blown up
    assert gain <= (RIDGE * x.astype(np.float64).var(0).mean()) ** -0.5 * (1 + 1e-9)


def test_whitening_worked_example_and_refusal():
    # eigenvalues 3 and 1, mean 2, ridge 1/2 adds 1: columns of length 1 / 2 and 1 / sqrt 2
    W = whitening(np.array([[2.0, 1.0], [1.0, 2.0]]), ridge=0.5)
    np.testing.assert_allclose(np.abs(W), np.array([[0.5, 0.5**0.5]] * 2) * 0.5**0.5)
    np.testing.assert_allclose(inverse(W), np.linalg.inv(W), rtol=1e-12)
    with pytest.raises(InputError, match="positive"):
        whitening(np.eye(2), ridge=0.0)
    with pytest.raises(InputError, match="did you mean 'whiten'"):
        Normaliser.fit("whitn", [np.ones((3, 2))])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1234.5678])
def test_rows_without_spread_are_safe(mode, value):
    x = np.full((50, 7), value, np.float32)
    normaliser = Normaliser.fit(mode, [x])
    assert torch.isfinite(y_of(normaliser, x)).all() and normaliser.whiten is None
    if mode != "unit_mean_square" or value == 0:
        assert normaliser.scale == 1


# ------------------------------------------------------------------------------------------------ row-wise


def test_layernorm_and_its_inverse():
    x = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]], np.float32)
    normaliser = Normaliser(np.zeros(3), 1.0, "layernorm")
    u = normaliser.ready(x)
    np.testing.assert_allclose(u, [[-1, 0, 1], [0, 0, 0], [0, 0, 0]], atol=2e-5)  # unbiased deviation of 1,2,3 is 1
    np.testing.assert_allclose(normaliser.restore(u, x), x, rtol=1e-6)


def test_l2_and_its_inverse():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [1e-8, 0.0]], np.float32)
    normaliser = Normaliser(np.zeros(2), 1.0, "l2")
    u = normaliser.ready(x)
    np.testing.assert_allclose(u, [[0.6, 0.8], [0, 0], [0.01, 0]], rtol=1e-6)  # the norm is at least 1e-6
    np.testing.assert_allclose(normaliser.restore(u, x), x, rtol=1e-6)
    assert u.dtype == np.float32


@pytest.mark.parametrize("mode", ["layernorm", "l2"])
def test_row_wise_modes_ignore_the_scale_of_each_row(mode):
    x = table(60, 9, offset=1.0)
    factor = np.geomspace(0.1, 1000, 60, dtype=np.float32)[:, None]
    normaliser = Normaliser.fit(mode, [x])
    np.testing.assert_allclose(normaliser.ready(x * factor), normaliser.ready(x), rtol=1e-3, atol=1e-3)
    for rows in (x, x * factor):
        np.testing.assert_allclose(normaliser.restore(normaliser.ready(rows), rows), rows, rtol=1e-4, atol=1e-4)


def test_a_mode_without_row_wise_part_leaves_rows_as_they_are():
    x = table(5, 3)
    normaliser = Normaliser.fit("whiten", [x])
    assert normaliser.ready(x) is x and normaliser.restore(x, None) is x


def test_format_1_says_row_wise_by_true_or_false():
    assert Normaliser(np.zeros(2), 1.0, True).rowwise == "layernorm"
    assert Normaliser(np.zeros(2), 1.0, False).rowwise is None


# ------------------------------------------------------------------------------------------------ folding


def trained(normaliser, u, architecture, *, m=40, k=5, seed=3):
    """A model with arbitrary weights on normalised rows, in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    y = normaliser.apply(u)
    model = SparseAutoencoder(y.shape[1], m, architecture=architecture, k=k)
    model.initialise(y, atoms="random", scale="probes", generator=g)
    with torch.no_grad():
        model.b_enc.normal_(0, 0.01, generator=g)
        model.b_dec.add_(0.05 * torch.randn(y.shape[1], generator=g))
        model.threshold.fill_(0.2)
    return model.eval().requires_grad_(False), y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk"])
def test_folded_model_equals_the_unfolded_one(mode, architecture):
    x = table(300)
    normaliser = Normaliser.fit(mode, [x[:100], x[100:]])
    u = torch.from_numpy(normaliser.ready(x))
    model, y = trained(normaliser, u, architecture)
    model, u, y = model.double(), u.double(), normaliser.apply(u.double())
    _, z, y_hat = model(y)
    back = np.eye(12) if normaliser.whiten is None else np.linalg.inv(normaliser.whiten)
    u_hat = y_hat.numpy() / normaliser.scale @ back + normaliser.mean
    normaliser.fold_(model)
    _, z_folded, u_folded = model(u)
    assert (z > 0).any()
    assert torch.equal(z > 0, z_folded > 0)  # the same latents
    size = float(u.norm(dim=1).max())
    np.testing.assert_allclose(z_folded, z / normaliser.scale, atol=1e-6 * float(z_folded.max()))
    np.testing.assert_allclose(u_folded, u_hat, atol=1e-6 * size)
    lengths = model.W_dec.norm(dim=1).numpy()
    assert (np.ptp(lengths) > 0.1) == (mode in ("whiten", "standardise"))  # atoms keep unit length otherwise
    if mode not in ("whiten", "standardise"):
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_folded_weights_in_single_precision_lose_nothing_that_matters(mode):
    x = table(300, 64, seed=5)
    normaliser = Normaliser.fit(mode, [x])
    u = torch.from_numpy(normaliser.ready(x))
    model, y = trained(normaliser, u, "topk", m=128)
    z, y_hat = model(y)[1:]
    normaliser.fold_(model)
    z_folded, u_folded = model(u)[1:]
    assert ((z > 0) != (z_folded > 0)).sum() <= 2  # near-ties only
    again = normaliser.apply(u_folded)
    assert float((again - y_hat).norm() / y_hat.norm()) < 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (40,)])
def test_one_threshold_or_one_a_latent_is_folded(mode, shape):
    x = table(50)
    normaliser = Normaliser.fit(mode, [x])
    model, _ = trained(normaliser, torch.from_numpy(normaliser.ready(x)), "batchtopk")
    model.threshold = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    before = model.threshold.clone()
    normaliser.fold_(model)
    torch.testing.assert_close(model.threshold, before / normaliser.scale)


@pytest.mark.parametrize("mode", MODES)
def test_unfolding_undoes_folding(mode):
    x = table(200)
    normaliser = Normaliser.fit(mode, [x])
    model, _ = trained(normaliser, torch.from_numpy(normaliser.ready(x)), "batchtopk")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    normaliser.fold_(model)
    normaliser.unfold_(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4 * float(before[name].abs().max()))


# ------------------------------------------------------------------------------------------------ offset


def test_offset_report_worked_example():
    report = offset_report(np.array([3.0, 4.0]), np.array([2.0, 3.0]), mode="none")
    assert report["offset_to_spread"] == pytest.approx(5)  # 25 / 5
    assert report["largest_mean_dimension"] == 1 and report["largest_mean_ratio"] == pytest.approx(4 / 3.5)
    assert report["largest_variance_dimension"] == 1 and report["largest_variance_share"] == pytest.approx(0.6)
    assert "5 times" in report["advice"] and "centre_scale" in report["advice"]


@pytest.mark.parametrize("mode", MODES)
def test_advice_to_centre_is_given_where_it_helps(mode):
    far, near = (table(500, 12, offset=offset) for offset in (100.0, 0.1))
    centres = MODES[mode].centre
    assert ("offset" in Normaliser.fit(mode, [far]).offset["advice"]) == (not centres)
    assert Normaliser.fit(mode, [near]).offset["advice"] == ""


def test_report_does_not_change_with_units_and_is_that_of_the_rows():
    x = table(500, 12, offset=3.0).astype(np.float64)
    report = Normaliser.fit("centre_scale", [x]).offset
    direct = np.square(x.mean(0)).sum() / np.square(x - x.mean(0)).sum(1).mean()
    assert report["offset_to_spread"] == pytest.approx(direct)
    assert Normaliser.fit("centre_scale", [1000 * x]).offset["offset_to_spread"] == pytest.approx(direct)


def test_one_dominant_dimension_is_named():
    x = np.random.default_rng(0).normal(size=(1000, 40))
    x[:, 17] = 100 * x[:, 17] + 500
    report = Normaliser.fit("centre_scale", [x]).offset
    assert report["largest_variance_dimension"] == report["largest_mean_dimension"] == 17
    assert report["largest_variance_share"] > 0.99 and report["largest_mean_ratio"] > 1000
    assert "dimension 17" in report["advice"] and "whiten" in report["advice"]
    assert Normaliser.fit("whiten", [x]).offset["advice"] == ""


def test_report_without_spread():
    nothing = offset_report(np.zeros(3), np.zeros(3), mode="none")
    assert nothing["offset_to_spread"] == 0 and nothing["advice"] == ""
    constant = offset_report(np.array([0.0, 0.0, 1.0]), np.zeros(3), mode="none")
    assert constant["offset_to_spread"] == constant["largest_mean_ratio"] == float("inf")


def test_whitened_row_is_the_same_bits_wherever_it_stands():
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 10)).astype(np.float32))
    scaling = Normaliser.fit("whiten", [rows.numpy()])
    whole = scaling.apply(rows)
    alone = torch.zeros(256, 10)
    for i in range(256):
        alone[0] = rows[i]
        assert torch.equal(scaling.apply(alone)[0], whole[i])
