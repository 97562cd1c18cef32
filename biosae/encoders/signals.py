"""Encoders of signals: what a network expects of a recording, and how a window becomes its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.data.items import ReadError
from biosae.encoders.base import Encoder
from biosae.encoders.catalog import EncoderInfo
from biosae.errors import InputError, nearest
from biosae.read.channels import canonical_channel, canonical_unit, factor

if TYPE_CHECKING:
    import torch

SIGNAL_PREPROCESSING = ("rate", "unit", "channels", "seconds", "amplitude", "band")
"""Fields of a catalogue entry that say how a signal becomes the network's input; also arguments of ``load``."""
GAPS = ("max_gap", "max_missing")
_TINY = 1e-8


def _spread(x: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """A divisor of each channel; infinite where a channel is flat, in whatever unit it is."""
    return np.where(spread > _TINY * np.abs(x).max(axis=1, keepdims=True), spread, np.inf)


def _zscore(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=1, keepdims=True)) / _spread(x, x.std(axis=1, keepdims=True))


def _iqr(x: np.ndarray) -> np.ndarray:
    low, median, high = np.quantile(x, (0.25, 0.5, 0.75), axis=1, keepdims=True)
    clipped = np.clip(x, -40 * (median - low), 40 * (high - median))
    return (clipped - median) / _spread(x, high - low)


AMPLITUDES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "per_100": lambda x: x / 100,
    "zscore": _zscore,
    "zscore_clip15": lambda x: np.clip(_zscore(x), -15, 15),
    "percentile_95": lambda x: x / _spread(x, np.quantile(np.abs(x), 0.95, axis=1, keepdims=True)),
    "iqr": _iqr,
}
"""What is done to the values of each channel of a window, which are in the encoder's unit:

``none`` nothing; ``per_100`` divided by 100 (microvolts for LaBraM, CBraMod and EEG-DINO); ``zscore`` mean 0 and
standard deviation 1 over the window, and with ``_clip15`` cut at 15; ``percentile_95`` divided by the 95th percentile
of the absolute values (BIOT); ``iqr`` clipped to 40 half-ranges about the median, then median 0 and inter-quartile
range 1 (RobustSleepNet). A flat channel becomes 0 where its spread would divide."""


