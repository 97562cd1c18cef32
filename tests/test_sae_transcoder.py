"""Transcoder: released code on the same weights, a planted map, codes of one table and values of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import biosae as bs
from biosae.errors import InputError
from biosae.sae.methods.base import NoOptions, Now
from biosae.sae.methods.transcoder import Transcoder

REFERENCE = Path(__file__).parent / "reference" / "methods" / "transcoder.npz"


def planted(n: int = 3000, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x = s A and y = s B of the same sparse strengths s of 32 features, widths 24 and 20, and A, B of unit rows."""
    maps, rng = np.random.default_rng(7), np.random.default_rng(seed)
    A, B = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (maps.normal(size=(32, d)) for d in (24, 20)))
    s = (1 + rng.gamma(2, 0.5, (n, 32))) * (rng.random((n, 32)) < 0.06)
    X, Y = (np.float32(s @ t + 0.01 * rng.normal(size=(n, t.shape[1]))) for t in (A, B))
    return X + 2, Y - 1, A, B


@pytest.fixture(scope="module")
def fitted():
    X, Y, _, _ = planted()
    return bs.sae.SAE("transcoder", n_latents=64, k=4, n_steps=1500, random_state=0).fit(X, partner=Y)


def test_released_transcoder_gives_the_same_codes_and_predictions():
    with np.load(REFERENCE) as stored:
        r = {name: torch.from_numpy(stored[name]) for name in stored.files}
    made = Transcoder(8, 24, k=4, options=NoOptions(), n_partner=8)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(r[name])
    torch.testing.assert_close(made.encode(r["x"]), r["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(made.decode(r["z"]), r["y_hat"], atol=1e-5, rtol=0)
    found = made.loss(torch.cat([r["x"], r["y"]], dim=1), Now(k=4))
    torch.testing.assert_close(found.residual, r["y_hat"] - r["y"], atol=1e-5, rtol=0)
    spread = (r["y"] - r["y"].mean(0)).square().sum(1).mean()
    assert (found.total / spread).item() == pytest.approx(r["fvu"].item(), abs=1e-5)


def test_a_target_equal_to_the_input_is_a_topk_autoencoder_without_pre_bias():
    generator = torch.Generator().manual_seed(0)
    made = Transcoder(6, 16, k=3, options=NoOptions(), n_partner=6)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(10, 6, generator=generator)
    found = made.loss(torch.cat([x, x], dim=1), Now(k=3))
    a = x @ made.W_enc.T + made.b_enc
    z = torch.zeros_like(a)
    for i, row in enumerate(a):
        best = row.argsort(descending=True)[:3]
        z[i, best] = row[best].clamp(min=0)
    torch.testing.assert_close(found.z, z)
    assert found.total.item() == pytest.approx(
        (z @ made.W_dec + made.b_dec - x).square().sum(1).mean().item(), rel=1e-5
    )


def test_planted_features_are_found_in_the_target_and_new_rows_are_predicted(fitted):
    _, _, _, B = planted()
    X, Y, _, _ = planted(500, seed=3)
    assert fitted.evaluate(X, partner=Y)["fvu"] < 0.1
    atoms = fitted.decoder_ / np.linalg.norm(fitted.decoder_, axis=1, keepdims=True)
    assert atoms.shape == (64, 20)
    assert (B @ atoms.T).max(1).mean() > 0.95
    wrong = fitted.evaluate(X, partner=np.roll(Y, 1, axis=0))["fvu"]
    assert wrong > 1


def test_codes_need_the_first_table_only_and_values_are_of_the_second(fitted):
    X, Y, _, _ = planted(200, seed=4)
    Z = fitted.codes(X)
    assert Z.shape == (200, 64)
    assert (np.diff(Z.indptr) <= 4).all()
    one = fitted.codes(X[7:8])
    assert (one != Z[7]).nnz == 0
    Y_hat = fitted.inverse_transform(Z)
    assert Y_hat.shape == Y.shape
    fvu = ((Y - Y_hat) ** 2).sum() / ((Y - Y.mean(0)) ** 2).sum()
    assert fvu == pytest.approx(fitted.evaluate(X, partner=Y)["fvu"], rel=1e-4)


def test_a_saved_transcoder_gives_the_same_codes_and_predictions(fitted, tmp_path):
    X, _, _, _ = planted(100, seed=5)
    fitted.save(tmp_path)
    again = bs.sae.load(tmp_path)
    Z = again.codes(X)
    assert (fitted.codes(X) != Z).nnz == 0
    assert np.array_equal(again.inverse_transform(Z), fitted.inverse_transform(Z))


def test_a_target_is_needed():
    with pytest.raises(InputError, match="partner=Y"):
        Transcoder(6, 16, k=3, options=NoOptions())
