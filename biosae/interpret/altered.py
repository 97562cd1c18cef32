"""Items altered on purpose: inputs without meaning (noise, scrambled, shuffled, blank), and changes that a label should
survive.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from biosae.data.items import ReadError, make_reader
from biosae.data.samples import Samples
from biosae.errors import InputError, nearest

MEANINGLESS = {
    "image": ("white", "pink", "phase", "patches", "blank"),
    "signal": ("white", "phase", "segments", "blank"),
}
"""Families of inputs without meaning, by kind of item."""
HARMLESS = {"image": ("shift", "flip", "colour"), "signal": ("gain", "swap")}
"""Changes that most labels survive."""
GRID = 8
"""Patches along a side, or segments along time, that are shuffled."""
LOOK = 64
"""Items from which the channel means and deviations of a data set are taken."""


def altered(samples: Samples, how: str, *, colour: Sequence[int] | None = None, random_state: int = 0) -> Samples:
    """Samples whose items are altered as they are read; nothing is written.

    Each item is altered by a generator seeded with ``random_state`` and its id, so that reading it again, in any order
    or process, gives the same numbers.

    Parameters
    ----------
    samples
        Images or signals.
    how
        Images without meaning: ``white`` and ``pink`` (1/f) noise with the channel means and deviations of the data
        set, ``phase`` (amplitudes of the item's Fourier spectrum, random phases, the same turn in every channel),
        ``patches`` (8 by 8 patches shuffled; what is left over at the edges stays), ``blank`` (one colour). Signals
        without meaning: ``white`` (each channel's mean and deviation), ``phase`` (surrogates of the same spectra and
        cross-spectra), ``segments`` (8 segments of time shuffled, all channels alike), ``blank`` (each channel's mean).
        Harmless changes of images: ``shift`` (1/16 of the side, edges mirrored), ``flip`` (left to right), ``colour``
        (each channel times 0.9 to 1.1); of signals: ``gain`` (times 0.8 to 1.25), ``swap`` (two channels exchanged).
    colour
        Colour of ``blank`` images; default: that of glass, the 99 % quantile of each channel of the data set.
    random_state
        Seed.

    Returns
    -------
    Samples
        The same table, with ids ``<id>~<how>`` for items without meaning and the same ids for harmless changes (so
        that codes can be compared item by item); masks are left out.

    Raises
    ------
    InputError
        If the items cannot be altered so.

    References
    ----------
    Surrogates of the same cross-spectra: Prichard and Theiler, Phys Rev Lett 73, 951, 1994.
    """
    kind = samples.item
    known = (*MEANINGLESS.get(kind, ()), *HARMLESS.get(kind, ()))
    if how not in known:
        raise InputError(
            f"{kind} items cannot be altered by {how!r}; {nearest(how, known)}"
            if known
            else f"items of kind {kind!r} cannot be altered; images and signals can"
        )
    if kind == "signal" and how == "swap" and len(samples.channels) < 2:
        raise InputError("the signals have one channel: there is nothing to swap")
    levels = _levels(samples, colour) if kind == "image" and how in ("white", "pink", "blank") else {}
    reader = AlteredReader(samples.reader.spec(), how, seed=random_state, **levels)
    obs = samples.obs.drop(columns=["mask"], errors="ignore")
    if how in MEANINGLESS[kind]:
        obs = obs.set_axis(obs.index.astype(str) + f"~{how}").rename_axis(samples.obs.index.name)
    roles = {role: column for role, column in samples.roles.items() if role != "mask" and column in obs}
    whole = None if "mpp" in samples.roles else samples.mpp
    return Samples(
        obs, reader, roles={"patient": None, **roles}, mpp=whole, root=samples.root, meta=samples.meta
    )  # fmt: skip


class AlteredReader:
    """Reader that alters what another reader gives. ``reader`` is that reader's ``spec()``."""

    def __init__(
        self, reader: Mapping[str, Any], how: str, *, seed: int = 0, mean: Sequence[float] | None = None,
        sd: Sequence[float] | None = None, colour: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.inner, self.how, self.seed = make_reader(reader), how, int(seed)
        self.levels = {"mean": mean, "sd": sd, "colour": colour}
        self.item = getattr(self.inner, "item", "image")
        self.columns = tuple(getattr(self.inner, "columns", ()))
        for name in ("rate", "unit", "channels", "channel_units"):
            if hasattr(self.inner, name):
                setattr(self, name, getattr(self.inner, name))

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """The altered item of the row."""
        name = str(row["sample_id"]).removesuffix(f"~{self.how}")
        item = self.inner(ChainMap({"sample_id": name}, row))
        if not item.size:
            raise ReadError("empty", "the item has no values to alter")
        key = hashlib.sha256(name.encode()).digest()[:8]
        rng = np.random.default_rng([self.seed, int.from_bytes(key, "little")])
        if self.item == "image":
            values = IMAGES[self.how](item.astype(np.float64), rng, self.levels)
            return np.clip(np.rint(values), 0, 255).astype(np.uint8)
        gaps = np.isnan(item)
        filled = np.where(gaps, _channel_mean(item), item.astype(np.float64))
        return np.where(gaps, np.nan, SIGNALS[self.how](filled, rng)).astype(np.float32)

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        levels = {k: v for k, v in self.levels.items() if v is not None}
        return {"kind": "altered", "reader": self.inner.spec(), "how": self.how, "seed": self.seed, **levels}


def _levels(samples: Samples, colour: Sequence[int] | None) -> dict[str, list[float]]:
    """Mean, deviation and brightest colour of the channels, from items spread over the table."""
    pixels = []
    for i in np.unique(np.linspace(0, len(samples) - 1, min(LOOK, len(samples))).astype(int)):
        try:
            item = samples[int(i)]
        except ReadError:
            continue
        flat = item.reshape(-1, 3)
        pixels.append(flat[:: max(1, len(flat) // 4096)])
    if not pixels:
        raise InputError("none of the items that were looked at can be read")
    values = np.concatenate(pixels).astype(np.float64)
    bright = np.quantile(values, 0.99, axis=0) if colour is None else np.asarray(colour, dtype=np.float64)
    if bright.shape != (3,) or (bright < 0).any() or (bright > 255).any():
        raise InputError("colour= is three numbers from 0 to 255")
    round_ = {"mean": values.mean(axis=0), "sd": values.std(axis=0), "colour": bright}
    return {name: [round(float(v), 3) for v in three] for name, three in round_.items()}


def _channel_mean(item: np.ndarray) -> np.ndarray:
    known = np.isfinite(item)
    total = np.where(known, item, 0).sum(axis=1, keepdims=True, dtype=np.float64)
    return total / np.maximum(known.sum(axis=1, keepdims=True), 1)


def _white(x: np.ndarray, rng: np.random.Generator, levels: Mapping[str, Any]) -> np.ndarray:
    return _with_levels(rng.standard_normal(x.shape), levels)


def _pink(x: np.ndarray, rng: np.random.Generator, levels: Mapping[str, Any]) -> np.ndarray:
    """Noise whose amplitude falls with 1 / spatial frequency."""
    h, w = x.shape[:2]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(x.shape), axes=(0, 1)) / frequency[..., None]
    noise = np.fft.irfft2(spectrum, s=(h, w), axes=(0, 1))
    spread = noise.std(axis=(0, 1))
    return _with_levels(noise / np.where(spread > 0, spread, 1), levels)


def _with_levels(noise: np.ndarray, levels: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(levels["mean"]) + np.asarray(levels["sd"]) * noise


def _phase(x: np.ndarray, rng: np.random.Generator, levels: Mapping[str, Any]) -> np.ndarray:
    """Random phases, those of white noise, so that the result is real; the mean stays."""
    turn = np.fft.rfft2(rng.standard_normal(x.shape[:2]))
    turn /= np.where(np.abs(turn) > 0, np.abs(turn), 1)
    turn[0, 0] = 1
    return np.fft.irfft2(np.fft.rfft2(x, axes=(0, 1)) * turn[..., None], s=x.shape[:2], axes=(0, 1))


def _patches(x: np.ndarray, rng: np.random.Generator, levels: Mapping[str, Any]) -> np.ndarray:
    n = min(GRID, *x.shape[:2])
    h, w = x.shape[0] // n, x.shape[1] // n
    inside = x[: n * h, : n * w].reshape(n, h, n, w, -1).swapaxes(1, 2).reshape(n * n, h, w, -1)
    inside = inside[rng.permutation(n * n)].reshape(n, n, h, w, -1).swapaxes(1, 2)
    out = x.copy()
    out[: n * h, : n * w] = inside.reshape(n * h, n * w, -1)
    return out


def _blank(x: np.ndarray, rng: np.random.Generator, levels: Mapping[str, Any]) -> np.ndarray:
    return np.broadcast_to(np.asarray(levels["colour"]), x.shape)


def _shift(x: np.ndarray, rng: np.random.Generator, levels: Mapping[str, Any]) -> np.ndarray:
    for axis in (0, 1):
        by = max(1, x.shape[axis] // 16)
        if x.shape[axis] > by:
            pad = [(by, 0) if a == axis else (0, 0) for a in range(3)]
            x = np.pad(x, pad, mode="reflect").take(range(x.shape[axis]), axis=axis)
    return x


def _surrogate(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same random phase added to every channel at each frequency: spectra and cross-spectra stay."""
    n = x.shape[1]
    turn = np.exp(2j * np.pi * rng.random(n // 2 + 1))
    turn[0] = 1
    if n % 2 == 0:
        turn[-1] = 1
    return np.fft.irfft(np.fft.rfft(x, axis=1) * turn, n=n, axis=1)


def _segments(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    parts = np.array_split(np.arange(x.shape[1]), min(GRID, x.shape[1]))
    return x[:, np.concatenate([parts[k] for k in rng.permutation(len(parts))])]


def _swap(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b = rng.choice(len(x), 2, replace=False)
    out = x.copy()
    out[[a, b]] = x[[b, a]]
    return out


IMAGES: dict[str, Callable[..., np.ndarray]] = {
    "white": _white, "pink": _pink, "phase": _phase, "patches": _patches, "blank": _blank, "shift": _shift,
    "flip": lambda x, rng, levels: x[:, ::-1], "colour": lambda x, rng, levels: x * rng.uniform(0.9, 1.1, 3),
}  # fmt: skip
SIGNALS: dict[str, Callable[..., np.ndarray]] = {
    "white": lambda x, rng: x.mean(1, keepdims=True) + x.std(1, keepdims=True) * rng.standard_normal(x.shape),
    "phase": _surrogate,
    "segments": _segments,
    "blank": lambda x, rng: np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape),
    "gain": lambda x, rng: x * rng.uniform(0.8, 1.25),
    "swap": _swap,
}
