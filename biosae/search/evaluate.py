"""How good is a search: average precision, NDCG and precision of rankings, with intervals over patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.search.index import Index
from biosae.search.proportions import effective_n, wilson
from biosae.stats.precision import checked_ranking, tied_precision

LEAST_GROUPS = 3
FEW_GROUPS = 20
BLOCK = 2**23
"""Scores of whole rankings held at once."""


def ranking_measures(relevant: Any, scores: Any, *, k: int | Sequence[int] = 10) -> dict[str, float]:
    """Average precision, NDCG and precision of one ranking, as expected over all orders of equal scores.

    Parameters
    ----------
    relevant
        Whether each item is wanted, (n,) of 0 and 1.
    scores
        Score of each item, (n,), higher comes first.
    k
        Places at which NDCG and precision are taken; with fewer than k items, at the last of them.

    Returns
    -------
    dict
        ``ap`` (its mean over queries is mAP), ``ndcg@k``, ``precision@k``; NaN where nothing is relevant.

    Notes
    -----
    With n, r the size and the relevant items of the ties that start behind place ``t0``, R relevant items before them:
    ``AP = (1/P) sum_ties sum_t (r/n) (R + (t - t0 - 1) (r - 1) / (n - 1) + 1) / t``, which is that of
    :func:`biosae.interpret.average_precision`;
    ``DCG@k = sum_{t<=k} (r/n) / log2(t + 1)``, NDCG its ratio to that of the best order (Jarvelin and Kekalainen 2002).
    scikit-learn's ``average_precision_score`` steps over ties at once and differs where there are any; its
    ``ndcg_score`` is the same.

    Raises
    ------
    InputError
        If lengths differ, a score is NaN, or ``relevant`` holds other values than 0 and 1.

    Examples
    --------
    >>> ranking_measures([1, 0, 0, 1], [1, 1, 0, 0], k=1)
    {'ap': 0.6666666666666666, 'ndcg@1': 0.5, 'precision@1': 0.5}
    """
    relevant, scores = checked_ranking(relevant, scores)
    order = np.argsort(-scores, kind="stable")
    return _measures(relevant[order].astype(np.float64), scores[order], _places(k))


def _places(k: int | Sequence[int]) -> tuple[int, ...]:
    places = tuple(int(i) for i in np.atleast_1d(k))
    if not places or min(places) < 1:
        raise InputError(f"k={k!r}: places count from 1")
    return places


def _measures(relevant: np.ndarray, scores: np.ndarray, places: tuple[int, ...]) -> dict[str, float]:
    """Measures of a sorted ranking."""
    names = ["ap", *(f"{kind}@{k}" for k in places for kind in ("ndcg", "precision"))]
    total = relevant.sum()
    if not total:
        return dict.fromkeys(names, float("nan"))
    start = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    size = np.diff(np.r_[start, len(scores)])
    r = np.add.reduceat(relevant, start)
    share = np.repeat(r / size, size)
    values = [tied_precision(size, r)]
    for k in places:
        k = min(k, len(scores))
        gain = 1 / np.log2(np.arange(2, k + 2))
        values += [float(share[:k] @ gain / gain[: int(min(total, k))].sum()), float(share[:k].mean())]
    return dict(zip(names, values))


def evaluate_queries(
    adata: Any, label: str, *, use_rep: str | Sequence[str] = ("X", "embedding"), metric: str = "cosine",
    exclude: str | Sequence[str] = (), k: int | Sequence[int] = 10, queries: Any = None, gallery: Any = None,
) -> pd.DataFrame:  # fmt: skip
    """Measures of the ranking of every query, by each representation.

    Every query ranks the whole gallery, less itself and what ``exclude`` bars. Relevant is what has the query's label.
    Arguments as in :func:`evaluate`.

    Returns
    -------
    DataFrame
        One line a query and representation: ``query, use_rep, label`` (value), ``n_gallery`` (items ranked),
        ``n_relevant``, the measures of :func:`ranking_measures`, and each as expected of a random order
        (``chance_ap``, ...). Measures are NaN for a query without a relevant item. Items without a label are neither
        queries nor ranked.
    """
    if label not in adata.obs:
        raise InputError(f"{label!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
    from biosae.stats.nested import in_memory

    adata = in_memory(adata)
    known = adata.obs[label].notna().to_numpy()
    asked, ranked = (adata[known & _mask(adata, chosen)] for chosen in (queries, gallery))
    if not asked.n_obs or not ranked.n_obs:
        raise InputError(f"{asked.n_obs} queries and {ranked.n_obs} items to rank have a {label!r}; name others")
    places = _places(k)
    values, theirs = asked.obs[label].to_numpy(), ranked.obs[label].to_numpy()
    lines, chances = [], {}
    for rep in (use_rep,) if isinstance(use_rep, str) else tuple(use_rep):
        index = Index(ranked, use_rep=rep, metric=metric)
        step = max(1, BLOCK // ranked.n_obs)
        for first in range(0, asked.n_obs, step):
            found = index.search(asked[first : first + step], n=ranked.n_obs, exclude=exclude)
            for query, rows, scores in zip(range(first, asked.n_obs), found.rows, found.scores):
                rows = rows[rows >= 0]
                relevant = (theirs[rows] == values[query]).astype(np.float64)
                shape = (len(rows), int(relevant.sum()))
                if shape not in chances:
                    chances[shape] = _measures(relevant, np.zeros(len(rows)), places)
                lines.append({
                    "query": asked.obs_names[query], "use_rep": rep, "label": values[query], "n_gallery": shape[0],
                    "n_relevant": shape[1], **_measures(relevant, scores[: len(rows)], places),
                    **{f"chance_{name}": value for name, value in chances[shape].items()},
                })  # fmt: skip
    return pd.DataFrame(lines)


def evaluate(
    adata: Any, label: str, *, use_rep: str | Sequence[str] = ("X", "embedding"), metric: str = "cosine",
    exclude: str | Sequence[str] = (), k: int | Sequence[int] = 10, queries: Any = None, gallery: Any = None,
    groups: str = "patient", assume_independent: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Search by one or several representations: do the nearest items share the query's label?

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`, with embeddings in ``obsm``.
    label
        Column of ``obs`` (classes).
    use_rep
        Representations to compare, ``"X"`` (codes) or keys of ``obsm``. The last one is what the others are compared
        with.
    metric
        As in :class:`Index`.
    exclude
        Columns whose value an item must not share with the query: ``"patient"`` says whether a search finds the same
        thing in other patients. The query itself is never ranked.
    k
        Places of NDCG and precision.
    queries, gallery
        Masks (in the order of rows, or a Series by id) or ids of the rows that ask and of those that are ranked; None:
        all.
    groups
        Column of independent groups of queries; intervals count these.
    assume_independent
        Take every query as independent, where nobody knows the patients.

    Returns
    -------
    DataFrame
        One line a representation (and a difference, ``"X - embedding"``) and measure: ``label, use_rep, measure,
        estimate`` (mean over queries), ``ci_low, ci_high``, ``chance`` (mean of what a random order of the same items
        gives), ``n_queries, n_groups, n_left_out`` (queries without a relevant item), ``status``: ``ok``,
        ``few_groups`` (below 20), ``too_few_groups`` (below 3, no interval), ``no_queries``.

    Notes
    -----
    95 % intervals: cluster-robust variance CR2 of the groups and t with Satterthwaite degrees of freedom
    (:func:`biosae.stats.robust.cr2`), which also holds for groups of unequal size. Of means, which lie in [0, 1], they
    are Wilson's limits for the number of groups that has this variance
    (:func:`biosae.search.proportions.effective_n`): t limits of precision near 1 cover 0.3 to 0.9. They are of other
    queries to this gallery; how another gallery would have ranked is not in them. Differences are paired: both rankings
    of the same query are subtracted.

    Raises
    ------
    InputError
        If a column is absent or has gaps.
    StatisticsError
        If nothing says which queries are independent.
    """
    from biosae.stats.nested import codes_of, require_groups

    if not assume_independent:
        require_groups(adata.obs, groups)
    lines = evaluate_queries(
        adata, label, use_rep=use_rep, metric=metric, exclude=exclude, k=k, queries=queries, gallery=gallery
    )
    names = [name for name in lines.columns if f"chance_{name}" in lines.columns]
    reps = list(lines["use_rep"].unique())
    wide = {rep: part.set_index("query") for rep, part in lines.groupby("use_rep", sort=False)}
    asked = wide[reps[0]].index
    codes = np.arange(len(asked)) if assume_independent else codes_of(adata.obs.loc[asked], groups)[0]
    compared = [(rep, wide[rep][names], wide[rep]) for rep in reps]
    compared += [(f"{rep} - {reps[-1]}", wide[rep][names] - wide[reps[-1]][names], None) for rep in reps[:-1]]
    out = []
    for rep, values, with_chance in compared:
        for name in names:
            chance = None if with_chance is None else with_chance[f"chance_{name}"].mean()
            mean = clustered_mean(values[name].to_numpy(), codes, difference=with_chance is None)
            out.append({"label": label, "use_rep": rep, "measure": name, "chance": chance, **mean})
    table = pd.DataFrame(out)[
        ["label", "use_rep", "measure", "estimate", "ci_low", "ci_high", "chance", "n_queries", "n_groups",
         "n_left_out", "status"]
    ]  # fmt: skip
    table.attrs["biosae"] = {
        "exclude": [exclude] if isinstance(exclude, str) else list(exclude), "metric": metric,
        "groups": "every query" if assume_independent else groups,
    }  # fmt: skip
    return table


