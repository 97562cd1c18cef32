"""Group-sparse autoencoder: worked numbers, limits that are plain TopK, masks, unpaired rows, planted pairs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import biosae as bs
from biosae.errors import InputError
from biosae.sae import activations, objectives
from biosae.sae.methods.base import Now
from biosae.sae.methods.group_sparse import GroupSparse, Options, group_norm
from biosae.sae.modalities import modality_score, multimodal_monosemanticity


def model(d: int = 6, m: int = 16, k: int = 3, *, seed: int = 0, **options) -> GroupSparse:
    made = GroupSparse(d, m, k=k, options=Options(**options), n_partner=d)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.W_dec.copy_(F.normalize(made.W_dec, dim=1))
    return made


def pairs(n: int = 20, d: int = 6, *, seed: int = 1, has=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)
    has = torch.ones(n, 2) if has is None else torch.as_tensor(has, dtype=torch.float32)
    return torch.cat([x * has[:, :1], y * has[:, 1:], has], dim=1)


def now(k: int = 3, **known) -> Now:
    return Now(k=k, generator=torch.Generator().manual_seed(0), **known)


def test_worked_numbers_of_the_group_norm():
    z = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    w = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert group_norm(z, w).tolist() == [5.0, 7.0]


@given(st.integers(0, 10**6))
def test_group_norm_is_below_the_sum_of_l1_norms_and_equal_only_for_disjoint_supports(seed):
    rng = np.random.default_rng(seed)
    z, w = (torch.tensor(rng.gamma(1, 1, (5, 8)) * (rng.random((5, 8)) < 0.5)) for _ in range(2))
    l1 = (z + w).sum(1)
    found = group_norm(z, w)
    assert (found <= l1 + 1e-9).all()
    disjoint = ~((z > 0) & (w > 0)).any(1)
    assert torch.equal((l1 - found).abs() < 1e-9, disjoint)


def test_gradient_of_the_group_norm_at_zero_is_zero_and_elsewhere_that_of_the_formula():
    z = torch.tensor([[0.0, 3.0, 0.0]], requires_grad=True)
    w = torch.tensor([[0.0, 4.0, 2.0]], requires_grad=True)
    group_norm(z, w).sum().backward()
    assert z.grad.tolist() == [[0.0, pytest.approx(0.6), 0.0]]
    assert w.grad.tolist() == [[0.0, pytest.approx(0.8), 1.0]]


def test_without_penalty_and_mask_and_with_equal_biases_it_is_topk_of_the_stacked_rows():
    made = model(group_weight=0.0, mask=0.0)
    with torch.no_grad():
        made.b_second.copy_(made.b_dec)
    rows = pairs()
    stacked = torch.cat([rows[:, :6], rows[:, 6:12]])
    dead = torch.tensor([1, 4, 9])
    made.loss(rows, now(dead=dead, aux_k=2, aux_alpha=0.125)).total.backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    a = F.linear(stacked - made.b_dec, made.W_enc, made.b_enc)
    x_hat = activations.topk(a, 3) @ made.W_dec + made.b_dec
    # a mean over each table: twice the mean over the stacked rows
    plain = 2 * objectives.mse_sum(stacked, x_hat)
    (plain + 0.125 * objectives.auxk(stacked - x_hat, a, dead, made.W_dec, 2)).backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(found[name], made.get_parameter(name).grad)
    torch.testing.assert_close(found["b_dec"] + found["b_second"], made.b_dec.grad)
    z = made.loss(rows, now()).z
    assert torch.equal(z, torch.cat([made.encode(rows[:, :6]), made.encode(rows[:, 6:12], table=1)]))


def test_both_codes_vanish_where_the_mask_hides_and_the_k_places_are_filled_from_what_is_visible():
    made = model(mask=0.5, group_weight=0.0)
    rows = pairs(n=50)
    z = made.loss(rows, now()).z
    hidden = torch.rand(50, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    assert 0.4 < hidden.float().mean() < 0.6
    assert not z[:50][hidden].any()
    assert not z[50:][hidden].any()
    for t, part in enumerate((rows[:, :6], rows[:, 6:12])):
        a = made.preactivations(part, table=t).masked_fill(hidden, -torch.inf)
        expected = ((a > 0).sum(1)).clamp(max=3)
        assert torch.equal((z[50 * t :][:50] > 0).sum(1), expected)
    assert not torch.equal(made.encode(rows[:, :6]) > 0, z[:50] > 0)  # nothing is hidden in evaluation


def test_unpaired_rows_count_only_in_the_reconstruction_that_they_have():
    made = model(mask=0.0, group_weight=0.3)
    whole = pairs(n=6)
    has = [[1, 1], [1, 0], [0, 1], [1, 1], [1, 0], [1, 0]]
    rows = pairs(n=6, has=has)
    found = made.loss(rows, now())
    x, y = whole[[0, 1, 3, 4, 5], :6], whole[[0, 2, 3], 6:12]
    expected = objectives.mse_sum(x, made.decode(made.encode(x)))
    expected = expected + objectives.mse_sum(y, made.decode(made.encode(y, table=1), table=1))
    both = group_norm(made.encode(whole[[0, 3], :6]), made.encode(whole[[0, 3], 6:12], table=1)).mean()
    assert found.total.item() == pytest.approx((expected + 0.3 * both).item(), rel=1e-5)
    assert len(found.z) == len(found.residual) == 8
    garbage = rows.clone()  # what stands in absent rows is of no matter
    garbage[1, 6:12] = 7.0
    garbage[2, :6] = -3.0
    assert made.loss(garbage, now()).total.item() == pytest.approx(found.total.item(), rel=1e-6)


def test_a_batch_without_any_pair_or_without_one_modality_is_finite():
    made = model()
    for has in ([[1, 0]] * 4, [[0, 1]] * 4, [[1, 0], [0, 1]]):
        found = made.loss(pairs(n=len(has), has=has), now())
        found.total.backward()
        assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_the_penalty_makes_pairs_share_their_latents():
    # two noisy views of the same sparse sources, each with a direction of its own for every source
    rng = np.random.default_rng(0)
    sources = rng.gamma(2, 1, (3000, 24)) * (rng.random((3000, 24)) < 0.12)
    common, own = rng.normal(size=(24, 32)), rng.normal(size=(2, 24, 32)) * 0.9
    X, Y = (np.float32(sources @ (common + own[t]) + 0.05 * rng.normal(size=(3000, 32))) for t in (0, 1))
    shared, fvu = {}, {}
    for name, options in {
        "topk": {"group_weight": 0.0, "mask": 0.0},
        "gsae": {"group_weight": 0.3, "mask": 0.0},
    }.items():
        sae = bs.sae.SAE(
            "group_sparse", n_latents=64, k=6, n_steps=400, random_state=0, options=options, validation=0.0
        ).fit(X, partner=Y)  # fmt: skip
        first, second = sae.codes(X), sae.codes(Y, table=1)
        either = ((first > 0) + (second > 0)).sum()
        shared[name] = (first > 0).multiply(second > 0).sum() / either
        fvu[name] = sae.evaluate(X)["fvu"]
        used = modality_score(first, second)
        shared[f"{name}_both"] = np.mean((used > 0.2) & (used < 0.8))
    assert shared["gsae"] > shared["topk"] + 0.1
    assert shared["gsae_both"] >= shared["topk_both"]
    assert fvu["gsae"] < fvu["topk"] + 0.1


def test_worked_modality_score():
    first, second = np.float32([[2, 0, 0], [0, 0, 1]]), np.float32([[1, 0, 0], [0, 3, 0], [2, 0, 0]])
    np.testing.assert_allclose(modality_score(first, second), [0.5, 0.0, 1.0])
    silent = modality_score(np.zeros((2, 1)), scipy.sparse.csr_matrix((3, 1)))
    assert np.isnan(silent).all()


def explicit_mms(a, b, u, v, *, same):
    """The score by its definition, with all pairs written out."""
    out = []
    unit = [t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-300) for t in (u, v)]
    S = unit[0] @ unit[1].T
    for j in range(a.shape[1]):
        scaled = []
        for z in (a[:, j], b[:, j]):
            spread = z.max() - z.min()
            scaled.append((z - z.min()) / spread if spread > 0 else z * 0)
        A = np.outer(*scaled)
        if same:
            np.fill_diagonal(A, 0)
        out.append((A * S).sum() / A.sum() if A.sum() > 0 else 0.0)
    return np.array(out)


@given(st.integers(0, 10**6))
def test_monosemanticity_is_the_sum_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.gamma(2, 1, (n, 6)) * (rng.random((n, 6)) < 0.4) for n in (9, 12))
    a[:, 0] += 0.5  # active in every row
    a[:, 1] = 0  # in none
    a[:, 2], a[3, 2] = 0, 2.0  # in one
    u, v = rng.normal(size=(9, 4)), rng.normal(size=(12, 4))
    u[2] = 0
    cross = multimodal_monosemanticity(scipy.sparse.csr_matrix(a), b, u, v)
    np.testing.assert_allclose(cross, explicit_mms(a, b, u, v, same=False), atol=1e-10)
    within = multimodal_monosemanticity(a, a, u, u)
    np.testing.assert_allclose(within, explicit_mms(a, a, u, u, same=True), atol=1e-10)
    assert within[1] == within[2] == 0
    assert (np.abs(cross) <= 1 + 1e-9).all()


def test_monosemanticity_of_a_latent_of_one_meaning_is_one():
    u = np.repeat([[1.0, 0], [0, 1.0]], 3, axis=0)
    z = np.array([[1, 1], [2, 0], [3, 0], [0, 0], [0, 0], [0, 1.0]])
    found = multimodal_monosemanticity(z, z.copy(), u, u.copy())
    assert found == pytest.approx([1.0, 0.5])
    with pytest.raises(InputError, match="not negative"):
        multimodal_monosemanticity(-z, z, u, u)


def test_tables_of_two_widths_and_missing_partners_are_refused_with_the_remedy():
    with pytest.raises(InputError, match="align them first"):
        GroupSparse(6, 16, k=3, options=Options(), n_partner=5)
    with pytest.raises(InputError, match="partner=Y"):
        GroupSparse(6, 16, k=3, options=Options())
    for wrong in ({"mask": 1.0}, {"group_weight": -1.0}):
        with pytest.raises(InputError):
            Options(**wrong).check()


def test_rows_without_a_partner_are_nan_and_still_teach_and_codes_survive_saving(tmp_path):
    rng = np.random.default_rng(0)
    sources = rng.gamma(2, 1, (600, 10)) * (rng.random((600, 10)) < 0.2)
    X, Y = (np.float32(sources @ rng.normal(size=(10, 12)) + 1) for _ in range(2))
    lonely_x, lonely_y = X.copy(), Y.copy()
    lonely_y[:200], lonely_x[400:] = np.nan, np.nan
    settings = {"n_latents": 32, "k": 4, "n_steps": 60, "random_state": 0, "validation": 0.0}
    sae = bs.sae.SAE("group_sparse", **settings).fit(lonely_x, partner=lonely_y)
    assert sae.metrics_["n_rows"] == 400  # rows that have the first modality
    assert sae.evaluate(X)["fvu"] < 0.5
    assert sae.evaluate(Y, table=1)["fvu"] < 0.5
    sae.save(tmp_path)
    again = bs.sae.load(tmp_path)
    for table, rows in enumerate((X, Y)):
        Z = sae.codes(rows, table=table)
        assert (again.codes(rows, table=table) != Z).nnz == 0
        assert (sae.codes(rows[5:6], table=table) != Z[5]).nnz == 0
        assert np.array_equal(again.inverse_transform(Z, table=table), sae.inverse_transform(Z, table=table))
    lonely_y[450] = np.nan
    with pytest.raises(InputError, match="neither modality"):
        bs.sae.SAE("group_sparse", **settings).fit(lonely_x, partner=lonely_y)
