"""Where decoder directions lie: rows labelled by what excites them, and how well the labels part them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest


def label_rows(
    adata: Any,
    concept: str,
    *,
    n_top: int = 50,
    min_fold: float = 2.0,
    max_q: float = 0.05,
    groups: str = "patient",
    assume_independent: bool = False,
) -> pd.DataFrame:
    """The class that is most enriched among the samples that excite each latent most.

    Parameters
    ----------
    adata
        Latents (n, m).
    concept
        Column of ``obs`` with classes; rows without one are left out.
    n_top
        Samples with the largest positive codes (fewer where it fires in fewer; ties at the last place go by row).
    min_fold
        Smallest share of the class among the top samples over its share among all.
    max_q
        Largest q.
    groups, assume_independent
        As in :func:`biosae.stats.associate`.

    Returns
    -------
    DataFrame
        Index ``latent``: ``concept`` (the class with the largest fold), ``fold, share_top, share_all, n_top, p, q``
        (Benjamini-Hochberg over all latents and classes), ``status, labelled``.

    Raises
    ------
    InputError
        For an unknown column, or fewer than two classes.
    StatisticsError
        If independence is unknown.

    Notes
    -----
    Tested is whether top samples and samples of the class go together (``method="fisher"``: odds ratio; p by samples as
    units and ``groups`` as independent). With few patients nothing is labelled, however large the fold.
    """
    import anndata

    from biosae.stats import associate
    from biosae.stats.nested import in_memory

    if concept not in adata.obs:
        raise InputError(f"obs has no column {concept!r}; {nearest(concept, list(adata.obs.columns))}")
    known = adata.obs[concept].notna().to_numpy()
    values = adata.obs[concept][known].astype(str).to_numpy()
    classes = sorted(set(values))
    if len(classes) < 2:
        raise InputError(f"{concept!r} has {len(classes)} classes; a label of decoder rows needs two")
    top = top_samples(sp.csr_matrix(in_memory(adata).X)[known], n_top)
    size = np.asarray(top.sum(axis=0)).ravel()
    member = np.column_stack([values == c for c in classes]).astype(np.float64)
    share_all = member.mean(axis=0)
    share_top = np.divide(
        top.T @ member, size[:, None], out=np.full((adata.n_vars, len(classes)), np.nan), where=size[:, None] > 0
    )
    fold = share_top / share_all
    obs = pd.DataFrame({f"class{i}": pd.array(member[:, i] == 1) for i in range(len(classes))})
    obs.index = adata.obs.index[known]
    if groups in adata.obs:
        obs[groups] = adata.obs[groups].to_numpy()[known]
    tests = associate(
        anndata.AnnData(X=top, obs=obs, var=pd.DataFrame(index=adata.var_names)), [f"class{i}" for i in
        range(len(classes))], unit="sample", method="fisher", controls=False, groups=groups, min_active=min(10, n_top),
        assume_independent=assume_independent,
    )  # fmt: skip
    p, q, status = (tests[c].to_numpy().reshape(len(classes), -1).T for c in ("p", "q", "status"))
    best = np.where(np.isnan(fold), -1.0, fold).argmax(axis=1)
    rows = np.arange(adata.n_vars)
    table = pd.DataFrame({
        "concept": np.array(classes, dtype=object)[best], "fold": fold[rows, best], "share_top": share_top[rows, best],
        "share_all": share_all[best], "n_top": size.astype(int), "p": p[rows, best].astype(float),
        "q": q[rows, best].astype(float), "status": status[rows, best],
    }, index=pd.Index(adata.var_names, name="latent"))  # fmt: skip
    table["labelled"] = (table["fold"] >= min_fold) & (table["q"] <= max_q)
    return table


def top_samples(X: Any, n_top: int) -> sp.csr_matrix:
    """1 where a sample is among the ``n_top`` with the largest positive codes of a latent, CSR (n, m)."""
    columns = sp.csc_matrix(X)
    parts = []
    for j in range(columns.shape[1]):
        at = slice(columns.indptr[j], columns.indptr[j + 1])
        rows, values = columns.indices[at], columns.data[at]
        rows, values = rows[values > 0], values[values > 0]
        parts.append(rows[np.lexsort((rows, -values))[:n_top]])
    place = np.concatenate(parts) if parts else np.empty(0, int)
    column = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    return sp.csr_matrix((np.ones(len(place)), (place, column)), shape=columns.shape)


def cosine_silhouette(
    rows: Any, labels: Any, *, collapse: float | None = 0.95, n_permutations: int = 999, random_state: int = 0
) -> dict[str, Any]:
    """Mean silhouette of labelled directions by cosine distance, against labels put at random.

    Parameters
    ----------
    rows
        Directions (m, d), such as ``varm["decoder"]``.
    labels
        Of each row; missing or empty means unlabelled.
    collapse
        Of labelled rows more alike than this cosine only the first is kept, so that copies of one direction do not
        count as a cluster. None keeps all.
    n_permutations
        Draws of the null.
    random_state
        Its seed.

    Returns
    -------
    dict
        ``silhouette, p, null_mean, null_sd, by_label`` (mean of each label), ``n_rows`` (that entered),
        ``n_collapsed``, ``share_unlabelled, status`` (``ok``, or ``too_few`` where fewer than 3 rows or 2 labels are
        left, or every row has a label of its own: all numbers NaN).

    Raises
    ------
    InputError
        If the sizes do not fit.

    Notes
    -----
    Rousseeuw (1987): ``s = (b - a) / max(a, b)``, a the mean distance to rows of the same label, b the smallest mean
    distance to those of another; 0 for a row alone in its label. ``p = (1 + #{s_b >= s}) / (B + 1)``. The null says
    that labels are put on directions at random; since near directions fire together and so are labelled alike, a small
    p says that labels follow directions, not that the dictionary found concepts.
    """
    D = np.asarray(rows, np.float64)
    names = pd.Series(np.asarray(labels, dtype=object))
    if D.ndim != 2 or len(D) != len(names):
        raise InputError(f"rows have shape {D.shape} and there are {len(names)} labels; give one label a row")
    norm = np.linalg.norm(D, axis=1)
    wanted = (names.notna() & (names.astype(str) != "")).to_numpy() & (norm > 0)
    out: dict[str, Any] = {"share_unlabelled": float(1 - wanted.mean()) if len(names) else np.nan}
    unit = D[wanted] / norm[wanted, None]
    keep = _distinct(unit, collapse)
    codes, classes = pd.factorize(names[wanted].astype(str).to_numpy()[keep], sort=True)
    out |= {"n_rows": len(keep), "n_collapsed": int(wanted.sum()) - len(keep)}
    n, k = len(codes), len(classes)
    if n < 3 or k < 2 or k == n:
        return (
            out
            | dict.fromkeys(("silhouette", "p", "null_mean", "null_sd"), np.nan)
            | {"by_label": {}, "status": "too_few"}
        )
    distance = np.clip(1.0 - unit[keep] @ unit[keep].T, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    each = _silhouettes(distance, codes, k)
    rng = np.random.default_rng(random_state)
    null = np.array([_silhouettes(distance, rng.permutation(codes), k).mean() for _ in range(n_permutations)])
    observed = float(each.mean())
    return out | {
        "silhouette": observed, "p": float((1 + (null >= observed - 1e-12).sum()) / (n_permutations + 1)),
        "null_mean": float(null.mean()) if n_permutations else np.nan,
        "null_sd": float(null.std()) if n_permutations else np.nan,
        "by_label": {str(c): float(each[codes == i].mean()) for i, c in enumerate(classes)}, "status": "ok",
    }  # fmt: skip


def decoder_geometry(
    adata: Any,
    concept: str,
    *,
    collapse: float | None = 0.95,
    n_permutations: int = 999,
    umap: bool = True,
    n_neighbors: int = 15,
    random_state: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Label the decoder's rows by enrichment, and ask whether rows of one label lie together.

    Parameters
    ----------
    adata
        Latents with ``varm["decoder"]`` (m, d). Written to: ``var["concept"]`` (empty where unlabelled),
        ``var["concept_fold"]``, ``var["concept_q"]``, and ``varm["X_umap"]`` (m, 2; NaN for latents that never fire).
    concept
        Column of ``obs`` with classes.
    collapse, n_permutations, random_state
        As in :func:`cosine_silhouette`.
    umap
        Also lay out the rows by cosine distance in two dimensions, for display; no number is taken from it.
    n_neighbors
        Of the layout.
    options
        ``n_top, min_fold, max_q, groups, assume_independent`` of :func:`label_rows`.

    Returns
    -------
    dict
        That of :func:`cosine_silhouette`, with ``n_labels`` (labelled rows of each class).

    Raises
    ------
    InputError
        If there is no decoder, or as :func:`label_rows`.
    """
    if "decoder" not in adata.varm:
        raise InputError("varm has no 'decoder'; encode with biosae.encode, which puts it there")
    table = label_rows(adata, concept, **options)
    names = table["concept"].where(table["labelled"], "")
    adata.var["concept"] = names.astype(str).to_numpy()
    adata.var["concept_fold"], adata.var["concept_q"] = table["fold"].to_numpy(), table["q"].to_numpy()
    decoder = np.asarray(adata.varm["decoder"], np.float64)
    out = cosine_silhouette(decoder, names, collapse=collapse, n_permutations=n_permutations, random_state=random_state)
    out["n_labels"] = {str(c): int(n) for c, n in names[names != ""].value_counts().items()}
    if umap:
        import scanpy as sc

        from biosae.search.cluster import exact_graph
        from biosae.stats.nested import in_memory

        fires = np.diff(sp.csc_matrix(in_memory(adata).X != 0).indptr) > 0
        fires &= np.abs(decoder).sum(axis=1) > 0
        adata.varm["X_umap"] = np.full((adata.n_vars, 2), np.nan)
        if fires.sum() > n_neighbors:
            graph = exact_graph(decoder[fires], n_neighbors=n_neighbors, metric="cosine", random_state=random_state)
            sc.tl.umap(graph, random_state=random_state)
            adata.varm["X_umap"][fires] = graph.obsm["X_umap"]
    return out


def _distinct(unit: np.ndarray, collapse: float | None) -> np.ndarray:
    """Rows that are no near copy of an earlier one that is kept."""
    if collapse is None:
        return np.arange(len(unit))
    kept: list[int] = []
    for i, row in enumerate(unit):
        if not kept or (unit[kept] @ row).max() <= collapse:
            kept.append(i)
    return np.array(kept, int)


def _silhouettes(distance: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
    size = np.bincount(codes, minlength=k).astype(np.float64)
    member = np.zeros((len(codes), k))
    member[np.arange(len(codes)), codes] = 1.0
    total = distance @ member
    own = total[np.arange(len(codes)), codes] / np.maximum(size[codes] - 1, 1)
    other = total / size
    other[np.arange(len(codes)), codes] = np.inf
    other = other.min(axis=1)
    larger = np.maximum(own, other)
    s = np.divide(other - own, larger, out=np.zeros(len(codes)), where=larger > 0)
    return np.where(size[codes] > 1, s, 0.0)
