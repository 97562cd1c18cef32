"""Semi-NMF: worked numbers, the descent it promises, the released code, exact codes, hierarchy, the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import biosae as bs
from biosae.errors import FormatError, InputError
from biosae.sae import semi_nmf
from biosae.sae.direct import nonnegative_codes
from biosae.sae.semi_nmf import Factors, SemiNMF

REFERENCE = Path(__file__).parent / "reference" / "methods" / "snmf.npz"


def rows_of(n=400, d=24, m=6, active=2, noise=0.0, seed=0, entries=None):
    """Rows, atoms and codes; with ``entries`` each atom has that many coordinates, no two atoms the same one."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d))
    if entries:
        atoms *= (rng.permutation(d)[: m * entries].reshape(m, entries)[:, :, None] == np.arange(d)).any(1)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.where(rng.random((n, m)).argsort(1) < active, rng.uniform(0.5, 2, (n, m)), 0)
    return (codes @ atoms + noise * rng.standard_normal((n, d))).astype(np.float32), atoms, codes


def test_the_worked_numbers():
    # the released code has rows as columns: A = ((1, 2), (-1, -2)) holds the rows (1, -1) and (2, -2)
    rows, codes = np.array([[1.0, -1.0], [2.0, -2.0]]), np.ones((2, 1))
    atoms = semi_nmf.best_atoms(rows, codes, eps=0)
    np.testing.assert_allclose(atoms, [[1.5, -1.5]], atol=1e-12)
    codes = semi_nmf.update_codes(codes, rows @ atoms.T, atoms @ atoms.T, eps=0)
    np.testing.assert_allclose(codes.ravel(), [np.sqrt(2 / 3), np.sqrt(4 / 3)], atol=1e-12)  # 0.8165, 1.1547
    assert round(float(np.square(rows - codes @ atoms).sum()), 4) == 0.2446
    # the closed form: with codes (1, 2) the residual is zero
    assert (
        np.square(rows - np.array([[1.0], [2.0]]) @ semi_nmf.best_atoms(rows, np.array([[1.0], [2.0]]), eps=0)).sum()
        < 1e-20
    )


@pytest.mark.parametrize("init", semi_nmf.STARTS)
def test_without_winner_take_all_the_loss_never_rises_in_200_iterations(init):
    rows = np.random.default_rng(3).standard_normal((60, 10))
    first = semi_nmf.start(rows, 5, init=init, random_state=1)
    found = semi_nmf.factorise(rows, first, n_steps=200, patience=200, tol=0, eps=0)
    assert len(found.losses) == 200
    assert max(np.diff(found.losses)) <= 1e-9 * np.square(rows).sum()
    assert found.losses[-1] < 0.9 * found.losses[0]
    np.testing.assert_allclose(np.square(rows - found.codes @ found.atoms).sum(), found.loss, rtol=1e-9)


def test_with_winner_take_all_the_loss_does_rise_and_the_best_pair_is_kept():
    rows = np.random.default_rng(1).standard_normal((60, 20))
    found = semi_nmf.factorise(rows, semi_nmf.start(rows, 6), keep=0.2, n_steps=200, patience=200, tol=0)
    assert max(np.diff(found.losses)) > 0
    assert found.loss == min(found.losses) < found.losses[-1]
    np.testing.assert_allclose(np.square(rows - found.codes @ found.atoms).sum(), found.loss, rtol=1e-9)
    assert ((found.atoms != 0).sum(1) == 4).all()


