"""One target, pooled and within every stratum, side by side: does the association survive inside each site?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.stats.association import associate


def within_strata(
    adata: Any, target: str, *, strata: str, unit: str, latents: Sequence[str] | None = None, controls: bool = False,
    **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """Estimates over all rows, within each stratum, and combined over strata.

    Parameters
    ----------
    adata
        Latents.
    target
        Column of ``obs``.
    strata
        Column of ``obs`` (site, source, section).
    unit, options
        As for :func:`associate` (``method``, ``groups``, ``assume_independent``, ...).
    latents
        Names of latents to keep; None keeps all. Columns are chosen before testing, so ``q`` counts these only.
    controls
        True adds raw dimensions and components.

    Returns
    -------
    DataFrame
        Columns of :func:`associate` after ``stratum``: ``pooled`` (all rows), ``within`` (strata combined, fixed
        effect) and the value of each stratum; heterogeneity columns are filled for ``within``. A stratum in which the
        label is constant is a row with status ``one_class``.

    Raises
    ------
    InputError
        If a latent or column is unknown.
    """
    if latents is not None:
        unknown = [name for name in latents if name not in adata.var_names]
        if unknown:
            raise InputError(f"no latent {unknown[0]!r}; latents are {adata.var_names[0]} to {adata.var_names[-1]}")
        adata = adata[:, list(latents)]
    if strata not in adata.obs:
        raise InputError(f"{strata!r} is not a column of obs")
    method = options.pop("method", "auto")
    pooled = associate(adata, target, unit=unit, method=method, controls=controls, **options)
    if method == "auto":
        method = str(pooled["method"].iloc[0])
    how = {"unit": unit, "method": method, "controls": controls, **options}
    parts = [("pooled", pooled)]
    if method in ("pearson", "spearman", "auroc", "wilcoxon"):
        parts.append(("within", associate(adata, target, strata=strata, **how)))
    values = adata.obs[strata].astype("string")
    for value in sorted(values.dropna().unique()):
        part = adata[(values == value).to_numpy(bool, na_value=False)]
        column = part.obs[target]
        if column.nunique(dropna=True) < 2 or len(part) < 3:
            table = pooled.copy()
            empty = ["estimate", "ci_low", "ci_high", "statistic", "p", "q", "p_maxt"]
            table[[c for c in empty if c in table]] = np.nan
            table["status"], table["inference"] = ("one_class" if column.nunique() < 2 else "too_small"), ""
            table["n_samples"] = int(column.notna().sum())
            table["n_units"] = (
                table["n_samples"] if unit == "sample" else int(part.obs.loc[column.notna(), unit].nunique())
            )
            groups = options.get("groups", "patient")
            known = groups in part.obs and not options.get("assume_independent", False)
            independent = int(part.obs.loc[column.notna(), groups].nunique()) if known else table["n_units"]
            table["n_groups"] = np.minimum(independent, table["n_units"])
        else:
            own = how
            if column.nunique() == 2 and method == "kruskal":
                own = {**how, "method": "auto"}
            table = associate(part, target, **own)
        parts.append((str(value), table))
    out = pd.concat([t.assign(stratum=name) for name, t in parts], ignore_index=True)
    out.insert(0, "stratum", out.pop("stratum"))
    out.attrs = {"biosae": {"strata": strata, **pooled.attrs["biosae"]}}
    return out
