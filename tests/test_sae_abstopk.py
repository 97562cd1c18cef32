"""AbsTopK and the proximal operators: worked numbers, minima by enumeration, SAELens."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from biosae.errors import InputError
from biosae.sae import SAE, activations, objectives
from biosae.sae.methods.abstopk import AbsTopK, prox
from biosae.sae.methods.base import NoOptions, Now
from biosae.sae.synthetic import planted, recovery

T = torch.tensor
few = hypothesis_settings(max_examples=40, deadline=None)
OTHERS = np.load(Path(__file__).parent / "reference" / "methods" / "plain_and_gated.npz")
tied = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(-3, 3))


def test_worked_numbers():
    u = T([[-3.0, 2.0, 1.0, -0.5]])
    assert prox(u, of="abstopk", k=2).tolist() == [[-3, 2, 0, 0]]
    assert prox(u, of="topk", k=2).tolist() == [[0, 2, 1, 0]]
    u = T([[1.5]], dtype=torch.float64)  # threshold sqrt(2) = 1.414
    assert prox(u, of="l0", weight=1).item() == 1.5 and prox(u, of="l1", weight=1).item() == 0.5
    assert prox(T([[1.41]]), of="l0", weight=1).item() == 0


@few
@given(tied, st.integers(1, 9))
def test_abstopk_equals_a_stable_sort_by_size(u, k):
    expected = np.zeros_like(u)
    for row, out in zip(u, expected, strict=True):
        kept = np.argsort(-np.abs(row), kind="stable")[:k]
        out[kept] = row[kept]
    np.testing.assert_array_equal(activations.abstopk(torch.from_numpy(u), k).numpy(), expected)


@few
@given(tied, st.integers(1, 7))
def test_abstopk_is_odd_equals_topk_for_nonnegative_rows_and_is_the_nearest_sparse_vector(u, k):
    u = torch.from_numpy(u)
    z = activations.abstopk(u, k)
    assert torch.equal(activations.abstopk(-u, k), -z)
    assert torch.equal(activations.abstopk(u.abs(), k), activations.topk(u.abs(), k))
    m = u.shape[1]
    for row, code in zip(u, z, strict=True):  # the best k-sparse vector keeps k entries: try all sets
        best = min(float(row[[j for j in range(m) if j not in kept]].square().sum())
                   for kept in combinations(range(m), min(k, m)))  # fmt: skip
        assert float((row - code).square().sum()) == pytest.approx(best)


@few
@given(st.floats(-3, 3), st.floats(0.01, 2))
def test_prox_is_the_minimiser_on_a_fine_grid(u, weight):
    z = torch.linspace(0, 4, 40_001, dtype=torch.float64)
    for of, size in (("l1", z), ("l0", (z > 0).double())):
        cost = 0.5 * (u - z) ** 2 + weight * size
        found = prox(T([[u]], dtype=torch.float64), of=of, weight=weight)
        at = 0.5 * (u - found) ** 2 + weight * (found if of == "l1" else (found > 0).double())
        assert float(at) <= float(cost.min()) + 1e-9


@few
@given(tied, st.integers(1, 3))
def test_prox_of_topk_is_the_nearest_nonnegative_sparse_vector(u, k):
    u = torch.from_numpy(u)
    z, m = prox(u, of="topk", k=k), u.shape[1]
    for row, code in zip(u, z, strict=True):
        best = min(
            float((row - torch.where(torch.isin(torch.arange(m), T(kept)), row.clamp(min=0), T(0.0))).square().sum())
            for kept in combinations(range(m), min(k, m))
        )
        assert float((row - code).square().sum()) == pytest.approx(best)


def test_codes_and_gradient_equal_saelens():
    a = (torch.from_numpy(OTHERS["x"] - OTHERS["b_dec"]) @ torch.from_numpy(OTHERS["W_enc"]).T).add(
        torch.from_numpy(OTHERS["b_enc"])
    )
    a.requires_grad_(True)
    z = activations.abstopk(a, 3)
    torch.testing.assert_close(z.detach(), torch.from_numpy(OTHERS["abstopk.codes"]), atol=1e-5, rtol=1e-5)
    (z * torch.from_numpy(OTHERS["overcomplete.weights"])).sum().backward()
    torch.testing.assert_close(a.grad, torch.from_numpy(OTHERS["abstopk.by_a"]), atol=1e-5, rtol=1e-5)


def test_auxk_of_signed_codes_takes_the_largest_in_size_with_its_sign():
    """Dead latents respond with -2 and 1 to the first row: the former explains e = (0, -2) wholly, the latter not."""
    e, decoder = T([[0.0, -2.0], [0.0, 2.0]]), T([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    a = T([[9.0, -2.0, 1.0], [9.0, 2.0, -1.0]])
    assert float(objectives.auxk(e, a, T([1, 2]), decoder, 1, signed=True)) == 0
    assert float(objectives.auxk(e, a, T([1, 2]), decoder, 1)) > 0
    method = AbsTopK(2, 3, k=1, options=NoOptions())
    with torch.no_grad():
        method.W_enc.copy_(decoder)
        method.W_dec.copy_(decoder)
    x = T([[3.0, -1.0], [-2.0, 1.0]])
    without = float(method.loss(x, Now(k=1)).total)
    assert float(method.loss(x, Now(k=1, dead=T([1]), aux_k=1, aux_alpha=1.0)).total) == pytest.approx(without)
    assert method.loss(x, Now(k=1)).z.tolist() == [[3, 0, 0], [-2, 0, 0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"of": "l2"}, "not known"), ({"of": "l0"}, "needs weight"), ({"of": "topk"}, "needs k"),
     ({"of": "l1", "weight": -1.0}, "needs weight")],
)  # fmt: skip
def test_prox_says_what_it_needs(given, message):
    with pytest.raises(InputError, match=message):
        prox(T([[1.0]]), **given)


def test_one_signed_latent_does_the_work_of_two_on_planted_axes():
    """Rows of axes with either sign: AbsTopK finds more of them, with half the error of TopK of the same size."""
    rows = planted("bidirectional", n_rows=2000, d=16, n_atoms=24, k=2, random_state=0)
    common = {
        "n_latents": 24, "k": 2, "n_steps": 300, "batch_size": 256, "learning_rate": 4e-3, "validation": 0.0,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    signed, plain = (SAE(name, **common).fit(rows.rows) for name in ("abstopk", "topk"))
    found = [recovery(sae.decoder_, rows.atoms, signed=True)["share_found"] for sae in (signed, plain)]
    assert found[0] > found[1] + 0.1
    assert signed.metrics_["fvu"] < 0.6 * plain.metrics_["fvu"]
    codes = signed.codes(rows.rows)
    assert 0.2 < float((codes.data < 0).mean()) < 0.8 and abs(codes.getnnz(axis=1) - 2).max() == 0
