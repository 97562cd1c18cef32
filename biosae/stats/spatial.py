"""Tiles of a slide moved as a whole: shifts of the map and its mirror images, which keep spatial autocorrelation.

Neighbouring tiles resemble each other, so single tiles are not exchangeable and permuting them rejects true nulls far
too often. Shifting the whole map of a target by a random step leaves each tile with its neighbours and only changes how
the map lies on the latents (Fortin and Jacquez, Bull Ecol Soc Am 81, 201, 2000; Upton and Fingleton, Spatial Data
Analysis by Example, 1985). A map wrapped at its edges has a seam there that tissue does not have, and so varies too
little; mirrored at its edges it has none.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from biosae.errors import StatisticsError
from biosae.stats.schemes import Scheme

FEW_TILES = 16
"""Slides with fewer tiles have too few shifts and are left as they are."""


def step_of(xy: np.ndarray) -> np.ndarray:
    """Distance from one tile to the next along each axis, (2,): the middle gap between neighbouring coordinates."""
    out = np.ones(2)
    for axis in range(2):
        values = np.unique(np.round(xy[:, axis], 6))
        if len(values) > 1:
            gaps = np.diff(values)
            out[axis] = np.median(gaps[gaps > gaps.max() * 1e-3])
    return out


def shifts(xy: np.ndarray, rng: np.random.Generator, n_draws: int) -> np.ndarray:
    """For every tile (n,) and draw, the tile whose value it takes (n, n_draws).

    The map is reflected or not along each axis and shifted by a whole number of steps over the plane that it covers
    with its mirror images, of period twice the extent of the slide and one step. What is mirrored is there twice and
    the rest is not there, so that values repeat; a tile that comes to lie beside the tissue takes the value of the
    nearest tile, as in spin tests on cortical surfaces (Alexander-Bloch et al., NeuroImage 178, 540, 2018).
    """
    step = step_of(xy)
    low = xy.min(axis=0)
    box = np.ptp(xy, axis=0) + step
    at = (xy - low) + step / 2
    tree = cKDTree(at)
    counts = np.maximum(np.round(2 * box / step).astype(np.int64), 1)
    out = np.empty((len(xy), n_draws), np.int32)
    for b in range(n_draws):
        flip, move = rng.random(2) < 0.5, rng.integers(0, counts)
        moved = np.mod(np.where(flip, box - at, at) + move * step, 2 * box)
        out[:, b] = tree.query(np.minimum(moved, 2 * box - moved))[1]
    return out


def spatial(xy: np.ndarray, slides: np.ndarray) -> Scheme:
    """Every slide's tiles shifted as a whole, slides independently of each other.

    Parameters
    ----------
    xy
        Coordinates of tiles (n, 2).
    slides
        Slide of every tile (n,), integers from 0.

    Raises
    ------
    StatisticsError
        If coordinates are missing, or no slide has :data:`FEW_TILES` tiles.
    """
    if not np.isfinite(xy).all():
        raise StatisticsError("obsm['spatial'] holds missing coordinates; leave those tiles out")
    rows = [np.flatnonzero(slides == s) for s in range(int(slides.max()) + 1)]
    if max(map(len, rows)) < FEW_TILES:
        raise StatisticsError(f"permute='spatial': no slide has {FEW_TILES} tiles, so there are too few shifts")

    def arrange(rng: np.random.Generator, b: int) -> np.ndarray:
        out = np.repeat(np.arange(len(xy), dtype=np.int32)[:, None], b, axis=1)
        for own in rows:
            if len(own) >= FEW_TILES:
                out[own] = own[shifts(xy[own], rng, b)]
        return out

    return Scheme(f"by shifts of {len(rows)} slides", slides, len(rows), arrange, exact=False)
