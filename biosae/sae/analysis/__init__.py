"""Questions to a trained dictionary: what its error holds, how its atoms lie, and where its latents read from."""

from __future__ import annotations

from biosae.sae.analysis.atoms import (
    Coherence,
    Metric,
    atomic_inner_product,
    babel,
    babel_selected,
    coherence,
    isometry,
    isometry_bound,
    second_moment_metric,
    unique_sparsity,
)
from biosae.sae.analysis.error import ErrorReport, LinearFit, error_report, linear_fit
from biosae.sae.analysis.growth import GrowthFit, fit_growth, growth_curve, growth_jacobian, growth_peak
from biosae.sae.analysis.heads import feature_attribution, head_outputs, head_parts, head_shares
from biosae.sae.analysis.late import maxsim
from biosae.sae.analysis.massive import MassiveDims
from biosae.sae.analysis.scaling import RowScaling, WidthLaw, row_scaling, width_law
from biosae.sae.analysis.uniqueness import (
    Uniqueness,
    effective_rank,
    support_window,
    threshold_codes,
    uniqueness_share,
)

__all__ = [
    "Coherence", "ErrorReport", "GrowthFit", "LinearFit", "MassiveDims", "Metric", "RowScaling", "Uniqueness",
    "WidthLaw", "atomic_inner_product", "babel", "babel_selected", "coherence", "effective_rank", "error_report",
    "feature_attribution", "fit_growth", "growth_curve", "growth_jacobian", "growth_peak", "head_outputs", "head_parts",
    "head_shares", "isometry", "isometry_bound", "linear_fit", "maxsim", "row_scaling", "second_moment_metric",
    "support_window", "threshold_codes", "unique_sparsity", "uniqueness_share", "width_law",
]  # fmt: skip
