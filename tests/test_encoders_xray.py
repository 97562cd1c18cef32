"""Chest X-ray networks: against TorchXRayVision itself, and a DINOv2 written under transformers' names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import biosae as bs
from biosae.encoders.preprocess import Preprocess
from biosae.errors import InputError, WeightsError


@pytest.fixture(scope="module")
def xrv() -> object:
    with warnings.catch_warnings():
        return pytest.importorskip("torchxrayvision")


def awake(network: nn.Module) -> nn.Module:
    """Random statistics in the batch normalisations, so that they do something."""
    g = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=g))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=g))
    return network.eval()


@pytest.fixture(scope="module")
def dense(xrv: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bs.encoders.Encoder, Path]:
    torch.manual_seed(0)
    theirs = awake(xrv.models.DenseNet(weights=None, op_threshs=torch.rand(18)))
    folder = tmp_path_factory.mktemp("w") / "xrv_densenet121_all"
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "model.pt")
    before = list(warnings.filters)
    encoder = bs.encoders.load("xrv-densenet121-all", weights=folder, device="cpu")
    assert warnings.filters == before
    return theirs, encoder, folder


def xray(side: tuple[int, int] = (300, 260)) -> np.ndarray:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (side[0] // 10, side[1] // 10), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    return np.stack([grey] * 3, -1)


def test_densenet_equals_torchxrayvision(dense: tuple, xrv: object) -> None:
    theirs, encoder, _ = dense
    x = torch.stack([encoder.preprocess(xray()), encoder.preprocess(xray()[::-1])])
    assert x.shape == (2, 1, 224, 224)
    with torch.no_grad():
        expected = theirs.features2(x)
        raw = theirs.features.norm5(theirs.features[:-1](x))
    found = encoder.forward(x, ["final", "module:features.norm5", "denseblock2"], "mean")
    torch.testing.assert_close(found["final"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["module:features.norm5"], raw.mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert (raw < 0).any() and (found["module:features.norm5"] - found["final"]).abs().max() > 1e-3  # not rectified
    assert encoder.dim() == 1024 and encoder.dim("denseblock2", "mean") == found["denseblock2"].shape[1] == 512
    assert encoder.grid("denseblock2", (224, 224)) == (28, 28)


def test_values_and_crop_are_those_of_torchxrayvision(xrv: object) -> None:
    image = xray((261, 220))
    ours = Preprocess(
        mean=(0.5,) * 3, std=(1 / 2048,) * 3, size=220, resize="crop", interpolation="bilinear", grey=True
    )
    theirs = xrv.datasets.XRayCenterCrop()(xrv.utils.normalize(image[..., 0], 255)[None])
    np.testing.assert_allclose(ours(image).numpy(), theirs, atol=1e-3)  # 220 px wide: nothing is resized
    assert theirs.min() < -1000 and theirs.max() > 1000


def test_colour_becomes_luminance() -> None:
    step = Preprocess(mean=(0,) * 3, std=(1,) * 3, grey=True)
    pixel = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    np.testing.assert_allclose(
        step(pixel)[0, 0] * 255, np.round([0.299 * 255, 0.587 * 255, 0.114 * 255, 255]), atol=1e-3
    )
    plain = Preprocess(mean=(0,) * 3, std=(1,) * 3)
    assert "grey" not in plain.spec() and step.spec()["grey"] is True


def test_the_identity_says_what_went_in(dense: tuple) -> None:
    _, encoder, _ = dense
    spec = encoder.identity()["preprocess"]
    assert (spec["grey"], spec["resize"], spec["size"], spec["mean"][0], spec["std"][0]) == (
        True,
        "crop",
        224,
        0.5,
        1 / 2048,
    )
    with pytest.raises(InputError, match=r"\(B, 1, H, W\)"):
        encoder.forward(torch.zeros(1, 3, 224, 224))
    with pytest.raises(InputError, match="divisible by 32"):
        encoder.forward(torch.zeros(1, 1, 230, 224))


def test_resnet_equals_torchvisions_trunk(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(weights=None, num_classes=18)
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    awake(theirs)
    torch.save({f"model.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "resnet.pt")
    encoder = bs.encoders.load("xrv-resnet50-all", weights=tmp_path / "resnet.pt", size=64, device="cpu")
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = nn.Sequential(*list(theirs.children())[:-1])(x).flatten(1)
    torch.testing.assert_close(encoder.forward(x)["final"], expected, rtol=1e-4, atol=1e-4)
    assert encoder.layers == ["layer1", "layer2", "layer3", "layer4", "final"] and encoder.dim() == 2048


def test_a_file_that_lacks_a_tensor_or_holds_a_pickled_network_is_refused(dense: tuple, tmp_path: Path) -> None:
    theirs, _, folder = dense
    state = torch.load(folder / "model.pt", weights_only=True)
    del state["features.norm5.weight"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(WeightsError, match=r"norm5\.weight"):
        bs.encoders.load("xrv-densenet121-all", weights=tmp_path / "short.pt")
    torch.save(theirs.features.norm5, tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match="more than tensors"):
        bs.encoders.load("xrv-densenet121-all", weights=tmp_path / "whole.pt")


# ------------------------------------------------------------------- DINOv2 of transformers (RAD-DINO)

WIDTH, HEADS, DEPTH, SIDE = 48, 3, 2, 56


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A small network with the names, shapes and configuration files of transformers' Dinov2Model."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH), "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 17, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,), "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        at = f"encoder.layer.{i}"
        for name in ("norm1", "norm2"):
            shapes |= {f"{at}.{name}.weight": (WIDTH,), f"{at}.{name}.bias": (WIDTH,)}
        for name in (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
        ):
            shapes |= {f"{at}.{name}.weight": (WIDTH, WIDTH), f"{at}.{name}.bias": (WIDTH,)}
        shapes |= {f"{at}.layer_scale{j}.lambda1": (WIDTH,) for j in (1, 2)}
        shapes |= {f"{at}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{at}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{at}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{at}.mlp.fc2.bias": (WIDTH,)}
    state = {k: 0.3 * torch.randn(s, generator=g) for k, s in shapes.items()}
    folder = tmp_path_factory.mktemp("w") / "rad_small"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
              "mlp_ratio": 4, "image_size": SIDE, "patch_size": 14, "hidden_act": "gelu"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shown = {"image_mean": [0.53] * 3, "image_std": [0.26] * 3, "do_center_crop": True, "resample": 3,
             "crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    return folder, state


def by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """DINOv2 step by step: embeddings, pre-norm attention and MLP with layer scale, last normalisation."""

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(y, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    where = "embeddings.patch_embeddings.projection"
    patches = (
        functional.conv2d(x, state[f"{where}.weight"], state[f"{where}.bias"], stride=14).flatten(2).transpose(1, 2)
    )
    h = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), patches], 1)
    h = h + state["embeddings.position_embeddings"]
    for i in range(DEPTH):
        at = f"encoder.layer.{i}"
        y = norm(h, f"{at}.norm1")
        q, k, v = (
            linear(y, f"{at}.attention.attention.{n}").view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) / (WIDTH / HEADS) ** 0.5, -1) @ v
        mixed = linear(mixed.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
        h = h + state[f"{at}.layer_scale1.lambda1"] * mixed
        y = linear(functional.gelu(linear(norm(h, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        h = h + state[f"{at}.layer_scale2.lambda1"] * y
    return norm(h, "layernorm")


def test_a_dinov2_of_transformers_gives_its_own_numbers(dino: tuple) -> None:
    folder, state = dino
    encoder = bs.encoders.load(folder, device="cpu")
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = by_hand(state, x)
    torch.testing.assert_close(encoder.forward(x, -1, "cls")["final"], expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.forward(x, -1, "tokens")["final"], expected[:, 1:], rtol=1e-4, atol=1e-4)
    p = encoder.preprocess
    assert (p.size, p.mean[0], p.std[0], p.interpolation, p.crop_pct) == (SIDE, 0.53, 0.26, "bicubic", 1.0)
    assert encoder.info.pool == "cls" and encoder.has_cls and encoder.n_prefix == 1


def test_an_unknown_tensor_or_variant_is_refused(dino: tuple, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, state = dino
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({**state, "encoder.layer.0.extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    given = {"size": SIDE, "mean": "imagenet", "std": "imagenet"}
    with pytest.raises(WeightsError, match=r"extra\.weight"):
        bs.encoders.load(tmp_path, **given)
    save_file({k: v for k, v in state.items() if ".value.bias" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError):
        bs.encoders.load(tmp_path, **given)
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_swiglu_ffn": True}))
    with pytest.raises(WeightsError, match="SwiGLU"):
        bs.encoders.load(tmp_path, **given)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(WeightsError, match=r"lacks image_size"):
        bs.encoders.load(tmp_path, **given)


def test_rad_dino_is_loadable_by_name() -> None:
    facts = bs.encoders.info("rad-dino")
    assert facts.loadable and (facts.library, facts.size, facts.pool) == ("timm", 518, "cls")
    assert bs.encoders.info("xrv-resnet50-all").loadable
