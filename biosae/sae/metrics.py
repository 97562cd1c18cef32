"""Quality of a reconstruction and of a code, gathered block by block in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError

ROUNDING = 1e-12
"""Sums of squares below this share of sum ||x||^2 are float32 rounding and count as 0."""


def fvu(error: float, spread: float, square: float) -> float:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2.

    Without spread it is 0 if there is no error either, else +inf. ``square`` = sum ||x||^2 sets what rounding is.
    """
    floor = ROUNDING * square
    if spread <= floor:
        return 0.0 if error <= floor else float("inf")
    return error / spread


def density_histogram(density: np.ndarray) -> dict[str, Any]:
    """Numbers of latents by the log10 of their density, four bins a decade; dead latents are counted apart.

    Parameters
    ----------
    density
        Share of rows in which each latent is active, (m,), as in ``SAE.density_``.

    Returns
    -------
    dict
        ``log10_edges``: multiples of 1/4, from the decade of the rarest live latent up to 0; ``counts``: latents in
        each bin (lower edge included, the last bin also holds density 1); ``dead``: latents of density 0. Counts and
        dead sum to m.

    Raises
    ------
    InputError
        If a density lies outside [0, 1].
    """
    density = np.asarray(density, np.float64).ravel()
    if not ((density >= 0) & (density <= 1)).all():
        raise InputError("densities must lie in [0, 1]; pass SAE.density_, not counts of rows")
    logs = np.log10(density[density > 0])
    lowest = np.floor(logs.min()) if len(logs) else -1.0
    edges = np.arange(4 * min(lowest, -1.0), 1) / 4
    return {
        "log10_edges": edges.tolist(),
        "counts": np.histogram(logs, edges)[0].tolist(),
        "dead": int((density == 0).sum()),
    }


class Quality:
    """Running sums over blocks of rows; any split into blocks gives the same numbers (to about 1e-12).

    Parameters
    ----------
    bias
        The decoder bias b, (d,), in the space of the rows; cosine and shrinkage are taken about it, as a large common
        offset would hide them.
    n_latents
        Number of latents m.
    """

    def __init__(self, bias: np.ndarray, n_latents: int) -> None:
        self.bias = np.asarray(bias, np.float64)
        self.n = 0
        self.mean = np.zeros_like(self.bias)
        self.spread = self.error = self.square = 0.0
        self.ratio = 0.0
        self.zero_rows = 0
        self.active = np.zeros(n_latents, np.int64)
        self.cosines, self.n_cosines = 0.0, 0
        self.hat_square = self.hat_dot = 0.0

    def update(self, x: np.ndarray, x_hat: np.ndarray, z: scipy.sparse.csr_matrix) -> None:
        """Add rows x (n, d), their reconstructions (n, d) and codes (n, m); stored zeros do not count as active."""
        if not len(x):
            return
        x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
        n, mean = len(x), x.mean(0)
        shift = mean - self.mean
        self.spread += float(np.square(x - mean).sum() + shift @ shift * self.n * n / (self.n + n))
        self.mean = self.mean + shift * (n / (self.n + n))
        self.n += n
        error, square = np.square(x - x_hat).sum(1), np.square(x).sum(1)
        self.error += float(error.sum())
        self.square += float(square.sum())
        nonzero = square > 0
        self.zero_rows += int(n - nonzero.sum())
        self.ratio += float((error[nonzero] / square[nonzero]).sum())
        self.active += np.bincount(z.indices[z.data != 0], minlength=len(self.active))
        u, v = x - self.bias, x_hat - self.bias
        dot, norms = (u * v).sum(1), np.sqrt(np.square(u).sum(1) * np.square(v).sum(1))
        usable = norms > 0
        self.cosines += float((dot[usable] / norms[usable]).sum())
        self.n_cosines += int(usable.sum())
        self.hat_square += float(np.square(v).sum())
        self.hat_dot += float(dot.sum())

    @property
    def density(self) -> np.ndarray:
        """Share of rows in which each latent is active, (m,)."""
        return self.active / self.n

    def summary(self) -> dict[str, float]:
        """Numbers of all rows seen.

        Returns
        -------
        dict
            ``n_rows``; ``fvu``; ``nmse`` = mean ||x - x_hat||^2 / ||x||^2 over the rows that are not zero, with
            ``zero_rows`` counted; ``l0`` = mean active latents a row; ``dead_share`` of latents never active in these
            rows, and ``dead_density_bound`` = 3 / n: the density a dead latent may still have (95 %, rule of three,
            independent rows); ``cosine`` of x - b and x_hat - b, mean over rows; ``gamma`` = sum ||x_hat - b||^2 /
            sum <x_hat - b, x - b>, below 1 where reconstructions are shrunken (Rajamanoharan et al. 2024).
        """
        scored = self.n - self.zero_rows
        return {
            "n_rows": self.n,
            "fvu": fvu(self.error, self.spread, self.square),
            "nmse": self.ratio / scored if scored else float("nan"),
            "zero_rows": self.zero_rows,
            "l0": float(self.active.sum() / self.n),
            "dead_share": float((self.active == 0).mean()),
            "dead_density_bound": 3 / self.n,
            "cosine": self.cosines / self.n_cosines if self.n_cosines else float("nan"),
            "gamma": self.hat_square / self.hat_dot if self.hat_dot > 0 else float("nan"),
        }