@dataclass(frozen=True)
class SignalPreprocess:
    """The preprocessing of one encoder of signals, ``float32 (C, T)`` to ``float32 (C', T')``.

    Parameters
    ----------
    rate
        Samples a second (Hz) that the network expects; None: any.
    unit
        Unit in which the amplitude rule is applied; None: whatever the signals have.
    channels
        Names of the channels in the network's order; None: any.
    n_channels
        Number of channels; None: any.
    length, multiple
        Samples in a window (None: any), and the number of samples of which only whole multiples are used; what is left
        over at the end is not seen.
    amplitude
        Key of ``AMPLITUDES``.
    band
        Lower and upper edge in Hz of a zero-phase Butterworth band-pass of order 2 (forwards and backwards). An edge at
        0 or at half the rate or above is no filter on that side: resampling has cut there already.
    max_gap, max_missing
        Longest gap in seconds, and largest missing share of a channel, that is filled by straight lines.
    take, factors
        Where the network's channels stand among those of the samples, and by what their values are multiplied to be in
        ``unit``; set by :meth:`SignalEncoder.suited`.
    """

    rate: float | None = None
    unit: str | None = None
    channels: tuple[str, ...] | None = None
    n_channels: int | None = None
    length: int | None = None
    multiple: int = 1
    amplitude: str = "none"
    band: tuple[float, float] | None = None
    max_gap: float = 0.5
    max_missing: float = 0.05
    take: tuple[int, ...] | None = None
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.amplitude not in AMPLITUDES:
            raise InputError(f"no amplitude rule {self.amplitude!r}; {nearest(self.amplitude, AMPLITUDES)}")
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise InputError(f"rate must be samples a second above 0, got {self.rate}")
        if self.unit is not None and canonical_unit(self.unit) != self.unit:
            raise InputError(f"unit={self.unit!r} is no known unit, such as 'uV' or 'mV'")
        if self.band is not None and not (len(self.band) == 2 and 0 <= self.band[0] < self.band[1]):
            raise InputError(f"band must be a lower and an upper edge in Hz, got {self.band}")
        if self.length is not None and self.length < self.multiple:
            raise InputError(f"a window must hold at least {self.multiple} samples, got {self.length}")
        if not (self.max_gap >= 0 and 0 <= self.max_missing < 1):
            raise InputError("max_gap must be seconds of at least 0, and max_missing a share in [0, 1)")

    def spec(self) -> dict[str, Any]:
        """Everything that determines the numbers, as plain JSON values.

        The samples' own unit and order of channels are not in it: two data sets in V and uV share a specification.
        """
        return {
            "rate": self.rate, "unit": self.unit, "channels": None if self.channels is None else list(self.channels),
            "n_channels": self.n_channels, "length": self.length, "multiple": self.multiple,
            "amplitude": self.amplitude, "band": None if self.band is None else list(self.band),
            "max_gap": self.max_gap, "max_missing": self.max_missing,
        }  # fmt: skip

    def __call__(self, signal: np.ndarray) -> torch.Tensor:
        """Preprocess one window.

        Parameters
        ----------
        signal
            ``float32 (C, T)``, NaN where nothing was recorded; in ``unit`` unless ``factors`` say otherwise.

        Returns
        -------
        torch.Tensor
            ``float32 (C', T')``.

        Raises
        ------
        ReadError
            ``too_short``, ``wrong_size``, or ``gaps`` (more is missing than may be filled).
        InputError
            If it is no (channels, time) array, or has another number of channels.
        """
        import torch

        x = np.asarray(signal)
        if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
            raise InputError(f"a signal must be float (channels, time), got {x.dtype} {x.shape}")
        x = x.astype(np.float64)
        if self.take is not None:
            x = x[list(self.take)]
        if self.n_channels is not None and len(x) != self.n_channels:
            raise InputError(f"{self.n_channels} channels are expected, got {len(x)}")
        x = self._filled(x[:, : self._usable(x.shape[1])])
        if self.factors is not None:
            x = x * np.asarray(self.factors)[:, None]
        if self.band is not None:
            level = _TINY * np.abs(x).max(axis=1, keepdims=True)
            x = self._filtered(x)
            # what is left of a flat channel is the filter's rounding, which an amplitude rule would scale up
            x = np.where(np.abs(x).max(axis=1, keepdims=True) > level, x, 0.0)
        return torch.from_numpy(np.ascontiguousarray(AMPLITUDES[self.amplitude](x), dtype=np.float32))

    def _usable(self, n: int) -> int:
        """Samples that are used of a window of ``n``."""
        seconds = "" if self.rate is None else f" ({(self.length or self.multiple) / self.rate:g} s)"
        need = self.length or self.multiple
        remedy = "read with window=, or load(..., seconds=)"
        if n < need:
            raise ReadError("too_short", f"the window has {n} samples, the encoder needs {need}{seconds}; {remedy}")
        if self.length is not None and n > need:
            raise ReadError("wrong_size", f"the window has {n} samples, the encoder takes {need}{seconds}; {remedy}")
        return n - n % self.multiple

    def _filled(self, x: np.ndarray) -> np.ndarray:
        missing = ~np.isfinite(x)
        if not missing.any():
            return x
        at = np.arange(x.shape[1])
        for row, gone in zip(x, missing):
            share, run = gone.mean(), _longest(gone)
            limit = np.inf if self.rate is None else self.max_gap * self.rate
            if share > self.max_missing or run > limit:
                longest = f"{run} samples" if self.rate is None else f"{run / self.rate:.3g} s"
                raise ReadError(
                    "gaps",
                    f"{share:.1%} of a channel is missing, the longest gap is {longest}; {self.max_missing:.1%} and "
                    f"{self.max_gap:g} s may be filled (load(..., max_missing=, max_gap=))",
                )
            row[gone] = np.interp(at[gone], at[~gone], row[~gone])
        return x

    def _filtered(self, x: np.ndarray) -> np.ndarray:
        from scipy.signal import sosfiltfilt

        edges = (self.band[0] if self.band[0] > 0 else None, self.band[1] if self.band[1] < self.rate / 2 else None)
        if edges == (None, None):
            return x
        slowest = next(e for e in edges if e is not None)
        reach = min(x.shape[1] - 1, round(3 * self.rate / slowest))
        return sosfiltfilt(_band_pass(self.rate, *edges), x, axis=1, padlen=reach)


@cache
def _band_pass(rate: float, low: float | None, high: float | None) -> np.ndarray:
    from scipy.signal import butter

    if low is not None and high is not None:
        return butter(2, (low, high), "bandpass", fs=rate, output="sos")
    kind = "lowpass" if low is None else "highpass"
    return butter(2, high if low is None else low, kind, fs=rate, output="sos")


