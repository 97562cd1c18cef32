"""Input scaling for training and its exact folding into the weights, so that the saved model reads raw embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from biosae.sae.model import SparseAutoencoder


@dataclass
class Normaliser:
    """y = scale (u - mean), where u is the row itself or, with ``rowwise``, the layer-normalised row."""

    mean: np.ndarray
    """Subtracted from rows, float64 (d,)."""
    scale: float
    """Multiplies rows."""
    rowwise: bool = False
    """Layer normalisation comes first."""

    @classmethod
    def fit(cls, mode: str, mean: np.ndarray, deviation: float) -> Normaliser:
        """Scaling ``mode`` from the column means (d,) and the mean squared deviation mean_i ||u_i - mean||^2.

        For ``layernorm`` both describe the layer-normalised rows. Rows without spread keep scale 1.
        """
        centre = mode in ("centre", "centre_scale", "layernorm")
        square = deviation + (0.0 if centre else float(mean @ mean))
        scale = square**-0.5 if mode in ("unit_mean_square", "centre_scale", "layernorm") and square > 1e-24 else 1.0
        return cls(mean if centre else np.zeros_like(mean), float(scale), mode == "layernorm")

    def apply(self, u: torch.Tensor) -> torch.Tensor:
        """Normalise rows (already layer-normalised where ``rowwise``)."""
        mean = torch.as_tensor(self.mean, dtype=torch.float32, device=u.device)
        return (u - mean) * self.scale

    @torch.no_grad()
    def fold_(self, model: SparseAutoencoder) -> None:
        """Rewrite a model trained on y so that it takes u and its codes are in the units of u.

        With y = c (u - mean), unit atoms unchanged and the activation positively homogeneous:
        ``b_dec <- mean + b_dec / c``, ``b_enc <- b_enc / c``, ``threshold <- threshold / c``, W_enc and W_dec as they
        are. The new codes are the old ones divided by c; the new reconstruction is the old one mapped back.
        """
        mean = torch.as_tensor(self.mean, dtype=torch.float64)
        bias = mean + model.b_dec.detach().cpu().double() / self.scale
        model.b_dec.copy_(bias.float())
        model.b_enc.div_(self.scale)
        model.threshold.div_(self.scale)


def moments(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, float]:
    """Column means (d,) and mean squared deviation mean_i ||u_i - mean||^2 of blocks of rows, in float64."""
    n, mean, spread = 0, 0.0, 0.0
    for block in blocks:
        rows = np.asarray(block, np.float64)
        if not len(rows):
            continue
        here = rows.mean(0)
        shift = here - mean
        spread += np.square(rows - here).sum() + (shift @ shift) * n * len(rows) / (n + len(rows))
        mean = mean + shift * (len(rows) / (n + len(rows)))
        n += len(rows)
    return np.asarray(mean), float(spread / n)


def layernorm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows minus their mean, divided by (unbiased standard deviation + 1e-5); a constant row becomes 0.

    Returns
    -------
    rows, mean, divisor
        float32 (n, d), (n, 1), (n, 1); ``rows * divisor + mean`` restores x.
    """
    mean = x.mean(1, keepdims=True, dtype=np.float64)
    deviation = x - mean
    width = x.shape[1]
    spread = np.sqrt(np.square(deviation).sum(1, keepdims=True) / max(width - 1, 1)) + 1e-5
    return (deviation / spread).astype(np.float32), mean.astype(np.float32), spread.astype(np.float32)
