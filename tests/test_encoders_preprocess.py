"""Preprocessing against torchvision and closed forms."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biosae.encoders.preprocess import Preprocess
from biosae.errors import InputError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 100, width))[..., None]
    return np.clip(smooth + rng.integers(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(300, 400), (401, 233), (64, 80), (224, 224)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
def test_equals_the_evaluation_transform_of_timm(shape: tuple[int, int], interpolation: str, crop_pct: float) -> None:
    from PIL import Image
    from timm.data import create_transform

    image = picture(*shape)
    reference = create_transform(
        (3, 96, 96), is_training=False, interpolation=interpolation, crop_pct=crop_pct, **IMAGENET
    )
    ours = Preprocess(size=96, interpolation=interpolation, crop_pct=crop_pct, **IMAGENET)(image)
    torch.testing.assert_close(ours, reference(Image.fromarray(image)), atol=1e-6, rtol=0)


def test_squash_equals_open_clip() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    image = picture(120, 200)
    cfg = PreprocessCfg(size=64, resize_mode="squash", interpolation="bicubic", **HALF)
    reference = image_transform_v2(cfg, is_train=False)(Image.fromarray(image))
    ours = Preprocess(size=64, resize="squash", **HALF)(image)
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=0)


@given(st.integers(0, 255), st.floats(0.1, 0.9), st.floats(0.05, 1.0))
def test_a_flat_image_gives_the_closed_form(value: int, mean: float, std: float) -> None:
    flat = np.full((20, 30, 3), value, np.uint8)
    out = Preprocess(mean=(mean,) * 3, std=(std,) * 3, size=8)(flat)
    assert out.shape == (3, 8, 8) and out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), (value / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_channels_stay_in_order() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 255
    out = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 0.5, 0.25), size=None)(image)
    assert out.mean(dim=(1, 2)).tolist() == [1.0, 0.0, 0.0]


def test_area_halving_is_the_two_by_two_mean() -> None:
    image = (picture(128, 128) // 4) * 4
    step = Preprocess(interpolation="area", tile_mpp=0.5, target_mpp=1.0, match_mpp=True, **HALF)
    mean = image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    found = (step(image).permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255
    assert np.abs(found - mean).max() <= 0.51  # Pillow rounds to whole grey values


@pytest.mark.parametrize(("mpp", "side"), [(0.5, 128), (1.0, 256), (0.775, 198), (2.0, 512)])
def test_matched_scale_sets_the_size(mpp: float, side: int) -> None:
    step = Preprocess(interpolation="area", tile_mpp=mpp, target_mpp=1.0, match_mpp=True, **HALF)
    assert step(picture(256, 256)).shape == (3, side, side)


def test_matched_scale_crops_and_never_enlarges_the_field() -> None:
    step = Preprocess(size=112, tile_mpp=0.25, target_mpp=0.5, match_mpp=True, interpolation="area", **HALF)
    image = picture(256, 256)
    whole = Preprocess(tile_mpp=0.25, target_mpp=0.5, match_mpp=True, interpolation="area", **HALF)(image)
    torch.testing.assert_close(step(image), whole[:, 8:120, 8:120])
    with pytest.raises(InputError, match=r"56 um"):
        step(picture(200, 200))


def test_specification_survives_pickling_and_leaves_the_tile_scale_out() -> None:
    a = Preprocess(tile_mpp=0.5, target_mpp=1.0, match_mpp=True, **HALF)
    b = Preprocess(tile_mpp=0.25, target_mpp=1.0, match_mpp=True, **HALF)
    unmatched = Preprocess(target_mpp=1.0, **HALF)
    assert pickle.loads(pickle.dumps(a)) == a  # noqa: S301 - made here
    assert a.spec() == b.spec() != unmatched.spec()
    image = picture(50, 60)
    assert torch.equal(a(image), pickle.loads(pickle.dumps(a))(image))  # noqa: S301


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
    ],
)
def test_refuses_what_is_not_an_rgb_byte_image(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8"):
        Preprocess(size=8, **HALF)(bad)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"interpolation": "bicubik"}, "bicubic"),
        ({"resize": "longest"}, "shorter"),
        ({"std": (1.0, 0.0, 1.0)}, "std > 0"),
        ({"crop_pct": 1.2}, "crop_pct"),
        ({"tile_mpp": -1.0}, "tile_mpp"),
        ({"match_mpp": True}, "mpp="),
    ],
)
def test_refuses_impossible_settings(change: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Preprocess(**{"size": 8, **IMAGENET, **change})


def test_a_tile_below_the_least_size_is_named() -> None:
    with pytest.raises(InputError, match=r"40 x 40 px.*needs 64"):
        Preprocess(min_size=64, tile_mpp=0.5, target_mpp=1.0, match_mpp=True, **HALF)(picture(80, 80))
