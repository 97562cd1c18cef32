"""Where in a slide a latent fires: places of tiles and tokens, maps over whole slides, views of them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.interpret.examples import activation
from biosae.interpret.maps import Box, grid_box, token_grid

if TYPE_CHECKING:
    from anndata import AnnData

_MOST_CELLS = 2**26
_READ_AT_ONCE = 4096  # pixels of a level, each way


@dataclass(frozen=True)
class SlideMap:
    """Codes of one latent over a slide, as a picture whose pixels are ``pixel_um`` wide.

    Attributes
    ----------
    values : ndarray (rows, columns), float32
        Mean code of the tiles (or tokens) that lie there; NaN where there is none.
    box : tuple of float
        Left, upper, right, lower edge in micrometres from the slide's upper left corner.
    pixel_um, tile_um : float
        Side of a pixel and of a tile, um.
    latent : str
    slide : str or None
    n_tiles, n_active : int
        Tiles (tokens) of the slide, and those whose code is not 0.
    noun : str
        ``"tile"`` or ``"token"``.
    """

    values: np.ndarray
    box: Box
    pixel_um: float
    tile_um: float
    latent: str
    slide: str | None
    n_tiles: int
    n_active: int
    noun: str = "tile"


def places(adata: AnnData, *, slide: str | None = None, tile_um: float | None = None) -> pd.DataFrame:
    """Centre and size of every tile of a slide, or of every token of its tiles.

    Parameters
    ----------
    adata : AnnData
        Codes with ``obsm["spatial"]``: centres of tiles in um, which :func:`biosae.encode` takes from ``x_um`` and
        ``y_um``. Where tokens are kept, each gets its own place within its tile.
    slide : str, optional
        A value of ``obs["slide"]``; needed where there are several.
    tile_um : float, optional
        Side of a tile, um. Default: the distance between neighbouring tiles (median of that to the nearest), which is
        the side where tiles do not overlap.

    Returns
    -------
    DataFrame
        Index as ``adata.obs``; ``x_um, y_um`` (centre), ``width_um, height_um``.

    Raises
    ------
    InputError
        If places are unknown or not finite, the slide is not there or not named, or one tile has no ``tile_um``.
    """
    if "spatial" not in adata.obsm:
        raise InputError(
            "places of tiles are not known: set adata.obsm['spatial'] to their centres (x, y) in um, or read slides "
            "with bs.read.wsi"
        )
    mine = rows_of(adata, slide)
    centres = np.asarray(adata.obsm["spatial"], float)[mine]
    obs = adata.obs[mine]
    if not np.isfinite(centres).all():
        raise InputError(f"{(~np.isfinite(centres)).any(axis=1).sum()} tiles have no place; drop them first")
    side = float(tile_um) if tile_um is not None else _pitch(np.unique(centres, axis=0))
    if not 0 < side < math.inf:
        raise InputError(f"tile_um={tile_um} must be the side of a tile in um")
    x, y = centres.T
    width = height = side
    if "token_row" in obs:
        row, column = obs["token_row"].to_numpy(int), obs["token_col"].to_numpy(int)
        rows, columns = token_grid(adata)
        left, upper, right, lower = _share_of_tile(adata, obs, side, (rows, columns))
        width, height = side * (right - left) / columns, side * (lower - upper) / rows
        x = x + side * (left - 0.5) + (column + 0.5) * width
        y = y + side * (upper - 0.5) + (row + 0.5) * height
    return pd.DataFrame({"x_um": x, "y_um": y, "width_um": width, "height_um": height}, index=obs.index)


def slide_map(
    adata: AnnData,
    latent: str,
    *,
    slide: str | None = None,
    tile_um: float | None = None,
    pixel_um: float | None = None,
) -> SlideMap:
    """Heat map of one latent over a whole slide.

    Each tile (or token) is a square of its own size; where several overlap their codes are averaged. Edges are rounded
    to ``pixel_um``.

    Parameters
    ----------
    adata, slide, tile_um
        As of :func:`places`.
    latent : str
    pixel_um : float, optional
        Side of a pixel of the map, um. Default: that of a tile (token), or the distance between tiles that overlap.

    Returns
    -------
    SlideMap
        Draw it with :func:`biosae.pl.slide`.

    Raises
    ------
    InputError
        As of :func:`places`; for an unknown latent, or a map of more than 67 million pixels.

    Notes
    -----
    The sum and the number of squares over each pixel come from differences at their four corners, summed along both
    axes: the time is that of the tiles plus that of the pixels, whatever the size of the squares.
    """
    code = activation(adata, latent)
    where = places(adata, slide=slide, tile_um=tile_um)
    mine = rows_of(adata, slide)
    values = code.to_numpy(np.float64)[mine]
    side = np.stack([where["width_um"], where["height_um"]], axis=1)
    centres = where[["x_um", "y_um"]].to_numpy()
    apart = np.unique(np.asarray(adata.obsm["spatial"], float)[mine], axis=0)
    pitch = _pitch(apart) if len(apart) > 1 else math.inf
    pixel = float(pixel_um) if pixel_um is not None else min(float(side.min()), pitch)
    if not 0 < pixel < math.inf:
        raise InputError(f"pixel_um={pixel_um} must be the side of a pixel in um")
    origin = (centres - side / 2).min(axis=0)
    first = np.rint((centres - side / 2 - origin) / pixel).astype(np.int64)
    last = np.maximum(np.rint((centres + side / 2 - origin) / pixel).astype(np.int64), first + 1)
    columns, rows = last.max(axis=0)
    if rows * columns > _MOST_CELLS:
        raise InputError(f"a map of {columns:,} x {rows:,} pixels is too large; take pixel_um above {pixel:g}")
    count = _stack(first, last, np.ones(len(values)), (rows, columns))
    total = _stack(first, last, values, (rows, columns))
    active = _stack(first, last, (values != 0).astype(float), (rows, columns))
    held = np.rint(count)
    mean = np.divide(total, held, out=np.full(held.shape, np.nan), where=held > 0)
    mean[(held > 0) & (np.rint(active) == 0)] = 0.0  # exactly, where the running sums leave rounding
    box = (*origin, *(origin + pixel * np.array([columns, rows])))
    return SlideMap(
        mean.astype(np.float32), tuple(map(float, box)), pixel, pitch if tile_um is None else float(tile_um), latent,
        slide if slide is not None else only_slide(adata), len(values), int(np.count_nonzero(values)),
        "token" if "token_row" in adata.obs else "tile",
    )  # fmt: skip


def slide_view(
    source: str | os.PathLike,
    *,
    box: Box | None = None,
    size: int = 1600,
    slide_mpp: float | tuple[float, float] | None = None,
) -> tuple[np.ndarray, Box]:
    """A slide, or a part of it, as one picture; read block by block from the level of its pyramid that is just fine
    enough.

    Parameters
    ----------
    source : path-like
    box : tuple of float, optional
        Left, upper, right, lower edge in um; what lies beyond the slide is cut off. Default: the whole slide.
    size : int
        Longer side of the picture in pixels; fewer if the slide has not so many.
    slide_mpp : float or (float, float), optional
        Micrometres per pixel of level 0; default: what the file states.

    Returns
    -------
    ndarray, tuple of float
        ``uint8 (H, W, 3)`` and its edges in um.

    Raises
    ------
    InputError
        If the box does not touch the slide.
    ReadError
        If the slide cannot be read or does not state its scale.
    """
    from biosae.read.slides import open_slide, region

    mpp = np.array(scale_of(slide_mpp, source=source))
    slide = open_slide(source)
    try:
        full = np.array(slide.levels[0], float)
        edges = np.array([0, 0, *full]) if box is None else np.array(box, float) / np.tile(mpp, 2)
        edges = np.clip(edges, 0, np.tile(full, 2))
        span = edges[2:] - edges[:2]
        if (span <= 0).any():
            raise InputError(f"the box {box} um lies beyond the slide of {tuple(full * mpp)} um")
        scale = min(1.0, size / (span * mpp / mpp.min()).max())
        shape = np.maximum(1, np.rint(span * scale * mpp / mpp.min())).astype(int)  # (width, height)
        wanted = (span / shape).min()
        level = max((i for i, d in enumerate(slide.downsamples) if d <= wanted * 1.001), default=0)
        at, step = edges / slide.downsamples[level], span / shape / slide.downsamples[level]
        out = np.empty((shape[1], shape[0], 3), np.uint8)
        reach = np.maximum(1, (_READ_AT_ONCE / step).astype(int))
        for top in range(0, shape[1], reach[1]):
            for left in range(0, shape[0], reach[0]):
                w, h = min(reach[0], shape[0] - left), min(reach[1], shape[1] - top)
                x, y = at[0] + left * step[0], at[1] + top * step[1]
                part = (x, y, x + w * step[0], y + h * step[1])
                out[top : top + h, left : left + w] = region(slide, level, part, (int(w), int(h)), smooth=False)
    finally:
        slide.close()
    return out, tuple(map(float, edges * np.tile(mpp, 2)))


def _stack(first: np.ndarray, last: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Sum of ``values`` of the rectangles (x, y from ``first`` to ``last``) over each pixel."""
    rows, columns = shape[0] + 1, shape[1] + 1
    corners = ((first, first, 1), (last, first, -1), (first, last, -1), (last, last, 1))
    at = np.concatenate([y[:, 1] * columns + x[:, 0] for x, y, _ in corners])
    amount = np.concatenate([sign * values for *_, sign in corners])
    out = np.bincount(at, amount, minlength=rows * columns).reshape(rows, columns)
    return out.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]


