"""Input scaling for training and its exact folding into the weights, so that the saved model reads raw embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from biosae.errors import InputError, nearest
from biosae.sae.metrics import ROUNDING
from biosae.sae.model import SparseAutoencoder

RIDGE = 0.1
"""Whitening adds this share of the mean eigenvalue to every eigenvalue."""
SMALLEST_NORM = 1e-6
"""``l2`` divides by at least this, so that a zero row stays zero."""
SMALLEST_DEVIATION = 1e-5
"""``layernorm`` adds this to the deviation of a row."""
NARROW = 16
"""Products of fewer columns are made with so many: below, the bits of a row depend on where in a block it stands."""
LARGE_OFFSET = 1.0
"""Ratio ||mean||^2 / mean ||x - mean||^2 above which a mode that does not centre is advised against: most of the mean
square of a row is then the same for all rows."""
DOMINANT_SHARE = 0.5
"""Share of the variance above which one dimension is said to dominate the loss (if it is also 10 times the mean)."""
FOLD_ROWS = 65_536
MOMENT_ROWS = 1024


@dataclass(frozen=True)
class Steps:
    """What one mode does, in this order."""

    rowwise: str | None = None
    centre: bool = False
    standardise: bool = False
    whiten: bool = False
    scale: bool = False


MODES = {
    "none": Steps(),
    "centre": Steps(centre=True),
    "unit_mean_square": Steps(scale=True),
    "centre_scale": Steps(centre=True, scale=True),
    "layernorm": Steps(rowwise="layernorm", centre=True, scale=True),
    "l2": Steps(rowwise="l2", centre=True, scale=True),
    "standardise": Steps(centre=True, standardise=True, scale=True),
    "whiten": Steps(centre=True, whiten=True, scale=True),
}
"""Values of the setting ``normalise``."""


@dataclass(frozen=True)
class Moments:
    """Population moments of rows, float64."""

    n: int
    mean: np.ndarray
    """Column means, (d,)."""
    variance: np.ndarray
    """Column variances, (d,); their sum is mean_i ||u_i - mean||^2."""
    covariance: np.ndarray | None = None
    """(d, d), where it was asked for."""


@dataclass
class Normaliser:
    """y = scale (u - mean) W, where u is the row itself or, with ``rowwise``, the row brought to a common scale.

    W is the identity except for ``whiten`` and ``standardise``. What acts on a whole column or on all columns (mean, W,
    scale) is folded into the weights of the trained model; what differs from row to row is not, and stays with
    :meth:`ready` and :meth:`restore`.
    """

    mean: np.ndarray
    """Subtracted from rows, float64 (d,)."""
    scale: float
    """Multiplies rows."""
    rowwise: str | None = None
    """``layernorm`` or ``l2`` where each row has its own factor. True and False (files of format 1) are read too;
    ``layernorm_std`` is ``layernorm`` undone with the deviation alone, as SAELens does it."""
    whiten: np.ndarray | None = None
    """W, float64 (d, d), with orthogonal columns (diagonal for ``standardise``); None is the identity."""
    offset: dict[str, Any] = field(default_factory=dict)
    """:func:`offset_report` of the rows seen by :meth:`fit`."""

    def __post_init__(self) -> None:
        if isinstance(self.rowwise, bool):
            self.rowwise = "layernorm" if self.rowwise else None
        self._tensors: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor | None, ...]] = {}

    @classmethod
    def fit(cls, mode: str, blocks: Iterable[np.ndarray], *, ridge: float = RIDGE) -> Normaliser:
        """Scaling ``mode`` from raw training rows, read once, block by block.

        Parameters
        ----------
        mode
            One of :data:`MODES`.
        blocks
            Arrays (n_b, d) of finite rows. The table is never held; ``whiten`` holds one (d, d) sum.
        ridge
            Share of the mean eigenvalue that whitening adds to each eigenvalue.

        Raises
        ------
        InputError
            For an unknown mode, a ridge that is not positive, or no rows.

        Notes
        -----
        ``standardise`` divides each dimension by its standard deviation (columns of different units, such as named
        features); a constant one keeps its factor of 1. ``scale`` brings the mean of ||y||^2 to 1, for ``whiten`` too.
        Rows without spread (below float32 rounding of their size) keep scale 1 and W = identity.
        """
        if mode not in MODES:
            raise InputError(f"normalise={mode!r} is not known; {nearest(mode, MODES)}")
        steps = MODES[mode]
        found = moments((_ready(x, steps.rowwise) for x in blocks), covariance=steps.whiten)
        square = float(found.mean @ found.mean)
        spread = float(found.variance.sum())
        flat = spread <= ROUNDING * (spread + square)
        size = spread + (0.0 if steps.centre else square)
        whiten = None
        if steps.whiten and not flat:
            whiten = whitening(found.covariance, ridge=ridge)
            size = float(np.einsum("ij,ij->", found.covariance @ whiten, whiten))
        elif steps.standardise and not flat:
            varies = found.variance > ROUNDING * (found.variance + np.square(found.mean))
            whiten = np.diag(np.where(varies, found.variance, 1.0) ** -0.5)
            size = float(varies.sum())
        usable = steps.scale and size > ROUNDING * (spread + square)
        return cls(
            found.mean if steps.centre else np.zeros_like(found.mean),
            size**-0.5 if usable else 1.0,
            steps.rowwise,
            whiten,
            offset_report(found.mean, found.variance, mode=mode),
        )

    def ready(self, x: np.ndarray) -> np.ndarray:
        """Raw rows after the row-wise part, float32 (n, d): what the folded model reads."""
        return _ready(x, self.rowwise)

    def restore(self, u_hat: np.ndarray, x: np.ndarray | None) -> np.ndarray:
        """Undo the row-wise part: reconstructions (n, d) of ``ready(x)`` become reconstructions of x.

        ``x``, the raw rows, may be None where ``rowwise`` is None.
        """
        if self.rowwise is None:
            return u_hat
        shift, divisor = ROWWISE[self.rowwise](x)
        if self.rowwise == "layernorm_std":
            divisor = divisor - SMALLEST_DEVIATION
        return u_hat * divisor.astype(np.float32) + shift.astype(np.float32)

    def apply(self, u: torch.Tensor) -> torch.Tensor:
        """Rows for training, y, from rows that :meth:`ready` gave."""
        key = (u.device, u.dtype)
        if key not in self._tensors:
            wide = self.whiten
            if wide is not None and len(wide) < NARROW:
                wide = np.pad(wide, ((0, 0), (0, NARROW - len(wide))))
            parts = (None if a is None else torch.from_numpy(a).to(u.dtype) for a in (self.mean, wide))
            self._tensors[key] = tuple(a if a is None else a.to(u.device) for a in parts)
        mean, whiten = self._tensors[key]
        y = torch.sub(u, mean).mul_(self.scale)
        return y if whiten is None else (y @ whiten)[:, : len(mean)]

    @torch.no_grad()
    def fold_(self, model: SparseAutoencoder) -> None:
        """Rewrite a model trained on y so that it takes u (see :meth:`ready`).

        With y = c (u - mean) W and a positively homogeneous activation:
        ``b_dec <- mean + b_dec W^-1 / c``, ``W_enc <- W_enc W^T``, ``W_dec <- W_dec W^-1``, ``b_enc <- b_enc / c`` and
        ``threshold <- threshold / c`` (one, or one a latent). The same latents are active; the new codes are the old
        ones divided by c and the new reconstruction is the old one mapped back. Without W the atoms keep unit length.
        With it they do not: atom j then has the length, in the units of u, of one whitened unit along it. Scaling them
        back to unit length would scale codes latent by latent and change which ones are the k largest.
        """
        bias = model.b_dec.detach().cpu().double() / self.scale
        if self.whiten is not None:
            forth = torch.from_numpy(self.whiten)
            back = torch.from_numpy(inverse(self.whiten))
            bias = bias @ back
            _multiply_(model.W_enc, forth.T)
            _multiply_(model.W_dec, back)
        model.b_dec.copy_(torch.as_tensor(self.mean, dtype=torch.float64) + bias)
        model.b_enc.div_(self.scale)
        model.threshold.div_(self.scale)

    @torch.no_grad()
    def unfold_(self, model: SparseAutoencoder) -> None:
        """Inverse of :meth:`fold_`, to train a folded model further on y (equal up to float32 rounding)."""
        bias = (model.b_dec.detach().cpu().double() - torch.as_tensor(self.mean, dtype=torch.float64)) * self.scale
        if self.whiten is not None:
            forth = torch.from_numpy(self.whiten)
            back = torch.from_numpy(inverse(self.whiten))
            bias = bias @ forth
            _multiply_(model.W_enc, back.T)
            _multiply_(model.W_dec, forth)
        model.b_dec.copy_(bias)
        model.b_enc.mul_(self.scale)
        model.threshold.mul_(self.scale)


def moments(blocks: Iterable[np.ndarray], *, covariance: bool = False) -> Moments:
    """Moments of blocks of rows, in float64, by the pairwise update of Chan, Golub and LeVeque (1983).

    Deviations are taken about each block's own mean, so that a common offset costs no digits.

    Raises
    ------
    InputError
        If there are no rows.
    """
    n, mean, spread = 0, 0.0, 0.0
    for block in blocks:
        for start in range(0, len(block), MOMENT_ROWS):
            rows = np.asarray(block[start : start + MOMENT_ROWS], np.float64)
            here = rows.mean(0)
            rows = rows - here
            shift, weight = here - mean, n * len(rows) / (n + len(rows))
            if covariance:
                spread = spread + rows.T @ rows + np.outer(shift, shift) * weight
            else:
                spread = spread + np.einsum("ij,ij->j", rows, rows) + np.square(shift) * weight
            n += len(rows)
            mean = mean + shift * (len(rows) / n)
    if n == 0:
        raise InputError("no training rows: nothing to take means of; pass at least one row")
    if covariance:
        return Moments(n, mean, np.diag(spread) / n, spread / n)
    return Moments(n, mean, spread / n)


def whitening(covariance: np.ndarray, *, ridge: float = RIDGE) -> np.ndarray:
    """W with (x - mean) W of unit variance along each principal axis, shrunken where there is little variance.

    W = V diag((lambda_l + ridge * mean(lambda))^-1/2), covariance = V diag(lambda) V^T, largest eigenvalue first. The
    variance of column l of (x - mean) W is lambda_l / (lambda_l + ridge mean(lambda)): near 1 for large eigenvalues, 0
    for directions without variance, so fewer rows than features, or dependent features, are safe. Each column of V
    has its largest entry (in size) positive.

    Parameters
    ----------
    covariance
        (d, d), not all zero.
    ridge
        Positive share of the mean eigenvalue.

    Returns
    -------
    ndarray (d, d), float64

    Raises
    ------
    InputError
        If ``ridge`` is not positive.
    """
    if not ridge > 0:
        raise InputError(f"ridge={ridge!r} must be positive: it bounds how much directions of no variance grow")
    eigenvalues, axes = np.linalg.eigh(covariance)
    eigenvalues, axes = np.maximum(eigenvalues[::-1], 0), axes[:, ::-1]
    top = np.abs(axes).argmax(0)
    axes = axes * np.where(axes[top, np.arange(len(axes))] < 0, -1.0, 1.0)
    return axes / np.sqrt(eigenvalues + ridge * eigenvalues.mean())


def inverse(whiten: np.ndarray) -> np.ndarray:
    """W^-1 (d, d) of a matrix with orthogonal columns: its transpose, each row divided by the squared norm."""
    return np.ascontiguousarray((whiten / np.square(whiten).sum(0)).T)


def offset_report(mean: np.ndarray, variance: np.ndarray, *, mode: str) -> dict[str, Any]:
    """How large the common offset of the rows is, and whether one dimension dominates.

    Parameters
    ----------
    mean, variance
        Of the columns, (d,), after the row-wise part of the mode.
    mode
        The ``normalise`` setting that the advice is about.

    Returns
    -------
    dict
        ``offset_to_spread`` = ||mean||^2 / mean ||u - mean||^2 (inf without spread, 0 if all rows are 0);
        ``largest_mean_dimension`` and ``largest_mean_ratio`` = max_j |mean_j| / median_j |mean_j| (massive
        activations, Sun et al. 2024, arXiv 2402.17762; inf where the median is 0); ``largest_variance_dimension`` and
        ``largest_variance_share`` of the summed variance; ``advice``: text, empty if there is nothing to say. It is
        given when the mode does not centre and the ratio exceeds :data:`LARGE_OFFSET`, and when the mode does not
        whiten and one dimension holds more than :data:`DOMINANT_SHARE` of the variance and 10 times its equal part.
    """
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    square, spread = float(mean @ mean), float(variance.sum())
    sizes = np.abs(mean)
    median, largest, widest = float(np.median(sizes)), int(sizes.argmax()), int(variance.argmax())
    ratio = _ratio(square, spread)
    share = float(variance[widest] / spread) if spread > 0 else 0.0
    steps, advice = MODES[mode], []
    if not steps.centre and ratio > LARGE_OFFSET:
        advice.append(
            f"the rows share an offset of {ratio:.3g} times their spread (||mean||^2 / mean ||x - mean||^2), and "
            f"normalise={mode!r} keeps it: latents will describe the offset. Use normalise='centre_scale'"
        )
    if not (steps.whiten or steps.standardise) and share > max(DOMINANT_SHARE, 10 / len(mean)):
        advice.append(
            f"dimension {widest} holds {share:.0%} of the variance, so the loss is mostly about it. Compare with "
            "normalise='whiten', which evens directions out, or 'standardise' where the columns have units of their own"
        )
    return {
        "offset_to_spread": ratio,
        "largest_mean_dimension": largest,
        "largest_mean_ratio": _ratio(float(sizes[largest]), median),
        "largest_variance_dimension": widest,
        "largest_variance_share": share,
        "advice": "; ".join(advice),
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else float("inf") if above > 0 else 0.0


def _layernorm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row means and (unbiased standard deviation + 1e-5), each (n, 1) float64; a constant row becomes 0."""
    mean = x.mean(1, keepdims=True, dtype=np.float64)
    squares = np.square(x - mean).sum(1, keepdims=True)
    return mean, np.sqrt(squares / max(x.shape[1] - 1, 1)) + SMALLEST_DEVIATION


def _l2(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero and the row norms, at least 1e-6, each (n, 1) float64; a zero row stays 0."""
    norm = np.sqrt(np.square(x, dtype=np.float64).sum(1, keepdims=True))
    return np.zeros_like(norm), np.maximum(norm, SMALLEST_NORM)


ROWWISE = {"layernorm": _layernorm, "layernorm_std": _layernorm, "l2": _l2}
"""Shift and divisor of each row, (n, 1): u = (x - shift) / divisor."""


def _ready(x: np.ndarray, rowwise: str | None) -> np.ndarray:
    if rowwise is None:
        return x
    shift, divisor = ROWWISE[rowwise](x)
    return ((x - shift) / divisor).astype(np.float32)


def _multiply_(weight: torch.Tensor, matrix: torch.Tensor) -> None:
    """weight (m, d) <- weight matrix (d, d), in float64, some rows at a time."""
    for start in range(0, len(weight), FOLD_ROWS):
        part = weight[start : start + FOLD_ROWS]
        part.copy_(part.detach().cpu().double() @ matrix)
