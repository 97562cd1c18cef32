"""What else is like it: nearest neighbours, properties, clusters, differences of cohorts."""

from __future__ import annotations

# at once, not on first use: a function has the name of its module here, and whichever is bound last wins
from biosae.search.cluster import ari, cluster
from biosae.search.diff import diff
from biosae.search.evaluate import evaluate, evaluate_queries, ranking_measures
from biosae.search.filtered import cluster_filtered
from biosae.search.geometry import cosine_silhouette, decoder_geometry, label_rows
from biosae.search.index import Index, Neighbours, neighbours
from biosae.search.late import late_interaction, rank_bags
from biosae.search.markers import rank_latents
from biosae.search.pairs import npmi, pairs
from biosae.search.proportions import mcnemar, proportion_difference
from biosae.search.query import by_item, by_property, by_relevance, by_text, by_weights, softmax_weights

__all__ = [
    "Index", "Neighbours", "ari", "by_item", "by_property", "by_relevance", "by_text", "by_weights", "cluster",
    "cluster_filtered", "cosine_silhouette", "decoder_geometry", "diff", "evaluate", "evaluate_queries", "label_rows",
    "late_interaction", "mcnemar", "neighbours", "npmi", "pairs", "proportion_difference", "rank_bags", "rank_latents",
    "ranking_measures", "softmax_weights",
]  # fmt: skip
