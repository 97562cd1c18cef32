"""Stability between dictionaries: worked numbers, invariances, the rotated null, planted overlap."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from biosae.errors import IdentityError, InputError, NotFittedError
from biosae.sae import SAE
from biosae.sae import agreement as module
from biosae.sae.agreement import stability

few = hypothesis_settings(max_examples=25, deadline=None)


def atoms(m, d, seed=0):
    a = np.random.default_rng(seed).normal(size=(m, d))
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def pair(A, B, **kwargs):
    return stability([A, B], **{"n_null": 2, "random_state": 0} | kwargs).pairs[0]


def stub(decoder, *, codes=None, density=None, fingerprint=None):
    """The parts of a fitted SAE that are used; ``codes`` stand for what it gives for the shared rows."""
    decoder = np.asarray(decoder, np.float32)
    return SimpleNamespace(
        decoder_=decoder,
        density_=np.ones(len(decoder)) if density is None else np.asarray(density),
        fingerprint_=fingerprint,
        codes=lambda X: scipy.sparse.csr_matrix(np.asarray(codes, np.float32)[: len(X)]),
    )


# ------------------------------------------------------------------------------------------------ atoms


def test_worked_numbers():
    found = pair(np.eye(3), np.array([[0, 1, 0], [1, 0, 0], [0.6, 0, 0.8]]))
    assert [found.mmcs, found.mmcs_back, found.hungarian] == pytest.approx([14 / 15] * 3)
    assert found.shared == 1 and found.exact and (found.n_first, found.n_second) == (3, 3)


def test_worked_matching():
    # C = [[.9, .8], [.85, .1]]: taking .9 first costs more than it gives
    C = np.array([[0.9, 0.8], [0.85, 0.1]])
    forth, _, paired, exact = module.compare(C, np.eye(2))
    assert exact and forth.mean() == pytest.approx(0.875) and paired.mean() == pytest.approx(0.825)
    assert module._scores(C, np.eye(2), 0.82)[0] == pytest.approx([0.875, 0.85, 0.825, 0.5])


@few
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_scores_equal_dense_formulas(seed, a, b, d):
    A, B = atoms(a, d, seed), atoms(b, d, seed + 1)
    found, C = pair(A, B, threshold=0.3), A @ B.T
    rows, columns = linear_sum_assignment(-C)
    best = C[rows, columns]
    assert found.mmcs == pytest.approx(C.max(1).mean(), abs=1e-6)
    assert found.mmcs_back == pytest.approx(C.max(0).mean(), abs=1e-6)
    assert found.hungarian == pytest.approx(best.mean(), abs=1e-6)
    assert found.shared == pytest.approx((best >= 0.3).mean(), abs=1e-6) or np.abs(best - 0.3).min() < 1e-5
    if a <= b:
        assert found.hungarian <= found.mmcs + 1e-6
    if a >= b:
        assert found.hungarian <= found.mmcs_back + 1e-6


@few
@given(st.integers(0, 10_000))
def test_order_length_and_common_rotation_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    A, B = atoms(9, 5, seed), atoms(7, 5, seed + 1)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    changed = [rng.permutation(D * rng.uniform(0.1, 50, (len(D), 1))) @ turn for D in (A, B)]
    first, second = pair(A, B), pair(*changed)
    for name in module.SCORES:
        assert getattr(second, name) == pytest.approx(getattr(first, name), abs=1e-5)


def test_identical_dictionaries_score_one():
    A = atoms(40, 16)
    found = stability([A, A[::-1], 3 * A], random_state=0, n_null=5)
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for p in found.pairs:
        assert [p.mmcs, p.mmcs_back, p.hungarian, p.shared] == pytest.approx([1] * 4)
        assert max(p.null_q95["mmcs"], p.null_q95["hungarian"]) < 0.8
    np.testing.assert_allclose(found.best, 1, atol=1e-6)
    assert found.z.min() > 3 and found.activation is None


def test_unrelated_dictionaries_lie_within_the_null():
    inside = 0
    for seed in range(10):
        found = stability([atoms(60, 24, 2 * seed), atoms(60, 24, 2 * seed + 1)], n_null=20, random_state=seed)
        p = found.pairs[0]
        inside += p.mmcs <= p.null_q95["mmcs"]
        for name in ("mmcs", "mmcs_back", "hungarian"):
            assert getattr(p, name) == pytest.approx(p.null_mean[name], abs=0.03)
        assert abs(found.z.mean()) < 0.5 and found.z.std() == pytest.approx(1, abs=0.35)
    assert inside >= 7


def test_null_of_one_random_pair_has_its_closed_form():
    # two unit vectors in three dimensions: the cosine is uniform on [-1, 1] (Archimedes)
    p = pair(np.eye(1, 3), np.eye(1, 3), n_null=4000)
    assert p.null_mean["mmcs"] == pytest.approx(0, abs=0.04)
    assert p.null_q95["mmcs"] == pytest.approx(0.9, abs=0.02)
    assert p.null_mean["shared"] == pytest.approx(0.15, abs=0.025)  # share of cosines above 0.7


def test_same_principal_axes_exceed_a_rotation_but_not_the_second_moment():
    # unrelated atoms that fill the same few directions, as dictionaries of one set of embeddings do
    size = np.geomspace(1, 0.05, 24)
    A, B = (np.random.default_rng(s).normal(size=(200, 24)) * size for s in (1, 2))
    weak = stability([A, B], n_null=10, random_state=0)
    strong = stability([A, B], n_null=10, null="second_moment", random_state=0)
    assert weak.pairs[0].mmcs > weak.pairs[0].null_q95["mmcs"] + 0.1 and weak.z.mean() > 1
    for name in ("mmcs", "mmcs_back", "hungarian"):
        assert getattr(strong.pairs[0], name) == pytest.approx(strong.pairs[0].null_mean[name], abs=0.02)
    assert abs(strong.z.mean()) < 0.3 and strong.z.std() == pytest.approx(1, abs=0.35)
    assert stability([A, A], n_null=10, null="second_moment", random_state=0).z.mean() > 1


def test_second_moment_null_keeps_the_second_moment_of_the_atoms():
    A = (atoms(300, 6) * np.geomspace(1, 0.1, 6)).astype(np.float32)
    there, back = module._coordinates([A], "second_moment")
    turned = A @ there @ module._rotation(6, np.random.default_rng(0)) @ back
    np.testing.assert_allclose(turned.T @ turned, A.T @ A, rtol=1e-3, atol=1e-4)
    few, deep = module._coordinates([A[:3]], "second_moment")  # fewer atoms than features: within their span
    assert few.shape == (6, 3) and deep.shape == (3, 6)
    np.testing.assert_allclose(A[:3] @ few @ deep, A[:3], atol=1e-5)


def test_half_the_atoms_are_shared():
    shared = atoms(40, 64, 1)
    rng = np.random.default_rng(0)
    A = np.vstack([shared, atoms(40, 64, 2)])
    noisy = shared + 0.1 * atoms(40, 64, 3)
    B = rng.permutation(np.vstack([noisy, atoms(40, 64, 4)]))
    found = stability([A, B], random_state=0)
    assert found.pairs[0].shared == 0.5 > 0 == found.pairs[0].null_q95["shared"]
    assert found.pairs[0].hungarian > found.pairs[0].null_q95["hungarian"]
    assert found.best[:40].min() > 0.97 and found.best[40:].max() < 0.7
    assert found.z[:40].min() > 5 and abs(found.z[40:].mean()) < 1


def test_latents_of_the_first_model_are_averaged_over_the_others():
    A = np.eye(3)
    found = stability([A, A, [[1.0, 0, 0], [0, 0.6, 0.8]]], n_null=3, random_state=0)
    np.testing.assert_allclose(found.best, [1, (1 + 0.6) / 2, (1 + 0.8) / 2], rtol=1e-6)


def test_greedy_matching_is_a_matching_below_the_optimum_and_is_announced(monkeypatch):
    A, B = atoms(150, 8), atoms(90, 8, 1)
    forth, back, best, exact = module.compare(A, B)
    assert exact
    monkeypatch.setattr(module, "EXACT_CELLS", 400)
    monkeypatch.setattr(module, "CANDIDATES", 3)
    monkeypatch.setattr(module, "BLOCK_CELLS", 1000)
    forth_in_blocks, back_in_blocks, greedy, exact = module.compare(A, B)
    np.testing.assert_allclose(forth_in_blocks, forth, rtol=1e-6)
    np.testing.assert_allclose(back_in_blocks, back, rtol=1e-6)
    assert not exact and len(greedy) == len(best) == 90
    assert 0.95 * best.mean() < greedy.mean() <= best.mean()
    assert not pair(A, B).exact
    copy = np.random.default_rng(0).permutation(A)
    assert pair(A, copy).hungarian == pytest.approx(1)


def test_seed_decides_the_null():
    A, B = atoms(12, 6), atoms(12, 6, 1)
    assert pair(A, B, random_state=3).null_mean == pair(A, B, random_state=3).null_mean
    assert pair(A, B, random_state=3).null_mean != pair(A, B, random_state=4).null_mean


def test_rotations_are_orthogonal_and_uniform():
    rng = np.random.default_rng(0)
    turns = np.stack([module._rotation(3, rng) for _ in range(3000)])
    np.testing.assert_allclose(turns[0] @ turns[0].T, np.eye(3), atol=1e-6)
    assert np.abs(turns.mean(0)).max() < 0.05
    np.testing.assert_allclose(np.square(turns).mean(0), np.full((3, 3), 1 / 3), atol=0.03)


# ------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("cells", [module.BLOCK_CELLS, 1])
def test_activation_match_equals_dense_correlations(monkeypatch, cells):
    monkeypatch.setattr(module, "BLOCK_CELLS", cells)
    rng = np.random.default_rng(0)
    codes = [scipy.sparse.random(200, m, 0.1, random_state=rng).toarray() for m in (15, 11)]
    codes[1][:, 4] = 3 * codes[0][:, 7]
    codes[0][:, 2] = 0  # never active on these rows
    codes[1][:, 5] = 2.5  # active on all of them alike
    models = [stub(atoms(len(c.T), 6, s), codes=c) for s, c in enumerate(codes)]
    found = stability(models, np.zeros((200, 6)), n_null=2, random_state=0)
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(codes[0].astype(np.float32).T, codes[1].astype(np.float32).T)[:15, 15:]
    p = found.pairs[0]
    assert p.activation == pytest.approx(np.nanmean(np.nanmax(np.delete(r, 2, 0), axis=1)), abs=1e-6)
    assert p.activation_back == pytest.approx(np.nanmean(np.nanmax(np.delete(r, 5, 1), axis=0)), abs=1e-6)
    assert (p.n_constant_first, p.n_constant_second) == (1, 1)
    assert np.isnan(found.activation[2]) and found.activation[7] == pytest.approx(1)


def test_activation_match_finds_what_decoders_do_not_show():
    # the same codes read out along other directions: two layers, or a rotated space
    codes = scipy.sparse.random(300, 10, 0.2, random_state=np.random.default_rng(1)).toarray()
    order = np.random.default_rng(2).permutation(10)
    models = [stub(atoms(10, 12, 5), codes=codes), stub(atoms(10, 12, 6), codes=7 * codes[:, order])]
    p = stability(models, np.zeros((300, 12)), n_null=2, random_state=0).pairs[0]
    assert [p.activation, p.activation_back] == pytest.approx([1, 1]) and p.mmcs < 0.8


def test_no_code_varies():
    models = [stub(np.eye(2), codes=np.zeros((4, 2)))] * 2
    found = stability(models, np.zeros((4, 2)), n_null=2)
    assert np.isnan(found.pairs[0].activation) and found.pairs[0].n_constant_first == 2
    assert np.isnan(found.activation).all()


# ------------------------------------------------------------------------------------------------ models


def test_dead_latents_take_no_part():
    A = atoms(6, 5)
    A[2] = 0  # a dead latent may have no direction
    density = np.array([0.1, 0.2, 0.0, 0.1, 0.0, 0.3])
    found = stability([stub(A, density=density), A[density > 0]], n_null=2, random_state=0)
    assert found.n_dead == (2, 0) and found.pairs[0].n_first == 4 and found.pairs[0].hungarian == pytest.approx(1)
    np.testing.assert_array_equal(np.isnan(found.best), density == 0)
    np.testing.assert_array_equal(np.isnan(found.z), density == 0)


def test_fitted_models_agree_more_than_chance():
    rng = np.random.default_rng(0)
    truth, strengths = atoms(20, 16, 7), np.zeros((2000, 20))
    for row in strengths:
        row[rng.choice(20, 2, replace=False)] = rng.uniform(0.5, 1.5, 2)
    X = (strengths @ truth + 2).astype(np.float32)
    settings = {"n_latents": 24, "k": 2, "n_steps": 300, "learning_rate": 5e-3, "device": "cpu"}
    models = [SAE(**settings, random_state=seed).fit(X) for seed in (0, 1)]
    found = stability(models, X[:500], random_state=0)
    p = found.pairs[0]
    assert p.mmcs > p.null_q95["mmcs"] + 0.1 and p.hungarian > p.null_q95["hungarian"] + 0.1
    assert p.shared > p.null_q95["shared"] and p.activation > 0.5
    recovered = (models[0].decoder_ @ truth.T).max(1) > 0.97
    lost = ~recovered & ~np.isnan(found.best)
    assert recovered.sum() > 5 and np.nanmean(found.z[recovered]) > (np.nanmean(found.z[lost]) if lost.any() else 0)


def test_refusals_say_what_to_do():
    A = atoms(4, 3)
    with pytest.raises(InputError, match="at least two"):
        stability([A])
    with pytest.raises(InputError, match=r"atoms \[1\] have length 0"):
        stability([A, A * [[1], [0], [1], [1]]])
    with pytest.raises(InputError, match="one encoder"):
        stability([A, atoms(4, 5)])
    with pytest.raises(InputError, match="finite table"):
        stability([A, A * np.nan])
    with pytest.raises(InputError, match="no live latent"):
        stability([A, stub(A, density=np.zeros(4))])
    with pytest.raises(InputError, match="leave X out"):
        stability([A, A], np.zeros((5, 3)))
    with pytest.raises(InputError, match="n_null"):
        stability([A, A], n_null=0)
    with pytest.raises(InputError, match="did you mean 'rotation'"):
        stability([A, A], null="rotatoin")
    with pytest.raises(IdentityError, match="same embeddings"):
        stability([stub(A, fingerprint="a"), stub(A, fingerprint="b")])
    with pytest.raises(NotFittedError, match="model 1"):
        stability([A, SAE()])
