"""Pursuits and the LASSO against worked numbers, scipy, scikit-learn and released code; the coder that wraps them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import sklearn.base
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, orthogonal_mp

import biosae as bs
from biosae.errors import FormatError, InputError, NotFittedError
from biosae.sae import SAE, solvers
from biosae.sae.kernels import pursuit
from biosae.sae.solvers import Pursuit, gradient_pursuit, matching_pursuit, nn_lasso, omp

TWO = np.array([[1.0, 0.0], [0.6, 0.8]])
ONES = np.array([[1.0, 1.0]])
few = hypothesis_settings(max_examples=25)


def units(m: int, d: int, seed: int) -> np.ndarray:
    atoms = np.random.default_rng(seed).normal(size=(m, d))
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def rows(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "reference" / "methods" / "solvers.npz") as stored:
        return dict(stored)


# ------------------------------------------------------------------------------------------------ worked numbers


@pytest.mark.parametrize(
    ("k", "rule", "code", "left"),
    [
        (1, "relu", (0, 1.4), 0.04),
        (2, "relu", (0.16, 1.4), 0.0144),
        (3, "relu", (0.16, 1.4), 0.0144),
        (3, "abs", (0.16, 1.304), 0.005184),
    ],
)
def test_matching_pursuit_worked_example(k, rule, code, left):
    z = matching_pursuit(ONES, TWO, k=k, rule=rule).toarray()
    np.testing.assert_allclose(z[0], code, atol=1e-6)
    assert np.square(ONES - z @ TWO).sum() == pytest.approx(left, abs=1e-6)


def test_signed_matching_pursuit_stalls_at_a_largest_correlation_of_zero_and_takes_negative_ones():
    # after two steps the correlations are (0, -0.096): the largest is 0 and the row stalls
    np.testing.assert_allclose(matching_pursuit(ONES, TWO, k=5, rule="signed").toarray(), [[0.16, 1.4]], atol=1e-6)
    z = matching_pursuit([[-1.0, -2.0]], np.eye(2), k=1, rule="signed").toarray()
    np.testing.assert_allclose(z, [[-1, 0]])
    assert matching_pursuit([[-1.0, -2.0]], np.eye(2), k=1).nnz == 0


@pytest.mark.parametrize(("k", "code"), [(1, (3, 0, 0)), (2, (3, 2, 0)), (3, (3, 2, 0))])
def test_gradient_pursuit_stops_where_released_code_divides_by_zero(k, code):
    assert gradient_pursuit([[3.0, 2.0, -1.0]], np.eye(3), k=k).toarray().tolist() == [list(code)]


@pytest.mark.parametrize(("k", "code"), [(1, (0, 1.4)), (2, (0.16, 1.4)), (3, (0.16, 1.304))])
def test_gradient_pursuit_worked_example(k, code):
    np.testing.assert_allclose(gradient_pursuit(ONES, TWO, k=k).toarray(), [code], atol=1e-6)


def test_targets_of_rows():
    X = np.array([[3.0, 2.0, -1.0]] * 4)
    targets = np.array([0, 1, 2, 3])
    expected = [[0, 0, 0], [3, 0, 0], [3, 2, 0], [3, 2, 0]]
    for solve in (gradient_pursuit, matching_pursuit, omp):
        assert solve(X, np.eye(3), k=targets).toarray().tolist() == expected


# --------------------------------------------------------------------------------------------- other software


@pytest.mark.parametrize("k", [1, 3, 6])
def test_matching_pursuit_equals_overcomplete(reference, k):
    z = matching_pursuit(reference["x"], reference["atoms"], k=k, rule="signed").toarray()
    np.testing.assert_allclose(z, reference[f"mp/{k}"], atol=1e-5)


def test_omp_equals_overcomplete_where_its_least_squares_are_run_to_the_end(reference):
    z = omp(reference["x"], reference["atoms"], k=6).toarray()
    np.testing.assert_allclose(z, reference["omp/6"], atol=1e-5)
    released = reference["omp10/6"]  # its default: 10 projected-gradient steps
    ours, theirs = (np.square(reference["x"] - c @ reference["atoms"]).sum() for c in (z, released))
    assert ours < theirs and not np.allclose(z, released, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradient_pursuit_equals_dictionary_learning(reference, k):
    z = gradient_pursuit(reference["x"], reference["atoms"], k=k, active="ever").toarray()
    np.testing.assert_allclose(z, reference[f"gradient/{k}"], atol=1e-5)


def test_gradient_pursuit_equals_the_dark_matter_code_with_targets_of_rows(reference):
    z = gradient_pursuit(reference["x"], reference["atoms"], k=reference["rows/targets"].astype(int)).toarray()
    np.testing.assert_allclose(z, reference["rows/codes"], atol=1e-5)


@few
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 30))
def test_signed_omp_equals_scikit_learn(seed, k, m):
    D, X = units(m, 8, seed), rows(3, 8, seed + 1)
    k = min(k, m, 8)
    z = omp(X, D, k=k, rule="abs").toarray()
    expected = orthogonal_mp(D.T, X.T, n_nonzero_coefs=k).reshape(m, 3).T
    np.testing.assert_allclose(z, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@few
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12))
def test_lasso_without_penalty_is_non_negative_least_squares(seed, m, d):
    D, X = rows(m, d, seed), rows(3, d, seed + 1)  # atoms of any length
    z = nn_lasso(X, D, penalty=0, gap=0).toarray()
    assert (z >= 0).all()
    for x, code in zip(X, z):
        assert np.linalg.norm(x - code @ D) == pytest.approx(scipy.optimize.nnls(D.T, x)[1], abs=1e-5)


@few
@given(st.integers(0, 10**6), st.floats(0.02, 0.9), st.integers(2, 40))
def test_lasso_equals_scikit_learn(seed, share, m):
    D, X = units(m, 10, seed), rows(4, 10, seed + 1)
    penalty = share * np.maximum((X @ D.T).max(1), 1e-3)
    z, gap = nn_lasso(X, D, penalty=penalty, gap=0, return_gap=True)
    again = nn_lasso(X, D, penalty=share, relative=True, gap=0)
    positive = (X @ D.T).max(1) > 1e-3
    np.testing.assert_allclose(z.toarray()[positive], again.toarray()[positive], atol=1e-6)
    assert (np.abs(gap) < 1e-9).all()
    for x, weight, code in zip(X, penalty, z.toarray()):
        fit = Lasso(alpha=weight / 10, positive=True, fit_intercept=False, tol=1e-12, max_iter=200_000).fit(D.T, x)
        np.testing.assert_allclose(code, fit.coef_, atol=2e-5)


def test_duality_gap_ends_a_row_early():
    D, X = units(60, 20, 0), rows(8, 20, 1)
    exact = nn_lasso(X, D, penalty=0.2, gap=0).toarray()
    z, gap = nn_lasso(X, D, penalty=0.2, gap=0.05, return_gap=True)

    def objective(code):
        return np.square(X - code @ D).sum(1) / 2 + 0.2 * code.sum(1)

    excess = (objective(z.toarray()) - objective(exact)) / (np.square(X).sum(1) / 2)
    assert (gap <= 0.05).all() and (gap > 1e-9).any()
    assert (excess <= gap + 1e-7).all() and z.nnz < np.count_nonzero(exact)


def test_omp_of_a_nonnegative_mixture_solves_its_own_subproblem_exactly():
    D, X = units(50, 16, 3), rows(6, 16, 4)
    z = omp(X, D, k=7).toarray()
    for x, code in zip(X, z):
        used = np.flatnonzero(code)
        np.testing.assert_allclose(scipy.optimize.nnls(D[used].T, x)[0], code[used], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- properties

SOLVERS = {
    "mp": lambda X, D, k: matching_pursuit(X, D, k=k),
    "mp abs": lambda X, D, k: matching_pursuit(X, D, k=k, rule="abs"),
    "omp": lambda X, D, k: omp(X, D, k=k),
    "omp abs": lambda X, D, k: omp(X, D, k=k, rule="abs"),
    "gradient": lambda X, D, k: gradient_pursuit(X, D, k=k),
}


@few
@given(st.integers(0, 10**6), st.sampled_from(sorted(SOLVERS)))
def test_residual_never_rises_and_orthogonal_pursuit_is_best(seed, name):
    D, X = units(24, 8, seed), rows(5, 8, seed + 1)
    before = np.square(X).sum(1)
    for k in range(1, 7):
        z = SOLVERS[name](X, D, k)
        left = np.square(X - z @ D).sum(1)
        assert (left <= before + 1e-5).all() and (z.getnnz(1) <= k).all()
        before = left


@few
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(["mp", "omp", "gradient"]))
def test_orthonormal_atoms_give_the_largest_positive_projections(seed, k, name):
    Q = np.linalg.qr(rows(8, 8, seed))[0]
    X = rows(4, 8, seed + 1)
    p = X @ Q.T
    expected = np.zeros_like(p)
    for i, order in enumerate(np.argsort(-p, axis=1)[:, :k]):
        expected[i, order] = np.maximum(p[i, order], 0)
    if name == "gradient" and (np.count_nonzero(expected, axis=1) < k).any():
        return  # it goes on along negative correlations of the active atoms, which are rounding here
    np.testing.assert_allclose(SOLVERS[name](X, Q, k).toarray(), expected, atol=1e-5)


def test_sparse_nonnegative_codes_of_orthonormal_atoms_are_recovered():
    Q, rng = np.linalg.qr(rows(16, 16, 0))[0], np.random.default_rng(1)
    z = np.where(rng.random((20, 16)) < 0.25, rng.random((20, 16)) + 0.5, 0)
    steps = np.count_nonzero(z, axis=1)
    for solve in (matching_pursuit, omp, gradient_pursuit):
        np.testing.assert_allclose(solve(z @ Q, Q, k=steps).toarray(), z, atol=1e-5)


def test_lengths_of_atoms_only_rescale_codes():
    D, X, lengths = units(30, 8, 5), rows(6, 8, 6), np.random.default_rng(7).uniform(0.1, 9, 30)
    for name, solve in SOLVERS.items():
        z, scaled = solve(X, D, 4).toarray(), solve(X, D * lengths[:, None], 4).toarray()
        np.testing.assert_allclose(scaled * lengths, z, atol=1e-5, err_msg=name)
    z = nn_lasso(X, D, penalty=0.3).toarray()
    np.testing.assert_allclose(nn_lasso(X, D * lengths[:, None], penalty=0.3).toarray() * lengths, z, atol=1e-5)


@pytest.mark.parametrize("name", [*sorted(SOLVERS), "lasso"])
def test_each_row_by_itself_in_every_batch_and_without_the_table_of_products(name, monkeypatch):
    solve = SOLVERS.get(name, lambda X, D, k: nn_lasso(X, D, penalty=0.2, relative=True))
    D, X = units(40, 12, 8), rows(300, 12, 9).astype(np.float32)
    together = solve(X, D, 5).toarray()
    for i in (0, 255, 256, 299):
        np.testing.assert_array_equal(solve(X[i : i + 1], D, 5).toarray()[0], together[i])
    monkeypatch.setattr(solvers, "GRAM_BYTES", 0)
    np.testing.assert_allclose(solve(X[:40], D, 5).toarray(), together[:40], atol=1e-5)


def test_interpreted_kernels_equal_the_compiled_ones(monkeypatch):
    pytest.importorskip("numba")
    assert hasattr(pursuit.match, "py_func")
    monkeypatch.setitem(sys.modules, "numba", None)
    spec = importlib.util.spec_from_file_location("pursuit_interpreted", pursuit.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    assert not hasattr(plain.match, "py_func")
    D, X = units(40, 12, 10), rows(12, 12, 11)
    compiled = {name: solve(X, D, 6).toarray() for name, solve in SOLVERS.items()}
    lasso = nn_lasso(X, D, penalty=0.3).toarray()
    monkeypatch.setattr(solvers, "_kernels", lambda: plain)
    for name, solve in SOLVERS.items():
        np.testing.assert_allclose(solve(X, D, 6).toarray(), compiled[name], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(nn_lasso(X, D, penalty=0.3).toarray(), lasso, atol=1e-6)


def test_edge_cases_give_finite_codes():
    D = np.vstack([units(5, 4, 0), np.zeros((1, 4)), units(5, 4, 0)[:1]])  # a zero atom and one atom twice
    X = np.vstack([np.zeros((1, 4)), np.ones((1, 4)), rows(3, 4, 1)])
    for name, solve in (SOLVERS | {"lasso": lambda X, D, k: nn_lasso(X, D, penalty=0.0, gap=0)}).items():
        z = solve(X, D, 50)
        assert np.isfinite(z.data).all() and z[0].nnz == 0 and not z[:, 5].nnz, name
        assert isinstance(z, scipy.sparse.csr_matrix) and z.dtype == np.float32 and (z.data != 0).all()
        assert solve(X[:0], D, 3).shape == (0, 7) and solve(X.astype(np.float16), D, 3).shape == (5, 7)
        np.testing.assert_allclose(solve(1e6 * X, D, 3).toarray(), 1e6 * solve(X, D, 3).toarray(), rtol=1e-4, atol=1)


def test_residual_norm_ends_a_row():
    D, X = units(60, 10, 2), rows(20, 10, 3)
    for solve in (matching_pursuit, omp, gradient_pursuit):
        full, short = solve(X, D, k=20), solve(X, D, k=20, tol=0.4)
        share = np.linalg.norm(X - short @ D, axis=1) / np.linalg.norm(X, axis=1)
        assert (share <= 0.4).all() and short.nnz < full.nnz
        one_less = solve(X, D, k=np.maximum(short.getnnz(1) - 1, 0))
        assert (np.linalg.norm(X - one_less @ D, axis=1) > 0.4 * np.linalg.norm(X, axis=1)).mean() > 0.8


@pytest.mark.parametrize(
    "call",
    [
        lambda: matching_pursuit(ONES, TWO, k=1, rule="sign"),
        lambda: omp(ONES, TWO, k=1, rule="signed"),
        lambda: omp(ONES, np.eye(3), k=1),
        lambda: omp(ONES, TWO, k=1.5),
        lambda: omp(ONES, TWO, k=[1, 2]),
        lambda: omp(ONES, TWO, k=-1),
        lambda: omp([[np.nan, 1]], TWO, k=1),
        lambda: omp(ONES, TWO, k=1, tol=-1),
        lambda: nn_lasso(ONES, TWO, penalty=-1.0),
        lambda: nn_lasso(ONES, TWO, penalty=1.0, gap=-1),
        lambda: gradient_pursuit(ONES, TWO, k=1, active="never"),
    ],
)
def test_refusals(call):
    with pytest.raises(InputError):
        call()


# -------------------------------------------------------------------------------------------------------- Pursuit


@pytest.fixture(scope="module")
def fitted() -> tuple[SAE, np.ndarray]:
    found = bs.sae.planted("sparse", n_rows=1024, d=16, n_atoms=24, k=3, random_state=0)
    groups = np.repeat(np.arange(16), 64)
    sae = SAE(n_latents=32, k=4, n_steps=300, random_state=0, device="cpu").fit(found.rows, groups=groups)
    return sae, found.rows


def test_better_inference_on_the_same_dictionary(fitted):
    sae, X = fitted
    error = {name: Pursuit(sae, solver=name, k=4).fit(X).evaluate(X)["fvu"] for name in ("omp", "mp", "gradient")}
    assert error["omp"] < sae.evaluate(X)["fvu"] and error["omp"] < error["mp"]
    assert error["omp"] <= error["gradient"] + 1e-3


@pytest.mark.parametrize("solver", ["omp", "mp", "gradient", "lasso"])
def test_pursuit_is_a_coder(fitted, solver, tmp_path):
    sae, X = fitted
    coder = Pursuit(sae, solver=solver).fit(X)
    assert coder.k_ == 4 and coder.n_latents_ == 32 and coder.training_groups_ == sae.training_groups_
    assert coder.trained_on(["0", "nobody"]).tolist() == sae.trained_on(["0", "nobody"]).tolist()
    z = coder.transform(X)
    x_hat = coder.inverse_transform(z)
    np.testing.assert_allclose(x_hat, z @ sae.decoder_ + sae.bias_, atol=1e-5)
    np.testing.assert_array_equal(coder.transform(X[7:8]).toarray(), z[7].toarray())
    numbers = coder.evaluate(X)
    assert numbers["l0"] == pytest.approx(z.nnz / len(X)) and numbers["fvu"] == pytest.approx(coder.metrics_["fvu"])
    if solver == "lasso":
        assert coder.metrics_["l0"] == pytest.approx(4, abs=0.2) and 0 < coder.penalty_ < 1
    coder.save(tmp_path / "p")
    again = bs.sae.load(tmp_path / "p")
    assert isinstance(again, Pursuit) and again.solver == solver and again.k_ == 4
    np.testing.assert_array_equal(again.transform(X).toarray(), z.toarray())
    np.testing.assert_array_equal(again.density_, coder.density_)
    np.testing.assert_array_equal(again.inverse_transform(z), x_hat)


def test_a_coder_with_scaling_of_rows_needs_the_rows_again(fitted, tmp_path):
    _, X = fitted
    sae = SAE(n_latents=32, k=4, n_steps=60, random_state=0, device="cpu", normalise="layernorm").fit(X)
    coder = Pursuit(sae, k=4).fit(X)
    coder.save(tmp_path / "p")
    again = Pursuit.load(tmp_path / "p")
    z = again.transform(X)
    with pytest.raises(InputError, match="like"):
        again.inverse_transform(z)
    x_hat = again.inverse_transform(z, like=X)
    assert np.square(X - x_hat).sum() < np.square(X - sae.inverse_transform(sae.codes(X), like=X)).sum()


def test_an_unfitted_coder_is_fitted_and_left_alone(fitted):
    _, X = fitted
    sae = SAE(n_latents=16, k=2, n_steps=20, random_state=0, device="cpu")
    coder = Pursuit(sae).fit(X)
    assert not sae.__sklearn_is_fitted__() and coder.k_ == 2 and coder.n_latents_ == 16


def test_encode_works_with_a_pursuit(fitted):
    sae, X = fitted
    emb = bs.Embeddings.from_array(X[:64])
    adata = bs.encode(Pursuit(sae, k=3).fit(X), emb)
    np.testing.assert_allclose(adata.X.toarray(), Pursuit(sae, k=3).fit(X).transform(X[:64]).toarray(), atol=1e-5)


@pytest.mark.parametrize("mode", ["layernorm", "l2"])
def test_latents_of_a_pursuit_are_ablated_in_units_of_the_row(fitted, mode):
    _, X = fitted
    sae = SAE(n_latents=32, k=4, n_steps=20, random_state=0, device="cpu", normalise=mode).fit(X)
    coder = Pursuit(sae, k=4).fit(X)
    adata = bs.encode(coder, bs.Embeddings.from_array(X[:64]))
    rest = adata.X.toarray()
    rest[:, :16] = 0
    taken = coder.inverse_transform(adata.X, like=X[:64]) - coder.inverse_transform(rest, like=X[:64])
    found = bs.stats.ablate(adata, list(adata.var_names[:16]))
    np.testing.assert_allclose(found, X[:64] - taken, atol=1e-4 * np.abs(X).max())


@pytest.mark.parametrize("solver", ["omp", "mp", "gradient", "lasso"])
def test_pursuit_keeps_the_contract_of_coders(fitted, solver):
    sae, X = fitted
    coder = Pursuit(sae, solver=solver, k=500).fit(X[:128])  # more than there are atoms
    assert coder.k_ == 32 and coder.random_state_ == sae.random_state_
    special = np.vstack([np.zeros((1, 16)), np.ones((1, 16)), sae.bias_[None], 1e4 * X[:1]]).astype(np.float32)
    z = coder.transform(special)
    assert np.isfinite(z.data).all() and (z.data != 0).all() and z[2].nnz == 0
    assert np.isfinite(coder.inverse_transform(z)).all()
    assert np.isfinite(coder.evaluate(np.ones((3, 16), np.float32))["l0"])
    half = X[:20].astype(np.float16)
    np.testing.assert_array_equal(coder.transform(half).toarray(), coder.transform(half.astype(np.float32)).toarray())
    quality, z = coder.metrics_, coder.transform(X[:128])
    error = np.square(X[:128] - coder.inverse_transform(z)).sum() / np.square(X[:128] - X[:128].mean(0)).sum()
    assert quality["fvu"] == pytest.approx(error, rel=1e-4, abs=1e-9) and quality["l0"] == pytest.approx(z.nnz / 128)
    assert quality["dead_share"] == pytest.approx((z.getnnz(0) == 0).mean())
    frame = coder.set_output(transform="pandas").transform(X[:5])
    assert list(frame.columns) == list(coder.get_feature_names_out()) and frame.shape == (5, 32)
    again = sklearn.base.clone(Pursuit(sae, solver=solver, k=3))
    assert again.k == 3 and again.solver == solver and not again.__sklearn_is_fitted__()


def test_what_pursuit_refuses(fitted, tmp_path):
    sae, X = fitted
    with pytest.raises(NotFittedError):
        Pursuit(sae).transform(X)
    with pytest.raises(InputError, match="did you mean 'lasso'"):
        Pursuit(sae, solver="laso").fit(X)
    with pytest.raises(InputError, match="penalty"):
        Pursuit(sae, solver="lasso", penalty=2).fit(X)
    with pytest.raises(InputError, match="rule"):
        Pursuit(sae, rule="signed").fit(X)
    with pytest.raises(InputError, match="features"):
        Pursuit(sae).fit(X[:, :5])

    class Squares(SAE):
        def _decode(self, z, x):
            return super()._decode(z, x) ** 2

    bent = Squares()
    bent.__dict__.update(sae.__dict__)
    with pytest.raises(InputError, match="z D"):
        Pursuit(bent).fit(X)
    Pursuit(sae).fit(X).save(tmp_path / "p")
    with pytest.raises(FormatError):
        SAE.load(tmp_path / "p")
