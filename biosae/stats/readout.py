"""How well a factor (scanner, site, diagnosis) can be read from embeddings and from latents, on groups left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError
from biosae.stats.features import feature_sets
from biosae.stats.nested import codes_of, in_memory

COMPONENTS = 50
"""Principal components of the set ``pca``."""


def readout(
    adata: Any, factors: str | Sequence[str], *, groups: str = "patient", without: Sequence[str] = (),
    features: Sequence[str] | None = None, n_splits: int = 5, n_repeats: int = 1, max_rows: int = 5000,
    n_permutations: int = 0, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """How well a factor (scanner, site) can be read from raw embeddings and from latents, on patients left out.

    Logistic regression (L2, ``C = 0.01``, features scaled on the training folds) in group-wise cross-validation; every
    sample is predicted by a model that has not seen its patient. Nothing below chance is turned around.

    Parameters
    ----------
    adata
        Latents, with ``obsm["embedding"]`` for the raw features.
    factors
        Categorical columns of ``obs``.
    groups
        Column whose groups are never split. Without it folds cut across patients, slides and near-duplicates, so that
        the result is too high; it then carries status ``no_groups`` and no interval.
    without
        Latents to leave out, as a third set of features (those that :func:`confounders` flags technical).
    features
        Among :data:`biosae.stats.features.FEATURES`: also ``pca`` (50 components fitted on the training folds),
        ``reconstruction`` (codes times decoder) and ``raw_filtered`` (embeddings with the latents of ``without``
        ablated, :func:`biosae.stats.ablate`). None: ``raw``, ``latents`` and, with ``without``, ``latents_filtered``.
    n_splits
        Folds; fewer where a class has fewer groups.
    n_repeats
        Cross-validations with other folds, of which the mean is given.
    max_rows
        Rows used at most, drawn evenly over groups.
    n_permutations
        Times the labels are rearranged and everything is repeated: over groups where every group has one label, within
        groups otherwise (which takes a patient's samples as exchangeable). Gives ``null_mean`` and ``p``.

    Returns
    -------
    DataFrame
        ``features, factor, balanced_accuracy, ci_low, ci_high, chance, auroc, n_classes, n_units, n_groups, n_splits,
        status`` and, with permutations, ``null_mean, p, n_permutations``. ``chance`` is one over the number of
        classes; ``auroc`` is one class against the rest, pairs within test folds, mean over classes (chance 0.5). The
        95 % interval counts groups, and that models trained on other groups err otherwise (:func:`interval`).

    Raises
    ------
    InputError
        If a column, latent or set of features is absent.
    """
    adata = in_memory(adata)
    factors = [factors] if isinstance(factors, str) else list(factors)
    sets = feature_sets(adata, features, without=without)
    rows = []
    for factor in factors:
        if factor not in adata.obs:
            raise InputError(f"{factor!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
        rows += _read(adata.obs, factor, sets, groups, n_splits, n_repeats, max_rows, n_permutations, random_state)
    return pd.DataFrame(rows)


def evenly(g: np.ndarray, n: int, random_state: int) -> np.ndarray:
    """Positions of at most ``n`` rows: the groups' first rows of a random order, then their second ones, and so on."""
    if len(g) <= n:
        return np.arange(len(g))
    shuffled = np.random.default_rng(random_state).permutation(len(g))
    turn = pd.Series(g[shuffled]).groupby(g[shuffled]).cumcount().to_numpy()
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:n]])


def _read(
    obs, factor, sets, groups, n_splits, n_repeats, max_rows, n_permutations, random_state
) -> list[dict[str, Any]]:
    grouped = groups in obs
    rows = np.flatnonzero(obs[factor].notna().to_numpy())
    y = pd.factorize(obs[factor].iloc[rows].astype(str), sort=True)[0]
    g = codes_of(obs.iloc[rows], groups)[0] if grouped else np.arange(len(rows))
    take = evenly(g, max_rows, random_state)
    rows, y, g = rows[take], y[take], np.unique(g[take], return_inverse=True)[1]
    y = np.unique(y, return_inverse=True)[1]
    n_classes = int(y.max()) + 1 if len(y) else 0
    splits = min(n_splits, min((len(np.unique(g[y == c])) for c in range(n_classes)), default=0))
    status = "one_class" if n_classes < 2 else "too_few_groups" if splits < 2 else "ok" if grouped else "no_groups"
    rng = np.random.default_rng(random_state)
    shuffled = [_rearranged(y, g, rng) for _ in range(n_permutations)] if status == "ok" else []
    out = []
    for name, X in sets.items():
        row = {
            "features": name, "factor": factor, "balanced_accuracy": np.nan, "ci_low": np.nan, "ci_high": np.nan,
            "chance": 1.0 / max(n_classes, 1), "auroc": np.nan, "n_classes": n_classes, "n_units": len(rows),
            "n_groups": len(np.unique(g)) if grouped else 0, "n_splits": splits, "status": status,
        }  # fmt: skip
        if n_permutations:
            row |= {"null_mean": np.nan, "p": np.nan, "n_permutations": len(shuffled)}
        if status in ("ok", "no_groups"):
            part, pca = X[rows], COMPONENTS if name == "pca" else 0
            seeds = [random_state + r for r in range(n_repeats)]
            found = [out_of_fold(part, y, g, splits, seed, pca) for seed in seeds]
            right = np.mean([right for right, _ in found], axis=0)
            row["balanced_accuracy"] = float(np.mean([right[y == c].mean() for c in range(n_classes)]))
            row["auroc"] = float(np.mean([auroc for _, auroc in found]))
            if grouped:
                row["ci_low"], row["ci_high"] = interval(right, y, g, splits)
            if shuffled:
                null = np.array([_accuracy(part, v, g, splits, seeds, pca) for v in shuffled])
                row["null_mean"] = null.mean()
                row["p"] = (1 + (null >= row["balanced_accuracy"] - 1e-12).sum()) / (1 + len(null))
        out.append(row)
    return out


