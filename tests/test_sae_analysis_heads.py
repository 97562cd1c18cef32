"""Attribution to heads and sources: sums that must close, grouped queries, and a real attention layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae import SAE
from biosae.sae.analysis import feature_attribution, head_outputs, head_parts, head_shares

few = hypothesis_settings(max_examples=25)


def drawn(heads: int, values: int, tokens: int, width: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    A = rng.random((heads, tokens, tokens))
    A /= A.sum(2, keepdims=True)
    return A, rng.normal(size=(tokens, values, width)), rng.normal(size=heads * width)


@few
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))
def test_tables_close(seed, values, per_group, tokens, width):
    heads = values * per_group
    A, v, w = drawn(heads, values, tokens, width, seed)
    zcat = head_outputs(A, v)
    both = feature_attribution(A, v, w)
    assert zcat.shape == (tokens, heads * width) and both.shape == (tokens, heads, tokens)
    np.testing.assert_allclose(both.sum((1, 2)), zcat @ w, atol=1e-9)
    np.testing.assert_allclose(feature_attribution(A, v, w, by="head"), both.sum(2), atol=1e-9)
    np.testing.assert_allclose(feature_attribution(A, v, w, by="source"), both.sum(1), atol=1e-9)
    np.testing.assert_allclose(head_parts(zcat, w, n_heads=heads), both.sum(2), atol=1e-9)


def test_grouped_queries_repeat_values():
    A, v, w = drawn(6, 2, 5, 3, 0)
    repeated = v[:, [0, 0, 0, 1, 1, 1]]
    np.testing.assert_allclose(feature_attribution(A, v, w), feature_attribution(A, repeated, w))
    one = feature_attribution(A, v, w)[4, 5, 2]
    assert one == pytest.approx(A[5, 4, 2] * v[2, 1] @ w[15:])


def test_masked_sources_get_nothing():
    A, v, w = drawn(2, 2, 4, 3, 1)
    A = np.tril(A)
    found = feature_attribution(A, v, w)
    assert not found[0, :, 1:].any() and found[3].all()


@few
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_shares_sum_to_one(seed, heads):
    D = np.random.default_rng(seed).normal(size=(7, heads * 3))
    D[2, :3] = 0
    shares = head_shares(D, n_heads=heads)
    if heads > 1:
        assert shares[2, 0] == 0
        np.testing.assert_allclose(shares.sum(1), 1)
    by_hand = np.linalg.norm(D[0, :3]) / sum(np.linalg.norm(D[0, 3 * h : 3 * h + 3]) for h in range(heads))
    assert shares[0, 0] == pytest.approx(by_hand)
    assert np.isnan(head_shares(np.zeros((1, heads)), n_heads=heads)).all()


def test_on_an_attention_layer_of_timm_with_a_dictionary():
    """Pre-activations of an SAE on the input of the output projection are the sums of the table plus a constant."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    layer = timm.layers.Attention(24, num_heads=4, qkv_bias=True).eval()
    seen = {}
    layer.proj.register_forward_hook(lambda _module, inputs, _out: seen.update(z=inputs[0]))
    x = torch.randn(40, 9, 24)
    with torch.no_grad():
        layer(x)
        q, k, v = layer.qkv(x).reshape(40, 9, 3, 4, 6).permute(2, 0, 3, 1, 4)
        pattern = (q @ k.transpose(-2, -1) * layer.scale).softmax(-1).numpy()
    values, zcat = v.permute(0, 2, 1, 3).numpy(), seen["z"].numpy()
    np.testing.assert_allclose(head_outputs(pattern[3], values[3]), zcat[3], atol=1e-5)
    sae = SAE(n_latents=16, k=3, n_steps=40, random_state=0, device="cpu").fit(zcat.reshape(-1, 24))
    codes = sae.codes(zcat[3]).toarray()
    model = sae._model
    checked = 0
    for latent in np.flatnonzero(codes.any(0)):
        w = model.W_enc[latent].numpy()
        found = feature_attribution(pattern[3], values[3], w).sum((1, 2))
        a = found + float(model.b_enc[latent]) - sae.bias_ @ w
        on = codes[:, latent] > 0
        np.testing.assert_allclose(a[on], codes[on, latent], atol=1e-5)
        checked += on.sum()
    assert checked > 5 and head_shares(sae.decoder_, n_heads=4).shape == (16, 4)


def test_refusals():
    A, v, w = drawn(4, 4, 3, 2, 0)
    with pytest.raises(InputError, match="multiple"):
        head_outputs(A, v[:, :3])
    with pytest.raises(InputError, match="direction"):
        feature_attribution(A, v, w[:-1])
    with pytest.raises(InputError, match="by='heads'"):
        feature_attribution(A, v, w, by="heads")
    with pytest.raises(InputError, match="5 heads"):
        head_shares(np.ones((2, 8)), n_heads=5)
    with pytest.raises(InputError, match="zcat"):
        head_parts(np.ones((2, 8)), np.ones(7), n_heads=2)
