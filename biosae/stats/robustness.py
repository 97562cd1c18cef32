"""Do neighbours and clusters of samples follow biology or the site? Robustness index and clustering score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.stats.confounding import overlaps
from biosae.stats.features import feature_sets
from biosae.stats.nested import in_memory
from biosae.stats.readout import evenly

GRID = (1, 3, 5, 7, 9, 11, 21, 31, 51)


def robustness_index(
    adata: Any, *, biology: str, technical: str, k: int | None = None, exclude: str | None = "slide",
    use: str = "latents", without: Sequence[str] = (), max_rows: int = 10_000, n_bootstrap: int = 200,
    random_state: int = 0,
) -> pd.Series:  # fmt: skip
    """``SO / (SO + OS)`` over the ``k`` nearest neighbours of every sample: 1 where biology decides, 0 where the site.

    SO counts neighbours of the Same biology and Other site, OS the reverse; neighbours are by cosine (Koemen et al.
    2025, PathoROB, arXiv 2507.17845).

    Parameters
    ----------
    adata
        Latents; rows without either label are left out.
    biology, technical
        Categorical columns of ``obs``.
    k
        Neighbours; None takes that of the grid 1, 3, 5, ... whose majority vote predicts ``biology`` best.
    exclude
        Column within which rows are never neighbours (slide, patient); None compares all rows.
    use
        ``"latents"`` or ``"embedding"``.
    without
        Latents left out, or ablated from the embedding.
    max_rows
        Rows used at most, drawn evenly over the values of ``exclude``.
    n_bootstrap
        Resamples of the values of ``exclude`` (of rows without it) for ``sd``.

    Returns
    -------
    Series
        ``robustness_index, sd, older_index, k, balanced_accuracy, n_so, n_os, n_samples, status, note``.
        ``older_index`` is ``(SS + SO) / (SS + OS)`` (de Jong et al., arXiv 2501.18055), above 1 where biology decides.
        Status ``unidentifiable`` (NaN): some biology occurs at no or some site lacks it; ``undefined`` (NaN): no
        neighbour is SO or OS. ``attrs["overlap"]``: counts of both labels.

    Raises
    ------
    InputError
        For unknown columns, latents or ``use``.
    """
    if use not in ("latents", "embedding") or (use == "embedding" and "embedding" not in adata.obsm):
        raise InputError(f"use={use!r}: there are 'latents' and, where kept, 'embedding'")
    name = ("raw" if use == "embedding" else "latents") + ("_filtered" if len(without) else "")
    design = _Design(adata, biology, technical, exclude, max_rows, random_state)
    out = pd.Series(_index(feature_sets(design.adata, [name], without=without)[name], design, k, n_bootstrap))
    out.attrs["overlap"] = design.overlap
    return out


def robustness(
    adata: Any, *, biology: str, technical: str, without: Sequence[str] = (), features: Sequence[str] | None = None,
    k: int | None = None, exclude: str | None = "slide", max_rows: int = 10_000, n_bootstrap: int = 200,
    random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Robustness index of embeddings, latents, and latents without some, side by side at one ``k``.

    Parameters
    ----------
    adata, biology, technical, exclude, max_rows, n_bootstrap
        As in :func:`robustness_index`.
    without
        Latents left out (those that :func:`confounders` flags technical): what filtering bought is the difference.
    features
        As in :func:`readout`, without ``pca``.
    k
        Neighbours; None takes the median over the sets of what :func:`robustness_index` would take for each.

    Returns
    -------
    DataFrame
        A row a set: ``features, biology, technical`` and what :func:`robustness_index` returns.

    Raises
    ------
    InputError
        For unknown columns, latents or sets.
    """
    design = _Design(adata, biology, technical, exclude, max_rows, random_state)
    sets = feature_sets(design.adata, features, without=without)
    if k is None and design.complete:
        best = sorted(_index(X, design, None, 2)["k"] for X in sets.values())
        k = best[(len(best) - 1) // 2]
    rows = [
        {"features": name, "biology": biology, "technical": technical, **_index(X, design, k, n_bootstrap)}
        for name, X in sets.items()
    ]
    out = pd.DataFrame(rows)
    out.attrs["overlap"] = design.overlap
    return out


class _Design:
    """Rows that have both labels, their codes, and whether every biology occurs at every site."""

    def __init__(self, adata, biology, technical, exclude, max_rows, random_state) -> None:
        adata = in_memory(adata)
        columns = [biology, technical] + ([exclude] if exclude else [])
        absent = [c for c in columns if c not in adata.obs]
        if absent:
            raise InputError(f"{absent[0]!r} is not a column of obs; exclude=None compares rows of one slide too")
        known = np.flatnonzero(adata.obs[columns].notna().all(axis=1).to_numpy())
        own = pd.factorize(adata.obs[exclude].iloc[known].astype(str))[0] if exclude else np.arange(len(known))
        rows = known[evenly(own, max_rows, random_state)]
        self.adata = adata if len(rows) == adata.n_obs else adata[rows]
        obs = self.adata.obs
        self.bio, self.tech = (pd.factorize(obs[c].astype(str), sort=True)[0] for c in columns[:2])
        self.slide = pd.factorize(obs[exclude].astype(str))[0] if exclude else np.arange(len(rows))
        self.overlap = overlaps(obs, [biology], [technical], unit=exclude)
        self.random_state = random_state
        several = len(rows) > 0 and min(self.bio.max(), self.tech.max()) > 0
        self.complete = bool(several and (pd.crosstab(self.bio, self.tech) > 0).all(axis=None))
        slides = pd.Series(self.slide).groupby(self.tech).nunique()
        self.note = "every site has one slide: site and slide are one" if exclude and (slides == 1).all() else ""


def _index(X: Any, design: _Design, k: int | None, n_bootstrap: int) -> dict[str, Any]:
    bio, tech, slide = design.bio, design.tech, design.slide
    out = {
        "robustness_index": np.nan, "sd": np.nan, "older_index": np.nan, "k": k, "balanced_accuracy": np.nan,
        "n_so": 0, "n_os": 0, "n_samples": len(bio), "status": "unidentifiable", "note": design.note,
    }  # fmt: skip
    if not design.complete:
        return out
    if k is not None and not 1 <= k < len(bio):
        raise InputError(f"k={k}; give 1 to {len(bio) - 1}, the other rows")
    near = neighbours(unit_rows(X), slide, max(GRID) if k is None else k)
    accuracy = {j: vote(near[:, :j], bio) for j in (GRID if k is None else [k]) if j <= near.shape[1]}
    best = max(accuracy, key=accuracy.get)
    so, os = pairs(near[:, :best], bio, tech)
    ss = same(near[:, :best], bio, tech)
    rng, codes = np.random.default_rng(design.random_state), np.unique(slide, return_inverse=True)[1]
    times = rng.multinomial(codes.max() + 1, np.full(codes.max() + 1, 1.0 / (codes.max() + 1)), size=n_bootstrap)
    a, b = times @ np.bincount(codes, so), times @ np.bincount(codes, os)
    enough = a + b > 0
    out |= {"k": best, "balanced_accuracy": accuracy[best], "n_so": int(so.sum()), "n_os": int(os.sum())}
    out["status"] = "ok" if so.sum() + os.sum() else "undefined"
    if out["status"] == "ok":
        out |= {"robustness_index": so.sum() / (so.sum() + os.sum()), "sd": (a / (a + b))[enough].std(ddof=1)}
    if ss + os.sum():
        out["older_index"] = (ss + so.sum()) / (ss + os.sum())
    return out


def clustering_score(
    adata: Any, *, biology: str, technical: str, without: Sequence[str] = (), features: Sequence[str] | None = None,
    groups: str | None = "patient", k_max: int = 30, n_runs: int = 50, max_rows: int = 300, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """``ARI(biology) - ARI(site)`` of k-means clusters, mean over pairs of labels at pairs of sites (PathoROB).

    For every two labels and two sites that hold both: equally many rows of the four cells, rows scaled to unit length
    (squared distance is then twice the cosine distance), k of the largest mean silhouette (cosine) among 2 to
    ``k_max``, and the mean over runs from other starts. 1: clusters are biology; -1: clusters are sites; 0: neither.

    Parameters
    ----------
    adata, biology, technical, without, features
        As in :func:`robustness`.
    groups
        Column over whose values rows are drawn evenly; None draws rows.
    k_max, n_runs
        Most clusters, and runs of k-means.
    max_rows
        Rows of each cell.

    Returns
    -------
    DataFrame
        A row a set: ``features, clustering_score, sd, ari_biology, ari_technical, k, n_combinations, n_samples,
        status``; ``sd`` over combinations, ``k`` their median. Status ``unidentifiable`` where no two sites share two
        labels.

    Raises
    ------
    InputError
        For unknown columns, latents or sets.
    """
    design = _Design(adata, biology, technical, groups, adata.n_obs, random_state)
    sets = feature_sets(design.adata, features, without=without)
    levels = [range(int(codes.max(initial=-1)) + 1) for codes in (design.bio, design.tech)]
    subsets = []
    for b, t in itertools.product(*(itertools.combinations(names, 2) for names in levels)):
        cells = [np.flatnonzero((design.bio == i) & (design.tech == j)) for i in b for j in t]
        size = min(max_rows, *(len(c) for c in cells))
        if size >= 3:
            rows = [c[evenly(design.slide[c], size, random_state)] for c in cells]
            subsets.append(np.concatenate(rows))
    out = []
    for name, X in sets.items():
        found = [
            _clusters(X[rows], design.bio[rows], design.tech[rows], k_max, n_runs, random_state) for rows in subsets
        ]
        table = np.array(found).reshape(len(subsets), 3)
        score = table[:, 0] - table[:, 1]
        mean = table.mean(axis=0) if len(table) else np.full(3, np.nan)
        out.append({
            "features": name, "clustering_score": mean[0] - mean[1],
            "sd": score.std(ddof=1) if len(score) > 1 else np.nan, "ari_biology": mean[0], "ari_technical": mean[1],
            "k": float(np.median(table[:, 2])) if len(table) else np.nan, "n_combinations": len(subsets),
            "n_samples": len(np.unique(np.concatenate(subsets))) if subsets else 0,
            "status": "ok" if subsets else "unidentifiable",
        })  # fmt: skip
    table = pd.DataFrame(out)
    table.attrs["overlap"] = design.overlap
    return table


def _clusters(X: Any, bio: np.ndarray, tech: np.ndarray, k_max: int, n_runs: int, random_state: int) -> list[float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, pairwise_distances, silhouette_score

    X = unit_rows(X)
    distance = np.clip(pairwise_distances(X, metric="cosine"), 0, None)
    np.fill_diagonal(distance, 0)
    fits = {
        k: KMeans(k, n_init=1, random_state=random_state).fit_predict(X) for k in range(2, min(k_max, len(bio) - 1) + 1)
    }
    silhouette = {
        k: silhouette_score(distance, label, metric="precomputed")
        for k, label in fits.items()
        if 1 < len(np.unique(label)) < len(bio)
    }
    k = max(silhouette, key=silhouette.get)
    labels = [KMeans(k, n_init=1, random_state=random_state + r).fit_predict(X) for r in range(n_runs)]
    return [*(float(np.mean([adjusted_rand_score(y, label) for label in labels])) for y in (bio, tech)), float(k)]


def unit_rows(X: Any) -> Any:
    """Rows of length 1, float64; rows of zeros stay."""
    X = sp.csr_matrix(X, dtype=np.float64) if sp.issparse(X) else np.asarray(X, dtype=np.float64)
    norm = np.sqrt(squares(X))
    return (
        sp.csr_matrix(sp.diags(1.0 / np.where(norm > 0, norm, 1.0)) @ X)
        if sp.issparse(X)
        else (X / np.where(norm > 0, norm, 1.0)[:, None])
    )


def squares(X: Any) -> np.ndarray:
    """Squared length of every row."""
    return np.asarray(X.multiply(X).sum(axis=1)).ravel() if sp.issparse(X) else (np.asarray(X, float) ** 2).sum(axis=1)


def neighbours(X: Any, slide: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest (Euclidean) of every row on other slides, nearest first, -1 where there are fewer."""
    square, n = squares(X), X.shape[0]
    out = np.full((n, min(k, n - 1)), -1)
    for start in range(0, n, 512):
        rows = np.arange(start, min(start + 512, n))
        product = X[rows] @ X.T
        distance = square[None, :] - 2.0 * (product.toarray() if sp.issparse(product) else product)
        distance[slide[rows][:, None] == slide[None, :]] = np.inf
        order = _smallest(distance, out.shape[1])
        out[rows] = np.where(np.isfinite(np.take_along_axis(distance, order, axis=1)), order, -1)
    return out


def _smallest(distance: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest values of every row, smallest first, ties by position."""
    if k >= distance.shape[1]:
        return np.argsort(distance, axis=1, kind="stable")[:, :k]
    chosen = np.sort(np.argpartition(distance, k - 1, axis=1)[:, :k], axis=1)
    value = np.take_along_axis(distance, chosen, axis=1)
    order = np.take_along_axis(chosen, np.argsort(value, axis=1, kind="stable"), axis=1)
    tied = np.flatnonzero((distance <= value.max(axis=1)[:, None]).sum(axis=1) > k)
    order[tied] = np.argsort(distance[tied], axis=1, kind="stable")[:, :k]
    return order


def pairs(near: np.ndarray, bio: np.ndarray, tech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SO and OS neighbours of every row."""
    there, same_bio, same_tech = near >= 0, bio[near] == bio[:, None], tech[near] == tech[:, None]
    return (there & same_bio & ~same_tech).sum(axis=1), (there & ~same_bio & same_tech).sum(axis=1)


def same(near: np.ndarray, bio: np.ndarray, tech: np.ndarray) -> int:
    """Number of SS neighbours."""
    return int(((near >= 0) & (bio[near] == bio[:, None]) & (tech[near] == tech[:, None])).sum())


def vote(near: np.ndarray, bio: np.ndarray) -> float:
    """Balanced accuracy of the majority of the neighbours."""
    counts = np.stack([((bio[near] == c) & (near >= 0)).sum(axis=1) for c in range(bio.max() + 1)], axis=1)
    right = counts.argmax(axis=1) == bio
    return float(np.mean([right[bio == c].mean() for c in range(bio.max() + 1)]))
