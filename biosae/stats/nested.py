"""Samples inside slides inside patients: aggregation to units, and inference that counts groups, not samples.

The cluster test used for p-values adds up a target's score within each group, ``s_g = sum_{i in g} x~_i y~_i`` (x~, y~
the centred or residual values), under the hypothesis of no association. ``t = mean(s) / (sd(s) / sqrt(G))`` with ``G -
1`` degrees of freedom is the cluster-robust score test; a Wald test with CR1 errors rejects true nulls far too often
for latents that fire in few groups (see docs/statistics.md) and is used for intervals only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError, StatisticsError, nearest
from biosae.stats.adjust import is_categorical
from biosae.stats.correlation import Columns, as_columns, dot, t_pvalue
from biosae.stats.kernels import kernels

HOW = ("mean", "fraction_active", "max", "top5")
"""Ways to pool; 5 stands for any number."""


def is_chunked(X: Any) -> bool:
    """True for codes that are not in memory: those of a backed AnnData, or a dask array."""
    return not sp.issparse(X) and not isinstance(X, np.ndarray)


def in_memory(adata: Any, latents: Sequence[str] | None = None) -> Any:
    """The table with its codes in memory, all of them or those of some latents; itself where they are.

    What is read from a backed file or a dask array is read block by block, so that only the wanted latents are held.
    """
    wanted = None if latents is None else adata.var_names.get_indexer(list(latents))
    if not is_chunked(adata.X):
        return adata if wanted is None else adata[:, wanted]
    import anndata

    from biosae.stats.chunks import row_blocks

    keep = slice(None) if wanted is None else wanted
    X = sp.csr_matrix(sp.vstack([block[:, keep] for _, block in row_blocks(adata.X)], format="csr"), dtype=np.float32)
    out = anndata.AnnData(X=X, obs=adata.obs.copy(), var=adata.var.iloc[keep].copy())
    out.obsm.update({name: np.asarray(values) for name, values in adata.obsm.items()})
    out.varm.update({name: np.asarray(values)[keep] for name, values in adata.varm.items()})
    out.uns.update(adata.uns)
    return out


def indicator(codes: np.ndarray, n_groups: int) -> sp.csr_matrix:
    """Membership (n_groups, n): 1 where row i belongs to group g."""
    n = len(codes)
    return sp.csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(n_groups, n))


def pool(X: Any, codes: np.ndarray, n_groups: int, *, how: str = "mean") -> Any:
    """Rows of X (n, m) pooled by group: CSR float64 for sparse input, an array for dense.

    Raises
    ------
    InputError
        For an unknown ``how``.
    """
    k = largest(how)
    if is_chunked(X):
        from biosae.stats.chunks import pool_rows

        return pool_rows(X, codes, n_groups, how=how)
    size = np.bincount(codes, minlength=n_groups).astype(np.float64)
    if k:
        return _pool_top(X, codes, n_groups, k)
    if how == "fraction_active":
        X = (X != 0).astype(np.float64)
    pooled = indicator(codes, n_groups) @ (X.astype(np.float64) if sp.issparse(X) else np.asarray(X, np.float64))
    return per_unit(sp.csr_matrix(pooled) if sp.issparse(pooled) else pooled, size)


def per_unit(total: Any, size: np.ndarray) -> Any:
    """Sums of units (n_groups, m) over their numbers of samples."""
    size = np.maximum(size, 1.0)
    if not sp.issparse(total):
        return _settled(total / size[:, None])
    total.data = _settled(total.data / np.repeat(size, np.diff(total.indptr)))
    return total


def _settled(values: np.ndarray) -> np.ndarray:
    """Rounded to 44 binary digits: 3 of 5 and 9 of 15, or a constant summed up differently, must be ties."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2.0**44) / 2.0**44, exponent)


def largest(how: str) -> int:
    """How many of a unit's largest values are averaged: 1 for ``"max"``, k for ``"top<k>"``, 0 for other ways.

    Raises
    ------
    InputError
        For an unknown way to pool.

    >>> largest("top3"), largest("max"), largest("mean")
    (3, 1, 0)
    """
    if found := re.fullmatch(r"top([1-9][0-9]*)", how):
        return int(found[1])
    if how not in HOW:
        raise InputError(f"unknown aggregation {how!r}; {nearest(how, HOW)} (top5: mean of the 5 largest)")
    return int(how == "max")


