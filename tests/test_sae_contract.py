"""What every sparse coder must hold to, whatever its method: built-in, plug-in, or not trained by gradient."""

from __future__ import annotations

import copy
import functools
import importlib.util
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

from biosae import sae as room
from biosae.errors import InputError, NotFittedError
from biosae.sae import SAE, Pursuit, planted, recovery
from biosae.sae.compare import AXES
from biosae.sae.config import ARCHITECTURES
from biosae.sae.methods import METHODS, method
from biosae.sae.named import OTHERS, named

VARIANTS = {
    "relu norm=atoms": ("relu", {"norm": "atoms"}),
    "topk multi=4": ("topk", {"multi": 4}),
    "jumprelu penalty=tanh": ("jumprelu", {"penalty": "tanh"}),
    "matryoshka prefixes=random": ("matryoshka", {"prefixes": "random"}),
}
"""Options that turn a built-in architecture into another one."""
GRADIENT = [*dict.fromkeys([*ARCHITECTURES, *METHODS]), *VARIANTS]
PURSUITS = [f"pursuit {solver}" for solver in ("omp", "mp", "gradient", "lasso")]
"""Solvers on the dictionary of another coder."""
PLUGIN = [name for name in GRADIENT if name not in ARCHITECTURES]
NAMES = [*GRADIENT, *(name for name, (module, *_) in OTHERS.items() if importlib.util.find_spec(module))]
N, D, M, K = 576, 16, 24, 3
QUICK = {"n_steps": 80, "batch_size": 128, "device": "cpu"}
SPECIAL = {"kmeans": {"k": None}, "nmf": {"negative": "shift", "k": None}, "dictionary": {"options": {"max_iter": 3}}}
"""What a method needs on these rows."""
OTHER_ATOMS = {"pca", "ica", "nmf", "semi_nmf", "transcoder"}
"""Not meant to find these atoms: no more axes than features; sums of positive parts; atoms of the second table."""


@functools.cache
def truth():
    return planted("sparse", n_rows=N, d=D, n_atoms=M, k=K, noise=0.02, random_state=0)


@functools.cache
def second_table(name):
    """The same rows turned, for methods that learn from two tables; None for the others."""
    kind = method(name).partner if name in METHODS else None
    if kind in (None, "gradient"):  # gradients may be left out; test_sae_gsae.py gives them
        return None
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0]
    return (truth().rows @ turn).astype(np.float32)


def made(name, **settings):
    """An unfitted coder that is small and quick."""
    if name in PURSUITS:
        return Pursuit(made("topk"), solver=name.split()[1], k=K)
    name, options = VARIANTS.get(name, (name, None))
    coder = named(name) if options is None else named(name, options=options)
    wanted = {"n_latents": M, "k": K, "random_state": 0, **QUICK, **settings, **SPECIAL.get(name, {})}
    if name in AXES:
        wanted["n_latents"] = min(wanted["n_latents"], D)
    return coder.set_params(**{key: value for key, value in wanted.items() if key in coder.names()})


def fitted(name, X=None, **settings):
    X = truth().rows if X is None else X
    partner = second_table(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows, constant columns: said, and right to say
        coder = made(name, **settings)
        return coder.fit(X) if partner is None else coder.fit(X, partner=partner[: len(X)])


@functools.cache
def model(name):
    """The fitted coder that most checks share; nobody changes it."""
    return fitted(name)


def dense(codes):
    assert isinstance(codes, scipy.sparse.csr_matrix) and codes.dtype == np.float32 and codes.has_sorted_indices
    assert (codes.data != 0).all(), "zeros are stored"
    assert np.isfinite(codes.data).all()
    return codes.toarray()


def rebuilt(coder, X):
    return coder.inverse_transform(coder.codes(X), like=X if coder._needs_rows else None)


def wanted_rows(name, X):
    """What the coder is to rebuild, and how it is evaluated: a transcoder has targets."""
    if name in METHODS and method(name).partner == "target":
        return second_table(name)[: len(X)], {"partner": second_table(name)[: len(X)]}
    return X, {}


# ------------------------------------------------------------------------------------ 1: rows stand for themselves


@pytest.mark.parametrize("name", [*NAMES, *PURSUITS])
def test_codes_of_a_row_do_not_depend_on_its_company(name):
    X, coder = truth().rows, model(name)
    whole = dense(coder.codes(X))
    for row in (0, 300, N - 1):
        np.testing.assert_array_equal(dense(coder.codes(X[row : row + 1])), whole[row : row + 1])
    order = np.random.default_rng(0).permutation(N)[:431]
    np.testing.assert_array_equal(dense(coder.codes(X[order])), whole[order])
    np.testing.assert_array_equal(np.concatenate([dense(coder.codes(X[:100])), dense(coder.codes(X[100:]))]), whole)


@pytest.mark.parametrize("name", [*NAMES, *PURSUITS])
def test_a_saved_coder_is_the_same(name, tmp_path):
    X, coder = truth().rows, model(name)
    coder.save(tmp_path / "model")
    for again in (room.load(tmp_path / "model"), type(coder).load(tmp_path / "model")):
        assert type(again) is type(coder)
        assert again.get_params() == coder.get_params() | ({"coder": None} if name in PURSUITS else {})
        np.testing.assert_array_equal(dense(again.codes(X)), dense(coder.codes(X)))
        np.testing.assert_array_equal(rebuilt(again, X), rebuilt(coder, X))
        np.testing.assert_array_equal(again.decoder_, coder.decoder_)
        assert again.metrics_ == pytest.approx(coder.metrics_, nan_ok=True)


# ------------------------------------------------------------------------------------ 2: precision and repetition


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name):
    one, again = (fitted(name, n_steps=12) for _ in range(2))
    np.testing.assert_array_equal(one.decoder_, again.decoder_)
    np.testing.assert_array_equal(dense(one.codes(truth().rows)), dense(again.codes(truth().rows)))


