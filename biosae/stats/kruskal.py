"""Kruskal-Wallis test of many columns over several classes, for independent and for grouped units."""

from __future__ import annotations

import numpy as np
from scipy import stats

from biosae.stats.correlation import Columns, dot, moments, skewness, t_pvalue
from biosae.stats.inference import FEW, MIN_DRAWS, VERY_FEW, Groups, Inference, unequal_sizes
from biosae.stats.nested import group_scores, hotelling_pvalue, indicator, score_t
from biosae.stats.permutation import null_counts, permutations, sign_flips
from biosae.stats.schemes import Scheme, permuted
from biosae.stats.skewed import times_skewness


def kruskal(
    ranks: Columns,
    codes: np.ndarray,
    groups: Groups,
    *,
    units_blocks: np.ndarray | None,
    n_permutations: int,
    random_state: int,
    testable: np.ndarray,
    scheme: Scheme | None = None,
) -> Inference:
    """``H = (n - 1) SS_between / SS_total`` of the ranks, ties corrected.

    Independent units: chi-squared with C - 1 degrees of freedom, corrected for skewness, permutation below 20 units.
    Grouped units: the larger p of Hotelling's T2 over the groups' score vectors and of the free rearrangement (of
    samples, or of groups where the class is constant within groups); permutation of groups below 20 groups if the
    class is constant within them.
    Max-T permutes units or groups, or flips the signs of the groups' score vectors where the class varies within
    groups.
    """  # fmt: skip
    n, size = len(codes), np.bincount(codes).astype(np.float64)
    C = len(size)
    onehot = np.eye(C)[codes] - size / n
    ss = np.where(testable, moments(ranks)[1], np.nan)
    H = (n - 1) * (dot(ranks, onehot) ** 2 / size).sum(axis=1) / ss
    if scheme is not None and scheme.arrange is not None:
        Q = np.full((n, 1), 1.0 / np.sqrt(n))
        p, p_maxt, _, how = permuted(
            ranks, onehot / np.sqrt(size), Q, scheme, n_draws=n_permutations, random_state=random_state,
            testable=testable,
        )  # fmt: skip
        return Inference(H, p, p_maxt, how, how)
    between = scheme is not None
    small_arrangement = None
    if groups.codes is None:
        p, how = _skew_corrected(ranks, onehot, size, H), f"chi-squared, {C - 1} df, skewness corrected"
        if n < FEW or n_permutations:
            small_arrangement = (ranks, codes, units_blocks, H / (n - 1), n < FEW or between, "permutation")
    else:
        G = groups.n
        S = _scores(ranks, onehot, groups)
        p, how = _grouped(ranks, S[..., :-1], codes, groups, H, C)
        if groups.constant and (n_permutations or G < FEW):
            X = indicator(groups.codes, G) @ ranks
            X = X.toarray() if hasattr(X, "toarray") else X
            X = X - np.bincount(groups.codes)[:, None] * moments(ranks)[0]
            own = np.zeros(G, dtype=np.int64)
            own[groups.codes] = codes
            by = None
            if units_blocks is not None:
                by = np.zeros(G, dtype=np.int64)
                by[groups.codes] = units_blocks
            per_group = np.bincount(groups.codes, minlength=G)
            narrow = max(unequal_sizes(per_group, (own == c) - size[c] / n) for c in range(C))
            observed = np.where(testable, _between(X, own, C) / narrow, np.nan)
            small_arrangement = (
                X - X.mean(axis=0),
                own,
                by,
                observed,
                G < FEW or between,
                f"permutation of {G} groups",
            )
        elif not groups.constant and (n_permutations or G < VERY_FEW) and G >= 3:
            found = _flipped(S / np.sqrt(size), H, ss / (n - 1), p, how, testable, n_permutations, random_state)
            if np.bincount(groups.codes).max() > n / 4:  # flips of scores that share one dominating group are too few
                found.p_maxt = np.fmax(found.p_maxt, np.fmin(1.0, np.isfinite(found.p).sum() * found.p))
            return found
    p_maxt, how_maxt = np.full_like(p, np.nan), ""
    if small_arrangement is not None:
        V, labels, by, observed, small, scheme = small_arrangement
        draws = permutations(
            labels.astype(float),
            blocks=by,
            n_draws=max(n_permutations, MIN_DRAWS if small else 1),
            random_state=random_state,
        )
        count = np.bincount(labels, minlength=C).astype(np.float64)
        total = moments(V)[1]

        def statistic_of(Y: np.ndarray) -> np.ndarray:
            value = sum(dot(V, (c == Y) - count[c] / len(Y)) ** 2 / count[c] for c in range(C) if count[c])
            return value / np.where(total > 0, total, np.inf)[:, None]

        own_p, p_maxt, _ = null_counts(observed, draws, statistic_of)
        how_maxt = f"{scheme}, {draws.describe}"
        if small:
            p, how = own_p, how_maxt
        p_maxt = np.maximum(p_maxt, p)
    return Inference(H, np.where(testable, p, np.nan), p_maxt, how, how_maxt)


