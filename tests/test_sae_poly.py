"""PolySAE: worked numbers, closed forms of interactions, the released decoder, constraints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from biosae.errors import InputError
from biosae.sae import SAE, load
from biosae.sae.methods.base import Now
from biosae.sae.methods.poly import PolyOptions, PolySAE, interactions, latent_effect, retracted
from biosae.sae.synthetic import planted, recovery

REFERENCE = Path(__file__).parent / "reference" / "methods" / "decoders.npz"


def made(d: int, m: int, **options) -> PolySAE:
    checked = PolyOptions(**options)
    checked.check()
    return PolySAE(d, m, k=2, options=checked)


def started(*, d: int = 6, m: int = 16, seed: int = 0, atoms: str = "random", k: int = 3, **options) -> PolySAE:
    model = PolySAE(d, m, k=k, options=PolyOptions(**options))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, d, generator=generator)
    model.initialise(rows / d**0.5, atoms=atoms, scale="probes", generator=generator)
    return model


@pytest.fixture
def worked() -> PolySAE:
    model = made(1, 2, ranks=(1, 1, 1), scale=1.0)
    with torch.no_grad():
        model.U1.copy_(torch.tensor([[0.6], [0.8]]))
        for C in (model.C1, model.C2, model.C3):
            C.fill_(1.0)
    return model


def test_worked_numbers(worked: PolySAE) -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    both, first, second = worked.decode(z).squeeze(1).tolist()
    assert (both, first, second) == pytest.approx((1.792, 0.528, 0.736), abs=1e-6)
    pair = worked.pair_terms(torch.tensor([0]), torch.tensor([1])).sum()
    assert float(pair) == pytest.approx(0.528, abs=1e-6)
    with torch.no_grad():
        worked.weights.zero_()
    assert torch.allclose(worked.decode(z), z @ worked.atoms())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_interactions_are_what_remains_of_single_latents(shared: bool, order: int) -> None:
    model = started(m=24, shared=shared, order=order, ranks=(6, 5, 4)).double()
    z = torch.zeros(8, 24, dtype=torch.float64)
    value = {2: 0.7, 11: 1.3, 17: 0.4}
    for row in range(8):
        for bit, latent in enumerate(value):
            if row >> bit & 1:
                z[row, latent] = value[latent]
    x_hat = (model.decode(z) - model.b_dec).detach()
    assert float(x_hat[0].abs().max()) == 0
    i, j, k = (torch.tensor([latent]) for latent in value)
    a, b, c = value.values()
    pair = torch.tensor([a * b, a * a * b, a * b * b], dtype=torch.float64) @ model.pair_terms(i, j)[:, 0]
    assert torch.allclose(pair, x_hat[3] - x_hat[1] - x_hat[2], atol=1e-12)
    triple = a * b * c * model.triple_terms(i, j, k)[0]
    rest = x_hat[7] - x_hat[3] - x_hat[5] - x_hat[6] + x_hat[1] + x_hat[2] + x_hat[4]
    assert torch.allclose(triple, rest, atol=1e-12)
    assert float(pair.norm()) > 1e-3
    assert (float(triple.norm()) > 1e-6) == (order == 3)


def test_closed_forms_of_the_shared_projection() -> None:
    model = started(ranks=(6, 5, 4), scale=1.0)
    i, j, k = torch.tensor([1]), torch.tensor([4]), torch.tensor([9])
    U, l2, l3 = model.U1, *model.weights
    square, first, second = model.pair_terms(i, j)
    assert torch.allclose(square, 2 * l2 * (U[i] * U[j])[:, :5] @ model.C2.T, atol=1e-6)
    assert torch.allclose(first, 3 * l3 * (U[i] ** 2 * U[j])[:, :4] @ model.C3.T, atol=1e-6)
    assert torch.allclose(second, 3 * l3 * (U[i] * U[j] ** 2)[:, :4] @ model.C3.T, atol=1e-6)
    assert torch.allclose(model.triple_terms(i, j, k), 6 * l3 * (U[i] * U[j] * U[k])[:, :4] @ model.C3.T, atol=1e-6)


@pytest.mark.parametrize("tag", ["shared", "separate"])
def test_equals_the_released_decoder(tag: str) -> None:
    data = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}
    own = {n.removeprefix(f"polysae/{tag}/"): v for n, v in data.items() if n.startswith(f"polysae/{tag}/")}
    model = PolySAE(6, 16, k=3, options=PolyOptions(ranks=(5, 4, 3), shared=tag == "shared", scale=1.0))
    names = {"U_shared": "U1"} | {n: n for n in ("U1", "U2", "U3", "C1", "C2", "C3", "b_dec")}
    with torch.no_grad():
        for theirs, ours in names.items():
            if theirs in own:
                getattr(model, ours).copy_(own[theirs])
        model.weights.copy_(torch.stack([own["lambda2"], own["lambda3"]]))
    x_hat = model.decode(data["polysae/z"])
    assert torch.allclose(x_hat, own["x_hat"], atol=1e-5, rtol=1e-5)
    x_hat.square().sum().backward()
    for theirs, ours in names.items():
        if theirs in own:
            assert torch.allclose(getattr(model, ours).grad, own[f"grad/{theirs}"], atol=1e-4, rtol=1e-5), theirs
    assert torch.allclose(model.weights.grad, torch.stack([own["grad/lambda2"], own["grad/lambda3"]]), rtol=1e-5)
    directions = torch.nn.functional.normalize(model.atoms(), dim=1)
    model.constrain_(torch.Generator())
    for theirs in ("U_shared", "U1", "U2", "U3"):
        if f"after/{theirs}" in own:
            assert torch.allclose(getattr(model, names[theirs]), own[f"after/{theirs}"], atol=1e-5), theirs
    after = torch.nn.functional.normalize(model.atoms(), dim=1)
    assert torch.allclose(after, own["directions"], atol=1e-5)
    assert not torch.allclose(directions, after, atol=1e-3)


def test_scale_is_the_equation_for_rows_that_are_longer() -> None:
    model, plain = started(scale=3.0), started(scale=1.0)
    plain.load_state_dict(model.state_dict())
    z = torch.rand(5, 16)
    ours, theirs = model.decode(z) - model.b_dec, plain.decode(3 * z) - plain.b_dec
    assert torch.allclose(3 * ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("atoms", ["data", "random"])
def test_projections_are_orthonormal_after_each_step(shared: bool, atoms: str) -> None:
    model = started(m=30, shared=shared, atoms=atoms, ranks=(6, 5, 4))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    before = None
    for _ in range(5):
        optimiser.zero_grad()
        loss = model.loss(torch.randn(64, 6, generator=generator) / 6**0.5, Now(k=3, generator=generator))
        loss.total.backward()
        optimiser.step()
        model.constrain_(generator)
        for factor in range(1, 2 if shared else 4):
            U = model.projection(factor).detach()
            assert torch.allclose(U.T @ U, torch.eye(U.shape[1]), atol=1e-5)
        before = model.U1.detach().clone()
        model.constrain_(generator)
        assert torch.allclose(model.U1, before, atol=1e-6)
    if not shared:
        prefix = torch.cat([model.projection(f)[:, :4] for f in (1, 2, 3)], 1)
        assert torch.allclose(prefix.T @ prefix, torch.eye(12), atol=1e-5)


def test_retraction_keeps_a_collapsed_projection_and_signs() -> None:
    tiny = torch.full((4, 2), 1e-8)
    assert torch.equal(retracted(tiny), tiny)
    Q = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0))).Q
    assert torch.allclose(retracted(-2 * Q), -Q, atol=1e-6)  # no column is turned round


def test_data_start_has_rows_as_linear_atoms() -> None:
    model = started(atoms="data")
    assert torch.allclose(model.atoms().norm(dim=1), torch.ones(16), atol=1e-5)
    z = torch.rand(3, 16)
    assert torch.allclose(model.decode(z), z @ model.atoms() + model.b_dec, atol=1e-5)


def test_order_one_is_a_linear_decoder() -> None:
    model = started(order=1)
    z = torch.rand(4, 16)
    assert torch.allclose(model.decode(z), z @ model.atoms() + model.b_dec, atol=1e-5)
    assert model.ranks[0] == 6 and not hasattr(model, "C2")


def test_ranks() -> None:
    assert made(48, 500).ranks == (48, 8, 8)
    assert made(120, 500).ranks == (120, 10, 10)
    assert made(48, 20).ranks == (20, 8, 8)
    assert made(48, 20, shared=False).ranks == (20, 6, 6)  # leading columns of three projections must fit in m
    for wrong in ({"ranks": (2, 4, 1)}, {"order": 4}, {"scale": 0}, {"activation": "relu"}, {"bandwidth": 0}):
        with pytest.raises(InputError):
            made(4, 8, **wrong)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_loss_and_gradient_are_finite_on_odd_rows(activation: str) -> None:
    model = started(activation=activation, k=40)
    for x in (torch.zeros(1, 6), torch.ones(5, 6), torch.randn(1, 6)):
        model.zero_grad()
        dead = torch.tensor([0, 5])
        found = model.loss(x, Now(k=40, dead=dead, aux_k=2, aux_alpha=0.1))
        found.total.backward()
        assert torch.isfinite(found.total)
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        assert torch.isfinite(model.decode(model.encode(x))).all()


@pytest.fixture(scope="module")
def fitted() -> tuple:
    found = planted("products", n_rows=1500, d=12, n_atoms=16, k=3, random_state=1)
    sae = SAE("polysae", n_latents=16, k=3, n_steps=60, random_state=0, options={"ranks": (12, 10, 8)}, device="cpu")
    return sae.fit(found.rows + 3), found.rows + 3


def test_interactions_of_a_fitted_model(fitted: tuple) -> None:
    sae, X = fitted
    codes = sae.codes(X).toarray()
    for order in (2, 3):
        table = interactions(sae, X, order=order, top=5, min_rows=20)
        assert list(table["strength"]) == sorted(table["strength"], reverse=True) and len(table["n_rows"]) == 5
        for latents, n_rows, strength, vector in zip(*(table[name] for name in table), strict=True):
            together = codes[(codes[:, latents] != 0).all(1)]
            assert len(together) == n_rows >= 20
            total = 0.0
            for bits in range(2**order):  # inclusion and exclusion over the subsets, by the decoder itself
                kept = [latent for place, latent in enumerate(latents) if bits >> place & 1]
                part = np.zeros_like(together)
                part[:, kept] = together[:, kept]
                total = total + (-1) ** (order - len(kept)) * sae.inverse_transform(part).astype(np.float64)
            assert np.linalg.norm(total, axis=1).mean() == pytest.approx(strength, rel=2e-3, abs=1e-5)
            assert np.allclose(total.mean(0), vector, atol=1e-4)
    none = interactions(sae, X, min_rows=10_000)
    assert none["vector"].shape == (0, 12)


def test_what_a_latent_does_depends_on_its_company(fitted: tuple) -> None:
    sae, X = fitted
    Z = sae.codes(X[:200])
    latent = int(np.argmax((Z != 0).sum(0)))
    effect = latent_effect(sae, Z, latent)
    rest = Z.toarray()
    active = rest[:, latent] != 0
    alone = np.where(np.arange(16) == latent, rest, 0)
    rest[:, latent] = 0
    assert np.allclose(effect, sae.inverse_transform(Z) - sae.inverse_transform(rest), atol=1e-5)
    assert not effect[~active].any()
    by_itself = sae.inverse_transform(alone) - sae.inverse_transform(np.zeros_like(alone))
    assert np.abs(effect - by_itself)[active].max() > 1e-3
    with pytest.raises(InputError):
        latent_effect(sae, Z, 16)


def test_interactions_are_refused_for_other_decoders(fitted: tuple) -> None:
    with pytest.raises(InputError, match="polysae"):
        interactions(SAE("topk"), fitted[1])
    with pytest.raises(InputError, match="products"):
        interactions(fitted[0], fitted[1], order=4)


def test_saved_and_opened(fitted: tuple, tmp_path: Path) -> None:
    sae, X = fitted
    sae.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert (again.codes(X) != sae.codes(X)).nnz == 0
    assert np.array_equal(again.inverse_transform(again.codes(X)), sae.inverse_transform(sae.codes(X)))
    assert (sae.codes(X[7:8]) != sae.codes(X)[7:8]).nnz == 0


@pytest.mark.slow
def test_products_are_explained_better_than_by_a_linear_decoder() -> None:
    """Claim of Koromilas et al. on planted products, two seeds: docs/methods/polysae.md."""
    gains = []
    for seed in range(2):
        found = planted("products", n_rows=4096, d=16, n_atoms=32, k=3, random_state=5 + seed)
        scores = {}
        for order in (1, 3):
            options = {"order": order, "ranks": (16, 16, 8)}
            sae = SAE(
                "polysae", n_latents=32, k=3, n_steps=600, batch_size=256, random_state=seed, options=options,
                device="cpu",
            ).fit(found.rows)  # fmt: skip
            scores[order] = sae.metrics_["fvu_val"], recovery(sae.decoder_, found.atoms)["mean_max_cosine"]
        gains.append(np.subtract(scores[1], scores[3]))
    by_error, by_atoms = np.mean(gains, axis=0)
    assert by_error > 0.02  # a smaller error on rows not trained on
    assert by_atoms < -0.01  # and linear atoms nearer to the planted ones