@pytest.mark.parametrize("name", NAMES)
def test_number_types_of_the_input(name):
    coder, X = model(name), truth().rows
    half = X.astype(np.float16)
    expected = dense(coder.codes(half.astype(np.float32)))
    np.testing.assert_array_equal(dense(coder.codes(half)), expected)
    np.testing.assert_array_equal(dense(coder.codes(half.astype(np.float64))), expected)
    np.testing.assert_array_equal(dense(coder.codes(torch.from_numpy(half))), expected)
    one, other = (fitted(name, x, n_steps=10) for x in (half, half.astype(np.float32)))
    np.testing.assert_array_equal(one.decoder_, other.decoder_)


@pytest.mark.parametrize("name", PLUGIN)
def test_float64_agrees_with_float32(name):
    coder = model(name)
    x = torch.from_numpy(truth().rows[:64])
    if coder.normalise == "centre_scale":
        x = coder.normaliser_.apply(x)
    one, other = coder._model.encode(x), copy.deepcopy(coder._model).double().encode(x.double())
    same = ((one != 0) == (other != 0)).all(1)  # a row at the edge of a choice may come out on either side
    assert same.float().mean() >= 0.98
    np.testing.assert_allclose(one[same].numpy(), other[same].numpy(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ 3: odd inputs


@pytest.mark.parametrize("name", [*NAMES, *PURSUITS])
def test_odd_rows_have_finite_codes(name):
    coder = model(name)
    for rows in (
        np.zeros((1, D)), np.zeros((3, D)), np.ones((5, D)), np.full((2, D), 1e4), np.full((2, D), -1e-12),
        truth().rows[:1],
    ):  # fmt: skip
        z = coder.codes(rows.astype(np.float32))
        dense(z)
        assert z.shape == (len(rows), coder.n_latents_)
        assert np.isfinite(rebuilt(coder, rows.astype(np.float32))).all()


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_odd_rows_can_be_learnt_from(name):
    rng = np.random.default_rng(0)
    constant = np.full((200, D), 2.5, np.float32)
    some_zero = truth().rows[:200] * (rng.random((200, 1)) < 0.7)
    for X in (constant, some_zero.astype(np.float32)):
        if name == "itda" and X is constant:
            with pytest.raises(InputError, match="nothing to decompose"):
                fitted(name, X, validation=0.0)
            continue
        coder = fitted(name, X, n_steps=8, validation=0.0)
        dense(coder.codes(X))
        if X is constant and name != "transcoder":  # whose targets are not constant
            np.testing.assert_allclose(rebuilt(coder, X), X, atol=0.5)
        assert np.isfinite(rebuilt(coder, X)).all() and np.isfinite(coder.decoder_).all()
        for entry in getattr(coder, "history_", []):
            assert np.isfinite(entry["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_more_latents_a_row_than_there_are_and_fewer_latents_than_features(name):
    coder = fitted(name, n_latents=D // 2, k=50, n_steps=8)
    z = dense(coder.codes(truth().rows))
    assert coder.n_latents_ <= D // 2 and z.shape[1] == coder.n_latents_
    assert np.isfinite(coder.evaluate(truth().rows, **wanted_rows(name, truth().rows)[1])["fvu"])


# ------------------------------------------------------------------------------------------ 4: numbers that agree


@pytest.mark.parametrize("name", [*NAMES, *PURSUITS])
def test_reported_numbers_follow_from_the_codes(name):
    coder, X = model(name), truth().rows
    z, x_hat = coder.codes(X), rebuilt(coder, X).astype(np.float64)
    x, given = wanted_rows(name, X)
    found = coder.evaluate(X, **given)
    assert found["l0"] == pytest.approx(z.nnz / N)
    assert found["dead_share"] == pytest.approx(np.mean(np.diff(z.tocsc().indptr) == 0))
    error, spread = np.square(x - x_hat).sum(), np.square(x - x.mean(0, dtype=np.float64)).sum()
    assert found["fvu"] == pytest.approx(error / spread, rel=1e-6)
    assert given or coder.score(X) == -found["fvu"]
    assert coder.decoder_.shape == (coder.n_latents_, D) and coder.bias_.shape == (D,)
    assert coder.metrics_["n_rows"] + coder.metrics_["n_rows_val"] == N
    assert {"fvu", "fvu_val", "l0", "l0_val", "dead_share", "gamma"} <= coder.metrics_.keys()
    assert ((coder.density_ >= 0) & (coder.density_ <= 1)).all() and len(coder.density_) == coder.n_latents_


# --------------------------------------------------------------------------------------------------- 5: unit atoms


@pytest.mark.parametrize("name", GRADIENT)
def test_atoms_have_unit_length(name):
    coder = model(name)
    if not coder._model.unit_atoms:
        pytest.skip("its page says what its atoms are")
    np.testing.assert_allclose(coder._model.W_dec.norm(dim=1).numpy(), 1, atol=1e-5)


# ---------------------------------------------------------------------------------------------- 6: it does learn


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_planted_dictionary(name):
    coder = model(name)
    history = getattr(coder, "history_", [])
    if history and "fvu" in history[0]:
        assert history[-1]["fvu"] < history[0]["fvu"]
    assert coder.metrics_["fvu"] < 0.7
    if name in OTHER_ATOMS:
        return
    chance = [np.random.default_rng(100 + i).standard_normal((coder.n_latents_, D)) for i in range(20)]
    chance = [recovery(atoms, truth().atoms)["mean_max_cosine"] for atoms in chance]
    signed = coder.codes(truth().rows).data.min() < 0
    assert recovery(coder.decoder_, truth().atoms, signed=signed)["mean_max_cosine"] > np.mean(chance) + 3 * np.std(
        chance
    )


# ------------------------------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("name", NAMES)
def test_it_is_an_estimator(name):
    from sklearn.base import clone

    coder = model(name)
    copied = clone(coder)
    assert copied.get_params() == coder.get_params() and not hasattr(copied, "decoder_")
    with pytest.raises(NotFittedError, match="fit"):
        copied.codes(truth().rows)
    with pytest.raises(InputError, match="no setting"):
        copied.set_params(no_such_setting=1)
    names = coder.get_feature_names_out()
    assert len(set(names)) == coder.n_latents_
    shown = copy.copy(coder).set_output(transform="pandas").transform(truth().rows[:5])
    assert list(shown.columns) == list(names)
    np.testing.assert_array_equal(shown.to_numpy(), dense(coder.codes(truth().rows[:5])))
    for wrong in (truth().rows[:, :-1], np.full((2, D), np.nan, np.float32)):
        with pytest.raises(InputError):
            coder.codes(wrong)
    with pytest.raises(InputError, match=str(coder.n_latents_)):
        coder.inverse_transform(np.zeros((2, coder.n_latents_ + 1), np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_whole_groups_are_held_out(name):
    if second_table(name) is not None:
        pytest.skip("tests of methods with two tables hold out groups of pairs")
    groups = np.repeat(np.arange(24), N // 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coder = made(name, n_steps=4, validation=0.25).fit(truth().rows, groups=groups)
    known = coder.trained_on([str(g) for g in range(24)])
    assert coder.validation_["by"] == "groups" and (~known).sum() == coder.validation_["n_groups"] == 6
    held = np.isin(groups, np.flatnonzero(~known))
    assert coder.metrics_["fvu_val"] == pytest.approx(coder.evaluate(truth().rows[held])["fvu"], rel=1e-6)


class Stop(Exception):
    """Ends a training at a logged step."""


@pytest.mark.parametrize("name", PLUGIN)
def test_a_training_that_was_killed_goes_on_exactly(name, tmp_path):
    def stop(step, _):
        if step == 6:
            raise Stop

    settings = {"n_steps": 12, "checkpoint": str(tmp_path), "checkpoint_every": 1}
    with pytest.raises(Stop):
        fitted(name, **settings, callbacks=(stop,))
    went_on, straight = fitted(name, **settings), fitted(name, n_steps=12)
    assert isinstance(went_on, SAE) and went_on.history_ == straight.history_
    np.testing.assert_array_equal(went_on.decoder_, straight.decoder_)
    np.testing.assert_array_equal(dense(went_on.codes(truth().rows)), dense(straight.codes(truth().rows)))


def test_a_setting_that_no_method_has_names_the_nearest_option_or_setting():
    for name, wrong, nearest in (("gba", "higest", "highest"), ("gated", "l_1", "l1"), ("pca", "latents", "n_latents")):
        with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
            named(name, **{wrong: 1})
