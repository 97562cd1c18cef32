"""Clusters of samples, their stability, and the map of decoder directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
MAX_CLASSES = len(style.COLOURS) * len(MARKERS)


def clusters(
    adata: Any, *, colour: str | Sequence[str] = "cluster", basis: str = "X_umap", fig: Figure | None = None
) -> Figure:
    """The layout of the samples, one panel a column.

    Parameters
    ----------
    adata
        After :func:`biosae.search.cluster`.
    colour : str or sequence of str
        Columns of ``obs``, or names of latents. Numbers get a colour bar, classes a colour and a marker each; clusters
        are numbered where they lie.
    basis : str
        Key of ``obsm`` (n, 2). Axes of a UMAP have no unit and distances between its islands no meaning.
    fig : matplotlib.figure.Figure, optional

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        For an unknown column or layout, or more classes than can be told apart.
    """
    names = [colour] if isinstance(colour, str) else list(colour)
    if basis not in adata.obsm:
        raise InputError(f"obsm has no {basis!r}; run biosae.search.cluster first. {nearest(basis, list(adata.obsm))}")
    xy = np.asarray(adata.obsm[basis], float)
    placed = np.isfinite(xy).all(axis=1)
    with style.paper():
        fig = style.figure((2.9 * len(names), 2.9)) if fig is None else fig
        panels = np.atleast_1d(fig.subplots(1, len(names)))
        for ax, name in zip(panels, names):
            values = _values(adata, name)
            n_missing = int((~placed).sum())
            _scatter(ax, xy[placed], values[placed], name, numbered=_made_by_cluster(adata, name))
            left = f"; {n_missing:,} silent, not shown" if n_missing else ""
            ax.set_title(style.wrap(f"{name}: {style.count(int(placed.sum()), 'sample')}{left}", width=44))
            _bare(ax, basis)
    return fig


def cluster_stability(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Agreement of clusters between seeds, between subsamples and with labels, over the resolution.

    Parameters
    ----------
    table : DataFrame
        Table of :func:`biosae.search.cluster`. The vertical line is the resolution that was kept.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column is absent.
    """
    missing = {"resolution", "n_clusters", "ari_seeds", "ari_subsamples", "kept"} - set(table.columns)
    if missing:
        raise InputError(f"the table of clusters has no column {', '.join(map(repr, sorted(missing)))}")
    own = {"ari_seeds": "other seeds", "ari_subsamples": "80 % of the patients or samples"}
    labels = [c for c in table.columns if c.startswith("ari_") and c not in (*own, "ari_seeds_min")]
    with style.paper():
        ax = style.axes(ax, (3.6, 2.6))
        x = np.arange(len(table))
        for i, (column, name) in enumerate([*own.items(), *((c, c.removeprefix("ari_")) for c in labels)]):
            solid = column in own
            ax.plot(
                x, table[column], label=name, color=style.COLOURS[i % len(style.COLOURS)], markersize=4,
                marker=MARKERS[i % len(MARKERS)], linestyle="-" if solid else (0, (3, 2)),
            )  # fmt: skip
        kept = np.flatnonzero(table["kept"].to_numpy(bool))
        for at in kept:
            ax.axvline(at, color=style.MUTED, linewidth=0.8, zorder=0)
        ax.set_xticks(x, [f"{r:g}\n{n}" for r, n in zip(table["resolution"], table["n_clusters"])])
        ax.set_xlabel("resolution (below: clusters)")
        ax.set_ylabel("adjusted Rand index with")
        ax.set_ylim(min(-0.05, float(np.nanmin(table[labels].to_numpy(float), initial=0.0)) - 0.05), 1.05)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def decoder_map(adata: Any, *, result: dict[str, Any] | None = None, ax: Axes | None = None) -> Axes:
    """Layout of the decoder's directions, coloured by the concept that excites them.

    Parameters
    ----------
    adata
        After :func:`biosae.search.decoder_geometry`: ``varm["X_umap"]`` and ``var["concept"]``.
    result : dict, optional
        What that function gave: the silhouette and its p go into the title. They are of cosine distances between the
        directions themselves, not of the layout.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the layout or the labels are absent.
    """
    if "X_umap" not in adata.varm or "concept" not in adata.var:
        raise InputError("varm['X_umap'] or var['concept'] is absent; run biosae.search.decoder_geometry first")
    xy, names = np.asarray(adata.varm["X_umap"], float), adata.var["concept"].astype(str).to_numpy()
    placed = np.isfinite(xy).all(axis=1)
    plain, labelled = placed & (names == ""), placed & (names != "")
    with style.paper():
        ax = style.axes(ax, (4.0, 2.9))
        ax.scatter(*xy[plain].T, s=5, color=style.MUTED, linewidths=0, label=f"no label ({int(plain.sum()):,})")
        _classes(ax, xy[labelled], names[labelled], size=14)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.1)
        title = f"{style.count(int(labelled.sum()), 'direction')} of {int(placed.sum()):,} labelled"
        if result is not None and result["status"] == "ok":
            title += (
                f"; silhouette {style.number(result['silhouette'], digits=3)}, of random labels "
                f"{style.number(result['null_mean'], digits=3)} (p {style.p_value(result['p'])}, "
                f"n = {style.count(result['n_rows'], 'direction')})"
            )
        ax.set_title(style.wrap(title, width=50))
        _bare(ax, "X_umap")
    return ax


