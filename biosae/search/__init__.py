"""What else is like it: nearest neighbours, properties, clusters, differences of cohorts."""

from __future__ import annotations

# at once, not on first use: a function has the name of its module here, and whichever is bound last wins
from biosae.search.evaluate import evaluate, evaluate_queries, ranking_measures
from biosae.search.index import Index, Neighbours, neighbours

__all__ = ["Index", "Neighbours", "evaluate", "evaluate_queries", "neighbours", "ranking_measures"]
