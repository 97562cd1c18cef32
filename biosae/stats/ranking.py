"""Which rows of an association table come first, and the best of each source for each target."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biosae.errors import StatisticsError
from biosae.stats.methods import EFFECT_NULL
from biosae.stats.status import TESTED

_RATIOS = ("odds_ratio", "rate_ratio", "hazard_ratio", "cumulative_odds_ratio")


def strength(table: pd.DataFrame) -> pd.Series:
    """Signed distance of each estimate from no effect: ``estimate - null``, ratios on the log scale.

    Parameters
    ----------
    table
        Rows of :func:`biosae.stats.associate`: columns ``estimate, effect``.
    """
    null = table["effect"].map(EFFECT_NULL).fillna(0.0).astype(float)
    estimate = pd.to_numeric(table["estimate"], errors="coerce")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(table["effect"].isin(_RATIOS), np.log(estimate), estimate - null)
    return pd.Series(value, index=table.index)


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that can stand for their target and source, the strongest evidence first.

    Tested rows (status ``ok`` or ``few_groups``) come by p-value, then by ``|strength| sqrt(n_units)`` (slopes by
    their statistic). Where nothing of a target and source could be tested for want of independent groups, its
    estimates stand in by ``|strength| sqrt(n_units)``. The size of an effect alone does not decide: among thousands
    of latents the largest estimates are those of the rarest ones.

    Parameters
    ----------
    table
        Table of :func:`biosae.stats.associate`.
    """
    known = table["estimate"].notna()
    tested = table["status"].isin(TESTED) & known
    key = table["target"].astype(str) + "\0" + table["source"].astype(str)
    alone = ~tested.groupby(key).transform("any")
    rows = table[tested | (alone & (table["status"] == "too_few_groups") & known)]
    weight = (strength(rows).abs() * np.sqrt(rows["n_units"].astype(float))).replace(np.inf, np.finfo(float).max)
    slope = rows["effect"] == "slope"  # in units of the latent, so that the smallest scale would come first
    if slope.any():
        weight = weight.where(~slope, rows["statistic"].astype(float).abs().fillna(0.0))
    order = pd.DataFrame({"p": rows["p"].astype(float).fillna(1.0), "weight": -weight})
    return rows.loc[order.sort_values(["p", "weight"], kind="stable").index]


def summary(result: pd.DataFrame) -> pd.DataFrame:
    """The best feature of each source for each target: what the latents add to the raw embedding and its PCA.

    Parameters
    ----------
    result
        Table of :func:`biosae.stats.associate`.

    Returns
    -------
    DataFrame
        One row a (target, source): the first of :func:`ranked`, or a row without a name where there is none.
        ``n_tested``: the size of that family. The best of many is biased upwards;
        :func:`biosae.stats.replicate` estimates it on other rows.

    Raises
    ------
    StatisticsError
        If the table has no rows.
    """
    if len(result) == 0:
        raise StatisticsError("the table of associations is empty")
    rows = []
    for _, part in result.groupby(["target", "source"], sort=False):
        first = ranked(part).head(1)
        if first.empty:
            first = part.head(1).copy()
            first[["latent"]] = ""
            first[["estimate", "ci_low", "ci_high", "statistic", "p", "q"]] = np.nan
        rows.append(first.assign(n_tested=int(part["p"].notna().sum())))
    return pd.concat(rows, ignore_index=True)
