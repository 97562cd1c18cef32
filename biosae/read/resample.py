"""Resampling of signals with anti-aliasing, in pieces that equal the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np

from biosae.errors import InputError

HALF_WIDTH = 10  # taps of the low-pass filter on each side, in samples of the slower rate
MAX_TERM = 10_000


def ratio(rate: float, target: float) -> tuple[int, int]:
    """``(up, down)`` in lowest terms so that ``target = rate * up / down``.

    Raises
    ------
    InputError
        If a rate is not positive, or the ratio has no terms below 10,000.
    """
    if not (rate > 0 and target > 0 and math.isfinite(rate) and math.isfinite(target)):
        raise InputError(f"a rate must be a positive number of samples a second, got {rate} and {target}")
    found = Fraction(target).limit_denominator(MAX_TERM) / Fraction(rate).limit_denominator(MAX_TERM)
    if max(found.numerator, found.denominator) > MAX_TERM:
        raise InputError(f"{rate:g} Hz cannot be resampled to {target:g} Hz by whole numbers below {MAX_TERM}")
    return found.numerator, found.denominator


@cache
def _low_pass(up: int, down: int) -> np.ndarray:
    from scipy.signal import firwin

    slower = max(up, down)
    return firwin(2 * HALF_WIDTH * slower + 1, 1 / slower, window=("kaiser", 5.0)) * up


def piece(
    read: Callable[[int, int], np.ndarray], n: int, *, rate: float, target: float, start: float, n_out: int
) -> np.ndarray:
    """Part of a recording at another rate; the same numbers as a slice of the whole recording resampled.

    A zero-phase polyphase filter (Kaiser window, beta 5, cut-off at half the slower rate) reads as much before and
    behind the piece as it needs. The recording is continued by its first and last value beyond its ends.

    Parameters
    ----------
    read
        ``read(first, count)`` gives samples ``(C, count)`` of the recording, NaN where nothing was recorded.
    n
        Samples of the recording.
    rate, target
        Samples a second, of the recording and wanted.
    start
        Start of the piece in seconds; rounded to the nearest sample of the target rate.
    n_out
        Samples wanted.

    Returns
    -------
    ``float64 (C, n_out)``; NaN where nothing was recorded within half an input sample, or beyond the recording's ends.
    Gaps are bridged by straight lines for the filter.

    Raises
    ------
    InputError
        For rates that are not positive or have no ratio in small whole numbers.
    """
    up, down = ratio(rate, target)
    first_out = round(start * target)
    if up == down:
        return _within(read, n, first_out, n_out)
    from scipy.signal import upfirdn

    reach = HALF_WIDTH * max(up, down) // up + 1
    block = first_out // up - reach // down - 1  # input block * down and output block * up are the same moment
    first = block * down
    last = math.ceil((first_out + n_out) * down / up) + reach + 1
    x = _within(read, n, first, last - first)
    gaps = np.isnan(x)
    filled = _bridged(x)
    h = _low_pass(up, down)
    delay = (len(h) - 1) // 2
    # out[j] = sum_i x[i] h[j * down - i * up + delay]; upfirdn gives every down-th value from the filter's start
    skip = -delay % down
    y = upfirdn(np.concatenate([np.zeros(skip), h]), filled, up=up, down=down, axis=-1)
    offset = (delay + skip) // down + (first_out - block * up)
    y = y[:, offset : offset + n_out]
    moment = np.clip(np.rint((first_out + np.arange(n_out)) * down / up).astype(int) - first, 0, x.shape[1] - 1)
    y[gaps[:, moment]] = np.nan
    return y


def _within(read: Callable[[int, int], np.ndarray], n: int, first: int, count: int) -> np.ndarray:
    """Samples of a span that may reach beyond the recording, NaN there."""
    low, high = max(first, 0), min(first + count, n)
    if low >= high:
        return np.full((len(read(0, 0)), count), np.nan)
    inside = np.asarray(read(low, high - low), dtype=np.float64)
    if low == first and high == first + count:
        return inside
    out = np.full((len(inside), count), np.nan)
    out[:, low - first : high - first] = inside
    return out


def _bridged(x: np.ndarray) -> np.ndarray:
    """Gaps filled by straight lines, the ends by the nearest value; a channel without any value becomes 0."""
    out = x.copy()
    at = np.arange(x.shape[1])
    for row in out:
        known = ~np.isnan(row)
        if not known.all():
            row[:] = np.interp(at, at[known], row[known]) if known.any() else 0.0
    return out
