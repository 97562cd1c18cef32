"""What the largest statistic of all latents looks like where there is no association: the draws behind ``p_maxt``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.stats.association import associate
from biosae.stats.permutation import Watch, watched


def permutation_null(
    adata: Any, targets: str | Sequence[str], *, unit: str, n_permutations: int = 999, controls: bool = False,
    **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """Largest absolute statistic over all tested latents in every permutation, and that of the data as they are.

    Parameters
    ----------
    adata, targets, unit, controls, options
        As for :func:`associate`.
    n_permutations
        Draws; where there are few arrangements all of them are listed.

    Returns
    -------
    DataFrame
        ``target, source, latent`` (the one with the largest statistic), ``observed`` (its statistic), ``draw`` (the
        largest absolute statistic of all latents in one permutation), ``n_units, n_groups, scheme``: a row a draw.
        Statistics are those that are compared, on one scale for all latents. Draw it with :func:`biosae.pl.null`.

    Raises
    ------
    InputError
        If nothing was permuted: ``n_permutations`` is 0, or no latent could be tested.
    StatisticsError
        As :func:`associate`.
    """
    with watched() as watch:
        result = associate(adata, targets, unit=unit, n_permutations=n_permutations, controls=controls, **options)
    return null_table(result, watch)


def null_table(result: pd.DataFrame, watch: Watch) -> pd.DataFrame:
    """The draws that were kept while ``result`` was made, one row each."""
    parts = []
    for (target, source), largest in watch.largest.items():
        rows = result[(result["target"] == target) & (result["source"] == source)]
        observed = watch.observed[target, source]
        best = int(np.nanargmax(np.abs(observed)))
        first = rows.iloc[best]
        parts.append(pd.DataFrame({
            "target": target, "source": source, "latent": first["latent"], "observed": observed[best], "draw": largest,
            "n_units": first["n_units"], "n_groups": first["n_groups"],
            "scheme": str(first["inference"]).split("max-T: ")[-1].split(";")[0],
        }))  # fmt: skip
    if not parts:
        raise InputError("nothing was permuted: give n_permutations, and see the status column of associate")
    return pd.concat(parts, ignore_index=True)
