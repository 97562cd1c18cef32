"""MP-SAE: worked numbers, identities of matching pursuit, gradients along the path, released code."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from biosae.errors import InputError
from biosae.sae import SAE, load
from biosae.sae.methods import pursuit
from biosae.sae.methods.base import Now
from biosae.sae.methods.pursuit import MatchingPursuit, PursuitOptions, matching_pursuit, orthogonal_pursuit
from biosae.sae.synthetic import planted, recovery

REFERENCE = Path(__file__).parent / "reference" / "methods" / "decoders.npz"
TWO = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
ONE = torch.tensor([[1.0, 1.0]])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, m: int, d: int) -> torch.Tensor:
    return normalize(drawn(seed, m, d), dim=1)


def made(atoms: torch.Tensor, k: int = 3, **options) -> MatchingPursuit:
    checked = PursuitOptions(**options)
    checked.check()
    model = MatchingPursuit(atoms.shape[1], len(atoms), k=k, options=checked).to(atoms.dtype)
    with torch.no_grad():
        model.W_dec.copy_(atoms)
    return model


@pytest.mark.parametrize(
    ("steps", "rule", "z", "left"),
    [
        (1, "positive", (0.0, 1.4), 0.04),
        (2, "positive", (0.16, 1.4), 0.0144),
        (3, "positive", (0.16, 1.4), 0.0144),
        (3, "abs", (0.16, 1.304), 0.005184),
    ],
)
def test_worked_numbers(steps: int, rule: str, z: tuple[float, float], left: float) -> None:
    path = matching_pursuit(ONE, TWO, steps=steps, rule=rule)
    assert path.z[0].tolist() == pytest.approx(z, abs=1e-6)
    assert float(path.residual.square().sum()) == pytest.approx(left, abs=1e-6)
    if (steps, rule) == (3, "abs"):
        assert float(path.coefficients[2]) == pytest.approx(-0.096, abs=1e-6)


@given(seed=st.integers(0, 1000), rule=st.sampled_from(pursuit.RULES), steps=st.integers(1, 12))
def test_identities(seed: int, rule: str, steps: int) -> None:
    x, atoms = drawn(seed, 7, 5), unit(seed + 1, 11, 5)
    path = matching_pursuit(x, atoms, steps=steps, rule=rule)
    assert torch.allclose(x - path.z @ atoms, path.residual, atol=1e-10)
    assert bool(((path.z != 0).sum(1) <= steps).all())
    assert rule != "positive" or bool((path.z >= 0).all())
    before = x
    for j, c in zip(path.chosen, path.coefficients, strict=True):
        after = before - c[:, None] * atoms[j]
        moved = c != 0
        assert torch.allclose(after.square().sum(1), before.square().sum(1) - c**2, atol=1e-10)
        assert torch.allclose((after * atoms[j]).sum(1)[moved], torch.zeros_like(c[moved]), atol=1e-10)
        before = after


@given(seed=st.integers(0, 1000), steps=st.integers(1, 5))
def test_orthonormal_atoms_give_back_sparse_codes(seed: int, steps: int) -> None:
    atoms = torch.linalg.qr(drawn(seed, 6, 6)).Q
    z = torch.zeros(4, 6, dtype=torch.float64)
    for row in range(4):
        z[row, torch.randperm(6, generator=torch.Generator().manual_seed(seed + row))[:steps]] = 0.5
    z *= 1 + drawn(seed + 1, 4, 6).abs()
    assert torch.allclose(matching_pursuit(z @ atoms, atoms, steps=steps).z, z, atol=1e-10)
    assert torch.allclose(orthogonal_pursuit(z @ atoms, atoms, steps=steps, refits=500), z, atol=1e-8)


def test_inner_products_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, atoms = drawn(0, 40, 8), unit(1, 20, 8)
    kept = matching_pursuit(x, atoms, steps=10)
    monkeypatch.setattr(pursuit, "GRAM_LATENTS", 0)
    plain = matching_pursuit(x, atoms, steps=10)
    assert torch.equal(kept.chosen, plain.chosen)
    assert torch.allclose(kept.z, plain.z, atol=1e-12)


@pytest.mark.parametrize("rule", pursuit.RULES)
def test_gradient_along_the_path_is_that_of_autograd(rule: str) -> None:
    x, atoms = drawn(2, 30, 6), unit(3, 15, 6)
    model = made(atoms, k=8, rule=rule, revive=0.0)
    model.b_dec.data.copy_(0.1 * drawn(4, 6))
    model.loss(x, Now(k=8)).total.backward()

    D, b = atoms.clone().requires_grad_(), model.b_dec.detach().clone().requires_grad_()
    r = x - b
    for _ in range(8):
        a = r.detach() @ D.detach().T
        j = (a.abs() if rule == "abs" else a).argmax(1)
        c = (r * D[j]).sum(1, keepdim=True)
        if rule == "positive":
            c = torch.relu(c)
        r = r - c * D[j]
    r.square().sum(1).mean().backward()
    assert torch.allclose(model.W_dec.grad, D.grad, atol=1e-10)
    assert torch.allclose(model.b_dec.grad, b.grad, atol=1e-10)


@pytest.mark.parametrize(("tag", "steps"), [("mp", 2), ("mp_long", 12)])
def test_equals_overcomplete(tag: str, steps: int) -> None:
    data = {n.removeprefix("overcomplete/"): torch.from_numpy(v) for n, v in np.load(REFERENCE).items()}
    model = made(data["atoms"], k=steps, rule="signed", revive=0.0)
    found = model.loss(data["x"], Now(k=steps))
    assert torch.allclose(found.z, data[f"{tag}/codes"], atol=1e-5)
    assert torch.allclose(-found.residual, data[f"{tag}/residual"], atol=1e-5)
    found.total.backward()
    # they keep atoms at unit norm by a division outside the graph: the gradient is by the same atoms
    assert torch.allclose(model.W_dec.grad, data[f"{tag}/grad"], atol=1e-5)


def test_orthogonal_pursuit_equals_overcomplete() -> None:
    data = {n.removeprefix("overcomplete/"): torch.from_numpy(v) for n, v in np.load(REFERENCE).items()}
    z = orthogonal_pursuit(data["hard"], data["atoms"], steps=3)
    same = (data["omp/codes"] != 0).sum(1) == 3  # theirs goes on where no correlation is above 0
    assert int(same.sum()) >= 6
    assert torch.allclose(z[same], data["omp/codes"][same], atol=1e-5)


@pytest.mark.parametrize(
    ("tag", "steps", "options"),
    [("fixed", 4, {}), ("until", 6, {"tolerance": 0.3, "stop_at_repeat": True})],
)
def test_equals_saelens(tag: str, steps: int, options: dict) -> None:
    data = {n.removeprefix("saelens/"): torch.from_numpy(v) for n, v in np.load(REFERENCE).items()}
    model = made(data["atoms"], k=steps, revive=0.0, **options)
    found = model.loss(data["x"], Now(k=steps))
    assert torch.allclose(found.z, data[f"{tag}/codes"], atol=1e-5)
    found.total.backward()
    assert torch.allclose(model.W_dec.grad, data[f"{tag}/grad"], atol=1e-5)


def test_orthogonal_pursuit_is_non_negative_least_squares() -> None:
    x, atoms = drawn(5, 6, 5), unit(6, 9, 5)
    z = orthogonal_pursuit(x, atoms, steps=4, refits=5000)
    for row in range(6):
        support = torch.nonzero(z[row]).squeeze(1)
        best, _ = scipy.optimize.nnls(atoms[support].T.numpy(), x[row].numpy())
        assert np.allclose(z[row, support], best, atol=1e-6)
    longer = [orthogonal_pursuit(x, atoms, steps=t, refits=2000) @ atoms for t in range(1, 6)]
    errors = torch.stack([(x - x_hat).square().sum(1) for x_hat in longer])
    assert bool((errors.diff(dim=0) <= 1e-9).all())


@pytest.mark.parametrize("solver", pursuit.SOLVERS)
def test_more_steps_at_inference_explain_more(solver: str) -> None:
    x, atoms = drawn(7, 50, 8), unit(8, 30, 8)
    left = []
    for steps in (1, 2, 4, 8, 16):
        model = made(atoms, solver=solver, steps=steps).eval()
        left.append(float((x - model.decode(model.encode(x))).detach().square().sum()))
    assert left == sorted(left, reverse=True)
    assert torch.equal(made(atoms, k=3).encode(x), made(atoms, k=9, steps=3).encode(x))


def test_tolerance_and_empty_rows() -> None:
    atoms = unit(9, 30, 8)
    x = torch.cat([drawn(10, 20, 8), torch.zeros(1, 8, dtype=torch.float64)])
    path = matching_pursuit(x, atoms, steps=50, tolerance=0.5)
    assert bool((path.residual.norm(dim=1) < 0.5).all()) and not bool(path.z[-1].any())
    assert int((path.z != 0).sum(1).max()) < 30
    for model in (made(atoms), made(atoms, solver="omp")):
        assert not bool(model.eval().encode(x[-1:]).any())


@pytest.mark.parametrize("solver", pursuit.SOLVERS)
def test_dropped_atoms_are_not_used(solver: str) -> None:
    x, model = drawn(11, 100, 6), made(unit(12, 40, 6), solver=solver, dropout=0.5)
    generator = torch.Generator().manual_seed(0)
    used = (model.loss(x, Now(k=3, generator=generator)).z != 0).any(0)
    assert int(used.sum()) <= 28
    assert int((model.eval().encode(x) != 0).any(0).sum()) > 30


def test_revival_pulls_unused_atoms_to_what_is_left() -> None:
    atoms = torch.cat([torch.eye(8)[:1], torch.eye(8)[1:].repeat(2, 1)])
    model = made(atoms, k=1, revive=0.01)
    x = torch.tensor([[2.0, 1.0, 0, 0, 0, 0, 0, 0]]).repeat(4, 1)
    found = model.loss(x, Now(k=1))
    plain = made(atoms, k=1, revive=0.0).loss(x, Now(k=1))
    # what is left is (0, 1, 0, ...); of 14 unused atoms two have correlation 1 with it
    assert float((plain.total - found.total).detach()) == pytest.approx(0.01 * 2 / 14, abs=1e-7)
    found.total.backward()
    assert float(model.W_dec.grad[2, 1]) < 0


def test_settings_are_checked() -> None:
    for wrong in ({"rule": "relu"}, {"solver": "lasso"}, {"steps": 0}, {"tolerance": -1}, {"dropout": 1.0},
                  {"solver": "omp", "rule": "abs"}):  # fmt: skip
        with pytest.raises(InputError):
            made(TWO, **wrong)


def test_steps_may_be_changed_after_fitting(tmp_path: Path) -> None:
    X = planted("hierarchical", n_rows=1500, d=12, n_atoms=24, k=3, random_state=1).rows
    sae = SAE("mp", n_latents=24, k=3, n_steps=60, random_state=0, device="cpu").fit(X)
    assert np.allclose(np.linalg.norm(sae.decoder_, axis=1), 1, atol=1e-5)
    quality = {}
    for steps in (1, 3, 6, 12):
        sae.set_params(options={"steps": steps})
        codes, quality[steps] = sae.transform(X), sae.score(X)
        assert codes.min() >= 0 and np.diff(codes.indptr).max() <= steps
    assert quality[1] < quality[3] < quality[6] < quality[12]
    assert quality[3] == pytest.approx(-sae.metrics_["fvu"], abs=0.02)  # three steps are the k it was trained with
    sae.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert (again.codes(X) != sae.codes(X)).nnz == 0 and (sae.codes(X[5:6]) != sae.codes(X)[5:6]).nnz == 0
    sae.set_params(options={"tolerance": 10.0})
    assert int(np.diff(sae.transform(X).indptr).max()) <= 1
    assert pickle.loads(pickle.dumps(sae)).score(X) == sae.score(X)  # noqa: S301


def tree(n_rows: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and atoms of the tree of Costa et al.: 11 parents, three with three children each; values N(1.5, 0.25^2).

    A parent is active in a fifth of the rows, and then one of its children in three quarters of them.
    """
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((20, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    active = np.zeros((n_rows, 20), bool)
    active[:, :11] = rng.random((n_rows, 11)) < 0.2
    child = rng.integers(0, 3, (n_rows, 3))
    for family in range(3):
        rows = np.flatnonzero(active[:, family] & (rng.random(n_rows) < 0.75))
        active[rows, 11 + 3 * family + child[rows, family]] = True
    return ((active * rng.normal(1.5, 0.25, active.shape)) @ atoms).astype(np.float32), atoms.astype(np.float32)


@pytest.mark.slow
def test_hierarchy_is_found_better_than_by_topk() -> None:
    """Claims of Costa et al. on rows of a tree, three seeds: docs/methods/mp.md."""
    found, errors = {"topk": [], "mp": []}, {"topk": [], "mp": []}
    for seed in range(3):
        X, atoms = tree(3000, 20, seed)
        for name, numbers in found.items():
            sae = SAE(name, n_latents=20, k=4, n_steps=500, batch_size=256, random_state=seed, device="cpu").fit(X)
            numbers.append(recovery(sae.decoder_, atoms)["mean_max_cosine"])
            errors[name].append(sae.metrics_["fvu"])
            if name == "mp":
                by_steps = []
                for steps in (2, 4, 8, 16):
                    sae.set_params(options={"steps": steps})
                    by_steps.append(sae.evaluate(X)["fvu"])
                assert by_steps == sorted(by_steps, reverse=True) and by_steps[-1] < 0.6 * by_steps[1]
    assert np.mean(found["mp"]) > np.mean(found["topk"]) + 0.02
    assert all(ours < theirs for ours, theirs in zip(errors["mp"], errors["topk"], strict=True))


def test_dropout_bars_no_atoms_where_held_out_rows_are_measured() -> None:
    x = planted("hierarchical", n_rows=400, d=8, n_atoms=16, k=2, random_state=0).rows
    settings = {"n_steps": 5, "warmup": 0.0, "decay": 0.0, "learning_rate": 1e-12, "random_state": 0, "device": "cpu"}
    seen = [SAE("mp", 16, 2, options={"dropout": p}, **settings).fit(x).history_[-1]["fvu_val"] for p in (0.0, 0.8)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
