"""Is a latent biology or the scanner? Variance shares per latent, and how well a factor can be read out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError
from biosae.stats.adjust import basis, design, residual
from biosae.stats.correlation import Columns, as_columns, dot, moments, skewness
from biosae.stats.inference import times_skewness
from biosae.stats.multiplicity import bh
from biosae.stats.nested import codes_of, hotelling_pvalue, in_memory, indicator
from biosae.stats.permutation import Draws, null_counts, permutations, sign_flips

DOMINANCE = 2.0
"""A latent is called after a factor whose unique variance share is at least this many times that of the other."""
SEPARABLE = 0.05
"""Least share of a factor's variance that the other side must leave, or the two cannot be told apart."""


def confounders(
    adata: Any, *, biology: str | Sequence[str], technical: str | Sequence[str], groups: str = "patient",
    assume_independent: bool = False, n_permutations: int = 999, alpha: float = 0.05, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Share of each latent's variance that goes with biology and with each technical factor.

    Shares are of samples: ``eta2_*`` is ``1 - SS_residual / SS_total`` of one side alone, ``unique_*`` what it explains
    beyond the other. p count patients: signs of patients' scores are flipped (samples are permuted where they are
    independent; Draper and Stoneman 1966), with the wider of two spreads as in :func:`associate`; where no random draw
    reaches the observed share, the p of Hotelling's T2 or of the F test, whichever is larger, takes over.

    Parameters
    ----------
    adata
        Latents.
    biology, technical
        Columns of ``obs``; numbers enter linearly, labels as dummies. All of ``biology`` is one side; each technical
        factor is judged on its own.
    groups
        Column of independent groups; without it (and without ``assume_independent``) shares are given and no p.
    n_permutations
        Draws, shared by all latents.
    alpha
        Level of ``q_*`` (Benjamini-Hochberg over latents) for the flag.

    Returns
    -------
    DataFrame
        One row a (factor, latent): ``latent, factor, biology, eta2_biology, eta2_technical, unique_biology,
        unique_technical, log2_ratio, p_biology, q_biology, p_technical, q_technical, flag, n_units, n_groups,
        n_samples, status``. ``flag``: ``biology``, ``technical``, ``mixed``, ``neither``, ``not_separable`` (design:
        one side determines the other) or ``undetermined`` (no p).

    Raises
    ------
    InputError
        If a column is absent or no row has all of them.
    """
    adata = in_memory(adata)
    biology = [biology] if isinstance(biology, str) else list(biology)
    technical = [technical] if isinstance(technical, str) else list(technical)
    for name in biology + technical:
        if name not in adata.obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
    return pd.concat(
        [
            _one_factor(adata, biology, name, groups, assume_independent, n_permutations, alpha, random_state)
            for name in technical
        ],
        ignore_index=True,
    )


def _one_factor(
    adata, biology, factor, groups, assume_independent, n_permutations, alpha, random_state
) -> pd.DataFrame:
    obs = adata.obs
    known = obs[[*biology, factor]].notna().all(axis=1).to_numpy()
    grouped = groups in obs and not assume_independent
    if not known.any():
        raise InputError(f"no row has a value of {factor!r} and of {', '.join(biology)}")
    obs, X = obs[known], adata.X[known]
    n, V = len(obs), as_columns(sp.csr_matrix(X))
    codes = codes_of(obs, groups)[0] if grouped else np.arange(n)
    G = int(codes.max()) + 1
    B, T = design(obs, biology), design(obs, [factor])
    Qb, Qt = basis(B, n), basis(T, n)
    ss = moments(V)[1]
    ss = np.where(ss > 0, ss, np.nan)
    own_b, own_t = _beyond(B, Qt), _beyond(T, Qb)
    out = pd.DataFrame({
        "latent": adata.var_names.astype(str), "factor": factor, "biology": ", ".join(biology),
        "eta2_biology": (dot(V, Qb[:, 1:]) ** 2).sum(axis=1) / ss,
        "eta2_technical": (dot(V, Qt[:, 1:]) ** 2).sum(axis=1) / ss,
        "unique_biology": (dot(V, own_b) ** 2).sum(axis=1) / ss,
        "unique_technical": (dot(V, own_t) ** 2).sum(axis=1) / ss,
    })  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        out["log2_ratio"] = np.log2(out["unique_biology"] / out["unique_technical"])
    one_class = Qb.shape[1] == 1 or Qt.shape[1] == 1
    separable = _left(B, Qt) >= SEPARABLE and _left(T, Qb) >= SEPARABLE
    declared = grouped or assume_independent
    status = "one_class" if one_class else "ok" if declared else "no_groups"
    if declared and G < 3 and not one_class:
        status = "too_few_groups"
    elif status == "ok" and G < 20:
        status = "few_groups"
    active = np.diff(V.indptr)
    fired = np.asarray(((indicator(codes, G) @ (V != 0).astype(np.float64)) > 0).sum(axis=0)).ravel()
    testable = np.isfinite(ss) & (active >= 10) & (fired >= min(5, G)) & separable
    testable &= status in ("ok", "few_groups")
    for side, D, other in (("biology", own_b, Qt), ("technical", own_t, Qb)):
        p = np.full(len(out), np.nan)
        if testable.any() and D.shape[1]:
            p = _pvalue(V, D, other, ss, codes, G, testable, n_permutations, random_state)
        out[f"p_{side}"], out[f"q_{side}"] = p, bh(p)
    out["flag"] = _flags(out, alpha) if separable or one_class else "not_separable"
    out["n_units"], out["n_groups"], out["n_samples"] = n, G if declared else 0, int(known.sum())
    out["status"] = status if separable or one_class else "unidentifiable"
    out.loc[active == 0, "status"] = "dead"
    out.loc[(active > 0) & ~np.isfinite(ss), "status"] = "constant"
    out.loc[(active > 0) & np.isfinite(ss) & ~testable & out["status"].isin(["ok", "few_groups"]), "status"] = (
        "too_sparse"
    )
    return out


def _left(C: np.ndarray, Q: np.ndarray) -> float:
    """Largest share of variance that any column of C keeps beyond Q."""
    C = C - C.mean(axis=0)
    total = (C**2).sum(axis=0)
    left = (residual(C, Q) ** 2).sum(axis=0)
    return float(np.max(left[total > 0] / total[total > 0], initial=0.0))


def _beyond(C: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """Orthonormal columns of what C spans beyond Q, (n, k)."""
    C = C - C.mean(axis=0)
    norm = np.sqrt((C**2).sum(axis=0))
    R = residual(C[:, norm > 0] / norm[norm > 0], Q)
    if R.shape[1] == 0:
        return R
    u, s, _ = np.linalg.svd(R, full_matrices=False)
    return u[:, s > 1e-6]


def _pvalue(
    V: Columns, D: np.ndarray, Q: np.ndarray, ss: np.ndarray, codes: np.ndarray, G: int, testable: np.ndarray,
    n_draws: int, random_state: int,
) -> np.ndarray:  # fmt: skip
    """p of ``SS`` on the columns of D beyond Q: rearrangement, and beyond its resolution the larger parametric p."""
    n, q = D.shape
    coefficient = dot(V, Q).T
    left = ss - (coefficient[1:] ** 2).sum(axis=0)
    left = np.where(testable & (left > 1e-10 * ss), left, np.nan)
    share = (dot(V, D) ** 2).sum(axis=1) / left
    model = _f_pvalue(share, q, n - Q.shape[1] - q)
    if n == G:
        draws = permutations(np.arange(n, dtype=np.float64), blocks=None, n_draws=n_draws, random_state=random_state)

        def rearranged(Y: np.ndarray) -> np.ndarray:
            index = np.round(Y).astype(np.int64)
            moved = [residual(D[index, k], Q) for k in range(q)]
            scale = sum((v**2).sum(axis=0) for v in moved) / q
            return sum(dot(V, v) ** 2 for v in moved) / left[:, None] / scale

        far = np.flatnonzero(model < 1.5 / (n_draws + 1))
        model[far] = _skewed(model[far], V[:, far], D, left[far])
        return _tail(null_counts(share, draws, rearranged)[0], model, draws)
    A = indicator(codes, G)
    S = []
    for k in range(q):
        weighted = A @ sp.diags(D[:, k])
        own = weighted @ V
        S.append((own.toarray() if sp.issparse(own) else own) - (weighted @ Q) @ coefficient)
    expected = left * q / (n - Q.shape[1])
    if all(np.ptp(D[codes == g], axis=0).max() < 1e-9 for g in range(G)):  # one value a group: groups are rearranged
        totals = A @ V
        totals = (totals.toarray() if sp.issparse(totals) else totals) - (A @ Q) @ coefficient
        totals = totals - totals.mean(axis=0)
        level = (A @ D) / np.bincount(codes)[:, None]
        level = level - level.mean(axis=0)
        expected = (level**2).sum() * (totals**2).sum(axis=0) / (G - 1)
        u, size, _ = np.linalg.svd(level, full_matrices=False)
        u = u[:, size > 1e-9]
        between = ((u.T @ totals) ** 2).sum(axis=0) / (totals**2).sum(axis=0)
        model = _f_pvalue(between, u.shape[1], G - Q.shape[1] - u.shape[1])
    # the wider of two spreads, and scores made smaller by centring: see biosae.stats.inference
    shrink = np.fmin(1.0, sum((s**2).sum(axis=0) for s in S) / expected) * (1 - 1 / G) ** 2
    draws = sign_flips(G, n_draws=n_draws, random_state=random_state)
    flipped = null_counts(share * shrink, draws, lambda Y: sum((s.T @ Y) ** 2 for s in S) / left[:, None])[0]
    return _tail(flipped, np.fmax(model, hotelling_pvalue(np.stack(S, axis=-1))), draws)


def _skewed(p: np.ndarray, V: Columns, D: np.ndarray, left: np.ndarray) -> np.ndarray:
    """F-test p of independent samples times what skewness does to the tail along each column's direction in D."""
    n, along = len(D), dot(V, D)
    length = np.sqrt((along**2).sum(axis=1))
    third = ((D @ (along / length[:, None]).T) ** 3).sum(axis=0)
    skew = n / max(n - 2, 1) * np.sqrt(n - 1) * skewness(V) * third
    z = length / np.sqrt(left) * np.sqrt(n - 1)
    return times_skewness(p, z, skew)


