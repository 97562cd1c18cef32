"""Discovery against replication: does an effect come back in other patients, with its sign and its size?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import results, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def replication(
    table: pd.DataFrame, *, source: str | None = "latent", n_labels: int = 6, ax: Axes | None = None
) -> Axes:
    """Effect found in the discovery part against the effect in the replication part, with its interval.

    On the diagonal an effect came back in full. As the discovery part chose, its effects are too large and dots lie
    below the diagonal even where everything is real. Filled dots replicated (Holm p below 0.05, same sign).

    Parameters
    ----------
    table : DataFrame
        Table of :func:`biosae.stats.replicate`.
    source : str, optional
        ``"latent"``, ``"raw"``, ``"pca"``, or None for all.
    n_labels : int
        How many dots are named, those with the smallest p of replication first.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column is absent or no effect was estimated in both parts.
    """
    needed = {"target", "source", "latent", "estimate_discovery", "estimate_replication", "effect"}
    if missing := needed - set(table.columns):
        raise InputError(
            f"the table has no column {', '.join(map(repr, sorted(missing)))}; pass the table of stats.replicate"
        )
    rows = table if source is None else table[table["source"].astype(str) == source]
    rows = rows.dropna(subset=["estimate_discovery", "estimate_replication"])
    if rows.empty:
        raise InputError(f"no effect of source {source!r} was estimated in both parts; the status columns say why")
    x, y = (rows[f"estimate_{part}"].to_numpy(float) for part in ("discovery", "replication"))
    known = rows["replicated"] if "replicated" in rows else pd.Series(pd.NA, index=rows.index)
    replicated = known.astype("boolean").fillna(False).to_numpy(bool)
    with style.paper():
        ax = style.axes(ax, (3.3, 3.2))
        colours = [style.SOURCE_COLOURS.get(str(s), style.INK) for s in rows["source"]]
        for i, colour in enumerate(colours):
            low, high = (rows.get(c, pd.Series(np.nan, index=rows.index)).iloc[i] for c in ("ci_low", "ci_high"))
            if np.isfinite(low) and np.isfinite(high):
                ax.plot([x[i], x[i]], [low, high], color=colour, linewidth=0.9, alpha=0.6, zorder=1)
        ax.scatter(
            x, y, s=22, zorder=2, linewidths=1.1, edgecolors=colours,
            facecolors=[c if r else "white" for c, r in zip(colours, replicated)],
        )  # fmt: skip
        null = {results.null_value(e) for e in rows["effect"]}
        ends = [min(x.min(), y.min(), *null), max(x.max(), y.max(), *null)]
        ax.plot(ends, ends, color=style.MUTED, linewidth=0.8, zorder=0)
        for value in null if len(null) == 1 else ():
            ax.axhline(value, color=style.MUTED, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
            ax.axvline(value, color=style.MUTED, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        order = rows["p_replication"].astype(float).fillna(1.0).to_numpy() if "p_replication" in rows else -np.abs(y)
        one = len(set(rows["target"])) == 1
        names = [f"{f}" if one else f"{t} ({f})" for t, f in zip(rows["target"], rows["latent"])]
        named = np.argsort(order, kind="stable")[:n_labels]
        items = [(x[i], y[i], names[i]) for i in named]
        style.name_beside(ax, items, x=x, y=y, rightward=True)
        effect = results.effect_label(rows["effect"])
        ax.set_xlabel(f"discovery ({effect})")
        ax.set_ylabel(f"replication ({effect})")
        ax.set_title(style.wrap(_counts(rows, x, y, replicated), width=52))
    return ax


def _counts(rows: pd.DataFrame, x: np.ndarray, y: np.ndarray, replicated: np.ndarray) -> str:
    zero = rows["effect"].map(results.null_value).to_numpy(float)
    same = int((np.sign(x - zero) == np.sign(y - zero)).sum())
    text = f"{style.count(len(rows), 'effect')}, {same} of the same sign, {int(replicated.sum())} replicated"
    if {"n_units_discovery", "n_units_replication"} <= set(rows):
        n = [f"{int(rows[f'n_units_{part}'].max()):,}" for part in ("discovery", "replication")]
        text += f"; n = {n[0]} and {n[1]} units"
    return text
