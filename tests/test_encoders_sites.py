"""Places inside the blocks, against explicit passes through the same modules and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import biosae as bs
from biosae.encoders.base import Encoder, fingerprint
from biosae.encoders.hooks import Tap, run_with_taps
from biosae.errors import InputError


def random_timm(arch: str, size: int, **args: object) -> Encoder:
    return bs.encoders.load(f"timm:{arch}", weights="random", size=size, args=args)


CASES = {
    "class": ("test_vit", 96, {}, 1, 0),
    "register only": ("test_vit2", 96, {}, 0, 1),
    "class and registers": ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2}, 1, 4),
    "rotary": ("vit_small_patch16_dinov3", 64, {"depth": 2}, 1, 4),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Encoder, torch.Tensor, int, int]:
    arch, size, args, n_cls, registers = CASES[request.param]
    encoder = random_timm(arch, size, **args)
    generator = torch.Generator().manual_seed(1)
    for name, value in encoder.model.named_parameters():
        if name in ("cls_token", "reg_token") or "norm" in name:
            value.copy_(torch.randn(value.shape, generator=generator))
    return encoder, torch.randn(2, 3, size, size, generator=generator), n_cls, registers


@pytest.fixture(scope="module")
def clip() -> Encoder:
    """An open_clip tower of random weights, whose attention is fused."""
    import open_clip

    from biosae.encoders.vision import ClipEncoder

    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 2, "width": 48, "head_width": 12, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    visual = open_clip.model.CLIP(24, vision, text).visual
    plain = bs.encoders.load("timm:test_vit", weights="random", size=64)
    return ClipEncoder(
        visual, bs.encoders.info("bioclip"), plain.preprocess, architecture={}, weights_sha256="random:0", source="test"
    )


def whole(encoder: Encoder, x: torch.Tensor, *layers: str) -> dict[str, torch.Tensor]:
    """Every token of some places, the prefix first."""
    return encoder._outputs(x, dict.fromkeys(layers, "all"))


def test_a_timm_block_is_the_sum_of_its_parts(case: tuple) -> None:
    encoder, x, *_ = case
    names = [f"blocks.1.{s}" for s in ("norm1.input", "norm1", "attn", "norm2.input", "norm2", "mlp")]
    found = whole(encoder, x, "blocks.0", "blocks.1", *names)
    at = {n.removeprefix("blocks.1."): v for n, v in found.items()}
    block = encoder.model.blocks[1]
    scale = [getattr(block, f"gamma_{i}", None) for i in (1, 2)]
    ls = [
        (lambda v, g=g: v if g is None else v * g) if not hasattr(block, f"ls{i}") else getattr(block, f"ls{i}")
        for i, g in zip((1, 2), scale)
    ]
    with torch.no_grad():
        torch.testing.assert_close(at["norm1.input"], found["blocks.0"])
        torch.testing.assert_close(at["norm1"], block.norm1(found["blocks.0"]))
        torch.testing.assert_close(at["norm2.input"], found["blocks.0"] + ls[0](at["attn"]))
        torch.testing.assert_close(at["norm2"], block.norm2(at["norm2.input"]))
        torch.testing.assert_close(at["mlp"], block.mlp(at["norm2"]))
        torch.testing.assert_close(found["blocks.1"], at["norm2.input"] + ls[1](at["mlp"]))
    assert not torch.allclose(at["norm1"], at["norm1.input"])


def test_heads_through_their_projection_sum_to_the_attention(case: tuple) -> None:
    encoder, x, *_ = case
    attention = encoder.model.blocks[1].attn
    heads = [f"blocks.1.attn.head{h}" for h in range(attention.num_heads)]
    found = whole(encoder, x, "blocks.1.attn", *heads)
    each = attention.proj.in_features // attention.num_heads
    total = attention.proj.bias.clone()
    for h, name in enumerate(heads):
        assert found[name].shape[-1] == encoder.dim(name, "mean") == each
        total = total + found[name] @ attention.proj.weight[:, h * each : (h + 1) * each].T
    torch.testing.assert_close(total, found["blocks.1.attn"])


def test_a_head_is_softmax_attention_over_all_tokens() -> None:
    encoder = random_timm("test_vit", 96)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = whole(encoder, x, "blocks.2.norm1", "blocks.2.attn.head1")
    attention, normed = encoder.model.blocks[2].attn, found["blocks.2.norm1"]
    d = attention.head_dim
    with torch.no_grad():
        q, k, v = attention.qkv(normed).view(2, -1, 3, attention.num_heads, d)[:, :, :, 1].unbind(2)
        weights = torch.softmax(q @ k.transpose(1, 2) / d**0.5, -1)
    torch.testing.assert_close(found["blocks.2.attn.head1"], weights @ v)


def test_the_fused_attention_of_open_clip(clip: Encoder) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    block = clip.model.transformer.resblocks[1]
    heads = [f"blocks.1.attn.head{h}" for h in range(4)]
    found = whole(clip, x, "blocks.0", "blocks.1.norm1", "blocks.1.attn", "blocks.1.norm2", "blocks.1.mlp", *heads)
    with torch.no_grad():
        torch.testing.assert_close(found["blocks.1.norm1"], block.ln_1(found["blocks.0"]))
        joined = torch.cat([found[h] for h in heads], -1)
        torch.testing.assert_close(block.attn.out_proj(joined), found["blocks.1.attn"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["blocks.1.mlp"], block.mlp(found["blocks.1.norm2"]))
        end = found["blocks.0"] + found["blocks.1.attn"] + found["blocks.1.mlp"]
    torch.testing.assert_close(whole(clip, x, "blocks.1")["blocks.1"], end, rtol=1e-4, atol=1e-5)
    assert clip.dim("blocks.1.attn.head2", "cls") == 12


def test_tokens_by_role(case: tuple) -> None:
    encoder, x, n_cls, registers = case
    assert encoder.n_registers == registers
    for layer in ("blocks.0", "blocks.0.mlp", "blocks.1.attn.head0", "final"):
        every = whole(encoder, x, layer)[layer]
        if registers:
            expected = every[:, n_cls : n_cls + registers].mean(1)
            torch.testing.assert_close(encoder.forward(x, layer, "registers")[layer], expected)
            assert encoder.dim(layer, "registers") == expected.shape[1]
        else:
            with pytest.raises(InputError, match="no register tokens"):
                encoder.forward(x, layer, "registers")
        if n_cls:
            torch.testing.assert_close(encoder.forward(x, layer, "cls")[layer], every[:, 0])
        else:
            with pytest.raises(InputError, match="no class token"):
                encoder.forward(x, layer, "cls")
        tokens = encoder.forward(x, layer, "tokens")[layer]
        torch.testing.assert_close(tokens, every[:, n_cls + registers :])
        assert tokens.shape[1] == np.prod(encoder.grid(layer, x.shape[2:]))


def test_the_norm_is_recorded_and_enters_the_fingerprint() -> None:
    encoder = random_timm("test_vit", 96)
    norms = {n: encoder.identity(n, "mean")["norm"] for n in ("blocks.1.norm1", "blocks.1.norm2.input", "blocks.1", -1)}
    assert list(norms.values()) == ["norm1", "none", "none", "final"]
    marks = {fingerprint(encoder.identity(n, "mean")) for n in norms}
    assert len(marks) == 4


def test_many_places_in_one_pass_that_ends_early() -> None:
    encoder = random_timm("test_vit", 96)
    seen: list[int] = []
    for i, block in enumerate(encoder.model.blocks):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    x = torch.randn(1, 3, 96, 96)
    wanted = ["blocks.0", "blocks.2.mlp", "blocks.1.attn.head0", "blocks.1.attn.head1", "blocks.2.norm1"]
    several = encoder.forward(x, wanted, "mean")
    assert list(several) == wanted and seen == [0, 1]  # block 2 was left after its MLP
    seen.clear()
    several |= encoder.forward(x, ["blocks.2.attn", "final", "blocks.4"], "mean")
    assert seen == [0, 1, 2, 3, 4, 5]
    for name, value in several.items():
        torch.testing.assert_close(encoder.forward(x, name, "mean")[name], value)
    assert not any(m._forward_pre_hooks for m in encoder.model.modules())


def test_sites_is_a_table_of_what_can_be_asked_for(case: tuple) -> None:
    encoder, x, n_cls, registers = case
    table = encoder.sites()
    heads = encoder.model.blocks[0].attn.num_heads
    assert [n for n in table.index if n in encoder.layers] == encoder.layers
    assert (table["kind"] == "head").sum() == heads * (len(encoder.layers) - 1)
    assert (table["prefix"] == n_cls + registers).all()
    assert set(table["kind"]) == {"residual", "attention", "head", "mlp", "norm", "norm input", "final"}
    found = encoder.forward(x, list(table.index[:9]) + ["final"], "tokens")
    for name, value in found.items():
        assert value.shape[1:] == (table["tokens"][name], table["width"][name])


@pytest.mark.parametrize("arch", ["mobilenetv2_050", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_any_module_by_its_path(arch: str) -> None:
    size = 224 if arch.startswith("swin") else 64
    args = {"depths": (1, 1, 1, 1), "embed_dim": 24} if arch.startswith("swin") else {}
    encoder = random_timm(arch, size, **args)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    table = encoder.sites(modules=True)
    picked = [n for n in table.index if n.startswith("module:")]
    assert len(picked) > 40
    kept: dict[str, torch.Tensor] = {}
    chosen = picked[:: max(1, len(picked) // 12)]
    for name in chosen:
        encoder.model.get_submodule(name[7:]).register_forward_hook(
            lambda _m, _a, y, name=name: kept.update({name: y.detach().clone()})
        )
    found = encoder.forward(x, chosen, "tokens")
    for name, tokens in found.items():
        rows, columns = encoder.grid(name, (size, size))
        raw = kept[name]
        if raw.ndim == 4:
            by_row = raw.permute(0, 2, 3, 1) if raw.shape[1] == table["width"][name] else raw
            assert by_row.shape[1:3] == (rows, columns)
            torch.testing.assert_close(tokens, by_row.reshape(2, rows * columns, -1))
        assert tokens.shape[1:] == (rows * columns, encoder.dim(name, "mean"))
        assert encoder.identity(name)["layer"] == name and encoder.identity(name)["pool"] == "mean"
        with pytest.raises(InputError, match="no class token"):
            encoder.resolve_pool(name, "cls")


def test_a_module_of_a_transformer_keeps_the_roles_of_its_tokens() -> None:
    encoder = random_timm("test_vit", 96)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    same = encoder.forward(x, ["module:blocks.1.mlp", "blocks.1.mlp"], "cls")
    torch.testing.assert_close(same["module:blocks.1.mlp"], same["blocks.1.mlp"])
    patches = encoder.forward(x, "module:patch_embed", "tokens")["module:patch_embed"]
    with torch.no_grad():
        torch.testing.assert_close(patches, encoder.model.patch_embed(x).reshape(2, 36, -1))
    with pytest.raises(InputError, match="no class token"):
        encoder.forward(x, "module:patch_embed", "cls")


def test_biosaes_own_networks_give_modules_too() -> None:
    encoder = bs.encoders.load("tiny-histology", device="cpu")
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    found = encoder.forward(x, ["stage3", "module:stage3", "module:stage2.0", "final"], "tokens")
    torch.testing.assert_close(found["module:stage3"], found["stage3"])
    assert encoder.grid("module:stage2.0", (64, 48)) == (16, 12)
    assert found["module:stage2.0"].shape == (2, 192, encoder.dim("module:stage2.0", "mean"))


def test_modules_that_are_no_place_are_refused() -> None:
    encoder = random_timm("resnet10t", 64)
    with pytest.raises(InputError, match=r"no module 'layer1.0.conv9'.*conv"):
        encoder.resolve_layer("module:layer1.0.conv9")
    with pytest.raises(InputError, match="does not run in a pass"):
        random_timm("test_vit", 96).resolve_layer("module:fc_norm")
    with pytest.raises(InputError, match=r"no layer 'blocks.0.atn'.*blocks.0.attn"):
        random_timm("test_vit", 96).resolve_layer("blocks.0.atn")


def test_nested_taps_and_a_module_that_changes_its_input() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = functional.linear(x, network[0].weight, network[0].bias)

        def inner() -> dict:
            return run_with_taps(network, {"c": Tap("2", torch.clone)}, lambda: network(x), stop=False)[0]

        taps = {"a": Tap("0", torch.clone), "b": Tap("2", torch.clone, "input")}
        found, result = run_with_taps(network, taps, inner, stop=True)
    assert result is None and set(found) == {"a", "b"}
    torch.testing.assert_close(found["a"], first)
    torch.testing.assert_close(found["b"], first.clamp(min=0))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