def _f_pvalue(share: np.ndarray, q: int, df: int) -> np.ndarray:
    """p of the F test of a share of variance on q columns."""
    if df < 1:
        return np.ones_like(share)
    with np.errstate(divide="ignore", invalid="ignore"):
        return stats.f.sf(share / (1 - share) * df / q, q, df)


def _tail(p: np.ndarray, parametric: np.ndarray, draws: Draws) -> np.ndarray:
    """Random draws cannot tell p below ``1 / (B + 1)`` apart; there the parametric p takes over if it is smaller."""
    unresolved = (p <= 1.5 / (draws.n_draws + 1)) & (not draws.exact)
    return np.where(unresolved, np.fmin(p, parametric), np.fmax(p, np.where(np.isnan(p), np.nan, parametric)))


def _flags(out: pd.DataFrame, alpha: float) -> np.ndarray:
    bio, tech = out["q_biology"] <= alpha, out["q_technical"] <= alpha
    ratio = out["log2_ratio"]
    much = np.log2(DOMINANCE)
    flag = np.where(bio & tech, "mixed", np.where(bio, "biology", np.where(tech, "technical", "neither"))).astype(
        object
    )
    flag[(bio & tech & (ratio >= much)).to_numpy()] = "biology"
    flag[(bio & tech & (ratio <= -much)).to_numpy()] = "technical"
    flag[(out["q_biology"].isna() & out["q_technical"].isna()).to_numpy()] = "undetermined"
    return flag


