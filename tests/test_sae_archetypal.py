"""Archetypal SAE: worked numbers, constraints, hull, k-means points, the released dictionary layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae import SAE, load
from biosae.sae.methods.archetypal import (
    Archetypal,
    ArchetypalOptions,
    RelaxedOptions,
    StrictArchetypal,
    archetypes,
    centroids,
    shortened,
    stochastic,
)
from biosae.sae.methods.base import Now
from biosae.sae.synthetic import planted

REFERENCE = Path(__file__).parent / "reference" / "methods" / "decoders.npz"


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(d: int, m: int, **options) -> Archetypal:
    checked = RelaxedOptions(**options)
    checked.check()
    return Archetypal(d, m, k=2, options=checked)


def test_worked_numbers() -> None:
    model = made(2, 1, points=3, delta=0.5)
    model.points.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    with torch.no_grad():
        model.mixture.copy_(torch.tensor([[1.0, -1.0, 3.0]]))
        model.relax.copy_(torch.tensor([[3.0, 4.0]]))
    model.constrain_(torch.Generator())
    assert model.mixture[0].tolist() == pytest.approx([0.25, 0.0, 0.75], abs=1e-6)
    assert model.relax[0].tolist() == pytest.approx([0.3, 0.4], abs=1e-6)
    assert model.atoms()[0].tolist() == pytest.approx([1.3, 1.15], abs=1e-6)


@given(seed=st.integers(0, 500), delta=st.sampled_from([0.0, 0.1, 2.0]))
def test_constraints(seed: int, delta: float) -> None:
    W, relax = stochastic(drawn(seed, 7, 5) + 0.5), shortened(drawn(seed, 7, 5), delta)
    filled = W.any(1)
    assert bool((W >= 0).all()) and torch.allclose(W[filled].sum(1), torch.ones(int(filled.sum())), atol=1e-6)
    assert bool((relax.norm(dim=1) <= delta + 1e-6).all())
    assert torch.allclose(stochastic(W), W, atol=1e-6) and torch.allclose(shortened(relax, delta), relax, atol=1e-6)


def test_strict_atoms_lie_in_the_hull_after_training() -> None:
    model = StrictArchetypal(3, 12, k=2, options=ArchetypalOptions(points=8, multiplier=False))
    generator = torch.Generator().manual_seed(0)
    rows = drawn(1, 300, 3)
    model.initialise(rows, atoms="data", scale="probes", generator=generator)
    assert not hasattr(model, "relax")
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    start = model.atoms().detach().clone()
    for _ in range(20):
        optimiser.zero_grad()
        model.loss(rows, Now(k=2)).total.backward()
        optimiser.step()
        model.constrain_(generator)
    assert float((model.atoms().detach() - start).norm()) > 0.1
    for atom in model.atoms().detach().numpy():
        equal = np.r_[model.points.numpy().T, np.ones((1, 8))]
        found = scipy.optimize.linprog(np.zeros(8), A_eq=equal, b_eq=np.r_[atom, 1], bounds=(0, None))
        nearest, _ = scipy.optimize.nnls(equal, np.r_[atom, 1])
        assert found.success or np.abs(equal @ nearest - np.r_[atom, 1]).max() < 1e-5


def test_equals_overcomplete() -> None:
    data = {n.removeprefix("overcomplete/ra/"): torch.from_numpy(v) for n, v in np.load(REFERENCE).items()}
    model = made(6, 16, points=10, delta=0.5)
    model.points.copy_(data["points"])
    with torch.no_grad():
        model.mixture.copy_(data["W"])
        model.relax.copy_(data["relax"])
        model.log_factor.fill_(0.4)
    assert not bool((data["W"] <= 0).all(1).any())
    model.constrain_(torch.Generator())
    assert torch.allclose(model.mixture, data["W_after"], atol=1e-6)
    assert torch.allclose(model.relax, data["relax_after"], atol=1e-6)
    assert torch.allclose(model.atoms(), data["atoms"], atol=1e-5)


def test_a_row_without_positive_entry_starts_anew() -> None:
    model = made(3, 4, points=5)
    model.points.copy_(drawn(0, 5, 3))
    with torch.no_grad():
        model.mixture.copy_(drawn(1, 4, 5).abs())
        model.mixture[2] = -1.0
    model.constrain_(torch.Generator().manual_seed(0))
    assert (
        float(model.mixture[2].detach().sum()) == pytest.approx(1, abs=1e-6) and int((model.mixture[2] > 0).sum()) == 1
    )


@pytest.mark.parametrize(("m", "points"), [(6, None), (20, 8), (5, 12)])
def test_start(m: int, points: int | None) -> None:
    model = made(4, m, points=points)
    rows = drawn(3, 200, 4)
    model.initialise(rows, atoms="data", scale="probes", generator=torch.Generator().manual_seed(0))
    p = points or m
    first = min(m, p)
    assert torch.allclose(model.mixture[:first], torch.eye(m, p)[:first], atol=1e-6)
    assert torch.allclose(model.mixture.sum(1), torch.ones(m), atol=1e-6) and not bool(model.relax.any())
    assert len(np.unique(model.atoms().detach().numpy().round(5), axis=0)) == m  # no two latents are the same


def test_centroids_are_a_fixed_point_whatever_the_order() -> None:
    centres = 10 * drawn(0, 5, 3)
    rows = (centres[:, None] + 0.1 * drawn(1, 5, 40, 3)).reshape(-1, 3)
    found = centroids(rows, 5)
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.1
    shuffled = rows[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(centroids(shuffled, 5), found, atol=1e-5)
    few = centroids(rows[:3], 7)
    assert few.shape == (7, 3) and len(few.unique(dim=0)) == 3


def test_centroids_are_as_good_as_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    rows = drawn(2, 2000, 6)
    ours = centroids(rows, 30)
    theirs = sklearn.KMeans(30, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    inertia = float(torch.cdist(rows, ours).min(1).values.square().sum())
    assert inertia <= 1.05 * theirs


def test_centroids_of_many_rows() -> None:
    """More rows than the iteration uses: centroids are of rows spread over all of them."""
    rows = drawn(3, 20_000, 1)
    found = centroids(rows, 2).flatten().sort().values
    assert found.tolist() == pytest.approx([-((2 / np.pi) ** 0.5), (2 / np.pi) ** 0.5], abs=0.03)


def test_finite_on_odd_rows() -> None:
    for options in ({}, {"delta": 0.0}, {"activation": "jumprelu"}, {"activation": "batchtopk"}):
        model = made(4, 8, **options)
        model.initialise(drawn(0, 50, 4), atoms="random", scale="probes", generator=torch.Generator().manual_seed(0))
        for x in (torch.zeros(1, 4), torch.ones(3, 4)):
            model.zero_grad()
            found = model.loss(x, Now(k=30, dead=torch.tensor([1]), aux_k=1, aux_alpha=0.1))
            found.total.backward()
            assert torch.isfinite(found.total)
            assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_settings_are_checked() -> None:
    for wrong in ({"delta": -1.0}, {"points": 0}, {"activation": "softmax"}):
        with pytest.raises(InputError):
            made(2, 3, **wrong)


def matched(one: np.ndarray, other: np.ndarray) -> float:
    """Mean cosine of atoms matched one to one: the stability of Fel et al."""
    one, other = (D / np.linalg.norm(D, axis=1, keepdims=True) for D in (one, other))
    cosines = one @ other.T
    return float(cosines[scipy.optimize.linear_sum_assignment(-cosines)].mean())


def test_stability_of_a_reordered_copy_is_one() -> None:
    D = drawn(0, 9, 4).numpy()
    assert matched(D, 3 * D[::-1]) == pytest.approx(1, abs=1e-6)


def test_fitted_saved_and_opened(tmp_path: Path) -> None:
    X = 5 + planted("sparse", n_rows=1500, d=12, n_atoms=24, k=3, random_state=1).rows
    for name in ("archetypal", "relaxed_archetypal"):
        sae = SAE(name, n_latents=24, k=3, n_steps=60, random_state=0, device="cpu").fit(X)
        mixture = sae._model.mixture.numpy()
        assert (mixture >= 0).all() and np.allclose(mixture.sum(1), 1, atol=1e-5)
        if name == "archetypal":
            factor = float(sae._model.log_factor.exp())
            assert np.allclose(sae._model.atoms().numpy(), factor * mixture @ sae._model.points.numpy(), atol=1e-5)
        else:
            assert float(sae._model.relax.norm(dim=1).max()) <= 1 + 1e-5
        weights, points = archetypes(sae)
        assert np.allclose(weights.sum(1), 1, atol=1e-5)
        assert np.abs(points.mean(0) - X.mean(0)).max() < 0.5 * X.std()  # where the rows are, not where scaled rows are
        centre = sae._raw(sae._model.centre.numpy()[None], 0)
        if name == "archetypal":
            assert np.allclose(sae.decoder_ / sae.normaliser_.scale, factor * (weights @ (points - centre)), atol=1e-3)
        sae.save(tmp_path / name)
        again = load(tmp_path / name)
        assert (again.codes(X) != sae.codes(X)).nnz == 0 and np.array_equal(again.decoder_, sae.decoder_)


@pytest.mark.slow
def test_dictionaries_of_two_seeds_agree_more_than_those_of_topk() -> None:
    """Claim of Fel et al. with the points in common (no rows held out): docs/methods/archetypal.md."""
    X = planted("sparse", n_rows=4096, d=16, n_atoms=32, k=3, noise=0.05, random_state=5).rows
    stability, error = {}, {}
    for name in ("topk", "archetypal", "relaxed_archetypal"):
        pair = [
            SAE(
                name, n_latents=64, k=3, n_steps=500, batch_size=256, random_state=seed, validation=0, device="cpu"
            ).fit(X)
            for seed in (0, 1)
        ]
        stability[name] = matched(pair[0].decoder_, pair[1].decoder_)
        error[name] = np.mean([sae.metrics_["fvu"] for sae in pair])
    assert stability["relaxed_archetypal"] > 0.97 and stability["archetypal"] > stability["topk"] + 0.08
    assert error["relaxed_archetypal"] < 1.1 * error["topk"]
