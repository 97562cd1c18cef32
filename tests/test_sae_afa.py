"""Top-AFA against worked numbers, the authors' code and its own definition; the quasi-orthogonality metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae import SAE, eps_lbo, load, planted, recovery
from biosae.sae.methods.afa import (
    AFAOptions,
    TopAFA,
    code_norm_bounds,
    norm_matched,
    norm_mismatch,
    quasi_orthogonality,
)
from biosae.sae.methods.base import Now

REFERENCE = Path(__file__).parent / "reference" / "methods" / "top_afa.npz"
T = torch.tensor


def model(W_enc, W_dec, b_dec, **options) -> TopAFA:
    made = TopAFA(W_dec.shape[1], len(W_dec), k=1, options=AFAOptions(**options))
    with torch.no_grad():
        made.W_enc.copy_(torch.as_tensor(W_enc))
        made.W_dec.copy_(torch.as_tensor(W_dec))
        made.b_dec.copy_(torch.as_tensor(b_dec))
    return made


def identity(**options) -> TopAFA:
    return model(torch.eye(3), torch.eye(3), torch.zeros(3), **options)


@pytest.mark.parametrize(
    ("never_all", "row", "code"),
    [
        (False, (4, 3, 0), (4, 3, 0)),
        (True, (4, 3, 0), (4, 3, 0)),
        (False, (4, 3, 2), (4, 3, 2)),
        (True, (4, 3, 2), (4, 3, 0)),
        (False, (0, 0, 0), (0, 0, 0)),
        (False, (3, -4, 0), (3, 0, 0)),
    ],
)
def test_worked_numbers(never_all, row, code):
    assert identity(never_all=never_all).encode(T([row], dtype=torch.float32)).tolist() == [list(code)]


@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans())
def test_no_other_number_of_latents_comes_closer_to_the_norm(seed, m, never_all):
    draw = np.random.default_rng(seed)
    r, sizes = np.maximum(draw.standard_normal((5, m)), 0), draw.uniform(0.5, 2, m)
    target = draw.uniform(0, 3, 5)
    z = norm_matched(T(r), T(sizes), T(target), never_all=never_all).numpy()
    for i in range(5):
        weighted = np.sort((r[i] * sizes) ** 2)[::-1]
        gaps = np.abs(np.sqrt(np.cumsum(weighted)) - target[i])
        if never_all:
            gaps = gaps[:-1]
        kept = np.flatnonzero(z[i])
        assert set(z[i][kept]) <= set(r[i])
        wanted = 1 + int(np.argmin(gaps)) if len(gaps) else 1
        assert len(kept) == min(wanted, (r[i] > 0).sum())
        assert np.allclose(np.sort((z[i] * sizes) ** 2)[::-1][: len(kept)], weighted[: len(kept)])


def test_a_code_follows_the_scale_of_its_row():
    draw = np.random.default_rng(0)
    atoms = draw.standard_normal((30, 8)).astype(np.float32)
    made = model(atoms, atoms / np.linalg.norm(atoms, axis=1, keepdims=True), draw.standard_normal(8))
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    bias = made.b_dec.detach()
    torch.testing.assert_close(made.encode(bias + 4 * x), 4 * made.encode(bias + x))


@pytest.mark.parametrize(
    ("name", "scale"), [("unit", 1.0), ("free", np.linspace(0.3, 2, 40, dtype=np.float32)[:, None])]
)
def test_equals_the_authors_code(name, scale):
    found = np.load(REFERENCE)
    made = model(found["W_enc"], found["W_dec"] * scale, found["b_dec"], never_all=True)
    x = torch.from_numpy(found["x"])
    z = made.encode(x)
    np.testing.assert_allclose(z.detach(), found[f"{name}_feature_acts"], atol=1e-5)
    np.testing.assert_allclose(made.decode(z).detach(), found[f"{name}_sae_out"], atol=1e-5)
    assert float((z > 0).sum(1).float().mean()) == pytest.approx(float(found[f"{name}_l0_norm"]))
    squared = (made.decode(z) - x).square().mean()
    norm = norm_mismatch(z, x) / 32
    np.testing.assert_allclose(squared.item(), found[f"{name}_l2_loss"], rtol=1e-5)
    np.testing.assert_allclose(norm.item(), found[f"{name}_afa_loss"], rtol=1e-5)
    (squared + norm).backward()
    for weight in ("W_enc", "W_dec", "b_dec"):
        np.testing.assert_allclose(getattr(made, weight).grad, found[f"{name}_grad_{weight}"], atol=1e-5)


def test_the_weight_is_the_released_coefficient_times_d():
    found = np.load(REFERENCE)
    d = found["x"].shape[1]
    made = model(found["W_enc"], found["W_dec"], found["b_dec"], never_all=True, about_bias=False)
    loss = made.loss(torch.from_numpy(found["x"]), Now(k=1))
    assert float(loss.total.detach()) / d == pytest.approx(
        float(found["unit_l2_loss"] + found["unit_afa_loss"]), rel=1e-5
    )
    assert (loss.z > 0).any() and loss.residual.shape == found["x"].shape


def test_an_empty_code_has_a_finite_gradient():
    made = identity(weight=1.0)
    made.loss(T([[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]]), Now(k=1)).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_theory_on_two_atoms():
    """||x||^2 = 3.2 for two unit atoms with inner product 0.6 and f = (1, 1)."""
    assert code_norm_bounds(3.2, coherence=0.6, n_latents=2) == pytest.approx((2, 8))
    length, eps = quasi_orthogonality([3.2], [[1.0, 1.0]], sizes=[1, 1])
    assert length[0] ** 2 == pytest.approx(2) and eps[0] == pytest.approx(0.6)
    assert code_norm_bounds(1.0, coherence=0.5, n_latents=3)[1] == np.inf


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_bounds_hold_and_the_metric_never_exceeds_the_coherence(seed, m):
    draw = np.random.default_rng(seed)
    atoms = draw.standard_normal((m, 40))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    f = draw.uniform(0, 2, (3, m))
    coherence = np.abs(atoms @ atoms.T - np.eye(m)).max()
    square = ((f @ atoms) ** 2).sum(1)
    for i in range(3):
        low, high = code_norm_bounds(square[i], coherence=coherence, n_latents=m)
        assert low <= (f[i] ** 2).sum() * (1 + 1e-9) and (f[i] ** 2).sum() <= high * (1 + 1e-9)
    _, eps = quasi_orthogonality(square, scipy.sparse.csr_matrix(f), sizes=np.ones(m))
    assert (eps <= coherence + 1e-9).all()


def test_metric_counts_the_bias_and_the_norms_of_atoms():
    """Released code: f~ = activations times atom norms with ||b_dec|| behind; m is the number of latents."""
    length, eps = quasi_orthogonality([25.0, 0.0], scipy.sparse.csr_matrix([[2.0, 0, 1.0], [0, 0, 0]]), sizes=[2, 1, 1])
    np.testing.assert_allclose(length, [np.sqrt(17), 0])
    np.testing.assert_allclose(eps, [8 / (2 * 17), 0])
    length, _ = quasi_orthogonality([25.0], [[2.0, 0, 0]], sizes=[2, 1, 1], bias=3.0)
    assert length[0] == pytest.approx(5)
    assert quasi_orthogonality([1.0], [[0.0, 0.0]], sizes=[1, 1])[1][0] == np.inf
    assert np.isnan(quasi_orthogonality([1.0], [[1.0]], sizes=[1])[1][0])


def test_options_out_of_range_are_refused():
    with pytest.raises(InputError):
        AFAOptions(weight=-1.0).check()


def test_fit_save_and_metric(tmp_path):
    X = planted("offset", n_rows=1500, d=16, n_atoms=24, k=2, random_state=0).rows
    sae = SAE("top_afa", n_latents=48, n_steps=100, random_state=0).fit(X)
    codes = sae.codes(X)
    sae.save(tmp_path / "sae")
    assert (load(tmp_path / "sae").codes(X) != codes).nnz == 0
    length = np.sqrt(np.asarray(codes.power(2).sum(1)).ravel())
    found = eps_lbo(sae, X)
    np.testing.assert_allclose(found["norm_x"], np.linalg.norm(X, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["norm_f"], np.hypot(length, np.linalg.norm(sae.bias_)), rtol=1e-4)
    expected = np.abs(found["norm_x"] ** 2 - found["norm_f"] ** 2) / (47 * found["norm_f"] ** 2)
    np.testing.assert_allclose(found["eps_lbo"], expected, rtol=1e-6)


def test_norms_are_compared_about_the_bias():
    """Moving rows and b_dec together changes nothing, unless the norm term is that of the released code."""
    found = np.load(REFERENCE)
    x, shift = torch.from_numpy(found["x"]), torch.full((16,), 0.7)
    for about_bias in (True, False):
        totals = [
            model(found["W_enc"], found["W_dec"], found["b_dec"] + by.numpy(), about_bias=about_bias)
            .loss(x + by, Now(k=1))
            .total.item()
            for by in (0 * shift, shift)
        ]
        assert (totals[0] == pytest.approx(totals[1], rel=1e-4)) == about_bias


@pytest.mark.slow
def test_planted_atoms_are_found_in_part_and_not_at_all_with_the_released_norm_term():
    """4 of 64 atoms are active in a row; k is not given (numbers: docs/methods/top_afa.md)."""
    made = planted("sparse", n_rows=8000, k=4, noise=0.02, random_state=0)
    settings = {"n_latents": 128, "n_steps": 1000, "batch_size": 512, "random_state": 0}
    afa = SAE("top_afa", **settings).fit(made.rows)
    released = SAE("top_afa", options={"about_bias": False}, **settings).fit(made.rows)
    found = [recovery(sae.decoder_, made.atoms)["share_found"] for sae in (afa, released)]
    for sae, share in zip((afa, released), found, strict=True):
        length = np.sqrt(np.asarray(sae.codes(made.rows).power(2).sum(1)).ravel())
        ratio = np.median(length / np.linalg.norm(made.rows - sae.bias_, axis=1))
        print(sae.metrics_["fvu"], sae.metrics_["l0"], (sae.density_ == 0).mean(), share, ratio)
    assert 3 < afa.metrics_["l0"] < 12 and found[0] > 0.5
    assert released.metrics_["l0"] > 40 and found[1] < 0.1
