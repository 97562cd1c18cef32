"""The growth curve against its worked numbers and derivatives; massive dimensions taken out of rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.encoders.massive import massive_values
from biosae.errors import InputError, NotFittedError
from biosae.sae import SAE
from biosae.sae.analysis import MassiveDims, fit_growth, growth_curve, growth_jacobian, growth_peak

CASE = {"A": 10.0, "decay": 0.5, "gamma": 0.01, "t0": 1.0, "K": 2.0}
few = hypothesis_settings(max_examples=20)


def stable(t, *, A, decay, gamma, t0, K):
    """The second parametrisation of the paper."""
    beta, tau, a1 = decay * gamma, t0 / gamma, A * np.exp(-decay * t0)
    return np.exp(-beta * t) * (a1 * np.log(t + tau) + a1 * np.log(gamma)) + K


def test_worked_numbers():
    assert scipy.special.lambertw(2).real == pytest.approx(0.852606, abs=1e-6)
    peak = growth_peak(decay=0.5, gamma=0.01, t0=1)
    assert peak == pytest.approx(134.5751, abs=1e-4)
    assert growth_curve(peak, **CASE) == pytest.approx(4.638609, abs=2e-6)  # given with W rounded to six digits
    assert growth_curve(0, **CASE) == pytest.approx(2)
    assert growth_curve(1e6, **CASE) == pytest.approx(2)  # the limit is K
    t = np.linspace(0, 2000, 200)
    np.testing.assert_allclose(growth_curve(t, **CASE), stable(t, **CASE), atol=1e-9)
    grid = np.linspace(0, 2000, 200_001)
    assert grid[growth_curve(grid, **CASE).argmax()] == pytest.approx(peak, abs=0.01)


def test_the_detector_of_the_encoders_keeps_both_rules():
    for value, massive, ratio in ((120, True, 2400), (90, False, 1800)):
        h = np.full((10, 20), 0.05)
        h[3, 7] = value
        found = massive_values(h)
        assert len(found) == 1 and found["ratio"][0] == pytest.approx(ratio) and bool(found["massive"][0]) is massive


@few
@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(-3, 3))
def test_derivatives(A, decay, gamma, t0, K):
    t, values = np.linspace(0, 4, 9), {"A": A, "decay": decay, "gamma": gamma, "t0": t0, "K": K}
    found = growth_jacobian(t, **values)
    for i, name in enumerate(values):
        h = 1e-6
        up, down = (growth_curve(t, **{**values, name: values[name] + s * h}) for s in (1, -1))
        np.testing.assert_allclose(found[:, i], (up - down) / (2 * h), atol=1e-5)


@few
@given(st.floats(0.1, 3), st.floats(0.01, 2))
def test_peak_is_where_the_derivative_vanishes(decay, t0):
    x = np.exp(scipy.special.lambertw(1 / decay).real)
    peak = growth_peak(decay=decay, gamma=0.5, t0=t0)
    observable = 1 / (decay * scipy.special.lambertw(1 / decay).real) > t0
    assert x == pytest.approx(1 / (decay * scipy.special.lambertw(1 / decay).real))
    assert (peak is not None) == observable
    if observable:
        slope = growth_jacobian(np.array([peak]), A=1, decay=decay, gamma=0.5, t0=t0, K=0)[0, 3]
        assert slope == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "values",
    [CASE, {"A": -40.0, "decay": 0.3, "gamma": 0.02, "t0": 0.5, "K": 100.0}, {**CASE, "decay": 0.05, "gamma": 0.1}],
)
def test_fit_recovers_the_curve(values):
    t = np.linspace(0, 1000, 60)
    y = growth_curve(t, **values)
    found = fit_growth(t, y)
    assert found.r2 > 0.99999
    np.testing.assert_allclose(found.predict(t), y, atol=2e-3 * np.ptp(y))
    expected = growth_peak(decay=values["decay"], gamma=values["gamma"], t0=values["t0"])
    assert found.peak == pytest.approx(expected, rel=0.02)
    assert min(found.aic, key=found.aic.get) == "growth"
    noisy = fit_growth(t, y + 0.03 * np.ptp(y) * np.random.default_rng(0).normal(size=60))
    assert noisy.r2 > 0.95


def test_units_do_not_matter():
    t = np.linspace(0, 1000, 40)
    y = growth_curve(t, **CASE) + 0.1 * np.random.default_rng(0).normal(size=40)
    one, other = fit_growth(t, y), fit_growth(1000 * t, 1e6 * y)
    np.testing.assert_allclose(other.predict(1000 * t), 1e6 * one.predict(t), rtol=1e-5)
    assert other.aic == pytest.approx(one.aic, abs=0.01)


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("logarithm", lambda t: 3 * np.log(t + 20) + 1),
        ("first_order", lambda t: 5 - 4 * np.exp(-t / 150)),
        ("second_order", lambda t: 2 + 3 * (1 - np.exp(-t / 200) * (np.cos(t / 60) + 0.3 * np.sin(t / 60)))),
    ],
)
def test_aic_prefers_the_curve_that_made_the_series(name, curve):
    t, chosen = np.linspace(0, 1000, 60), []
    for seed in range(5):
        aic = fit_growth(t, curve(t) + 0.01 * np.random.default_rng(seed).normal(size=60)).aic
        chosen.append(min(aic, key=aic.get))
    assert chosen.count(name) >= 4  # two parameters too many gain more than 4 in one series of eight


def test_what_a_fit_refuses():
    with pytest.raises(InputError, match="at least 6"):
        fit_growth(np.arange(5), np.arange(5))
    with pytest.raises(InputError, match="t >= 0"):
        fit_growth(np.arange(-1, 8), np.arange(9))
    with pytest.raises(InputError, match="finite"):
        fit_growth(np.arange(8), [np.nan] * 8)
    with pytest.raises(InputError, match="different t"):
        fit_growth(np.ones(8), np.arange(8))
    with pytest.raises(InputError, match="positive"):
        growth_curve(-200, **CASE)
    assert np.isnan(fit_growth(np.arange(8), np.ones(8)).r2)
    assert growth_peak(decay=0, gamma=1, t0=1) is None


# ------------------------------------------------------------------------------------------------ massive dimensions


def massive_rows(n: int = 400) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
    x[:, 5] = 3000 + 40 * x[:, 5]
    return x


def test_mean_and_clamp():
    x = massive_rows()
    flagged = massive_values(x)["dim"].unique()
    assert flagged.tolist() == [5]
    others = np.delete(np.arange(16), 5)
    mean, clamp = (MassiveDims(flagged, how).fit(x[:300]) for how in ("mean", "clamp"))
    replaced, cut = mean.transform(x), clamp.transform(x)
    np.testing.assert_allclose(replaced[:, 5], x[:300, 5].mean(), rtol=1e-6)
    np.testing.assert_allclose(cut[:, 5], np.abs(x[:300, others]).max())
    for out in (replaced, cut):
        np.testing.assert_array_equal(out[:, others], x[:, others])
        assert out.dtype == np.float32 and massive_values(out - out.mean(0)).empty
    assert x[0, 5] > 1000  # the rows given are not changed
    low = x.copy()
    low[:, 5] *= -1
    assert (clamp.transform(low)[:, 5] == -clamp.limit_).all()
    np.testing.assert_array_equal(MassiveDims().fit_transform(x), x)


def test_one_massive_dimension_hides_the_others_from_a_dictionary():
    x = massive_rows(600)
    x[::2, 5] += 500  # so that the mean does not remove it
    options = {"n_latents": 24, "k": 4, "n_steps": 100, "random_state": 0, "device": "cpu", "validation": 0.0}
    others = np.delete(np.arange(16), 5)
    share = {}
    for name, rows in (("as it is", x), ("tamed", MassiveDims([5]).fit_transform(x))):
        sae = SAE(**options).fit(rows)
        x_hat = sae.inverse_transform(sae.codes(rows))
        share[name] = np.square(rows - x_hat)[:, others].sum() / np.square(rows - rows.mean(0))[:, others].sum()
    assert share["as it is"] > 0.8 > 0.6 > share["tamed"]


def test_what_massive_dims_refuse():
    x = massive_rows(50)
    with pytest.raises(NotFittedError):
        MassiveDims([5]).transform(x)
    with pytest.raises(InputError, match="did you mean 'clamp'"):
        MassiveDims([5], how="clam").fit(x)
    with pytest.raises(InputError, match="all among"):
        MassiveDims([16]).fit(x)
    with pytest.raises(InputError, match="nothing"):
        MassiveDims(range(16)).fit(x)
    with pytest.raises(InputError, match="features"):
        MassiveDims([5]).fit(x).transform(x[:, :4])