def _accuracy(X: Any, y: np.ndarray, g: np.ndarray, splits: int, seeds: list[int], pca: int) -> float:
    right = np.mean([out_of_fold(X, y, g, splits, seed, pca)[0] for seed in seeds], axis=0)
    return float(np.mean([right[y == c].mean() for c in np.unique(y)]))


def _rearranged(y: np.ndarray, g: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels exchanged between groups where each has one, within groups otherwise."""
    first = np.unique(g, return_index=True)[1]
    if (y == y[first][g]).all():
        return rng.permutation(y[first])[g]
    order, mixed = np.lexsort((np.arange(len(g)), g)), np.lexsort((rng.random(len(g)), g))
    out = np.empty_like(y)
    out[order] = y[mixed]
    return out


def out_of_fold(
    X: Any, y: np.ndarray, g: np.ndarray, splits: int, random_state: int, pca: int = 0
) -> tuple[np.ndarray, float]:
    """Whether each row (n,) is predicted rightly by the fold that left its group out, and the AUROC within folds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedGroupKFold

    right, classes = np.zeros(len(y)), np.unique(y)
    above, pairs = np.zeros(len(classes)), np.zeros(len(classes))
    folds = StratifiedGroupKFold(splits, shuffle=True, random_state=random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)  # a class in fewer groups than folds, after rearrangement
        for train, test in folds.split(np.zeros(len(y)), y, g):
            known = np.unique(y[train])
            if len(known) < 2:
                right[test] = y[test] == known[0]
                continue
            model = probe(sp.issparse(X), pca=min(pca, len(train) - 1, X.shape[1])).fit(X[train], y[train])
            score = model.predict_proba(X[test])
            right[test] = model.classes_[score.argmax(axis=1)] == y[test]
            for k, c in enumerate(model.classes_):
                at = int(np.flatnonzero(classes == c)[0])
                positive = y[test] == c
                n1, n0 = int(positive.sum()), int((~positive).sum())
                if n1 and n0:
                    rank = stats.rankdata(score[:, k])[positive].sum()
                    above[at] += rank - n1 * (n1 + 1) / 2
                    pairs[at] += n1 * n0
    seen = pairs > 0
    return right, float(np.mean(above[seen] / pairs[seen])) if seen.any() else float("nan")


def probe(sparse: bool, *, pca: int = 0, C: float = 0.01) -> Any:
    """Scaling, components if asked for, and logistic regression with classes weighted alike."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [PCA(pca, random_state=0)] if pca else []
    model = LogisticRegression(C=C, max_iter=200, class_weight="balanced")
    return make_pipeline(*steps, StandardScaler(with_mean=not sparse), model)


def interval(
    right: np.ndarray, y: np.ndarray, g: np.ndarray, splits: int, *, level: float = 0.95
) -> tuple[float, float]:  # fmt: skip
    """Interval of a balanced accuracy from rows right or wrong (n,), their classes and groups (codes from 0).

    The exact binomial interval of ``n_e = p (1 - p) / V (z / t)^2`` observations (Korn and Graubard, Survey Methodology
    24, 193, 1998), t with one degree of freedom less than there are groups. V is the variance between groups times
    ``1 + K / (K - 1)`` of K folds, since the folds' models share their training groups (Nadeau and Bengio, Machine
    Learning 52, 239, 2003). Where every row is right, or wrong, there are as many observations as groups.
    """
    G, C = int(g.max()) + 1, int(y.max()) + 1
    if G < 2:
        return float("nan"), float("nan")
    hit, total = np.zeros((G, C)), np.zeros((G, C))
    np.add.at(hit, (g, y), right)
    np.add.at(total, (g, y), 1.0)
    share = hit.sum(axis=0) / total.sum(axis=0)
    p = float(share.mean())
    influence = ((hit - total * share) / total.sum(axis=0)).sum(axis=1) / C
    variance = (1 + splits / (splits - 1)) * G / (G - 1) * float((influence**2).sum())
    of_groups, of_rows = (C**2 / (1.0 / n.sum(axis=0)).sum() for n in (total > 0, total))
    n = of_groups
    if variance > 1e-12 and 0 < p < 1:
        z, t = stats.norm.ppf(0.5 + level / 2), stats.t.ppf(0.5 + level / 2, G - 1)
        n = min(p * (1 - p) / variance * (z / t) ** 2, of_rows)
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, n * p, n * (1 - p) + 1) if p > 0 else 0.0
    high = stats.beta.ppf(1 - tail, n * p + 1, n * (1 - p)) if p < 1 else 1.0
    return float(low), float(high)
