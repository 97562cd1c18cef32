"""Variational SAE: worked numbers of the KL, TopK as its limit, the released code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from biosae.errors import InputError
from biosae.sae import SAE, activations, objectives
from biosae.sae.methods.base import Now
from biosae.sae.methods.variational import Variational, VariationalOptions, kl_per_row
from biosae.sae.synthetic import planted, recovery

REFERENCE = Path(__file__).parent / "reference" / "methods" / "decoders.npz"


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(seed: int = 0, *, k: int = 3, **options) -> Variational:
    model = Variational(6, 16, k=k, options=VariationalOptions(**options))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * drawn(seed + place, *parameter.shape))
    return model


def test_worked_numbers() -> None:
    mean, lv = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.0], [-2.0], [0.0]])
    assert kl_per_row(mean, lv).tolist() == pytest.approx([0.5, 0.56767, 0.0], abs=1e-5)
    many = kl_per_row(drawn(0, 500, 8) * 4, drawn(1, 500, 8) * 4)
    assert bool((many >= 0).all())
    far = kl_per_row(torch.tensor([[30.0]]), torch.tensor([[9.0]]))
    assert float(far) == pytest.approx(0.5 * (100 + np.exp(2) - 1 - 2), rel=1e-6)
    assert float(kl_per_row(torch.tensor([[3.0, 4.0]]))) == 12.5
    assert float(kl_per_row(torch.tensor([[30.0, 40.0]]))) == 1250  # only means that are drawn about are clamped


def test_without_penalty_it_is_topk_without_pre_bias() -> None:
    model, x = made(kl=0.0), drawn(9, 40, 6)
    dead = torch.tensor([2, 7])
    now = Now(k=3, dead=dead, aux_k=2, aux_alpha=1 / 32)
    found = model.loss(x, now)
    found.total.backward()
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    W_enc, b_enc, W_dec, b_dec = weights
    a = x @ W_enc.T + b_enc
    z = activations.topk(a, 3)
    x_hat = z @ W_dec + b_dec
    loss = objectives.mse_sum(x, x_hat) + 1 / 32 * objectives.auxk(x - x_hat, a, dead, W_dec, 2)
    loss.backward()
    assert float(found.total) == pytest.approx(float(loss), rel=1e-6)
    assert torch.equal(found.z, z.detach())
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed", "learned"])
def test_evaluation_draws_nothing_and_is_topk_of_the_means(variance: str) -> None:
    model, x = made(variance=variance), drawn(9, 40, 6)
    z = model.encode(x)
    assert torch.equal(z, model.encode(x))
    assert torch.equal(z, activations.topk(torch.relu(x @ model.W_enc.T + model.b_enc), 3))


def test_training_draws_from_the_generator_alone() -> None:
    model, x = made(variance="learned"), drawn(9, 40, 6)
    torch.manual_seed(0)
    first, second, third = (
        model.loss(x, Now(k=3, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(first.z, second.z) and not torch.equal(first.z, third.z)
    assert bool((third.z < 0).any())  # drawn codes keep their signs
    assert bool(((first.z != 0).sum(1) == 3).all())


def test_samples_have_the_mean_and_variance_of_the_encoder() -> None:
    model = made(variance="learned", k=16)
    x = drawn(9, 1, 6).expand(20_000, 6)
    z = model.loss(x, Now(k=16, generator=torch.Generator().manual_seed(0))).z
    mean = torch.relu(x[0] @ model.W_enc.T + model.b_enc)
    sigma = (0.5 * (x[0] @ model.W_var.T + model.b_var).clamp(-6, 2)).exp()
    assert torch.allclose(z.mean(0), mean, atol=float(4 * sigma.max() / 20_000**0.5))
    assert torch.allclose(z.std(0), sigma, rtol=0.03)


@pytest.mark.parametrize("tag", ["fixed", "learned"])
def test_equals_the_released_code(tag: str) -> None:
    data = {n.removeprefix("vsae/"): torch.from_numpy(v) for n, v in np.load(REFERENCE).items()}
    model = Variational(6, 16, k=3, options=VariationalOptions(variance=tag, kl=0.3))
    with torch.no_grad():
        model.W_enc.copy_(data[f"{tag}/encoder.weight"])
        model.b_enc.copy_(data[f"{tag}/encoder.bias"])
        model.W_dec.copy_(data[f"{tag}/decoder.weight"].T)
        model.b_dec.copy_(data[f"{tag}/decoder.bias"])
        if tag == "learned":
            model.W_var.copy_(data[f"{tag}/var_encoder.weight"])
            model.b_var.copy_(data[f"{tag}/var_encoder.bias"])
    x = data["x"]
    z = model.encode(x)
    assert torch.allclose(z, data[f"{tag}/codes"], atol=1e-5)
    assert torch.allclose(model.decode(z), data[f"{tag}/x_hat"], atol=1e-5)
    mean = torch.relu(model.preactivations(x))
    lv = x @ model.W_var.T + model.b_var if tag == "learned" else None
    assert torch.allclose(kl_per_row(mean, lv).mean(), data[f"{tag}/kl"], atol=1e-5)
    if tag == "fixed":  # at step 50 of a warm-up of 100
        found = model.loss(x, Now(k=3, ramp=0.5))
        found.total.backward()
        assert float(found.total) == pytest.approx(float(data["fixed/loss"]), rel=1e-5)
        for ours, theirs in (("W_enc", "encoder.weight"), ("b_enc", "encoder.bias"), ("b_dec", "decoder.bias")):
            assert torch.allclose(getattr(model, ours).grad, data[f"fixed/grad/{theirs}"], atol=1e-5)
        assert torch.allclose(model.W_dec.grad, data["fixed/grad/decoder.weight"].T, atol=1e-5)


def test_start() -> None:
    model = Variational(6, 16, k=3, options=VariationalOptions(variance="learned"))
    rows = drawn(3, 200, 6) + 2
    model.initialise(rows, atoms="data", scale="probes", generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.W_dec.norm(dim=1), torch.full((16,), 0.1), atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(model.W_enc, model.W_dec)
    assert torch.allclose(cosines, torch.ones(16), atol=1e-5)
    assert torch.equal(model.b_var, torch.full((16,), -2.0))


def test_all_means_zero_and_odd_rows() -> None:
    model = made()
    with torch.no_grad():
        model.b_enc.fill_(-100)
    x = drawn(9, 5, 6)
    assert not bool(model.encode(x).any()) and torch.equal(model.decode(model.encode(x)), model.b_dec.expand(5, 6))
    learned = made(variance="learned", k=40)
    for odd in (torch.zeros(1, 6), torch.ones(4, 6), 1e6 * x):
        found = learned.loss(odd, Now(k=40, generator=torch.Generator().manual_seed(0)))
        found.total.backward()
        assert torch.isfinite(found.total)
        assert all(bool(torch.isfinite(p.grad).all()) for p in learned.parameters())


def test_settings_are_checked() -> None:
    for wrong in ({"variance": "free"}, {"kl": -1}, {"atom_norm": 0}):
        with pytest.raises(InputError):
            VariationalOptions(**wrong).check()


@pytest.mark.slow
def test_it_is_no_better_than_topk() -> None:
    """The negative result of Baker and Li, on planted rows, two seeds: docs/methods/variational.md."""
    variants = {"topk": None, "fixed": {}, "learned": {"variance": "learned"}, "strong": {"kl": 1.0}}
    errors, cosines = {name: [] for name in variants}, {name: [] for name in variants}
    for seed in range(2):
        found = planted("sparse", n_rows=4096, d=16, n_atoms=32, k=3, random_state=5 + seed)
        for name, options in variants.items():
            kind = "topk" if options is None else "variational"
            sae = SAE(
                kind, n_latents=32, k=3, n_steps=600, batch_size=256, random_state=seed, options=options, device="cpu"
            ).fit(found.rows)
            errors[name].append(sae.metrics_["fvu_val"])
            cosines[name].append(recovery(sae.decoder_, found.atoms)["mean_max_cosine"])
    error, cosine = ({name: np.mean(v) for name, v in of.items()} for of in (errors, cosines))
    for name in ("fixed", "learned", "strong"):
        assert error[name] > error["topk"]
        assert cosine[name] < cosine["topk"] + 0.01
    assert error["strong"] > 2 * error["topk"]
