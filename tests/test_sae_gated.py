"""Gated SAE: worked numbers, dictionary_learning, invariants."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from biosae.errors import InputError
from biosae.sae import SAE
from biosae.sae.methods.base import Now
from biosae.sae.methods.gated import Gated, GatedOptions
from biosae.sae.synthetic import planted

T = torch.tensor
OTHERS = np.load(Path(__file__).parent / "reference" / "methods" / "plain_and_gated.npz")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag")


def reference() -> tuple[Gated, torch.Tensor]:
    method = Gated(6, 16, k=3, options=GatedOptions(l1=0.1))
    with torch.no_grad():
        for name in NAMES:
            getattr(method, name).copy_(torch.from_numpy(OTHERS[name]))
    return method, torch.from_numpy(OTHERS["x"])


def test_worked_number():
    """ReLU(g) = (0.5, 0), z = (3.5, 0), terms 4.25, 0.5 and 1.25; 5.55 with lambda 0.1."""
    method = Gated(2, 2, k=1, options=GatedOptions(l1=0.1))
    with torch.no_grad():
        method.W_enc.copy_(torch.eye(2))
        method.W_dec.copy_(torch.eye(2))
        method.b_enc.fill_(-1)
        method.b_mag.copy_(T([0.5, 0.0]))
        method.r_mag.copy_(T([math.log(2), 0.0]))
    x = T([[1.5, 0.5]])
    assert torch.relu(method.gates(x)[0]).tolist() == [[0.5, 0]]
    loss = method.loss(x, Now(k=1))
    torch.testing.assert_close(loss.z, T([[3.5, 0.0]]))
    assert float(loss.residual.square().sum()) == pytest.approx(4.25)
    assert float(loss.total) == pytest.approx(5.55)
    assert float(method.loss(x, Now(k=1, ramp=0.0)).total) == pytest.approx(5.5)  # 4.25 + 1.25


def test_loss_codes_and_gradients_equal_dictionary_learning():
    method, x = reference()
    loss = method.loss(x, Now(k=3))
    found = {"loss": loss.total, "codes": method.encode(x), "x_hat": loss.residual + x}
    assert torch.equal(loss.z, found["codes"].detach())
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), torch.from_numpy(OTHERS[f"gated.{name}"]), atol=1e-5, rtol=1e-5)
    loss.total.backward()
    for name in NAMES:
        expected = torch.from_numpy(OTHERS[f"gated.by_{name}"])
        torch.testing.assert_close(getattr(method, name).grad, expected, atol=1e-5, rtol=1e-5)


def test_equal_biases_and_no_magnitude_give_the_relu_sae():
    method, x = reference()
    with torch.no_grad():
        method.r_mag.zero_()
        method.b_mag.copy_(method.b_enc)
    torch.testing.assert_close(method.encode(x), torch.relu(method.preactivations(x)))


def test_the_gate_is_a_jumprelu_on_the_magnitude():
    """z = m 1[m > theta] with theta = b_mag - exp(r_mag) b_gate, where that is not negative."""
    method, x = reference()
    with torch.no_grad():
        method.b_mag.copy_(method.r_mag.exp() * method.b_enc + torch.linspace(0, 0.5, 16))
    m = method.r_mag.exp() * ((x - method.b_dec) @ method.W_enc.T) + method.b_mag
    theta = method.b_mag - method.r_mag.exp() * method.b_enc
    expected = torch.where(m > theta, m, torch.zeros_like(m))
    found = method.encode(x)
    open_at_zero = (m > theta) & (m <= 0)  # rounding at theta = 0
    torch.testing.assert_close(found, expected.clamp(min=0), atol=1e-6, rtol=1e-5)
    assert int((found > 0).sum()) > 10 and int(open_at_zero.sum()) == 0


def test_the_decoder_learns_from_the_codes_alone():
    """The third term holds W_dec and b_dec fixed: their gradient is that of the squared error of z."""
    method, x = reference()
    method.loss(x, Now(k=3)).total.backward()
    z = method.encode(x).detach()
    error = 2 * (method.decode(z) - x).detach() / len(x)
    torch.testing.assert_close(method.W_dec.grad, z.T @ error, atol=1e-5, rtol=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(InputError, match="l1=-0"):
        GatedOptions(l1=-0.1).check()


def test_codes_are_not_shrunken_on_planted_rows():
    """At fewer active latents than ReLU + L1 the error is smaller, and reconstructions have their full length."""
    rows = planted("sparse", n_rows=2000, d=16, n_atoms=24, k=2, random_state=0).rows
    common = {
        "n_latents": 24, "n_steps": 300, "batch_size": 256, "learning_rate": 4e-3, "validation": 0.0,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    gated = SAE("gated", options={"l1": 0.6}, **common).fit(rows).metrics_
    relu = SAE("relu", options={"l1": 0.3}, **common).fit(rows).metrics_
    assert gated["l0"] < relu["l0"] and gated["fvu"] < 0.8 * relu["fvu"]
    assert abs(gated["gamma"] - 1) < 0.02 and relu["gamma"] < 0.85
