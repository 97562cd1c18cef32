"""Is a latent biology or the scanner: its level by scanner or site, and variance shares of all latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.interpret.examples import activation
from biosae.pl import style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def scanner(
    adata: AnnData,
    latent: str,
    *,
    by: str = "scanner",
    label: str | None = None,
    random_state: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Level of one latent by scanner (or site), one dot a patient, with the median of each group.

    A dot is the mean activation over a patient's rows in that group; without a ``patient`` column a dot is a row.
    With ``label`` the dots of each scanner are split and coloured by that column, so that a difference between
    scanners can be told from a difference in what was scanned.

    Parameters
    ----------
    adata : AnnData of shape (n_rows, n_latents)
    latent : str
    by : str
        Column of ``obs`` with the technical factor.
    label : str, optional
        Column of ``obs`` with at most eight biological groups.
    random_state : int
        Seed of the sideways jitter of dots.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the latent or a column is absent, or ``label`` has more than eight groups.
    """
    obs = adata.obs
    for column in filter(None, (by, label)):
        if column not in obs:
            raise InputError(f"obs has no column {column!r}; {nearest(column, obs.columns)}")
    keys = {"factor": obs[by].astype(str).where(obs[by].notna())}
    if label is not None:
        keys["label"] = obs[label].astype(str).where(obs[label].notna())
        if keys["label"].nunique() > len(style.COLOURS):
            raise InputError(f"{label!r} has more than {len(style.COLOURS)} groups; pass a coarser column as label=")
    per_patient = "patient" in obs
    if per_patient:
        keys["patient"] = obs["patient"].astype(str).where(obs["patient"].notna())
    table = pd.DataFrame({**keys, "value": activation(adata, latent)}).dropna()
    points = table.groupby(list(keys), as_index=False)["value"].mean() if per_patient else table
    factors = sorted(points["factor"].unique())
    groups = sorted(points["label"].unique()) if label is not None else [None]
    width = 0.8 / len(groups)
    rng = np.random.default_rng(random_state)
    with style.paper():
        ax = style.axes(ax, (max(2.4, 0.8 + 0.95 * len(factors)) + (0.9 if label is not None else 0.0), 2.6))
        for g, group in enumerate(groups):
            colour = style.COLOURS[g] if label is not None else style.PALETTE["blue"]
            for i, factor in enumerate(factors):
                rows = points["factor"] == factor
                if group is not None:
                    rows &= points["label"] == group
                values = points.loc[rows, "value"].to_numpy()
                if not len(values):
                    continue
                centre = i - 0.4 + width * (g + 0.5)
                x = centre + rng.uniform(-0.3, 0.3, len(values)) * width
                ax.scatter(
                    x, values, s=11, color=colour, alpha=0.65, linewidths=0, rasterized=len(points) > 3000,
                    label=group if group is not None and i == _first(points, factors, group) else None,
                )  # fmt: skip
                median = np.median(values)
                ax.plot([centre - 0.42 * width, centre + 0.42 * width], [median] * 2, color=style.INK, linewidth=1.6)
        noun = "patient" if per_patient else "row"
        dots = points.groupby("factor")["patient"].nunique() if per_patient else points["factor"].value_counts()
        ax.set_xticks(
            range(len(factors)), [f"{style.wrap(f, width=14)}\n{style.count(dots[f], noun)}" for f in factors]
        )
        ax.set_xlim(-0.6, len(factors) - 0.4)
        ax.set_xlabel(by)
        unit = "embedding units, mean a patient" if per_patient else "embedding units"
        ax.set_ylabel(f"{latent} activation\n({unit})")
        if label is not None:
            ax.legend(title=label, loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.2)
        ax.set_title(style.wrap(f"n = {len(table):,} rows; bar: median", width=44))
    return ax


def _first(points: pd.DataFrame, factors: list[str], group: str) -> int:
    """Position of the first factor level in which a group occurs (it carries the legend entry)."""
    present = set(points.loc[points["label"] == group, "factor"])
    return next(i for i, factor in enumerate(factors) if factor in present)


def confounders(table: pd.DataFrame, *, n_labels: int = 6, ax: Axes | None = None) -> Axes:
    """Share of each latent's variance that goes with biology against the share that goes with a technical factor.

    Latents above the diagonal follow the technical factor more than biology.

    Parameters
    ----------
    table : DataFrame
        Columns ``latent, eta2_biology, eta2_technical, flag`` as :func:`biosae.stats.confounders` returns
        for one technical factor.
    n_labels : int
        How many of the technical latents are named, the largest technical share first.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column is absent.
    """
    missing = {"latent", "eta2_biology", "eta2_technical", "flag"} - set(table.columns)
    if missing:
        raise InputError(f"the table of confounders has no column {', '.join(map(repr, sorted(missing)))}")
    rows = table.dropna(subset=["eta2_biology", "eta2_technical"])
    with style.paper():
        ax = style.axes(ax, (3.3, 3.0))
        for flag, marker in zip(style.FLAG_COLOURS, "os^xo."):
            part = rows[rows["flag"] == flag]
            if len(part):
                ax.scatter(
                    part["eta2_biology"], part["eta2_technical"], s=14, marker=marker,
                    color=style.FLAG_COLOURS[flag], alpha=0.8, linewidths=0.9 if marker == "x" else 0,
                    label=f"{flag.replace('_', ' ')} ({len(part):,})", rasterized=len(rows) > 3000,
                )  # fmt: skip
        top = 1.05 * max([0.1, *rows["eta2_biology"], *rows["eta2_technical"]])
        ax.plot([0, top], [0, top], color=style.MUTED, linewidth=0.7, zorder=0)
        ax.set(xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
        x, y = (rows[f"eta2_{side}"].to_numpy(float) for side in ("biology", "technical"))
        named = rows[rows["flag"] == "technical"].nlargest(n_labels, "eta2_technical")
        items = list(named[["eta2_biology", "eta2_technical", "latent"]].itertuples(index=False, name=None))
        style.name_beside(ax, items, x=x, y=y, rightward=True)
        ax.set_xlabel("variance share of biology (η²)")
        ax.set_ylabel("variance share of the technical factor (η²)")
        if len(rows):
            ax.legend(loc="best", handletextpad=0.2)
        ax.set_title(f"n = {style.count(len(rows), 'latent')}")
    return ax
