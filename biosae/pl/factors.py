"""Map of latents by factors: which of them carry biology, which the scanner, the site, the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def factor_map(table: pd.DataFrame, *, n: int = 30, ax: Axes | None = None) -> Axes:
    """Share of variance of the leading latents that goes with biology and with every technical factor.

    Latents (rows) are those with the largest share of any factor, sorted from biology to technical; the strip on the
    right is the flag of the worst factor.

    Parameters
    ----------
    table : DataFrame
        Table of :func:`biosae.stats.confounders`, any number of technical factors.
    n : int
        Latents to show.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column is absent or no share is known.
    """
    missing = {"latent", "factor", "eta2_biology", "eta2_technical", "flag"} - set(table.columns)
    if missing:
        raise InputError(f"the table of confounders has no column {', '.join(map(repr, sorted(missing)))}")
    factors = list(dict.fromkeys(table["factor"].astype(str)))
    wide = table.pivot_table(index="latent", columns="factor", values="eta2_technical", observed=True)
    wide = wide.reindex(columns=factors).dropna()
    if wide.empty:
        raise InputError("no latent has a variance share; the status column says why")
    first = table.drop_duplicates("latent").set_index("latent")
    wide.insert(0, "biology", first.loc[wide.index, "eta2_biology"])
    wide = wide.loc[wide.max(axis=1).nlargest(n).index]
    wide = wide.loc[(wide["biology"] - wide[factors].max(axis=1)).sort_values(ascending=False, kind="stable").index]
    severity = ["technical", "not_separable", "mixed", "biology", "neither", "undetermined"]
    flags = table[table["latent"].isin(wide.index)].groupby("latent")["flag"].agg(
        lambda found: min(found, key=lambda flag: severity.index(flag) if flag in severity else len(severity))
    )  # fmt: skip
    biology = ", ".join(dict.fromkeys(table["biology"].astype(str))) if "biology" in table else "biology"
    biology = biology.replace(", ", ",\n")
    with style.paper():
        ax = style.axes(ax, (1.9 + 0.55 * (len(factors) + 1), 0.9 + 0.15 * len(wide)))
        values = wide.to_numpy(float)
        image = ax.imshow(values, cmap="cividis", vmin=0, vmax=max(0.05, float(values.max())), aspect="auto")
        for i, latent in enumerate(wide.index):
            ax.plot(
                len(factors) + 0.75, i, marker="s", markersize=5, clip_on=False,
                color=style.FLAG_COLOURS.get(str(flags[latent]), style.MUTED),
            )  # fmt: skip
        ax.set_yticks(range(len(wide)), wide.index, fontsize=6.5)
        ax.set_xticks(range(len(factors) + 1), [biology, *factors], rotation=35, ha="right")
        ax.axvline(0.5, color="white", linewidth=2)
        ax.tick_params(length=0)
        ax.set_xlim(-0.5, len(factors) + 0.5)
        ax.set_xlabel("factor")
        ax.set_ylabel("latent")
        ax.figure.colorbar(image, ax=ax, label="variance share (η²)", shrink=0.7, pad=0.16)
        present = [f for f in style.FLAG_COLOURS if f in set(flags)]
        handles = [
            ax.plot([], [], marker="s", linestyle="none", color=style.FLAG_COLOURS[f], label=f.replace("_", " "))[0]
            for f in present
        ]
        ax.figure.legend(
            handles=handles, loc="outside lower center", ncols=3, handletextpad=0.1, columnspacing=0.8, frameon=False
        )
        n_units = table["n_units"].max() if "n_units" in table else np.nan
        of = f"; n = {style.count(n_units, 'sample')}" if np.isfinite(n_units) else ""
        total = table["latent"].nunique()
        ax.set_title(style.wrap(f"{len(wide)} of {style.count(total, 'latent')}{of}", width=44))
    return ax