def clustered_mean(values: np.ndarray, codes: np.ndarray, *, difference: bool = False) -> dict[str, Any]:
    """Mean of rows that depend on each other within groups: ``estimate, ci_low, ci_high`` (95 %), sizes, ``status``.

    Values lie in [0, 1], or are differences of such values, in [-1, 1]. NaN is left out and counted. Where all values
    are the same number c that is no boundary, others may be as frequent as ``1 - 0.025^(1/G)`` of groups.
    """
    from scipy import special

    from biosae.stats.robust import cr2

    known = np.isfinite(values)
    rows, codes = values[known], np.unique(codes[known], return_inverse=True)[1]
    size = np.bincount(codes)
    n_groups = len(size)
    out = {"estimate": np.nan, "ci_low": np.nan, "ci_high": np.nan, "n_queries": len(rows), "n_groups": n_groups}
    out |= {"n_left_out": int((~known).sum()), "status": "no_queries"}
    if not len(rows):
        return out
    out["estimate"] = mean = float(rows.mean())
    out["status"] = "too_few_groups" if n_groups < LEAST_GROUPS else "few_groups" if n_groups < FEW_GROUPS else "ok"
    if n_groups >= LEAST_GROUPS:
        variance, df = cr2(np.ones((len(rows), 1)), rows - mean, codes=codes)
        variance, df, n = variance[0, 0], max(df[0], 1.0), size.sum() ** 2 / (size**2).sum()
        lowest = -1.0 if difference else 0.0
        if np.ptp(rows) == 0:
            other = 1 - 0.025 ** (1 / n)
            low, high = mean - other * (mean - lowest), mean + other * (1 - mean)
        elif difference:
            half = np.sqrt(variance) * special.stdtrit(df, 0.975)
            low, high = max(mean - half, -1.0), min(mean + half, 1.0)
        else:
            low, high = wilson(mean, effective_n(mean, variance, df, n))
        out |= {"ci_low": float(low), "ci_high": float(high)}
    return out


def _mask(adata: Any, chosen: Any) -> np.ndarray:
    if chosen is None:
        return np.ones(adata.n_obs, bool)
    if isinstance(chosen, pd.Series) and pd.api.types.is_bool_dtype(chosen):
        if set(chosen.index) != set(adata.obs_names):
            raise InputError("a mask that is a Series must have the ids of all rows as its index")
        chosen = chosen.reindex(adata.obs_names).to_numpy(bool, na_value=False)
    chosen = np.asarray(chosen)
    if chosen.dtype == bool and chosen.shape == (adata.n_obs,):
        return chosen
    at = adata.obs_names.get_indexer(chosen)
    if (at < 0).any():
        raise InputError(f"{chosen[at < 0][0]!r} is not among the {adata.n_obs} rows")
    return np.isin(np.arange(adata.n_obs), at)
