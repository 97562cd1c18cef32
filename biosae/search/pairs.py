"""Which latents fire together: pointwise mutual information of pairs, beyond what patients and strata explain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.search.cluster import chosen

N_LATENTS = 100
MAX_EXACT = 1_000
MAX_LATENTS = 500
PERMUTE = ("auto", "within", "spatial")


def pairs(
    adata: Any,
    *,
    latents: str | Sequence[str] | None = None,
    strata: str | None = None,
    min_count: int = 10,
    min_groups: int = 5,
    permute: str = "auto",
    n_permutations: int = 999,
    groups: str = "patient",
    assume_independent: bool = False,
    random_state: int = 0,
) -> pd.DataFrame:
    """Co-occurrence of latents in the same sample: mutual information, odds ratio within strata, patient-level test.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode` (n, m); a latent is on where its code is not 0. For pairs within documents
        (slides, recordings) pool first: ``biosae.stats.aggregate(adata, by="slide", how="max")``.
    latents
        Names (at most 500), or a text looked for in ``var["name"]``. None: the 100 whose firing varies most.
    strata
        Column within which latents must go together: ``groups`` itself, something within it (slide), or a confounder
        (scanner, site). None: ``groups`` where groups have several samples, else none.
    min_count
        Samples in which both fire; pairs with fewer have no p. (Pairs that avoid each other are refused too.) Since
        this keeps pairs that met by chance, q counts those that it refuses.
    min_groups
        Independent groups in which one or the other fires in part of the samples.
    permute
        ``"auto"``: no sample is rearranged; the groups' scores are compared with their spread (signs of groups flipped
        below 10). ``"within"``: samples are shuffled within their group, right only where they are exchangeable there;
        ``"spatial"``: maps of slides are shifted as wholes (``obsm["spatial"]``). See docs/statistics.md.
    n_permutations
        Draws of ``"within"`` and ``"spatial"``.
    groups
        Column of independent groups.
    assume_independent
        Samples are independent; said aloud where groups are unknown.
    random_state
        Seed of the draws.

    Returns
    -------
    DataFrame
        One row a pair, the strongest evidence first: ``latent_a, latent_b, n_a, n_b, n_both, n`` (samples), ``npmi``,
        ``jaccard``, ``phi`` (over all samples), ``mh_odds_ratio`` (Mantel-Haenszel, within strata; NaN where no stratum
        has a discordant sample of either kind), ``r_within`` (phi within strata), ``p, q, status, n_groups``. q is
        Benjamini-Hochberg over all pairs that could have had a p (``m_family`` in ``attrs["biosae"]``), those below
        ``min_count`` with 1.

    Raises
    ------
    InputError
        For unknown names or too many latents.
    StatisticsError
        If independence is unknown.

    Notes
    -----
    ``npmi = ln(p_ab / (p_a p_b)) / -ln p_ab`` (Bouma 2009): 1 the same samples, 0 independent, -1 never together; NaN
    where both are on in every sample, or one in none. ``mh = sum_k a_k d_k / n_k / sum_k b_k c_k / n_k`` (Mantel and
    Haenszel 1959). p: on and off less their share in the stratum (strata within groups), or adjusted for the stratum
    (strata across groups), then ``biosae.stats.associate(method="pearson")`` with samples as units and groups as
    independent: its numerator is that of the Mantel-Haenszel test, its error is that between groups. Where every sample
    is a group of its own, p is that of Fisher's exact test, or of the exact Mantel-Haenszel test within strata (while
    the rarer latent, or its silence, has at most 1,000 samples; t is as good beyond).
    """
    import anndata

    from biosae.stats import associate, bh
    from biosae.stats.nested import in_memory, require_groups

    if permute not in PERMUTE:
        raise InputError(f"permute={permute!r}; {nearest(permute, PERMUTE)}")
    if permute != "auto" and strata not in (None, groups):
        raise InputError(f"permute={permute!r} rearranges within {groups!r}, not within {strata!r}; leave strata out")
    known = groups in adata.obs
    if not assume_independent:
        require_groups(adata.obs, groups)
    if strata is not None and strata not in adata.obs:
        raise InputError(f"obs has no column {strata!r}; {nearest(strata, list(adata.obs.columns))}")
    on = sp.csr_matrix(sp.csr_matrix(in_memory(adata).X) != 0, dtype=np.float64)
    names = _varied(adata, on) if latents is None else chosen(adata, latents)
    if not 2 <= len(names) <= MAX_LATENTS:
        raise InputError(f"{len(names)} latents; pairs are made of 2 to {MAX_LATENTS}: choose some with latents=")
    on = sp.csr_matrix(on[:, adata.var_names.get_indexer(names)])
    n, m = on.shape
    independent = pd.factorize(adata.obs[groups])[0] if known and not assume_independent else np.arange(n)
    repeated = len(np.unique(independent)) < n
    cells = (
        pd.factorize(adata.obs[strata])[0] if strata is not None
        else independent if repeated else np.zeros(n, int)
    )  # fmt: skip
    if (cells < 0).any() or (independent < 0).any():
        raise InputError(f"samples without a value of {strata or groups!r}; leave them out")
    upper = np.triu_indices(m, 1)
    both = np.asarray((on.T @ on).todense())
    count = both.diagonal()
    within, mh = _conditional(on, cells)
    table = pd.DataFrame({
        "latent_a": np.array(names)[upper[0]], "latent_b": np.array(names)[upper[1]],
        "n_a": count[upper[0]].astype(int), "n_b": count[upper[1]].astype(int), "n_both": both[upper].astype(int),
        "n": n, "npmi": npmi(both, n)[upper], "jaccard": _jaccard(both)[upper], "phi": _phi(both, n)[upper],
        "mh_odds_ratio": mh[upper], "r_within": within[upper],
    })  # fmt: skip
    nested = len(np.unique(cells)) > 1 and _within(cells, independent)
    X = np.asarray(on.todense())
    informative = _groups_that_vary(X, cells, independent)
    if nested and permute == "auto":
        size = np.bincount(cells)
        means = sp.csr_matrix((1.0 / size[cells], (cells, np.arange(n))), shape=(len(size), n)) @ X
        X = X - means[cells]
    obs = pd.DataFrame({f"y{j}": X[:, j] for j in range(m)}, index=adata.obs.index)
    obs["independent"] = independent.astype(str)
    options: dict[str, Any] = {"permute": permute, "n_permutations": n_permutations} if permute != "auto" else {}
    if not nested and len(np.unique(cells)) > 1 and permute == "auto":
        obs["stratum"] = cells.astype(str)
        options["covariates"] = ["stratum"]
    if "slide" in adata.obs:
        obs["slide"] = adata.obs["slide"].to_numpy()
    data = anndata.AnnData(X=sp.csr_matrix(X), obs=obs, var=pd.DataFrame(index=names))
    if "spatial" in adata.obsm:
        data.obsm["spatial"] = np.asarray(adata.obsm["spatial"])
    for column in [f"y{j}" for j in range(m)]:  # numbers, also where a latent is 0 or 1: no labels
        data.obs[column] = data.obs[column].astype(float)
    result = associate(
        data, [f"y{j}" for j in range(m)], unit="sample", groups="independent", method="pearson", controls=False,
        random_state=random_state, min_active=1, min_active_groups=1, **options,
    )  # fmt: skip
    wide = {c: np.asarray(result[c]).reshape(m, m) for c in ("p", "status", "n_groups")}
    for name, values in wide.items():
        table[name] = values[upper]
    if not repeated and permute == "auto":
        exact = _exact(on, cells, upper)
        table["p"] = table["p"].mask(table["p"].notna() & ~np.isnan(exact), exact)
    varied = np.minimum(informative[upper[0]], informative[upper[1]]) >= min(min_groups, len(np.unique(independent)))
    family = table["status"].isin(["ok", "few_groups"]) & table["p"].notna() & varied
    few = table["n_both"] < min_count
    table.loc[table["status"].isin(["ok", "few_groups"]) & (few | ~varied), "status"] = "too_sparse"
    table["p"] = table["p"].where(family & ~few)
    table["q"] = np.where(table["p"].notna(), bh(table["p"].mask(family & few, 1.0).to_numpy(float)), np.nan)
    order = pd.DataFrame({"p": table["p"], "size": -table["npmi"].abs()})
    columns = [*table.columns[:11], "p", "q", "status", "n_groups"]
    table = table.loc[order.sort_values(["p", "size"], kind="stable").index, columns].reset_index(drop=True)
    table.attrs["biosae"] = {
        "strata": strata or (groups if repeated else ""), "n_strata": len(np.unique(cells)), "permute": permute,
        "m_tested": int(table["p"].notna().sum()), "m_family": int(family.sum()),
        "assume_independent": bool(assume_independent),
    }  # fmt: skip
    return table


def _exact(on: sp.csr_matrix, cells: np.ndarray, upper: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Exact p of every pair, (pairs,), for independent samples; NaN where both latents vary in very many of them."""
    from biosae.stats.tables import conditional_pvalue

    parts = [on[cells == c] for c in range(cells.max() + 1)]
    both = np.stack([np.asarray((part.T @ part).todense()).astype(int) for part in parts])
    size = [part.shape[0] for part in parts]
    alone = both.diagonal(axis1=1, axis2=2)
    least = np.minimum(alone, np.array(size)[:, None] - alone)  # the cell of a stratum takes at most this many values
    return np.array([
        conditional_pvalue(both[:, i, j], alone[:, i], alone[:, j], size)
        if np.minimum(least[:, i], least[:, j]).sum() <= MAX_EXACT else np.nan
        for i, j in zip(*upper)
    ])  # fmt: skip


def npmi(both: np.ndarray, n: int) -> np.ndarray:
    """Normalised pointwise mutual information of all pairs.

    Parameters
    ----------
    both
        Samples in which both latents of a pair fire (m, m); the diagonal holds those of each latent.
    n
        Samples in all.

    Returns
    -------
    ndarray
        (m, m) in [-1, 1]; -1 where two never fire together, NaN where one never fires or both always do.
    """
    p = np.asarray(both, np.float64) / n
    single = p.diagonal()
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.log(p / np.outer(single, single)) / -np.log(p)
    out = np.where((p == 0) & (np.outer(single, single) > 0), -1.0, out)
    return np.where(np.isfinite(out), np.clip(out, -1.0, 1.0), np.nan)


def _varied(adata: Any, on: sp.csr_matrix) -> list[str]:
    """The latents whose firing varies most: closest to half of the samples."""
    share = np.asarray(on.mean(axis=0)).ravel()
    order = np.argsort(-share * (1 - share), kind="stable")[:N_LATENTS]
    return list(adata.var_names[np.sort(order[(share * (1 - share))[order] > 0])])


def _within(cells: np.ndarray, groups: np.ndarray) -> bool:
    """True if every stratum lies within one group."""
    return len(np.unique(np.column_stack([cells, groups]), axis=0)) == len(np.unique(cells))


def _jaccard(both: np.ndarray) -> np.ndarray:
    either = both.diagonal()[:, None] + both.diagonal()[None, :] - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)


def _phi(both: np.ndarray, n: int) -> np.ndarray:
    single = both.diagonal() / n
    spread = np.sqrt(np.outer(single * (1 - single), single * (1 - single)))
    return np.divide(both / n - np.outer(single, single), spread, out=np.full(both.shape, np.nan), where=spread > 0)


def _conditional(on: sp.csr_matrix, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phi within strata and the odds ratio of Mantel and Haenszel, of all pairs (m, m)."""
    m = on.shape[1]
    cross, above, below = np.zeros((m, m)), np.zeros((m, m)), np.zeros((m, m))
    for k in np.unique(cells):
        part = on[cells == k]
        n, a = part.shape[0], np.asarray((part.T @ part).todense())
        single = a.diagonal()
        b, c = single[:, None] - a, single[None, :] - a
        cross += a - np.outer(single, single) / n
        above += a * (n - a - b - c) / n
        below += b * c / n
    spread = np.sqrt(np.outer(cross.diagonal(), cross.diagonal()))
    within = np.divide(cross, spread, out=np.full((m, m), np.nan), where=spread > 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        return within, np.where((above == 0) & (below == 0), np.nan, above / below)


def _groups_that_vary(X: np.ndarray, cells: np.ndarray, independent: np.ndarray) -> np.ndarray:
    """Independent groups with a stratum in which the latent fires in part of the samples, (m,)."""
    frame = pd.DataFrame(X)
    mean = frame.groupby(cells).transform("mean").to_numpy()
    mixed = (mean > 0) & (mean < 1)
    return pd.DataFrame(mixed).groupby(independent).any().to_numpy().sum(axis=0)
