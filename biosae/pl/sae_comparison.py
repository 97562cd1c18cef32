"""What :func:`biosae.sae.compare` found: error against sparsity, dead latents, stability and labels, by method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = [colour for colour in style.COLOURS if colour != style.PALETTE["yellow"]]  # too pale for thin lines
MARKERS = "osD^vPX<"
PANELS = (
    ("dead_share", None, "dead latents"),
    ("shared", "shared_null", "atoms found again\nin other seeds"),
    ("alignment", "alignment_null", "best latent for\nthe label"),
)
"""Column, column of its chance level, and what the axis says; a panel without any value is left out."""
NEEDED = ("method", "setting", "seed", "k", "fvu_val", "l0_val", "n_rows", "n_rows_val", "n_groups_val", "error")


def sae_comparison(table: pd.DataFrame, *, fig: Figure | None = None) -> Figure:
    """Held-out error against active latents; dead latents, stability over seeds and best label, one line a method.

    Methods stand in the order of the table. A mark is the mean over seeds and its bar their range. Several k of one
    method are joined, and larger marks have the larger k. Grey strokes are chance levels. Each method has a colour and
    a mark of its own, so that the figure can be read without colours; methods that failed are named below.

    Parameters
    ----------
    table : DataFrame
        From :func:`biosae.sae.compare`.
    fig : matplotlib.figure.Figure, optional
        To draw into.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If a column is absent or no fit succeeded.
    """
    missing = [c for c in NEEDED if c not in table]
    if missing:
        raise InputError(f"the table has no column {', '.join(map(repr, missing))}; pass what biosae.sae.compare gives")
    table = table.assign(name=_names(table))
    fits = table[table["error"].fillna("") == ""]
    if not len(fits):
        raise InputError("no fit succeeded; see the column 'error' of the table")
    order = list(dict.fromkeys(fits["name"]))
    looks = {name: (COLOURS[i % 7], MARKERS[i % 8]) for i, name in enumerate(order)}  # 56 pairs before one comes again
    panels = [panel for panel in PANELS if panel[0] in fits and fits[panel[0]].notna().any()]
    height = max(2.6, 0.9 + 0.17 * len(order))
    with style.paper():
        if fig is None:
            fig = style.figure((4.6 + 1.45 * len(panels), height))
        first, *others = fig.subplots(1, 1 + len(panels), width_ratios=[2.3] + [1] * len(panels))
        _curve(first, fits, order, looks)
        for ax, (column, null, label) in zip(others, panels):
            _dots(ax, fits, order, looks, column=column, null=null)
            ax.set_xlabel(label)
            ax.tick_params(axis="y", length=0, labelleft=ax is others[0])
        failed = sorted(set(table["name"]) - set(order))
        fig.supxlabel(_caption(table, failed), fontsize=7, color="#555555", x=0.01, ha="left")
    return fig


def _names(table: pd.DataFrame) -> pd.Series:
    """Method, with its setting where the table has several of it."""
    setting = table["setting"].fillna("")
    several = setting.groupby(table["method"]).transform("nunique") > 1
    return table["method"] + (" (" + setting + ")").where(several & (setting != ""), "")


def _means(fits: pd.DataFrame, name: str) -> list[pd.DataFrame]:
    """Fits of one method by k, the smallest first."""
    part = fits[fits["name"] == name]
    return [group for _, group in part.groupby(part["k"].fillna(0).astype(float), sort=True)]


def _size(number: int, of: int) -> float:
    return 4.5 if of == 1 else 3.0 + 3.0 * number / (of - 1)


def _curve(ax: Axes, fits: pd.DataFrame, order: list[str], looks: dict[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import LogLocator

    top = min(1.0, 1.08 * float(fits["fvu_val"].max()))
    low = float(fits["fvu_val"].clip(lower=1e-6).min())
    for name in order:
        colour, marker = looks[name]
        groups = _means(fits, name)
        line = []
        for number, group in enumerate(groups):
            x, y = group["l0_val"].clip(lower=0.5), group["fvu_val"].clip(upper=top)
            line.append((x.mean(), y.mean()))
            ax.hlines(y.mean(), x.min(), x.max(), color=colour, linewidth=0.8)
            ax.vlines(x.mean(), y.min(), y.max(), color=colour, linewidth=0.8)
            ax.plot(
                *line[-1], marker, color=colour, markersize=_size(number, len(groups)), markeredgecolor="white",
                markeredgewidth=0.4, label=name if number == 0 else None, clip_on=False, zorder=3,
            )  # fmt: skip
        ax.plot(*np.transpose(line), color=colour, linewidth=0.8, zorder=2)
    l0 = fits["l0_val"].clip(lower=0.5)
    if l0.max() > 4 * l0.min():
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if top > 4 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter("")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(0.9 * low if top > 4 * low else 0, top)
    ax.set_xlabel("active latents a row (L0, held out)")
    ax.set_ylabel("variance unexplained (FVU, held out)")


def _dots(
    ax: Axes, fits: pd.DataFrame, order: list[str], looks: dict[str, tuple[str, str]], *, column: str, null: str | None
) -> None:
    for height, name in enumerate(reversed(order)):
        colour, marker = looks[name]
        groups = _means(fits, name)
        for number, group in enumerate(groups):
            values = group[column].dropna()
            if not len(values):
                continue
            at = height + 0.28 * (number / max(1, len(groups) - 1) - 0.5) * (len(groups) > 1)
            if null is not None and null in group and group[null].notna().any():
                ax.plot(group[null].mean(), at, "|", color=style.MUTED, markersize=7, markeredgewidth=1.4)
            ax.hlines(at, values.min(), values.max(), color=colour, linewidth=0.9)
            ax.plot(
                values.mean(), at, marker, color=colour, markersize=_size(number, len(groups)) - 0.5,
                markeredgecolor="white", markeredgewidth=0.4, clip_on=False, zorder=3,
            )  # fmt: skip
    ax.set_yticks(range(len(order)), reversed(order))
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.set_xlim(0, max(1e-3, 1.08 * float(np.nanmax([ax.dataLim.x1, 0.05]))))
    ax.grid(axis="y", color="#EEEEEE", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)


def _caption(table: pd.DataFrame, failed: list[str]) -> str:
    first = table.iloc[0]
    parts = [
        f"n = {int(first['n_rows']):,} rows; {int(first['n_rows_val']):,} held out "
        f"({style.count(first['n_groups_val'], 'group')}); {style.count(table['seed'].nunique(), 'seed')}. "
        "Bars: range over seeds. Grey: chance level. Larger marks: larger k."
    ]
    if failed:
        parts.append("Failed: " + ", ".join(failed) + ".")
    return "\n".join(parts)
