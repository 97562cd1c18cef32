"""Sparse autoencoders of embeddings: fit, sparse codes, reconstruction, agreement between models, files."""

from __future__ import annotations

from biosae.sae.agreement import Stability, stability
from biosae.sae.coder import Coder, load
from biosae.sae.config import SAEConfig
from biosae.sae.estimator import SAE
from biosae.sae.fitting import fit_many
from biosae.sae.metrics import density_histogram
from biosae.sae.presets import preset
from biosae.sae.synthetic import planted, recovery

__all__ = [
    "SAE",
    "Coder",
    "SAEConfig",
    "Stability",
    "density_histogram",
    "fit_many",
    "load",
    "planted",
    "preset",
    "recovery",
    "stability",
]
