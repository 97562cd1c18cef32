"""Dot-and-interval plots of effects: strongest latents, best of each source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import results, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def associations(
    result: pd.DataFrame, *, target: str | None = None, n: int = 10, alpha: float = 0.05, ax: Axes | None = None
) -> Axes:
    """Effects with their confidence intervals, and beside them what the encoder offers without an SAE.

    With ``target`` the ``n`` strongest latents of that target are drawn, then the best raw embedding dimension and
    the best principal component. Without it the best latent, raw dimension and component of every target are drawn.
    Filled marks have q at most ``alpha`` within their family.

    Parameters
    ----------
    result : DataFrame
        Table of :func:`biosae.stats.associate`.
    target : str, optional
    n : int
        Latents to draw for one target.
    alpha : float
        Level of q at which a mark is filled.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column or the target is absent, or nothing was tested.
    """
    chosen = results.choose(result, target=target)
    winners = results.best(chosen)
    if winners.empty:
        raise InputError(
            "no effect in this table could be estimated, so there is nothing to draw; its status column says why"
        )
    if target is None:
        rows, groups = winners, winners["target"].astype(str).tolist()
        names = [f"{f} ({short_source(s)})" for s, f in zip(rows["source"], rows["latent"])]
    else:
        latents = results.ranked(chosen[chosen["source"] == "latent"]).head(n)
        rows = pd.concat([latents, winners[winners["source"] != "latent"]], ignore_index=True)
        groups = ["latents" if s == "latent" else "controls" for s in rows["source"]]
        names = [f if s == "latent" else f"best {short_source(s)} {f}" for s, f in zip(rows["source"], rows["latent"])]
    positions, marks = line_positions(groups, header=target is None)
    with style.paper():
        ax = style.axes(ax, (3.8, 0.55 + 0.19 * (max(positions) + 1)))
        for place, (_, row) in zip(positions, rows.iterrows()):
            source = str(row["source"])
            interval(
                ax,
                row,
                place,
                colour=style.SOURCE_COLOURS.get(source, style.INK),
                marker=style.SOURCE_MARKERS.get(source, "o"),
                filled=bool(row["q"] <= alpha),
            )
        finish(ax, rows, positions, names, marks if target is None else [])
        ax.set_title(style.wrap(f"n = {results.units_phrase(rows)}; filled: q ≤ {alpha:g}; bars: confidence interval"))
    return ax


def short_source(source: object) -> str:
    """Short printed name of a source of features."""
    return {"latent": "latent", "raw": "raw", "pca": "PCA"}.get(str(source), str(source))


def n_of(row: pd.Series) -> str:
    """``(n = 24)`` of a row, or nothing where its n is not known."""
    n = row.get("n_units", row.get("n", np.nan))
    return "" if pd.isna(n) else f" (n = {int(n):,})"


def line_positions(
    groups: list[str], *, header: bool, heights: list[float] | None = None
) -> tuple[list[float], list[tuple[float, str]]]:
    """Rows from the top down, with a free line (and its heading, if asked) above each group."""
    heights = heights or [1.0] * len(groups)
    positions, marks, place = [], [], 0.0
    for i, group in enumerate(groups):
        if i == 0 or group != groups[i - 1]:
            if header:
                place += 0.25 if i else 0.0
                marks.append((place, group))
                place += 1.0
            elif i:
                place += 0.6
        positions.append(place + (heights[i] - 1) / 2)
        place += heights[i]
    return positions, marks


def interval(
    ax: Axes, row: pd.Series, place: float, *, colour: str, marker: str, filled: bool, size: float = 5
) -> None:
    """Mark and confidence interval of one row."""
    low, high = row.get("ci_low", np.nan), row.get("ci_high", np.nan)
    if np.isfinite(low) and np.isfinite(high):
        ax.plot([low, high], [place, place], color=colour, linewidth=1.3, solid_capstyle="butt")
    ax.plot(
        row["estimate"], place, marker=marker, color=colour, markersize=size, linestyle="none",
        markerfacecolor=colour if filled else "white", markeredgewidth=1.1,
    )  # fmt: skip


def finish(
    ax: Axes, rows: pd.DataFrame, positions: list[float], names: list[str], marks: list[tuple[float, str]]
) -> None:
    """Names of the lines, headings of groups, the line of no effect and the axis of effects."""
    effects = rows["effect"] if "effect" in rows else pd.Series(["effect"] * len(rows))
    nulls = set(effects.map(results.null_value))
    if len(nulls) == 1:
        ax.axvline(nulls.pop(), color=style.MUTED, linewidth=0.7, zorder=0)
    ax.set_yticks(positions, names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(max(positions) + 0.7, min([*positions, *(p for p, _ in marks)]) - 0.7)
    for place, text in marks:
        ax.annotate(
            text, (0, place), xycoords=("axes fraction", "data"), xytext=(-4, 0), textcoords="offset points",
            ha="right", va="center", fontweight="bold", fontsize=7.5, color=style.INK,
        )  # fmt: skip
    ax.set_xlabel(f"effect ({results.effect_label(effects)})")
    ax.set_ylabel("feature")
    ax.yaxis.label.set_visible(False)
