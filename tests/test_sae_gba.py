"""Group bias adaptation: the rule, its targets, the box of the biases, and recovery of planted atoms."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae import SAE, load, planted, recovery
from biosae.sae.methods.base import Now
from biosae.sae.methods.gba import GBA, GBAOptions, adapted_bias, target_frequencies

T = torch.tensor


def one(bias, frequency, largest, target=0.1, **settings):
    group = torch.zeros(1, dtype=torch.int64)
    return float(adapted_bias(T([bias]), T([frequency]), T([largest]), group, T([target]), **settings))


def test_worked_adaptations():
    assert one(-0.1, 0.5, 2.0) == pytest.approx(-0.12)
    assert one(-0.995, 0.5, 2.0) == -1
    group = T([0, 0, 0])
    found = adapted_bias(T([-0.02, -0.5, -0.5]), T([0.0, 0.1, 0.1]), T([-0.3, 2.0, 4.0]), group, T([0.1]))
    assert found.tolist() == pytest.approx([0, -0.5, -0.5])  # T_k = 3, and 0.1 is not above 0.1


def test_group_means_count_latents_that_fired_in_the_own_group():
    group = T([0, 0, 1, 1, 2])
    largest = T([-0.5, 4.0, -1.0, 2.0, -1.0])
    found = adapted_bias(torch.full((5,), -0.5), T([0.0, 0.05, 0.0, 0.05, 0.0]), largest, group, torch.full((3,), 0.1))
    torch.testing.assert_close(found, T([-0.46, -0.5, -0.48, -0.5, -0.5]))


def test_targets_are_geometric():
    targets = target_frequencies(4, highest=0.5, lowest=0.5e-3)
    torch.testing.assert_close(targets, T([0.5, 0.05, 0.005, 0.0005]))
    assert target_frequencies(1, highest=0.3, lowest=0.001).tolist() == pytest.approx([0.3])


@given(st.integers(0, 10_000))
def test_biases_never_leave_their_box(seed):
    draw = np.random.default_rng(seed)
    bias = T(draw.uniform(-1, 0, 12), dtype=torch.float32)
    for _ in range(20):
        frequency, largest = T(draw.choice([0.0, 0.01, 0.5], 12)), T(draw.normal(0, 30, 12))
        bias = adapted_bias(
            bias, frequency.float(), largest.float(), torch.arange(12) % 3, T([0.3, 0.1, 0.02]), lower=0.2, raise_=0.2
        )
        assert (bias >= -1).all() and (bias <= 0).all()


def started(rows, m=30, **options):
    made = GBA(rows.shape[1], m, k=1, options=GBAOptions(**options))
    made.initialise(rows, atoms="random", scale="probes", generator=torch.Generator().manual_seed(0))
    return made


def test_with_frozen_weights_each_frequency_falls_to_its_target_or_the_bias_to_its_floor():
    rows = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
    made = started(rows, every=1, rate=0.02, groups=3, lowest=0.01)
    frequencies = []
    for step in range(400):
        now = Now(k=1, step=step, n_steps=400)
        with torch.no_grad():
            loss = made.loss(rows, now)
        made.after_step_(loss, now)
        frequencies.append((loss.z > 0).float().mean(0))
    targets = target_frequencies(3, highest=0.1, lowest=0.01)[made.group]
    assert ((frequencies[-1] <= targets) | (made.bias == -1)).all()
    assert (torch.stack(frequencies).diff(dim=0) <= 0).all()
    assert (frequencies[-1] > 0.3 * targets).float().mean() > 0.9  # and hardly below


def test_statistics_are_those_of_all_batches_since_the_last_adaptation():
    rows = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
    made = started(rows, every=3, groups=2, lowest=0.05)
    start = made.bias.clone()
    for step, part in enumerate(rows.split(200)):
        assert torch.equal(made.bias, start)
        now = Now(k=1, step=step, n_steps=30)
        with torch.no_grad():
            made.after_step_(made.loss(part, now), now)
    with torch.no_grad():
        y = made.preactivations(rows)
    targets = target_frequencies(2, highest=0.1, lowest=0.05)
    torch.testing.assert_close(made.bias, adapted_bias(start, (y > 0).float().mean(0), y.amax(0), made.group, targets))
    assert float(made.rows) == 0 and not made.fired.any()


def test_groups_have_equal_sizes():
    made = started(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), m=43, groups=10)
    assert sorted(torch.bincount(made.group, minlength=10).tolist()) == [4] * 7 + [5] * 3


@pytest.mark.parametrize(("activation", "value"), [("jump", 0.8), ("relu", 0.5)])
def test_worked_codes(activation, value):
    made = GBA(2, 2, k=1, options=GBAOptions(activation=activation))
    with torch.no_grad():
        made.W_dec.copy_(torch.eye(2))
        made.size.copy_(T([2.0, 1.0]))
        made.bias.copy_(T([-0.3, -0.3]))
    z = made.encode(T([[0.8, 0.2]]))
    torch.testing.assert_close(z.detach(), T([[2 * value, 0.0]]))
    loss = made.loss(T([[0.8, 0.2]]), Now(k=1))
    assert float(loss.total.detach()) == pytest.approx(0.5 * ((2 * value - 0.8) ** 2 + 0.04))


def test_gradients_do_not_move_biases():
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    made = started(rows)
    made.loss(rows, Now(k=1)).total.backward()
    assert {name for name, _ in made.named_parameters()} == {"W_dec", "b_dec", "size"}
    assert not made.bias.requires_grad and made.W_dec.grad.abs().sum() > 0


def test_too_few_rows_for_the_rarest_group_are_told():
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    made = started(rows, lowest=1e-3, every=1)
    now = Now(k=1, n_steps=10)
    with torch.no_grad(), pytest.warns(UserWarning, match="100 rows"):
        made.after_step_(made.loss(rows, now), now)
    made = started(rows, every=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        made.after_step_(made.loss(rows, now), now)


def test_options_out_of_range_are_refused():
    for options in ({"highest": 0}, {"lowest": 0.2}, {"groups": 0}, {"every": 0}, {"rate": 1}, {"activation": "abs"}):
        with pytest.raises(InputError):
            GBAOptions(**options).check()


def test_fit_and_save(tmp_path):
    X = planted("sparse", n_rows=1500, d=16, n_atoms=24, k=2, random_state=0).rows
    sae = SAE("gba", n_latents=48, n_steps=150, random_state=0).fit(X)
    codes = sae.codes(X)
    assert (sae._model.bias <= 0).all() and (sae._model.bias >= -1).all() and (sae._model.bias < 0).any()
    assert (codes.data > 0).all()
    sae.save(tmp_path / "sae")
    assert (load(tmp_path / "sae").codes(X) != codes).nnz == 0


@pytest.mark.slow
def test_planted_atoms_are_found_with_no_setting_and_topk_needs_the_right_k():
    """n = 128 atoms in d = 42 dimensions, each active in k / 128 of the rows."""
    found = {}
    for k in (3, 6):
        made = planted("sparse", n_rows=20_000, d=42, n_atoms=128, k=k, random_state=0)
        settings = {"n_latents": 256, "n_steps": 4000, "batch_size": 512, "random_state": 0}
        for name, sae in {
            "gba": SAE("gba", **settings),
            "topk right": SAE("topk", k=k, **settings),
            "topk 20": SAE("topk", k=20, **settings),
        }.items():
            sae.fit(made.rows)
            close = {at: recovery(sae.decoder_, made.atoms, threshold=at)["share_found"] for at in (0.8, 0.9)}
            found[name, k] = close
            print(k, name, close, {key: round(sae.metrics_[key], 4) for key in ("fvu", "l0")})
    for k in (3, 6):
        assert found["gba", k][0.8] > 0.95
        assert found["topk right", k][0.9] > 0.98
    assert found["gba", 3][0.9] > found["topk 20", 3][0.9] + 0.3


def test_group_bias_adaptation_under_a_moving_average_keeps_biases_and_weights_of_one_time():
    rows = planted(n_rows=2000, k=3).rows
    plain, averaged = (SAE("gba", n_latents=64, n_steps=200, ema=e, random_state=0).fit(rows) for e in (0.0, 0.9))
    assert averaged.metrics_["fvu"] < 1.1 * plain.metrics_["fvu"]