def _longest(gone: np.ndarray) -> int:
    """Length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], gone.view(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def signal_preprocess(
    facts: EncoderInfo, overrides: Mapping[str, Any], *, multiple: int = 1, config: Mapping[str, Any] | None = None
) -> tuple[EncoderInfo, SignalPreprocess]:
    """Facts with the preprocessing in force, and the preprocessing.

    The user's values come first, then confirmed catalogue values, then those of the source's configuration, then
    unconfirmed catalogue values.

    Raises
    ------
    InputError
        For values that cannot be meant.
    """
    known = {k: v for k in SIGNAL_PREPROCESSING if (v := getattr(facts, k)) is not None}
    sure = {k: v for k, v in known.items() if k not in facts.unconfirmed}
    values = known | dict(config or {}) | sure | {k: v for k, v in overrides.items() if k not in (*GAPS, "pool")}
    if isinstance(values.get("channels"), str):
        raise InputError(f"channels={values['channels']!r} must be a list of names")
    channels = tuple(values["channels"]) if values.get("channels") else None
    unit, rate, seconds = values.get("unit"), values.get("rate"), values.get("seconds")
    band = values.get("band")
    if seconds is not None and rate is None:
        raise InputError("seconds= needs rate= (Hz)")
    made = SignalPreprocess(
        rate=None if rate is None else float(rate),
        unit=None if unit is None else canonical_unit(unit) or unit,
        channels=channels,
        n_channels=len(channels) if channels else facts.n_channels,
        length=None if seconds is None else round(seconds * rate),
        multiple=multiple,
        amplitude=values.get("amplitude") or "none",
        band=None if band is None else tuple(float(b) for b in band),
        **{k: float(overrides[k]) for k in GAPS if k in overrides},
    )
    in_force = {"rate": made.rate, "unit": made.unit, "channels": channels, "seconds": seconds,
                "amplitude": made.amplitude, "band": made.band, "n_channels": made.n_channels}  # fmt: skip
    return replace(facts, pool=overrides.get("pool", facts.pool), **in_force), made


class SignalEncoder(Encoder):
    """A frozen network of signals ``(B, C, T)``.

    :meth:`suited` sets it to the samples: channels are taken by name in the network's order, and values are turned into
    the network's unit where both measure the same quantity (``given`` in the identity says from what). A rate, a
    quantity or channels that do not agree are an error that says how to read the signals.
    """

    item = "signal"
    given: Mapping[str, Any] | None = None

    def at_mpp(self, mpp: float | None, *, match_mpp: bool | None = None) -> SignalEncoder:
        """The encoder itself; signals have no micrometres per pixel."""
        if mpp is not None or match_mpp:
            raise InputError(f"{self.info.name} takes signals, which have no micrometres per pixel; leave out mpp=")
        return self

    def suited(self, samples: Any) -> SignalEncoder:
        """The encoder set to the rate, units and channels of the samples.

        Raises
        ------
        InputError
            If the samples are of another kind, rate or quantity, or lack channels; the message says how to read them.
        """
        self._check_item(samples)
        p = self.preprocess
        if p.rate is not None and (samples.rate is None or not math.isclose(samples.rate, p.rate, rel_tol=1e-6)):
            has = "rates that differ" if samples.rate is None else f"{samples.rate:g} Hz"
            self._refuse(f"expects {p.rate:g} Hz, the samples have {has}")
        take = self._places(samples.channels)
        units = [samples.channel_units[i] for i in take]
        factors = tuple(1.0 if p.unit is None else self._factor(u) for u in units)
        other = copy.copy(self)
        other.preprocess = replace(p, take=tuple(take), factors=factors)
        other.given = {"unit": samples.unit, "channels": list(samples.channels), "rate": samples.rate}
        return other

    def _places(self, present: Sequence[str]) -> list[int]:
        """Where the network's channels stand among those of the samples."""
        p = self.preprocess
        if p.channels is None:
            if p.n_channels is not None and len(present) != p.n_channels:
                self._refuse(f"takes {p.n_channels} channel(s), the samples have {len(present)} ({', '.join(present)})")
            return list(range(len(present)))
        keys = [canonical_channel(c) for c in present]
        absent = [c for c in p.channels if keys.count(canonical_channel(c)) != 1]
        if absent:
            self._refuse(f"needs the channels {', '.join(p.channels)}; not (or not once) there: {', '.join(absent)}")
        return [keys.index(canonical_channel(c)) for c in p.channels]

    def _factor(self, unit: str) -> float:
        try:
            return factor(unit, self.preprocess.unit)
        except InputError as error:
            self._refuse(f"expects {self.preprocess.unit}: {error}")

    def _refuse(self, why: str) -> None:
        raise InputError(f"{self.info.name} {why}; read the signals with {self.reading()}")

    def reading(self) -> str:
        """Arguments with which a reader of signals gives what this encoder expects."""
        p = self.preprocess
        said = [] if p.rate is None else [f"rate={p.rate:g}"]
        if p.unit is not None:
            said.append(f"unit={p.unit!r}")
        if p.channels is not None:
            said.append(f"channels={list(p.channels)!r}")
        elif p.n_channels is not None:
            said.append("channels=['...']" if p.n_channels == 1 else f"channels=[{p.n_channels} names]")
        seconds = self.info.seconds
        if seconds is not None:
            said.append(f"window={seconds:g}")
        return f"bs.read.edf or bs.read.wfdb({', '.join(['...', *said])})"

    def identity(self, layer: int | str = -1, pool: str = "default") -> dict[str, Any]:
        return super().identity(layer, pool) | {"given": self.given}

    def _check_batch(self, batch: torch.Tensor) -> None:
        p = self.preprocess
        if batch.ndim != 3 or (p.n_channels is not None and batch.shape[1] != p.n_channels):
            shape = f"(B, {p.n_channels or 'C'}, T)"
            raise InputError(f"a batch must be {shape}, got {tuple(batch.shape)}")
        if p.length is not None and batch.shape[2] != p.length:
            raise InputError(f"{self.info.name} takes windows of {p.length} samples, got {batch.shape[2]}")
        if batch.shape[2] < p.multiple or batch.shape[2] % p.multiple:
            raise InputError(f"{self.info.name} needs a multiple of {p.multiple} samples, got {batch.shape[2]}")
