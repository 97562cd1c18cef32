"""PCA, ICA, k-means, NMF and dictionary learning: closed forms, scikit-learn itself, planted truth, the contract."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.cluster
import sklearn.decomposition

import biosae as bs
from biosae.errors import InputError
from biosae.sae import planted, recovery
from biosae.sae.baselines import METHODS, Baseline

D, M = 12, 6
SETTINGS = {"nmf": {"negative": "shift"}}


def rows(n=400, seed=0, kind="bidirectional", noise=0.01):
    return planted(kind, n_rows=n, d=D, n_atoms=M, k=2, noise=noise, random_state=seed)


def fitted(method, X, **settings):
    return Baseline(method, M, random_state=0, **{**SETTINGS.get(method, {}), **settings}).fit(X)


@pytest.fixture(scope="module")
def models():
    X = rows().rows
    return {name: fitted(name, X, k=2 if name == "dictionary" else None) for name in METHODS}, X


# --------------------------------------------------------------------------------------------- against definitions


def test_pca_is_the_eigenvectors_of_the_covariance():
    X = rows().rows
    model = fitted("pca", X, validation=0)
    value, vector = np.linalg.eigh(np.cov(X.astype(np.float64).T))
    axes = vector[:, ::-1][:, :M].T
    np.testing.assert_allclose(np.abs((model.decoder_ * axes).sum(1)), 1, atol=1e-4)
    assert model.metrics_["fvu"] == pytest.approx(value[:-M].sum() / value.sum(), rel=1e-3)
    codes = model.codes(X).toarray()
    np.testing.assert_allclose(np.cov(codes.T), np.diag(value[::-1][:M]), atol=1e-4)
    np.testing.assert_allclose(codes, (X - X.mean(0)) @ model.decoder_.T, atol=1e-5)


def test_all_components_reconstruct_exactly_and_fewer_codes_never_better():
    X = rows(noise=0.2).rows
    errors = [Baseline("pca", k=k, random_state=0).fit(X).evaluate(X)["fvu"] for k in (1, 3, 6, None)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10
    cut = Baseline("pca", k=3, random_state=0).fit(X)
    whole = Baseline("pca", random_state=0).fit(X).codes(X).toarray()
    kept = cut.codes(X)
    assert (np.diff(kept.indptr) == 3).all()
    least = -np.sort(-np.abs(whole), axis=1)[:, [2]]
    np.testing.assert_array_equal(kept.toarray(), np.where(np.abs(whole) >= least, whole, 0))


def test_ica_finds_independent_sources_that_pca_does_not():
    rng = np.random.default_rng(0)
    sources, mixing = rng.laplace(size=(4000, 4)), rng.standard_normal((4, D))
    X = (sources @ mixing).astype(np.float32)
    ica, pca = (Baseline(name, 4, random_state=0).fit(X) for name in ("ica", "pca"))
    assert recovery(ica.decoder_, mixing, signed=True, threshold=0.98)["share_found"] == 1
    assert recovery(pca.decoder_, mixing, signed=True, threshold=0.98)["share_found"] < 1
    assert ica.metrics_["fvu"] < 1e-6
    correlation = np.abs(np.corrcoef(ica.codes(X).toarray().T, sources.T)[:4, 4:])
    assert (correlation.max(1) > 0.98).all()


def test_ica_equals_scikit_learn():
    X = rows().rows
    model = fitted("ica", X, validation=0)
    peer = sklearn.decomposition.FastICA(M, whiten="unit-variance", max_iter=500, random_state=0).fit(X)
    np.testing.assert_allclose(
        model.inverse_transform(model.codes(X)), peer.inverse_transform(peer.transform(X)), atol=1e-4
    )
    lengths = np.linalg.norm(peer.mixing_, axis=0)
    ours, theirs = model.codes(X).toarray(), peer.transform(X) * lengths
    match = np.abs(model.decoder_ @ (peer.mixing_ / lengths)).argmax(1)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs[:, match]), atol=2e-3)


def test_kmeans_gives_each_row_its_nearest_centre():
    centres = np.eye(4, D, dtype=np.float32) * 8
    label = np.arange(200) % 4
    X = centres[label] + 0.1 * np.random.default_rng(0).standard_normal((200, D)).astype(np.float32)
    model = Baseline("kmeans", 4, random_state=0).fit(X)
    codes = model.codes(X)
    assert codes.nnz == 200 and (codes.data > 0).all() and model.k_ == 1
    found = model.inverse_transform(codes)
    np.testing.assert_allclose(found, centres[label], atol=0.1)
    peer = sklearn.cluster.MiniBatchKMeans(4, n_init=1).fit(X)
    peer.cluster_centers_ = model.bias_ + model._encoder
    np.testing.assert_array_equal(peer.predict(X), codes.indices)
    np.testing.assert_allclose(found, peer.cluster_centers_[codes.indices], atol=1e-5)


def test_nmf_codes_are_at_least_as_good_as_those_of_scikit_learn():
    X = np.abs(rows(noise=0.1).rows)
    model = Baseline("nmf", M, random_state=0, validation=0).fit(X)
    assert (model.decoder_ >= 0).all() and (model.codes(X).data > 0).all() and not model.bias_.any()
    peer = sklearn.decomposition.non_negative_factorization(
        X, H=model.decoder_, n_components=M, init="custom", update_H=False, max_iter=3000, tol=1e-9
    )[0]
    ours, theirs = (np.linalg.norm(X - z @ model.decoder_, axis=1) for z in (model.codes(X).toarray(), peer))
    assert (ours <= theirs + 1e-4).all()
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_nmf_says_what_to_do_with_negative_values():
    X = rows().rows
    with pytest.raises(InputError, match=r"shift.*rectify"):
        Baseline("nmf", M).fit(X)
    shifted = Baseline("nmf", M, negative="shift", validation=0, random_state=0).fit(X)
    np.testing.assert_array_equal(shifted.bias_, X.min(0))
    np.testing.assert_allclose(shifted.inverse_transform(shifted.codes(X[:1] - 100)), X.min(0)[None], atol=1e-6)
    half = Baseline("nmf", M, negative="rectify", random_state=0).fit(X)
    assert not half.bias_.any()
    np.testing.assert_array_equal(half.codes(X).toarray(), half.codes(np.maximum(X, 0)).toarray())


def test_dictionary_codes_equal_orthogonal_matching_pursuit_of_scikit_learn_and_find_planted_atoms():
    made = planted("bidirectional", n_rows=2000, d=D, n_atoms=16, k=2, random_state=0)
    model = Baseline("dictionary", 16, 2, options={"alpha": 0.3, "max_iter": 30}, random_state=0).fit(made.rows)
    u = (made.rows - model.bias_).astype(np.float64)[:300]
    peer = sklearn.decomposition.sparse_encode(u, model.decoder_.astype(np.float64), algorithm="omp", n_nonzero_coefs=2)
    np.testing.assert_allclose(model.codes(made.rows[:300]).toarray(), peer, rtol=1e-5, atol=1e-5)
    found = recovery(model.decoder_, made.atoms, signed=True)
    chance = recovery(made.rows[:16], made.atoms, signed=True)
    assert found["mean_max_cosine"] > chance["mean_max_cosine"] + 0.05


# ---------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("method", METHODS)
def test_contract(models, method, tmp_path):
    model, X = models[0][method], models[1]
    codes = model.codes(X)
    assert codes.shape == (len(X), M) and codes.dtype == np.float32 and codes.has_sorted_indices
    assert (codes.data != 0).all()
    for i in (0, 130, 399):
        assert (codes[i] != model.codes(X[i : i + 1])).nnz == 0
    np.testing.assert_allclose(np.linalg.norm(model.decoder_, axis=1), 1, atol=1e-5)
    x_hat = model.inverse_transform(codes)
    np.testing.assert_allclose(x_hat, codes.toarray() @ model.decoder_ + model.bias_, atol=1e-5)
    numbers = model.evaluate(X)
    np.testing.assert_allclose(numbers["fvu"], np.square(X - x_hat).sum() / np.square(X - X.mean(0)).sum(), rtol=1e-4)
    assert 0 < numbers["fvu"] < 1 and model.metrics_["n_rows_val"] == 40
    model.save(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.safetensors", "config.json"}
    again = bs.sae.load(tmp_path / "m")
    assert isinstance(again, Baseline) and again.method == method and again.k_ == model.k_
    assert (again.codes(X) != codes).nnz == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["class"] == "Baseline"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_rows_are_reconstructed(method, value):
    model = Baseline(method, 3, random_state=0).fit(np.full((40, 5), value))
    np.testing.assert_allclose(model.inverse_transform(model.codes(np.full((2, 5), value))), value, atol=1e-3)
    assert np.isfinite(model.codes(np.full((2, 5), value + 1)).data).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_model(method):
    X = rows(120).rows
    a, b = (fitted(method, X) for _ in range(2))
    np.testing.assert_array_equal(a.decoder_, b.decoder_)


def test_float16_k_beyond_the_latents_and_encode():
    X = rows(60).rows.astype(np.float16)
    for method in METHODS:
        model = fitted(method, X, k=None if method == "kmeans" else 50)
        assert np.isfinite(model.inverse_transform(model.codes(X))).all()
    adata = bs.encode(model, bs.Embeddings.from_array(X.astype(np.float32)))
    assert adata.shape == (60, M)


def test_wrong_settings_say_what_is_right():
    X = rows(40).rows
    for bad, word in (
        ({"method": "pcs"}, "pca"), ({"method": "kmeans", "k": 3}, "one cluster"), ({"n_latents": 500}, "at most 12"),
        ({"options": {"svd_solvr": 1}}, "svd_solver"), ({"method": "nmf", "negative": "shft"}, "shift"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            Baseline(**bad).fit(X)


@pytest.mark.parametrize("n_latents", [3, 7, 11])
def test_few_codes_of_a_row_are_the_same_bits_wherever_it_stands(n_latents):
    X = np.random.default_rng(0).normal(size=(300, 33)).astype(np.float32)
    pca = Baseline("pca", n_latents, random_state=0).fit(X)
    whole = pca.codes(X)
    for row in range(0, 300, 7):
        assert (pca.codes(X[row : row + 1]) != whole[row]).nnz == 0
