"""Forest plot: one effect pooled over everything, combined over strata, and in each stratum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import style
from biosae.pl.associations import finish, interval, line_positions, n_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "pooled": "pooled", "within": "within strata", "fixed": "sites, fixed effect", "random": "sites, random effects",
    "combined": "held-out sites together",
}  # fmt: skip
_COMBINED = ("within", "fixed", "random", "combined")


def forest(table: pd.DataFrame, *, target: str | None = None, ax: Axes | None = None) -> Axes:
    """The same latent and target pooled over everything, within strata of a confounder, and in each stratum.

    An association that shrinks to nothing within strata was carried by the confounder. The diamond spans the interval
    of the combined estimate; the area of a stratum's square goes with its number of units.

    Parameters
    ----------
    table : DataFrame
        Columns ``latent, target, stratum, estimate`` and, where known, ``ci_low, ci_high, n_units, i2,
        p_heterogeneity``, as :func:`biosae.stats.within_strata` gives them. ``stratum`` is ``"pooled"``,
        ``"within"``, or the name of one stratum. Also the tables of :func:`biosae.stats.by_site` and
        :func:`biosae.stats.leave_one_site_out`, whose column is ``site``; rows without an estimate are left out.
    target : str, optional
        Only the rows of this target.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column is absent or no row is left.
    """
    if "stratum" not in table and "site" in table:
        table = table.rename(columns={"site": "stratum"}).dropna(subset="estimate")
    missing = {"latent", "target", "stratum", "estimate"} - set(table.columns)
    if missing:
        raise InputError(f"the table has no column {', '.join(map(repr, sorted(missing)))}")
    rows = table if target is None else table[table["target"].astype(str) == target]
    if rows.empty:
        raise InputError(f"no rows with target {target!r} in the table of strata")
    rows = rows.reset_index(drop=True)
    rank = rows["stratum"].astype(str).map({name: i for i, name in enumerate(_NAMES)}).fillna(len(_NAMES))
    groups = (rows["target"].astype(str) + ": " + rows["latent"].astype(str)).rename("group")
    chosen = bool((rows["stratum"] == "combined").any())  # each site may have a latent of its own
    if chosen:
        groups = rows["target"].astype(str).rename("group")
    order = pd.DataFrame({"g": pd.factorize(groups)[0], "r": rank}).sort_values(["g", "r"], kind="stable").index
    rows, groups = rows.loc[order], groups.loc[order].tolist()
    stratum = rows["stratum"].astype(str)
    names = [
        style.wrap((_NAMES.get(s) or f"only {s}" + f": {row['latent']}" * chosen) + n_of(row), width=32)
        for s, (_, row) in zip(stratum, rows.iterrows())
    ]
    places, marks = line_positions(groups, header=True, heights=[0.35 + 0.65 * len(n.splitlines()) for n in names])
    most = pd.to_numeric(rows.loc[~stratum.isin(_NAMES), "n_units"]).max() if "n_units" in rows else np.nan
    with style.paper():
        ax = style.axes(ax, (3.8, 0.55 + 0.19 * (max(places) + 1)))
        for place, kind, (_, row) in zip(places, stratum, rows.iterrows()):
            if kind in _COMBINED:
                _diamond(ax, row, place)
            elif kind == "pooled":
                interval(ax, row, place, colour=style.INK, marker="o", filled=True)
            else:
                share = row["n_units"] / most if np.isfinite(most) and most > 0 else 0.5
                interval(
                    ax, row, place, colour=style.PALETTE["sky"], marker="s", filled=True, size=2.5 + 4 * np.sqrt(share)
                )
        finish(ax, rows, places, names, marks)
        if said := _heterogeneity(rows[stratum.isin(("within", "combined"))]):
            ax.set_title(style.wrap(said, width=56))
    return ax


def _diamond(ax: Axes, row: pd.Series, place: float) -> None:
    low, high, middle = row.get("ci_low", np.nan), row.get("ci_high", np.nan), row["estimate"]
    if not (np.isfinite(low) and np.isfinite(high)):
        interval(ax, row, place, colour=style.PALETTE["blue"], marker="D", filled=True)
        return
    x, y = [low, middle, high, middle], [place, place - 0.32, place, place + 0.32]
    ax.fill(x, y, color=style.PALETTE["blue"], linewidth=0)
    ax.update_datalim([(low, place), (high, place)])


def _heterogeneity(within: pd.DataFrame) -> str:
    """I2 and the p of Cochran's Q of a single combined estimate, or of several as a range."""
    if "i2" not in within or within["i2"].dropna().empty:
        return ""
    i2, p = within["i2"].dropna(), within["p_heterogeneity"].dropna()
    if len(i2) == 1:
        return f"heterogeneity over strata: I² = {i2.iloc[0]:.0%}, p = {style.p_value(float(p.iloc[0]))}"
    return f"heterogeneity over strata: I² from {i2.min():.0%} to {i2.max():.0%}"