def rows_of(adata: AnnData, slide: str | None) -> np.ndarray:
    """Boolean rows of the slide; all of them where there is only one."""
    if slide is None:
        names = adata.obs["slide"].unique() if "slide" in adata.obs else []
        if len(names) > 1:
            shown = ", ".join(repr(str(name)) for name in names[:5])
            raise InputError(f"there are {len(names)} slides; name one with slide=, such as {shown}")
        return np.ones(adata.n_obs, dtype=bool)
    if "slide" not in adata.obs:
        raise InputError(f"obs has no column 'slide', so {slide!r} cannot be found; name the role slide= when reading")
    mine = (adata.obs["slide"].astype(str) == str(slide)).to_numpy()
    if not mine.any():
        raise InputError(f"no slide {slide!r}; {nearest(str(slide), adata.obs['slide'].astype(str).unique())}")
    return mine


def only_slide(adata: AnnData) -> str | None:
    return str(adata.obs["slide"].iloc[0]) if "slide" in adata.obs else None


def _pitch(centres: np.ndarray) -> float:
    """Median distance of a tile to its nearest neighbour, um."""
    if len(centres) < 2:
        raise InputError("one tile does not say how large it is; pass tile_um=")
    from scipy.spatial import cKDTree

    return float(np.median(cKDTree(centres).query(centres, k=2)[0][:, 1]))


