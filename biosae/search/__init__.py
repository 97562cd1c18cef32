"""What else is like it: nearest neighbours, properties, clusters, differences of cohorts."""

from __future__ import annotations

# at once, not on first use: a function has the name of its module here, and whichever is bound last wins
from biosae.search.evaluate import evaluate, evaluate_queries, ranking_measures
from biosae.search.index import Index, Neighbours, neighbours
from biosae.search.late import late_interaction, rank_bags
from biosae.search.query import by_item, by_property, by_relevance, by_text, by_weights, softmax_weights

__all__ = [
    "Index", "Neighbours", "by_item", "by_property", "by_relevance", "by_text", "by_weights", "evaluate",
    "evaluate_queries", "late_interaction", "neighbours", "rank_bags", "ranking_measures", "softmax_weights",
]  # fmt: skip
