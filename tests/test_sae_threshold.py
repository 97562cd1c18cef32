"""Threshold SAE: exact support within the window of thresholds, OverComplete's closed jump, worked numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from biosae.errors import InputError
from biosae.sae import activations
from biosae.sae.methods.plain import JumpReluOptions
from biosae.sae.methods.threshold import Threshold, matched_encoder, threshold_window

T = torch.tensor
few = hypothesis_settings(max_examples=25, deadline=None)
OTHERS = np.load(Path(__file__).parent / "reference" / "methods" / "plain_and_gated.npz")


def solved(atoms: torch.Tensor, metric: torch.Tensor, tau: float) -> Threshold:
    """A threshold SAE with the matched encoder and one threshold for all latents."""
    decoder, encoder = matched_encoder(atoms, metric)
    method = Threshold(atoms.shape[1], len(atoms), k=1, options=JumpReluOptions(threshold=tau)).to(atoms.dtype)
    with torch.no_grad():
        method.W_dec.copy_(decoder)
        method.W_enc.copy_(encoder)
    return method.requires_grad_(False)


def test_worked_number():
    """Atoms e1 and (0.6, 0.8), S = I: coherence 0.6, one atom a row; tau = 0.8 in (0.6, 1): (1, 0.6) -> (1, 0)."""
    atoms = T([[1.0, 0.0], [0.6, 0.8]])
    assert threshold_window(0.6, k=1, smallest=1, largest=1) == (0.6, 1)
    with pytest.raises(InputError, match="no threshold separates 2 atoms"):
        threshold_window(0.6, k=2, smallest=1, largest=1)
    method = solved(atoms, torch.eye(2), 0.8)
    torch.testing.assert_close(method.preactivations(T([[1.0, 0.0]])), T([[1.0, 0.6]]))
    assert method.encode(T([[1.0, 0.0]])).tolist() == [[1, 0]]


def test_a_latent_at_its_threshold_is_open_and_in_jumprelu_it_is_not():
    a, theta = T([[0.5, 0.4]]), T([0.5, 0.5])
    assert activations.jumprelu(a, theta, 0.1, closed=True)[0].tolist() == [[0.5, 0]]
    assert activations.jumprelu(a, theta, 0.1)[0].tolist() == [[0, 0]]


@few
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_support_is_exact_anywhere_in_the_window(seed, k):
    """Unit vectors and Walsh functions, of coherence 1/8, mapped by an invertible A that the metric undoes."""
    rng = np.random.default_rng(seed)
    d, m, coherence = 64, 128, 1 / 8
    atoms = np.vstack([np.eye(d), hadamard(d) / 8])
    assert np.abs(atoms @ atoms.T - np.eye(m)).max() == coherence
    a = np.linalg.qr(rng.normal(size=(d, d)))[0] * rng.uniform(0.3, 3, size=d)
    delta = np.zeros((40, m))
    for row in delta:
        row[rng.choice(m, size=rng.integers(1, k + 1), replace=False)] = 1
    delta *= rng.uniform(1, 1.1, size=delta.shape)
    low, high = threshold_window(coherence, k=k, smallest=1, largest=1.1)
    metric = torch.from_numpy(np.linalg.inv(a.T @ a))
    for share in (0.05, 0.5, 0.95):
        method = solved(torch.from_numpy(atoms @ a), metric, low + share * (high - low))
        codes = method.encode(torch.from_numpy(delta @ atoms @ a))
        np.testing.assert_array_equal((codes != 0).numpy(), delta != 0)


def test_orthogonal_atoms_give_the_values_too():
    g = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    delta = torch.tensor([[0.5, 0, 0, 2, 0, 1], [0, 0, 0.7, 0, 0, 0]], dtype=torch.float64)
    low, high = threshold_window(0.0, k=3, smallest=0.5, largest=2)
    assert (low, high) == (0, 0.5)
    method = solved(atoms, torch.eye(6, dtype=torch.float64), 0.25)
    torch.testing.assert_close(method.encode(delta @ atoms), delta)
    torch.testing.assert_close(method.decode(method.encode(delta @ atoms)), delta @ atoms)


def test_codes_and_gradients_equal_overcomplete():
    """Their rectangle is divided by the bandwidth once more: thresholds move 1 / eps times as fast."""
    a = torch.from_numpy(OTHERS["overcomplete.a"]).requires_grad_(True)
    theta = torch.from_numpy(OTHERS["threshold"]).requires_grad_(True)
    z, _ = activations.jumprelu(a, theta, 0.3, closed=True)
    (z * torch.from_numpy(OTHERS["overcomplete.weights"])).sum().backward()
    for found, name, factor in ((z, "codes", 1), (a.grad, "by_a", 1), (theta.grad / 0.3, "by_threshold", 1)):
        expected = factor * torch.from_numpy(OTHERS[f"overcomplete.{name}"])
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)
    assert (z[0, :4] == theta[:4]).all()  # these lie exactly on their thresholds


@pytest.mark.parametrize("given", [{"coherence": 1.5}, {"k": 0}, {"smallest": 0.0}, {"largest": 0.5}])
def test_the_window_wants_sensible_bounds(given):
    with pytest.raises(InputError, match="needs 0 <= coherence"):
        threshold_window(**{"coherence": 0.1, "k": 1, "smallest": 1.0, "largest": 1.0} | given)
