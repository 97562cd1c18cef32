"""Number formats and the physical scale at which tiles reach an encoder."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional

import biosae as bs
from biosae.encoders import precision
from biosae.encoders.preprocess import Preprocess
from biosae.errors import InputError


def test_layer_norm_and_attention_sum_in_float32() -> None:
    """bfloat16 inputs give the float32 result rounded once: no more than one unit in the last of 8 bits."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 300, 384, generator=g).bfloat16() + 30  # a mean far above the spread
    found = functional.layer_norm(x, (384,)).float()
    exact = functional.layer_norm(x.double(), (384,))
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
    scores = torch.randn(64, 4000, generator=g).bfloat16()
    found, exact = torch.softmax(scores, -1).float(), torch.softmax(scores.double(), -1)
    assert ((found - exact).abs() <= 2.0**-8 * exact).all()
    assert (found.sum(-1) - 1).abs().max() < 0.005  # summed in bfloat16 it would stop growing at 256 terms


@pytest.mark.parametrize("native", [True, False])
def test_fast_takes_bfloat16_only_where_it_is_native(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    encoder = bs.encoders.load("timm:test_vit", weights="random", precision="fast", device="cpu")
    plain = bs.encoders.load("timm:test_vit", weights="random", device="cpu")
    assert encoder.channels_last and encoder.precision == ("bfloat16" if native else "float32")
    assert encoder.identity()["precision"] == encoder.precision and plain.precision == "float32"
    x = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    cosine = functional.cosine_similarity(encoder.forward(x)["final"], plain.forward(x)["final"])
    assert cosine.min() >= 0.999
    assert (bs.encoders.fingerprint(encoder.identity()) == bs.encoders.fingerprint(plain.identity())) != native


def test_fast_keeps_float32_where_bfloat16_changes_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "LEAST_COSINE", 1.1)
    with pytest.warns(UserWarning, match=r"stays in float32: .*cosine of only 0\.\d+|1\.0"):
        encoder = bs.encoders.load("timm:test_vit", weights="random", precision="fast", device="cpu")
    assert encoder.precision == "float32"
    assert next(encoder.model.parameters()).dtype == torch.float32


def test_trained_weights_in_the_fast_precision(shared: Path) -> None:
    """Whatever ``fast`` chooses for trained networks, images like its probes keep their embeddings."""
    for name in ("mobilenetv2_imagenet", "nic_histology_multitask4"):
        plain = bs.encoders.load(shared / "weights" / name, device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = bs.encoders.load(shared / "weights" / name, device="cpu", precision="fast")
        x = torch.stack([plain.preprocess(image) for image in np.flip(precision._images(plain), 1)])
        a, b = (one.forward(x)["final"] for one in (plain, fast))
        assert functional.cosine_similarity(a, b).min() >= 0.999, (name, fast.precision)


def tiles(folder: Path, side: int, mpp: float | None) -> bs.Samples:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(2):
        paths.append(f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / paths[-1])
    table = pd.DataFrame({"path": paths, "patient": ["a", "b"]}, index=pd.Index(["x", "y"], name="sample_id"))
    table.to_csv(folder / "tiles.csv")
    return bs.read.tiles(folder / "tiles.csv", patient="patient", mpp=mpp)


def load_small(**kwargs: object) -> bs.encoders.Encoder:
    from dataclasses import replace

    encoder = bs.encoders.load("timm:test_vit", weights="random", device="cpu", size=224)
    encoder.preprocess = replace(encoder.preprocess, target_mpp=0.5, crop_pct=1.0)
    return encoder.at_mpp(**{"mpp": None, **kwargs})


@pytest.mark.parametrize(("side", "mpp", "reached"), [(224, 0.25, 0.25), (448, 0.5, 1.0), (512, 0.5, 512 / 448)])
def test_a_scale_that_is_not_the_encoders_is_refused(tmp_path: Path, side: int, mpp: float, reached: float) -> None:
    encoder, samples = load_small(), tiles(tmp_path, side, mpp)
    with pytest.raises(InputError) as error:
        encoder.suited(samples)
    for said in (
        f"{reached:.3g} um/px when",
        "bs.read.wsi(..., mpp=0.5)",
        f"mpp={mpp:g}, match_mpp=True",
        "match_mpp=False",
    ):
        assert said in str(error.value)
    assert encoder.at_mpp(None, match_mpp=False).suited(samples).preprocess.mpp_of_input(side, side) == pytest.approx(
        reached
    )
    with pytest.raises(InputError, match="was made for"):
        encoder.at_mpp(mpp).suited(samples)


@pytest.mark.parametrize(("side", "mpp"), [(224, 0.5), (448, 0.25), (512, 0.25), (224, 0.41), (224, 0.62), (300, None)])
def test_the_encoders_scale_or_an_unknown_one_is_taken(tmp_path: Path, side: int, mpp: float | None) -> None:
    suited = load_small().suited(tiles(tmp_path, side, mpp))
    assert suited.preprocess.tile_mpp == mpp and not suited.preprocess.match_mpp


def test_a_matched_scale_is_taken_and_kept(tmp_path: Path) -> None:
    samples = tiles(tmp_path, 500, 0.25)
    matched = load_small(mpp=0.25, match_mpp=True).suited(samples)
    assert matched.preprocess.match_mpp and matched.preprocess(samples[0]).shape == (3, 224, 224)
    assert matched.identity()["mpp"] == 0.5
    assert matched.at_mpp(0.4).preprocess.match_mpp  # what was said stays


def test_an_unreadable_first_tile_does_not_hide_the_scale(tmp_path: Path) -> None:
    samples = tiles(tmp_path, 224, 0.25)
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="was made for"):
        load_small().suited(samples)


def test_load_keeps_what_was_said() -> None:
    said = {v: bs.encoders.load("timm:test_vit", weights="random", match_mpp=v).match_said for v in (None, False)}
    assert said == {None: None, False: False}


@pytest.mark.parametrize(("resize", "crop_pct"), [("shorter", 1.0), ("shorter", 0.875), ("crop", 1.0)])
def test_the_scale_of_the_input_is_that_of_a_ruler(resize: str, crop_pct: float) -> None:
    """A bar of known length keeps its length in micrometres."""
    image = np.zeros((400, 600, 3), np.uint8)
    image[:, 250:350] = 255  # 100 px at 0.3 um/px: 30 um
    step = Preprocess(
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=224,
        resize=resize,
        crop_pct=crop_pct,
        tile_mpp=0.3,
        interpolation="bilinear",
    )
    length = float(step(image)[0, 112].sum())
    assert math.isclose(length * step.mpp_of_input(600, 400), 30.0, rel_tol=0.01)
