"""Where in an item a latent fires: activations of one latent on the token grid of one sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.interpret.explain.items import TAILS
from biosae.interpret.explain.render import Marks

SHARE = 0.3
"""Cells at or above this share of the item's highest activation are highlighted."""


class TokenMaps:
    """Grids of activations out of codes that keep a row a token.

    Parameters
    ----------
    tokens : AnnData
        Of ``biosae.encode(sae, emb, tokens=None)``: ``obs`` with ``sample_id``, ``token_row``, ``token_col``.

    Raises
    ------
    InputError
        If these columns are absent.
    """

    def __init__(self, tokens: Any) -> None:
        missing = [c for c in ("sample_id", "token_row", "token_col") if c not in tokens.obs]
        if missing:
            raise InputError(f"tokens has no column {missing[0]!r}; make it with encode(sae, emb, tokens=None)")
        self.X = sp.csr_matrix(tokens.X)
        self.columns = {name: j for j, name in enumerate(tokens.var_names)}
        self.row = tokens.obs["token_row"].to_numpy(int)
        self.column = tokens.obs["token_col"].to_numpy(int)
        self.shape = (int(self.row.max()) + 1, int(self.column.max()) + 1)
        self.identity = tokens.uns.get("biosae", {}).get("identity")
        self.samples = (
            pd.Series(np.arange(len(self.row))).groupby(tokens.obs["sample_id"].astype(str).to_numpy()).indices
        )

    def grid(self, sample_id: str, latent: str, tail: str = "+") -> np.ndarray | None:
        """Activations (rows, columns), 0 where the latent is silent; None if the sample is not there."""
        where = self.samples.get(sample_id)
        if where is None or latent not in self.columns:
            return None
        found = np.zeros(self.shape)
        values = self.X[where][:, [self.columns[latent]]].toarray().ravel()
        found[self.row[where], self.column[where]] = np.maximum(TAILS[tail] * values, 0)
        return found

    def marks(self, region: np.ndarray) -> Marks:
        """Outline of cells, bool (rows, columns)."""
        rows, columns = (tuple(range(n + 1)) for n in self.shape)
        return Marks(self.shape, rows, columns, tuple(map(tuple, region.tolist())), self.identity)

    def blocks(self, most: int) -> Marks:
        """A grid of at most ``most`` blocks a side, of sizes as equal as can be."""
        rows, columns = (tuple(np.linspace(0, n, min(n, most) + 1).astype(int).tolist()) for n in self.shape)
        return Marks(self.shape, rows, columns, None, self.identity)


def highlight(grid: np.ndarray) -> np.ndarray:
    """Cells with at least :data:`SHARE` of the highest activation, bool (rows, columns)."""
    return (grid >= SHARE * grid.max()) & (grid > 0)


def displaced(grid: np.ndarray, *, rng: np.random.Generator) -> np.ndarray | None:
    """The highlighted shape moved to where the latent is silent, bool (rows, columns).

    The shape is moved as a whole, without leaving the grid, to one of the places where it covers no firing cell. If
    there is none it may also be mirrored, and leave the grid on one side to enter on the other. Cells are never drawn
    one by one: a rater would tell scattered cells from a shape without knowing what is marked. None if there is no
    place.
    """
    shape, fires = highlight(grid), grid > 0
    r, c = np.nonzero(shape)
    inside = np.zeros(grid.shape, bool)
    dr, dc = (np.arange(-k.min(), n - k.max()) for k, n in zip((r, c), grid.shape))
    inside[np.ix_(dr, dc)] = True
    places = _free(shape, fires) & inside
    if not places.any():
        turned = [shape, shape[::-1], shape[:, ::-1], shape[::-1, ::-1]]
        found = [(one, free) for one in turned if (free := _free(one, fires)).any()]
        if not found:
            return None
        shape, places = found[rng.integers(len(found))]
    step = rng.choice(np.argwhere(places))
    return np.roll(shape, step, axis=(0, 1))


def _free(shape: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """Steps (rows, columns), with the far sides joined, after which a shape covers no firing cell."""
    product = np.fft.rfft2(fires.astype(float)) * np.conj(np.fft.rfft2(shape.astype(float)))
    return np.fft.irfft2(product, s=fires.shape) < 0.5


def coarse(grid: np.ndarray, edges: tuple[tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
    """Greatest activation in each block between edges of rows and of columns.

    >>> coarse(np.arange(16.0).reshape(4, 4), ((0, 2, 4), (0, 1, 4))).tolist()
    [[4.0, 7.0], [12.0, 15.0]]
    """
    for axis in (0, 1):
        grid = np.maximum.reduceat(grid, edges[axis][:-1], axis=axis)
    return grid
