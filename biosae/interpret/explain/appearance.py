"""Plain measures of how an item looks, with the words for more and less of each."""

from __future__ import annotations

import numpy as np

WORDS: dict[str, tuple[str, str]] = {
    "brightness": ("is brighter", "is darker"),
    "contrast": ("has more contrast", "has less contrast"),
    "red": ("is redder", "is less red"),
    "green": ("is greener", "is less green"),
    "blue": ("is bluer", "is less blue"),
    "saturation": ("has stronger colours", "has paler colours"),
    "fine_texture": ("has more fine texture", "has less fine texture"),
    "coarse_texture": ("has more coarse structure", "has less coarse structure"),
    "centre": ("has a brighter centre", "has a darker centre"),
    "amplitude": ("has a larger amplitude", "has a smaller amplitude"),
    "steepness": ("has steeper slopes", "has flatter slopes"),
    "peaks": ("has sharper peaks", "has less sharp peaks"),
    "spread_over_channels": ("has channels that differ more", "has channels that differ less"),
    "gaps": ("has more gaps", "has fewer gaps"),
    "mean": ("has higher values", "has lower values"),
    "spread": ("has more varied values", "has less varied values"),
}
"""Measure -> words for a higher and for a lower value."""


def measures(item: np.ndarray) -> dict[str, float]:
    """Measures of an item by its kind: an image uint8 (H, W, 3), a signal (C, T), a vector (d,).

    Images are in units of 0 to 1: mean and SD of grey; share of red, green and blue in the sum of colours; HSV
    saturation; SD of grey less its mean over 2 x 2 px, and of means over 2 x 2 less those over 8 x 8 px; mean of the
    central quarter less that of the rest. Signals: log10 of the SD and of the mean slope per sample over the SD, excess
    of the 99.5 % quantile of deviations over the SD, SD of log amplitudes of the channels, share missing.
    """
    if item.dtype == np.uint8:
        return _image(item.astype(float) / 255)
    return (
        _signal(item.astype(float)) if item.ndim == 2 else {"mean": float(np.mean(item)), "spread": float(np.std(item))}
    )


def _image(x: np.ndarray) -> dict[str, float]:
    grey = x.mean(axis=2)
    total = max(float(x.sum()), 1e-9)
    top = x.max(axis=2)
    fine, middle, wide = grey, _blocks(grey, 2), _blocks(grey, 8)
    h, w = grey.shape
    inside = grey[h // 4 : h - h // 4, w // 4 : w - w // 4]
    rest = (grey.sum() - inside.sum()) / max(grey.size - inside.size, 1)
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        **{name: float(x[..., c].sum() / total) for c, name in enumerate(("red", "green", "blue"))},
        "saturation": float(((top - x.min(axis=2)) / np.maximum(top, 1e-9)).mean()),
        "fine_texture": float((fine - _grown(middle, fine.shape)).std()),
        "coarse_texture": float((_grown(middle, fine.shape) - _grown(wide, fine.shape)).std()),
        "centre": float(inside.mean() - rest),
    }


def _blocks(grey: np.ndarray, size: int) -> np.ndarray:
    h, w = (max(1, s // size) for s in grey.shape)
    size_h, size_w = min(size, grey.shape[0]), min(size, grey.shape[1])
    return grey[: h * size_h, : w * size_w].reshape(h, size_h, w, size_w).mean(axis=(1, 3))


def _grown(small: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    row = np.arange(shape[0]) * small.shape[0] // shape[0]
    column = np.arange(shape[1]) * small.shape[1] // shape[1]
    return small[np.ix_(row, column)]


def _signal(x: np.ndarray) -> dict[str, float]:
    missing = float(np.isnan(x).mean())
    rows = [row[np.isfinite(row)] for row in x]
    rows = [row for row in rows if len(row) > 2]
    if not rows:
        return {
            "amplitude": np.nan,
            "steepness": np.nan,
            "peaks": np.nan,
            "spread_over_channels": np.nan,
            "gaps": missing,
        }
    sd = np.array([max(row.std(), 1e-12) for row in rows])
    slope = np.array([np.abs(np.diff(row)).mean() for row in rows])
    peak = np.array([np.quantile(np.abs(row - np.median(row)), 0.995) for row in rows])
    return {
        "amplitude": float(np.log10(sd).mean()),
        "steepness": float(np.log10(np.maximum(slope / sd, 1e-12)).mean()),
        "peaks": float((peak / sd).mean()),
        "spread_over_channels": float(np.log10(sd).std()),
        "gaps": missing,
    }
