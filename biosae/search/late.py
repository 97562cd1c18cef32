"""Slide to slide, record to record: how well each part of one is found in the other (late interaction)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.sae.analysis.late import maxsim
from biosae.search.rows import group_names, same_space, space, unnamed, unpack


def late_interaction(
    adata: Any, *, by: str = "slide", queries: Any = None, use_rep: str = "X", n_per_bag: int | None = None,
    symmetric: bool = False, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """MaxSim between bags of rows: mean over the rows of the one of the cosine to the most similar row of the other.

    ``s(Q, D) = (1/|Q|) sum_i max_j cos(q_i, d_j)``; between 0 and 1 for codes without negative values.

    Parameters
    ----------
    adata
        Latents, a row a tile or (``encode(..., tokens=None)``) a token.
    by
        Column of ``obs`` that says to which bag a row belongs: ``slide``, ``recording``, ``patient``, ``sample_id``.
    queries
        AnnData of the bags that ask, from the same encoder and dictionary; None: the bags of ``adata`` themselves.
    use_rep
        ``"X"`` or a key of ``obsm``.
    n_per_bag
        Rows drawn from every bag at random, so that all have the same number. A larger bag has more chances to hold
        something similar: without this the score rises with its size. Smaller bags are used whole.
    symmetric
        Mean of both directions. As it is, the score asks how much of Q is found in D, and not the reverse.
    random_state
        Of the draw.

    Returns
    -------
    DataFrame
        Score, bags that ask by bags that are searched, both in sorted order.

    Raises
    ------
    InputError
        If the column is absent or has gaps, or columns differ.
    IdentityError
        If ``queries`` are codes of another dictionary, or embeddings of another encoder.

    References
    ----------
    Khattab and Zaharia 2020, ColBERT, arXiv 2004.12832.
    """
    rng = np.random.default_rng(random_state)
    searched = _bags(adata, by, use_rep, n_per_bag, rng)
    if queries is not None:
        same_space(space(adata, use_rep), space(queries, use_rep))
    asking = searched if queries is None else _bags(queries, by, use_rep, n_per_bag, rng)
    scores = _mean_maxsim(asking, searched)
    if symmetric:
        scores = (scores + (scores if asking is searched else _mean_maxsim(searched, asking)).T) / 2
    return pd.DataFrame(scores, index=asking[2], columns=searched[2])


def rank_bags(
    scores: pd.DataFrame, obs: pd.DataFrame, *, by: str = "slide", n: int = 10, exclude: str | Sequence[str] = ()
) -> pd.DataFrame:
    """The n most similar bags of each, from the scores of :func:`late_interaction`.

    Parameters
    ----------
    scores
        Bags by bags.
    obs
        Table of the rows that made them up, for ``exclude``; each bag must have one value in those columns. Where the
        bags that ask come from another table: ``pandas.concat`` of both.
    by
        The column of bags.
    n
        Bags wanted.
    exclude
        Columns whose value the two must not share, such as ``"patient"``. A bag is never its own neighbour.

    Returns
    -------
    DataFrame
        ``query, rank, bag, score``; equal scores in the order of bags.

    Raises
    ------
    InputError
        If a column is absent or has gaps, a bag is not in ``obs``, or has several values in it.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if n < 1:
        raise InputError(f"n={n}: ask for at least one bag")
    own, other = (names.astype(str).to_numpy() for names in (scores.index, scores.columns))
    barred = own[:, None] == other[None]
    for name in (by, *exclude) if exclude else ():
        if name not in obs:
            raise InputError(f"obs has no column {name!r}; {nearest(name, obs.columns)}")
    for name in exclude:
        if missing := int(unnamed(obs[name]).sum()):
            raise InputError(
                f"exclude={name!r}: {missing} rows of obs have no value there; drop them or fill the column"
            )
        values = pd.Series(group_names(obs[name])).groupby(obs[by].astype(str).to_numpy()).agg(["nunique", "first"])
        several = int((values["nunique"] > 1).sum())
        if several:
            raise InputError(f"{several} bags ({by}) hold several values of {name!r}; exclude by another column")
        for bags in (own, other):
            if unknown := int((~np.isin(bags, values.index)).sum()):
                raise InputError(
                    f"exclude={name!r}: {unknown} bags are not in obs[{by!r}], so nobody can say whose they are; pass "
                    "the tables of both sides, put together with pandas.concat"
                )
        here, there = (values["first"].reindex(bags).to_numpy() for bags in (own, other))
        barred |= here[:, None] == there[None]
    lines = []
    for q, line in enumerate(scores.to_numpy()):
        order = [d for d in np.argsort(-line, kind="stable") if not barred[q, d]][:n]
        lines += [(own[q], rank, other[d], line[d]) for rank, d in enumerate(order, 1)]
    return pd.DataFrame(lines, columns=["query", "rank", "bag", "score"])


def _bags(
    adata: Any, by: str, use_rep: str, n_per_bag: int | None, rng: np.random.Generator
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, bag of each, names of the bags, rows in each."""
    from biosae.stats.nested import codes_of

    matrix, obs = unpack(adata, use_rep)
    codes, names = codes_of(obs, by)
    if n_per_bag is not None:
        if n_per_bag < 1:
            raise InputError(f"n_per_bag={n_per_bag}: draw at least one row")
        shuffled = rng.permutation(len(codes))
        place = np.empty(len(codes), np.int64)  # of each row among those of its bag
        place[shuffled] = pd.Series(codes[shuffled]).groupby(codes[shuffled]).cumcount()
        kept = np.flatnonzero(place < n_per_bag)
        matrix, codes = matrix[kept], codes[kept]
    return matrix, codes, np.array(names), np.bincount(codes, minlength=len(names))


def _mean_maxsim(asking: tuple, searched: tuple) -> np.ndarray:
    scores = maxsim(asking[0], searched[0], query_bags=asking[1], document_bags=searched[1])
    return scores / asking[3][:, None]
