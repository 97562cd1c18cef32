"""After the screen, on a few chosen latents: which classes differ, which of two latents separates better, how much of a
latent's variance lies between classes.
"""  # fmt: skip

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import effects
from biosae.stats.association import associate
from biosae.stats.correlation import Columns, as_columns, moments, rank_columns
from biosae.stats.frame import Frame, Target
from biosae.stats.inference import Inference, block, linear
from biosae.stats.methods import size_columns
from biosae.stats.multiplicity import holm
from biosae.stats.nested import in_memory
from biosae.stats.sources import Source
from biosae.stats.status import TESTED

MEASURES = ("eta_squared", "omega_squared", "epsilon_squared")


def _chosen(
    adata: Any, target: str, latents: Sequence[str], unit: str, groups: str, aggregate: str, assume_independent: bool
) -> tuple[Any, Target, Columns]:
    """The table with the chosen latents alone, the target on its units, and the latents there."""
    latents = [latents] if isinstance(latents, str) else list(latents)
    known = set(map(str, adata.var_names))
    unknown = [name for name in latents if name not in known]
    if unknown or not latents:
        raise InputError(
            f"no latent {unknown[0]!r}; latents are {adata.var_names[0]} to {adata.var_names[-1]}"
            if unknown else "latents is empty; name at least one"
        )  # fmt: skip
    adata = in_memory(adata, latents)
    frame = Frame(adata, unit, groups, assume_independent=assume_independent, aggregate=aggregate)
    found = frame.target(target)
    X = adata.X if sp.issparse(adata.X) else sp.csr_matrix(adata.X)
    return adata, found, frame.columns(Source("latent", X, latents), found)[0]


