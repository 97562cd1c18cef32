"""Statistics of latents against labels, counts and confounders, with the patient as the unit of inference."""

from __future__ import annotations

from biosae.stats.adjust import overlap, partial_correlation
from biosae.stats.association import associate
from biosae.stats.confounding import confounders
from biosae.stats.correlation import correlate
from biosae.stats.features import ablate
from biosae.stats.meta import combine
from biosae.stats.multiplicity import bh, bonferroni, by, fcr_intervals, hierarchical, holm, null_share, storey
from biosae.stats.nested import aggregate
from biosae.stats.ranking import ranked, summary
from biosae.stats.readout import readout
from biosae.stats.replicate import replicate
from biosae.stats.robustness import clustering_score, robustness, robustness_index
from biosae.stats.status import STATUS
from biosae.stats.strata import within_strata

__all__ = [
    "STATUS", "ablate", "aggregate", "associate", "bh", "bonferroni", "by", "clustering_score", "combine",
    "confounders", "correlate", "fcr_intervals", "hierarchical", "holm", "null_share", "overlap", "partial_correlation",
    "ranked", "readout", "replicate", "robustness", "robustness_index", "storey", "summary", "within_strata",
]  # fmt: skip
