"""The bundled tiny histology encoder: a small convolution network trained on phantom tiles only.

It lets the demo and the tests run without a download. It has seen no patient tissue and must not be used on any.
``biosae/encoders/weights/tiny_histology`` holds its weights; ``biosae.encoders.pretrain.tiny_histology`` makes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from biosae.errors import WeightsError
from biosae.files import hash_file, read_json

TINY_FOLDER = Path(__file__).parent / "weights" / "tiny_histology"
"""Folder with ``model.safetensors``, ``config.json`` and ``README.md`` of the bundled encoder."""
TINY_CONFIG = TINY_FOLDER / "config.json"
"""Architecture, preprocessing, licence, SHA-256, training recipe and held-out metrics of the bundled encoder."""


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class TinyHistologyNet(nn.Module):
    """Three convolution stages at strides 2, 4 and 8, then a linear embedding of the mean-pooled last stage.

    Parameters
    ----------
    stage_widths
        Channels of ``stage1``, ``stage2`` and ``stage3``.
    width
        Dimension of the embedding.

    Notes
    -----
    ``embedding = W mean_hw(stage3) + b`` has no rectifier, so it is linear in the mean of the stage 3 map. The same
    ``W`` and ``b`` applied at each position therefore give local embeddings whose mean is the embedding.
    """

    layers: tuple[str, ...] = ("stage1", "stage2", "stage3", "embedding")

    def __init__(self, stage_widths: tuple[int, int, int] = (24, 64, 128), width: int = 128) -> None:
        super().__init__()
        first, second, third = stage_widths
        self.width = width
        self.widths = dict(zip(self.layers, (*stage_widths, width)))
        self.stage1 = nn.Sequential(_conv(3, first, kernel=5, stride=2), _conv(first, first))
        self.stage2 = nn.Sequential(_conv(first, second, stride=2), _conv(second, second))
        self.stage3 = nn.Sequential(_conv(second, third, stride=2), _conv(third, third))
        self.head = nn.Linear(third, width)

    def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """All layers of a normalised batch ``(B, 3, H, W)``.

        Returns
        -------
        dict
            ``stage1`` ``(B, 24, H/2, W/2)``, ``stage2`` ``(B, 64, H/4, W/4)``, ``stage3`` ``(B, 128, H/8, W/8)``
            and ``embedding`` ``(B, width)``, in this order.
        """
        stage1 = self.stage1(x)
        stage2 = self.stage2(stage1)
        stage3 = self.stage3(stage2)
        embedding = self.head(stage3.mean(dim=(2, 3)))
        return {"stage1": stage1, "stage2": stage2, "stage3": stage3, "embedding": embedding}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embedding ``(B, width)`` of a normalised batch ``(B, 3, H, W)``."""
        return self.forward_features(x)["embedding"]


def load_tiny(folder: str | os.PathLike = TINY_FOLDER) -> TinyHistologyNet:
    """Load the tiny encoder in evaluation mode, after checking its weights against the hash in ``config.json``.

    Raises
    ------
    WeightsError
        If the weights are absent or are not those that ``config.json`` names.
    FormatError
        If ``config.json`` is absent or unreadable.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise WeightsError(
            f"{weights} is absent; reinstall biosae, or train it again: python -m {TRAINED_BY} --out {folder}"
        )
    found = hash_file(weights)
    if found != config["sha256"]:
        raise WeightsError(
            f"{weights} has SHA-256 {found[:16]}..., but config.json names {config['sha256'][:16]}...; "
            f"reinstall biosae, or train it again: python -m {TRAINED_BY} --out {folder}"
        )
    architecture = config["architecture"]
    model = TinyHistologyNet(tuple(architecture["stage_widths"]), architecture["width"])
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


TRAINED_BY = "biosae.encoders.pretrain.tiny_histology"
