"""Figures: each function draws what others computed, takes ``ax=`` (or ``fig=``) and returns it."""

from biosae.pl.alignment import alignment
from biosae.pl.associations import associations
from biosae.pl.clusters import cluster_stability, clusters, decoder_map
from biosae.pl.comparison import comparison, readout
from biosae.pl.density import density
from biosae.pl.diagnostics import null, qq
from biosae.pl.diff import diff, pairs
from biosae.pl.factors import factor_map
from biosae.pl.forest import forest
from biosae.pl.gallery import gallery
from biosae.pl.heatmap import heatmap
from biosae.pl.replication import replication
from biosae.pl.retrieval import retrieval
from biosae.pl.sae_comparison import sae_comparison
from biosae.pl.scanner import confounders, scanner
from biosae.pl.slide import slide
from biosae.pl.stress import specific, stress
from biosae.pl.strip import strip
from biosae.pl.style import PALETTE, paper, save
from biosae.pl.tissue import tissue
from biosae.pl.traces import traces
from biosae.pl.volcano import volcano

__all__ = [
    "PALETTE",
    "alignment",
    "associations",
    "cluster_stability",
    "clusters",
    "comparison",
    "confounders",
    "decoder_map",
    "density",
    "diff",
    "factor_map",
    "forest",
    "gallery",
    "heatmap",
    "null",
    "pairs",
    "paper",
    "qq",
    "readout",
    "replication",
    "retrieval",
    "sae_comparison",
    "save",
    "scanner",
    "slide",
    "specific",
    "stress",
    "strip",
    "tissue",
    "traces",
    "volcano",
]