def _pool_top(X: Any, codes: np.ndarray, n_groups: int, k: int) -> Any:
    """Mean of the ``k`` largest values of every unit and latent, or of all where a unit has fewer samples."""
    size = np.bincount(codes, minlength=n_groups)
    if not sp.issparse(X):
        X, out = np.asarray(X, np.float64), np.zeros((n_groups, X.shape[1]))
        for g in range(n_groups):
            rows = np.sort(X[codes == g], axis=0)[-k:]
            out[g] = rows.mean(axis=0) if len(rows) else 0.0
        return _settled(out) if k > 1 else out
    coo = sp.csr_matrix(X, dtype=np.float64).tocoo()
    key = codes[coo.row].astype(np.int64) * X.shape[1] + coo.col
    order = np.lexsort((-coo.data, key))
    key, value = key[order], coo.data[order]
    start = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.empty(0, np.int64)
    count = np.diff(np.r_[start, len(key)])
    zeros = (size[key[start] // X.shape[1]] - count).repeat(count)  # they lie between positive and negative codes
    place = np.arange(len(key)) - start.repeat(count) + np.where(value < 0, zeros, 0)
    wanted = np.minimum(size[key // X.shape[1]], k)
    total = np.where(place < wanted, value, 0.0)
    mean = (np.add.reduceat(total, start) if len(key) else total) / wanted[start]
    out = sp.csr_matrix(
        (_settled(mean) if k > 1 else mean, (key[start] // X.shape[1], key[start] % X.shape[1])),
        shape=(n_groups, X.shape[1]),
    )
    out.eliminate_zeros()
    return out


def require_groups(obs: pd.DataFrame, groups: str) -> None:
    """Refuse where nobody says which samples are independent.

    Raises
    ------
    StatisticsError
        If the column of independent groups is absent.
    """
    if groups not in obs:
        raise StatisticsError(
            f"obs has no column {groups!r}, so nothing says which samples are independent. Name the column of patients "
            "with groups=, or pass assume_independent=True and say so where you report it"
        )


def codes_of(obs: pd.DataFrame, column: str) -> tuple[np.ndarray, list[str]]:
    """Integer codes of a grouping column and its levels in order.

    Raises
    ------
    InputError
        If the column is absent or has missing values.
    """
    if column not in obs:
        raise InputError(f"{column!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
    if obs[column].isna().any():
        raise InputError(
            f"{int(obs[column].isna().sum())} rows have no {column!r}: fill it in, or leave those rows out with "
            f"adata[adata.obs[{column!r}].notna()]"
        )
    values = obs[column].astype(str)
    codes, levels = pd.factorize(values, sort=True)
    return codes, [str(v) for v in levels]


def aggregate(adata: Any, by: str = "patient", how: str = "mean") -> Any:
    """Pool samples to units, such as patients or slides.

    Parameters
    ----------
    adata
        Latents; ``X`` (n_samples, m).
    by
        Column of ``obs`` that names the unit of each sample.
    how
        ``"mean"``, ``"fraction_active"`` (share of the unit's samples in which the latent fires), ``"top5"`` (mean of
        the 5 largest codes, or of any other number of them) or ``"max"``. The last two grow with the number of samples
        of a unit; prefer the others when that number varies.

    Returns
    -------
    AnnData
        One row a unit, in sorted order: ``X`` (CSR float32), ``obs["n_samples"]``, means of numeric columns over
        samples that have a value, other columns where they are constant within every unit; ``obsm`` arrays pooled by
        mean.

    Raises
    ------
    InputError
        If ``by`` is absent or missing in some rows, or ``how`` is unknown.
    """
    import anndata

    codes, levels = codes_of(adata.obs, by)
    obs = pd.DataFrame({"n_samples": np.bincount(codes, minlength=len(levels))}, index=pd.Index(levels, name=by))
    for name in adata.obs.columns:
        if name != "n_samples":
            try:
                values = unit_values(adata.obs[name], codes, len(levels), name=name, unit=by)
            except StatisticsError:
                continue  # a label that varies within a unit has no value for that unit
            kind = adata.obs[name].dtype
            obs[name] = pd.Series(values, obs.index, dtype=kind if is_categorical(adata.obs[name]) else None)
    X = pool(adata.X, codes, len(levels), how=how)
    out = anndata.AnnData(
        X=sp.csr_matrix(X, dtype=np.float32) if sp.issparse(X) else X.astype(np.float32), obs=obs, var=adata.var.copy()
    )
    for name, values in adata.obsm.items():
        out.obsm[name] = pool(np.asarray(values), codes, len(levels)).astype(np.float32)
    for name, values in adata.varm.items():
        out.varm[name] = values
    out.uns.update(deepcopy(dict(adata.uns)))
    out.uns["aggregated"] = {"by": by, "how": how}
    return out


def unit_values(column: pd.Series, codes: np.ndarray, n_units: int, *, name: str, unit: str) -> np.ndarray:
    """One value a unit: the mean of a numeric column over rows that have a value; the constant of any other.

    Raises
    ------
    StatisticsError
        If a categorical column varies within a unit.
    """
    if not is_categorical(column):
        values = column.to_numpy(np.float64, na_value=np.nan)
        known = ~np.isnan(values)
        n = np.bincount(codes[known], minlength=n_units)
        own = np.flatnonzero(known)[np.argsort(values[known])]  # one order of adding up, whatever that of the rows
        total, size = (np.bincount(codes[own], weights=v[own], minlength=n_units) for v in (values, np.abs(values)))
        total[np.abs(total) < 1e-13 * size] = 0.0  # -0.3 + 0.1 + 0.2
        mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
        first = np.full(n_units, np.nan)
        first[codes[known][::-1]] = values[known][::-1]
        varies = np.bincount(codes[known], weights=values[known] != first[codes[known]], minlength=n_units) > 0
        # constants stay exactly themselves, unless there are means that may equal them
        return _settled(np.where(varies, mean, first)) if varies.any() else first
    frame = pd.DataFrame({"unit": codes, "value": column.astype(object).to_numpy()}).dropna()
    per_unit = frame.groupby("unit")["value"].agg(["nunique", "first"])
    varying = per_unit.index[per_unit["nunique"] > 1]
    if len(varying):
        raise StatisticsError(
            f"{name!r} has several values within {len(varying)} of the {n_units} units {unit!r}, so a {unit} has no "
            f"{name}. Use unit='sample' (or a finer unit), or give a number, such as the share of samples with it"
        )
    out = np.full(n_units, None, dtype=object)
    out[per_unit.index] = per_unit["first"].to_numpy()
    return out


def roles(
    obs: pd.DataFrame, *, unit: str, groups: str, nested: str, assume_independent: bool
) -> tuple[str, str, bool]:  # fmt: skip
    """What a row is, which column holds independent groups, and whether every row is claimed to be independent.

    With ``nested="cluster"`` rows are samples and ``unit`` names their groups; ``assume_independent`` then claims that
    these are independent of each other, not that samples are.

    Raises
    ------
    StatisticsError
        If several of these share a value of ``groups`` (slides of one patient) and nothing claims them independent.
    """
    if nested != "cluster":
        return unit, groups, assume_independent
    if groups in obs and unit in obs and groups != unit and not assume_independent:
        pairs = obs[[groups, unit]].dropna().drop_duplicates()
        shared = int((pairs.groupby(groups, observed=True).size() > 1).sum())
        if shared:
            raise StatisticsError(
                f"nested='cluster' takes every {unit} as independent, but {shared} of the {groups}s have several "
                f"{unit}s. Use unit={groups!r}, or pass assume_independent=True, which is written into the result"
            )
    return "sample", unit, False


def group_scores(
    V: Columns, e: np.ndarray, Q: np.ndarray, coefficient: np.ndarray, codes: np.ndarray, n_groups: int
) -> np.ndarray:
    """``s_g = sum_{i in g} (M x)_i e_i`` for every column, (G, m); ``coefficient = Q'V``, M the projection off Q."""
    inside = indicator(codes, n_groups) @ (Q * e[:, None])
    if sp.issparse(V):
        return kernels().group_sums(V, e, codes, n_groups) - inside @ coefficient
    return indicator(codes, n_groups) @ (V * e[:, None]) - inside @ coefficient


def group_squares(V: Columns, Q: np.ndarray, coefficient: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """``sum_{i in g} (M x)_i^2`` for every column, (G, m)."""
    A = indicator(codes, n_groups)
    square = V.multiply(V) if sp.issparse(V) else V * V
    S = A @ square
    S = S.toarray() if sp.issparse(S) else np.asarray(S)
    for k in range(Q.shape[1]):
        cross = kernels().group_sums(V, Q[:, k], codes, n_groups) if sp.issparse(V) else A @ (V * Q[:, [k]])
        S -= 2.0 * cross * coefficient[k]
    within = np.stack([A @ (Q * Q[:, [k]]) for k in range(Q.shape[1])], axis=1)
    S += np.einsum("gkl,km,lm->gm", within, coefficient, coefficient, optimize=True)
    return np.maximum(S, 0.0)


def score_t(S: np.ndarray) -> np.ndarray:
    """One-sample t over groups of the scores (G, m): the cluster-robust score statistic; NaN for a single group."""
    G = S.shape[0]
    if G < 2:
        return np.full(S.shape[1:], np.nan)
    sd = S.std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sd > 0, S.mean(axis=0) * np.sqrt(G) / sd, np.nan)


def hotelling_pvalue(S: np.ndarray) -> np.ndarray:
    """p of Hotelling's one-sample T2 over groups of score vectors (G, m, q), ``F(q, G - q)``; NaN where singular."""
    G, m, q = S.shape
    p = np.full(m, np.nan)
    if q >= G or q == 0:
        return p
    centre = S.mean(axis=0)
    D = S - centre
    cov = np.einsum("gmi,gmj->mij", D, D) / (G - 1)
    fine = np.isfinite(cov).all(axis=(1, 2))
    fine[fine] = (np.linalg.matrix_rank(cov[fine], hermitian=True) == q) & (np.trace(cov[fine], axis1=1, axis2=2) > 0)
    if fine.any():
        T2 = G * np.einsum("mi,mi->m", centre[fine], np.linalg.solve(cov[fine], centre[fine][..., None])[..., 0])
        p[fine] = stats.f.sf(T2 * (G - q) / (q * (G - 1)), q, G - q)
    return p


def ols_cluster(X: Any, y: np.ndarray, groups: np.ndarray, *, C: np.ndarray | None = None) -> pd.DataFrame:
    """Slope of y on every column of X (n, m) with CR1 cluster-robust standard errors.

    ``V = c (X'X)^-1 (sum_g X_g' u_g u_g' X_g) (X'X)^-1``, ``c = G/(G-1) (N-1)/(N-K)`` (Liang and Zeger 1986; the
    factor is that of Stata and statsmodels), t with ``G - 1`` degrees of freedom. Returns columns slope, se, t, p, df.
    With fewer than about 50 groups, or a column that differs from its mean in few groups, the se is too small.
    """
    from biosae.stats.adjust import basis, projected, residual

    V, y = as_columns(X), np.asarray(y, np.float64)
    codes = pd.factorize(groups)[0]
    G = int(codes.max()) + 1
    Q = basis(C, len(y))
    e = residual(y, Q)
    coefficient, _, ss = projected(V, Q)
    ss = np.where(ss > 0, ss, np.nan)
    slope = dot(V, e) / ss
    S = group_scores(V, e, Q, coefficient, codes, G) - slope * group_squares(V, Q, coefficient, codes, G)
    N, K = len(y), Q.shape[1] + 1
    se = np.sqrt((S**2).sum(axis=0) * G / (G - 1) * (N - 1) / (N - K)) / ss
    t = slope / se
    return pd.DataFrame({"slope": slope, "se": se, "t": t, "p": t_pvalue(t, G - 1), "df": G - 1})


def intraclass_correlation(y: np.ndarray, groups: np.ndarray) -> float:
    """One-way ICC by analysis of variance, ``(MSB - MSW) / (MSB + (n0 - 1) MSW)``; may be negative; else NaN."""
    y, codes = np.asarray(y, np.float64), pd.factorize(groups)[0]
    size = np.bincount(codes)
    G, N = len(size), len(y)
    if G < 2 or G == N:
        return float("nan")
    mean = np.bincount(codes, weights=y) / size
    msb = float((size * (mean - y.mean()) ** 2).sum() / (G - 1))
    msw = float(((y - mean[codes]) ** 2).sum() / (N - G))
    n0 = (N - (size**2).sum() / N) / (G - 1)
    return (msb - msw) / (msb + (n0 - 1) * msw) if msb + msw > 0 else float("nan")
