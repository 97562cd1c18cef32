"""Clusters of samples by their codes: exact neighbours, Leiden, UMAP, and how far the result depends on chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest, require

ROLES = ("label", "patient", "slide", "site", "location", "scanner", "collector")
"""Columns that clusters are compared with if none are named: the first is wanted, the others are usual artefacts."""
SILENT = "silent"
METRICS = ("cosine", "euclidean", "jaccard")


def cluster(
    adata: Any,
    *,
    latents: str | Sequence[str] | None = None,
    use_rep: str | None = None,
    n_neighbors: int = 15,
    metric: str = "cosine",
    resolution: float = 1.0,
    resolutions: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    n_seeds: int = 5,
    n_subsamples: int = 5,
    groups: str = "patient",
    labels: Sequence[str] | None = None,
    umap: bool = True,
    key: str = "cluster",
    random_state: int = 0,
) -> pd.DataFrame:
    """Leiden clusters of the samples on a graph of exact neighbours, with their stability.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode` (n, m). Written to: see Notes.
    latents
        Cluster along these latents only: names, or a text that is looked for in ``var["name"]`` (upper and lower case
        alike). None takes all.
    use_rep
        Key of ``obsm`` to cluster instead of the codes, such as ``"embedding"``.
    n_neighbors
        Neighbours of a sample, itself included, as in scanpy.
    metric
        ``"cosine"``, ``"euclidean"``, or ``"jaccard"`` of which latents fire. The search is exact
        (:class:`biosae.search.Index`).
    resolution
        Of the clusters that are kept; larger gives more of them.
    resolutions
        Resolutions of the stability table (that of the kept clusters is always among them).
    n_seeds
        Runs of Leiden at each resolution.
    n_subsamples
        Times that the whole recipe is repeated on a random 80 % of the groups (of the samples, where ``groups`` is not
        in ``obs``). Seeds only show what the optimiser leaves to chance; this shows what the choice of patients does.
    groups
        Column of independent groups.
    labels
        Columns of ``obs`` to compare with. None: those of label, patient, slide, site, location,
        scanner and collector that are there.
    umap
        Also lay out the graph in two dimensions, for display.
    key
        Column of ``obs`` to write.
    random_state
        First seed.

    Returns
    -------
    DataFrame
        One row a resolution: ``resolution, n_clusters`` (of the kept run), ``n_clusters_min, n_clusters_max`` (over
        seeds), ``ari_seeds, ari_seeds_min`` (adjusted Rand index, mean and smallest of all pairs of seeds),
        ``ari_subsamples`` (mean, with the whole, on the samples of both; NaN, as those of seeds, where all is one
        cluster), ``kept``, and ``ari_<label>`` for each label.

    Raises
    ------
    InputError
        For unknown latents, columns or representations, or fewer samples than neighbours.
    MissingExtraError
        Without igraph.

    Notes
    -----
    The kept run of a resolution is the one that agrees best with the others. Samples in which none of the latents fires
    have no direction and no neighbours: they are the cluster ``"silent"``. Written are ``obs[key]``,
    ``obsp["distances"]``, ``obsp["connectivities"]``, ``uns["neighbors"]``, ``uns[key]["params"]`` and
    ``obsm["X_umap"]`` (n, 2; NaN where silent), so that scanpy's functions go on from here. Leiden: Traag, Waltman and
    van Eck (2019), with modularity; adjusted Rand index: Hubert and Arabie (1985).
    """
    import scanpy as sc

    require("igraph", extra="cluster")
    if n_neighbors < 2 or n_seeds < 1 or n_subsamples < 0 or not resolution > 0:
        raise InputError("n_neighbors must be 2 or more, n_seeds 1 or more, resolution positive")
    free_column(adata, key)
    if metric not in METRICS:
        raise InputError(f"metric={metric!r}; {nearest(metric, METRICS)}")
    names = chosen(adata, latents)
    V = representation(adata, names, use_rep)
    compared = label_columns(adata.obs, labels)
    alive = alive_rows(V)
    if alive.sum() <= n_neighbors:
        raise InputError(
            f"{int(alive.sum())} samples have a code along these latents, which is not more than "
            f"n_neighbors={n_neighbors}; take fewer neighbours or more latents"
        )
    grid = sorted({float(resolution), *map(float, resolutions)})
    options = {"n_neighbors": n_neighbors, "metric": metric, "random_state": random_state}
    graph = exact_graph(V[alive], **options)
    runs = {r: [_leiden(graph, r, random_state + s) for s in range(n_seeds)] for r in grid}
    best, rows = {}, []
    again = _subsamples(adata.obs, groups, alive, n_subsamples, random_state)
    agreement: dict[float, list[float]] = {r: [] for r in grid}
    kept = {}
    for r in grid:
        pairs = np.eye(n_seeds)
        for i, j in itertools.combinations(range(n_seeds), 2):
            pairs[i, j] = pairs[j, i] = ari(runs[r][i], runs[r][j])
        best[r] = pairs
        kept[r] = runs[r][int(pairs.mean(axis=1).argmax())]
    for rows_kept in again:
        part = exact_graph(V[np.flatnonzero(alive)[rows_kept]], **options) if len(rows_kept) > n_neighbors else None
        for r in grid if part is not None else ():
            agreement[r].append(ari(_leiden(part, r, random_state), kept[r][rows_kept]))
    for r in grid:
        off = best[r][np.triu_indices(n_seeds, 1)]
        sizes = [len(np.unique(run)) for run in runs[r]]
        row = {
            "resolution": r, "n_clusters": len(np.unique(kept[r])), "n_clusters_min": min(sizes),
            "n_clusters_max": max(sizes), "ari_seeds": off.mean() if len(off) else np.nan,
            "ari_seeds_min": off.min() if len(off) else np.nan,
            "ari_subsamples": float(np.mean(agreement[r])) if agreement[r] else np.nan, "kept": r == float(resolution),
        }  # fmt: skip
        if row["n_clusters"] == 1:
            row |= dict.fromkeys(("ari_seeds", "ari_seeds_min", "ari_subsamples"), np.nan)
        for name, values in compared.items():
            row[f"ari_{name}"] = ari(kept[r], values[alive])
        rows.append(row)
    _write(adata, graph, alive, kept[float(resolution)], key, use_rep or "X")
    adata.uns[key] = {"params": {
        "resolution": float(resolution), "metric": metric, "n_neighbors": n_neighbors, "random_state": random_state,
        "use_rep": use_rep or "X",
        "latents": "all" if latents is None or use_rep else list(names), "n_silent": int((~alive).sum()),
    }}  # fmt: skip
    if umap:
        sc.tl.umap(graph, random_state=random_state)
        adata.obsm["X_umap"] = np.full((adata.n_obs, 2), np.nan)
        adata.obsm["X_umap"][alive] = graph.obsm["X_umap"]
    return pd.DataFrame(rows)


def ari(a: Any, b: Any) -> float:
    """Adjusted Rand index of two labellings (n,), rows left out where either is missing; NaN where nothing is left.

    1: the same partition; 0 on average for independent ones. Hubert and Arabie (1985).
    """
    from sklearn.metrics import adjusted_rand_score

    a, b = (pd.factorize(np.asarray(x) if not isinstance(x, pd.Series) else x)[0] for x in (a, b))
    known = (a >= 0) & (b >= 0)
    return float(adjusted_rand_score(a[known], b[known])) if known.any() else np.nan


def chosen(adata: Any, latents: str | Sequence[str] | None) -> list[str]:
    """Names of the chosen latents: all, those listed, or those whose ``var["name"]`` contains a text.

    Raises
    ------
    InputError
        If a name is unknown or nothing fits the text.
    """
    if latents is None:
        return list(adata.var_names)
    if isinstance(latents, str):
        if latents in adata.var_names:
            return [latents]
        if not latents.strip():
            raise InputError("latents is an empty text, which fits every name; give a part of a name, or a list")
        if "name" not in adata.var:
            raise InputError(
                f"there is no latent {latents!r}, and var has no column 'name' to look in; give the latents as a list"
            )
        named = adata.var["name"].astype("string").str.contains(latents, case=False, regex=False)
        found = list(adata.var_names[named.fillna(False).to_numpy(bool)])
        if not found:
            raise InputError(f"no latent is named {latents!r} in var['name']")
        return found
    unknown = [name for name in latents if name not in adata.var_names]
    if unknown or not len(latents):
        raise InputError(
            f"there is no latent {unknown[0]!r}; {nearest(str(unknown[0]), adata.var_names)}" if unknown
            else "latents is empty; name at least one"
        )  # fmt: skip
    return list(dict.fromkeys(latents))


def representation(adata: Any, names: list[str], use_rep: str | None) -> Any:
    from biosae.stats.nested import in_memory

    if use_rep is None:
        X = sp.csr_matrix(in_memory(adata).X)
        return X if len(names) == adata.n_vars else X[:, adata.var_names.get_indexer(names)]
    if use_rep not in adata.obsm:
        raise InputError(f"obsm has no {use_rep!r}; {nearest(use_rep, list(adata.obsm))}")
    return np.asarray(adata.obsm[use_rep])


def alive_rows(V: Any) -> np.ndarray:
    on = V != 0  # a zero may be stored
    return np.diff(on.indptr) > 0 if sp.issparse(on) else on.any(axis=1)


def free_column(adata: Any, key: str) -> None:
    """Refuse to overwrite a column of ``obs`` that is no clustering."""
    if key in adata.obs and not made_by_cluster(adata, key):
        raise InputError(f"obs has a column {key!r} of another origin, which would be lost; give another key=")


def made_by_cluster(adata: Any, column: str) -> bool:
    """Whether a column of ``obs`` holds clusters of latents: of :func:`cluster`, or of scanpy's Leiden."""
    about = adata.uns.get(column)
    params = about.get("params", {}) if isinstance(about, dict) else {}
    return "latents" in params or "resolution" in params


def label_columns(obs: pd.DataFrame, labels: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Values of the columns to compare with."""
    if labels is None:
        labels = [c for c in ROLES if c in obs and 2 <= obs[c].nunique() < len(obs)]
    for name in labels:
        if name not in obs:
            raise InputError(f"obs has no column {name!r}; {nearest(name, list(obs.columns))}")
    return {name: obs[name].astype(object).to_numpy() for name in labels}


class _Exact:
    """The exact search of :mod:`biosae.search.index` as the transformer that scanpy asks for distances."""

    def __init__(self, n_neighbors: int, metric: str) -> None:
        self.n_neighbors, self.metric = n_neighbors, metric

    def fit_transform(self, V: Any) -> sp.csr_matrix:
        from biosae.search.index import Index

        found = Index(V, metric=self.metric).search(n=self.n_neighbors - 1)
        distances = np.clip((0.0 if self.metric == "euclidean" else 1.0) - found.scores, 0.0, None)
        n, k = found.rows.shape
        return sp.csr_matrix((distances.ravel(), found.rows.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))

    def get_params(self) -> dict[str, Any]:
        return {"n_neighbors": self.n_neighbors, "metric": self.metric}


def exact_graph(V: Any, *, n_neighbors: int, metric: str, random_state: int) -> Any:
    """AnnData with scanpy's neighbour graph of the rows of V, from an exact search."""
    import anndata
    import scanpy as sc

    graph = anndata.AnnData(obs=pd.DataFrame(index=np.arange(V.shape[0]).astype(str)), obsm={"rep": V})
    sc.pp.neighbors(
        graph, n_neighbors=n_neighbors, use_rep="rep", metric=metric, transformer=_Exact(n_neighbors, metric),
        random_state=random_state,
    )  # fmt: skip
    return graph


def _leiden(graph: Any, resolution: float, seed: int) -> np.ndarray:
    import scanpy as sc

    sc.tl.leiden(graph, resolution, random_state=seed, flavor="igraph", directed=False, n_iterations=-1)
    return graph.obs["leiden"].astype(int).to_numpy()


def _subsamples(
    obs: pd.DataFrame, groups: str, alive: np.ndarray, n: int, random_state: int
) -> list[np.ndarray]:  # fmt: skip
    """Places among the rows that are alive of 80 % of the groups, or of the rows where there are fewer than 5."""
    rng = np.random.default_rng(random_state)
    n_rows = int(alive.sum())
    codes = pd.factorize(obs.loc[alive, groups])[0] if groups in obs else np.arange(n_rows)
    if len(np.unique(codes)) < 5:
        codes = np.arange(n_rows)
    levels = np.unique(codes)
    size = max(1, round(0.8 * len(levels)))
    return [np.flatnonzero(np.isin(codes, rng.choice(levels, size, replace=False))) for _ in range(n)]


def _write(adata: Any, graph: Any, alive: np.ndarray, found: np.ndarray, key: str, use_rep: str) -> None:
    at, n = np.flatnonzero(alive), adata.n_obs
    for name in ("distances", "connectivities"):
        part = graph.obsp[name].tocoo()
        adata.obsp[name] = sp.csr_matrix((part.data, (at[part.row], at[part.col])), shape=(n, n))
    about = graph.uns["neighbors"]
    adata.uns["neighbors"] = {**about, "params": {**about["params"], "use_rep": use_rep}}  # scanpy looks it up
    adata.obs[key] = categories(found, alive)


def categories(found: np.ndarray, alive: np.ndarray) -> pd.Categorical:
    """Clusters named by size, ``0`` the largest, with ``silent`` last."""
    levels, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
    rank = np.empty(len(levels), int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(levels))
    values = np.full(len(alive), SILENT, dtype=object)
    values[alive] = rank[inverse].astype(str)
    names = [str(i) for i in range(len(levels))] + ([SILENT] if not alive.all() else [])
    return pd.Categorical(values, categories=names)