def _share_of_tile(adata: AnnData, obs: pd.DataFrame, side: float, grid: tuple[int, int]) -> Box:
    """Edges of the grid of tokens as shares of the tile's side."""
    identity = adata.uns.get("biosae", {}).get("identity") or {}
    mpp = float(obs["mpp"].iloc[0]) if "mpp" in obs else identity.get("tile_mpp")
    pixels = 1000 if mpp is None else max(1, round(side / mpp))
    left, upper, right, lower = grid_box(identity, (pixels, pixels), grid)
    return left / pixels, upper / pixels, right / pixels, lower / pixels


def scale_of(
    stated: float | tuple[float, float] | None, *, obs: pd.DataFrame | None = None, source: Any = None
) -> tuple[float, float]:
    """Micrometres per pixel (x, y) of a slide's full resolution: as stated, else of ``obs``, else of the slide."""
    if stated is None and obs is not None and {"slide_mpp_x", "slide_mpp_y"} <= set(obs):
        stated = (obs["slide_mpp_x"].iloc[0], obs["slide_mpp_y"].iloc[0])
    if stated is None and source is not None:
        from biosae.read.slides import open_slide, resolve_mpp

        slide = open_slide(source)
        try:
            stated = resolve_mpp(slide, None, "argument")[0]
        finally:
            slide.close()
    if stated is None:
        raise InputError("micrometres per pixel of the slide's full resolution are not known; pass slide_mpp=")
    x, y = np.broadcast_to(np.asarray(stated, float), (2,))
    if not (0 < x < math.inf and 0 < y < math.inf):
        raise InputError(f"slide_mpp={stated!r} must be positive micrometres per pixel")
    return float(x), float(y)
