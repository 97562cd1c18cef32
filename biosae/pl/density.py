"""How often latents fire, and how many never do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from biosae.pl import style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def density(adata: AnnData, *, bins: int = 40, ax: Axes | None = None) -> Axes:
    """Histogram of the share of rows in which each latent fires; the title line gives L0 and the dead latents.

    L0 is the mean number of active latents a row. Latents that never fire among ``N`` rows have no place on the
    logarithmic axis and are drawn as the bar at the left; their true density is below ``3 / N`` with 95 % confidence
    (the rule of three).

    Parameters
    ----------
    adata : AnnData of shape (n_rows, n_latents)
        Codes of :func:`biosae.encode`.
    bins : int
        Bins of the histogram of live latents.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    n_rows, n_latents = adata.shape
    share = firing_share(adata)
    live = share[share > 0]
    dead = n_latents - len(live)
    with style.paper():
        ax = style.axes(ax, (3.5, 2.4))
        low = np.floor(np.log10(live.min() if len(live) else 1 / max(n_rows, 1)) - 1e-9)
        edges = np.logspace(low, 0, bins + 1)
        ax.hist(np.clip(live, edges[0], 1.0), bins=edges, color=style.PALETTE["blue"], linewidth=0)
        ratio = edges[1] / edges[0]
        if dead:
            left = edges[0] / ratio**3
            ax.bar(left, dead, width=edges[0] / ratio - left, align="edge", color=style.PALETTE["vermilion"])
            ax.annotate(
                f"{dead:,} never fire", (left, dead), xytext=(1, 3), textcoords="offset points", fontsize=7,
                color=style.PALETTE["vermilion"],
            )  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlabel("density (share of rows in which a latent fires)")
        ax.set_ylabel("latents")
        ax.set_title(
            style.wrap(
                f"{n_latents:,} latents, {dead:,} dead ({dead / max(n_latents, 1):.1%}), "
                f"L0 = {share.sum():.1f}, n = {style.count(n_rows, 'row')}"
            )
        )
    return ax


def firing_share(adata: AnnData) -> np.ndarray:
    """Share of rows in which each latent is not zero, float64 of shape (n_latents,)."""
    x = adata.X
    active = x.getnnz(axis=0) if hasattr(x, "getnnz") and not (x.data == 0).any() else np.asarray((x != 0).sum(axis=0))
    return np.ravel(active).astype(float) / max(adata.n_obs, 1)
