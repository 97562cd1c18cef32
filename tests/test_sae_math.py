"""Activations, losses and settings against worked numbers, closed forms and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from biosae.errors import InputError
from biosae.sae import activations, objectives
from biosae.sae.config import SAEConfig, nearest_power_of_two, rate_at, resolve
from biosae.sae.model import SparseAutoencoder, geometric_median, unit_rows_
from biosae.sae.rows import Rows
from biosae.sae.step import Wanted, dense
from biosae.sae.stream import Stream

T = torch.tensor
few = hypothesis_settings(max_examples=40, deadline=None)
# few distinct values, so that ties are common
tied = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-3, 3))


def topk_by_sorting(row: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(row)
    order = np.argsort(-row, kind="stable")[:k]
    kept[order] = np.maximum(row[order], 0)
    return kept


# ------------------------------------------------------------------------------------------------ activations


@few
@given(tied, st.integers(1, 12))
def test_topk_equals_stable_sort(a, k):
    expected = np.stack([topk_by_sorting(row, k) for row in a])
    np.testing.assert_array_equal(activations.topk(torch.from_numpy(a), k).numpy(), expected)


@few
@given(tied, st.integers(1, 4))
def test_batchtopk_equals_stable_sort_of_the_flat_batch(a, k):
    expected = topk_by_sorting(a.reshape(-1), min(k, a.shape[1]) * len(a)).reshape(a.shape)
    np.testing.assert_array_equal(activations.batchtopk(torch.from_numpy(a), k).numpy(), expected)


def test_ties_go_to_the_lower_index_and_nonpositive_entries_to_zero():
    z = activations.topk(T([[1.0, 2.0, 2.0, 2.0], [-1.0, -2.0, 0.0, -3.0]]), 2)
    assert z.tolist() == [[0, 2, 2, 0], [0, 0, 0, 0]]


def test_batchtopk_worked_example_and_its_threshold():
    r = T([[5.0, 4.0, 3.0], [2.0, 1.0, 0.5]])
    z = activations.batchtopk(r, 2)
    assert z.tolist() == [[5, 4, 3], [2, 0, 0]]
    assert (z > 0).sum(1).tolist() == [3, 1] and float(z[z > 0].min()) == 2
    assert activations.above(r, 2.0).tolist() == [[5, 4, 3], [0, 0, 0]]  # strict: the value 2 is dropped


def test_batchtopk_keeps_everything_when_there_is_too_little():
    r = T([[1.0, -1.0], [0.0, -2.0]])
    assert activations.batchtopk(r, 2).tolist() == [[1, 0], [0, 0]]


def test_jumprelu_worked_numbers():
    """a = 0.3, theta = 0.2996, eps = 0.001: z = 0.3, dz/da = 1, dz/dtheta = -299.6, dL0/dtheta = -1000, dL0/da = 0."""
    for part, by_a, by_theta in ((0, 1.0, -299.6), (1, 0.0, -1000.0)):
        a, theta = (
            T([[0.3]], dtype=torch.float64, requires_grad=True),
            T([0.2996], dtype=torch.float64, requires_grad=True),
        )
        out = activations.jumprelu(a, theta, 0.001)
        assert out[0].item() == 0.3 and out[1].item() == 1
        out[part].sum().backward()
        assert a.grad.item() == by_a and theta.grad.item() == pytest.approx(by_theta)
    assert activations.jumprelu(T([[0.3]]), T([0.3]), 0.001)[0].item() == 0  # a = theta is closed


def test_jumprelu_lays_the_window_about_the_preactivation():
    """With theta < eps / 2 a closed latent far below lends the threshold nothing, though its code is 0."""
    theta = T([1e-4], requires_grad=True)
    activations.jumprelu(T([[-5.0]]), theta, 1e-3)[1].sum().backward()
    assert theta.grad.item() == 0


@few
@given(tied, st.integers(1, 6))
def test_l0_target_is_the_squared_relative_excess(a, k):
    l0 = torch.from_numpy((a > 0).sum(1).astype(np.float32))
    assert float(objectives.l0_target(l0, k)) == pytest.approx((float((a > 0).sum()) / len(a) / k - 1) ** 2, abs=1e-5)


def test_topk_passes_gradients_to_the_kept_entries_only():
    a = T([[3.0, 1.0, 2.0, -1.0]], requires_grad=True)
    activations.topk(a, 2).sum().backward()
    assert a.grad.tolist() == [[1, 0, 1, 0]]


def test_topk_of_everything_is_relu():
    a = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for k in (5, 50):
        assert torch.equal(activations.topk(a, k), torch.relu(a))


# ------------------------------------------------------------------------------------------------ losses


def identity_model(architecture: str, k: int = 1, d: int = 2) -> SparseAutoencoder:
    model = SparseAutoencoder(d, d, architecture=architecture, k=k)
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(d))
        model.W_dec.copy_(torch.eye(d))
    return model


def test_relu_l1_worked_example():
    x = T([[3.0, -1.0]])
    _, z, x_hat = (v.detach() for v in identity_model("relu")(x))
    assert z.tolist() == [[3, 0]]
    assert float(objectives.mse_sum(x, x_hat)) == 1
    assert float(objectives.mse_sum(x, x_hat) + 0.1 * objectives.l1_norm(z)) == pytest.approx(1.3)


@pytest.mark.parametrize(("a", "l1"), [(2.0, 0.5), (0.1, 0.5), (-1.0, 0.2)])
def test_l1_minimiser_is_the_soft_threshold(a, l1):
    z = torch.linspace(0, 3, 300_001, dtype=torch.float64)
    best = z[((a - z) ** 2 + l1 * z).argmin()]
    assert float(best) == pytest.approx(max(0.0, a - l1 / 2), abs=1e-5)


def test_auxk_worked_example():
    # e = ((2,0),(0,2)) and the dead latent explains ((1,0),(0,0)): 2.5 / 2
    e = T([[2.0, 0.0], [0.0, 2.0]])
    a = T([[9.0, 1.0], [9.0, -1.0]])
    decoder = T([[0.0, 1.0], [1.0, 0.0]])
    loss = objectives.auxk(e, a, T([1]), decoder, 5)  # k above the number of dead latents
    assert float(loss) == pytest.approx(1.25)


def test_auxk_without_dead_latents_or_without_spread_is_zero():
    a, decoder = torch.ones(3, 2, requires_grad=True), torch.eye(2)
    assert float(objectives.auxk(torch.randn(3, 2), a, T([], dtype=torch.int64), decoder, 2)) == 0
    loss = objectives.auxk(torch.ones(3, 2), a, T([0]), decoder, 2)
    loss.backward()
    assert float(loss) == 0 and torch.isfinite(a.grad).all()


def test_auxk_does_not_train_the_residual():
    x_hat = torch.zeros(2, 2, requires_grad=True)
    a = torch.ones(2, 2, requires_grad=True)
    objectives.auxk(T([[1.0, 0.0], [0.0, 1.0]]) - x_hat, a, T([0]), torch.eye(2), 1).backward()
    assert x_hat.grad is None and a.grad[:, 0].abs().sum() > 0


# ------------------------------------------------------------------------------------------------ model


def test_geometric_median_of_known_points():
    corner = T([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    torch.testing.assert_close(geometric_median(corner), T([1.0, 1.0]))
    # on a line it is the median, even where it coincides with a data point
    torch.testing.assert_close(geometric_median(T([[0.0], [1.0], [50.0]])), T([1.0]), atol=1e-2, rtol=0)


def test_geometric_median_beats_its_surroundings():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).exp()
    m = geometric_median(x)

    def cost(p):
        return float((x - p).norm(dim=1).sum())

    assert all(cost(m) <= cost(m + 0.05 * torch.randn(4)) for _ in range(20))
    assert cost(m) < cost(x.mean(0))


def test_unit_rows_redraws_zero_rows():
    w = T([[3.0, 4.0], [0.0, 0.0]])
    unit_rows_(w, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(w[0], T([0.6, 0.8]))
    assert float(w[1].norm()) == pytest.approx(1)


def test_projected_gradient_is_orthogonal_to_the_atoms():
    model = SparseAutoencoder(6, 10, architecture="topk", k=3)
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=g)
    model.initialise(rows, atoms="data", scale="probes", generator=g)
    objectives.mse_sum(rows, model(rows)[2]).backward()
    plain = model.W_dec.grad.clone()
    assert float((plain * model.W_dec.detach()).sum(1).abs().max()) > 1e-3
    wanted = Wanted(k=3, weight=0.0, dead=torch.zeros(0, dtype=torch.int64), aux_k=0, aux_alpha=0.0)
    projected = dense(model, rows, wanted).latents.dec
    atoms = model.W_dec.detach()
    assert float((projected * atoms).sum(1).abs().max()) < 1e-5
    # what was taken away lies along the atoms and nowhere else
    torch.testing.assert_close(projected, plain - (plain * atoms).sum(1, keepdim=True) * atoms)


@pytest.mark.parametrize("atoms", ["data", "random"])
def test_initialisation_starts_at_the_input_norm(atoms):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=g) + 5
    model = SparseAutoencoder(8, 64, architecture="topk", k=8)
    model.initialise(rows, atoms=atoms, scale="probes", generator=g)
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(64))
    cosine = torch.nn.functional.cosine_similarity(model.W_enc, model.W_dec)
    torch.testing.assert_close(cosine, torch.ones(64))
    probe = torch.nn.functional.normalize(torch.randn(2000, 8, generator=g))
    size = (model(probe + model.b_dec)[2] - model.b_dec).norm(dim=1).mean()
    assert float(size) == pytest.approx(1, abs=0.1)
    assert (model.W_dec @ model.W_dec.T - 2 * torch.eye(64)).max() < 1 - 1e-6  # no atom twice, though rows repeat


def test_least_squares_start_cannot_be_scaled_to_a_smaller_error():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 8, generator=g) @ torch.randn(8, 8, generator=g) + 5
    model = SparseAutoencoder(8, 32, architecture="topk", k=6)
    model.initialise(rows, atoms="data", scale="least_squares", generator=g)

    def error(factor):
        weight = model.W_enc.data.clone()
        model.W_enc.data.mul_(factor)
        found = float(objectives.mse_sum(rows, model(rows)[2]))
        model.W_enc.data.copy_(weight)
        return found

    assert all(error(1.0) < error(f) for f in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "matryoshka", "jumprelu"])
def test_single_and_double_precision_agree(architecture):
    g = torch.Generator().manual_seed(2)
    rows = torch.randn(200, 16, generator=g)
    model = SparseAutoencoder(16, 64, architecture=architecture, k=6)
    model.initialise(rows, atoms="random", scale="probes", generator=g)
    found = model(rows)
    expected = model.double()(rows.double())
    for single, double in zip(found, expected):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ settings


def test_unknown_and_invalid_settings_are_named():
    with pytest.raises(InputError, match="did you mean 'n_latents'"):
        SAEConfig().set_params(n_latent=5)
    with pytest.raises(InputError, match="did you mean 'topk'"):
        SAEConfig("topq").validate()
    for bad in ({"k": 0}, {"k": 2.5}, {"n_latents": 0}, {"learning_rate": -1}, {"validation": 1.0}, {"l1": -1},
                {"warmup": 0.7, "decay": 0.6}, {"random_state": -1}, {"clip_norm": float("nan")}, {"backend": "cuda"},
                {"ema": 1.0}, {"k_start": 0}, {"k_anneal": 1.5}, {"resample_every": 1}, {"patience": 0},
                {"prefixes": (0.5,)}, {"prefixes": (1.0, 0.5)}, {"prefilter": "int8"}, {"checkpoint_every": 0},
                {"bandwidth": 0}, {"l0_weight": -1}, {"early_stopping": True, "validation": 0}):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(bad))):
            SAEConfig(**bad).validate()


def test_every_setting_is_documented():
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "methods" / "sae.md").read_text(encoding="utf-8")
    assert [name for name in SAEConfig.names() if f"`{name}`" not in page] == []


def test_plan_clips_to_the_data():
    plan = resolve(SAEConfig(k=32), 100, 1)
    assert [resolve(SAEConfig(), 10_000, d).k for d in (1, 24, 128, 384, 1536)] == [1, 4, 16, 32, 32]
    assert [resolve(SAEConfig(), n, 128).n_latents for n in (1000, 12_000, 100_000)] == [128, 256, 1024]
    assert plan.n_latents == 8 and plan.k == 8 and plan.batch_size == 100 and plan.aux_k <= 8
    assert resolve(SAEConfig(n_latents=100, k=10), 50_000, 8).batch_size == 3125
    assert resolve(SAEConfig(n_steps=7), 1000, 8).n_steps == 7
    with pytest.raises(InputError, match="8"):
        resolve(SAEConfig(), 7, 3)
    assert [nearest_power_of_two(v) for v in (0.3, 1, 3, 1000, 1500)] == [1, 1, 4, 1024, 2048]


def test_learning_rate_schedule():
    plan = resolve(SAEConfig(n_steps=100, warmup=0.1, decay=0.2, learning_rate=1.0), 1000, 8)
    rates = [rate_at(plan, s) for s in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:80], 1)
    np.testing.assert_allclose(rates[80:], np.arange(20, 0, -1) / 20)


def test_batches_cover_each_epoch_without_repeats():
    stream = Stream(Rows(np.arange(440, dtype=np.float32).reshape(110, 4)), batch_size=25, seed=0)
    batches = stream.batches()
    drawn = [(next(batches)[:, 0] / 4).int().tolist() for _ in range(9)]
    batches.close()
    assert {len(b) for b in drawn} == {25} and stream.per_epoch == 4
    for epoch in (drawn[:4], drawn[4:8]):
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == 100
    assert drawn[0] != drawn[4]
