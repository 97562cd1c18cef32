"""Stress card of a latent, and the latents that fire on a domain but not on inputs without meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {
    "passed": ("o", style.PALETTE["blue"], True, "passed: interval beyond the bar"),
    "failed": ("X", style.PALETTE["vermilion"], True, "failed: interval short of it"),
    "unclear": ("o", style.PALETTE["orange"], False, "unclear: interval on both sides"),
    "no_interval": ("D", style.INK, False, "no interval"),
    "refused": ("", style.MUTED, False, ""),
}
NAMES = {
    "association": "association (AUROC)", "dose": "dose response", "layer": "other layers",
    "neighbours": "neighbours told apart", "look_alikes": "look-alikes", "seeds": "other seeds",
    "perturbation": "harmless changes",
}  # fmt: skip


def stress(card: Any, *, fig: Figure | None = None) -> Figure:
    """Scores of a stress card with their intervals over patients; the dose response and the strata beside them.

    A bar marks the least score of each check. What was refused is written with its reason. The size of every number,
    patients and samples, stands beside it.

    Parameters
    ----------
    card : biosae.interpret.StressCard
    fig : matplotlib.figure.Figure, optional

    Returns
    -------
    matplotlib.figure.Figure
    """
    table, details = card.table, card.details
    strata = [name for name in details if name.startswith("context:") and details[name]["used"].any()]
    beside = ["dose"] * ("dose" in details) + strata[:2]
    with style.paper():
        height = max(2.2 + 0.32 * len(table), 1.7 * len(beside) + 0.4)
        fig = style.figure((8.4 if beside else 4.8, height)) if fig is None else fig
        if beside:
            left, right = fig.subfigures(1, 2, width_ratios=(1.35, 1))
            axes = np.atleast_1d(right.subplots(len(beside), 1))
        else:
            left, axes = fig, []
        handles = _scores(table, left.subplots())
        if handles:
            left.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=6.2, handletextpad=0.4)
        left.suptitle(style.wrap(str(card.claim), width=58), fontsize=9, x=0.01, ha="left")
        for ax, name in zip(axes, beside):
            if name == "dose":
                _dose(details["dose"], ax)
            else:
                _strata(details[name], name.removeprefix("context:"), ax)
    return fig


def _scores(table: pd.DataFrame, ax: Axes) -> list[Any]:
    """Draws the rows and returns the marks that the legend explains."""
    places = -np.arange(len(table), dtype=float)
    seen = set()
    for place, (_, row) in zip(places, table.iterrows()):
        marker, colour, filled, _ = LOOKS[row["verdict"]]
        if row["verdict"] == "refused":
            reason = style.wrap(f"not measured: {row['reason']}", width=50).splitlines()
            text = "\n".join(reason[:2]) + (" ..." if len(reason) > 2 else "")
            ax.text(0.01, place, text, va="center", fontsize=5.8, color="#666666", style="italic", linespacing=0.95)
            continue
        seen.add(row["verdict"])
        ax.plot([row["threshold"]] * 2, [place - 0.3, place + 0.3], color=style.INK, linewidth=1.0, zorder=1)
        if np.isfinite(row["ci_low"]):
            ax.plot([row["ci_low"], row["ci_high"]], [place] * 2, color=colour, linewidth=1.4, zorder=2)
        if np.isfinite(row["score"]):
            ax.plot(
                row["score"], place, marker=marker, color=colour, markersize=5.5, zorder=3, linestyle="",
                markerfacecolor=colour if filled else "white", clip_on=False,
            )  # fmt: skip
    names = [
        NAMES.get(check, check) + (f": {of}" if of else "")
        for check, of in zip(table["check"], table["of"].astype(str))
    ]
    ax.set_yticks(places, [style.wrap(name, width=24) for name in names])
    for place, (_, row) in zip(places, table.iterrows()):
        if row["verdict"] != "refused":
            said = f"{style.number(row['score'])}  {style.count(row['n_patients'], 'patient')}\n"
            said += style.count(row["n_samples"], "sample")
            ax.text(1.07, place, said, va="center", fontsize=5.8, color=style.INK, linespacing=0.95)
    ax.set_xlim(0, 1)
    ax.set_ylim(places.min() - 0.6, 0.6)
    ax.set_xlabel("score (1: sturdy; bar: least score to pass)")
    ax.tick_params(axis="y", length=0, pad=6)
    ax.text(1.48, 0, " ", fontsize=1)  # room for the sizes
    return [_handle(LOOKS[name]) for name in LOOKS if name in seen]


def _handle(look: tuple[str, str, bool, str]) -> Any:
    from matplotlib.lines import Line2D

    marker, colour, filled, label = look
    return Line2D(
        [], [], marker=marker, color=colour, markerfacecolor=colour if filled else "white", linewidth=1.2, label=label,
        markersize=4.5,
    )  # fmt: skip


def _dose(table: pd.DataFrame, ax: Axes) -> None:
    at = np.arange(len(table))
    if table["controls_q05"].notna().all():
        ax.fill_between(at, table["controls_q05"], table["controls_q95"], color="#DDDDDD", linewidth=0,
                        label="random latents, 90 %")  # fmt: skip
    blue, losses = style.PALETTE["blue"], [name for name in table if name.startswith("loss:")]
    worst = table[losses].max(axis=1).to_numpy(float) if losses else np.zeros(len(table))
    ax.plot(at, table["rise"], color=blue)
    for safe, face, label in ((True, blue, "this latent"), (False, "white", "off-target loses 10 % or more")):
        some = (worst < 0.10) == safe
        if some.any():
            ax.plot(at[some], table["rise"][some], "o", markersize=4, color=blue, markerfacecolor=face, label=label)
    ax.axhline(0, color=style.MUTED, linewidth=0.6, zorder=0)
    ax.set_xticks(at, [f"{d:g}" for d in table["dose"]])
    ax.set_xlabel("dose (typical codes)")
    ax.set_ylabel("probe moves with the claim")
    ax.legend(fontsize=5.8, loc="upper left", handlelength=1.6)
    said = f"largest off-target loss {worst.max():.0%}" if losses else "no off-target"
    ax.set_title(f"dose response\n{said}")


def _strata(table: pd.DataFrame, column: str, ax: Axes) -> None:
    rows = table[table["used"] | (table["stratum"] == "pooled")]
    places = -np.arange(len(rows), dtype=float)
    for place, (_, row) in zip(places, rows.iterrows()):
        colour = style.INK if row["stratum"] == "pooled" else style.PALETTE["sky"]
        if np.isfinite(row["ci_low"]):
            ax.plot([row["ci_low"], row["ci_high"]], [place] * 2, color=colour, linewidth=1.3)
        ax.plot(row["estimate"], place, marker="o", markersize=4, color=colour)
    ax.axvline(0.5, color=style.MUTED, linewidth=0.6, zorder=0)
    ax.set_yticks(places, [
        f"{style.wrap(str(row['stratum']), width=18)}\n{style.count(row['n_groups'], 'patient')}"
        for _, row in rows.iterrows()
    ], fontsize=6.2)  # fmt: skip
    ax.set_ylim(places.min() - 0.6, 0.6)
    least = float(np.nanmin(rows[["estimate", "ci_low"]].to_numpy(float)))
    ax.set_xlim(min(0.4, least - 0.05), 1.0)
    ax.set_xlabel("AUROC for the label")
    ax.set_title(style.wrap(f"within {column}", width=30))


def specific(table: pd.DataFrame, *, n: int = 8, ax: Axes | None = None) -> Axes:
    """Rate at which each latent fires on the target against the largest rate on inputs without meaning.

    Parameters
    ----------
    table : DataFrame
        What :func:`biosae.interpret.specific` gave.
    n : int
        Latents of the set to name.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the filter was refused, so that there are no rates to draw.
    """
    if not len(table) or table["rate_random"].isna().all():
        said = str(table["reason"].iloc[0]) if len(table) else "the table is empty"
        raise InputError(f"nothing to draw: {said}")
    chosen = table["specific"].to_numpy(bool)
    with style.paper():
        ax = style.axes(ax, (3.6, 3.2))
        ax.scatter(table["rate_random"][~chosen], table["rate_target"][~chosen], s=7, color=style.MUTED, linewidths=0)
        ax.scatter(table["rate_random"][chosen], table["rate_target"][chosen], s=16, color=style.PALETTE["blue"],
                   linewidths=0, zorder=3)  # fmt: skip
        ax.axvline(table.attrs["max_rate"], color=style.INK, linewidth=0.7, linestyle="--")
        ax.axhline(table.attrs["min_rate"], color=style.INK, linewidth=0.7, linestyle="--")
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
        first = table[chosen].sort_values("rank").head(n)
        style.name_beside(
            ax, list(zip(first["rate_random"], first["rate_target"], first["latent"])),
            x=first["rate_random"].to_numpy(float), y=first["rate_target"].to_numpy(float), rightward=True,
        )  # fmt: skip
        ax.set_xlabel("fires on inputs without meaning (largest of the families)")
        ax.set_ylabel("fires on the target")
        sizes = ", ".join(f"{r.family} {r.n_rows:,}{' (not valid)' * (r.status == 'invalid_null')}"
                          for r in table.attrs["families"].itertuples())  # fmt: skip
        people = f"{style.count(table['n_patients'].iloc[0], 'patient')}, " if table["n_patients"].iloc[0] else ""
        ax.set_title(style.wrap(
            f"{style.count(int(chosen.sum()), 'latent')} kept of {len(table):,}; target {people}"
            f"{style.count(table['n_samples'].iloc[0], 'row')}; {sizes}", width=58,
        ))  # fmt: skip
    return ax
