"""Gradient-aware TopK: the choice, the downstream gradient, and what the estimator makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae import SAE, load, planted
from biosae.sae.activations import topk
from biosae.sae.methods.base import Now
from biosae.sae.methods.gsae import GradientOptions, GradientSAE, downstream_gradient, sensitive_topk
from biosae.sae.normalise import Normaliser
from biosae.sae.partner import gradients

T = torch.tensor


def test_worked_choice():
    z, q = T([[3.0, 2.0, 1.0]]), T([[0.1, 0.2, 10.0]])
    torch.testing.assert_close(z * (1 + q), T([[3.3, 2.4, 11.0]]))
    assert sensitive_topk(z, q, 1, beta=1.0).tolist() == [[0, 0, 1]]
    assert topk(z, 1).tolist() == [[3, 0, 0]]


@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0, 20))
def test_choice_is_that_of_the_scores_with_the_plain_values(seed, k, beta):
    draw = np.random.default_rng(seed)
    z = np.maximum(draw.standard_normal((6, 8)), 0).astype(np.float32)
    q = np.abs(draw.standard_normal((6, 8))).astype(np.float32)
    found = sensitive_topk(T(z), T(q), k, beta=beta).numpy()
    for i in range(6):
        kept = np.argsort(-(z * (1 + np.float32(beta) * q))[i], kind="stable")[:k]
        expected = np.zeros(8, np.float32)
        expected[kept] = z[i, kept]
        np.testing.assert_array_equal(found[i], expected)


def test_gradients_reach_the_kept_values_only():
    z = T([[3.0, 2.0, 1.0]], requires_grad=True)
    sensitive_topk(z, T([[0.0, 0.0, 10.0]]), 2, beta=1.0).sum().backward()
    assert z.grad.tolist() == [[1, 0, 1]]


def started(beta=1.0):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=generator)
    made = GradientSAE(6, 20, k=3, options=GradientOptions(beta=beta), n_partner=6)
    made.initialise(rows, atoms="random", scale="probes", generator=generator)
    return made, rows, torch.randn(200, 6, generator=generator)


def test_sensitivity_is_the_first_order_effect_of_a_latent():
    """q = |G W_dec^T|: the derivative of the downstream loss by a step along each atom, over the mean norm of G."""
    made, rows, _ = started()
    probe = torch.randn(6, generator=torch.Generator().manual_seed(1))
    gradient = torch.from_numpy(downstream_gradient(lambda x: (x @ probe).tanh(), rows))
    by_step = torch.stack([((rows + 1e-3 * atom) @ probe).tanh() - (rows @ probe).tanh() for atom in made.W_dec], 1)
    q = (by_step / 1e-3).abs() / gradient.norm(dim=1).mean()
    with torch.no_grad():
        z = torch.relu(made.preactivations(rows))
        loss = made.loss(torch.cat([rows, gradient], 1), Now(k=3))
    close = (torch.sort(z * (1 + q), descending=True).values[:, 2:4].diff(dim=1).abs() > 1e-2).squeeze(1)
    assert close.float().mean() > 0.8  # the others are too near to a tie for differences of this precision
    torch.testing.assert_close(loss.z[close], sensitive_topk(z, q, 3, beta=1.0)[close].detach())


@pytest.mark.parametrize("case", ["no table", "zero gradients", "beta 0"])
def test_without_gradients_it_is_topk(case):
    made, rows, gradient = started(beta=0.0 if case == "beta 0" else 1.0)
    given_rows = {"no table": rows, "zero gradients": torch.cat([rows, 0 * gradient], 1)}.get(
        case, torch.cat([rows, gradient], 1)
    )
    expected = topk(made.preactivations(rows), 3)
    assert torch.equal(made.loss(given_rows, Now(k=3)).z, expected.detach())
    assert torch.equal(made.encode(given_rows), expected)


def test_after_training_gradients_are_measured_by_their_mean_norm_in_training():
    made, rows, gradient = started()
    for step, part in enumerate(torch.cat([rows, gradient], 1).split(50)):
        now = Now(k=3, step=step)
        made.after_step_(made.loss(part, now), now)
    assert float(made.norm) == pytest.approx(float(gradient.norm(dim=1).mean()), rel=1e-5)
    joined = torch.cat([rows, gradient], 1)
    with torch.no_grad():
        assert torch.equal(made.encode(joined)[7] > 0, made.encode(joined[7:8])[0] > 0)
        assert not torch.equal(made.encode(joined) > 0, made.encode(rows) > 0)


# ------------------------------------------------------------------------------------------- downstream gradient


def test_gradient_of_a_probe_is_its_closed_form():
    """Logistic loss: dloss/dx = (sigmoid(w . x) - y) w, whatever the batches."""
    draw = np.random.default_rng(0)
    X, w, y = draw.standard_normal((70, 5)).astype(np.float32), draw.standard_normal(5).astype(np.float32), None
    y = draw.integers(0, 2, 70)
    found = downstream_gradient(
        lambda x, t: F.binary_cross_entropy_with_logits(x @ T(w), t.float(), reduction="none"), X, y, batch_size=16
    )
    expected = (1 / (1 + np.exp(-(X @ w))) - y)[:, None] * w
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_what_is_no_loss_of_each_row_is_refused():
    X = np.ones((4, 3), np.float32)
    with pytest.raises(InputError, match="one number a row"):
        downstream_gradient(lambda x: x.sum(), X)
    with pytest.raises(InputError, match="does not depend"):
        downstream_gradient(lambda x: torch.zeros(len(x)), X)
    with pytest.raises(InputError, match="row 0 is not finite"):
        downstream_gradient(lambda x: (x[:, 0] - 1).abs().sqrt(), X)
    with pytest.raises(InputError, match="5 targets"):
        downstream_gradient(lambda x, y: x.sum(1), X, np.zeros(5))


# ------------------------------------------------------------------------------------------------ the estimator


def table(n=1200):
    made = planted("sparse", n_rows=n, d=16, n_atoms=24, k=3, random_state=0)
    draw = np.random.default_rng(1)
    return made.rows, draw.standard_normal(made.rows.shape).astype(np.float32)


def test_fit_save_and_codes_with_gradients(tmp_path):
    X, G = table()
    sae = SAE("gsae", n_latents=32, k=3, n_steps=60, random_state=0).fit(X, partner=G)
    codes = sae.codes(X, partner=G)
    assert codes.shape == (1200, 32) and codes.getnnz(1).max() <= 3
    assert (codes[5] != sae.codes(X[5:6], partner=G[5:6])).nnz == 0
    assert (codes != sae.codes(X)).nnz > 0
    sae.save(tmp_path / "sae")
    assert (load(tmp_path / "sae").codes(X, partner=G) != codes).nnz == 0


def test_gradients_that_are_not_finite_are_refused():
    X, G = table(100)
    G[3, 2] = np.nan
    with pytest.raises(InputError):
        SAE("gsae", n_latents=32, k=3, n_steps=5, random_state=0).fit(X, partner=G)


@pytest.mark.slow
def test_downstream_loss_is_kept_better_than_by_topk_at_equal_k():
    """One weak feature carries the label. The gradient is that of the probe's output, so that no label is needed."""
    losses, fvu = [], []
    for seed in range(2):
        draw = np.random.default_rng(seed)
        made = planted("sparse", n_rows=6000, d=31, n_atoms=48, k=4, noise=0.02, random_state=seed)
        label = draw.random(6000) < 0.5
        weak = 0.7 * label + 0.1 * draw.standard_normal(6000)
        X = np.hstack([made.rows, weak[:, None]]).astype(np.float32)
        y, train, test = torch.from_numpy(label).float(), slice(0, 4500), slice(4500, None)
        weights = torch.zeros(33, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=100)

        def output(x, weights=weights):
            return x @ weights[:32] + weights[32]

        def objective(optimiser=optimiser, weights=weights, output=output, X=X, y=y, train=train):
            optimiser.zero_grad()
            loss = F.binary_cross_entropy_with_logits(output(torch.from_numpy(X[train])), y[train])
            loss = loss + 1e-4 * weights.square().sum()
            loss.backward()
            return loss

        optimiser.step(objective)
        G = downstream_gradient(output, X)
        settings = {"n_latents": 64, "k": 4, "n_steps": 1000, "random_state": seed}
        plain = SAE("topk", **settings).fit(X[train])
        aware = SAE("gsae", **settings).fit(X[train], partner=G[train])

        def loss_of(x, output=output, y=y, test=test):
            with torch.no_grad():
                return float(F.binary_cross_entropy_with_logits(output(torch.from_numpy(x)), y[test]))

        rebuilt = {
            "rows": X[test],
            "topk": plain.inverse_transform(plain.codes(X[test])),
            "gsae": aware.inverse_transform(aware.codes(X[test], partner=G[test])),
            "gsae without gradients": aware.inverse_transform(aware.codes(X[test])),
        }
        losses.append({name: loss_of(x) for name, x in rebuilt.items()})
        spread = ((X[test] - X[test].mean(0)) ** 2).sum()
        fvu.append({name: float(((x - X[test]) ** 2).sum() / spread) for name, x in rebuilt.items()})
        print(seed, losses[-1], fvu[-1], [float((sae.density_ == 0).mean()) for sae in (plain, aware)])
    for loss, unexplained in zip(losses, fvu, strict=True):
        assert loss["gsae"] - loss["rows"] < 0.5 * (loss["topk"] - loss["rows"])
        assert unexplained["gsae"] < unexplained["topk"] + 0.05


@pytest.mark.parametrize("mode", ["centre_scale", "standardise", "whiten"])
def test_gradients_follow_the_scaling_of_the_rows(mode):
    """g . d is what a latent does to the loss to first order, in whatever space atoms and gradients are written."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((200, 5)) * [1, 2, 3, 4, 5], rng.standard_normal((200, 5))
    scaling = Normaliser.fit(mode, [x])
    atoms = rng.standard_normal((7, 5))
    back = np.eye(5) if scaling.whiten is None else np.linalg.inv(scaling.whiten)
    theirs = gradients(scaling, torch.from_numpy(g)).numpy() @ atoms.T
    np.testing.assert_allclose(theirs, g @ (atoms @ back).T, rtol=1e-9)
