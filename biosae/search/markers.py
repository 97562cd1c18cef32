"""Which latents tell clusters apart, in the slots of ``scanpy.tl.rank_genes_groups``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.search.cluster import made_by_cluster

TINY = 1e-9
"""Added to means before their ratio is taken, as scanpy does."""


def rank_latents(
    adata: Any, by: str, *, groups: str = "patient", assume_independent: bool = False, min_samples: int = 3
) -> pd.DataFrame:
    """Latents of every cluster (or class) against all other samples, ranked.

    Parameters
    ----------
    adata
        Latents (n, m). ``uns["rank_genes_groups"]`` is written.
    by
        Column of ``obs``: clusters of :func:`cluster`, or classes that came from elsewhere.
    groups
        Column of independent groups, for p.
    assume_independent
        Samples are independent: said aloud where no column of groups is known.
    min_samples
        Clusters with fewer samples are not ranked.

    Returns
    -------
    DataFrame
        One row a (cluster, latent), the highest first: ``cluster, latent, score`` (Cliff's delta, 2 AUROC - 1, of the
        cluster against the rest), ``log2_fold_change`` (of mean codes; NaN where codes are negative), ``share``,
        ``share_rest`` (of samples in which it fires), ``p, q, status, n_samples, n_groups``.

    Raises
    ------
    InputError
        If ``by`` is no column or has fewer than two classes.
    StatisticsError
        If independence is unknown and a p is asked for.

    Notes
    -----
    Clusters that were made from a latent differ in it by construction, so that a p of that difference would be small in
    pure noise too: such rows have no p and the status ``circular``. Seen are clusters of :func:`cluster`, of scanpy's
    Leiden, and columns that only rename them; clusters that were merged or redrawn by hand are not recognised, and p
    of those means nothing. All others are tested by
    :func:`biosae.stats.associate` (``method="auroc"``, samples as units, patients as groups), and q is over all of
    them. ``scanpy.get.rank_genes_groups_df`` and ``scanpy.pl.rank_genes_groups`` read the slots.
    """
    import anndata

    from biosae.stats import associate, bh
    from biosae.stats.nested import in_memory

    if by not in adata.obs:
        raise InputError(f"obs has no column {by!r}; {nearest(by, list(adata.obs.columns))}")
    values = adata.obs[by].astype(object)
    counts = adata.obs[by].value_counts(sort=False)
    levels = [level for level in _in_order(adata.obs[by]) if counts[level] >= min_samples]
    if len(levels) < 1 or adata.obs[by].nunique() < 2:
        raise InputError(f"{by!r} has {adata.obs[by].nunique()} classes; there is nothing to compare")
    circular = _made_from(adata, by)
    X = sp.csr_matrix(in_memory(adata).X)
    if not X.data.all():  # stored zeros are not codes
        X = X.copy()
        X.eliminate_zeros()
    obs = pd.DataFrame({str(level): pd.array(values == level, "boolean") for level in levels}, index=adata.obs.index)
    obs[values.isna().to_numpy()] = pd.NA
    targets = {f"cluster={level}": str(level) for level in levels}
    obs = obs.rename(columns={level: target for target, level in targets.items()})
    known = groups in adata.obs
    if known:
        obs[groups] = adata.obs[groups].to_numpy()
    table = associate(
        anndata.AnnData(X=X, obs=obs, var=pd.DataFrame(index=adata.var_names)), list(targets), unit="sample",
        method="auroc", controls=False, groups=groups,
        assume_independent=assume_independent or (not known and bool(circular.all())),
    )  # fmt: skip
    table["circular"] = table["latent"].isin(adata.var_names[circular])
    table["cluster"] = table["target"].map(targets)
    table.loc[table["circular"], "p"] = np.nan
    table.loc[table["circular"] & ~table["status"].isin(["dead", "constant", "one_class"]), "status"] = "circular"
    table["q"] = bh(table["p"].to_numpy())
    table["score"] = 2.0 * table["estimate"] - 1.0
    place = adata.var_names.get_indexer(table["latent"])
    for name in ("share", "share_rest", "log2_fold_change"):
        table[name] = np.nan
    for level in levels:
        inside, known_rows = (values == level).to_numpy(), values.notna().to_numpy()
        rest = known_rows & ~inside
        rows = (table["cluster"] == str(level)).to_numpy()
        for name, part in (("share", inside), ("share_rest", rest)):
            table.loc[rows, name] = (np.diff(X[part].tocsc().indptr) / part.sum())[place[rows]]
        means = [np.asarray(X[part].mean(axis=0, dtype=np.float64)).ravel() for part in (inside, rest)]
        with np.errstate(invalid="ignore", divide="ignore"):
            fold = np.log2((means[0] + TINY) / (means[1] + TINY))
        table.loc[rows, "log2_fold_change"] = fold[place[rows]]
    if X.data.min(initial=0) < 0:
        table["log2_fold_change"] = np.nan
    columns = [
        "cluster", "latent", "score", "log2_fold_change", "share", "share_rest", "p", "q", "status", "n_samples",
        "n_groups",
    ]  # fmt: skip
    order = {str(level): i for i, level in enumerate(levels)}
    table = table[columns].sort_values(
        ["cluster", "score"], key=lambda c: c.map(order) if c.name == "cluster" else -c, kind="stable"
    )
    table = table.reset_index(drop=True)
    adata.uns["rank_genes_groups"] = _slots(table, by, list(order))
    return table


def _slots(table: pd.DataFrame, by: str, levels: list[str]) -> dict[str, Any]:
    """Record arrays with one field a cluster, as scanpy writes them."""
    parts = {level: table[table["cluster"] == level] for level in levels}
    out: dict[str, Any] = {"params": {
        "groupby": by, "reference": "rest", "method": "auroc", "use_raw": False, "layer": None,
        "corr_method": "benjamini-hochberg",
    }}  # fmt: skip
    for slot, column, kind in (
        ("names", "latent", "O"), ("scores", "score", "f4"), ("logfoldchanges", "log2_fold_change", "f4"),
        ("pvals", "p", "f8"), ("pvals_adj", "q", "f8"),
    ):  # fmt: skip
        rows = list(zip(*(parts[level][column].to_numpy() for level in levels)))
        out[slot] = np.array(rows, dtype=[(level, kind) for level in levels]).view(np.recarray)
    for slot, column in (("pts", "share"), ("pts_rest", "share_rest")):
        out[slot] = pd.DataFrame({level: part.set_index("latent")[column] for level, part in parts.items()})
    return out


def _in_order(column: pd.Series) -> list[Any]:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return [level for level in column.cat.categories if (column == level).any()]
    return sorted(column.dropna().unique(), key=str)


def _made_from(adata: Any, by: str) -> np.ndarray:
    """Latents (m,) that the classes were made from: those of the clusters that they are, or are other names of."""
    out = np.zeros(adata.n_vars, bool)
    codes = pd.factorize(adata.obs[by])[0]
    for name in adata.obs.columns:
        if made_by_cluster(adata, name) and (name == by or same_classes(codes, pd.factorize(adata.obs[name])[0])):
            used = adata.uns[name]["params"].get("latents", "all")
            out |= (isinstance(used, str) and used == "all") or adata.var_names.isin(np.atleast_1d(used))
    return out


def same_classes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings are the same but for the names of classes."""
    return len(set(zip(a, b))) == len(set(a)) == len(set(b))
