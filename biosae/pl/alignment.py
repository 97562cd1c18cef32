"""Average precision of each model's best latent for each class, beside what place and prevalence give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl.style import COLOURS, INK, MUTED, axes, paper, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def alignment(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw :func:`biosae.interpret.compare_alignment` (or one model's :func:`biosae.interpret.alignment`).

    Parameters
    ----------
    table
        A row a model and class. Classes without average precision are left out and counted in the title.
    ax
        Axes to draw on.

    Returns
    -------
    Axes
        A dot and its 95 % interval a model; a grey bar for the prevalence, a black bar for place alone, and a hollow
        dot where masks of other samples were used (``ap_null``).

    Raises
    ------
    InputError
        If no row has an average precision.
    """
    known = table[table["ap"].notna()]
    if known.empty:
        raise InputError("no class of this table has an average precision; see its status column")
    models = list(known["model"].unique()) if "model" in known else [None]
    classes = list(known["class"].unique())
    step = 0.8 / len(models)
    with paper():
        ax = axes(ax, (4.6, 0.6 + len(classes) * max(0.35, 0.16 * len(models))))
        for i, name in enumerate(models):
            part = known if name is None else known[known["model"] == name]
            y = np.array([classes.index(c) for c in part["class"]]) + (i - (len(models) - 1) / 2) * step
            colour = COLOURS[i % len(COLOURS)]
            ax.hlines(y, part["ap_low"], part["ap_high"], color=colour, linewidth=1)
            ax.plot(part["ap"], y, "o", color=colour, markersize=4, label=None if name is None else plain(name))
            if "ap_null" in part:
                ax.plot(part["ap_null"], y, "o", mec=colour, mfc="white", markersize=3, mew=0.7)
        if "ap_null" in known:
            ax.plot([], [], "o", mec=INK, mfc="white", markersize=3, mew=0.7, label="masks of other samples")
        first = known.drop_duplicates("class")
        at = np.arange(len(classes))
        ax.vlines(first["prevalence"], at - 0.45, at + 0.45, color=MUTED, linewidth=2, zorder=0, label="prevalence")
        ax.vlines(first["ap_place"], at - 0.45, at + 0.45, color=INK, linewidth=1, zorder=0, label="place alone")
        ax.set(xlim=(0, 1.02), ylim=(len(classes) - 0.5, -0.5), xlabel="average precision on held-out samples")
        ax.set_yticks(at, [plain(name) for name in classes])
        left_out = table["class"].nunique() - len(classes)
        if left_out:
            ax.set_title(f"{left_out} of {table['class'].nunique()} classes have no average precision")
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2)
    return ax
