"""Small convolutional histology encoders whose every layer is a map: the neural image compression encoder and the
bundled tiny one.

Source of the first: Tellez et al. 2019, "Neural image compression for gigapixel histopathology image analysis",
IEEE TPAMI, doi 10.1109/TPAMI.2019.2936841.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from biosae.encoders.base import Encoder, Layer, pool_tokens
from biosae.errors import InputError

if TYPE_CHECKING:
    from biosae.encoders.tiny import TinyHistologyNet

PATCH = 64
"""Side of the patch of which one embedding is made, in pixels (at 1 um/px)."""
STRIDE = 16
"""Pixels between neighbouring cells of the last map: four convolutions of stride 2."""


class NicNet(nn.Module):
    """Four unpadded convolutions of stride 2 and a linear layer over the last 3 x 3 cells.

    Each convolution is followed by LeakyReLU(0.2) and then BatchNorm (eps 1e-3), in this order. A 64 px patch gives
    maps of 31, 15, 7 and 3 cells a side and one embedding of 128.

    The convolutions have no padding and a total stride of 16, so the maps of a patch cut at a multiple of 16 px are
    parts of the maps of the whole tile, and the embeddings of all patches of a tile come from one pass: the linear
    layer is a 3 x 3 convolution over the last map. ``patch_stride`` (pixels, a multiple of 16) is the distance
    between patches.
    """

    def __init__(self, patch_stride: int = PATCH) -> None:
        super().__init__()
        if patch_stride < STRIDE or patch_stride % STRIDE:
            raise InputError(f"patch_stride must be a positive multiple of {STRIDE} px, got {patch_stride}")
        self.patch_stride = patch_stride
        for i in range(1, 5):
            setattr(self, f"conv{i}", nn.Conv2d(3 if i == 1 else 128, 128, 3, stride=2))
            setattr(self, f"bn{i}", nn.BatchNorm2d(128, eps=1e-3))
        self.fc = nn.Linear(1152, 128)

    def maps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``bn1`` ... ``bn4`` and ``final``, each ``(B, 128, h, w)``, of a normalised batch ``(B, 3, H, W)``."""
        found = {}
        for i in range(1, 5):
            x = getattr(self, f"bn{i}")(nn.functional.leaky_relu(getattr(self, f"conv{i}")(x), 0.2))
            found[f"bn{i}"] = x
        weight = self.fc.weight.view(128, 128, 3, 3)
        found["final"] = nn.functional.conv2d(x, weight, self.fc.bias, stride=self.patch_stride // STRIDE)
        return found


class NicEncoder(Encoder):
    """Neural image compression encoder: each patch of a tile gives one embedding, which is one token of ``final``.

    Tiles larger than 64 px hold several patches; what is left over at the right and lower edge is not seen.
    """

    def __init__(self, model: NicNet, *args: Any, **kwargs: Any) -> None:
        sites = {f"bn{i}": Layer(128, 2**i) for i in range(1, 5)}
        sites["final"] = Layer(128, model.patch_stride)
        super().__init__(model, *args, sites, head_width=128, **kwargs)

    def _grid(self, name: str, input_hw: tuple[int, int]) -> tuple[int, int]:
        if name == "final":
            return tuple((side - PATCH) // self.model.patch_stride + 1 for side in input_hw)
        rows, columns = input_hw
        for _ in range(int(name.removeprefix("bn"))):
            rows, columns = (rows - 3) // 2 + 1, (columns - 3) // 2 + 1
        return rows, columns

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        if min(input_hw) < PATCH:
            raise InputError(f"{self.info.name} needs inputs of at least {PATCH} px (64 um), got {input_hw}")

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        return _pooled(self.model.maps(x), pools)


class TinyEncoder(Encoder):
    """The bundled tiny encoder. Its embedding is linear in the mean of its last map, so ``final`` has tokens too:
    the same linear layer at every cell of that map; their mean is the embedding."""

    def __init__(self, model: TinyHistologyNet, *args: Any, **kwargs: Any) -> None:
        names = [n for n in model.layers if n != "embedding"]
        sites = {n: Layer(model.widths[n], 2 ** (i + 1)) for i, n in enumerate(names)}
        sites["final"] = Layer(model.width, 2 ** len(names))
        super().__init__(model, *args, sites, head_width=model.width, **kwargs)

    def _grid(self, name: str, input_hw: tuple[int, int]) -> tuple[int, int]:
        stride = self._sites[name].stride
        return -(-input_hw[0] // stride), -(-input_hw[1] // stride)

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        if min(input_hw) < 16:
            raise InputError(f"{self.info.name} needs inputs of at least 16 px, got {input_hw}")

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        found = self.model.forward_features(x)
        head, last = self.model.head, found[list(self._sites)[-2]]
        whole = found.pop("embedding")
        if pools.get("final") == "tokens":
            found["final"] = nn.functional.conv2d(last, head.weight[:, :, None, None], head.bias)
        else:
            found["final"] = whole[:, :, None, None]
        return _pooled(found, pools)


def _pooled(maps: dict[str, torch.Tensor], pools: dict[str, str]) -> dict[str, torch.Tensor]:
    """Pool maps ``(B, d, h, w)``; these networks have no class token, and their head is the mean."""
    kinds = {n: "mean" if p == "head" else p for n, p in pools.items()}
    return {n: pool_tokens(maps[n].flatten(2).transpose(1, 2), p, n_prefix=0) for n, p in kinds.items()}
