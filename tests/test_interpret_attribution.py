"""Parts of blocks and heads sum to what they split, and to the codes of an SAE."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import biosae as bs
from biosae.errors import InputError
from biosae.interpret import head_attribution, layer_attribution, reading_direction

CASES = {
    "plain": ("test_vit", 96, {}),
    "layer scale, registers": ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2}),
    "rotary": ("vit_small_patch16_dinov3", 64, {"depth": 2}),
}


@pytest.fixture(scope="module", params=list(CASES))
def encoder(request):
    arch, size, args = CASES[request.param]
    made = bs.encoders.load(f"timm:{arch}", weights="random", size=size, args=args)
    generator = torch.Generator().manual_seed(1)
    for name, value in made.model.named_parameters():
        if "gamma" in name or "ls1" in name or "proj.bias" in name:
            value.copy_(torch.randn(value.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)


def stream(encoder, image, place):
    batch = encoder.preprocess(image)[None]
    return encoder.forward(batch, place, "tokens")[place][0].double().numpy()


def test_parts_of_blocks_sum_to_the_stream_and_heads_to_the_attention(encoder, image):
    layer = encoder.resolve_layer(-2)
    w = np.random.default_rng(1).normal(size=encoder.dim(layer, "tokens"))
    table = layer_attribution(encoder, image, w, layer=layer)
    x = stream(encoder, image, layer)
    np.testing.assert_allclose(table.sum(axis=1), x @ w, atol=1e-4 * np.abs(x @ w).max())
    blocks = [n for n in encoder.layers if n != "final"]
    assert list(table) == ["input", *(f"{n}.{part}" for n in blocks for part in ("attn", "mlp"))]
    rows, columns = encoder.grid(layer, encoder.preprocess(image).shape[1:])
    assert table[f"{layer}.mlp"].unstack().shape == (rows, columns)
    for block in blocks:
        heads = head_attribution(encoder, image, w, block=block)
        whole = table[f"{block}.attn"]
        np.testing.assert_allclose(heads.sum(axis=1), whole, atol=1e-4 * np.abs(x @ w).max())
        assert heads.shape[1] == 1 + sum(n.startswith(f"{block}.attn.head") for n in encoder.sites().index)


def test_a_head_that_is_switched_off_adds_nothing(encoder, image):
    block = encoder.layers[0]
    project = encoder.model.get_submodule(encoder.sites().loc[f"{block}.attn.head1", "module"])
    w = np.random.default_rng(1).normal(size=encoder.dim(block, "tokens"))
    each = project.weight.shape[1] // encoder.sites().index.str.startswith(f"{block}.attn.head").sum()
    before = project.weight.clone()
    whole = head_attribution(encoder, image, w, block=block)
    try:
        project.weight[:, each : 2 * each] = 0
        off = head_attribution(encoder, image, w, block=block)
    finally:
        project.weight.copy_(before)
    assert (off["head1"] == 0).all() and (whole["head1"] != 0).any()
    np.testing.assert_allclose(off["head0"], whole["head0"])


def test_the_parts_give_the_codes_of_an_sae(image):
    encoder = bs.encoders.load("timm:test_vit", weights="random", size=96)
    layer = encoder.resolve_layer(-2)
    rows = np.random.default_rng(2).normal(size=(400, encoder.dim(layer, "tokens"))).astype(np.float32)
    rows[:36] = stream(encoder, image, layer)
    sae = bs.sae.SAE("topk", n_latents=24, k=4, n_steps=30, random_state=0).fit(rows)
    codes = sae.codes(rows[:36]).toarray()
    latent = int((codes > 0).sum(axis=0).argmax())
    table = layer_attribution(encoder, image, reading_direction(sae, latent), layer=layer)
    constant = codes[:, latent] - table.sum(axis=1).to_numpy()
    active = codes[:, latent] > 0
    assert active.sum() > 1
    np.testing.assert_allclose(constant[active], constant[active][0], atol=1e-3)  # b_enc - b . w
    np.testing.assert_array_equal(reading_direction(sae, f"L{latent:04d}"), reading_direction(sae, latent))
    with pytest.raises(InputError, match="no latent"):
        reading_direction(sae, "L9999")


def test_what_is_no_sum_is_refused(image):
    encoder = bs.encoders.load("timm:test_vit", weights="random", size=96)
    width = encoder.dim(0, "tokens")
    with pytest.raises(InputError, match="final"):
        layer_attribution(encoder, image, np.ones(width), layer="final")
    with pytest.raises(InputError, match="width"):
        layer_attribution(encoder, image, np.ones(width + 1), layer=0)
    tiny = bs.encoders.load("tiny-histology")
    with pytest.raises(InputError, match="no pre-norm transformer"):
        layer_attribution(tiny, image, np.ones(24), layer=0)
    with pytest.raises(InputError, match="no attention heads"):
        head_attribution(tiny, image, np.ones(24), block=tiny.layers[0])
    rows = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    with pytest.raises(InputError, match="no encoder matrix"):
        reading_direction(bs.sae.SAE("gated", n_latents=8, n_steps=2, random_state=0).fit(rows), 0)
    scaled = bs.sae.SAE("topk", n_latents=8, k=2, n_steps=2, normalise="layernorm", random_state=0)
    scaled.fit(rows)
    with pytest.raises(InputError, match="own size"):
        reading_direction(scaled, 0)