def _values(adata: Any, name: str) -> pd.Series:
    if name in adata.obs:
        return adata.obs[name].reset_index(drop=True)
    if name in adata.var_names:
        column = adata.X[:, adata.var_names.get_loc(name)]
        return pd.Series(np.asarray(column.todense() if hasattr(column, "todense") else column).ravel())
    raise InputError(f"{name!r} is neither a column of obs nor a latent; {nearest(name, list(adata.obs.columns))}")


def _made_by_cluster(adata: Any, name: str) -> bool:
    return isinstance(adata.uns.get(name), dict) and "params" in adata.uns[name]


def _scatter(ax: Axes, xy: np.ndarray, values: pd.Series, name: str, *, numbered: bool) -> None:
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values) and values.nunique() > 2:
        numbers = values.to_numpy(float, na_value=np.nan)
        order = np.argsort(np.nan_to_num(numbers, nan=-np.inf), kind="stable")
        known = order[np.isfinite(numbers[order])]
        ax.scatter(*xy[order].T, s=5, color=style.MUTED, linewidths=0)
        drawn = ax.scatter(*xy[known].T, s=5, c=numbers[known], cmap="cividis", linewidths=0, rasterized=len(xy) > 3000)
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7, label=name)
        return
    names = values.astype("string").fillna("").to_numpy(str)
    ax.scatter(*xy[names == ""].T, s=5, color=style.MUTED, linewidths=0)
    order = [str(c) for c in values.cat.categories] if isinstance(values.dtype, pd.CategoricalDtype) else None
    known = names != ""
    _classes(ax, xy[known], names[known], size=6, order=order)
    if numbered:
        for level in np.unique(names[known]):
            x, y = np.median(xy[names == level], axis=0)
            ax.text(
                x, y, level, fontsize=7, ha="center", va="center", color=style.INK,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
            )  # fmt: skip
    else:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, handletextpad=0.1, markerscale=1.6)


def _classes(ax: Axes, xy: np.ndarray, names: np.ndarray, *, size: float, order: list[str] | None = None) -> None:
    levels = [level for level in (order or sorted(set(names))) if (names == level).any()]
    if len(levels) > MAX_CLASSES:
        raise InputError(f"{len(levels)} classes cannot be told apart; take a column with at most {MAX_CLASSES}")
    for i, level in enumerate(levels):
        rows = names == level
        ax.scatter(
            *xy[rows].T, s=size, color=style.COLOURS[i % len(style.COLOURS)], marker=MARKERS[i // len(style.COLOURS)],
            linewidths=0, label=f"{level} ({int(rows.sum()):,})", rasterized=len(xy) > 3000,
        )  # fmt: skip


def _bare(ax: Axes, basis: str) -> None:
    name = basis.removeprefix("X_").upper()
    ax.set_xlabel(f"{name} 1")
    ax.set_ylabel(f"{name} 2")
    ax.set_xticks([])
    ax.set_yticks([])