def _skew_corrected(ranks: Columns, onehot: np.ndarray, size: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Chi-squared p, times what skewness does to the tail of the class that is farthest from expectation."""
    n, C = len(onehot), len(size)
    p = stats.chi2.sf(H, C - 1)
    spread = np.sqrt(size * (1 - size / n))
    with np.errstate(divide="ignore", invalid="ignore"):
        Z = dot(ranks, onehot) / spread * np.sqrt((n - 1) / moments(ranks)[1])[:, None]
        Z = np.nan_to_num(Z)
        farthest = np.abs(Z).argmax(axis=1)
        z = np.abs(Z[np.arange(len(Z)), farthest])
        of_class = (onehot**3).sum(axis=0) / spread**3
        skew = n / max(n - 2, 1) * np.sqrt(n - 1) * skewness(ranks) * of_class[farthest]
    return times_skewness(p, z, np.nan_to_num(skew))


def _between(X: np.ndarray, codes: np.ndarray, C: int) -> np.ndarray:
    """Between-class share of the sum of squares of X (G, m), groups weighted alike."""
    X = X - X.mean(axis=0)
    size = np.bincount(codes, minlength=C)
    means = np.stack([X[codes == c].sum(axis=0) ** 2 / size[c] for c in range(C) if size[c]])
    total = (X**2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, means.sum(axis=0) / total, np.nan)


def _scores(ranks: Columns, onehot: np.ndarray, groups: Groups) -> np.ndarray:
    """Score of every class in every group, (G, m, C)."""
    Q, mean = np.ones((len(onehot), 1)), moments(ranks)[0][None]
    return np.stack([group_scores(ranks, e, Q, mean, groups.codes, groups.n) for e in onehot.T], axis=-1)


def _flipped(
    S: np.ndarray, H: np.ndarray, variance: np.ndarray, p: np.ndarray, how: str, testable: np.ndarray, n_draws: int,
    random_state: int,
) -> Inference:  # fmt: skip
    """Max-T by sign flips of the groups' score vectors, each column scaled by the wider of its two variances."""
    C = S.shape[-1]
    scale = np.fmax((S**2).sum(axis=(0, 2)), variance * (C - 1))
    draws = sign_flips(len(S), n_draws=n_draws, random_state=random_state)

    def statistic_of(Y: np.ndarray) -> np.ndarray:
        return sum((S[..., c].T @ Y) ** 2 for c in range(C)) / np.where(scale > 0, scale, np.inf)[:, None]

    shrink = (1 - 1 / len(S)) ** 2  # centring made the scores smaller than they were: as in CR3
    observed = np.where(testable, shrink * statistic_of(np.ones((len(S), 1)))[:, 0], np.nan)
    own, joint, _ = null_counts(observed, draws, statistic_of)
    scheme = f"sign flips of {len(S)} group scores, {draws.describe}"
    if len(S) < VERY_FEW:
        p, how = np.maximum(p, own), f"larger of {how} and {scheme}"
    p_maxt = np.maximum(joint, p)
    return Inference(H, np.where(testable, p, np.nan), p_maxt, how, scheme)


def _grouped(
    ranks: Columns, S: np.ndarray, codes: np.ndarray, groups: Groups, H: np.ndarray, C: int
) -> tuple[np.ndarray, str]:
    """p of every column from the scores of all classes but one, (G, m, C - 1)."""
    G, q = groups.n, C - 1
    if q >= G:
        return np.full_like(H, np.nan), ""
    A, mean = indicator(groups.codes, G), moments(ranks)[0]
    p_hotelling = hotelling_pvalue(np.where(np.isnan(H)[None, :, None], np.nan, S))
    if np.bincount(groups.codes).max() > len(codes) / 4:
        # all other scores are relative to the group that dominates: taken class by class, its own noise counts too
        S = np.concatenate([S, -S.sum(axis=2, keepdims=True)], axis=2)
        one = np.stack([t_pvalue(score_t(S[..., c]), G - 1) for c in range(C)])
        p_hotelling = np.maximum(p_hotelling, np.fmin(1.0, C * np.nan_to_num(one, nan=1.0).min(axis=0)))
    if groups.constant:
        own = np.zeros(G, dtype=np.int64)
        own[groups.codes] = codes
        X = A @ ranks
        X = (X.toarray() if hasattr(X, "toarray") else X) - np.asarray(A.sum(axis=1)) * mean
        eta = _between(X, own, C)
        with np.errstate(divide="ignore", invalid="ignore"):
            p_model = stats.f.sf(eta / (1 - eta) * (G - C) / q, q, G - C) if G > C else np.full_like(H, np.nan)
    else:
        p_model = stats.chi2.sf(H, q)
    return np.maximum(p_hotelling, p_model), f"Hotelling over {G} groups, wider of two"
