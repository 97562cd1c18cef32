"""Statistics of latents against labels, counts and confounders, with the patient as the unit of inference."""

from __future__ import annotations

from biosae.stats.adjust import overlap, partial_correlation
from biosae.stats.agreement import replication_rate
from biosae.stats.association import associate
from biosae.stats.audit import audit_confounders
from biosae.stats.bootstrap import cluster_bootstrap
from biosae.stats.confounding import confounders
from biosae.stats.correlation import correlate
from biosae.stats.counts import compare_counts, fit_negbin, fit_poisson, fit_zinb, fit_zip, rootogram
from biosae.stats.cox import fit_cox
from biosae.stats.curse import winners_curse
from biosae.stats.drop import average_drop, performance_drop
from biosae.stats.features import ablate
from biosae.stats.kendall import kendall_tau
from biosae.stats.meta import combine
from biosae.stats.mixed import icc
from biosae.stats.multiplicity import bh, bonferroni, by, fcr_intervals, hierarchical, holm, null_share, storey
from biosae.stats.nested import aggregate
from biosae.stats.null import permutation_null
from biosae.stats.ordinal import fit_ordinal
from biosae.stats.posthoc import compare_auroc, dunn, variance_explained
from biosae.stats.power import (
    auroc_error,
    design_effect,
    detectable,
    detectable_auroc,
    power,
    power_by_thinning,
    sample_size,
    sample_size_auroc,
)
from biosae.stats.pvca import pvca
from biosae.stats.ranking import ranked, summary
from biosae.stats.readout import readout
from biosae.stats.removal import spurious_removal
from biosae.stats.replicate import replicate
from biosae.stats.robustness import clustering_score, robustness, robustness_index
from biosae.stats.shortlist import fit
from biosae.stats.sites import by_site, leave_one_site_out
from biosae.stats.status import STATUS, evidence
from biosae.stats.strata import within_strata
from biosae.stats.survival import aalen_johansen, concordance, kaplan_meier, schoenfeld, uno_c
from biosae.stats.tables import odds_ratio_exact
from biosae.stats.training import sae_training

__all__ = [
    "STATUS", "aalen_johansen", "ablate", "aggregate", "associate", "audit_confounders", "auroc_error",
    "average_drop", "bh", "bonferroni", "by", "by_site", "cluster_bootstrap", "clustering_score", "combine",
    "compare_auroc", "compare_counts", "concordance", "confounders", "correlate", "design_effect", "detectable",
    "detectable_auroc", "dunn", "evidence", "fcr_intervals", "fit", "fit_cox", "fit_negbin", "fit_ordinal",
    "fit_poisson", "fit_zinb", "fit_zip", "hierarchical", "holm", "icc", "kaplan_meier", "kendall_tau",
    "leave_one_site_out", "null_share", "odds_ratio_exact", "overlap", "partial_correlation", "performance_drop",
    "permutation_null",
    "power", "power_by_thinning", "pvca", "ranked", "readout", "replicate", "replication_rate", "robustness",
    "robustness_index", "rootogram", "sae_training", "sample_size", "sample_size_auroc", "schoenfeld",
    "spurious_removal", "storey", "summary", "uno_c", "variance_explained", "winners_curse", "within_strata",
]  # fmt: skip
