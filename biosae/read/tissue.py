"""Where a slide has tissue: Otsu's threshold on saturation at low magnification."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import InputError
from biosae.read.slides import Slide, open_slide, resolve_mpp, thumbnail

MASK_MPP = 8.0  # um/px: the low magnification
LEAST_SATURATION = 13 / 255  # paler than this is glass, whatever Otsu says: a slide without tissue has only noise
DARKEST = 0.1  # below this value (of HSV) a saturation is noise: black borders, marker pen
LEAST_AREA = 10_000.0  # um^2: islands and holes smaller than a square of 100 um are no tissue, and no hole
_LARGEST_MASK = 2**25  # pixels


@dataclass(frozen=True)
class TissueMask:
    """Tissue of a slide at low magnification.

    Attributes
    ----------
    mask
        Where there is tissue, ``bool (h, w)``; covers the whole slide.
    thumbnail
        The slide at the same size, ``uint8 (h, w, 3)`` RGB.
    mpp
        Micrometres per pixel (x, y) of the mask.
    threshold
        Saturation, 0 to 1, above which a pixel is tissue.
    size
        ``(width, height)`` of the slide in pixels of level 0.
    path
        Where the slide was read from.
    """

    mask: np.ndarray
    thumbnail: np.ndarray
    mpp: tuple[float, float]
    threshold: float
    size: tuple[int, int]
    path: str

    @property
    def area(self) -> float:
        """Area of the tissue in square millimetres."""
        return float(self.mask.sum()) * self.mpp[0] * self.mpp[1] / 1e6


def otsu(counts: np.ndarray) -> int:
    """Otsu's threshold of a histogram: the last bin of the lower class.

    It maximises the variance between the classes, ``w0 w1 (m0 - m1)^2`` with the classes' shares ``w`` and means ``m``;
    of equal maxima the first.

    Parameters
    ----------
    counts
        Number of values in each bin, ``(n_bins,)``.

    References
    ----------
    Otsu (1979), IEEE Transactions on Systems, Man, and Cybernetics 9, 62-66, equation 14.
    """
    counts = np.asarray(counts, np.float64)
    bins = np.arange(len(counts))
    below, total = np.cumsum(counts), counts.sum()
    above = total - below
    sums = np.cumsum(counts * bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.argmax(np.nan_to_num(between, nan=0.0)))


def saturation(rgb: np.ndarray) -> np.ndarray:
    """Saturation of HSV, ``(max - min) / max`` over the channels, ``uint8`` 0 to 255; 0 where it is nearly black."""
    high, low = rgb.max(axis=2).astype(np.int32), rgb.min(axis=2).astype(np.int32)
    return np.where(high > DARKEST * 255, (255 * (high - low) + high // 2) // np.maximum(high, 1), 0).astype(np.uint8)


def tissue_mask(
    path: str | os.PathLike, *, mpp: float = MASK_MPP, slide_mpp: float | None = None, least_area: float = LEAST_AREA
) -> TissueMask:
    """Tissue of one slide.

    The slide is averaged to ``mpp``, the saturation of HSV thresholded by Otsu's method (but never below 0.05), then
    holes and islands below ``least_area`` are filled and removed.

    Parameters
    ----------
    path
        The slide, as for :func:`biosae.read.wsi`.
    mpp
        Micrometres per pixel of the mask.
    slide_mpp
        Micrometres per pixel of the slide's level 0; None takes what the file states.
    least_area
        Square micrometres; on slides smaller than 100 times that, one per cent of the slide.

    Raises
    ------
    ReadError
        If the slide cannot be read, or its scale is unknown (``no_unit``).
    InputError
        For a size that is not above 0.

    Examples
    --------
    >>> tissue = bs.read.tissue_mask("slide.svs")  # doctest: +SKIP
    >>> bs.pl.tissue(tissue)  # doctest: +SKIP
    """
    if not mpp > 0 or not least_area >= 0 or not (slide_mpp is None or slide_mpp > 0):
        raise InputError("mpp and slide_mpp are micrometres per pixel above 0, least_area square micrometres from 0")
    slide = open_slide(path)
    try:
        scale, _ = resolve_mpp(slide, slide_mpp, "argument")
        return mask_of(slide, scale, str(path), mpp=mpp, least_area=least_area)
    finally:
        slide.close()


def mask_of(
    slide: Slide, scale: tuple[float, float], path: str, *, mpp: float = MASK_MPP, least_area: float = LEAST_AREA
) -> TissueMask:
    """Tissue of an open slide whose level 0 has ``scale`` micrometres per pixel (x, y)."""
    from scipy import ndimage

    width, height = slide.levels[0]
    size = tuple(max(1, round(n * s / max(mpp, s))) for n, s in zip((width, height), scale))
    if size[0] * size[1] > _LARGEST_MASK:
        raise ReadError(
            "unsupported",
            f"a mask of {size[0]} x {size[1]} pixels is too large: {scale[0]:g} um/px cannot be true of a slide of "
            f"{width} x {height} pixels; pass slide_mpp=",
        )
    picture = thumbnail(slide, size)
    values = saturation(picture)
    threshold = max(otsu(np.bincount(values.ravel(), minlength=256)), int(LEAST_SATURATION * 255))
    mask_mpp = (width * scale[0] / size[0], height * scale[1] / size[1])
    pixel = mask_mpp[0] * mask_mpp[1]
    least = min(least_area, 0.01 * pixel * values.size) / pixel
    mask = _without_specks(values > threshold, least, ndimage)
    mask = ~_without_specks(~mask, least, ndimage)
    return TissueMask(mask, picture, mask_mpp, threshold / 255, (width, height), path)


def _without_specks(mask: np.ndarray, least: float, ndimage: object) -> np.ndarray:
    """The mask without connected pieces (by edges) of fewer than ``least`` pixels."""
    pieces, n = ndimage.label(mask)
    keep = np.bincount(pieces.ravel(), minlength=n + 1) >= least
    keep[0] = False
    return keep[pieces]


def tissue_share(tissue: TissueMask, x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """Share of boxes that is tissue, by area, exact for boxes that cut through pixels of the mask.

    Parameters
    ----------
    x, y
        Upper left corners in pixels of level 0, ``(n,)``.
    width, height
        Size of every box in pixels of level 0. What lies beyond the slide is no tissue.

    Returns
    -------
    ``float64 (n,)``, 0 to 1.
    """
    h, w = tissue.mask.shape
    table = np.zeros((h + 1, w + 1))
    table[1:, 1:] = tissue.mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    fx, fy = w / tissue.size[0], h / tissue.size[1]
    left, right = np.clip(np.asarray(x) * fx, 0, w), np.clip((np.asarray(x) + width) * fx, 0, w)
    top, bottom = np.clip(np.asarray(y) * fy, 0, h), np.clip((np.asarray(y) + height) * fy, 0, h)

    def up_to(across: np.ndarray, down: np.ndarray) -> np.ndarray:
        i, j = np.minimum(down.astype(int), h - 1), np.minimum(across.astype(int), w - 1)
        a, b = down - i, across - j
        upper = table[i, j] * (1 - b) + table[i, j + 1] * b
        return upper * (1 - a) + (table[i + 1, j] * (1 - b) + table[i + 1, j + 1] * b) * a

    covered = up_to(right, bottom) - up_to(left, bottom) - up_to(right, top) + up_to(left, top)
    return np.clip(covered / (width * fx * height * fy), 0, 1)