def dunn(
    adata: Any, target: str, *, latents: Sequence[str], unit: str, groups: str = "patient", aggregate: str = "mean",
    assume_independent: bool = False, min_active: int = 10, min_active_groups: int = 5, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Which classes differ in a latent: Dunn's test of every pair of classes, Holm over the pairs of a latent.

    The ranks of all classes together give ``z = (R_b - R_a) / sqrt(s2 (1/n_a + 1/n_b))``, ``R`` mean ranks and ``s2``
    the variance of the ranks, ties corrected (Dunn, Technometrics 6, 241, 1964). As a linear score of the contrast it
    is tested as everything else is: normal with skewness corrected for independent units, permutation below 20, the
    wider of two errors for units of the same patient, and not below the p adjusted for the samples that a unit holds.

    Parameters
    ----------
    adata
        Latents.
    target
        Label of three or more classes.
    latents
        Names, chosen by :func:`biosae.stats.associate` with ``method="kruskal"``.
    unit, groups, aggregate, assume_independent, min_active, min_active_groups
        As for :func:`biosae.stats.associate`.
    random_state
        Seed of the permutations.

    Returns
    -------
    DataFrame
        One row a (latent, pair): ``latent, target, class_a, class_b, estimate`` (Cliff's delta, above 0 where
        ``class_b`` is higher), ``statistic`` (z), ``p, p_holm, n_a, n_b, n_units, n_groups, p_kruskal, status,
        inference``. Latents without a test have NaN.

    Raises
    ------
    InputError
        For unknown latents, or a target that is not a label of three classes.
    """
    adata, found, V = _chosen(adata, target, latents, unit, groups, aggregate, assume_independent)
    if len(found.classes) < 3:
        raise InputError(f"target {target!r} has no three classes; compare two with method='auroc'")
    screen = associate(
        adata, target, unit=unit, method="kruskal", controls=False, groups=groups, aggregate=aggregate,
        assume_independent=assume_independent, min_active=min_active, min_active_groups=min_active_groups,
        random_state=random_state,
    )  # fmt: skip
    ranks, y, n = rank_columns(V), found.y.astype(int), found.n_units
    testable = screen["status"].isin(TESTED).to_numpy()
    rows = []
    for a, b in itertools.combinations(range(len(found.classes)), 2):
        in_a, in_b = y == a, y == b
        contrast = in_b / in_b.sum() - in_a / in_a.sum()
        inference = _contrast(ranks, contrast, None, found, testable, random_state)
        if found.sizes is not None and n > 3:
            again = _contrast(ranks, contrast, size_columns(found.sizes), found, testable, random_state)
            inference.p = np.maximum(inference.p, again.p)
            inference.how += "; not below the p adjusted for samples a unit"
        pair = in_a | in_b
        delta = 2 * effects.auroc(rank_columns(effects.rows_of(V, pair)), in_b[pair]) - 1
        rows.append(pd.DataFrame({
            "latent": screen["latent"], "target": target, "class_a": found.classes[a], "class_b": found.classes[b],
            "estimate": delta, "statistic": inference.statistic, "p": inference.p, "p_holm": np.nan,
            "n_a": int(in_a.sum()), "n_b": int(in_b.sum()), "n_units": n, "n_groups": found.groups.n,
            "p_kruskal": screen["p"], "status": screen["status"], "inference": np.where(testable, inference.how, ""),
        }))  # fmt: skip
    out = pd.concat(rows, ignore_index=True)
    out["p_holm"] = out.groupby("latent")["p"].transform(holm)
    place = {name: i for i, name in enumerate(screen["latent"])}
    return out.sort_values("latent", key=lambda s: s.map(place), kind="stable", ignore_index=True)


def _contrast(
    ranks: Columns, contrast: np.ndarray, C: np.ndarray | None, found: Target, testable: np.ndarray, random_state: int
) -> Inference:
    """Test of the score ``sum_i rank_i contrast_i``; a contrast of classes is constant in groups where the class is."""
    return linear(
        [block(np.arange(len(contrast)), ranks, contrast, C)], found.groups, rank_sum=C is None, units_blocks=None,
        n_permutations=0, random_state=random_state, testable=testable,
    )  # fmt: skip


def paired_delong(X: Any, positive: np.ndarray, *, codes: np.ndarray | None = None) -> dict[str, float]:
    """Difference of the AUROCs of two features on the same rows (DeLong et al., Biometrics 44, 837, 1988).

    ``Var(A_1 - A_0) = s2(V10_1 - V10_0) / n1 + s2(V01_1 - V01_0) / n0`` of the structural components.

    Parameters
    ----------
    X
        The two features, (n, 2).
    positive
        Rows of the positive class (n,).
    codes
        Group of every row: the components are added up within groups (Obuchowski, Biometrics 53, 567, 1997), t with
        groups - 1 degrees of freedom, and the wider of this error and that of free rows.

    Returns
    -------
    dict
        ``auroc_a, auroc_b, difference`` (a - b), ``se, ci_low, ci_high, statistic, p, df``; NaN where the difference
        has no variance or there are fewer than 3 groups.

    Raises
    ------
    StatisticsError
        If a class has fewer than 2 rows.
    """
    V, positive = as_columns(X), np.asarray(positive, dtype=bool)
    if min(positive.sum(), (~positive).sum()) < 2:
        raise StatisticsError("each class needs 2 rows to compare two AUROCs")
    n1, n0 = int(positive.sum()), int((~positive).sum())
    area = effects.auroc(rank_columns(V), positive)
    variance = 0.0
    for part, own, other in zip(effects.delong_components(V, positive), (n1, n0), (n0, n1)):
        part = part.toarray() if sp.issparse(part) else part
        variance += moments((part[:, 0] - part[:, 1])[:, None])[1][0] / (own - 1) / own / other**2
    df = np.inf
    if codes is not None:
        codes = np.unique(codes, return_inverse=True)[1].ravel()
        G = int(codes.max()) + 1
        total = effects.delong_groups(V, positive, codes, G)
        variance = max(variance, G / max(G - 1, 1) * float(((total[:, 0] - total[:, 1]) ** 2).sum()))
        df = G - 1.0
    difference = float(area[0] - area[1])
    se = np.sqrt(variance) if variance > 1e-30 and df >= 2 else np.nan
    critical = stats.norm.ppf(0.975) if np.isinf(df) else stats.t.ppf(0.975, max(df, 1.0))
    statistic = difference / se
    p = 2 * (stats.norm.sf(abs(statistic)) if np.isinf(df) else stats.t.sf(abs(statistic), max(df, 1.0)))
    return {
        "auroc_a": float(area[0]), "auroc_b": float(area[1]), "difference": difference, "se": float(se),
        "ci_low": difference - critical * se, "ci_high": difference + critical * se, "statistic": float(statistic),
        "p": float(p), "df": df,
    }  # fmt: skip


def compare_auroc(
    adata: Any, target: str, a: str, b: str, *, unit: str, groups: str = "patient", aggregate: str = "mean",
    assume_independent: bool = False,
) -> pd.Series:  # fmt: skip
    """Does latent ``a`` separate two classes better than latent ``b``? Paired DeLong test on the same units.

    AUROCs are taken as they stand, above 0.5 where the latent is higher in the second class; two latents that point in
    opposite directions differ by more than their power to separate.

    Parameters
    ----------
    adata
        Latents.
    target
        Label of two classes.
    a, b
        Names of latents, chosen on other rows: the best of many is better by chance.
    unit, groups, aggregate, assume_independent
        As for :func:`biosae.stats.associate`.

    Returns
    -------
    Series
        Values of :func:`paired_delong` with ``latent_a, latent_b, target, contrast, n_units, n_groups``.

    Raises
    ------
    InputError
        For unknown latents, or a target that has not two classes.
    StatisticsError
        If a class has fewer than 2 units.
    """
    _, found, V = _chosen(adata, target, [a, b], unit, groups, aggregate, assume_independent)
    if len(found.classes) != 2:
        raise InputError(f"target {target!r} has {len(found.classes)} classes; two AUROCs need a label of two")
    names = {
        "latent_a": a, "latent_b": b, "target": target, "contrast": f"{found.classes[1]} over {found.classes[0]}",
        "n_units": found.n_units, "n_groups": found.groups.n,
    }  # fmt: skip
    return pd.Series(names | paired_delong(V, found.y == 1, codes=found.groups.codes))


def variance_explained(
    adata: Any, target: str, *, latents: Sequence[str], unit: str, groups: str = "patient", aggregate: str = "mean",
    assume_independent: bool = False, n_bootstrap: int = 2000, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Share of each latent's variance between classes, with bootstrap intervals that resample patients.

    ``eta_squared = SS_between / SS_total``; ``omega_squared = (SS_b - (C - 1) MS_w) / (SS_t + MS_w)``, less biased;
    ``epsilon_squared`` is eta squared of ranks, the effect of ``method="kruskal"``. Groups are drawn again with all
    their rows (among those of one class where the class is constant within groups), ranks are taken again in every
    draw. Intervals are percentiles; those of eta and epsilon squared are moved down by twice the bias of the draws
    (the estimate is already too large by as much as its resamples are again) and cut at 0.

    Parameters
    ----------
    adata
        Latents.
    target
        Label.
    latents
        Names.
    unit, groups, aggregate, assume_independent
        As for :func:`biosae.stats.associate`.
    n_bootstrap
        Resamples.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        One row a (latent, measure): ``latent, target, measure, estimate, ci_low, ci_high, n_units, n_groups``. No
        interval with fewer than 3 groups, or for a constant latent.

    Raises
    ------
    InputError
        For unknown latents or a target without classes.
    """
    adata, found, V = _chosen(adata, target, latents, unit, groups, aggregate, assume_independent)
    if len(found.classes) < 2:
        raise InputError(f"target {target!r} is not a label of two or more classes")
    y, n, G = found.y.astype(int), found.n_units, found.groups.n
    codes = np.arange(n) if found.groups.codes is None else found.groups.codes
    rng = np.random.default_rng(random_state)
    W = _resamples(codes, y if found.groups.constant else None, G, n_bootstrap, rng)
    step = max(1, 4_000_000 // max(n, 1))
    rows = []
    for j, name in enumerate(adata.var_names):
        x = np.asarray(V[:, [j]].toarray() if sp.issparse(V) else V[:, [j]]).ravel()
        point = _shares(x, y, np.ones((1, n)))[:, 0]
        if G >= 3 and np.isfinite(point).all():
            parts = [_shares(x, y, W[s : s + step][:, codes]) for s in range(0, n_bootstrap, step)]
            low, high = zip(*map(_interval, MEASURES, point, np.hstack(parts)))
        else:
            low = high = (np.nan,) * len(MEASURES)
        for k, measure in enumerate(MEASURES):
            rows.append((str(name), target, measure, point[k], low[k], high[k], n, G))
    columns = ["latent", "target", "measure", "estimate", "ci_low", "ci_high", "n_units", "n_groups"]
    return pd.DataFrame(rows, columns=columns)


def _resamples(codes: np.ndarray, y: np.ndarray | None, G: int, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each group is drawn, (n_draws, G); within classes where ``y`` is given (constant within groups)."""
    kind = np.zeros(G, dtype=np.int64)
    if y is not None:
        kind[codes] = y
    W = np.zeros((n_draws, G))
    for c in np.unique(kind):
        own = np.flatnonzero(kind == c)
        W[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=n_draws)
    return W


def _shares(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The three measures (3, b) of a column for weights of rows (b, n)."""
    level, place = np.unique(x, return_inverse=True)
    n, C = len(x), int(y.max()) + 1
    cell = sp.csr_matrix((np.ones(n), (np.arange(n), place.ravel() * C + y)), shape=(n, len(level) * C))
    weight = np.asarray(w @ cell).reshape(len(w), len(level), C)
    of_level, of_class = weight.sum(axis=2), weight.sum(axis=1)
    N = of_level.sum(axis=1)
    rank = np.cumsum(of_level, axis=1) - of_level / 2
    out = []
    for score in (np.broadcast_to(level - level.mean(), of_level.shape), rank):
        score = score - ((of_level * score).sum(axis=1) / N)[:, None]
        total = (of_level * score**2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.nansum(np.einsum("blc,bl->bc", weight, score) ** 2 / of_class, axis=1)
            out.append((np.where(total > 1e-12 * N * np.abs(score).max(axis=1) ** 2, between / total, np.nan), total))
    (eta, total), (epsilon, _) = out
    present = (of_class > 0).sum(axis=1)
    msw = (1 - eta) * total / (N - present)
    return np.stack([eta, (eta * total - (present - 1) * msw) / (total + msw), epsilon])


def _interval(measure: str, point: float, draws: np.ndarray) -> tuple[float, float]:
    """Percentiles of the draws; eta and epsilon squared less twice their bias, and not below 0."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return np.nan, np.nan
    low, high = np.quantile(draws, [0.025, 0.975])
    if measure == "omega_squared":
        return float(low), float(high)
    shift = 2 * (draws.mean() - point)
    return float(max(low - shift, 0.0)), float(max(high - shift, 0.0))
