"""WildECG: a self-supervised 1-D residual network of single-lead ECG.

Source: klean2050/tiles_ecg_model (MIT), trained on the TILES-2018 wearable ECG of hospital workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import max_pool1d, pad, relu

from biosae.encoders.base import Layer, pool_tokens
from biosae.encoders.signals import SignalEncoder

WIDTHS = (16, 16, 32, 32, 64, 64, 128, 128)
PRETEXT = ("none", "mask PR", "mask QRS", "permute", "scale", "time-warp", "invert", "reverse")
"""Transforms that the pretext head recognises, in order; only ``permute`` and ``invert`` were confirmed on real ECG."""


class _SameConv(nn.Module):
    """Convolution of kernel 3 whose output has ceil(length / stride) steps, zeros added evenly, more at the right."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(inputs, outputs, 3, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        total = max(0, (-(-length // self.stride) - 1) * self.stride + 3 - length)
        return self.conv(pad(x, (total // 2, total - total // 2)))


class _Block(nn.Module):
    """Pre-activation residual block; the shortcut is max-pooled at stride 2 and zero-padded where channels grow."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.first, self.stride = first, stride
        self.bn1, self.conv1 = nn.BatchNorm1d(inputs), _SameConv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm1d(outputs), _SameConv(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.first else relu(self.bn1(x))
        h = self.conv2(relu(self.bn2(self.conv1(h))))
        if self.stride == 2:
            x = max_pool1d(pad(x, (0, x.shape[-1] % 2)), 2)
        grown = h.shape[1] - x.shape[1]
        return h + pad(x, (0, 0, grown // 2, grown - grown // 2))


class WildEcgNet(nn.Module):
    """Stem, eight residual blocks (every second halves the time), normalisation, and the pretext head."""

    def __init__(self) -> None:
        super().__init__()
        self.first_block_conv, self.first_block_bn = _SameConv(1, WIDTHS[0]), nn.BatchNorm1d(WIDTHS[0])
        inputs = (WIDTHS[0], *WIDTHS[:-1])
        self.basicblock_list = nn.ModuleList(
            _Block(a, b, 1 + i % 2, first=i == 0) for i, (a, b) in enumerate(zip(inputs, WIDTHS))
        )
        self.final_bn = nn.BatchNorm1d(WIDTHS[-1])
        self.pretext = nn.Sequential(
            nn.Linear(128, 128, bias=False), nn.ReLU(), nn.Linear(128, len(PRETEXT), bias=False)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """All layers of ``(B, 1, T)``: ``blocks.0 ... blocks.7`` and ``final (B, 128, T / 16)``, channels first."""
        x = relu(self.first_block_bn(self.first_block_conv(x)))
        found = {}
        for i, block in enumerate(self.basicblock_list):
            x = found[f"blocks.{i}"] = block(x)
        found["final"] = relu(self.final_bn(x))
        return found


class WildEcgEncoder(SignalEncoder):
    """WildECG over windows of one lead at 100 Hz. A token of ``final`` covers 0.16 s; the embedding is their mean."""

    def __init__(self, model: WildEcgNet, *args: Any, **kwargs: Any) -> None:
        sites = {f"blocks.{i}": Layer(w, 2 ** ((i + 1) // 2)) for i, w in enumerate(WIDTHS)}
        sites["final"] = Layer(WIDTHS[-1], 16)
        super().__init__(model, *args, sites, head_width=WIDTHS[-1], head_norm="final", final_norm="final", **kwargs)

    def grid(self, layer: int | str, input_hw: tuple[int, int]) -> tuple[int, int]:
        stride = self._sites[self.resolve_layer(layer)].stride
        return 1, -(-input_hw[1] // stride)

    def pretext(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, 8)`` of the pretext task (order: ``PRETEXT``; each its own yes or no) of preprocessed items."""
        return self.model.pretext(self.forward(batch)["final"].to(self.device))

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        found = self.model(x)
        return {
            n: pool_tokens(found[n].transpose(1, 2), "mean" if p == "head" else p, n_prefix=0) for n, p in pools.items()
        }
