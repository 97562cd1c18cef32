"""A slide at low magnification, with the outline of its tissue and the tiles that were kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import InputError
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from biosae.read.tissue import TissueMask

_LENGTHS = [m * 10**e for e in range(6) for m in (1, 2, 5)]  # um


def tissue(
    source: TissueMask | str | os.PathLike,
    *,
    tiles: Any = None,
    slide_mpp: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Thumbnail of a slide with the outline of its tissue, a scale bar, and the tiles that were kept.

    Parameters
    ----------
    source : TissueMask or path-like
        What :func:`biosae.read.tissue_mask` gave, or the slide.
    tiles : biosae.Samples, optional
        What :func:`biosae.read.wsi` gave; those of this slide's file are drawn.
    slide_mpp : float, optional
        Micrometres per pixel of the slide's level 0, if ``source`` is a path and the file does not state it.
    title : str, optional
        Default: the file's name, the area of its tissue and the number of tiles.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Its units are pixels of the slide's level 0.

    Raises
    ------
    InputError
        If ``tiles`` has none of this slide.
    ReadError
        If the slide cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        from biosae.read.tissue import tissue_mask

        source = tissue_mask(source, slide_mpp=slide_mpp)
    (width, height), (rows, columns) = source.size, source.mask.shape
    micrometre = width / (columns * source.mpp[0])  # in pixels of level 0
    stretch = source.mpp[1] / source.mpp[0] * (rows / columns) / (height / width)  # of pixels that are not square
    text = f"{Path(source.path).name}: {source.area:.2g} mm² tissue"
    with style.paper():
        side = 3.4 / max(width, height * stretch)
        ax = style.axes(ax, (max(1.6, width * side) + 0.1, max(1.0, height * stretch * side) + 0.5))
        ax.imshow(source.thumbnail, extent=(0, width, height, 0), aspect=stretch, interpolation="antialiased")
        ax.set_axis_off()
        if tiles is not None:
            obs, side_x, side_y = _of_slide(tiles, source.path)
            _squares(ax, obs["x"].to_numpy(float), obs["y"].to_numpy(float), side_x, side_y)
            text += f", {style.count(len(obs), 'tile')}"
        if source.mask.any() and not source.mask.all():
            outline = np.pad(source.mask.astype(float), 1)
            at_x = (np.arange(columns + 2) - 0.5) * width / columns
            at_y = (np.arange(rows + 2) - 0.5) * height / rows
            ax.contour(at_x, at_y, outline, levels=[0.5], colors=[style.PALETTE["vermilion"]], linewidths=0.8)
        ax.set(xlim=(0, width), ylim=(height, 0))
        scale_bar(ax, width, micrometre)
        ax.set_title(text if title is None else title)
    return ax


def _of_slide(tiles: Any, path: str) -> tuple[Any, float, float]:
    """Rows of the tiles of one slide, and the tiles' width and height in pixels of level 0."""
    wanted = os.path.realpath(path)
    own = {p: os.path.realpath(tiles.file(i)) == wanted for i, p in _first_rows(tiles.obs["path"])}
    obs = tiles.obs[tiles.obs["path"].map(own)]
    if obs.empty or not {"x", "y", "slide_mpp_x"} <= set(obs):
        raise InputError(f"tiles= holds no tile of {path}; pass the samples that bs.read.wsi made of this slide")
    side = tiles.reader.tile * tiles.reader.mpp
    return obs, side / obs["slide_mpp_x"].iloc[0], side / obs["slide_mpp_y"].iloc[0]


def _first_rows(paths: Any) -> list[tuple[int, str]]:
    """Position of the first row of each path."""
    first = ~paths.duplicated().to_numpy()
    return [(int(i), paths.iloc[i]) for i in np.flatnonzero(first)]


def _squares(ax: Axes, x: np.ndarray, y: np.ndarray, width: float, height: float) -> None:
    from matplotlib.collections import PolyCollection

    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    squares = np.stack([x, y], axis=1)[:, None, :] + corners
    ax.add_collection(
        PolyCollection(squares, facecolors=(0, 0, 0, 0), edgecolors=style.PALETTE["blue"], linewidths=0.5),
        autolim=False,
    )


def scale_bar(ax: Axes, width: float, micrometre: float, *, left: float = 0.0) -> None:
    """A bar of a round length, about a quarter of the width, below the picture at its right.

    ``width`` of the picture and a ``micrometre`` are in units of the axes, as is its ``left`` edge.
    """
    length = max((n for n in _LENGTHS if n * micrometre <= 0.3 * width), default=_LENGTHS[0])
    name = f"{length // 1000} mm" if length >= 1000 else f"{length} µm"
    y = -0.025
    place = ax.get_xaxis_transform()
    right = left + width
    ax.plot([right - length * micrometre, right], [y, y], color=style.INK, linewidth=1.5, transform=place,
            clip_on=False, solid_capstyle="butt")  # fmt: skip
    ax.text(right - length * micrometre / 2, y - 0.012, name, transform=place, ha="center", va="top", fontsize=7,
            color=style.INK)  # fmt: skip
