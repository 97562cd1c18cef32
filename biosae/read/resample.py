"""Resampling of signals with anti-aliasing, in pieces that equal the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np

from biosae.errors import InputError

HALF_WIDTH = 32  # taps of the low-pass filter on each side, in samples of the slower rate
CUT_OFF = 0.94  # of the slower rate's half; the filter passes below 0.88 and stops (60 dB) above 1
BETA = 6.0  # of the Kaiser window
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
    if rate == target:
        return 1, 1
    have, want = (Fraction(r).limit_denominator(MAX_TERM) for r in (rate, target))
    found = want / have if have and want else Fraction(0)
    if not found or max(found.numerator, found.denominator) > MAX_TERM:
        raise InputError(f"{rate:g} Hz cannot be resampled to {target:g} Hz by whole numbers below {MAX_TERM}")
    return found.numerator, found.denominator


@cache
def _low_pass(up: int, down: int) -> np.ndarray:
    """Taps for ``upfirdn``; those that meet one output value sum to 1, so that a constant stays what it is."""
    from scipy.signal import firwin

    slower = max(up, down)
    h = firwin(2 * HALF_WIDTH * slower + 1, CUT_OFF / slower, window=("kaiser", BETA))
    for phase in range(up):
        h[phase::up] /= h[phase::up].sum()
    return h


def piece(
    read: Callable[[int, int], np.ndarray], n: int, *, rate: float, target: float, start: float, n_out: int
) -> np.ndarray:
    """Part of a recording at another rate; the same numbers as a slice of the whole recording resampled.

    A zero-phase polyphase filter (windowed sinc, Kaiser window) reads as much before and behind the piece as it needs.
    With f the half of the slower rate, it passes 0 to 0.88 f to within 0.1 % and attenuates by 60 dB and more from f.

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
    For the filter, gaps that are shorter than its reach are bridged by straight lines; longer ones, and what lies
    beyond the recording's ends, hold the nearest value.

    Raises
    ------
    InputError
        For rates that are not positive or have no ratio in small whole numbers.

    Notes
    -----
    With ``h`` the filter, ``up / down`` the ratio and ``x`` the recording, ``out[j] = sum_i x[i] h[j down - i up]``
    (Crochiere and Rabiner, Multirate Digital Signal Processing, 1983, ch. 2).
    """
    up, down = ratio(rate, target)
    first_out = round(start * target)
    if up == down:
        return _within(read, n, first_out, n_out)
    from scipy.signal import upfirdn

    reach = HALF_WIDTH * max(up, down) // up + 1  # input samples on each side that one output value needs
    margin = 2 * reach + 2  # and as much again, to see how long a gap at the edge is
    block = first_out // up - margin // down - 1  # input block * down and output block * up are the same moment
    first = block * down
    last = math.ceil((first_out + n_out) * down / up) + margin + 1
    x = _within(read, n, first, last - first)
    gaps = np.isnan(x)
    filled = _bridged(x, reach)
    h = _low_pass(up, down)
    delay = (len(h) - 1) // 2
    # out[j] = sum_i x[i] h[j * down - i * up + delay]; upfirdn gives every down-th value from the filter's start
    skip = -delay % down
    y = upfirdn(np.concatenate([np.zeros(skip), h]), filled, up=up, down=down, axis=-1)
    offset = (delay + skip) // down + (first_out - block * up)
    y = y[:, offset : offset + n_out]
    moment = (first_out + np.arange(n_out)) * down / up
    nearest = np.rint(moment).astype(int)
    nearest[(nearest == n) & (moment < n)] = n - 1  # the last sample lasts to the end of the recording
    y[gaps[:, nearest - first]] = np.nan
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


def _bridged(x: np.ndarray, longest: int) -> np.ndarray:
    """Gaps filled by straight lines; those above ``longest`` samples, and the ends, by the nearest value.

    A value depends on no more than ``longest`` samples on either side of the gap's edge, so a piece is filled as the
    whole is. A channel without any value becomes 0.
    """
    out = x.copy()
    at = np.arange(x.shape[1])
    for row in out:
        known = ~np.isnan(row)
        if known.all():
            continue
        if not known.any():
            row[:] = 0.0
            continue
        before = np.maximum.accumulate(np.where(known, at, -1))
        behind = np.minimum.accumulate(np.where(known, at, len(at))[::-1])[::-1]
        nearer_before = (behind == len(at)) | ((before >= 0) & (at - before <= behind - at))
        held = row[np.where(nearer_before, before, behind)]
        short = (before >= 0) & (behind < len(at)) & (behind - before - 1 <= longest)
        line = np.interp(at, at[known], row[known])
        row[:] = np.where(known, row, np.where(short, line, held))
    return out
