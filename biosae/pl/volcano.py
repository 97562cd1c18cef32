"""Volcano plot of an association table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.pl import results, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def volcano(
    result: pd.DataFrame,
    *,
    source: str = "latent",
    target: str | None = None,
    y: str = "p",
    unadjusted: pd.DataFrame | None = None,
    alpha: float = 0.05,
    n_labels: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Effect against -log10 p of every test, with the line above which q is at most ``alpha``.

    The title line counts what was tested, in how many units, and what was not tested and why.

    Parameters
    ----------
    result : DataFrame
        Table of :func:`biosae.stats.associate`.
    source : str
        ``"latent"``, ``"raw"`` or ``"pca"``; each is its own family of tests.
    target : str, optional
        One target; with None every target is drawn, and, as each may be its own family, ``y`` is q.
    y : {"p", "q"}
        Quantity on the y axis.
    unadjusted : DataFrame, optional
        The same tests without covariates (or without strata): an arrow leads from there to the adjusted effect of each
        of the ``n_labels`` tests that are strongest in either table.
    alpha : float
        False discovery rate of the line.
    n_labels : int
        How many of the strongest tests that pass are named.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column, the source or the target is absent.
    """
    if y not in ("p", "q"):
        raise InputError(f"y={y!r}; {nearest(y, ('p', 'q'))}")
    chosen = results.choose(result, source=source, target=target)
    targets = list(chosen["target"].astype(str).unique())
    if len(targets) > 1:
        y = "q"
    tested = chosen[results.was_tested(chosen)]
    x = pd.to_numeric(tested["estimate"], errors="coerce").to_numpy(float)
    height = -np.log10(np.clip(tested[y].to_numpy(float), 1e-300, 1.0))
    passes = (tested["q"] <= alpha).to_numpy()
    with style.paper():
        ax = style.axes(ax, (3.5, 3.0))
        dots = {"linewidths": 0, "rasterized": len(tested) > 3000}
        ax.scatter(x[~passes], height[~passes], s=7, color=style.MUTED, alpha=0.7, **dots)
        if len(targets) == 1:
            ax.scatter(x[passes], height[passes], s=14, color=style.SOURCE_COLOURS.get(source, style.INK), **dots)
        else:
            for i, name in enumerate(targets):
                rows = passes & (tested["target"].astype(str) == name).to_numpy()
                marker = "os^Dv"[(i // len(style.COLOURS)) % 5]
                colour = style.COLOURS[i % len(style.COLOURS)]
                ax.scatter(x[rows], height[rows], s=14, color=colour, marker=marker, label=name, **dots)
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.2, title=f"q ≤ {alpha:g}")
        line = alpha if y == "q" else results.threshold_p(tested, alpha=alpha)
        if line is not None:
            ax.axhline(-np.log10(max(line, 1e-300)), color=style.INK, linewidth=0.7, linestyle=(0, (4, 3)))
            ax.annotate(
                f"q = {alpha:g}",
                (1.0, -np.log10(max(line, 1e-300))),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=6.5,
                color=style.INK,
            )
        elif len(tested):
            ax.text(
                0.99, 0.98, f"no test reaches q = {alpha:g}", transform=ax.transAxes, ha="right", va="top", fontsize=7
            )
        nulls = set(tested["effect"].map(results.null_value))
        if len(nulls) == 1:
            ax.axvline(nulls.pop(), color=style.MUTED, linewidth=0.6, zorder=0)
        ax.set_ylim(0, max(1.05 * float(np.nanmax(height, initial=0.0)), 1.0) + 0.15)
        if unadjusted is None:
            _name_the_strongest(ax, tested[passes], x[passes], height[passes], n_labels)
        else:
            _arrows(
                ax,
                tested.assign(x=x, height=height),
                results.choose(unadjusted, source=source, target=target),
                y,
                n_labels,
            )
        ax.set_xlabel(f"effect ({results.effect_label(chosen['effect'])})")
        ax.set_ylabel(f"−log$_{{10}}$ {y}")
        ax.set_title(style.wrap(results.sentence(chosen, noun=_NOUN.get(source, source))))
    return ax


_NOUN = {"latent": "latent", "raw": "raw dimension", "pca": "component"}


def _arrows(ax: Axes, adjusted: pd.DataFrame, before: pd.DataFrame, y: str, n: int) -> None:
    """Arrows from the unadjusted to the adjusted place of the strongest tests of either table."""
    before = before[results.was_tested(before)]
    keys = ["latent", "target"]
    strong = pd.concat([results.ranked(before).head(n), results.ranked(adjusted).head(n)])[keys].drop_duplicates()
    both = strong.merge(before, on=keys).merge(adjusted[[*keys, "x", "height"]], on=keys)
    if both.empty:
        return
    start_x = pd.to_numeric(both["estimate"]).to_numpy(float)
    start_y = -np.log10(np.clip(both[y].to_numpy(float), 1e-300, 1.0))
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.07 * start_y.max() + 0.1))
    ax.scatter(start_x, start_y, s=12, facecolors="white", edgecolors=style.INK, linewidths=0.8, zorder=3)
    for a, b, c, d in zip(start_x, start_y, both["x"], both["height"]):
        ax.annotate(
            "", (c, d), xytext=(a, b),
            arrowprops={"arrowstyle": "-|>", "color": style.INK, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 1},
        )  # fmt: skip
    low, high = ax.get_xlim()
    beyond = start_x >= (low + high) / 2
    if not beyond.all():
        ax.set_xlim(low - 0.3 * (high - low), high)  # room for names on the left, inside the axes
    for right in (True, False):
        side = beyond == right
        items = [(a, b, str(name)) for a, b, name in zip(start_x[side], start_y[side], both["latent"][side])]
        style.name_beside(ax, items, x=start_x[side], y=start_y[side], rightward=right)


def _name_the_strongest(ax: Axes, rows: pd.DataFrame, x: np.ndarray, height: np.ndarray, n: int) -> None:
    """Write the names of the n strongest tests in a column on the inner side of the dots at their height."""
    if not len(rows) or n < 1:
        return
    position = {label: i for i, label in enumerate(rows.index)}
    top = [position[label] for label in results.ranked(rows).index[:n]]
    middle = float(np.mean(ax.get_xlim()))
    for left in (True, False):
        items = [(x[i], height[i], str(rows["latent"].iloc[i])) for i in top if (x[i] < middle) == left]
        side = (x < middle) == left
        style.name_beside(ax, items, x=x[side], y=height[side], rightward=left)
