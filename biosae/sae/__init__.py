"""Sparse autoencoders of embeddings: fit, sparse codes, reconstruction, files."""

from __future__ import annotations

from biosae.sae.config import SAEConfig
from biosae.sae.estimator import SAE

__all__ = ["SAE", "SAEConfig"]
