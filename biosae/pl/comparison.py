"""Encoders and layers side by side: best effect per target, and how well scanner and biology can be read out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.pl import results, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FEATURES = {
    "raw": (style.PALETTE["orange"], "s"),
    "latents": (style.PALETTE["blue"], "o"),
    "latents_filtered": (style.PALETTE["green"], "^"),
}


def comparison(table: pd.DataFrame, *, source: str = "latent", value: str = "estimate", ax: Axes | None = None) -> Axes:
    """Heat map of the best effect: targets down, encoder and layer across, the value written in each cell.

    Colours are centred on no association and span the largest effect either way; a cell that was not measured
    holds a dash.

    Parameters
    ----------
    table : DataFrame
        Columns ``encoder, layer, target, source`` and ``value``.
    source : str
        ``"latent"``, ``"raw"`` or ``"pca"``.
    value : str
        Column drawn.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column or the source is absent, or a cell would hold two values.
    """
    rows = _require(table, ("encoder", "layer", "target", "source", value), source=source)
    if rows.duplicated(["encoder", "layer", "target"]).any():
        raise InputError("the comparison has two rows for one encoder, layer and target; keep the best one")
    columns = list(dict.fromkeys(zip(rows["encoder"].astype(str), rows["layer"].astype(str))))
    targets = list(dict.fromkeys(rows["target"].astype(str)))
    grid = np.full((len(targets), len(columns)), np.nan)
    for row in rows.to_dict("records"):
        column = columns.index((str(row["encoder"]), str(row["layer"])))
        grid[targets.index(str(row["target"])), column] = row[value]
    effects = rows["effect"] if "effect" in rows else pd.Series(["effect"])
    nulls = {results.null_value(e) for e in effects.dropna()} or {0.0}
    centre = nulls.pop() if len(nulls) == 1 else 0.0
    span = float(np.nanmax(np.abs(grid - centre), initial=1e-9))
    with style.paper():
        ax = style.axes(ax, (1.6 + 0.62 * len(columns), 0.9 + 0.27 * len(targets)))
        ax.set_facecolor("#F0F0F0")
        image = ax.imshow(grid, cmap="RdBu_r", vmin=centre - span, vmax=centre + span, aspect="auto")
        for i, j in np.ndindex(grid.shape):
            if np.isnan(grid[i, j]):
                ax.text(j, i, "–", ha="center", va="center", fontsize=7, color=style.INK)
                continue
            dark = abs(grid[i, j] - centre) > 0.65 * span
            ax.text(
                j, i, style.number(grid[i, j]), ha="center", va="center", fontsize=7, color="white" if dark else "k"
            )
        ax.set_xticks(range(len(columns)), [layer for _, layer in columns])
        ax.set_yticks(range(len(targets)), targets)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_xlabel("encoder and layer")
        ax.set_ylabel("target")
        for name, first, last in _runs([encoder for encoder, _ in columns]):
            ax.annotate(
                name, ((first + last) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=7.5, fontweight="bold",
            )  # fmt: skip
            if last + 1 < len(columns):
                ax.axvline(last + 0.5, color="white", linewidth=3)
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.9, aspect=14, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(results.effect_label(effects))
    return ax


def readout(table: pd.DataFrame, *, factor: str | None = None, ax: Axes | None = None) -> Axes:
    """Balanced accuracy with which a factor can be read from raw embeddings and from latents, by layer, with chance.

    Parameters
    ----------
    table : DataFrame
        Columns ``features, factor, encoder, layer, balanced_accuracy`` and, where known, ``chance, ci_low, ci_high``.
    factor : str, optional
        Only this factor; needed where the table holds several.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column or the factor is absent, or several factors are present and none was chosen.
    """
    rows = _require(table, ("features", "factor", "encoder", "layer", "balanced_accuracy"), factor=factor)
    if len(set(rows["factor"])) > 1:
        raise InputError(f"several factors in the table; choose one with factor=: {sorted(rows['factor'].unique())}")
    places = list(dict.fromkeys(zip(rows["encoder"].astype(str), rows["layer"].astype(str))))
    kinds = list(dict.fromkeys(rows["features"].astype(str)))
    several = len({encoder for encoder, _ in places}) > 1
    with style.paper():
        ax = style.axes(ax, (1.5 + 0.9 * len(places), 2.6))
        for k, kind in enumerate(kinds):
            part = rows[rows["features"].astype(str) == kind]
            colour = _FEATURES.get(kind, (style.PALETTE["purple"], "D"))[0]
            shift = (k - (len(kinds) - 1) / 2) * 0.14
            x = np.array([places.index((str(e), str(v))) for e, v in zip(part["encoder"], part["layer"])]) + shift
            y = part["balanced_accuracy"].to_numpy(float)
            if {"ci_low", "ci_high"} <= set(part):
                ax.vlines(x, part["ci_low"], part["ci_high"], color=colour, linewidth=1.3)
            marker = _FEATURES.get(kind, (style.PALETTE["purple"], "D"))[1]
            ax.plot(x, y, marker, color=colour, markersize=5, label=kind.replace("_", " "))
        if "chance" in rows:
            ax.hlines(rows["chance"].dropna().unique(), -0.5, len(places) - 0.5, color=style.INK, linestyle=(0, (4, 3)),
                      linewidth=0.8, label="chance")  # fmt: skip
        ax.set_xticks(range(len(places)), [f"{v}\n{style.wrap(e, width=13)}" if several else v for e, v in places])
        ax.set_xlim(-0.5, len(places) - 0.5)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("layer" if not several else "layer and encoder")
        ax.set_ylabel(f"balanced accuracy ({rows['factor'].iloc[0]})")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if "n_units" in rows or "n" in rows:
            n = rows["n_units" if "n_units" in rows else "n"].dropna()
            if len(n):
                low, high = int(n.min()), int(n.max())
                ax.set_title(style.wrap(f"n = {low:,}" if low == high else f"n = {low:,}–{high:,}"))
    return ax


def _require(table: pd.DataFrame, columns: tuple[str, ...], **chosen: str | None) -> pd.DataFrame:
    missing = [c for c in columns if c not in table]
    if missing:
        raise InputError(f"the table has no column {', '.join(map(repr, missing))}")
    for column, value in chosen.items():
        if value is None:
            continue
        known = table[column].astype(str).unique()
        if value not in known:
            raise InputError(f"no rows with {column} {value!r}; {nearest(value, known)}")
        table = table[table[column].astype(str) == value]
    return table


def _runs(names: list[str]) -> list[tuple[str, int, int]]:
    """Runs of equal neighbours as (name, first, last)."""
    runs: list[tuple[str, int, int]] = []
    for i, name in enumerate(names):
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], i)
        else:
            runs.append((name, i, i))
    return runs