@given(st.integers(1, 12), st.integers(1, 8), st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_steps_keep_their_invariants(d, m, share, seed):
    rng = np.random.default_rng(seed)
    rows, codes = rng.standard_normal((9, d)), rng.random((9, m))
    atoms = semi_nmf.best_atoms(rows, codes)
    kept = semi_nmf.keep_largest(atoms, share)
    assert ((kept != 0).sum(1) == max(1, int(np.ceil(share * d)))).all()
    scaled, unit_codes = semi_nmf.scale_codes(kept, codes)
    np.testing.assert_allclose(unit_codes @ scaled, codes @ kept, atol=1e-9 * (1 + np.abs(kept).max()))
    new = semi_nmf.update_codes(unit_codes, rows @ scaled.T, scaled @ scaled.T)
    assert (new >= 0).all() and np.isfinite(new).all()


def test_ties_keep_more_than_asked_for():
    np.testing.assert_array_equal(semi_nmf.keep_largest(np.array([[1.0, -1.0, 0.5, 1.0]]), 0.25), [[1, -1, 0, 1]])


def test_a_latent_that_no_row_uses_is_drawn_again():
    rows, _, _ = rows_of(n=50)
    rows = rows.astype(np.float64)
    dead = Factors(np.zeros((6, 24)), np.random.default_rng(0).random((50, 6)) * np.array([1, 1, 1, 1, 1, 0.0]))
    alive = semi_nmf.factorise(rows, dead, n_steps=300, patience=300, tol=0)
    assert (np.linalg.norm(alive.codes, axis=0) > 0).all()
    five = semi_nmf.factorise(rows, Factors(dead.atoms[:5], dead.codes[:, :5]), n_steps=300, patience=300, tol=0)
    assert alive.loss < 0.8 * five.loss


def test_equals_the_released_code_on_the_same_start():
    made = np.load(REFERENCE)
    for name in ("dense", "sparse"):
        keep = float(made[f"{name}_keep"])
        first = Factors(np.zeros_like(made["atoms_start"].T), made["codes_start"])
        found = semi_nmf.factorise(
            made["rows"], first, keep=None if keep == 1 else keep, n_steps=int(made["n_steps"]), patience=1000, tol=1e-4
        )
        np.testing.assert_allclose(found.atoms, made[f"{name}_atoms"].T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.codes, made[f"{name}_codes"], rtol=1e-5, atol=1e-5)


def test_starts_equal_the_released_code_where_they_are_not_random():
    made = np.load(REFERENCE)
    first = semi_nmf.start(made["rows"], made["svd_atoms"].shape[1], init="svd")
    sign = np.sign(
        (first.atoms * made["svd_atoms"].T).sum(1)
    )  # of a singular vector it is free, and codes are cut at 0
    np.testing.assert_allclose(first.atoms * sign[:, None], made["svd_atoms"].T, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(first.codes[:, sign > 0], made["svd_codes"][:, sign > 0], rtol=1e-5, atol=5e-5)
    assert (sign > 0).any()


def test_kmeans_start_finds_separated_clusters():
    rng = np.random.default_rng(0)
    centres = np.eye(3) * 10
    rows = (centres[rng.integers(0, 3, 200)] + 0.1 * rng.standard_normal((200, 3))).astype(np.float64)
    first = min((semi_nmf.start(rows, 3, init="kmeans", random_state=s) for s in range(5)),
                key=lambda f: np.square(rows - f.codes @ f.atoms).sum())  # fmt: skip
    nearest = np.linalg.norm(first.atoms[:, None] - centres[None], axis=2).min(0)
    assert (nearest < 0.1).all()
    assert set(np.unique(first.codes)) == {1e-6, 1.0}


# --------------------------------------------------------------------------------------------- non-negative codes


@given(st.integers(2, 12), st.integers(1, 10), st.integers(0, 10**6))
def test_codes_are_the_minimum_of_non_negative_least_squares(d, m, seed):
    rng = np.random.default_rng(seed)
    atoms, x = rng.standard_normal((m, d)).astype(np.float32), rng.standard_normal((5, d)).astype(np.float32)
    z = nonnegative_codes(x, atoms, None).toarray()
    assert (z >= 0).all()
    error = np.linalg.norm(x - z @ atoms, axis=1)
    best = [scipy.optimize.nnls(atoms.T.astype(np.float64), row.astype(np.float64))[1] for row in x]
    np.testing.assert_allclose(error, best, atol=1e-4)


@pytest.mark.parametrize(("d", "m"), [(40, 30), (5, 40)])
def test_codes_with_many_active_or_dependent_atoms(d, m):
    rng = np.random.default_rng(0)
    atoms = (rng.standard_normal((m, d)) + 1).astype(np.float32)
    atoms[1] = atoms[0]
    x = np.concatenate([rng.random((10, m)) @ atoms, rng.standard_normal((10, d)), atoms[:2]]).astype(np.float32)
    z = nonnegative_codes(x, atoms, None).toarray()
    best = [scipy.optimize.nnls(atoms.T.astype(np.float64), row.astype(np.float64))[1] for row in x]
    np.testing.assert_allclose(np.linalg.norm(x - z @ atoms, axis=1), best, atol=1e-4 * np.abs(x).max())
    assert (z >= 0).all() and np.isfinite(z).all()


def test_codes_of_orthogonal_atoms_are_the_positive_parts():
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    np.testing.assert_allclose(
        nonnegative_codes(x, np.eye(4, dtype=np.float32) * 2, None).toarray(), np.maximum(x, 0) / 2, atol=1e-6
    )
    assert nonnegative_codes(x, np.zeros((3, 4), np.float32), None).nnz == 0


def test_k_chooses_greedily():
    x, atoms = np.array([[1.0, 0.9, 0.0]], np.float32), np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]], np.float32)
    full = nonnegative_codes(x, atoms, None).toarray()[0]
    np.testing.assert_allclose(full, [1 - 0.6 * 0.9 / 0.8, 0.9 / 0.8, 0], atol=1e-6)
    np.testing.assert_allclose(nonnegative_codes(x, atoms, 1).toarray()[0], [0, 0.6 + 0.72, 0], atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the coder


@pytest.fixture(scope="module")
def fitted():
    X, atoms, _ = rows_of(n=800, noise=0.01)
    return SemiNMF(6, normalise="none", n_steps=1500, tol=1e-9, random_state=0).fit(X), X, atoms


def test_finds_the_plane_of_any_directions_and_sparse_directions_themselves(fitted):
    model, _, atoms = fitted
    assert model.metrics_["fvu_val"] < 0.02
    space = np.linalg.svd(np.linalg.qr(model.decoder_.T)[0].T @ np.linalg.qr(atoms.T)[0])[1]
    assert space.min() > 0.99
    X, atoms, codes = rows_of(n=800, noise=0.01, entries=4)
    sparse = SemiNMF(6, keep=4 / 24, normalise="none", n_steps=1000, random_state=0).fit(X)
    cosine = sparse.decoder_ @ atoms.T
    assert (cosine.max(0) > 0.99).all()
    np.testing.assert_allclose(sparse.codes(X).toarray()[:, cosine.argmax(0)], codes, atol=0.1)


def test_atoms_are_unit_and_codes_in_units_of_the_embedding(fitted):
    model, X, _ = fitted
    np.testing.assert_allclose(np.linalg.norm(model.decoder_, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model.codes(X * 4).toarray(), 4 * model.codes(X).toarray(), rtol=1e-3, atol=1e-4)


def test_codes_of_training_rows_are_at_least_as_good_as_the_factors(fitted):
    model, X, _ = fitted
    x = X.astype(np.float64)
    assert model.metrics_["fvu"] * np.square(x - x.mean(0)).sum() <= (model.losses_[-1] + 1e-4) * np.square(x).sum()


def test_a_row_is_coded_alone_and_after_a_save(fitted, tmp_path):
    model, X, _ = fitted
    codes = model.codes(X[:40])
    for i in (0, 17, 39):
        alone = model.codes(X[i : i + 1])
        assert (alone != codes[i]).nnz == 0
    model.save(tmp_path / "m")
    again = bs.sae.load(tmp_path / "m")
    assert isinstance(again, SemiNMF) and (again.codes(X[:40]) != codes).nnz == 0
    assert again.losses_ == model.losses_ and again.get_params() == model.get_params()
    assert again.metrics_["fvu"] == model.metrics_["fvu"]
    with pytest.raises(FormatError, match="SemiNMF"):
        bs.sae.SAE.load(tmp_path / "m")


def test_the_same_seed_gives_the_same_model():
    X = rows_of(n=120)[0]
    a, b, c = (SemiNMF(4, n_steps=20, random_state=s).fit(X) for s in (0, 0, 1))
    np.testing.assert_array_equal(a.decoder_, b.decoder_)
    assert not np.array_equal(a.decoder_, c.decoder_)


@pytest.mark.parametrize("X", [np.zeros((30, 5)), np.full((30, 5), 3.0)], ids=["zero", "constant"])
@pytest.mark.parametrize("normalise", ["none", "centre"])
def test_zero_and_constant_rows_are_finite(X, normalise):
    model = SemiNMF(3, normalise=normalise, random_state=0, n_steps=30).fit(X)
    Z = model.codes(X)
    assert np.isfinite(model.decoder_).all() and np.isfinite(Z.data).all()
    np.testing.assert_allclose(model.inverse_transform(Z), X, atol=1e-3)


def test_one_row_more_atoms_than_features_and_k_beyond_them():
    X = rows_of(n=60)[0][:, :3]
    model = SemiNMF(8, k=50, n_steps=30, random_state=0).fit(X)
    assert model.codes(X[:1]).shape == (1, 8)
    assert np.isfinite(model.inverse_transform(model.codes(X))).all()
    with pytest.warns(UserWarning, match="lower n_latents"):
        SemiNMF(8, n_steps=5, validation=0, random_state=0).fit(X[:5])
    assert np.diff(SemiNMF(8, k=2, n_steps=30, random_state=0).fit(X).codes(X).indptr).max() <= 2


def test_wrong_settings_name_the_setting():
    X = rows_of(n=30)[0]
    for bad, word in (({"init": "kmean"}, "kmeans"), ({"keep": 2}, "keep"), ({"n_latents": 0}, "n_latents"),
                      ({"normalise": "layer"}, "normalise"), ({"tol": -1}, "tol")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            SemiNMF(**bad).fit(X)


def test_patients_are_held_out_whole_and_remembered():
    X = rows_of(n=200)[0]
    groups = np.repeat([f"p{i}" for i in range(20)], 10)
    model = SemiNMF(4, n_steps=20, random_state=0).fit(X, groups=groups)
    assert model.validation_["by"] == "groups" and model.validation_["n_rows"] % 10 == 0
    seen = model.trained_on([f"p{i}" for i in range(20)])
    assert (~seen).sum() == model.validation_["n_groups"] > 0


# ------------------------------------------------------------------------------------------------------ hierarchy


def test_hierarchy_finds_the_broader_directions_and_a_joint_fit_lowers_the_error():
    rng = np.random.default_rng(0)
    broad = np.eye(2, 12) * 3
    narrow = np.concatenate([broad[[0]] * w for w in (1, 1, 1)] + [broad[[1]] * w for w in (1, 1, 1)])
    narrow = narrow + 0.1 * rng.standard_normal(narrow.shape)
    X = (rng.random((100, 6)) @ narrow).astype(np.float32)
    model = SemiNMF(6, normalise="none", n_steps=300, random_state=0).fit(X)
    levels = semi_nmf.hierarchy(model, (4, 2), random_state=0)
    assert [lv.weights.shape for lv in levels] == [(6, 4), (4, 2)]
    assert all((lv.weights >= 0).all() for lv in levels)
    span = np.linalg.qr(levels[-1].directions.T)[0]
    true = np.linalg.qr(broad.T)[0]
    assert np.linalg.svd(span.T @ true)[1].min() > 0.95  # the same plane
    fitted = semi_nmf.hierarchy(model, (4, 2), X=X, n_steps=60, random_state=0)
    assert all((lv.weights >= 0).all() for lv in fitted)
    np.testing.assert_allclose(fitted[0].directions, fitted[1].weights @ fitted[1].directions, atol=1e-6)

    def error(levels):
        atoms = levels[0].weights @ levels[1].weights @ levels[1].directions
        return np.square(X - model.codes(X).toarray() @ atoms).mean()

    assert error(fitted) <= error(levels) * 1.001
    with pytest.raises(InputError, match="fall"):
        semi_nmf.hierarchy(model, (4, 5))
