"""How well a search finds what shares a label, by representation, with chance and with what was excluded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.pl import style
from biosae.pl.associations import interval, line_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPRESENTATIONS = {"X": "codes", "embedding": "embedding", "embedding_centred": "embedding, centred"}
"""How representations are printed; others by their own name."""
MEASURES = {"ap": "mAP", "ndcg": "NDCG", "precision": "precision"}
_NEEDED = (
    "label", "use_rep", "measure", "estimate", "ci_low", "ci_high", "chance", "n_queries", "n_groups", "status",
)  # fmt: skip
_MARKS = {"X": ("blue", "o"), "embedding": ("orange", "s"), "embedding_centred": ("green", "D")}


def retrieval(table: pd.DataFrame, *, measure: str = "ap", fig: Figure | None = None) -> Figure:
    """One panel a label and setting of what was excluded: a mark and 95 % interval a representation, chance dashed.

    Hollow marks rest on fewer than 20 groups. A panel in which nothing could be measured says why.

    Parameters
    ----------
    table : DataFrame
        Table of :func:`biosae.search.evaluate`; several of them together with a column ``excluded`` (text), and with
        ``encoder`` and ``layer``, as ``tables/retrieval_all.csv`` of a run has them. Differences of representations are
        not drawn.
    measure : str
        ``"ap"``, or another one of the table, such as ``"ndcg@10"``.
    fig : matplotlib.figure.Figure, optional

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If a column or the measure is absent, or nothing was measured.
    """
    if missing := set(_NEEDED) - set(table.columns):
        raise InputError(f"the table has no column {', '.join(map(repr, sorted(missing)))}")
    known = table["measure"].dropna().unique()
    if measure not in known:
        raise InputError(f"no rows with measure {measure!r}; {nearest(measure, list(known))}")
    rows = table[(table["measure"] == measure) | table["measure"].isna()]
    rows = rows[~rows["use_rep"].astype(str).str.contains(" - ", regex=False)]
    rows = rows.assign(excluded=rows["excluded"].fillna("nothing") if "excluded" in rows else "")
    if rows["estimate"].isna().all():
        raise InputError("no ranking could be measured; the columns status and reason say why")
    lines = _lines(rows)
    places, heads = line_positions([head for head, _ in lines], header=bool(lines[0][0]))
    at = dict(zip(lines, places))
    labels, settings = pd.unique(rows["label"]), pd.unique(rows["excluded"])
    with style.paper():
        height = 0.75 + 0.17 * (max(places) + 1)
        fig = style.figure((1.6 + 1.85 * len(settings), 0.4 + height * len(labels))) if fig is None else fig
        grid = fig.subplots(len(labels), len(settings), sharex=True, sharey=True, squeeze=False)
        for (i, label), (j, setting) in ((a, b) for a in enumerate(labels) for b in enumerate(settings)):
            part = rows[(rows["label"] == label) & (rows["excluded"] == setting)]
            _panel(grid[i, j], part, at)
            without = [style.wrap(f"excluded: {setting}", width=34)] if setting else []
            grid[i, j].set_title("\n".join([str(label), *without, _n(part)]))
            if i == len(labels) - 1:
                name, _, place = measure.partition("@")
                grid[i, j].set_xlabel(MEASURES.get(name, name) + (f"@{place}" if place else ""))
        for ax in grid[:, 0]:
            ax.set_yticks(places, [REPRESENTATIONS.get(rep, rep) for _, rep in lines])
            for place, head in heads:
                ax.annotate(
                    head, (0, place), xycoords=("axes fraction", "data"), xytext=(-4, 0), textcoords="offset points",
                    ha="right", va="center", fontweight="bold", fontsize=7, color=style.INK,
                )  # fmt: skip
        grid[0, 0].set_ylim(max(places) + 0.7, min([*places, *(p for p, _ in heads)]) - 0.7)
        for ax in grid.flat:
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
    return fig


def _lines(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(encoder and layer, representation) of each line; the first is empty where there is one view only."""
    if {"encoder", "layer"} <= set(rows) and rows.groupby(["encoder", "layer"]).ngroups > 1:
        heads = rows["encoder"].astype(str) + " " + rows["layer"].astype(str)
    else:
        heads = pd.Series("", index=rows.index)
    found = dict.fromkeys(zip(heads, rows["use_rep"].astype(str)))
    order = list(dict.fromkeys(head for head, _ in found))
    return sorted(found, key=lambda line: order.index(line[0]))


def _panel(ax: Axes, part: pd.DataFrame, at: dict[tuple[str, str], float]) -> None:
    several = bool(next(iter(at))[0])
    for _, row in part[part["estimate"].notna()].iterrows():
        rep = str(row["use_rep"])
        colour, marker = _MARKS.get(rep, ("purple", "^"))
        place = at[f"{row['encoder']} {row['layer']}" if several else "", rep]
        filled = row["status"] == "ok"
        interval(ax, row, place, colour=style.PALETTE[colour], marker=marker, filled=filled, size=4)
    for chance in np.unique(part["chance"].dropna().to_numpy(float).round(9)):
        ax.axvline(chance, color=style.INK, linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
    if part["estimate"].isna().all():
        ax.text(
            0.5, 0.5, style.wrap(_why(part), width=30), transform=ax.transAxes, ha="center", va="center", fontsize=7,
            color=style.INK,
        )  # fmt: skip


def _why(part: pd.DataFrame) -> str:
    """Why a panel is empty."""
    if part.empty:
        return "not asked"
    if (part["status"] == "no_queries").all():
        return "not measured: no query has anything relevant left"
    return f"not measured: {str(part['status'].iloc[0]).replace('_', ' ')}"


def _n(part: pd.DataFrame) -> str:
    """Queries and groups of a panel."""
    known = part[part["estimate"].notna()]
    if known.empty:
        return "n = 0"
    queries, groups = int(known["n_queries"].max()), int(known["n_groups"].max())
    return f"n = {queries:,} quer{'y' if queries == 1 else 'ies'} in {style.count(groups, 'group')}"
