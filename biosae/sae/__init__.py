"""Sparse autoencoders of embeddings: fit, sparse codes, reconstruction, agreement between models, files."""

from __future__ import annotations

from biosae.sae import analysis
from biosae.sae.agreement import Stability, stability
from biosae.sae.alignment import Alignment
from biosae.sae.baselines import Baseline
from biosae.sae.coder import Coder, load
from biosae.sae.compare import compare
from biosae.sae.config import SAEConfig
from biosae.sae.estimator import SAE
from biosae.sae.fitting import fit_many
from biosae.sae.interchange import read, write
from biosae.sae.itda import ITDA, jaccard
from biosae.sae.methods.afa import eps_lbo
from biosae.sae.methods.archetypal import archetypes
from biosae.sae.methods.gsae import downstream_gradient
from biosae.sae.methods.poly import interactions, latent_effect
from biosae.sae.metrics import density_histogram
from biosae.sae.modalities import modality_score, multimodal_monosemanticity, zero_shot_scores
from biosae.sae.presets import preset
from biosae.sae.saev import CrossModal, best_samples, cross_modal_weights, sample_scores, score_quarters
from biosae.sae.semi_nmf import SemiNMF, hierarchy
from biosae.sae.sequential import instance_mse
from biosae.sae.solvers import Pursuit, gradient_pursuit, matching_pursuit, nn_lasso, omp
from biosae.sae.synthetic import planted, recovery

__all__ = [
    "ITDA",
    "SAE",
    "Alignment",
    "Baseline",
    "Coder",
    "CrossModal",
    "Pursuit",
    "SAEConfig",
    "SemiNMF",
    "Stability",
    "analysis",
    "archetypes",
    "best_samples",
    "compare",
    "cross_modal_weights",
    "density_histogram",
    "downstream_gradient",
    "eps_lbo",
    "fit_many",
    "gradient_pursuit",
    "hierarchy",
    "instance_mse",
    "interactions",
    "jaccard",
    "latent_effect",
    "load",
    "matching_pursuit",
    "modality_score",
    "multimodal_monosemanticity",
    "nn_lasso",
    "omp",
    "planted",
    "preset",
    "read",
    "recovery",
    "sample_scores",
    "score_quarters",
    "stability",
    "write",
    "zero_shot_scores",
]