def readout(
    adata: Any, factors: str | Sequence[str], *, groups: str = "patient", without: Sequence[str] = (),
    n_splits: int = 5, max_rows: int = 5000, n_bootstrap: int = 1000, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """How well a factor (scanner, site) can be read from raw embeddings and from latents, on patients left out.

    Logistic regression (L2, features scaled on the training folds) in group-wise cross-validation; every sample is
    predicted by a model that has not seen its patient. A fold below chance is kept as it is.

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
    n_splits
        Folds; fewer where a class has fewer groups.
    max_rows
        Rows used at most, drawn evenly over groups.
    n_bootstrap
        Resamples of groups for the 95 % percentile interval of the out-of-fold accuracy.

    Returns
    -------
    DataFrame
        ``features`` (``raw``, ``latents``, ``latents_filtered``), ``factor, balanced_accuracy, ci_low, ci_high,
        chance, n_classes, n_units, n_groups, n_splits, status``. ``chance`` is one over the number of classes.

    Raises
    ------
    InputError
        If a column or latent is absent.
    """
    adata = in_memory(adata)
    factors = [factors] if isinstance(factors, str) else list(factors)
    sets: dict[str, Any] = {}
    if "embedding" in adata.obsm:
        sets["raw"] = np.asarray(adata.obsm["embedding"], dtype=np.float32)
    sets["latents"] = sp.csr_matrix(adata.X)
    if len(without):
        unknown = [name for name in without if name not in adata.var_names]
        if unknown:
            raise InputError(f"no latent {unknown[0]!r} to leave out")
        sets["latents_filtered"] = sets["latents"][:, ~adata.var_names.isin(list(without))]
    rows = []
    for factor in factors:
        if factor not in adata.obs:
            raise InputError(f"{factor!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
        rows += _read_factor(adata.obs, factor, sets, groups, n_splits, max_rows, n_bootstrap, random_state)
    return pd.DataFrame(rows)


def _read_factor(obs, factor, sets, groups, n_splits, max_rows, n_bootstrap, random_state) -> list[dict[str, Any]]:
    grouped = groups in obs
    known = obs[factor].notna().to_numpy()
    rows = np.flatnonzero(known)
    y = pd.factorize(obs[factor].iloc[rows].astype(str), sort=True)[0]
    g = codes_of(obs.iloc[rows], groups)[0] if grouped else np.arange(len(rows))
    if len(rows) > max_rows:
        rng = np.random.default_rng(random_state)
        shuffled = rng.permutation(len(rows))
        turn = (
            pd.Series(g[shuffled]).groupby(g[shuffled]).cumcount().to_numpy()
        )  # the groups' first rows, then seconds, ...
        take = np.sort(shuffled[np.argsort(turn, kind="stable")[:max_rows]])
        rows, y, g = rows[take], y[take], g[take]
    classes = np.unique(y)
    per_class = min((len(np.unique(g[y == c])) for c in classes), default=0)
    splits = min(n_splits, per_class)
    status = "one_class" if len(classes) < 2 else "too_few_groups" if splits < 2 else "ok" if grouped else "no_groups"
    out = []
    for name, X in sets.items():
        row = {
            "features": name, "factor": factor, "balanced_accuracy": np.nan, "ci_low": np.nan, "ci_high": np.nan,
            "chance": 1.0 / max(len(classes), 1), "n_classes": len(classes), "n_units": len(rows),
            "n_groups": len(np.unique(g)) if grouped else 0, "n_splits": splits, "status": status,
        }  # fmt: skip
        if status in ("ok", "no_groups"):
            right = _out_of_fold(X[rows], y, g, splits, random_state) == y
            row["balanced_accuracy"] = float(np.mean([right[y == c].mean() for c in classes]))
            if grouped:
                row["ci_low"], row["ci_high"] = _bootstrap(right, y, g, n_bootstrap, random_state)
        out.append(row)
    return out


def _out_of_fold(X: Any, y: np.ndarray, g: np.ndarray, splits: int, random_state: int) -> np.ndarray:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted = np.full(len(y), -1)
    folds = StratifiedGroupKFold(splits, shuffle=True, random_state=random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for train, test in folds.split(X, y, g):
            if len(np.unique(y[train])) < 2:
                predicted[test] = y[train][0]
                continue
            model = make_pipeline(
                StandardScaler(with_mean=not sp.issparse(X)),
                LogisticRegression(C=0.01, max_iter=200, class_weight="balanced"),
            )
            predicted[test] = model.fit(X[train], y[train]).predict(X[test])
    return predicted


def _bootstrap(
    right: np.ndarray, y: np.ndarray, g: np.ndarray, n_bootstrap: int, random_state: int
) -> tuple[float, float]:
    """Percentile interval of the balanced accuracy, groups resampled with all their rows."""
    rng = np.random.default_rng(random_state)
    codes = np.unique(g, return_inverse=True)[1]
    G, C = int(codes.max()) + 1, int(y.max()) + 1
    hit, total = np.zeros((G, C)), np.zeros((G, C))
    np.add.at(hit, (codes, y), right)
    np.add.at(total, (codes, y), 1.0)
    times = rng.multinomial(G, np.full(G, 1.0 / G), size=n_bootstrap).astype(np.float64)
    with np.errstate(invalid="ignore"):
        share = (times @ hit) / (times @ total)
    value = np.nanmean(share, axis=1)
    low, high = np.quantile(value, [0.025, 0.975])
    return float(low), float(high)
