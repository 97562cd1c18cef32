"""Wrist-worn sensors: when the device was worn, and sleep or wake, second by second."""

from __future__ import annotations

import itertools

import numpy as np

from biosae.errors import InputError

EDA_RANGE = (0.05, 100.0)  # uS
TEMP_RANGE = (30.0, 40.0)  # degC
MIN_WORN = 300  # s
STATES = ("wake", "sleep", "off")  # names of the codes 0, 1, 2
BLOCK = 5  # s of the rolling median and of the means of the arm's angle
MAX_CHANGE = 5.0  # degrees between blocks
MIN_STILL = 300  # s


def on_body(eda: np.ndarray, temp: np.ndarray, *, rate: float) -> np.ndarray:
    """Seconds in which a wristband was worn.

    A second is off-body if any of its samples has a skin conductance below 0.05 or above 100 uS, or a skin temperature
    below 30 or above 40 degC, or is missing. Worn runs shorter than 5 minutes are off-body too (Corponi, Li et al.,
    JMIR mHealth 2024;12:e55094).

    Parameters
    ----------
    eda
        Skin conductance in uS, ``(T,)``.
    temp
        Skin temperature in degC, ``(T,)`` at the same rate.
    rate
        Samples a second (Hz) of both, at least 1.

    Returns
    -------
    ``bool (floor(T / rate),)``, True where worn; an unfinished last second is left out.

    Raises
    ------
    InputError
        If the lengths differ or the rate is below 1 Hz.
    """
    eda, temp = np.asarray(eda, dtype=np.float64), np.asarray(temp, dtype=np.float64)
    if eda.ndim != 1 or eda.shape != temp.shape:
        raise InputError(f"eda {eda.shape} and temp {temp.shape} must be two series of one length; crop the longer one")
    first = _seconds(len(eda), rate)
    fine = (eda >= EDA_RANGE[0]) & (eda <= EDA_RANGE[1]) & (temp >= TEMP_RANGE[0]) & (temp <= TEMP_RANGE[1])
    if len(first) < 2:
        return np.zeros(0, dtype=bool)
    worn = np.logical_and.reduceat(fine[: first[-1]], first[:-1])
    for start, stop in runs(worn):
        if worn[start] and stop - start < MIN_WORN:
            worn[start:stop] = False
    return worn


def sleep_wake(acc: np.ndarray, *, rate: float, worn: np.ndarray) -> np.ndarray:
    """Sleep or wake from the angle of the arm, on the worn seconds.

    In each worn run: rolling medians of the axes over 5 s; the angle of the arm, ``atan(az / sqrt(ax^2 + ay^2))`` in
    degrees; its means over blocks of 5 s. Between two changes of 5 degrees or more the arm is still, and still for more
    than 5 minutes is sleep (van Hees et al., PLoS ONE 2015;10:e0142533, as used by Corponi, Li et al. 2024). A run's
    ends count as changes; a last block below 5 s belongs to the block before it.

    Parameters
    ----------
    acc
        Acceleration of the axes x, y, z, ``(3, T)``, in any one unit.
    rate
        Samples a second (Hz), at least 1.
    worn
        ``bool (S,)`` a second, as :func:`on_body` gives it, from the same start.

    Returns
    -------
    ``int8 (S,)``: 0 wake, 1 sleep, 2 not worn or without acceleration (``STATES`` names them).

    Raises
    ------
    InputError
        If ``acc`` is not ``(3, T)`` or ends before the worn seconds do.
    """
    acc, worn = np.asarray(acc, dtype=np.float64), np.asarray(worn, dtype=bool)
    if acc.ndim != 2 or len(acc) != 3 or worn.ndim != 1:
        raise InputError(f"acc must be (3, T) and worn (S,), got {acc.shape} and {worn.shape}")
    first = _seconds(acc.shape[1], rate)
    if len(first) - 1 < len(worn):
        raise InputError(f"acc lasts {len(first) - 1} s and worn {len(worn)} s; crop both to the shorter")
    state = np.full(len(worn), 2, dtype=np.int8)
    if not len(worn):
        return state
    known = np.isfinite(acc).all(axis=0)
    present = worn & np.logical_and.reduceat(known[: first[len(worn)]], first[: len(worn)])
    for start, stop in runs(present):
        if present[start]:
            state[start:stop] = _still(acc[:, first[start] : first[stop]], first[start : stop + 1] - first[start], rate)
    return state


def arm_angle(acc: np.ndarray) -> np.ndarray:
    """Angle of the arm in degrees, ``atan(az / sqrt(ax^2 + ay^2))``; 90 or -90 where only the z axis has a value.

    Parameters
    ----------
    acc
        Acceleration of the axes x, y, z, ``(3, T)``.

    Returns
    -------
    ``float64 (T,)`` between -90 and 90; 0 where all axes are 0.
    """
    return np.degrees(np.arctan2(acc[2], np.hypot(acc[0], acc[1])))


def runs(values: np.ndarray) -> list[tuple[int, int]]:
    """``(start, stop)`` of each run of equal values."""
    if not len(values):
        return []
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(itertools.pairwise(edges))


def _still(acc: np.ndarray, first: np.ndarray, rate: float) -> np.ndarray:
    """1 for the seconds of long still stretches of one worn run, else 0; ``first`` holds each second's first sample."""
    from scipy.ndimage import median_filter

    width = round(BLOCK * rate) | 1
    smooth = np.stack([median_filter(axis, size=width, mode="nearest") for axis in acc])
    blocks = first[:-1:BLOCK]
    if len(first) - 1 > BLOCK and (len(first) - 1) % BLOCK:
        blocks = blocks[:-1]
    angle = np.add.reduceat(arm_angle(smooth), blocks) / np.diff([*blocks, first[-1]])
    part = np.concatenate([[0], np.cumsum(np.abs(np.diff(angle)) >= MAX_CHANGE)])
    seconds = np.minimum(np.arange(len(first) - 1) // BLOCK, len(blocks) - 1)
    length = np.bincount(part[seconds])
    return (length[part[seconds]] > MIN_STILL).astype(np.int8)


def _seconds(n: int, rate: float) -> np.ndarray:
    """First sample of each whole second, and the sample behind the last one."""
    if not (np.isfinite(rate) and rate >= 1):
        raise InputError(f"rate={rate} must be at least 1 sample a second")
    return np.ceil(np.arange(int(n / rate + 1e-9) + 1) * rate - 1e-9).astype(int)
