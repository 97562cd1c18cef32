"""Everything that is known about confounding in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from biosae.stats.adjust import column_of, is_categorical
from biosae.stats.confounding import confounders, factor_columns
from biosae.stats.drop import performance_drop
from biosae.stats.nested import in_memory
from biosae.stats.pvca import pvca
from biosae.stats.readout import readout
from biosae.stats.removal import spurious_removal
from biosae.stats.robustness import clustering_score, robustness


def audit_confounders(
    adata: Any, *, biology: str | Sequence[str], technical: str | Sequence[str] | Mapping[str, Sequence[str]],
    groups: str = "patient", exclude: str | None = None, n_permutations: int = 999, alpha: float = 0.05,
    random_state: int = 0,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Variance shares, and what is gained by leaving out the latents flagged ``technical``, as one set of tables.

    The latents are flagged on all patients, so that the filtered sets are chosen with the patients they are judged on;
    for a claim, flag on one part (``adata[adata.obs["split"] == "train"]``) and give the names to the other functions.

    Parameters
    ----------
    adata
        Latents.
    biology, technical
        As in :func:`confounders`. Only labels enter the other tables, numbers are left to the variance shares.
    groups
        Column of independent groups.
    exclude
        Column within which samples are never neighbours; None takes ``groups``.
    n_permutations, alpha
        As in :func:`confounders`.

    Returns
    -------
    dict
        ``overlap`` (counts of groups by label and technical level), ``shares`` (:func:`confounders`), ``readout`` and
        ``robustness`` (before and after), ``clusters`` (:func:`clustering_score`), ``variance`` (:func:`pvca`, groups
        as a factor where they have several samples) and, for labels and factors of two values, ``drop``
        (:func:`performance_drop`) and, where embedding and decoder are in the table, ``removal``
        (:func:`spurious_removal`).

    Raises
    ------
    InputError
        If a column is absent.
    """
    adata = in_memory(adata)
    biology = [biology] if isinstance(biology, str) else list(biology)
    shares = confounders(
        adata, biology=biology, technical=technical, groups=groups, n_permutations=n_permutations, alpha=alpha,
        random_state=random_state,
    )  # fmt: skip
    flagged = list(dict.fromkeys(shares.loc[shares["flag"] == "technical", "latent"]))
    columns = [c for held in factor_columns(technical).values() for c in held]
    labels, levels = (
        [c for c in dict.fromkeys(map(column_of, names)) if is_categorical(adata.obs[c])]
        for names in (biology, columns)
    )
    of = {"without": flagged, "random_state": random_state}
    out = {"overlap": _counts(shares.attrs["overlap"]), "shares": shares}
    if labels or levels:
        out["readout"] = readout(adata, levels + labels, groups=groups, **of)
    exclude = groups if exclude is None else exclude
    pairs = [(b, t) for b in labels for t in levels]
    if pairs:
        near = [robustness(adata, biology=b, technical=t, exclude=exclude, **of) for b, t in pairs]
        out["robustness"] = _stacked(near)
        clusters = [clustering_score(adata, biology=b, technical=t, groups=groups, **of) for b, t in pairs]
        out["clusters"] = _stacked([c.assign(biology=b, technical=t) for c, (b, t) in zip(clusters, pairs)])
    several = groups in adata.obs and adata.obs[groups].nunique() < adata.n_obs
    if labels or levels:
        factors = list(dict.fromkeys(labels + levels + [groups] * several))
        out["variance"] = pvca(adata, factors, without=flagged)
    twofold = [(b, t) for b, t in pairs if adata.obs[b].nunique() == adata.obs[t].nunique() == 2]
    if twofold and groups in adata.obs:
        out["drop"] = _stacked([performance_drop(adata, b, t, groups=groups, **of) for b, t in twofold])
        if "embedding" in adata.obsm and "decoder" in adata.varm:
            out["removal"] = _stacked(
                [spurious_removal(adata, b, t, groups=groups, random_state=random_state) for b, t in twofold]
            )
    return out


def _stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
    for table in tables:
        table.attrs = {}
    return pd.concat(tables, ignore_index=True)


def _counts(overlap: Mapping[str, Any]) -> pd.DataFrame:
    rows = [
        {"factor": factor, "table": name, "level": level, "label": label, "n": n, "separable": found["separable"]}
        for factor, tables in overlap.items()
        for name, found in tables.items()
        for level, row in found["counts"].items()
        for label, n in row.items()
    ]
    return pd.DataFrame(rows)
