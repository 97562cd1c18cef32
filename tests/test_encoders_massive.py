"""Massive activations: the worked numbers of the definition, and values planted in a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import biosae as bs
from biosae.encoders.massive import massive_activations, massive_values
from biosae.errors import InputError


@pytest.mark.parametrize(("planted", "massive", "ratio"), [(120.0, True, 2400.0), (90.0, False, 1800.0)])
def test_the_worked_example(planted: float, massive: bool, ratio: float) -> None:
    h = np.full((5, 8), 0.05)
    h[3, 6] = -planted
    (row,) = massive_values(h).to_dict("records")
    assert (row["token"], row["dim"], row["value"], row["massive"]) == (3, 6, -planted, massive)
    assert row["ratio"] == pytest.approx(ratio)


def test_both_rules_are_needed() -> None:
    h = np.full((4, 8), 0.2)
    h[0, 0] = 150.0  # above 100, and only 750 times the median
    assert massive_values(h).empty
    assert not massive_values(h, least_ratio=700)["massive"].any()
    zero = np.zeros((4, 8))
    zero[1, 2] = 1.0
    assert massive_values(zero)["ratio"].item() == pytest.approx(1e12)
    with pytest.raises(InputError, match="tokens, d"):
        massive_values(np.full((2, 2), np.nan))


@pytest.fixture
def samples(tmp_path: Path) -> bs.Samples:
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(6)], "patient": list("abcdef")})
    table.to_csv(tmp_path / "t.csv", index=False)
    return bs.read.tiles(tmp_path / "t.csv", patient="patient", mpp=0.5)


def test_a_planted_dimension_and_token_are_found(samples: bs.Samples) -> None:
    args = {"depth": 3}
    encoder = bs.encoders.load("timm:vit_small_patch14_reg4_dinov2", weights="random", size=56, args=args, device="cpu")

    def plant(_module: object, _inputs: object, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[:, 2, 17] = 1e5  # token 0 is the class token, 1 to 4 are registers
        return y

    encoder.model.blocks[1].register_forward_hook(plant)
    table = massive_activations(encoder, samples, n=4, batch_size=3)
    assert list(table.index) == encoder.layers and (table["inputs"] == 4).all()
    assert table.loc["blocks.0", ["massive", "above_ratio"]].tolist() == [0, 0]
    for layer in ("blocks.1", "blocks.2"):  # the residual stream carries it on
        row = table.loc[layer]
        assert (row["massive"], row["dims"], row["tokens"]) == (4, [17], {"register": 4})
        assert (row["largest_dim"], row["largest_token"], row["zero_median"]) == (17, 2, 0)
        assert row["max"] == pytest.approx(1e5, rel=1e-3)
        assert row["ratio"] == pytest.approx(row["max"] / row["median"])
    states = encoder._outputs(encoder.preprocess(samples[0])[None], {"blocks.0": "all"})["blocks.0"][0].abs()
    one = massive_activations(encoder, samples, layers=["blocks.0", "blocks.1.mlp"], n=1)
    assert list(one.index) == ["blocks.0", "blocks.1.mlp"]
    expected = float(states.max() / np.median(states.numpy()))
    assert one.loc["blocks.0", "mean_ratio"] == pytest.approx(expected, rel=1e-5) == one.loc["blocks.0", "ratio"]


def test_convolutions_are_reported_too(samples: bs.Samples) -> None:
    table = massive_activations(bs.encoders.load("tiny-histology", device="cpu"), samples, n=2)
    assert list(table.index) == ["stage1", "stage2", "stage3", "final"] and (table["max"] > 0).all()


def test_refusals(samples: bs.Samples) -> None:
    encoder = bs.encoders.load("tiny-histology", device="cpu")
    with pytest.raises(InputError, match="at least 1"):
        massive_activations(encoder, samples, n=0)
    with pytest.raises(InputError, match="no layer"):
        massive_activations(encoder, samples, layers=["stage9"])
