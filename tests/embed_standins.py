"""Small samples and a small encoder that follow the contract, for the tests of the embeddings room."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.encoders import Encoder, EncoderInfo


class NumberReader:
    """An image drawn from the row's ``number``; rows whose ``fault`` is set cannot be read."""

    def __init__(self, side: int = 8) -> None:
        self.side = side

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        if row["fault"] == "truncated":
            raise ReadError("truncated", f"number {row['number']} ends early")
        if row["fault"] == "bug":
            raise ZeroDivisionError("division by zero")
        side = {"wide": (self.side, 2 * self.side), "tall": (2 * self.side, self.side)}.get(
            row["fault"], (self.side,) * 2
        )
        image = np.random.default_rng(int(row["number"])).integers(1, 256, (*side, 3), dtype=np.uint8)
        if row["fault"] == "nan":
            image[:] = 0
        return image

    def spec(self) -> dict[str, Any]:
        return {"kind": "number", "side": self.side}


def make_samples(n: int, *, faults: Mapping[int, str] | None = None, side: int = 8) -> Samples:
    faults = faults or {}
    obs = pd.DataFrame(
        {
            "case": [f"p{i % 5}" for i in range(n)],
            "number": np.arange(n),
            "fault": [faults.get(i, "") for i in range(n)],
            "count": np.arange(n) % 7,
        },
        index=pd.Index([f"s{i:04d}" for i in range(n)], name="sample_id"),
    )
    return Samples(obs, NumberReader(side), roles={"patient": "case"}, mpp=0.5)


class Scaling:
    """Preprocessing: to 0..1; notes the tiles' micrometres per pixel."""

    def __init__(self, tile_mpp: float | None = None) -> None:
        self.tile_mpp = tile_mpp

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image).permute(2, 0, 1).float().div(255)


class PatchEncoder:
    """A patch projection and a second layer, with seeded weights. An all-black image gives NaN in layer ``late``."""

    item = "image"
    suited, _check_item = Encoder.suited, Encoder._check_item
    layers = ["early", "late"]
    device, precision = "cpu", "float32"

    def __init__(self, *, seed: int = 0, dim: int = 6, patch: int = 4, pause: float = 0.0, scale: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(dim, 3, patch, patch, generator=draw) * scale
        self.seed, self.dim, self.patch, self.pause = seed, dim, patch, pause
        self.preprocess = Scaling()
        self.info = EncoderInfo("stand-in")
        self.batches: list[tuple[int, tuple[str, ...]]] = []  # what forward was asked for

    def at_mpp(self, mpp: float) -> PatchEncoder:
        other = copy.copy(self)
        other.preprocess = Scaling(mpp)
        return other

    def resolve_layer(self, layer: int | str) -> str:
        return self.layers[layer] if isinstance(layer, int) else layer

    def grid(self, layer: str, input_hw: tuple[int, int]) -> tuple[int, int]:
        return input_hw[0] // self.patch, input_hw[1] // self.patch

    def identity(self, layer: str, pool: str) -> dict[str, Any]:
        return {
            "encoder": "stand/in", "library": "test", "source": "seed", "weights_sha256": f"{self.seed:064d}",
            "layer": layer, "pool": pool, "norm": None, "preprocess": {"size": None}, "dim": self.dim, "mpp": None,
            "tile_mpp": self.preprocess.tile_mpp,
            "licence": "none", "derivatives_restricted": False,
        }  # fmt: skip

    def forward(self, batch: torch.Tensor, layers: list[str], pool: str) -> dict[str, torch.Tensor]:
        time.sleep(self.pause)
        self.batches.append((len(batch), tuple(layers)))
        early = torch.nn.functional.conv2d(batch, self.weight, stride=self.patch).flatten(2).transpose(1, 2)
        late = early / early.abs().amax(dim=(1, 2), keepdim=True)
        found = {"early": early, "late": late}
        return {name: found[name] if pool == "tokens" else found[name].mean(dim=1) for name in layers}


def dense(samples: Samples, encoder: PatchEncoder, layer: str, pool: str = "mean") -> np.ndarray:
    """Reference: every readable image by itself, one below the other, by plain arithmetic in float64."""
    rows = []
    for i in range(len(samples)):
        image = torch.from_numpy(samples[i]).permute(2, 0, 1).double() / 255
        p = encoder.patch
        patches = image.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 0, 3, 4).reshape(-1, 3 * p * p)
        tokens = patches @ encoder.weight.double().reshape(encoder.dim, -1).T
        if layer == "late":
            tokens = tokens / tokens.abs().max()
        rows.append(tokens if pool == "tokens" else tokens.mean(0, keepdim=True))
    return torch.cat(rows).numpy()
