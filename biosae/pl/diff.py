"""Differences of two cohorts, and pairs of latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def diff(table: pd.DataFrame, *, n: int = 12, alpha: float = 0.05, fig: Figure | None = None) -> Figure:
    """How often every latent fires in both cohorts, and the differences with the strongest evidence.

    Parameters
    ----------
    table : DataFrame
        Table of :func:`biosae.search.diff`. Latents that were not tested are small and pale.
    n : int
        Latents in the right panel, with 95 % intervals (not widened for having been chosen).
    alpha : float
        False discovery rate up to which a latent is coloured.
    fig : matplotlib.figure.Figure, optional

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If a column is absent or nothing was tested.
    """
    _need(table, {"latent", "frequency_a", "frequency_b", "difference", "ci_low", "ci_high", "p", "q", "n_a", "n_b"})
    tested = table["p"].notna().to_numpy()
    if not tested.any():
        raise InputError("no latent was tested; the column status says why")
    facts = table.attrs.get("biosae", {})
    a, b = (style.wrap(str(facts.get(side, f"cohort {side.upper()}")), width=34) for side in "ab")
    units = _units(facts)
    passes = tested & (table["q"] <= alpha).to_numpy()
    top = table[tested].sort_values(["p", "q"], kind="stable").head(n).iloc[::-1]
    with style.paper():
        fig = style.figure((6.8, 1.4 + 0.16 * max(len(top), 11))) if fig is None else fig
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.1))
        left.plot([0, 1], [0, 1], color=style.MUTED, linewidth=0.7, zorder=0)
        for rows, options in (
            (~tested, {"s": 3, "color": "#D8D8D8", "label": "not tested"}),
            (tested & ~passes, {"s": 7, "color": "#8A8A8A", "label": f"q > {alpha:g}"}),
            (passes, {"s": 14, "color": style.PALETTE["blue"], "label": f"q ≤ {alpha:g}"}),
        ):
            x, y = table["frequency_b"][rows], table["frequency_a"][rows]
            left.scatter(x, y, linewidths=0, rasterized=len(table) > 3000, **options | {
                "label": f"{options['label']} ({int(rows.sum()):,})"
            })  # fmt: skip
        left.set_xlim(-0.03, 1.03)
        left.set_ylim(-0.03, 1.03)
        left.set_aspect("equal")
        left.set_xlabel(f"fires in {b}\n(mean share, {style.count(table['n_b'].iloc[0], units)})")
        left.set_ylabel(f"fires in {a}\n(mean share, {style.count(table['n_a'].iloc[0], units)})")
        left.legend(loc="lower left", bbox_to_anchor=(-0.05, 1.0), ncols=3, handletextpad=0.0, columnspacing=0.6)
        y = np.arange(len(top))
        colours = [style.PALETTE["blue"] if q <= alpha else "#8A8A8A" for q in top["q"]]
        right.hlines(y, top["ci_low"], top["ci_high"], color=colours, linewidth=1.2)
        right.scatter(top["difference"], y, s=16, color=colours, linewidths=0, zorder=3)
        right.axvline(0, color=style.MUTED, linewidth=0.7, zorder=0)
        right.set_yticks(y, top["latent"], fontsize=6.5)
        for height, q in zip(y, top["q"]):
            right.annotate(
                f"q {style.p_value(q)}" if q >= 0.001 else "q <0.001", (1.0, height), va="center", fontsize=6.5,
                xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            )  # fmt: skip
        right.set_xlabel("difference of frequencies (95 % interval);\n" + f"right of 0: more often in {a}")
        same = f"; the same {units}s in both" if facts.get("paired") else ""
        right.set_title(style.wrap(f"{len(top)} of {style.count(int(tested.sum()), 'tested latent')}{same}", width=46))
    return fig


def pairs(table: pd.DataFrame, *, alpha: float = 0.05, n_labels: int = 5, ax: Axes | None = None) -> Axes:
    """Co-occurrence of pairs over all samples against that within strata.

    Parameters
    ----------
    table : DataFrame
        Table of :func:`biosae.search.pairs`. A pair far to the right at the height of 0 goes together only because the
        same patients (or scanners) have both.
    alpha : float
        False discovery rate up to which a pair is coloured.
    n_labels : int
        How many of these are named.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column is absent.
    """
    _need(table, {"latent_a", "latent_b", "npmi", "r_within", "q", "p", "status"})
    facts = table.attrs.get("biosae", {})
    tested = table["p"].notna().to_numpy()
    passes = tested & (table["q"] <= alpha).to_numpy()
    with style.paper():
        ax = style.axes(ax, (3.5, 3.0))
        for rows, size, colour, name in (
            (~tested, 3, "#D8D8D8", "not tested"),
            (tested & ~passes, 6, "#8A8A8A", f"q > {alpha:g}"),
            (passes, 9, style.PALETTE["blue"], f"q ≤ {alpha:g}"),
        ):
            ax.scatter(
                table["npmi"][rows], table["r_within"][rows], s=size, color=colour, linewidths=0,
                label=f"{name} ({int(rows.sum()):,})", rasterized=len(table) > 3000,
            )  # fmt: skip
        ax.axhline(0, color=style.MUTED, linewidth=0.6, zorder=0)
        ax.axvline(0, color=style.MUTED, linewidth=0.6, zorder=0)
        named = table[passes].head(n_labels)
        x, y = table["npmi"].to_numpy(float), table["r_within"].to_numpy(float)
        items = [(r.npmi, r.r_within, f"{r.latent_a} + {r.latent_b}") for r in named.itertuples()]
        style.name_beside(ax, items, x=x, y=y, rightward=True)
        ax.set_xlabel("NPMI over all samples")
        ax.set_ylabel(f"φ within {facts['strata']}" if facts.get("strata") else "φ")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, handletextpad=0.1, columnspacing=0.8)
        ax.set_title(style.wrap(f"{style.count(len(table), 'pair')}, {int(tested.sum()):,} tested", width=44))
    return ax


def _need(table: pd.DataFrame, columns: set[str]) -> None:
    if missing := columns - set(table.columns):
        raise InputError(f"the table has no column {', '.join(map(repr, sorted(missing)))}")


def _units(facts: dict) -> str:
    return "sample" if facts.get("assume_independent") else str(facts.get("unit", "patient")).replace("_", " ")
