"""Codes of one latent over a whole slide."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from biosae.pl import style
from biosae.pl.heatmap import bar, caption, coloured, scale_of
from biosae.pl.tissue import scale_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from biosae.interpret.maps import Box
    from biosae.interpret.slides import SlideMap

_SIZE = 1600  # pixels of the picture below, on its longer side

_FADED = 0.4  # share of white in the grey picture, so that colour is seen on dark tissue


def slide(
    codes: SlideMap,
    *,
    source: str | os.PathLike | None = None,
    slide_mpp: float | tuple[float, float] | None = None,
    region: Box | None = None,
    limit: float | None = None,
    grey: bool = True,
    colorbar: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map over a slide, on its picture or (without one) on white with the tiles that are silent in grey.

    Parameters
    ----------
    codes : SlideMap
        What :func:`biosae.interpret.slide_map` gave.
    source : path-like, optional
        The slide; read from the level of its pyramid that is just fine enough (:func:`biosae.interpret.slide_view`).
    slide_mpp : float or (float, float), optional
        Micrometres per pixel of level 0, if the file does not state it.
    region : tuple of float, optional
        Left, upper, right, lower edge of a part to show, um. Default: where there are tiles, or the whole slide.
    limit : float, optional
        Code of full colour; default: the largest in the map.
    grey : bool
        Show the slide pale and without its colours, so that they cannot be taken for codes.
    colorbar : bool
    title : str, optional
        Default: the latent and how many tiles are active.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Its units are micrometres from the slide's upper left corner.

    Raises
    ------
    InputError
        For a limit that is not above 0, or a region beyond the slide.
    ReadError
        If the slide cannot be read.
    """
    left, upper, right, lower = shown = codes.box if region is None else region
    top = scale_of(codes.values, limit)
    picture = None
    if source is not None:
        from biosae.interpret.slides import slide_view

        picture, shown = slide_view(source, box=region, size=_SIZE, slide_mpp=slide_mpp)
        left, upper, right, lower = shown
    width, height = right - left, lower - upper
    with style.paper():
        side = 3.4 / max(width, height)
        ax = style.axes(ax, (max(1.6, width * side) + 0.8, max(1.0, height * side) + 0.5))
        x0, y0, x1, y1 = codes.box
        extent = (x0, x1, y1, y0)
        if picture is None:
            known = np.where(np.isnan(codes.values)[..., None], (1.0, 1.0, 1.0, 0.0), (0.92, 0.92, 0.92, 1.0))
            ax.imshow(known, extent=extent, interpolation="nearest")
        else:
            below = _FADED * 255 + (1 - _FADED) * (picture @ np.array([0.299, 0.587, 0.114])) if grey else picture
            ax.imshow(below, cmap="gray", vmin=0, vmax=255, extent=(left, right, lower, upper),
                      interpolation="antialiased")  # fmt: skip
        ax.imshow(coloured(codes.values, top), extent=extent, interpolation="nearest")
        ax.set(xlim=(left, right), ylim=(lower, upper))
        ax.set_axis_off()
        scale_bar(ax, width, 1.0, left=left)
        if colorbar:
            bar(ax, codes.values, top)
        ax.set_title(
            caption(codes.latent, codes.values, codes.noun, n=(codes.n_active, codes.n_tiles))
            if title is None
            else title
        )
    return ax
