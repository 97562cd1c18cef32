"""Sparse autoencoders of embeddings: fit, sparse codes, reconstruction, agreement between models, files."""

from __future__ import annotations

from biosae.sae import analysis
from biosae.sae.agreement import Stability, stability
from biosae.sae.baselines import Baseline
from biosae.sae.coder import Coder, load
from biosae.sae.config import SAEConfig
from biosae.sae.estimator import SAE
from biosae.sae.fitting import fit_many
from biosae.sae.interchange import read, write
from biosae.sae.itda import ITDA, jaccard
from biosae.sae.methods.afa import eps_lbo
from biosae.sae.methods.gsae import downstream_gradient
from biosae.sae.metrics import density_histogram
from biosae.sae.presets import preset
from biosae.sae.semi_nmf import SemiNMF, hierarchy
from biosae.sae.sequential import instance_mse
from biosae.sae.solvers import Pursuit, gradient_pursuit, matching_pursuit, nn_lasso, omp
from biosae.sae.synthetic import planted, recovery

__all__ = [
    "ITDA",
    "SAE",
    "Baseline",
    "Coder",
    "Pursuit",
    "SAEConfig",
    "SemiNMF",
    "Stability",
    "analysis",
    "density_histogram",
    "downstream_gradient",
    "eps_lbo",
    "fit_many",
    "gradient_pursuit",
    "hierarchy",
    "instance_mse",
    "jaccard",
    "load",
    "matching_pursuit",
    "nn_lasso",
    "omp",
    "planted",
    "preset",
    "read",
    "recovery",
    "stability",
    "write",
]
