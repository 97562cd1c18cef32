"""Is a latent biology or the scanner? Variance shares per latent, with p that count patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError
from biosae.stats.adjust import basis, column_of, design, is_categorical, overlap, residual
from biosae.stats.chunks import column_tables
from biosae.stats.correlation import Columns, as_columns, dot, moments, skewness
from biosae.stats.multiplicity import bh
from biosae.stats.nested import codes_of, hotelling_pvalue, indicator
from biosae.stats.permutation import Draws, null_counts, permutations, sign_flips
from biosae.stats.skewed import times_skewness
from biosae.stats.training import sae_training

DOMINANCE = 2.0
"""A latent is called after a factor whose unique variance share is at least this many times that of the other."""
SEPARABLE = 0.05
"""Least share of a factor's variance that the other side must leave, or the two cannot be told apart."""
BLOCK = 2048
"""Latents whose sums by group are held at once."""


def confounders(
    adata: Any, *, biology: str | Sequence[str], technical: str | Sequence[str] | Mapping[str, Sequence[str]],
    groups: str = "patient", jointly: bool = False, assume_independent: bool = False, n_permutations: int = 999,
    n_bootstrap: int = 500, alpha: float = 0.05, random_state: int = 0,
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
        Columns of ``obs``; numbers enter linearly, ``"spline(age)"`` as a cubic spline, labels as dummies. All of
        ``biology`` is one side; each technical factor is judged on its own. A factor may be several columns:
        ``technical={"acquisition": ["scanner", "stain"], "site": ["site"]}``.
    groups
        Column of independent groups; without it (and without ``assume_independent``) shares are given and no p.
    jointly
        True takes from every technical factor what the other technical factors explain too, and from biology what all
        of them explain. A factor that others determine (scanner of a site) is then ``not_separable``.
    n_permutations
        Draws, shared by all latents.
    n_bootstrap
        Resamples of groups for the interval of ``log2_ratio``; 0 leaves it out.
    alpha
        Level of ``q_*`` (Benjamini-Hochberg over latents) for the flag.

    Returns
    -------
    DataFrame
        One row a (factor, latent): ``latent, factor, biology, eta2_biology, eta2_technical, unique_biology,
        unique_technical, log2_ratio, ratio_low, ratio_high, p_biology, q_biology, p_technical, q_technical, flag,
        n_units, n_groups, n_samples, status``. ``ratio_low`` and ``ratio_high`` are the 95 % interval of
        ``log2_ratio``, of the bias-corrected cluster bootstrap (Efron 1981). ``flag``: ``biology``, ``technical``,
        ``mixed``, ``neither``, ``not_separable`` (design: one side determines the other) or ``undetermined`` (no p).
        ``attrs["overlap"]``: for every factor, counts of groups (of samples without groups) by biology and each of its
        columns, numbers cut in thirds. ``attrs["biosae"]``: the choices made, and ``sae_training``, how many of the
        groups behind the table the SAE was trained on (:func:`biosae.stats.sae_training`).

    Raises
    ------
    InputError
        If a column is absent or on both sides, or no row has all of them.
    """
    biology = [biology] if isinstance(biology, str) else list(biology)
    factors = factor_columns(technical)
    if not biology or not factors:
        raise InputError("name at least one column for biology and one for technical")
    both = {*map(column_of, biology)} & {column_of(c) for columns in factors.values() for c in columns}
    if both:
        raise InputError(f"{min(both)!r} is both biology and technical; leave it out of one side")
    for name in [*biology, *(c for columns in factors.values() for c in columns)]:
        if column_of(name) not in adata.obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
    tables = []
    for name, columns in factors.items():
        others = [c for other, held in factors.items() if other != name for c in held] if jointly else []
        how = (groups, assume_independent, n_permutations, n_bootstrap, random_state)
        parts = [_one_factor(part, biology, name, columns, others, *how) for part in column_tables(adata)]
        tables.append(_flagged(pd.concat(parts, ignore_index=True), alpha))
    out = pd.concat(tables, ignore_index=True)
    unit = groups if groups in adata.obs and not assume_independent else None
    out.attrs["overlap"] = {name: overlaps(adata.obs, biology, columns, unit=unit) for name, columns in factors.items()}
    used = np.any([_known(adata.obs, [*biology, *columns]) for columns in factors.values()], axis=0)
    out.attrs["biosae"] = {
        "biology": biology, "technical": factors, "groups": unit, "jointly": jointly,
        "assume_independent": assume_independent, "n_permutations": n_permutations, "n_bootstrap": n_bootstrap,
        "alpha": alpha, "random_state": random_state, "sae_training": sae_training(adata, groups, rows=used),
    }  # fmt: skip
    return out


def _known(obs: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Rows that have all columns (splines: the column they are made of)."""
    return obs[list(dict.fromkeys(map(column_of, columns)))].notna().all(axis=1).to_numpy()


def factor_columns(technical: str | Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Columns of every technical factor by its name."""
    if isinstance(technical, str):
        return {technical: [technical]}
    if isinstance(technical, Mapping):
        return {str(k): [v] if isinstance(v, str) else list(v) for k, v in technical.items()}
    return {name: [name] for name in technical}


def overlaps(
    obs: pd.DataFrame, biology: Sequence[str], technical: Sequence[str], *, unit: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """Counts of units by every biological and technical column, as plain dictionaries; see :func:`overlap`.

    ``{"label x scanner": {"counts": {scanner: {label: n}}, "separable": bool, "empty_cells": int}}``; numbers of more
    than 8 values are cut in thirds.
    """
    out = {}
    for b in map(column_of, biology):
        for t in map(column_of, technical):
            counted = None if unit in (b, t) else unit
            part = obs[list(dict.fromkeys([b, t] + [unit] * (counted is not None)))].copy()
            for name in (b, t):
                if not is_categorical(part[name]) and part[name].nunique() > 8:
                    part[name] = pd.qcut(part[name], 3, duplicates="drop").astype(str).where(part[name].notna())
            table = overlap(part, b, by=t, unit=counted)
            counts = {str(k): {str(c): int(n) for c, n in row.items()} for k, row in table.iterrows()}
            out[f"{b} x {t}"] = {"counts": counts, **table.attrs}
    return out


def _one_factor(
    adata, biology, factor, columns, others, groups, assume_independent, n_permutations, n_bootstrap, random_state,
) -> pd.DataFrame:  # fmt: skip
    obs = adata.obs
    known = _known(obs, [*biology, *columns, *others])
    grouped = groups in obs and not assume_independent
    if not known.any():
        raise InputError(f"no row has a value of {factor!r} and of {', '.join(biology)}")
    obs, X = obs[known], adata.X[known]
    n, V = len(obs), as_columns(sp.csr_matrix(X))
    codes = codes_of(obs, groups)[0] if grouped else np.arange(n)
    G = int(codes.max()) + 1
    B, T, rest = (design(obs, c) for c in (biology, columns, others))
    Qb, Qt = basis(B, n), basis(T, n)
    beside_b, beside_t = basis(np.hstack([T, rest]), n), basis(np.hstack([B, rest]), n)
    ss = moments(V)[1]
    ss = np.where(ss > 0, ss, np.nan)
    own_b, own_t = _beyond(B, beside_b), _beyond(T, beside_t)
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
    separable = _left(B, beside_b) >= SEPARABLE and _left(T, beside_t) >= SEPARABLE
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
    out["ratio_low"] = out["ratio_high"] = np.nan
    if testable.any() and n_bootstrap:
        sides = [basis(D, n) for D in (np.hstack([B, T, rest]), np.hstack([T, rest]), np.hstack([B, rest]))]
        low, high = ratio_interval(
            V[:, testable], sides, codes, out.loc[testable, "log2_ratio"].to_numpy(), n_bootstrap, random_state
        )
        out.loc[testable, "ratio_low"], out.loc[testable, "ratio_high"] = low, high
    for side, D, other in (("biology", own_b, beside_b), ("technical", own_t, beside_t)):
        p = np.full(len(out), np.nan)
        if testable.any() and D.shape[1]:
            p = _pvalue(V, D, other, ss, codes, G, testable, n_permutations, random_state)
        out[f"p_{side}"] = out[f"q_{side}"] = p
    out["flag"] = "" if separable or one_class else "not_separable"
    out["n_units"], out["n_groups"], out["n_samples"] = n, G if declared else 0, int(known.sum())
    out["status"] = status if separable or one_class else "unidentifiable"
    out.loc[active == 0, "status"] = "dead"
    out.loc[(active > 0) & ~np.isfinite(ss), "status"] = "constant"
    out.loc[(active > 0) & np.isfinite(ss) & ~testable & out["status"].isin(["ok", "few_groups"]), "status"] = (
        "too_sparse"
    )
    return out


def _flagged(out: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """q over all latents of a factor, and the flags that follow from them."""
    for side in ("biology", "technical"):
        out[f"q_{side}"] = bh(out[f"p_{side}"])
    if (out["flag"] == "").all():
        out["flag"] = _flags(out, alpha)
    return out


def ratio_interval(
    V: Columns, sides: Sequence[np.ndarray], codes: np.ndarray, observed: np.ndarray, n_bootstrap: int,
    random_state: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """95 % interval of ``log2(unique share of biology / unique share of technical)`` by resampling groups.

    ``sides`` are bases of everything, of all but biology, of all but the technical factor. Every resample is a
    regression from sums over groups, so codes stay sparse. Percentiles are corrected for bias (Efron 1981): resampled
    shares of variance are larger than the observed.
    """
    D = sides[0]
    k = D.shape[1]
    G, m = int(codes.max()) + 1, V.shape[1]
    member = indicator(codes, G)
    times = np.random.default_rng(random_state).multinomial(G, np.full(G, 1.0 / G), size=n_bootstrap).astype(np.float64)
    within = np.stack([member @ (D * D[:, [j]]) for j in range(k)], axis=1).reshape(G, k * k)
    gram = (times @ within).reshape(n_bootstrap, k, k)
    roots = []
    for side in sides:  # every side is a part of what D spans: the directions in it, then the root of its inverse Gram
        L = D.T @ side
        values, vectors = np.linalg.eigh(L.T @ gram @ L)
        kept = values > 1e-8 * values[:, -1:]
        scale = np.where(kept, 1.0 / np.sqrt(np.where(kept, values, 1.0)), 0.0)
        roots.append(L @ (vectors * scale[:, None, :]))
    low, high = np.empty(m), np.empty(m)
    for start in range(0, m, BLOCK):
        part = slice(start, min(start + BLOCK, m))
        W = V[:, part]
        sums = [member @ sp.diags(D[:, j]) @ W for j in range(k)]
        if W.shape[1] * G <= 4 * max(s.nnz for s in sums) or W.shape[1] * G < 1_000_000:
            sums = [s.toarray() for s in sums]
        cross = np.stack([np.asarray(s.T @ times.T if sp.issparse(s) else (times @ s).T) for s in sums])
        ratio = np.empty((n_bootstrap, W.shape[1]))
        for b in range(n_bootstrap):
            fit, without_b, without_t = (((root[b].T @ cross[:, :, b]) ** 2).sum(axis=0) for root in roots)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio[b] = np.log2(np.maximum(fit - without_b, 0) / np.maximum(fit - without_t, 0))
        low[part], high[part] = _bias_corrected(ratio, observed[part])
    return low, high


def _bias_corrected(draws: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected 2.5 and 97.5 percentiles of the columns of ``draws`` (B, m); NaN draws count as nothing."""
    B = len(draws)
    draws = np.sort(np.where(np.isnan(draws), np.inf, draws), axis=0)
    below = np.clip((draws < observed).mean(axis=0), 0.5 / B, 1 - 0.5 / B)
    z = stats.norm.ppf(below)
    out = []
    for tail in (0.025, 0.975):
        at = np.clip(np.round(stats.norm.cdf(2 * z + stats.norm.ppf(tail)) * (B - 1)).astype(int), 0, B - 1)
        out.append(draws[at, np.arange(draws.shape[1])])
    return out[0], out[1]


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
    first = np.unique(codes, return_index=True)[1]
    if np.abs(D - D[first][codes]).max() < 1e-9:  # one value a group: groups are rearranged
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
