"""Layers, prefix tokens, pooling, grids and identities, on random networks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import biosae as bs
from biosae.encoders.base import Encoder, fingerprint
from biosae.errors import InputError


def random_timm(arch: str, size: int, **args: object) -> Encoder:
    return bs.encoders.load(f"timm:{arch}", weights="random", size=size, args=args)


CASES = {
    "class": ("test_vit", 96, {}, 1, True),
    "register": ("test_vit2", 96, {}, 1, False),
    "class and registers": ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2}, 5, True),
    "none": ("vit_base_patch16_siglip_224", 64, {"depth": 2, "embed_dim": 96, "num_heads": 3}, 0, False),
    "rotary": ("vit_small_patch16_dinov3", 64, {"depth": 2}, 5, True),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Encoder, torch.Tensor, int, bool]:
    arch, size, args, prefix, has_cls = CASES[request.param]
    encoder = random_timm(arch, size, **args)
    # random position tables and registers are near 0; make the prefix tokens differ from the patches
    generator = torch.Generator().manual_seed(1)
    for name, value in encoder.model.named_parameters():
        if name in ("cls_token", "reg_token"):
            value.copy_(torch.randn(value.shape, generator=generator))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return encoder, x, prefix, has_cls


def test_prefix_tokens_are_in_neither_mean_nor_tokens(case: tuple) -> None:
    encoder, x, prefix, _ = case
    assert encoder.n_prefix == encoder.info.prefix == prefix
    with torch.no_grad():
        whole = encoder.model.forward_features(x)
    for layer in encoder.layers:
        rows, columns = encoder.grid(layer, x.shape[2:])
        tokens = encoder.forward(x, layer, "tokens")[layer]
        assert tokens.shape == (2, rows * columns, encoder.dim(layer, "tokens"))
        torch.testing.assert_close(encoder.forward(x, layer, "mean")[layer], tokens.mean(1))
    assert whole.shape[1] == prefix + rows * columns
    torch.testing.assert_close(tokens, whole[:, prefix:])


def test_blocks_equal_forward_intermediates_without_norm(case: tuple) -> None:
    encoder, x, prefix, _ = case
    depth = len(encoder.model.blocks)
    kwargs = {"return_prefix_tokens": True} if prefix else {}
    with torch.no_grad():
        final, states = encoder.model.forward_intermediates(x, indices=list(range(depth)), output_fmt="NLC", **kwargs)
    ours = encoder.forward(x, range(depth + 1), "tokens")
    assert list(ours) == encoder.layers == [*(f"blocks.{i}" for i in range(depth)), "final"]
    for i, state in enumerate(states):
        torch.testing.assert_close(ours[f"blocks.{i}"], state[0] if prefix else state)
    torch.testing.assert_close(ours["final"], final[:, prefix:])


def test_last_block_is_not_the_final_output(case: tuple) -> None:
    encoder, x, _, _ = case
    out = encoder.forward(x, [-1, -2], "tokens")
    normed = encoder.identity(-1, "tokens")["norm"] == "final"
    assert encoder.identity(-2, "tokens")["norm"] == "none"
    assert torch.allclose(out["final"], out[encoder.layers[-2]]) != normed


def test_class_token_only_where_there_is_one(case: tuple) -> None:
    encoder, x, _, has_cls = case
    if not has_cls:
        for pool in ("cls", "cls+mean"):
            with pytest.raises(InputError, match="no class token"):
                encoder.forward(x, -1, pool)
        return
    with torch.no_grad():
        whole = encoder.model.forward_features(x)
    torch.testing.assert_close(encoder.forward(x, -1, "cls")["final"], whole[:, 0])
    both = encoder.forward(x, -1, "cls+mean")["final"]
    torch.testing.assert_close(both, torch.cat([whole[:, 0], whole[:, encoder.n_prefix :].mean(1)], 1))
    assert encoder.dim(-1, "cls+mean") == both.shape[1]


def test_default_is_the_networks_own_output(case: tuple) -> None:
    encoder, x, _, _ = case
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward(x)["final"], encoder.model(x))
    assert encoder.forward(x)["final"].shape[1] == encoder.dim()


def test_an_early_layer_does_not_run_the_rest() -> None:
    encoder = random_timm("test_vit", 96)
    seen = []
    for i, block in enumerate(encoder.model.blocks):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    encoder.forward(torch.zeros(1, 3, 96, 96), [0, 2], "mean")
    assert seen == [0, 1, 2]
    assert all(len(b._forward_hooks) == 1 for b in encoder.model.blocks)


@pytest.mark.parametrize("arch", ["mobilenetv2_050", "resnet10t"])
@pytest.mark.parametrize("side", [64, 75])
def test_convolution_stages_equal_forward_intermediates(arch: str, side: int) -> None:
    encoder = random_timm(arch, 64)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encoder.model.forward_intermediates(x, intermediates_only=True)
        pooled = encoder.model(x)
    ours = encoder.forward(x, encoder.layers, "tokens")
    assert len(states) == len(encoder.layers) - 1
    for name, state in zip(encoder.layers, states):
        rows, columns = encoder.grid(name, (side, side))
        assert state.shape[2:] == (rows, columns)
        torch.testing.assert_close(ours[name].transpose(1, 2).reshape(state.shape), state)
    rows, columns = encoder.grid("final", (side, side))
    assert ours["final"].shape == (2, rows * columns, encoder.dim("final", "tokens"))
    torch.testing.assert_close(encoder.forward(x)["final"], pooled)
    torch.testing.assert_close(encoder.forward(x, -1, "mean")["final"], pooled, atol=1e-5, rtol=1e-4)


def test_token_grid_is_row_major() -> None:
    encoder = random_timm("mobilenetv2_050", 64)
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 40:48, 8:16] = 5.0
    name = encoder.layers[0]
    rows, columns = encoder.grid(name, (64, 64))
    change = encoder.forward(x, name, "tokens")[name] - encoder.forward(torch.zeros_like(x), name, "tokens")[name]
    hot = int(change[0].abs().sum(1).argmax())
    assert 36 / 64 * rows <= hot // columns < 52 / 64 * rows
    assert 4 / 64 * columns <= hot % columns < 20 / 64 * columns


def test_open_clip_tower_equals_open_clip() -> None:
    encoder = bs.encoders.load(
        "open_clip:ViT-B-32", weights="random", size=64, mean="openai", std="openai", args={"vision_cfg": SMALL}
    )
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encoder.model.forward_intermediates(x, output_fmt="NLC", output_extra_tokens=True)
        encoder.model.output_tokens = True
        projected, tokens = encoder.model(x)
        encoder.model.output_tokens = False
    ours = encoder.forward(x, encoder.layers, "tokens")
    for i, state in enumerate(states["image_intermediates"]):
        torch.testing.assert_close(ours[f"blocks.{i}"], state)
    torch.testing.assert_close(ours["final"], tokens)
    torch.testing.assert_close(encoder.forward(x)["final"], projected)
    assert projected.shape[1] == encoder.dim() == 512
    assert (projected.norm(dim=1) - 1).abs().min() > 1e-3
    cls = encoder.forward(x, [1, -1], "cls")
    torch.testing.assert_close(cls["blocks.1"], states["image_intermediates_prefix"][1][:, 0])
    torch.testing.assert_close(cls["final"] @ encoder.model.proj, projected)
    assert tokens.shape[1] == np.prod(encoder.grid(-1, (64, 64)))


SMALL = {"image_size": 64, "layers": 2, "width": 128, "head_width": 64, "patch_size": 16}


def test_layer_names() -> None:
    encoder = random_timm("test_vit", 96)
    resolve = encoder.resolve_layer
    assert resolve(0) == resolve("0") == "blocks.0" and resolve(-1) == resolve("norm") == resolve("final") == "final"
    assert resolve(-2) == resolve(5) == "blocks.5" and resolve(6) == "final"
    with pytest.raises(InputError, match=r"blocks\.3"):
        resolve("block.3")
    with pytest.raises(InputError, match="7 layers"):
        resolve(7)
    with pytest.raises(InputError, match="'cls\\+mean'"):
        encoder.resolve_pool(-1, "cls_mean")
    with pytest.raises(InputError, match="final"):
        encoder.resolve_pool(0, "head")
    with pytest.raises(InputError, match="at least one"):
        encoder.forward(torch.zeros(1, 3, 96, 96), [])


def test_input_size_is_checked_before_the_network_asserts() -> None:
    encoder = random_timm("vit_tiny_patch16_224", 64, depth=1)
    with pytest.raises(InputError, match="size=96"):
        encoder.forward(torch.zeros(1, 3, 96, 96))
    with pytest.raises(InputError, match="divisible"):
        random_timm("vit_small_patch16_dinov3", 64, depth=1).forward(torch.zeros(1, 3, 60, 60))
    with pytest.raises(InputError, match=r"\(B, 3, H, W\)"):
        encoder.forward(torch.zeros(3, 64, 64))


def test_identity_and_fingerprint() -> None:
    encoder = random_timm("test_vit", 96)
    identity = encoder.identity()
    assert set(identity) >= {
        "encoder", "library", "source", "weights_sha256", "layer", "pool", "norm", "preprocess", "dim", "mpp",
        "licence", "derivatives_restricted",
    }  # fmt: skip
    same = random_timm("test_vit", 96)
    assert fingerprint(same.identity()) == fingerprint(identity)
    assert fingerprint(encoder.identity(-1, "default")) == fingerprint(encoder.identity("final", "cls"))
    others = [
        encoder.identity(3),
        encoder.identity(-1, "mean"),
        random_timm("test_vit", 112).identity(),
        random_timm("test_vit", 96, qkv_bias=False).identity(),
        bs.encoders.load("timm:test_vit", weights="random", size=96, random_state=1).identity(),
        bs.encoders.load("timm:test_vit", weights="random", size=96, mean="imagenet").identity(),
        bs.encoders.load("timm:test_vit", weights="random", size=96, precision="bfloat16").identity(),
        bs.encoders.load("timm:test_vit3", weights="random", size=96).identity(),
    ]
    prints = [fingerprint(i) for i in [identity, *others]]
    assert len(set(prints)) == len(prints)
    moved = {**identity, "source": "elsewhere", "licence": "MIT", "encoder": "renamed"}
    assert fingerprint(moved) == fingerprint(identity)
    assert fingerprint({"encoder": "mine"}) != fingerprint({"encoder": "yours"})


def test_random_control_is_loud_seeded_and_leaves_the_users_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    encoder = random_timm("test_vit", 96)
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.weights_sha256 == "random:0" and "RANDOM" in repr(encoder)
    x = torch.ones(1, 3, 96, 96)
    again, other = (
        bs.encoders.load("timm:test_vit", weights="random", size=96, random_state=s).forward(x)["final"] for s in (0, 1)
    )
    assert torch.equal(encoder.forward(x)["final"], again) and not torch.allclose(again, other)


def test_bfloat16_and_channels_last_stay_near_float32() -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = random_timm("mobilenetv2_050", 64).forward(x)["final"]
    for options in ({"channels_last": True}, {"precision": "bfloat16", "channels_last": True}):
        other = bs.encoders.load("timm:mobilenetv2_050", weights="random", size=64, **options).forward(x)["final"]
        assert other.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(plain, other).min() > 0.995
    with pytest.raises(InputError, match="bfloat16"):
        bs.encoders.load("timm:mobilenetv2_050", weights="random", precision="bf16")


def test_results_do_not_depend_on_the_batch() -> None:
    encoder = random_timm("test_vit", 96)
    x = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    whole = encoder.forward(x, [2, -1])
    for name, value in encoder.forward(x[1:2], [2, -1]).items():
        torch.testing.assert_close(whole[name][1:2], value, atol=1e-5, rtol=1e-5)


def test_preprocess_of_an_encoder_is_picklable_and_feeds_it() -> None:
    encoder = random_timm("test_vit", 96)
    step = pickle.loads(pickle.dumps(encoder.preprocess))  # noqa: S301 - made here
    image = np.random.default_rng(0).integers(0, 255, (120, 150, 3), np.uint8)
    assert encoder.forward(step(image)[None])["final"].shape == (1, 64)
