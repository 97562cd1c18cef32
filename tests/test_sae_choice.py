"""Mutual and Feature Choice: budgets, choices, under-used latents, thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from biosae.errors import InputError
from biosae.sae import SAE, load, objectives, planted, recovery
from biosae.sae.activations import batchtopk
from biosae.sae.methods.base import Now
from biosae.sae.methods.choice import (
    ChoiceOptions,
    FeatureChoice,
    FeatureChoiceOptions,
    MutualChoice,
    column_largest,
    demanded,
    under_used,
    zipf_budget,
)

T = torch.tensor
# few distinct values, so that ties are common
tied = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-2, 3))


def started(kind, options, *, m=24, d=6, k=3, n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator) / d**0.5
    made = kind(d, m, k=k, options=options)
    made.initialise(rows, atoms="random", scale="probes", generator=generator)
    return made, rows, generator


# ------------------------------------------------------------------------------------------------------ choices


def test_worked_choice():
    r = T([[5.0, 1.0], [4.0, 2.0], [3.0, 6.0]])
    keep = column_largest(r, T([1, 1]))
    assert keep.tolist() == [[True, False], [False, False], [False, True]]
    assert keep.sum(0).tolist() == [1, 1] and keep.sum(1).tolist() == [1, 0, 1]


@given(tied, st.integers(0, 10_000))
def test_columns_have_their_budget_as_by_stable_sorting(r, seed):
    budget = np.random.default_rng(seed).integers(0, len(r) + 3, r.shape[1])
    keep = column_largest(torch.from_numpy(r), torch.from_numpy(budget)).numpy()
    assert (keep.sum(0) == np.minimum(budget, len(r))).all()
    for j, wanted in enumerate(budget):
        expected = np.argsort(-r[:, j], kind="stable")[:wanted]
        assert set(np.flatnonzero(keep[:, j])) == set(expected)


def test_many_columns_are_chosen_like_few():
    r = torch.rand(50, 70, generator=torch.Generator().manual_seed(0))
    budget = torch.arange(70) % 51
    whole = column_largest(r, budget)
    each = torch.cat([column_largest(r[:, j : j + 1], budget[j : j + 1]) for j in range(70)], 1)
    assert torch.equal(whole, each)


def test_mutual_choice_is_batchtopk_entry_for_entry():
    made, rows, _ = started(MutualChoice, ChoiceOptions())
    loss = made.loss(rows, Now(k=3))
    assert torch.equal(loss.z, batchtopk(made.preactivations(rows), 3).detach())
    assert (loss.z > 0).sum() == 3 * len(rows)


# ------------------------------------------------------------------------------------------------------ budgets


def test_worked_zipf_budget():
    assert zipf_budget(4, 12, 100) == (6, 3, 2, 1)
    assert zipf_budget(4, 12, 100, alpha=0.0) == (3, 3, 3, 3)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 20), st.floats(0, 3), st.floats(0, 5))
def test_budgets_sum_to_the_total_within_their_limits(m, n, k, alpha, shift):
    budget = np.array(zipf_budget(m, min(k, m) * n, n, alpha=alpha, shift=shift))
    assert budget.sum() == max(min(k, m) * n, m)
    assert budget.min() >= 1 and budget.max() <= max(n, 1)
    assert (np.diff(budget) <= 0).all()


def test_what_the_first_ranks_cannot_take_goes_to_the_next():
    """Of 8.64, 4.32, 2.88, 2.16 the first is cut to 6; 12 in proportion to 1/2, 1/3, 1/4: 5.54, 3.69, 2.77."""
    assert zipf_budget(4, 18, 6) == (6, 5, 4, 3)


def test_demand_ranks_latents_as_mutual_choice_would():
    r = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) * T([1.0, 4, 2, 0.5, 3, 0])
    expected = (batchtopk(r, 2) > 0).float().mean(0)
    assert torch.equal(demanded(r, 2), expected)
    made, _, _ = started(FeatureChoice, FeatureChoiceOptions(), m=6)
    budget = made.budget(expected, k=2, n_rows=40)
    assert budget.sum() == 80 and budget[1] == budget.max() and budget[5] == budget.min()
    assert made.budget(torch.zeros(6), k=9, n_rows=5).tolist() == [5] * 6  # k above m: every row for all


# ------------------------------------------------------------------------------------------------- aux_zipf_loss


def test_usage_that_follows_zipf_has_no_under_used_latents():
    usage = 0.3 / torch.arange(1, 50)
    assert under_used(usage).tolist() == []
    usage[44:] *= 0.3
    assert under_used(usage).tolist() == [44, 45, 46, 47, 48]
    assert under_used(torch.full((9,), 0.2)).tolist() == []
    assert under_used(torch.zeros(4)).tolist() == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30))
def test_dead_latents_are_always_under_used_and_scale_does_not_matter(counts):
    usage = T(counts, dtype=torch.float64)
    found = under_used(usage)
    assert set(np.flatnonzero(np.array(counts) == 0)) <= set(found.tolist())
    assert torch.equal(found, under_used(usage / 128))


def test_with_the_dead_latents_under_used_the_loss_is_auxk():
    made, rows, _ = started(MutualChoice, ChoiceOptions())
    dead = T([2, 7, 8])
    usage = torch.full((24,), 0.1)
    usage[dead] = 0
    made.usage.copy_(usage)
    now = Now(k=3, aux_k=2, aux_alpha=1 / 32, step=50)
    with torch.no_grad():
        a = made.preactivations(rows)
        z = batchtopk(a, 3)
        residual = made.decode(z) - rows
        expected = residual.square().sum(1).mean() + objectives.auxk(-residual, a, dead, made.W_dec, 2) / 32
        assert torch.equal(made.loss(rows, now).total, expected)


def test_usage_is_a_mean_at_first_and_then_a_running_one():
    made, rows, _ = started(MutualChoice, ChoiceOptions(memory=4))
    seen = []
    for step in range(6):
        now = Now(k=3, step=step)
        loss = made.loss(rows[50 * step : 50 * (step + 1)], now)
        made.after_step_(loss, now)
        seen.append((loss.z > 0).float().mean(0))
    mean = torch.stack(seen[:4]).mean(0)
    for share in seen[4:]:
        mean = mean + (share - mean) / 4
    torch.testing.assert_close(made.usage, mean)


# ---------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_thresholds_give_each_latent_its_share_of_the_training_rows(alpha):
    made, rows, generator = started(FeatureChoice, FeatureChoiceOptions(alpha=alpha), n=500)
    now = Now(k=3)
    made.after_step_(made.loss(rows, now), now)
    made.complete_(rows, generator)
    with torch.no_grad():
        r = torch.relu(made.preactivations(rows))
        budget = made.budget(made.demand, k=3, n_rows=500)
        active = (made.encode(rows) > 0).sum(0)
    assert torch.equal(active, torch.minimum(budget, (r > 0).sum(0)))


def test_codes_of_a_row_do_not_depend_on_others():
    for kind, options in ((MutualChoice, ChoiceOptions()), (FeatureChoice, FeatureChoiceOptions())):
        made, rows, generator = started(kind, options)
        made.complete_(rows, generator)
        with torch.no_grad():
            assert torch.equal(made.encode(rows)[5:6] > 0, made.encode(rows[5:6]) > 0)


def test_options_out_of_range_are_refused():
    for options in (ChoiceOptions(under=2), ChoiceOptions(memory=0), FeatureChoiceOptions(alpha=-1)):
        with pytest.raises(InputError):
            options.check()


# ------------------------------------------------------------------------------------------------ the estimator


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice"])
def test_fit_and_save(name, tmp_path):
    X = planted("sparse", n_rows=1500, d=16, n_atoms=24, k=3, random_state=0).rows
    sae = SAE(name, n_latents=32, k=3, n_steps=80, random_state=0).fit(X)
    codes = sae.codes(X)
    assert sae.metrics_["l0"] == pytest.approx(3, abs=0.3)
    assert (codes[7] != sae.codes(X[7:8])).nnz == 0
    sae.save(tmp_path / "sae")
    assert (load(tmp_path / "sae").codes(X) != codes).nnz == 0


def of_zipf_frequencies(n, *, seed):
    """64 atoms in 32 dimensions, 4 a row on average, the one of rank r in proportion to 1 / r, at most half."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((64, 32))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    frequency = 1 / np.arange(1, 65)
    active = rng.random((n, 64)) < np.minimum(0.5, frequency * 4 / frequency.sum())
    rows = active * rng.uniform(0.5, 1.5, active.shape) @ atoms + 0.02 * rng.standard_normal((n, 32))
    return rows.astype(np.float32), atoms


@pytest.mark.slow
def test_feature_choice_leaves_fewer_latents_dead_than_topk():
    for seed in range(2):
        X, atoms = of_zipf_frequencies(8000, seed=seed)
        settings = {"n_latents": 256, "k": 4, "n_steps": 1000, "batch_size": 512, "random_state": seed}
        found = {}
        for name in ("topk", "mutual_choice", "feature_choice"):
            sae = SAE(name, **settings).fit(X[:6000])
            held = sae.evaluate(X[6000:])
            found[name] = {
                "dead": float((sae.density_ == 0).mean()),
                "fvu": held["fvu"],
                "l0": held["l0"],
                **recovery(sae.decoder_, atoms),
            }
            print(seed, name, found[name])
        assert found["feature_choice"]["dead"] < min(found["topk"]["dead"], 0.02)
        assert found["feature_choice"]["share_found"] > 0.9
        assert found["mutual_choice"]["fvu"] < found["topk"]["fvu"]
